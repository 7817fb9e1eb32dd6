"""AMD's Secure Virtual Machine on the processor of `vtx.x86`: VMRUN, #VMEXIT, and all between them.

Spec: APM Vol. 2, "Secure Virtual Machine".
"""

from vtx.svm.svm import Svm

__all__ = ["Svm"]
