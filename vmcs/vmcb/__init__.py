"""The virtual machine control block of AMD's SVM as data: fields, intercepts, exit codes, and what VMRUN checks.

Spec: APM Vol. 2, "Secure Virtual Machine", "Layout of VMCB".
"""
