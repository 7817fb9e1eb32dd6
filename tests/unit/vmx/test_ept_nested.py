"""Guest paging over EPT: every access the guest's walk makes goes through EPT, as that kind of access."""

import pytest

from vtx.vmx.ept import EptConfig, EptMisconfiguration, EptViolation, ExtendedPageTables
from vtx.x86.memory import PhysicalMemory
from vtx.x86.mmu import Mmu
from vtx.x86.outcome import InstructionAborted
from vtx.x86.page_rights import Privilege
from vtx.x86.paging import PageFault, PagingContext, Translation, load_pdptrs, walk
from vtx.x86.second_level import AccessKind
from vtx.x86.state import CpuState

READ, WRITE, EXECUTE = AccessKind
R, W, X, A, D = 1, 2, 4, 0x20, 0x40
EPT_A, EPT_D = 0x100, 0x200
RWX = R | W | X
LINEAR = 0x1234_5678_9ABC
DATA = 0x9000
GUEST_TABLES = 0x1000
EPT = 0x10000
OFFSET = 0x40000  # host physical = guest physical + OFFSET, so that a missed translation shows


class Vm:
    """A 4-level guest whose first 64 KBytes of guest-physical memory are mapped by EPT page-table entries."""

    def __init__(self, eptp_bits=0, guest_flags=0):
        self.memory = PhysicalMemory(1 << 20)
        for level in range(3):
            self.memory.write_u64(EPT + 0x1000 * level, EPT + 0x1000 * (level + 1) | RWX)
        for page in range(16):
            self.set_ept(page << 12, RWX)
        self.entries = []
        for level, shift in enumerate((39, 30, 21, 12)):
            address = GUEST_TABLES + 0x1000 * level + (LINEAR >> shift & 0x1FF) * 8
            target = DATA if shift == 12 else GUEST_TABLES + 0x1000 * (level + 1)
            self.entries.append(address)
            self.memory.write_u64(OFFSET + address, target | 7 | guest_flags)
        self.ept = ExtendedPageTables(EptConfig(EPT | 0x1E | eptp_bits, 46), self.memory)
        self.context = PagingContext(1 << 31 | 1 << 16, GUEST_TABLES, 1 << 5, 1 << 10, 46)

    def ept_entry(self, guest_physical):
        return EPT + 0x3000 + (guest_physical >> 12) * 8

    def set_ept(self, guest_physical, bits):
        page = guest_physical & ~0xFFF
        self.memory.write_u64(self.ept_entry(page), OFFSET + page | 6 << 3 | bits)

    def walk(self, kind, privilege=Privilege.SUPERVISOR):
        return walk(self.context, LINEAR, kind, privilege, self.memory, self.ept)


def test_translation():
    result = Vm().walk(READ)
    assert isinstance(result, Translation)
    assert (result.physical, result.guest_physical) == (OFFSET + DATA, DATA)


def test_large_guest_page_over_small_ept_pages():
    vm = Vm()
    # A 2-MByte page at guest-physical 0: the EPT maps its first 16 pages only.
    vm.memory.write_u64(OFFSET + vm.entries[2], 0x80 | 7)
    wanted = LINEAR & 0x1F_FFFF
    result = vm.walk(READ)
    assert isinstance(result, EptViolation)
    assert result.guest_physical == wanted
    near = walk(vm.context, LINEAR & ~0x1F_FFFF | 0x5123, READ, Privilege.SUPERVISOR, vm.memory, vm.ept)
    assert isinstance(near, Translation)
    assert (near.physical, near.size) == (OFFSET + 0x5000, 1 << 21)


@pytest.mark.parametrize("level", range(4))
@pytest.mark.parametrize("kind", AccessKind)
@pytest.mark.parametrize(("eptp_bits", "access"), [(0, 1), (0x40, 3)])
def test_table_not_mapped(level, kind, eptp_bits, access):
    vm = Vm(eptp_bits)
    vm.set_ept(vm.entries[level], 0)
    assert vm.walk(kind) == EptViolation(vm.entries[level], LINEAR, 0x80 | access)


# With EPT flags disabled the walk reads, and writes only to set a flag that is clear.
READ_ONLY_TABLE = [
    (0, 0, READ, True),
    (0, 0, WRITE, True),
    (0, 0, EXECUTE, True),
    (0, A, READ, False),
    (0, A, WRITE, True),
    (0, A, EXECUTE, False),
    (0, A | D, READ, False),
    (0, A | D, WRITE, False),
    (0, A | D, EXECUTE, False),
    (0x40, 0, READ, True),
    (0x40, A, READ, True),
    (0x40, A | D, READ, True),
    (0x40, A | D, WRITE, True),
    (0x40, A | D, EXECUTE, True),
]


@pytest.mark.parametrize(("eptp_bits", "guest_flags", "kind", "violates"), READ_ONLY_TABLE)
def test_page_table_is_read_only(eptp_bits, guest_flags, kind, violates):
    vm = Vm(eptp_bits, guest_flags)
    vm.set_ept(vm.entries[3], R)
    result = vm.walk(kind)
    if violates:
        # A read-modify-write of a readable page, for a linear address, not for its translation.
        assert result == EptViolation(vm.entries[3], LINEAR, 0x08B)
    else:
        assert isinstance(result, Translation)


def test_guest_page_fault_comes_before_the_page_is_looked_up():
    vm = Vm()
    vm.set_ept(DATA, 0)
    vm.memory.write_u64(OFFSET + vm.entries[3], DATA | 3)
    assert vm.walk(READ, Privilege.USER) == PageFault(LINEAR, 0b00101)


@pytest.mark.parametrize(("kind", "access"), [(READ, 1), (WRITE, 2), (EXECUTE, 4)])
def test_page_not_mapped(kind, access):
    vm = Vm()
    vm.set_ept(DATA, 0)
    assert vm.walk(kind) == EptViolation(DATA | 0xABC, LINEAR, 0x180 | access)


def test_page_misconfigured():
    vm = Vm()
    vm.set_ept(DATA, W)
    assert vm.walk(READ) == EptMisconfiguration(DATA | 0xABC, LINEAR)


@pytest.mark.parametrize(("guest_dirty", "ept_dirty"), [(0, 0), (D, 0), (0, EPT_D), (D, EPT_D)])
def test_writes_are_granted_when_both_dirty_flags_are_set(guest_dirty, ept_dirty):
    vm = Vm(0x40, A | guest_dirty)
    vm.set_ept(DATA, RWX | EPT_A | ept_dirty)
    result = vm.walk(READ)
    assert isinstance(result, Translation)
    granted = bool(result.permissions(vm.context, Privilege.SUPERVISOR) & WRITE)
    assert granted == bool(guest_dirty and ept_dirty)


def test_flags_of_every_table_page():
    vm = Vm(0x40)
    assert isinstance(vm.walk(READ), Translation)
    for entry in vm.entries:
        assert vm.memory.read_u64(vm.ept_entry(entry)) & (EPT_A | EPT_D) == EPT_A | EPT_D
    assert vm.memory.read_u64(vm.ept_entry(DATA)) & (EPT_A | EPT_D) == EPT_A


def test_load_pdptrs():
    vm = Vm()
    for index in range(4):
        vm.memory.write_u64(OFFSET + 0x5040 + 8 * index, 0x3001 + index * 0x1000)
    assert load_pdptrs(0x5040, 46, vm.memory, vm.ept) == (0x3001, 0x4001, 0x5001, 0x6001)
    vm.set_ept(0x5000, 0)
    assert load_pdptrs(0x5040, 46, vm.memory, vm.ept) == EptViolation(0x5040, None, 0x001)


@pytest.mark.parametrize(
    ("kind", "permissions", "qualification"), [(READ, 0, 0x2181), (WRITE, R, 0x218A), (WRITE, 0, 0x2182)]
)
def test_shadow_stack_access(kind, permissions, qualification):
    """Bit 13 of the qualification, of the access to the page alone: those to the paging structures are ordinary."""
    vm = Vm(guest_flags=A | D)
    leaf = OFFSET + vm.entries[3]
    vm.memory.write_u64(leaf, vm.memory.read_u64(leaf) & ~(W | 4))  # not writable, not the user's
    vm.set_ept(DATA, permissions)
    result = vm.walk(kind, Privilege.SUPERVISOR_SHADOW_STACK)
    assert isinstance(result, EptViolation)
    assert result.complete_qualification == qualification
    vm.set_ept(vm.entries[2], 0)
    result = vm.walk(kind, Privilege.SUPERVISOR_SHADOW_STACK)
    assert isinstance(result, EptViolation)
    assert (result.guest_physical, result.complete_qualification) == (vm.entries[2], 0x81)


SSS = 1 << 60
SSS_CONTROL = 1 << 7


@pytest.mark.parametrize("kind", [READ, WRITE])
@pytest.mark.parametrize(
    ("permissions", "table", "allowed"),
    [
        (R | SSS, RWX, True),  # the leaf need not be writable
        (RWX | SSS, RWX, True),
        (RWX, RWX, False),
        (X | SSS, RWX, False),
        (R | SSS, R | X, False),  # but the tables must
        (R | SSS, R | W, True),
    ],
)
def test_supervisor_shadow_stack_pages(kind, permissions, table, allowed):
    """With bit 7 of the EPTP, which marks pages for shadow stacks of the supervisor, in their entries."""
    vm = Vm(SSS_CONTROL, guest_flags=A | D)
    leaf = OFFSET + vm.entries[3]
    vm.memory.write_u64(leaf, vm.memory.read_u64(leaf) & ~(W | 4))
    vm.set_ept(DATA, permissions)
    vm.memory.write_u64(EPT + 0x2000, EPT + 0x3000 | table)
    for entry in vm.entries:  # the guest's tables are behind the same EPT entries: mapped with what they need
        assert vm.memory.read_u64(vm.ept_entry(entry)) & RWX == RWX
    result = vm.walk(kind, Privilege.SUPERVISOR_SHADOW_STACK)
    if allowed:
        assert isinstance(result, Translation)
        assert result.physical == OFFSET + DATA
    else:
        assert isinstance(result, EptViolation)
        effective = permissions & table & RWX
        marked = 1 << 14 if permissions & SSS else 0
        assert result.complete_qualification == kind | effective << 3 | 0x180 | 1 << 13 | marked


def test_supervisor_shadow_stack_pages_for_other_accesses():
    """They are ordinary for those: the entry's permissions count, and the mark does not."""
    vm = Vm(SSS_CONTROL)
    vm.set_ept(DATA, R | SSS)
    assert isinstance(vm.walk(READ), Translation)
    result = vm.walk(WRITE)
    assert isinstance(result, EptViolation)
    assert result.complete_qualification == 0x182 | R << 3 | 1 << 14
    without = Vm()
    without.set_ept(DATA, R | SSS)
    assert without.walk(WRITE).complete_qualification == 0x182 | R << 3


def test_supervisor_shadow_stack_pages_are_asked_for_each_time():
    """An ordinary access to a page does not vouch for one by a shadow stack."""
    vm = Vm(SSS_CONTROL, guest_flags=A | D)
    leaf = OFFSET + vm.entries[3]
    vm.memory.write_u64(leaf, vm.memory.read_u64(leaf) & ~(W | 4))
    mmu = Mmu(vm.memory, 46)
    state = CpuState(cr0=1 << 31 | 1 << 16 | 1, cr3=GUEST_TABLES, cr4=1 << 5, efer=1 << 10)
    mmu.vm_transition(state, vm.ept, 1, flush=False)
    assert mmu.read(LINEAR, 8) == 0
    with pytest.raises(InstructionAborted) as aborted:
        mmu.shadow_read(LINEAR & ~7, 8, user=False)
    assert isinstance(aborted.value.cause, EptViolation)
    vm.set_ept(DATA, R | SSS)
    assert mmu.shadow_read(LINEAR & ~7, 8, user=False) == 0
