"""A model of Intel VT-x that runs the machine code of hypervisors, at ring 0, with VM exits.

Start with `vtx.machine.Machine`. Reading order: `x86`, `vmx`, `engine`, `devices`, `boot`, `machine`, `trace`, `cli`;
the control structures are a package of their own, `vmcs`, and come first.
"""
