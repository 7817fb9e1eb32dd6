"""HLAT paging: which addresses it translates, restarts, page faults; and a guest whose CR3 says otherwise."""

from __future__ import annotations

import pytest

from vmcs import controls as c
from vmcs import fields as f
from vmcs.exits import Reason
from vmcs.fields import Field
from vmcs.region import Vmcs
from vtx.addresses import LinearAddress
from vtx.bench.hypervisor import install
from vtx.bench.listing import code
from vtx.machine import Machine
from vtx.x86.hlat import Hlat, walk_with_hlat
from vtx.x86.memory import PhysicalMemory
from vtx.x86.page_rights import Privilege
from vtx.x86.paging import PageFault, PagingContext, Translation, WalkStep
from vtx.x86.profile import Profile, build_profile, profile_document
from vtx.x86.second_level import AccessKind, IdentitySecondLevel

CR3, HLATP = 0x1_0000, 0x2_0000
ORDINARY, MANAGED = 0x5_0000, 0x6_0000  # where the page is by either
LOW, HIGH = 0x0000_1234_5678_9000, 0xFFFF_8234_5678_9000
RESTART = 1 << 11
SHIFTS = (39, 30, 21, 12)
LEVEL_4 = {"cr0": 1 << 31 | 1 << 16, "cr4": 1 << 5, "efer": 1 << 10}


class Tables:
    def __init__(self, linear: int, *, flags: int = 0x67) -> None:
        self.memory = PhysicalMemory(1 << 20)
        self.linear = linear
        for root, page in ((CR3, ORDINARY), (HLATP, MANAGED)):
            for level in range(4):
                target = page if level == 3 else root + 0x1000 * (level + 1)
                self.memory.write_u64(self.entry(root, level), target | flags)
        self.context = PagingContext(cr3=CR3, physical_address_width=46, **LEVEL_4)

    def entry(self, root: int, level: int) -> int:
        return root + 0x1000 * level + 8 * (self.linear >> SHIFTS[level] & 0x1FF)

    def change(self, root: int, level: int, bits: int) -> None:
        self.memory.write_u64(self.entry(root, level), self.memory.read_u64(self.entry(root, level)) ^ bits)

    def walk(
        self, *, upper_half_only: bool = False, kind: AccessKind = AccessKind.READ, steps: list[WalkStep] | None = None
    ) -> object:
        return walk_with_hlat(
            Hlat(HLATP, upper_half_only),
            self.context,
            LinearAddress(self.linear),
            kind,
            Privilege.SUPERVISOR,
            self.memory,
            IdentitySecondLevel(),
            steps,
        )

    def physical(self, **more: object) -> int:
        result = self.walk(**more)  # type: ignore[arg-type]
        assert isinstance(result, Translation), result
        return result.physical


@pytest.mark.parametrize(
    ("linear", "upper_half_only", "page"),
    [(LOW, False, MANAGED), (HIGH, False, MANAGED), (LOW, True, ORDINARY), (HIGH, True, MANAGED)],
)
def test_prefix__chooses_the_addresses(linear: int, upper_half_only: bool, page: int) -> None:
    assert Tables(linear).physical(upper_half_only=upper_half_only) == page


def test_other_modes__have_none() -> None:
    tables = Tables(0x1000)
    tables.context = PagingContext(1 << 31, CR3, 0, 0, 46)  # 32-bit paging
    tables.memory.write_u32(CR3, 0x3_0000 | 0x67)
    tables.memory.write_u32(0x3_0000 + 4, ORDINARY | 0x67)
    assert tables.physical() == ORDINARY


@pytest.mark.parametrize("level", range(4))
def test_restart__goes_through_ordinary_paging(level: int) -> None:
    tables = Tables(HIGH, flags=0x7)
    tables.change(HLATP, level, RESTART)
    steps: list[WalkStep] = []
    assert tables.physical(steps=steps) == ORDINARY
    assert len(steps) == level + 1 + 4
    # No flag of what HLAT paging used before: the translation does not come from there.
    assert all(tables.memory.read_u64(tables.entry(HLATP, each)) & 0x60 == 0 for each in range(4))


def test_restart__faults_are_those_of_ordinary_paging() -> None:
    tables = Tables(HIGH)
    tables.change(HLATP, 2, RESTART)
    tables.change(CR3, 3, 1)
    assert tables.walk() == PageFault(LinearAddress(HIGH), 0)


def test_restart__limits_the_size_of_the_page() -> None:
    tables = Tables(HIGH)
    tables.memory.write_u64(tables.entry(CR3, 2), 0x20_0000 | 0xE7)  # a 2-MByte page
    tables.change(HLATP, 3, RESTART)
    result = tables.walk()
    assert isinstance(result, Translation)
    assert result.size == 1 << 12
    tables.change(HLATP, 3, RESTART)
    tables.change(HLATP, 1, RESTART)
    result = tables.walk()
    assert isinstance(result, Translation)
    assert result.size == 1 << 21


def test_ordinary_paging__ignores_the_restart_bit() -> None:
    tables = Tables(LOW)
    tables.change(CR3, 3, RESTART)
    assert tables.physical(upper_half_only=True) == ORDINARY


@pytest.mark.parametrize(
    ("level", "bits", "error"),
    [
        (0, 1, 0x80),  # not present
        (3, 1, 0x80),
        (2, 1 << 50, 0x89),  # a reserved bit
        (3, 1 << 51, 0x89),
        (1, 1 | RESTART, 0x80),  # what is not present restarts nothing
    ],
)
def test_page_fault__without_a_translation_tells_of_hlat(level: int, bits: int, error: int) -> None:
    tables = Tables(HIGH)
    tables.change(HLATP, level, bits)
    assert tables.walk() == PageFault(LinearAddress(HIGH), error)


def test_page_fault__of_access_rights_does_not() -> None:
    tables = Tables(HIGH)
    tables.change(HLATP, 3, 2)
    assert tables.walk(kind=AccessKind.WRITE) == PageFault(LinearAddress(HIGH), 0x3)


# ---- a guest

EPT_ROOT, EPT_PDPT = 0x50_0000, 0x50_1000
MANAGED_ROOT, MANAGED_PDPT, MANAGED_PD = 0x51_0000, 0x51_1000, 0x51_2000
GUEST = code("""\
48 8b 04 25 00 00 60 00         ; mov rax,[600000h]
48 89 04 25 00 00 90 00         ; mov [900000h],rax
f4                              ; hlt
""")


def with_prefixes() -> Profile:
    document = profile_document("everything")
    document["vmx"]["maximum_hlat_prefix_size"] = 1
    return build_profile("prefixes", document)


def run_guest(
    *, restart: bool = False, present: bool = True, more: dict[Field, int] | None = None
) -> tuple[Machine, Vmcs]:
    """Linear 600000H is at A00000H by the hypervisor's tables, at 600000H by the guest's own; the rest is alike."""
    machine = Machine(profile=with_prefixes(), memory=16 << 20)
    memory = machine.memory
    vmcs = install(
        machine,
        guest=GUEST,
        controls=(c.ENABLE_EPT, c.HLT_EXITING, c.ACTIVATE_TERTIARY_CONTROLS),
        fields={
            f.EPT_POINTER: EPT_ROOT | 0x1E,
            f.TERTIARY_PROCESSOR_BASED_CONTROLS: c.ENABLE_HLAT.mask,
            f.HLAT_POINTER: MANAGED_ROOT,
            f.EXCEPTION_BITMAP: 1 << 14,
            **(more or {}),
        },
    )
    memory.write_u64(EPT_ROOT, EPT_PDPT | 7)
    memory.write_u64(EPT_PDPT, 1 << 7 | 6 << 3 | 7)
    memory.write_u64(MANAGED_ROOT, MANAGED_PDPT | 0x67)
    memory.write_u64(MANAGED_PDPT, MANAGED_PD | 0x67)
    for number in range(8):
        memory.write_u64(MANAGED_PD + 8 * number, number << 21 | 0xE7)
    bits = (RESTART if restart else 0) | (0xE7 if present else 0xE6)
    memory.write_u64(MANAGED_PD + 8 * 3, 5 << 21 | bits)
    memory.write_u64(0x60_0000, 0x1111)
    memory.write_u64(0xA0_0000, 0x2222)
    result = machine.run(max_instructions=10_000)
    assert result.exit_value == 0, result.message
    return machine, vmcs


def guest_rax(machine: Machine) -> int:
    return machine.memory.read_u64(0x90_0000)


def test_guest__reads_what_the_hypervisor_maps() -> None:
    machine, vmcs = run_guest()
    assert vmcs[f.EXIT_REASON] == Reason.HLT
    assert guest_rax(machine) == 0x2222


def test_guest__restarted_reads_what_it_maps_itself() -> None:
    machine, _ = run_guest(restart=True)
    assert guest_rax(machine) == 0x1111


def test_guest__without_the_control_or_the_prefix() -> None:
    for more in ({f.TERTIARY_PROCESSOR_BASED_CONTROLS: 0}, {f.HLAT_PREFIX_SIZE: 1}):
        machine, _ = run_guest(more=more)
        assert guest_rax(machine) == 0x1111


def test_guest__page_fault_has_the_hlat_flag() -> None:
    _, vmcs = run_guest(present=False)
    assert vmcs[f.EXIT_REASON] == Reason.EXCEPTION_OR_NMI
    assert vmcs[f.VM_EXIT_INTERRUPTION_ERROR_CODE] == 0x80
    assert vmcs[f.EXIT_QUALIFICATION] == 0x60_0000


def test_host__is_not_concerned() -> None:
    machine, _ = run_guest()
    assert machine.cpu.mmu.hlat is None
