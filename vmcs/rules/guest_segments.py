"""Checks on guest segment registers: the six of every instruction, TR and LDTR.

They end in a VM exit with basic exit reason 33 and exit qualification 0.

Spec: SDM Vol. 3, "VM Entries", "Checks on Guest Segment Registers".
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Final

from attrs import frozen

from vmcs import controls as c
from vmcs import fields as f
from vmcs.bits import bit_range
from vmcs.exits import Reason
from vmcs.fields import Field
from vmcs.refs import sdm
from vmcs.rules import shapes as s
from vmcs.rules.guest import FRED, IA32E_GUEST, NO_PROTECTION, UNRESTRICTED
from vmcs.rules.model import ALWAYS, Condition, Demand, EntryContext, EntryFails, FaultyBits, Rule

_REF = sdm("VM Entries", "Checks on Guest Segment Registers")
_OUTCOME = EntryFails(Reason.ENTRY_FAILURE_GUEST_STATE)

_TYPE = 0xF
_S = 1 << 4
_DPL = 3 << 5
_P = 1 << 7
_L = 1 << 13
_D_B = 1 << 14
_G = 1 << 15
_UNUSABLE = 1 << 16
_RESERVED = bit_range(11, 8) | bit_range(31, 17)
_RPL = 3
_TI = 1 << 2

_ACCESSED = 1
_READABLE = 1 << 1
_CODE = 1 << 3
_TYPE_DATA_READ_WRITE = 3
_BUSY_TSS = 11
_BUSY_16_BIT_TSS = 3
_LDT = 2


@frozen
class _Register:
    """The four fields of a segment register."""

    name: str
    selector: Field
    base: Field
    limit: Field
    rights: Field

    @property
    def usable(self) -> Condition:
        """The unusable bit is 0."""
        return s.bits_equal(self.rights, _UNUSABLE, 0, f"{self.name} is usable")


_CS = _Register("CS", f.GUEST_CS_SELECTOR, f.GUEST_CS_BASE, f.GUEST_CS_LIMIT, f.GUEST_CS_ACCESS_RIGHTS)
_SS = _Register("SS", f.GUEST_SS_SELECTOR, f.GUEST_SS_BASE, f.GUEST_SS_LIMIT, f.GUEST_SS_ACCESS_RIGHTS)
_DS = _Register("DS", f.GUEST_DS_SELECTOR, f.GUEST_DS_BASE, f.GUEST_DS_LIMIT, f.GUEST_DS_ACCESS_RIGHTS)
_ES = _Register("ES", f.GUEST_ES_SELECTOR, f.GUEST_ES_BASE, f.GUEST_ES_LIMIT, f.GUEST_ES_ACCESS_RIGHTS)
_FS = _Register("FS", f.GUEST_FS_SELECTOR, f.GUEST_FS_BASE, f.GUEST_FS_LIMIT, f.GUEST_FS_ACCESS_RIGHTS)
_GS = _Register("GS", f.GUEST_GS_SELECTOR, f.GUEST_GS_BASE, f.GUEST_GS_LIMIT, f.GUEST_GS_ACCESS_RIGHTS)
_TR = _Register("TR", f.GUEST_TR_SELECTOR, f.GUEST_TR_BASE, f.GUEST_TR_LIMIT, f.GUEST_TR_ACCESS_RIGHTS)
_LDTR = _Register("LDTR", f.GUEST_LDTR_SELECTOR, f.GUEST_LDTR_BASE, f.GUEST_LDTR_LIMIT, f.GUEST_LDTR_ACCESS_RIGHTS)

_SIX: Final = (_CS, _SS, _DS, _ES, _FS, _GS)
_DATA: Final = (_DS, _ES, _FS, _GS)

_VIRTUAL_8086 = s.bit_set(f.GUEST_RFLAGS, 1 << 17, "the guest is in virtual-8086 mode")
_NOT_VIRTUAL_8086 = s.bits_equal(f.GUEST_RFLAGS, 1 << 17, 0, "the guest is not in virtual-8086 mode")
_RESTRICTED = s.off(c.UNRESTRICTED_GUEST)
_unrestricted = s.test_of(UNRESTRICTED)
_ia32e_guest = s.test_of(IA32E_GUEST)


def _rule(register: _Register, name: str, sentence: str, demand: Demand, when: Condition = ALWAYS) -> Rule:
    return Rule(f"guest.{register.name.lower()}-{name}", sentence, demand, _REF, _OUTCOME, when)


def _outside_virtual_8086(register: _Register) -> Condition:
    """When the access rights of one of the six are checked in detail: always for CS, else if it is usable."""
    return _NOT_VIRTUAL_8086 if register is _CS else s.every(_NOT_VIRTUAL_8086, register.usable)


# ---- demands


def _granularity(register: _Register) -> Demand:
    """G is 0 if the limit is not the end of a 4-KByte page, 1 if it is too large for a byte-granular segment."""
    limit, rights = register.limit.encoding, register.rights.encoding

    def holds(context: EntryContext) -> bool:
        if context.values[rights] & _G:
            return context.values[limit] & 0xFFF == 0xFFF
        return not context.values[limit] & bit_range(31, 20)

    def repair(context: EntryContext) -> None:
        if context.values[rights] & _G:
            context.vmcs[register.limit] = context.values[limit] | 0xFFF
        else:
            context.vmcs[register.limit] = context.values[limit] & 0xFFFFF

    return Demand((register.limit, register.rights), holds, repair, lambda context: ((register.rights, _G),))


def _dpl(context: EntryContext, register: _Register) -> int:
    return context.vmcs[register.rights] >> 5 & 3


def _with_dpl(context: EntryContext, register: _Register, dpl: int) -> None:
    context.vmcs[register.rights] = context.vmcs[register.rights] & ~_DPL | dpl << 5


def _dpl_faulty(register: _Register) -> FaultyBits:
    return ((register.rights, _DPL),)


def _cs_types(context: EntryContext) -> Collection[int]:
    return (11, 9, 13, 15, _TYPE_DATA_READ_WRITE) if _unrestricted(context) else (11, 9, 13, 15)


def _cs_type() -> Demand:
    plain = s.slice_in(_CS.rights, _TYPE, _cs_types)
    return Demand((*plain.reads, *UNRESTRICTED.reads), plain.holds, plain.repair, plain.faulty, legal=plain.legal)


def _code_privilege(*, conforming: bool) -> Demand:
    """The DPL of CS equals that of SS; for conforming code it may also be lower."""

    def holds(context: EntryContext) -> bool:
        code, stack = _dpl(context, _CS), _dpl(context, _SS)
        return code <= stack if conforming else code == stack

    return Demand(
        (_CS.rights, _SS.rights),
        holds,
        lambda context: _with_dpl(context, _CS, _dpl(context, _SS)),
        lambda context: _dpl_faulty(_CS),
    )


def _stack_matches_selector() -> Demand:
    return Demand(
        (_SS.rights, _SS.selector),
        lambda context: _dpl(context, _SS) == context.vmcs[_SS.selector] & _RPL,
        lambda context: _with_dpl(context, _SS, context.vmcs[_SS.selector] & _RPL),
        lambda context: _dpl_faulty(_SS),
    )


def _fred_privilege() -> Demand:
    plain = s.slice_in(_SS.rights, _DPL, (0, _DPL))

    def repair(context: EntryContext) -> None:
        # The RPLs of SS and CS follow, or the rules that tie the DPL to them would bring the old one back.
        plain.repair(context)
        for register in (_SS, _CS):
            context.vmcs[register.selector] = context.vmcs[register.selector] & ~_RPL

    return Demand(plain.reads, plain.holds, repair, plain.faulty, legal=plain.legal)


def _stack_selector_matches_code() -> Demand:
    def repair(context: EntryContext) -> None:
        context.vmcs[_SS.selector] = context.vmcs[_SS.selector] & ~_RPL | context.vmcs[_CS.selector] & _RPL

    return Demand(
        (_SS.selector, _CS.selector),
        lambda context: not (context.vmcs[_SS.selector] ^ context.vmcs[_CS.selector]) & _RPL,
        repair,
        lambda context: ((_SS.selector, _RPL),),
    )


def _data_privilege(register: _Register) -> Demand:
    return Demand(
        (register.rights, register.selector),
        lambda context: _dpl(context, register) >= context.vmcs[register.selector] & _RPL,
        lambda context: _with_dpl(context, register, context.vmcs[register.selector] & _RPL),
        lambda context: _dpl_faulty(register),
    )


def _real_mode_base(register: _Register) -> Demand:
    def repair(context: EntryContext) -> None:
        context.vmcs[register.base] = context.vmcs[register.selector] << 4

    return Demand(
        (register.base, register.selector),
        lambda context: context.vmcs[register.base] == context.vmcs[register.selector] << 4,
        repair,
        lambda context: ((register.base, context.vmcs[register.base] ^ context.vmcs[register.selector] << 4),),
    )


# ---- rules


def _selector_rules() -> tuple[Rule, ...]:
    return (
        _rule(_TR, "selector-ti", "TI of the TR selector is 0", s.bits_clear(_TR.selector, _TI)),
        _rule(_LDTR, "selector-ti", "TI of the LDTR selector is 0", s.bits_clear(_LDTR.selector, _TI), _LDTR.usable),
        _rule(
            _SS,
            "selector-rpl",
            "the RPL of SS equals that of CS",
            _stack_selector_matches_code(),
            s.every(_NOT_VIRTUAL_8086, _RESTRICTED),
        ),
    )


def _base_rules() -> tuple[Rule, ...]:
    high = bit_range(63, 32)
    return (
        *(
            _rule(
                each,
                "virtual-8086-base",
                f"the {each.name} base is the selector times 16",
                _real_mode_base(each),
                _VIRTUAL_8086,
            )
            for each in _SIX
        ),
        *(
            _rule(each, "base-canonical", f"the {each.name} base is canonical", s.canonical(each.base))
            for each in (_FS, _GS, _TR)
        ),
        _rule(_LDTR, "base-canonical", "the LDTR base is canonical", s.canonical(_LDTR.base), _LDTR.usable),
        _rule(_CS, "base-width", "bits 63:32 of the CS base are 0", s.bits_clear(_CS.base, high)),
        *(
            _rule(
                each,
                "base-width",
                f"bits 63:32 of the {each.name} base are 0",
                s.bits_clear(each.base, high),
                each.usable,
            )
            for each in (_SS, _DS, _ES)
        ),
    )


def _virtual_8086_rules(register: _Register) -> tuple[Rule, ...]:
    return (
        _rule(
            register,
            "virtual-8086-limit",
            f"the {register.name} limit is FFFFH",
            s.slice_in(register.limit, register.limit.mask, (0xFFFF,)),
            _VIRTUAL_8086,
        ),
        _rule(
            register,
            "virtual-8086-rights",
            f"the access rights of {register.name} are F3H",
            s.slice_in(register.rights, register.rights.mask, (0xF3,)),
            _VIRTUAL_8086,
        ),
    )


def _type_rules() -> tuple[Rule, ...]:
    code = _outside_virtual_8086(_CS)
    return (
        _rule(
            _CS,
            "type",
            "CS is accessed code; an unrestricted guest may have accessed read/write data",
            _cs_type(),
            code,
        ),
        _rule(
            _SS,
            "type",
            "SS is accessed read/write data",
            s.slice_in(_SS.rights, _TYPE, (3, 7)),
            _outside_virtual_8086(_SS),
        ),
        *(
            _rule(
                each,
                "type-accessed",
                f"{each.name} is accessed",
                s.bits_required(each.rights, _ACCESSED),
                _outside_virtual_8086(each),
            )
            for each in _DATA
        ),
        *(
            _rule(
                each,
                "type-readable",
                f"{each.name} is readable",
                s.bits_required(each.rights, _READABLE),
                s.every(_outside_virtual_8086(each), s.bit_set(each.rights, _CODE, f"{each.name} is a code segment")),
            )
            for each in _DATA
        ),
    )


def _privilege_rules() -> tuple[Rule, ...]:
    code = _outside_virtual_8086(_CS)

    def cs_type(mask: int, value: int, text: str) -> Condition:
        return s.every(code, s.bits_equal(_CS.rights, mask, value, text))

    is_data = s.bits_equal(_CS.rights, _TYPE, _TYPE_DATA_READ_WRITE, "CS is a data segment")
    return (
        _rule(_CS, "dpl-data", "the DPL of CS is 0", s.bits_clear(_CS.rights, _DPL), s.every(code, is_data)),
        _rule(
            _CS,
            "dpl-nonconforming",
            "the DPL of CS equals that of SS",
            _code_privilege(conforming=False),
            cs_type(0b1101, 0b1001, "CS is nonconforming code"),
        ),
        _rule(
            _CS,
            "dpl-conforming",
            "the DPL of CS is no greater than that of SS",
            _code_privilege(conforming=True),
            cs_type(0b1101, 0b1101, "CS is conforming code"),
        ),
        _rule(
            _SS,
            "dpl-rpl",
            "the DPL of SS equals its RPL",
            _stack_matches_selector(),
            s.every(_NOT_VIRTUAL_8086, _RESTRICTED),
        ),
        _rule(
            _SS,
            "dpl-real-mode",
            "the DPL of SS is 0",
            s.bits_clear(_SS.rights, _DPL),
            s.every(_NOT_VIRTUAL_8086, s.either(is_data, NO_PROTECTION)),
        ),
    )


def _data_privilege_rules() -> tuple[Rule, ...]:
    return tuple(
        _rule(
            each,
            "dpl-rpl",
            f"the DPL of {each.name} is no less than its RPL",
            _data_privilege(each),
            s.every(
                _outside_virtual_8086(each),
                _RESTRICTED,
                s.bits_differ(each.rights, 0b1100, 0b1100, f"{each.name} is not conforming code"),
            ),
        )
        for each in _DATA
    )


def _fred_rules() -> tuple[Rule, ...]:
    """FRED knows two privilege levels, and supervisor code in 64-bit mode only."""
    return (
        _rule(_SS, "dpl-fred", "the DPL of SS is 0 or 3", _fred_privilege(), FRED),
        _rule(
            _CS,
            "long-fred",
            "the L bit of CS is 1",
            s.bits_required(_CS.rights, _L),
            s.every(FRED, s.bits_equal(_SS.rights, _DPL, 0, "the DPL of SS is 0")),
        ),
    )


def _rights_rules(register: _Register) -> tuple[Rule, ...]:
    when = _outside_virtual_8086(register)
    name = register.name
    return (
        _rule(register, "s", f"{name} is a code or data segment", s.bits_required(register.rights, _S), when),
        _rule(register, "present", f"{name} is present", s.bits_required(register.rights, _P), when),
        _rule(
            register,
            "reserved",
            f"the reserved bits of the access rights of {name} are 0",
            s.bits_clear(register.rights, _RESERVED),
            when,
        ),
        _rule(register, "granularity", f"G of {name} fits the limit", _granularity(register), when),
    )


def _tss_types(context: EntryContext) -> Collection[int]:
    return (_BUSY_TSS,) if _ia32e_guest(context) else (_BUSY_TSS, _BUSY_16_BIT_TSS)


def _tss_type() -> Demand:
    plain = s.slice_in(_TR.rights, _TYPE, _tss_types)
    return Demand((*plain.reads, *IA32E_GUEST.reads), plain.holds, plain.repair, plain.faulty, legal=plain.legal)


def _system_rules(register: _Register, when: Condition) -> tuple[Rule, ...]:
    name = register.name
    return (
        _rule(register, "s", f"{name} is a system segment", s.bits_clear(register.rights, _S), when),
        _rule(register, "present", f"{name} is present", s.bits_required(register.rights, _P), when),
        _rule(
            register,
            "reserved",
            f"the reserved bits of the access rights of {name} are 0",
            s.bits_clear(register.rights, _RESERVED),
            when,
        ),
        _rule(register, "granularity", f"G of {name} fits the limit", _granularity(register), when),
    )


RULES: Final[tuple[Rule, ...]] = (
    *_selector_rules(),
    *_base_rules(),
    *(rule for each in _SIX for rule in _virtual_8086_rules(each)),
    *_type_rules(),
    *_privilege_rules(),
    *_data_privilege_rules(),
    *_fred_rules(),
    *(rule for each in _SIX for rule in _rights_rules(each)),
    _rule(
        _CS,
        "default-size",
        "D/B of CS is 0",
        s.bits_clear(_CS.rights, _D_B),
        s.every(_NOT_VIRTUAL_8086, IA32E_GUEST, s.bit_set(_CS.rights, _L, "the L bit of CS is 1")),
    ),
    _rule(_TR, "type", "TR is a busy TSS, a 64-bit one for an IA-32e mode guest", _tss_type()),
    _rule(_TR, "usable", "TR is usable", s.bits_clear(_TR.rights, _UNUSABLE)),
    *_system_rules(_TR, ALWAYS),
    _rule(_LDTR, "type", "LDTR is an LDT", s.slice_in(_LDTR.rights, _TYPE, (_LDT,)), _LDTR.usable),
    *_system_rules(_LDTR, _LDTR.usable),
)
