"""Where this model and the others are known to differ: each class with who is right, and where the manual says so.

``docs/interpretations.md`` tells people the same under the same ids.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from vtx.fuzz.classes import Known
from vtx.fuzz.vmruns.case import Case
from vtx.fuzz.vmruns.known_bochs import OF_BOCHS
from vtx.fuzz.vmruns.known_qemu import OF_QEMU

KNOWN: Final[Mapping[str, tuple[Known[Case], ...]]] = {"bochs": OF_BOCHS, "qemu": OF_QEMU}
