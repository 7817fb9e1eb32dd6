"""Exit reasons, qualifications, instruction information and error numbers, typed a second time."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vmcs import exits
from vmcs import fields as f
from vmcs import instruction_information as info
from vmcs import qualifications as q
from vmcs.exits import BY_NUMBER, EXIT_REASONS, AbortIndicator, InstructionError, Reason, describe_reason
from vmcs.fields import Type

NUMBERS = (
    "EXCEPTION_OR_NMI EXTERNAL_INTERRUPT TRIPLE_FAULT INIT_SIGNAL STARTUP_IPI IO_SMI OTHER_SMI INTERRUPT_WINDOW"
    " NMI_WINDOW TASK_SWITCH CPUID GETSEC HLT INVD INVLPG RDPMC RDTSC RSM VMCALL VMCLEAR VMLAUNCH VMPTRLD VMPTRST"
    " VMREAD VMRESUME VMWRITE VMXOFF VMXON CR_ACCESS DR_ACCESS IO_INSTRUCTION RDMSR WRMSR ENTRY_FAILURE_GUEST_STATE"
    " ENTRY_FAILURE_MSR_LOADING - MWAIT MONITOR_TRAP_FLAG - MONITOR PAUSE ENTRY_FAILURE_MACHINE_CHECK -"
    " TPR_BELOW_THRESHOLD APIC_ACCESS VIRTUALIZED_EOI GDTR_IDTR_ACCESS LDTR_TR_ACCESS EPT_VIOLATION"
    " EPT_MISCONFIGURATION INVEPT RDTSCP PREEMPTION_TIMER_EXPIRED INVVPID WBINVD XSETBV APIC_WRITE RDRAND INVPCID"
    " VMFUNC ENCLS RDSEED"
    " PAGE_MODIFICATION_LOG_FULL XSAVES XRSTORS PCONFIG SPP_RELATED_EVENT UMWAIT TPAUSE LOADIWKEY ENCLV -"
    " ENQCMD_PASID_TRANSLATION_FAILURE ENQCMDS_PASID_TRANSLATION_FAILURE BUS_LOCK INSTRUCTION_TIMEOUT SEAMCALL TDCALL"
    " RDMSRLIST WRMSRLIST"
)


def test_reasons__agree_with_the_second_table() -> None:
    second = {name: number for number, name in enumerate(NUMBERS.split()) if name != "-"}
    assert {reason.name: reason.value for reason in Reason} == second


def test_exit_reasons__describe_each_reason_once_in_order() -> None:
    assert [each.number for each in EXIT_REASONS] == sorted(Reason)
    assert len(BY_NUMBER) == len(EXIT_REASONS)
    assert len({each.name for each in EXIT_REASONS}) == len(EXIT_REASONS)


def test_exit_reasons__define_information_fields_only() -> None:
    for each in EXIT_REASONS:
        assert all(field.type is Type.READ_ONLY_DATA for field in each.defines)
        if each.instruction_information is not None:
            assert f.VM_EXIT_INSTRUCTION_INFORMATION in each.defines


def test_entry_failures() -> None:
    assert [each.number for each in EXIT_REASONS if each.entry_failure] == [33, 34, 41]


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (10, "CPUID"),
        (0x8000_0021, "VM-entry failure due to invalid guest state"),
        (35, "reserved exit reason 35"),
        (0xFFFF, "reserved exit reason 65535"),
    ],
)
def test_describe_reason(value: int, text: str) -> None:
    assert describe_reason(value) == text


def test_describe_qualification() -> None:
    assert BY_NUMBER[28].describe_qualification(0x103) == "control register=0x3, access type=mov to cr, register=RCX"
    assert BY_NUMBER[14].describe_qualification(0x1000) == "linear address 0x1000"
    assert BY_NUMBER[10].describe_qualification(0) == "0x0"


def test_instruction_errors__agree_with_the_second_table() -> None:
    assert {error.value for error in InstructionError} == set(range(1, 29)) - {14, 21, 27}
    assert InstructionError(7) is InstructionError.VM_ENTRY_WITH_INVALID_CONTROL_FIELDS
    assert InstructionError(12) is InstructionError.VMREAD_OR_VMWRITE_OF_UNSUPPORTED_COMPONENT
    assert InstructionError(13) is InstructionError.VMWRITE_TO_READ_ONLY_COMPONENT
    assert InstructionError(26) is InstructionError.VM_ENTRY_WITH_EVENTS_BLOCKED_BY_MOV_SS
    assert InstructionError(28) is InstructionError.INVALID_OPERAND_TO_INVEPT_OR_INVVPID


def test_abort_indicators() -> None:
    assert [each.value for each in AbortIndicator] == [1, 2, 3, 4, 5, 6]
    assert AbortIndicator(4) is AbortIndicator.LOADING_HOST_MSRS


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (q.mov_cr(3, 0, to_cr=True), 0x003),
        (q.mov_cr(8, 12, to_cr=False), 0xC18),
        (q.clts(), 0x20),
        (q.lmsw(0xFFF1, memory_operand=False), 0xFFF1_0030),
        (q.lmsw(0x0001, memory_operand=True), 0x0001_0070),
        (q.mov_dr(7, 15, from_dr=False), 0xF07),
        (q.mov_dr(6, 0, from_dr=True), 0x016),
        (q.io_instruction(0x3F8, 1, is_in=False), 0x03F8_0000),
        (q.io_instruction(0x60, 1, is_in=True, immediate=True), 0x0060_0048),
        (q.io_instruction(0xFFFF, 4, is_in=True, string=True, rep=True), 0xFFFF_003B),
        (q.io_instruction(0x5000, 2, is_in=False), 0x5000_0001),
        (q.task_switch(0x28, q.TaskSwitchSource.JMP), 0x8000_0028),
        (q.apic_access(0x300, q.ApicAccessType.LINEAR_WRITE), 0x1300),
        (q.apic_access(0, q.ApicAccessType.GUEST_PHYSICAL_FETCH_OR_DATA, asynchronous=True), 0x1_F000),
        (q.ept_violation(read=True, write=False, fetch=False, permissions=0), 0x1),
        (q.ept_violation(read=False, write=True, fetch=False, permissions=5, linear_valid=True, final=True), 0x1AA),
        (q.ept_violation(read=True, write=True, fetch=False, permissions=0, linear_valid=True), 0x83),
        (
            q.ept_violation(
                read=False, write=False, fetch=True, permissions=3, linear_valid=True, final=True, advanced=5
            ),
            0xB9C,
        ),
        (q.ept_violation(read=True, write=False, fetch=False, permissions=0, final=True, advanced=7), 0x1),
        (q.ept_violation(read=True, write=False, fetch=False, permissions=0, nmi_unblocking=True), 0x1001),
    ],
)
def test_qualification__assembled(value: int, expected: int) -> None:
    assert value == expected


@given(st.integers(0, 0xFFFF), st.sampled_from((1, 2, 4)), st.tuples(*[st.booleans()] * 4))
def test_io_qualification__comes_apart_again(port: int, size: int, options: tuple[bool, bool, bool, bool]) -> None:
    is_in, string, rep, immediate = options
    value = q.io_instruction(port, size, is_in=is_in, string=string, rep=rep, immediate=immediate)
    assert q.IO_INSTRUCTION.decode(value) == {
        "size": size - 1,
        "direction": is_in,
        "string": string,
        "REP prefixed": rep,
        "operand encoding": immediate,
        "port": port,
    }


@given(st.integers(0, 15), st.integers(0, 15), st.booleans())
def test_control_register_qualification__comes_apart_again(number: int, register: int, to_cr: bool) -> None:
    parts = q.CONTROL_REGISTER_ACCESS.decode(q.mov_cr(number, register, to_cr=to_cr))
    assert parts["control register"] == number
    assert parts["register"] == register
    assert parts["access type"] == (0 if to_cr else 1)


def test_instruction_information__of_a_vmread() -> None:
    # VMREAD [RBX + RCX*8 + disp], RDX in 64-bit mode through DS.
    value = info.VMREAD_VMWRITE.encode(
        {"scaling": 3, "address size": 2, "segment": 3, "index": 1, "base": 3, "register 2": 2}
    )
    assert value == 3 | 2 << 7 | 3 << 15 | 1 << 18 | 3 << 23 | 2 << 28


def test_instruction_information__bit_positions() -> None:
    positions = {part.name: part.low for part in info.LDTR_TR_ACCESS.slices}
    assert positions == {
        "scaling": 0,
        "register 1": 3,
        "address size": 7,
        "register operand": 10,
        "segment": 15,
        "index": 18,
        "no index": 22,
        "base": 23,
        "no base": 27,
        "instruction": 28,
    }
    assert info.GDTR_IDTR_ACCESS.by_name["operand size"].mask == 1 << 11
    assert info.DESTINATION_REGISTER.by_name["operand size"].mask == 3 << 11


def test_vm_entry_failure__is_bit_31() -> None:
    assert exits.VM_ENTRY_FAILURE == 0x8000_0000
