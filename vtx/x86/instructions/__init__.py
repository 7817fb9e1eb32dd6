"""The instructions the model executes: everything sensitive, and what the engine lacks.

Every handler has the same shape, in the architecture's order: faults that come before interception, interception,
remaining faults, operation, `retire`. A fault is raised as `InstructionAborted`; a handler that returns without
retiring has changed control flow itself or caused a VM exit.

Spec: SDM Vol. 3, "Relative Priority of Faults and VM Exits".
"""
