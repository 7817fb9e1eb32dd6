"""What can come of an SVM instruction: a closed union.

Spec: APM Vol. 2, "Secure Virtual Machine".
"""

from __future__ import annotations

from typing import Final

from attrs import frozen

from vtx.x86.outcome import Fault


@frozen
class Completed:
    """The instruction completed: VMLOAD, VMSAVE, STGI, CLGI, INVLPGA."""


@frozen
class Entered:
    """VMRUN entered the guest."""


@frozen
class Exited:
    """The instruction caused a #VMEXIT with ``code``; VMRUN of an invalid VMCB is such an exit."""

    code: int


@frozen
class ShutDown:
    """The host's state could not be loaded: the processor is in the shutdown state."""


Outcome = Completed | Entered | Exited | ShutDown | Fault

COMPLETED: Final = Completed()
ENTERED: Final = Entered()
