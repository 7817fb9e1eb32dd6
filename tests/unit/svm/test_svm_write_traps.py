"""Exits after writes of control registers and EFER; RDPRU, MCOMMIT, XSETBV; MWAIT with the monitor armed."""

from __future__ import annotations

import pytest
from svm_guest import VMMCALL, guest_machine, stored, until_exit
from svm_machine import GUEST_RIP
from svm_machine import Machine as Bench

from vmcs.vmcb.intercepts import Exit
from vtx.x86.monitor import Monitor

TRAP = 0x90  # of CR0; those of CR1 to CR15 follow
EFER_TRAP = 0x8F
MSR_INTERCEPT = 0x7C

MOV_EAX = b"\xb8"
V_INTR_MASKING = 1 << 24


def mov_eax(value: int) -> bytes:
    return MOV_EAX + value.to_bytes(4, "little")


# Code, number of the control register, what it holds afterwards.
WRITES = [
    (mov_eax(0x8005_003B) + b"\x0f\x22\xc0", 0, 0x8005_003B),  # MOV CR0, RAX: TS set
    (b"\x0f\x06", 0, 0x8005_0033),  # CLTS: as it was, but written
    (mov_eax(0x3B) + b"\x0f\x01\xf0", 0, 0x8005_003B),  # LMSW AX
    (mov_eax(0x1234_5678) + b"\x0f\x22\xd0", 2, 0x1234_5678),
    (mov_eax(0x1_0008) + b"\x0f\x22\xd8", 3, 0x1_0008),
    (mov_eax(0xA0) + b"\x0f\x22\xe0", 4, 0xA0),  # PGE
    (mov_eax(9) + b"\x44\x0f\x22\xc0", 8, 9),
]


@pytest.mark.parametrize(("code", "number", "value"), WRITES)
def test_write_of_a_control_register__exits_when_it_is_complete(code: bytes, number: int, value: int) -> None:
    machine = guest_machine(code + VMMCALL, TRAP + number)
    until_exit(machine)
    assert (stored(machine, "EXITCODE"), stored(machine, "EXITINFO1")) == (TRAP + number, value)
    assert (stored(machine, "RIP"), stored(machine, "nRIP")) == (GUEST_RIP + len(code), 0)
    if number in (0, 2, 3, 4):
        assert stored(machine, f"CR{number}") == value


@pytest.mark.parametrize(("code", "number", "value"), WRITES)
def test_other_writes__do_not_exit(code: bytes, number: int, value: int) -> None:
    others = (TRAP + other for other in range(16) if other != number)
    machine = guest_machine(code + VMMCALL, *others)
    until_exit(machine)
    assert stored(machine, "EXITCODE") == Exit.VMMCALL


def test_reads__do_not_exit() -> None:
    machine = guest_machine(b"\x0f\x20\xc0\x0f\x20\xe0" + VMMCALL, TRAP, TRAP + 4)  # MOV RAX, CR0; MOV RAX, CR4
    until_exit(machine)
    assert stored(machine, "EXITCODE") == Exit.VMMCALL


def test_write_that_faults__does_not_trap() -> None:
    machine = guest_machine(mov_eax(1 << 3) + b"\x48\xc1\xe0\x20\x0f\x22\xe0", TRAP + 4, 0x4D)  # SHL RAX, 32
    until_exit(machine)
    assert stored(machine, "EXITCODE") == 0x4D
    assert stored(machine, "CR4") == 0x20


def test_intercept_before_the_write__comes_first() -> None:
    code = mov_eax(0xA0) + b"\x0f\x22\xe0"
    machine = guest_machine(code, TRAP + 4, 0x14)
    until_exit(machine)
    assert (stored(machine, "EXITCODE"), stored(machine, "CR4")) == (0x14, 0x20)
    assert stored(machine, "RIP") == GUEST_RIP + 5


def test_cr8_under_v_intr_masking__traps_with_v_tpr() -> None:
    fields = {"virtual interrupt control": V_INTR_MASKING}
    machine = guest_machine(mov_eax(0xC) + b"\x44\x0f\x22\xc0", TRAP + 8, fields=fields)
    until_exit(machine)
    assert (stored(machine, "EXITCODE"), stored(machine, "EXITINFO1")) == (TRAP + 8, 0xC)
    assert stored(machine, "virtual interrupt control") & 0xFF == 0xC


def wrmsr(index: int, value: int) -> bytes:
    return b"\xb9" + index.to_bytes(4, "little") + mov_eax(value) + b"\x31\xd2\x0f\x30"


def test_write_of_efer__exits_when_it_is_complete() -> None:
    code = wrmsr(0xC000_0080, 0x1500)
    machine = guest_machine(code, EFER_TRAP)
    until_exit(machine)
    assert (stored(machine, "EXITCODE"), stored(machine, "EXITINFO1")) == (EFER_TRAP, 0x1500)
    assert (stored(machine, "RIP"), stored(machine, "EFER")) == (GUEST_RIP + len(code), 0x1500)


def test_write_of_another_msr__does_not() -> None:
    machine = guest_machine(wrmsr(0xC000_0081, 0) + VMMCALL, EFER_TRAP)
    until_exit(machine)
    assert stored(machine, "EXITCODE") == Exit.VMMCALL


class TestMonitor:
    """MONITOR arms what MWAIT waits for, and its intercepts look at."""

    MONITOR, MWAIT = b"\x31\xc9\x31\xd2\xb8\x00\x90\x00\x00\x0f\x01\xc8", b"\x31\xc0\x31\xc9\x0f\x01\xc9"

    def test_armed(self) -> None:
        machine = guest_machine(self.MONITOR + self.MWAIT, Exit.MWAIT_CONDITIONAL)
        until_exit(machine)
        length = len(self.MONITOR + self.MWAIT)
        assert (stored(machine, "EXITCODE"), stored(machine, "nRIP")) == (Exit.MWAIT_CONDITIONAL, GUEST_RIP + length)

    def test_not_armed(self) -> None:
        machine = guest_machine(self.MWAIT + VMMCALL, Exit.MWAIT_CONDITIONAL)
        until_exit(machine)
        assert stored(machine, "EXITCODE") == Exit.VMMCALL

    @pytest.mark.parametrize("armed", [False, True])
    def test_unconditional(self, armed: bool) -> None:
        machine = guest_machine((self.MONITOR if armed else b"") + self.MWAIT, 0x8B)
        until_exit(machine)
        assert (stored(machine, "EXITCODE"), stored(machine, "EXITINFO1")) == (0x8B, armed)

    @pytest.mark.parametrize(("armed", "code"), [(False, 0x8B), (True, 0x8C)])
    def test_both__the_conditional_one_comes_first(self, armed: bool, code: int) -> None:
        machine = guest_machine((self.MONITOR if armed else b"") + self.MWAIT, 0x8B, 0x8C)
        until_exit(machine)
        assert stored(machine, "EXITCODE") == code

    def test_what_it_would_wait_for_has_happened__it_is_not_armed(self) -> None:
        store = b"\xc6\x04\x25\x00\x90\x00\x00\x01"  # MOV BYTE [9000H], 1
        machine = guest_machine(self.MONITOR + store + self.MWAIT, 0x8B, 0x8C)
        until_exit(machine)
        assert (stored(machine, "EXITCODE"), stored(machine, "EXITINFO1")) == (0x8B, 0)

    def test_vmrun_and_vmexit__disarm(self) -> None:
        machine = guest_machine(self.MONITOR + VMMCALL)
        machine.run(max_instructions=machine.cpu.instructions + 4)
        assert machine.cpu.monitor is not None
        until_exit(machine)
        assert machine.cpu.monitor is None
        bench = Bench()
        bench.processor.monitor = Monitor(0x9000, bytes(64))
        bench.run()
        assert bench.svm.non_root
        assert bench.processor.monitor is None

    FAULTS = [
        (b"\xb1\x01" + MONITOR[4:], 0x4D),  # MOV CL, 1: an extension that MONITOR has not
        (b"\x48\xc7\xc0\x00\x00\x00\x40\x31\xc9\x0f\x01\xc8", 0x4E),  # MOV RAX, 40000000H, which is not mapped
        (b"\xb1\x02\x0f\x01\xc9", 0x4D),  # MOV CL, 2; MWAIT
        (b"\xb1\x04\x0f\x01\xfb", 0x4D),  # MOV CL, 4; MWAITX
        (b"\xb1\x01\xb8\x00\x90\x00\x00\x0f\x01\xfa", 0x4D),  # MOV CL, 1; MONITORX
    ]

    @pytest.mark.parametrize(("code", "exception"), FAULTS)
    def test_exceptions__come_before_the_intercepts(self, code: bytes, exception: int) -> None:
        machine = guest_machine(code, 0x8A, 0x8B, 0x8C, 0x4D, 0x4E)
        until_exit(machine)
        assert stored(machine, "EXITCODE") == exception


class TestMonitorx:
    """MONITORX and MWAITX have the intercepts of MONITOR and MWAIT, at every privilege level."""

    MONITORX, MWAITX = b"\x31\xc9\xb8\x00\x90\x00\x00\x0f\x01\xfa", b"\x31\xc9\x0f\x01\xfb"

    @pytest.mark.parametrize("profile", ["zen-server", "everything-amd"])
    def test_monitorx(self, profile: str) -> None:
        machine = guest_machine(self.MONITORX, 0x8A, profile=profile)
        until_exit(machine)
        assert (stored(machine, "EXITCODE"), stored(machine, "nRIP")) == (0x8A, GUEST_RIP + 10)

    def test_mwaitx__conditional(self) -> None:
        machine = guest_machine(self.MONITORX + self.MWAITX, 0x8C)
        until_exit(machine)
        assert (stored(machine, "EXITCODE"), stored(machine, "nRIP")) == (0x8C, GUEST_RIP + 15)

    def test_mwaitx__unconditional(self) -> None:
        machine = guest_machine(self.MWAITX, 0x8B)
        until_exit(machine)
        assert (stored(machine, "EXITCODE"), stored(machine, "EXITINFO1")) == (0x8B, 0)

    def test_at_privilege_level_3(self) -> None:
        machine = guest_machine(self.MONITORX + self.MWAITX, 0x8C, 0x46, fields={"CPL": 3})
        for table in (0x1_0000, 0x1_1000, 0x1_2000):
            machine.memory.write_u64(table, machine.memory.read_u64(table) | 4)  # user pages
        until_exit(machine)
        assert stored(machine, "EXITCODE") == 0x8C

    @pytest.mark.parametrize("code", [MONITORX, MWAITX])
    def test_without_the_feature__they_are_invalid(self, code: bytes) -> None:
        machine = guest_machine(code, 0x8A, 0x8B, 0x8C, 0x46, profile="qemu-epyc")
        until_exit(machine)
        assert stored(machine, "EXITCODE") == 0x46


class TestRdpru:
    """APM Vol. 3, RDPRU."""

    RDPRU = b"\x0f\x01\xfd"
    UD = 0x46

    def test_intercept(self) -> None:
        machine = guest_machine(b"\x31\xc9" + self.RDPRU, Exit.RDPRU, profile="everything-amd")
        until_exit(machine)
        assert (stored(machine, "EXITCODE"), stored(machine, "nRIP")) == (Exit.RDPRU, GUEST_RIP + 5)

    def test_without_the_feature__it_is_invalid_whatever_is_intercepted(self) -> None:
        machine = guest_machine(self.RDPRU, Exit.RDPRU, self.UD)
        until_exit(machine)
        assert stored(machine, "EXITCODE") == self.UD

    @pytest.mark.parametrize("register", [0, 1])
    def test_counts_what_was_not_spent_halted(self, register: int) -> None:
        code = b"\xb9" + register.to_bytes(4, "little") + self.RDPRU
        machine = guest_machine(code + VMMCALL, profile="everything-amd")
        machine.cpu.charge(0x5_0000_0000)
        machine.cpu.halted += 0x1_0000_0000
        until_exit(machine)
        assert stored(machine, "EXITCODE") == Exit.VMMCALL
        assert (machine.cpu.state.gpr[2], stored(machine, "RAX") >> 16) == (4, 0)

    def test_register_it_does_not_know__reads_zero(self) -> None:
        code = b"\xb9\x02\x00\x00\x00\xba\x07\x00\x00\x00" + self.RDPRU
        machine = guest_machine(code + VMMCALL, profile="everything-amd")
        until_exit(machine)
        assert (stored(machine, "RAX"), machine.cpu.state.gpr[2]) == (0, 0)

    @pytest.mark.parametrize(("cr4", "code"), [(0x24, UD), (0x20, Exit.VMMCALL)])
    def test_time_stamp_disable__is_about_user_mode(self, cr4: int, code: int) -> None:
        machine = guest_machine(self.RDPRU + VMMCALL, self.UD, profile="everything-amd", fields={"CPL": 3, "CR4": cr4})
        root = 0x1_0000
        for table in (root, root + 0x1000, root + 0x2000):
            machine.memory.write_u64(table, machine.memory.read_u64(table) | 4)  # user pages
        until_exit(machine)
        assert stored(machine, "EXITCODE") == code


class TestMcommit:
    """APM Vol. 3, MCOMMIT."""

    MCOMMIT = b"\xf3\x0f\x01\xfa"
    UD = 0x46
    EFER = {"EFER": 0x2_1D01}

    def test_all_stores_are_committed(self) -> None:
        flags = {"RFLAGS": 0x8D6}  # OF, SF, ZF, AF, PF
        machine = guest_machine(self.MCOMMIT + VMMCALL, profile="everything-amd", fields=self.EFER | flags)
        until_exit(machine)
        assert (stored(machine, "EXITCODE"), stored(machine, "RFLAGS")) == (Exit.VMMCALL, 0x3)

    def test_at_privilege_level_3(self) -> None:
        machine = guest_machine(self.MCOMMIT + VMMCALL, profile="everything-amd", fields=self.EFER | {"CPL": 3})
        for table in (0x1_0000, 0x1_1000, 0x1_2000):
            machine.memory.write_u64(table, machine.memory.read_u64(table) | 4)  # user pages
        until_exit(machine)
        assert (stored(machine, "EXITCODE"), stored(machine, "RFLAGS")) == (Exit.VMMCALL, 0x3)

    def test_intercept(self) -> None:
        machine = guest_machine(self.MCOMMIT, 0xA3, profile="everything-amd", fields=self.EFER)
        until_exit(machine)
        assert (stored(machine, "EXITCODE"), stored(machine, "nRIP")) == (0xA3, GUEST_RIP + 4)

    @pytest.mark.parametrize(("profile", "fields"), [("everything-amd", {}), ("zen-server", {})])
    def test_not_enabled__it_is_invalid_whatever_is_intercepted(self, profile: str, fields: dict[str, int]) -> None:
        machine = guest_machine(self.MCOMMIT, 0xA3, self.UD, profile=profile, fields=fields)
        until_exit(machine)
        assert stored(machine, "EXITCODE") == self.UD


class TestXsetbv:
    """APM Vol. 2, "Instruction Intercepts": the intercept comes before #GP, also that of the privilege level."""

    XSETBV = b"\x0f\x01\xd1"

    @pytest.mark.parametrize(("intercepts", "code"), [((), 0x4D), ((0x8D,), 0x8D)])
    @pytest.mark.parametrize("cpl", [0, 3])
    def test_intercept(self, cpl: int, intercepts: tuple[int, ...], code: int) -> None:
        fields = {"CPL": cpl, "CR4": 0x4_0020}
        machine = guest_machine(b"\xb9\x01\x00\x00\x00" + self.XSETBV, *intercepts, 0x4D, fields=fields)
        for table in (0x1_0000, 0x1_1000, 0x1_2000):
            machine.memory.write_u64(table, machine.memory.read_u64(table) | 4)  # user pages
        until_exit(machine)
        assert stored(machine, "EXITCODE") == code

    def test_without_osxsave__it_is_invalid(self) -> None:
        machine = guest_machine(self.XSETBV, 0x8D, 0x46)
        until_exit(machine)
        assert stored(machine, "EXITCODE") == 0x46
