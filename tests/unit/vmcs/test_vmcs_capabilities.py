"""Capability MSRs, decoded."""

import pytest
from vmcs_baseline import FULL, FULL_MSRS, OLD

from vmcs import controls as c
from vmcs.capabilities import Capabilities, CapabilityMsr
from vmcs.controls import CONTROLS, ControlWord

# Between the two processors of the baseline: EPT, VPID, unrestricted guest, TSC scaling; no APIC virtualization.
SERVER = Capabilities(
    {
        0x480: 0x00DA_0400_0000_0004,
        0x481: 0x0000_007F_0000_0016,
        0x482: 0xFFF9_FFFE_0401_E172,
        0x483: 0x01FF_FFFF_0003_6DFF,
        0x484: 0x0003_FFFF_0000_11FF,
        0x485: 0x0000_0000_7004_C1E7,
        0x486: 0x8000_0021,
        0x487: 0xFFFF_FFFF,
        0x488: 0x2000,
        0x489: 0x37_67FF,
        0x48A: 0x32,
        0x48B: 0x025D_5CFF_0000_0000,
        0x48C: 0x0000_0F01_0633_4141,
        0x48D: 0x0000_007F_0000_0016,
        0x48E: 0xFFF9_FFFE_0400_6172,
        0x48F: 0x01FF_FFFF_0003_6DFB,
        0x490: 0x0003_FFFF_0000_11FB,
        0x491: 0x1,
    }
)


def test_basic__of_a_server() -> None:
    assert SERVER.revision_identifier == 4
    assert SERVER.region_size == 1024
    assert SERVER.memory_type == 6
    assert SERVER.dual_monitor
    assert SERVER.ins_outs_information
    assert not SERVER.addresses_limited_to_32_bits
    assert not SERVER.any_error_code_setting
    assert not SERVER.nested_exceptions


def test_misc__of_a_server() -> None:
    assert SERVER.preemption_timer_shift == 7
    assert SERVER.stores_ia32e_mode_guest
    assert [state for state in range(5) if SERVER.supports_activity_state(state)] == [0, 1, 2, 3]
    assert SERVER.cr3_targets == 4
    assert SERVER.msr_list_maximum == 512
    assert SERVER.vmwrite_any_field
    assert SERVER.injection_with_length_0


def test_vmcs_enum__of_a_server_is_what_its_fields_give() -> None:
    assert SERVER.highest_index << 1 == SERVER.msr(CapabilityMsr.VMCS_ENUM) == 0x32  # the TSC multiplier


def test_ept_vpid__by_name() -> None:
    assert SERVER.supports("execute-only translations")
    assert SERVER.supports("1-GByte pages")
    assert SERVER.supports("single-context-retaining-globals INVVPID")
    assert not SERVER.supports("page-walk length 5")
    with pytest.raises(KeyError):
        SERVER.supports("no such bit")


def test_true_msrs__count_only_when_announced() -> None:
    assert not SERVER.requires(c.CR3_LOAD_EXITING)
    announced_not = Capabilities({**SERVER.msrs, 0x480: 0x005A_0400_0000_0004})
    assert announced_not.requires(c.CR3_LOAD_EXITING)
    assert OLD.requires(c.ENTRY_LOAD_DEBUG_CONTROLS)


@pytest.mark.parametrize(
    ("control", "allowed"),
    [
        (c.ENABLE_EPT, True),
        (c.UNRESTRICTED_GUEST, True),
        (c.USE_TSC_SCALING, True),
        (c.VIRTUAL_INTERRUPT_DELIVERY, False),
        (c.PROCESS_POSTED_INTERRUPTS, False),
        (c.ENABLE_HLAT, False),
        (c.EXIT_LOAD_CET_STATE, False),
        (c.ENTRY_LOAD_IA32_EFER, True),
    ],
)
def test_allows__of_a_server(control: c.Control, allowed: bool) -> None:
    assert SERVER.allows(control) is allowed


def test_requires__nothing_that_is_not_allowed() -> None:
    for capabilities in (FULL, OLD, SERVER):
        for control in CONTROLS:
            assert not capabilities.requires(control) or capabilities.allows(control)


@pytest.mark.parametrize(
    ("word", "value", "violations"),
    [
        (ControlWord.PIN_BASED, 0x16, 0),
        (ControlWord.PIN_BASED, 0x7F, 0),
        (ControlWord.PIN_BASED, 0, 0x16),
        (ControlWord.PIN_BASED, 0x96, 0x80),
        (ControlWord.PRIMARY, 0x0400_6172, 0),
        (ControlWord.PRIMARY, 0x0402_6172, 0x2_0000),
        (ControlWord.SECONDARY, 0, 0),
        (ControlWord.SECONDARY, 0x300, 0x300),
        (ControlWord.TERTIARY, 1, 1),
        (ControlWord.ENTRY, 0x11FA, 1),
    ],
)
def test_reserved_violations__are_the_bits_at_fault(word: ControlWord, value: int, violations: int) -> None:
    assert SERVER.reserved_violations(word, value) == violations
    assert SERVER.reserved_violations(word, SERVER.allowed[word].repair(value)) == 0


def test_sixty_four_bit_words__report_allowed_ones_only() -> None:
    assert FULL.reserved_violations(ControlWord.TERTIARY, 0) == 0
    assert FULL.reserved_violations(ControlWord.TERTIARY, 1 << 40) == 1 << 40
    assert FULL.reserved_violations(ControlWord.SECONDARY_EXIT, 0xF) == 0


def test_absent_msrs__read_as_zero() -> None:
    nothing = Capabilities({})
    assert nothing.revision_identifier == 0
    assert not any(nothing.allows(control) for control in CONTROLS)
    assert nothing.highest_index > 0  # fields of every processor are still there


def test_cr_fixed_bits() -> None:
    assert (FULL.cr0_must_be_1, FULL.cr0_may_be_1) == (0x8000_0021, 0xFFFF_FFFF)
    assert FULL.cr4_must_be_1 == 0x2000
    assert FULL.cr4_may_be_1 == FULL_MSRS[0x489]


def test_msrs__are_a_copy() -> None:
    msrs = dict(FULL_MSRS)
    capabilities = Capabilities(msrs)
    msrs[0x480] = 0
    assert capabilities.msrs[0x480] == FULL_MSRS[0x480]
