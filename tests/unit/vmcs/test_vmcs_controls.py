"""Control bits, typed a second time from the manual's tables, and their gating."""

import pytest

from vmcs import controls as c
from vmcs.controls import BY_BIT, BY_WORD, CONTROLS, DEFAULT1, GATES, Control, ControlWord, describe_controls

SECOND_TABLE = {
    ControlWord.PIN_BASED: {
        "external-interrupt exiting": 0,
        "NMI exiting": 3,
        "virtual NMIs": 5,
        "activate VMX-preemption timer": 6,
        "process posted interrupts": 7,
    },
    ControlWord.PRIMARY: {
        "interrupt-window exiting": 2,
        "use TSC offsetting": 3,
        "HLT exiting": 7,
        "INVLPG exiting": 9,
        "MWAIT exiting": 10,
        "RDPMC exiting": 11,
        "RDTSC exiting": 12,
        "CR3-load exiting": 15,
        "CR3-store exiting": 16,
        "activate tertiary controls": 17,
        "CR8-load exiting": 19,
        "CR8-store exiting": 20,
        "use TPR shadow": 21,
        "NMI-window exiting": 22,
        "MOV-DR exiting": 23,
        "unconditional I/O exiting": 24,
        "use I/O bitmaps": 25,
        "monitor trap flag": 27,
        "use MSR bitmaps": 28,
        "MONITOR exiting": 29,
        "PAUSE exiting": 30,
        "activate secondary controls": 31,
    },
    ControlWord.SECONDARY: {
        "virtualize APIC accesses": 0,
        "enable EPT": 1,
        "descriptor-table exiting": 2,
        "enable RDTSCP": 3,
        "virtualize x2APIC mode": 4,
        "enable VPID": 5,
        "WBINVD exiting": 6,
        "unrestricted guest": 7,
        "APIC-register virtualization": 8,
        "virtual-interrupt delivery": 9,
        "PAUSE-loop exiting": 10,
        "RDRAND exiting": 11,
        "enable INVPCID": 12,
        "enable VM functions": 13,
        "VMCS shadowing": 14,
        "enable ENCLS exiting": 15,
        "RDSEED exiting": 16,
        "enable PML": 17,
        "EPT-violation #VE": 18,
        "conceal VMX from PT": 19,
        "enable XSAVES/XRSTORS": 20,
        "PASID translation": 21,
        "mode-based execute control for EPT": 22,
        "sub-page write permissions for EPT": 23,
        "Intel PT uses guest physical addresses": 24,
        "use TSC scaling": 25,
        "enable user wait and pause": 26,
        "enable PCONFIG": 27,
        "enable ENCLV exiting": 28,
        "VMM bus-lock detection": 30,
        "instruction timeout": 31,
    },
    ControlWord.TERTIARY: {
        "LOADIWKEY exiting": 0,
        "enable HLAT": 1,
        "EPT paging-write control": 2,
        "guest-paging verification": 3,
        "IPI virtualization": 4,
        "enable MSR-list instructions": 6,
        "virtualize IA32_SPEC_CTRL": 7,
        "APIC-timer virtualization": 8,
    },
    ControlWord.EXIT: {
        "save debug controls": 2,
        "host address-space size": 9,
        "load IA32_PERF_GLOBAL_CTRL": 12,
        "acknowledge interrupt on exit": 15,
        "save IA32_PAT": 18,
        "load IA32_PAT": 19,
        "save IA32_EFER": 20,
        "load IA32_EFER": 21,
        "save VMX-preemption timer value": 22,
        "clear IA32_BNDCFGS": 23,
        "conceal VMX from PT": 24,
        "clear IA32_RTIT_CTL": 25,
        "clear IA32_LBR_CTL": 26,
        "clear UINV": 27,
        "load CET state": 28,
        "load PKRS": 29,
        "save IA32_PERF_GLOBAL_CTRL": 30,
        "activate secondary controls": 31,
    },
    ControlWord.SECONDARY_EXIT: {
        "save FRED": 0,
        "load FRED": 1,
        "load IA32_SPEC_CTRL": 2,
        "prematurely busy shadow stack": 3,
    },
    ControlWord.ENTRY: {
        "load debug controls": 2,
        "IA-32e mode guest": 9,
        "entry to SMM": 10,
        "deactivate dual-monitor treatment": 11,
        "load IA32_PERF_GLOBAL_CTRL": 13,
        "load IA32_PAT": 14,
        "load IA32_EFER": 15,
        "load IA32_BNDCFGS": 16,
        "conceal VMX from PT": 17,
        "load IA32_RTIT_CTL": 18,
        "load UINV": 19,
        "load CET state": 20,
        "load guest IA32_LBR_CTL": 21,
        "load PKRS": 22,
        "load FRED": 23,
        "load IA32_SPEC_CTRL": 24,
    },
}


@pytest.mark.parametrize("word", ControlWord)
def test_controls__agree_with_the_second_table(word: ControlWord) -> None:
    assert {control.name: control.bit for control in BY_WORD[word]} == SECOND_TABLE[word]


def test_controls__each_constant_once() -> None:
    constants = {value for value in vars(c).values() if isinstance(value, Control)}
    assert constants == set(CONTROLS)
    assert len(BY_BIT) == len(CONTROLS)


@pytest.mark.parametrize(
    ("word", "bits"),
    [
        (ControlWord.PIN_BASED, {1, 2, 4}),
        (ControlWord.PRIMARY, {1, 4, 5, 6, 8, 13, 14, 15, 16, 26}),
        (ControlWord.SECONDARY, set()),
        (ControlWord.TERTIARY, set()),
        (ControlWord.EXIT, {0, 1, 2, 3, 4, 5, 6, 7, 8, 10, 11, 13, 14, 16, 17}),
        (ControlWord.SECONDARY_EXIT, set()),
        (ControlWord.ENTRY, {0, 1, 2, 3, 4, 5, 6, 7, 8, 12}),
    ],
)
def test_default1__is_the_class_of_the_manual(word: ControlWord, bits: set[int]) -> None:
    assert DEFAULT1[word] == sum(1 << bit for bit in bits)


def test_default1__named_controls() -> None:
    assert {control for control in CONTROLS if control.default1} == {
        c.CR3_LOAD_EXITING,
        c.CR3_STORE_EXITING,
        c.EXIT_SAVE_DEBUG_CONTROLS,
        c.ENTRY_LOAD_DEBUG_CONTROLS,
    }


def test_gates__activate_the_later_words() -> None:
    assert dict(GATES) == {
        ControlWord.SECONDARY: c.ACTIVATE_SECONDARY_CONTROLS,
        ControlWord.TERTIARY: c.ACTIVATE_TERTIARY_CONTROLS,
        ControlWord.SECONDARY_EXIT: c.EXIT_ACTIVATE_SECONDARY_CONTROLS,
    }


def test_describe_controls__names_known_bits_and_numbers_the_rest() -> None:
    assert describe_controls(ControlWord.PIN_BASED, 0) == "none"
    assert (
        describe_controls(ControlWord.PIN_BASED, 0x1F) == '"external-interrupt exiting", "NMI exiting", bits 4 and 2:1'
    )
