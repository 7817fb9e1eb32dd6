"""VMX operation and launch state as a state machine, against a model of a few lines.

The model is typed from the manual's figure of VMCS states (SDM Vol. 3, "Virtual Machine Control Structures",
"Overview") and the operation sections of the instructions; it shares nothing with the code under test.
"""

from __future__ import annotations

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule
from vmx_machine import REGION_A, REGION_B, VMXON_REGION, make_vmx, valid_fields

from vmcs import fields as f
from vmcs.exits import Reason
from vtx.vmx.outcome import (
    EntryFailed,
    Outcome,
    VmEntered,
    VmExited,
    VmFailInvalid,
    VmFailValid,
    VmSucceed,
)
from vtx.x86.outcome import Fault, Vector
from vtx.x86.state import Shadow

UD = Fault(Vector.UD)
POINTERS = st.sampled_from([REGION_A, REGION_B, VMXON_REGION, REGION_A + 4, 1 << 52])
REGIONS = (REGION_A, REGION_B)
NO_VMCS = (1 << 64) - 1


class VmxMachine(RuleBasedStateMachine):
    """``launched`` maps each active region to its launch state; inactive regions are forgotten by VMCLEAR."""

    def __init__(self) -> None:
        super().__init__()
        self.processor, self.vmx = make_vmx()
        self.on = False
        self.guest = False
        self.current: int | None = None
        self.launched: dict[int, bool] = {}
        self.in_memory: dict[int, bool] = dict.fromkeys(REGIONS, False)
        self.filled: set[int] = set()
        self.broken: set[int] = set()

    def fail(self, error: int) -> Outcome:
        return VmFailInvalid() if self.current is None else VmFailValid(error)  # type: ignore[arg-type]

    def before(self, reason: Reason) -> Outcome | None:
        """#UD outside VMX operation, VM exit in a guest."""
        if not self.on:
            return UD
        if self.guest:
            self.guest = False
            return VmExited(reason, 0)
        return None

    @rule()
    def vmxon(self) -> None:
        outcome = self.vmx.vmxon(VMXON_REGION)
        if not self.on:
            self.on = True
            assert outcome == VmSucceed()
        elif self.guest:
            self.guest = False
            assert outcome == VmExited(Reason.VMXON, 0)
        else:
            assert outcome == self.fail(15)

    @rule()
    def vmxoff(self) -> None:
        expected = self.before(Reason.VMXOFF)
        outcome = self.vmx.vmxoff()
        if expected is None:
            self.on, self.current = False, None
            self.in_memory |= self.launched
            self.launched = {}
            expected = VmSucceed()
        assert outcome == expected

    @rule(pointer=POINTERS)
    def vmclear(self, pointer: int) -> None:
        expected = self.before(Reason.VMCLEAR)
        outcome = self.vmx.vmclear(pointer)
        if expected is None:
            if pointer in REGIONS:
                expected = VmSucceed()
                self.launched.pop(pointer, None)
                self.in_memory[pointer] = False
                if self.current == pointer:
                    self.current = None
            else:
                expected = self.fail(3 if pointer == VMXON_REGION else 2)
        assert outcome == expected

    @rule(pointer=POINTERS)
    def vmptrld(self, pointer: int) -> None:
        expected = self.before(Reason.VMPTRLD)
        outcome = self.vmx.vmptrld(pointer)
        if expected is None:
            if pointer in REGIONS:
                expected = VmSucceed()
                self.current = pointer
                self.launched.setdefault(pointer, self.in_memory[pointer])
            else:
                expected = self.fail(10 if pointer == VMXON_REGION else 9)
        assert outcome == expected

    @rule()
    def vmptrst(self) -> None:
        expected = self.before(Reason.VMPTRST)
        outcome = self.vmx.vmptrst()
        assert outcome == (expected or VmSucceed(NO_VMCS if self.current is None else self.current))

    @rule()
    def fill(self) -> None:
        """Write every field of a good VMCS, in root operation with a current VMCS."""
        if self.on and not self.guest and self.current is not None:
            for field, value in valid_fields(self.vmx).items():
                assert self.vmx.vmwrite(field, value) == VmSucceed()
            self.filled.add(self.current)
            self.broken.discard(self.current)

    @rule()
    def break_guest_state(self) -> None:
        if self.on and not self.guest and self.current is not None:
            assert self.vmx.vmwrite(f.GUEST_RFLAGS, 0) == VmSucceed()
            self.broken.add(self.current)

    @rule(launch=st.booleans(), blocked=st.booleans())
    def enter(self, launch: bool, blocked: bool) -> None:
        expected = self.before(Reason.VMLAUNCH if launch else Reason.VMRESUME)
        if expected is None:
            self.processor.state.shadow = Shadow.MOV_SS if blocked else Shadow.NONE
        outcome = self.vmx.vmlaunch() if launch else self.vmx.vmresume()
        if expected is None:
            expected = self.expected_entry(launch, blocked)
            self.processor.state.shadow = Shadow.NONE
        assert outcome == expected, self.vmx.last_failure

    def expected_entry(self, launch: bool, blocked: bool) -> Outcome:
        if self.current is None:
            return VmFailInvalid()
        if blocked:
            return self.fail(26)
        if launch and self.launched[self.current]:
            return self.fail(4)
        if not launch and not self.launched[self.current]:
            return self.fail(5)
        if self.current not in self.filled:
            return self.fail(7)
        if self.current in self.broken:
            return EntryFailed(1 << 31 | 33, 0)
        self.launched[self.current] = True
        self.guest = True
        return VmEntered()

    @rule()
    def vmcall(self) -> None:
        expected = self.before(Reason.VMCALL)
        assert self.vmx.vmcall() == (expected or self.fail(1))

    @invariant()
    def agrees(self) -> None:
        assert self.vmx.in_vmx_operation == self.on
        assert self.vmx.non_root == self.guest
        assert self.vmx.current_pointer == (NO_VMCS if self.current is None else self.current)
        states = {pointer: bool(active.vmcs.launch_state) for pointer, active in self.vmx.operation.active.items()}
        assert states == self.launched


VmxMachine.TestCase.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
TestVmxMachine = VmxMachine.TestCase
