"""The PAUSE filter: only the PAUSE that exhausts a count exits, and a pause long enough starts the count anew.

Spec: APM Vol. 2, "Pause Intercept Filtering".
"""

from __future__ import annotations

from vmcs.vmcb.intercepts import Exit
from vtx.svm import places as at
from vtx.svm.operation import SvmOperation


def exits(operation: SvmOperation) -> bool:
    """Whether the PAUSE about to be executed in the guest exits; counts it if not."""
    if not operation.intercepted(Exit.PAUSE):
        return False
    values, features = operation.vmcb.values, operation.features
    count = values[at.PAUSE_COUNT]
    if not features.pause_filter or not count:
        return True
    threshold = values[at.PAUSE_THRESHOLD] if features.pause_threshold else 0
    last = operation.last_pause
    if threshold and last is not None and operation.processor.tsc() - last > threshold:
        operation.pauses = count
    operation.pauses -= 1
    return operation.pauses < 0
