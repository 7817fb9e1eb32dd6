"""Where this model and the others are known to differ: each class with who is right, and where the manual says so.

``docs/interpretations.md`` tells people the same under the same ids.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from vtx.fuzz.readings import Classes
from vtx.fuzz.vmruns import known_bochs, known_qemu, readings
from vtx.fuzz.vmruns.case import Case

KNOWN: Final[Mapping[str, Classes[Case]]] = {
    "bochs": Classes(known_bochs.OF_BOCHS, readings.OF_BOCHS),
    "qemu": Classes(known_qemu.OF_QEMU, readings.OF_QEMU),
}
