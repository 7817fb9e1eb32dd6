"""The MMU with its TLB, and an engine's TLB in front of it, equal the plain walk.

A stateful machine edits page tables and EPT entries, changes control registers, switches address spaces and virtual
machines, and after each edit does one of the invalidations that the manuals require for it, or none where none is
required. Then every access must have exactly the outcome of a plain walk over the same memory.
"""

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from vtx.vmx.ept import EptConfig, ExtendedPageTables
from vtx.x86.memory import PhysicalMemory
from vtx.x86.mmu import Grant, Mmu
from vtx.x86.outcome import Fault, Vector
from vtx.x86.page_rights import Privilege
from vtx.x86.paging import PageFault, Translation, walk
from vtx.x86.second_level import AccessKind, IdentitySecondLevel
from vtx.x86.state import CpuState
from vtx.x86.tlb import Tlb

WIDTH = 40
PE, WP, PG = 1, 1 << 16, 1 << 31
PAE, PGE, PCIDE, SMEP, SMAP, PKE = 1 << 5, 1 << 7, 1 << 17, 1 << 20, 1 << 21, 1 << 22
LMA_LME, NXE = 0x500, 1 << 11
P, RW, US, A, D, PS, G, XD = 1, 2, 4, 0x20, 0x40, 0x80, 0x100, 1 << 63

# Guest tables: two roots (PCIDs 1 and 2) share what is below index 0 and have private tables below index 1.
ROOTS = {1: 0x1000, 2: 0x2000}
SHARED, PRIVATE = (0x3000, 0x4000, 0x5000), {1: (0x6000, 0x7000, 0x8000), 2: (0x9000, 0xA000, 0xB000)}
FRAMES = [0x10000 + 0x1000 * index for index in range(4)]
SMALL = [0x0000, 0x1000, 0x2000, (1 << 39), (1 << 39) | 0x1000]
LARGE = [0x20_0000, 0x20_3000, 0x21_0000]
LINEAR = SMALL + LARGE
EPT_ROOTS = (0x100000, 0x110000)

# (VPID, EPT root or None): three translation regimes for two register sets, and the host.
REGIMES = ((0, None), (1, 0), (2, 0), (2, 1), (1, None))


class Overlay:
    """Memory whose writes do not reach the base: the plain walk may set flags without being seen."""

    def __init__(self, base):
        self.base, self.written = base, {}

    def read_u64(self, address):
        return self.written.get(address, self.base.read_u64(address))

    def write_u64(self, address, value):
        self.written[address] = value


class Engine:
    """What the execution engine does with grants: it caches them by page and privilege until told to forget."""

    def __init__(self):
        self.grants = {}

    def flush(self, page):
        if page is None:
            self.grants.clear()
        else:
            for key in [key for key in self.grants if key[0] == page]:
                del self.grants[key]


def build_guest(memory):
    for pcid, root in ROOTS.items():
        memory.write_u64(root, SHARED[0] | P | RW | US)
        memory.write_u64(root + 8, PRIVATE[pcid][0] | P | RW | US)
    for directory_pointers, directory, table in (SHARED, *PRIVATE.values()):
        memory.write_u64(directory_pointers, directory | P | RW | US)
        memory.write_u64(directory, table | P | RW | US)
        for index, frame in enumerate(FRAMES[:3]):
            memory.write_u64(table + 8 * index, frame | P | RW | US)
    memory.write_u64(SHARED[1] + 8, PS | P | RW | US)


def build_ept(memory, root):
    for level in range(3):
        memory.write_u64(root + 0x1000 * level, root + 0x1000 * (level + 1) | 7)
    for page in range(512):
        memory.write_u64(root + 0x3000 + 8 * page, page << 12 | 0x37)


class MmuMachine(RuleBasedStateMachine):
    @initialize(flags=st.booleans(), capacity=st.sampled_from([2, 4, 64]), tags=st.sampled_from([3, 64]))
    def start(self, flags, capacity, tags):
        self.memory = PhysicalMemory(4 << 20)
        build_guest(self.memory)
        for root in EPT_ROOTS:
            build_ept(self.memory, root)
        self.engine = Engine()
        self.mmu = Mmu(self.memory, WIDTH, flush_engine=self.engine.flush, tlb=Tlb(capacity, tags))
        configs = [EptConfig(root | 0x1E | flags << 6, WIDTH) for root in EPT_ROOTS]
        self.second_levels = {None: IdentitySecondLevel()}
        self.second_levels |= {index: ExtendedPageTables(config, self.memory) for index, config in enumerate(configs)}
        self.overlays = {None: lambda memory: IdentitySecondLevel()}
        for index, config in enumerate(configs):
            self.overlays[index] = lambda memory, config=config: ExtendedPageTables(config, memory)
        self.states = {vpid: self.new_state() for vpid in (0, 1, 2)}
        self.regime = REGIMES[0]
        self.mmu.vm_transition(self.state, self.second_levels[None], 0, flush=True)

    def new_state(self):
        return CpuState(cr0=PE | PG | WP, cr3=ROOTS[1] | 1, cr4=PAE | PGE | PCIDE, efer=LMA_LME | NXE)

    @property
    def state(self):
        return self.states[self.regime[0]]

    # Accesses.

    @rule(linear=st.sampled_from(LINEAR), kind=st.sampled_from(AccessKind), privilege=st.sampled_from(Privilege))
    def access(self, linear, kind, privilege):
        if not privilege.shadow_stack:
            self.compare(linear, kind, privilege)
        elif kind is not AccessKind.EXECUTE:
            self.compare_shadow_stack_access(linear, kind, privilege)

    @invariant()
    def all_reads_agree(self):
        if hasattr(self, "mmu"):
            for linear in LINEAR:
                self.compare(linear, AccessKind.READ, Privilege.SUPERVISOR_AC)

    def compare_shadow_stack_access(self, linear, kind, privilege):
        """The engine never makes one; the model asks for each."""
        overlay = Overlay(self.memory)
        plain = walk(self.mmu.context, linear, kind, privilege, overlay, self.overlays[self.regime[1]](overlay))
        found = self.mmu.resolve(linear, kind, privilege)
        if isinstance(plain, Translation):
            assert isinstance(found, Translation), found
            assert found.physical == plain.physical
        elif isinstance(plain, PageFault):
            assert found == Fault(Vector.PF, plain.error_code, plain.linear)
        else:
            assert found == plain

    def compare(self, linear, kind, privilege):
        overlay = Overlay(self.memory)
        second_level = self.overlays[self.regime[1]](overlay)
        plain = walk(self.mmu.context, linear, kind, privilege, overlay, second_level)
        key = (linear >> 12, privilege)
        held = self.engine.grants.get(key)
        if held is None or not held.permissions & kind:
            cpl, ac = (3 if privilege is Privilege.USER else 0), privilege is Privilege.SUPERVISOR_AC
            held = self.mmu.fill(linear, kind, cpl, ac)
        if isinstance(plain, Translation):
            assert isinstance(held, Grant), held
            self.engine.grants[key] = held
            assert held.physical_page == plain.physical >> 12
            assert held.permissions & kind
            # Cached permissions may lag behind (a dirty flag set through an alias), never run ahead.
            assert held.permissions & ~plain.permissions(self.mmu.context, privilege) == 0
        elif isinstance(plain, PageFault):
            assert held == Fault(Vector.PF, plain.error_code, plain.linear)
        else:
            assert held == plain

    # Edits of the guest's tables, each with an invalidation that suffices.

    @rule(
        table=st.sampled_from([SHARED, PRIVATE[1], PRIVATE[2]]),
        index=st.integers(0, 2),
        frame=st.sampled_from(FRAMES),
        flags=st.sampled_from(
            [0, P, P | RW, P | US, P | RW | US, P | RW | US | XD, P | RW | US | D | A, P | D, P | US | D]
        ),
        is_global=st.booleans(),
        key=st.integers(0, 1),
        how=st.integers(0, 3),
    )
    def edit_page_table(self, table, index, frame, flags, is_global, key, how):
        # A global translation must be the same in all address spaces, so private tables have none.
        flags |= G if is_global and table is SHARED else 0
        self.memory.write_u64(table[2] + 8 * index, frame | flags | key << 59)
        self.invalidate(how)

    @rule(flags=st.sampled_from([0, P, P | RW, P | RW | US]), level=st.integers(0, 1), how=st.integers(0, 3))
    def edit_upper_level(self, flags, level, how):
        entry = self.memory.read_u64(SHARED[level])
        self.memory.write_u64(SHARED[level], entry & ~(P | RW | US) | flags)
        self.invalidate(how)

    @rule(large=st.booleans(), flags=st.sampled_from([0, RW, US, RW | US | G]), how=st.integers(0, 3))
    def edit_large_page(self, large, flags, how):
        was_large = self.memory.read_u64(SHARED[1] + 8) & PS
        self.memory.write_u64(SHARED[1] + 8, (PS if large else SHARED[2]) | P | flags)
        # One address stands for all of a large page; small pages need an invalidation each.
        self.invalidate(how, (*SMALL, LARGE[1]) if was_large else LINEAR)

    @rule(index=st.integers(0, 2), bits=st.sampled_from([P, P | RW, P | RW | US]))
    def raise_rights(self, index, bits):
        """No invalidation: what is not cached, or cached with less, is walked again."""
        entry = self.memory.read_u64(SHARED[2] + 8 * index)
        if entry & P:
            bits &= ~US  # turning a supervisor-mode page into a user-mode page can lower rights
            entry &= ~XD
        self.memory.write_u64(SHARED[2] + 8 * index, entry | bits)

    def invalidate(self, how, pages=LINEAR):
        """For every regime: the tables are the same guest-physical memory for all of them."""
        current = self.regime
        for regime in REGIMES:
            self.enter(regime)
            if how == 0:
                self.invlpg_in_every_address_space(pages)
            elif how == 1:
                self.mmu.invpcid(2, 0, 0)
            elif how == 2:
                self.toggle_pge()
            else:
                self.invlpg_and_invpcid(pages)
        self.enter(current)

    def invlpg_in_every_address_space(self, pages):
        state, previous = self.state, self.state.cr3
        for pcid, root in ROOTS.items():
            state.cr3 = root | pcid
            self.mmu.cr3_written(state, preserve=True)
            for linear in pages:
                self.mmu.invlpg(linear)
        state.cr3 = previous
        self.mmu.cr3_written(state, preserve=True)

    def toggle_pge(self):
        for _ in range(2):
            self.state.cr4 ^= PGE
            self.mmu.controls_written(self.state)

    def invlpg_and_invpcid(self, pages):
        for linear in pages:
            self.mmu.invlpg(linear)  # for the global translations
            for pcid in ROOTS:
                self.mmu.invpcid(0, pcid, linear)

    # Edits of EPT.

    @rule(
        which=st.integers(0, 1),
        page=st.sampled_from([*(frame >> 12 for frame in FRAMES), 3, 5, 8]),
        moved=st.sampled_from([None, 0x30, 0x31]),
        flags=st.sampled_from([0, 1, 2, 3, 5, 7, 0x107, 0x307]),
        single=st.booleans(),
    )
    def edit_ept(self, which, page, moved, flags, single):
        # Frames may be moved; the tables stay where the plain walk of the other regimes expects them.
        physical = moved if moved is not None and page << 12 in FRAMES else page
        self.memory.write_u64(EPT_ROOTS[which] + 0x3000 + 8 * page, physical << 12 | 0x30 | flags)
        self.mmu.invept(1 if single else 2, EPT_ROOTS[which] | 0x1E)

    @rule(page=st.sampled_from([*(frame >> 12 for frame in FRAMES), 5]), which=st.integers(0, 1))
    def raise_ept_rights(self, page, which):
        address = EPT_ROOTS[which] + 0x3000 + 8 * page
        self.memory.write_u64(address, self.memory.read_u64(address) | 7)

    # Switches.

    def enter(self, regime):
        self.regime = regime
        vpid, ept = regime
        self.mmu.vm_transition(self.state, self.second_levels[ept], vpid, flush=vpid == 0)

    @rule(regime=st.sampled_from(REGIMES))
    def vm_transition(self, regime):
        self.enter(regime)

    @rule(pcid=st.sampled_from([1, 2]), preserve=st.booleans())
    def move_to_cr3(self, pcid, preserve):
        self.state.cr3 = ROOTS[pcid] | pcid
        self.mmu.cr3_written(self.state, preserve=preserve)

    @rule(bits=st.sampled_from([(WP, 0, 0), (0, SMEP, 0), (0, SMAP, 0), (0, PKE, 0), (0, PGE, 0), (0, 0, NXE)]))
    def toggle_control(self, bits):
        state = self.state
        state.cr0 ^= bits[0]
        state.cr4 ^= bits[1]
        state.efer ^= bits[2]
        self.mmu.controls_written(state)

    @rule(value=st.integers(0, 15))
    def write_pkru(self, value):
        self.state.pkru = value
        self.mmu.update(self.state)

    @rule()
    def toggle_paging(self):
        """Legal orders only: PCIDs are in use whenever paging is on, and CR4.PCIDE is set with a PCID of 0."""
        state = self.state
        root = state.cr3 & ~0xFFF
        if state.cr0 & PG:
            state.cr4 &= ~PCIDE
            self.mmu.controls_written(state)
            state.cr0, state.efer = state.cr0 & ~PG, state.efer & ~0x400
            self.mmu.controls_written(state)
        else:
            state.cr3 = root
            self.mmu.cr3_written(state)
            state.cr0, state.efer = state.cr0 | PG, state.efer | 0x400
            self.mmu.controls_written(state)
            state.cr4 |= PCIDE
            self.mmu.controls_written(state)
            state.cr3 = root | (1 if root == ROOTS[1] else 2)
            self.mmu.cr3_written(state, preserve=True)

    @rule(kind=st.integers(0, 3), vpid=st.integers(0, 2), linear=st.sampled_from(LINEAR))
    def invvpid(self, kind, vpid, linear):
        """Never required here; must never hurt."""
        self.mmu.invvpid(kind, vpid, linear)


TestMmu = MmuMachine.TestCase
TestMmu.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)
