"""How a VMRUN ended, as the bundled guest ``vmruns`` reports it, and what of it two processors must agree on."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from typing import Final

from attrs import frozen

from vmcs.vmcb import layouts
from vmcs.vmcb.fields import SAVE_AREA, VmcbField
from vmcs.vmcb.intercepts import EXIT_CODES, Exit, name_of
from vtx.fuzz.vmruns import scene
from vtx.x86.outcome import Vector
from vtx.x86.state import MASK64

_INVALID_OF_32_BITS: Final = 0xFFFF_FFFF


@frozen
class Result:
    """How a VMRUN ended.

    ``kind`` is ``exit`` or ``nothing``: no answer, the harness was not heard of again. ``changed`` are (place, value)
    of the 8-byte words that the guest or the #VMEXIT changed: at offsets in the control block, with the general
    registers after it, or at addresses of watched memory.
    """

    kind: str
    code: int = 0
    info1: int = 0
    info2: int = 0
    interrupted: int = 0
    changed: tuple[tuple[int, int], ...] = ()

    @property
    def is_invalid(self) -> bool:
        """Whether it was VMEXIT_INVALID."""
        return self.kind == "exit" and self.code == Exit.INVALID

    @property
    def name(self) -> str:
        """The exit code in words."""
        return name_of(self.code) if self.kind == "exit" else "no answer"

    def __str__(self) -> str:
        if self.kind != "exit" or self.is_invalid:
            return self.name
        text = f"{self.name}, EXITINFO1 {self.info1:#x}, EXITINFO2 {self.info2:#x}"
        if self.interrupted & layouts.EVENT_VALID:
            text += f", EXITINTINFO {self.interrupted:#x}"
        return f"{text}; {', '.join(_words(self.changed))}"


def _words(changed: tuple[tuple[int, int], ...]) -> Iterator[str]:
    for place, value in changed:
        for each in _FIELDS_OF_WORD.get(place, ()):
            yield f"{each.name} {value >> 8 * (each.offset - place) & each.mask:#x}"
        if place not in _FIELDS_OF_WORD:
            yield f"[{place:#x}] {value:#x}"


NO_ANSWER: Final = Result("nothing")


def result_of(kind: str, numbers: list[int]) -> Result:
    """The result that a line says. QEMU writes 32 bits of an exit code."""
    code, info1, info2, interrupted, *words = numbers
    code = Exit.INVALID if code == _INVALID_OF_32_BITS else code
    return Result(kind, code, info1, info2, interrupted, tuple(zip(words[::2], words[1::2], strict=True)))


def _fields_of_words() -> dict[int, tuple[VmcbField, ...]]:
    words: dict[int, tuple[VmcbField, ...]] = {}
    for each in scene.BY_ENCODING.values():
        words[each.offset & ~7] = (*words.get(each.offset & ~7, ()), each)
    return words


_FIELDS_OF_WORD: Final = _fields_of_words()

# Of the control area, what a #VMEXIT defines; of attributes, what there is.
_DEFINED: Final[Mapping[VmcbField, int]] = {
    scene.EVENTINJ: layouts.EVENT_VALID,
    scene.VIRTUAL: 0xF | layouts.V_IRQ,
    scene.INTERRUPT_STATE: layouts.INTERRUPT_SHADOW,
    scene.NEXT_RIP: MASK64,
    **{each: 0xFFF for each in scene.WRITTEN if each.name.endswith("attributes")},
}
_SAVED: Final = tuple(each for each in (*scene.WRITTEN, *scene.HOST) if each.offset >= SAVE_AREA or each in _DEFINED)
# Exit codes with an EXITINFO1, or EXITINFO2, on processors without decode assists too.
_INFO1: Final = frozenset((Exit.IOIO, Exit.MSR, Exit.TASK_SWITCH, Exit.NPF, Exit.SMI)) | {
    each.number for each in EXIT_CODES if each.info1 == "error code"
}
_INFO2: Final = frozenset((Exit.IOIO, Exit.TASK_SWITCH, Exit.NPF, Exit.EXCEPTION_0 + Vector.PF))


# After these, what the block holds is undefined.
_WITHOUT_STATE: Final = frozenset((Exit.INVALID, Exit.SHUTDOWN))


def observed(result: Result, inputs: Mapping[VmcbField, int], ignored: Collection[VmcbField]) -> dict[str, int]:
    """What a processor must get right, by name: of a guest with the fields ``inputs``, without those ``ignored``."""
    if result.kind != "exit" or result.code in _WITHOUT_STATE:
        return {"EXITCODE": result.code}
    seen = {"EXITCODE": result.code}
    if result.code in _INFO1:
        seen["EXITINFO1"] = result.info1
    if result.code in _INFO2:
        seen["EXITINFO2"] = result.info2
    seen["EXITINTINFO"] = _event(result.interrupted)
    words = dict(result.changed)
    for each in _SAVED:
        place = each.offset & ~7
        value = words[place] >> 8 * (each.offset - place) & each.mask if place in words else inputs.get(each, 0)
        if each not in ignored:
            seen[each.name] = value & _DEFINED.get(each, each.mask)
    seen.update((f"[{place:#x}]", value) for place, value in result.changed if place not in _FIELDS_OF_WORD)
    return seen


def _event(word: int) -> int:
    """EXITINTINFO without what has no meaning."""
    if not word & layouts.EVENT_VALID:
        return 0
    return word & (_EVENT_WITH_ERROR_CODE if word & layouts.EVENT_ERROR_CODE_VALID else _EVENT)


_EVENT: Final = 0x8000_0FFF
_EVENT_WITH_ERROR_CODE: Final = 0xFFFF_FFFF << 32 | _EVENT


def differences(one: Mapping[str, int], other: Mapping[str, int]) -> frozenset[str]:
    """The names of what differs; the exit code alone if that does."""
    if one["EXITCODE"] != other["EXITCODE"]:
        return frozenset(("EXITCODE",))
    return frozenset(name for name in {**one, **other} if one.get(name) != other.get(name))
