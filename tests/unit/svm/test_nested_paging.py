"""Nested paging: EXITINFO1 and EXITINFO2 of every kind of fault, host modes, guest mode execute trap."""

from __future__ import annotations

import pytest
from svm_machine import GUEST_RIP, NESTED_TABLES, PAGE_TABLES, Machine

from vtx.addresses import GuestPhysicalAddress, LinearAddress
from vtx.svm.nested_paging import NestedPageFault, NestedPaging
from vtx.x86.event import Event, EventKind
from vtx.x86.memory import PhysicalMemory
from vtx.x86.outcome import InstructionAborted
from vtx.x86.page_rights import USER
from vtx.x86.second_level import AccessKind, SecondLevelPage
from vtx.x86.state import CpuState

READ, WRITE, EXECUTE = AccessKind.READ, AccessKind.WRITE, AccessKind.EXECUTE
PDE = NESTED_TABLES + 0x2000
FINAL, WALK = 1 << 32, 1 << 33
P, RW, US, RSVD, ID = 1, 2, 4, 8, 16
NX = 1 << 63
DATA = 0x20_0123  # of the second 2-MByte page


def running(pde: int | None = None, *, efer: int = 0x1D01, cr4: int = 0x20, gmet: bool = False) -> Machine:
    """A guest with nested paging whose second 2-MByte page has this entry; the host has these registers."""
    machine = Machine()
    machine.use_nested_paging()
    machine.fields["nested paging and encryption control"] |= 8 if gmet else 0
    machine.state.efer, machine.state.cr4 = efer, cr4
    if pde is not None:
        machine.memory.write_u64(PDE + 8, pde)
    machine.run()
    return machine


def fault(machine: Machine, linear: int, kind: AccessKind) -> NestedPageFault:
    with pytest.raises(InstructionAborted) as caught:
        machine.processor.mmu.translate(linear, kind)
    assert isinstance(caught.value.cause, NestedPageFault)
    return caught.value.cause


@pytest.mark.parametrize(
    ("pde", "kind", "error"),
    [
        (0, READ, FINAL | US),
        (0, WRITE, FINAL | US | RW),
        (0, EXECUTE, FINAL | US | ID),
        (0x20_0083, READ, FINAL | US | P),  # supervisor page
        (0x20_0085, WRITE, FINAL | US | P | RW),  # read-only page
        (NX | 0x20_0087, EXECUTE, FINAL | US | P | ID),
        (1 << 50 | 0x20_0087, READ, FINAL | US | P | RSVD),
        (0x20_2087, WRITE, FINAL | US | P | RSVD | RW),
    ],
)
def test_fault_of_the_final_translation(pde: int, kind: AccessKind, error: int) -> None:
    machine = running(pde)
    found = fault(machine, DATA, kind)
    assert (found.error, found.guest_physical) == (error, DATA)
    assert machine.svm.second_level_fault(found, None)
    assert (machine.stored("EXITCODE"), machine.stored("EXITINFO1"), machine.stored("EXITINFO2")) == (
        *(0x400, error),
        DATA,
    )


@pytest.mark.parametrize(
    ("efer", "cr4", "reports"),
    [(0x1D01, 0x20, True), (0x1501, 0x20, False), (0x1501, 0x10_0020, True), (0x1D01, 0x10_0020, True)],
)
def test_fetch_is_reported_by_the_hosts_settings(efer: int, cr4: int, reports: bool) -> None:
    assert bool(fault(running(0, efer=efer, cr4=cr4), DATA, EXECUTE).error & ID) is reports


def test_nx_is_reserved_without_it_in_the_host() -> None:
    assert fault(running(NX | 0x20_0087, efer=0x1501), DATA, READ).error == FINAL | US | P | RSVD


def test_nx_of_the_guest_does_not_matter() -> None:
    machine = running(NX | 0x20_0087)
    machine.state.efer &= ~0x800
    machine.processor.load_control_state()
    assert fault(machine, DATA, EXECUTE).error == FINAL | US | P | ID


def test_fault_of_a_guest_table_counts_as_a_write() -> None:
    machine = Machine()
    machine.use_nested_paging()
    machine.fields["CR3"] = 0x20_3000
    machine.memory.write(0x20_3000, machine.memory.read(PAGE_TABLES, 0x1000))
    machine.memory.write_u64(PDE + 8, 0x20_0085)  # the page of the guest's root is read-only
    machine.run()
    found = fault(machine, GUEST_RIP, READ)
    assert (found.error, found.guest_physical) == (WALK | P | RW | US, 0x20_3000)


def test_fault_during_delivery_is_in_exitintinfo() -> None:
    machine = running(0)
    found = fault(machine, DATA, READ)
    machine.svm.second_level_fault(found, Event(0x21, EventKind.EXTERNAL_INTERRUPT))
    assert machine.stored("EXITINTINFO") == 0x8000_0021


@pytest.mark.parametrize(("kind", "fetched"), [(READ, 15), (EXECUTE, 0)])
def test_instruction_bytes(kind: AccessKind, fetched: int) -> None:
    machine = running(0)
    machine.memory.write(GUEST_RIP, bytes(range(1, 16)))
    machine.svm.second_level_fault(fault(machine, DATA, kind), None)
    assert machine.stored("number of bytes fetched") == fetched
    assert machine.memory.read(0x2000 + 0xD1, 15) == (bytes(range(1, 16)) if fetched else bytes(15))


def test_instruction_bytes_end_where_the_next_page_is_absent() -> None:
    machine = running(0)
    machine.state.rip = 0x1F_FFFA
    machine.svm.second_level_fault(fault(machine, DATA, READ), None)
    assert machine.stored("number of bytes fetched") == 6


def test_accessed_and_dirty_flags_of_the_nested_tables() -> None:
    machine = running(0x20_0087)
    machine.processor.mmu.translate(DATA, READ)
    assert machine.memory.read_u64(PDE + 8) == 0x20_00A7
    machine.processor.mmu.translate(DATA, WRITE)
    assert machine.memory.read_u64(PDE + 8) == 0x20_00E7


def test_a_new_mapping_counts_after_the_next_vmrun() -> None:
    machine = running(0x20_0087)
    assert machine.processor.mmu.translate(DATA, READ) == DATA
    assert machine.processor.mmu.translate(DATA + 0x1000, READ) == DATA + 0x1000
    machine.execute(b"\x0f\x01\xd8")  # VMRUN exits
    machine.memory.write_u64(PDE + 8, 0x40_0087)
    machine.fields["TLB_CONTROL"] = 1
    machine.run()
    assert machine.processor.mmu.translate(DATA, READ) == DATA + 0x20_0000


class TestGuestModeExecuteTrap:
    """APM Vol. 2, "Guest Mode Execute Trap Extension"."""

    @staticmethod
    def access(machine: Machine, kind: AccessKind, *, user: bool) -> int | None:
        """EXITINFO1 of an access at DATA, None if it is allowed."""
        try:
            machine.processor.mmu.translate(DATA, kind, user=user)
        except InstructionAborted as aborted:
            assert isinstance(aborted.cause, NestedPageFault)
            assert aborted.cause.guest_physical == DATA
            return aborted.cause.error
        return None

    @staticmethod
    def guest(
        pde: int, *, efer: int = 0x1D01, gmet: bool = True, user_page: bool = True, paging: bool = True
    ) -> Machine:
        """A guest whose page of DATA is one of user mode, or not, in its own tables; ``pde`` is in the nested ones."""
        machine = running(pde, efer=efer, gmet=gmet)
        if user_page:
            for entry in (PAGE_TABLES, PAGE_TABLES + 0x1000, PAGE_TABLES + 0x2008):
                machine.memory.write_u64(entry, machine.memory.read_u64(entry) | US)
        if not paging:
            machine.state.cr0 &= ~(1 << 31)
            machine.state.efer &= ~0x400
            machine.processor.load_control_state()
        return machine

    ACCESSES = (
        (0x20_0083, False, EXECUTE, None),
        (0x20_0087, False, EXECUTE, FINAL | P | ID),
        (0x20_0083, True, EXECUTE, FINAL | P | ID | US),
        (0x20_0087, True, EXECUTE, None),
        (0x20_0083, False, READ, None),
        (0x20_0083, True, WRITE, None),
        (0x20_0087, False, WRITE, None),
        (0x20_0085, False, WRITE, FINAL | P | RW | US),
        (NX | 0x20_0083, False, EXECUTE, FINAL | P | ID),
        (NX | 0x20_0087, True, EXECUTE, FINAL | P | ID | US),
        (0, False, EXECUTE, FINAL | ID),
        (0, True, EXECUTE, FINAL | ID | US),
        (0, False, READ, FINAL | US),
    )

    @pytest.mark.parametrize(("pde", "user", "kind", "error"), ACCESSES)
    def test_goes_by_the_privilege_level(self, pde: int, user: bool, kind: AccessKind, error: int | None) -> None:
        """The guest's own page is one of user mode, which supervisor mode may execute without SMEP."""
        assert self.access(self.guest(pde), kind, user=user) == error

    @pytest.mark.parametrize(("pde", "user", "kind", "error"), ACCESSES)
    def test_without_paging_of_the_guest(self, pde: int, user: bool, kind: AccessKind, error: int | None) -> None:
        assert self.access(self.guest(pde, paging=False), kind, user=user) == error

    @pytest.mark.parametrize("pde", [0x20_0083, 0x20_0087])
    def test_supervisor_page_of_the_guest(self, pde: int) -> None:
        expected = FINAL | P | ID if pde & US else None
        assert self.access(self.guest(pde, user_page=False), EXECUTE, user=False) == expected

    @pytest.mark.parametrize("first", [False, True])
    @pytest.mark.parametrize("pde", [0x20_0083, 0x20_0087])
    def test_what_one_may_is_not_remembered_for_the_other(self, pde: int, first: bool) -> None:
        machine, allowed = self.guest(pde), bool(pde & US)
        for user in (first, not first, first, not first):
            for kind in (READ, EXECUTE):
                refused = kind is EXECUTE and user is not allowed
                assert bool(self.access(machine, kind, user=user)) is refused

    def test_switched_off(self) -> None:
        machine = self.guest(0x20_0087, gmet=False)
        assert [self.access(machine, EXECUTE, user=user) for user in (False, True)] == [None, None]

    def test_fetch_is_reported_by_the_hosts_settings(self) -> None:
        assert self.access(self.guest(0x20_0087, efer=0x1501), EXECUTE, user=False) == FINAL | P


@pytest.mark.parametrize(
    ("host", "address", "known"),
    [
        (CpuState(cr4=0x20, efer=0xD00), 1 << 48, False),
        (CpuState(cr4=0x20, efer=0xD00), (1 << 48) - 1, True),
        (CpuState(cr4=0x20, efer=0), 1 << 32, False),
        (CpuState(cr4=0x20, efer=0), 0xFFFF_FFFF, True),
        (CpuState(cr4=0x10, efer=0), 1 << 32, False),
    ],
)
def test_width_of_guest_physical_addresses(host: CpuState, address: int, known: bool) -> None:
    memory = PhysicalMemory(0x10_0000)
    nested = NestedPaging(0x1000, host, memory, 48, page1gb=True, gmet=False)
    # Every entry of every level leads back to the root page: a valid table and a valid page in all modes.
    flags = 0x1001 if host.cr4 & 0x20 and not host.efer else 0x1007
    for offset in range(0, 0x1000, 8):
        memory.write_u64(0x1000 + offset, flags if flags == 0x1007 else 0x2001)
        memory.write_u64(0x2000 + offset, 0x3007)
        memory.write_u64(0x3000 + offset, 0x3007)
    found = nested.translate(GuestPhysicalAddress(address), READ, LinearAddress(0), USER)
    assert isinstance(found, SecondLevelPage) is known
    if not known:
        assert isinstance(found, NestedPageFault)
        assert found.error == FINAL | US


def test_legacy_host_with_4_mbyte_pages() -> None:
    memory = PhysicalMemory(0x10_0000)
    nested = NestedPaging(0x1000, CpuState(cr4=0x10), memory, 48, page1gb=True, gmet=False)
    memory.write_u32(0x1000 + 4 * 3, 0x00C0_0087)
    found = nested.translate(GuestPhysicalAddress(0xC1_2345), READ, LinearAddress(0), USER)
    assert isinstance(found, SecondLevelPage)
    assert found.physical == 0xC1_2000


def test_pae_guest_reads_its_pdptes_on_demand() -> None:
    machine = Machine()
    machine.use_nested_paging()
    machine.fields |= {"EFER": 0x1800, "CS attributes": 0xC9B, "CR3": 0x30000}
    machine.memory.write_u64(0x30000, 0x31000 | 1)
    machine.memory.write_u64(0x30008, 0x31000 | 1 | 1 << 52)  # a reserved bit that nobody meets
    machine.memory.write_u64(0x31000, 0x83)
    machine.run()
    assert machine.svm.non_root
    assert machine.processor.mmu.translate(0x1234, READ) == 0x1234
    with pytest.raises(InstructionAborted) as caught:
        machine.processor.mmu.translate(0x4000_1234, READ)
    assert str(caught.value.cause) == "#PF(0x9) at 0x40001234"


def test_inputs_tell_nested_tables_apart() -> None:
    memory = PhysicalMemory(0x10_0000)
    tags = {
        NestedPaging(n_cr3, CpuState(cr4=cr4, efer=efer), memory, 48, page1gb=True, gmet=gmet).tag
        for n_cr3 in (0x1000, 0x2000)
        for cr4, efer in ((0x10, 0), (0x20, 0), (0x20, 0xD00), (0x20, 0x500))
        for gmet in (False, True)
    }
    assert len(tags) == 16
