"""Adapter: the emulator's VMX (`vtx.vmx`) behind the interface of the block "VMX operation mode and launch state".

It translates requests into calls, and what the model holds into responses; every verdict is the model's. What the
block does not have (registers of the guest, the rest of the VMCS) is kept valid here, so that only what the block has
decides.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from attrs import frozen

from hdl_tests.gen.vmx_mode import (
    ENTRY_FAILURE,
    FLAG_BITS,
    NO_REGION,
    REGIONS,
    Address,
    Component,
    CpuMode,
    Operation,
    Outcome,
    Request,
    Response,
    State,
    VmxMode,
)
from hdl_tests.ref.processor import BUSY_TSS, CODE_32, CR0_PAGING, CR4_VMXE, DATA, UNUSABLE, BareProcessor, profile_with
from vmcs import controls as c
from vmcs import fields as f
from vmcs.controls import ControlWord
from vmcs.exits import VM_ENTRY_FAILURE
from vmcs.fields import Field
from vmcs.region import LaunchState, Vmcs
from vtx.vmx import Vmx
from vtx.vmx import outcome as o
from vtx.x86.decode import Instruction, decode
from vtx.x86.operations import Plain, Simple
from vtx.x86.outcome import Fault, Vector
from vtx.x86.state import MASK64, Shadow

MEMORY_SIZE: Final = 0x10_0000
REGION_ADDRESS: Final = tuple(0x1_0000 * (region + 1) for region in range(REGIONS))
MSR_LIST: Final = 0x8_0000
UNLOADABLE_MSR: Final = 0xC000_0100  # IA32_FS_BASE, which VM entry takes from the VMCS alone
UNSUPPORTED_ENCODING: Final = 0x6FFE
FEATURE_CONTROL: Final = 0x3A
CR0_NE: Final = 1 << 5  # fixed to 1 in VMX operation
CR4_RESERVED: Final = 1 << 15  # fixed to 0

VALID_EPTP: Final = 0x1E  # write-back, page-walk length 4
INVALID_EPTP: Final = 0x1A  # memory type 2 is reserved
INVALIDATION_TYPES: Final = (0, 1, 2, 3, 4, 0x100, 0x8000_0001, MASK64)
NOT_CANONICAL: Final = 1 << 63


@frozen
class Element:
    """A component of the block: the VMCS field it stands for, and that field's value for 0 and for 1."""

    field: Field
    good: int
    bad: int


CHECKED: Final = {
    Component.CONTROLS: Element(f.CR3_TARGET_COUNT, 0, 5),
    Component.HOST_STATE: Element(f.HOST_CS_SELECTOR, 8, 0),
    Component.GUEST_STATE: Element(f.VMCS_LINK_POINTER, MASK64, 1),
    Component.MSR_LIST: Element(f.VM_ENTRY_MSR_LOAD_COUNT, 0, 1),
}
PLAIN: Final = f.TSC_OFFSET  # with TSC offsetting off, no check and no transition touches it
ENCODINGS: Final = {
    Component.PLAIN: PLAIN.encoding,
    Component.INSTRUCTION_ERROR: f.VM_INSTRUCTION_ERROR.encoding,
    Component.EXIT_REASON: f.EXIT_REASON.encoding,
    Component.UNSUPPORTED: UNSUPPORTED_ENCODING,
} | {component: element.field.encoding for component, element in CHECKED.items()}

# A 32-bit protected-mode guest with flat segments.
GUEST_STATE: Final[dict[Field, int]] = {
    f.GUEST_CR0: CR0_PAGING,
    f.GUEST_CR3: 0,
    f.GUEST_CR4: CR4_VMXE,
    f.GUEST_DR7: 0x400,
    f.GUEST_RFLAGS: 2,
    f.GUEST_RIP: 0x1000,
    f.GUEST_INTERRUPTIBILITY_STATE: 0,
    f.GUEST_CS_ACCESS_RIGHTS: CODE_32,
    **{getattr(f, f"GUEST_{name}_ACCESS_RIGHTS"): DATA for name in ("ES", "SS", "DS", "FS", "GS")},
    **{getattr(f, f"GUEST_{name}_LIMIT"): 0xFFFF_FFFF for name in ("ES", "CS", "SS", "DS", "FS", "GS")},
    f.GUEST_LDTR_ACCESS_RIGHTS: UNUSABLE,
    f.GUEST_TR_ACCESS_RIGHTS: BUSY_TSS,
    f.GUEST_TR_LIMIT: 0x67,
}
HOST_STATE: Final[dict[Field, int]] = {
    f.HOST_CR0: CR0_PAGING,
    f.HOST_CR4: CR4_VMXE | 1 << 5,  # PAE, which IA-32e mode needs
    f.HOST_TR_SELECTOR: 0x18,
    f.HOST_SS_SELECTOR: 0x10,
}
CONTROL_FIELDS: Final = {
    ControlWord.PIN_BASED: f.PIN_BASED_CONTROLS,
    ControlWord.PRIMARY: f.PRIMARY_PROCESSOR_BASED_CONTROLS,
    ControlWord.EXIT: f.VM_EXIT_CONTROLS,
    ControlWord.ENTRY: f.VM_ENTRY_CONTROLS,
}


def _instruction(encoding: bytes) -> Instruction:
    instruction = decode(encoding, 32)
    assert instruction is not None
    return instruction


CPUID: Final = _instruction(b"\x0f\xa2")


class Reference:
    """The model as `step(request) -> response`; ``state`` is the state after the last step.

    ``vmwrite_any`` is the processor's capability to VMWRITE read-only data fields; requests must agree with it.
    """

    def __init__(self, vmwrite_any: int) -> None:
        self.profile = profile_with(vmwrite_any)
        self.vmwrite_any = vmwrite_any
        self.reset()

    def reset(self) -> None:
        """A fresh processor; the regions hold clear VMCSs that can be entered."""
        self.processor = BareProcessor(self.profile, MEMORY_SIZE)
        self.vmx = Vmx(self.processor)
        self.capabilities = self.vmx.operation.capabilities
        image = self._valid_vmcs().to_image()
        for address in REGION_ADDRESS:
            self.processor.memory.write(address, image)
        self.processor.memory.write_u64(MSR_LIST, UNLOADABLE_MSR)
        self._parsed: dict[bytes, Vmcs] = {}
        self.state = self._observe()

    def _valid_vmcs(self) -> Vmcs:
        vmcs = Vmcs(self.capabilities)
        for word, field in CONTROL_FIELDS.items():
            vmcs[field] = self.capabilities.allowed[word].must_be_1
        for field, value in (GUEST_STATE | HOST_STATE).items():
            vmcs[field] = value
        for element in CHECKED.values():
            vmcs[element.field] = element.good
        vmcs[f.VM_ENTRY_MSR_LOAD_ADDRESS] = MSR_LIST
        return vmcs

    def step(self, request: Request) -> Response:
        """Execute one request; what came of it and the state after."""
        if request.vmwrite_any != self.vmwrite_any:
            raise ValueError("the request is for another processor")
        self._set_processor(request)
        operation = Operation(request.operation)
        outcome, number, value = self._classify(operation, request, self._perform(operation, request))
        self.state = self._observe()
        return Response(int(outcome), number, self._flags(), value, 0, self.state)

    # Before: the processor around the instruction

    def _set_processor(self, request: Request) -> None:
        mode = CpuMode(request.cpu_mode)
        processor = self.processor
        processor.set_mode(
            long=mode in (CpuMode.LONG, CpuMode.COMPATIBILITY),
            protected=mode is not CpuMode.REAL,
            virtual_8086=mode is CpuMode.VIRTUAL_8086,
            code_64=mode is CpuMode.LONG,
            cpl=request.cpl,
        )
        state = processor.state
        if not request.cr0_supported:
            state.cr0 &= ~CR0_NE
        state.cr4 = (CR4_VMXE if request.cr4_vmxe else 0) | (0 if request.cr4_supported else CR4_RESERVED)
        for position, bit in enumerate(FLAG_BITS.values()):
            state.rflags |= (request.flags >> position & 1) << bit
        state.shadow = Shadow.MOV_SS if request.mov_ss_blocking else Shadow.NONE
        processor.msrs.values[FEATURE_CONTROL] = request.feature_lock | request.feature_vmxon << 2

    def _prepare_entry(self) -> None:
        """Give a VMCS about to be entered valid guest registers and address-space sizes that fit guest and host.

        Exits save whatever mode the guest was put in, and the block has neither registers nor these controls.
        """
        vmcs = self.vmx.current_vmcs
        if vmcs is None or self.vmx.non_root:
            return
        for field, value in GUEST_STATE.items():
            vmcs[field] = value
        vmcs[f.VM_ENTRY_CONTROLS] &= ~c.ENTRY_IA32E_MODE_GUEST.mask
        size = c.EXIT_HOST_ADDRESS_SPACE_SIZE.mask
        vmcs[f.VM_EXIT_CONTROLS] = vmcs[f.VM_EXIT_CONTROLS] & ~size | (size if self.processor.state.long_mode else 0)

    # The step itself

    def _perform(self, operation: Operation, request: Request) -> o.Outcome | None:
        """Call the model; None for what is no VMX instruction and simply completes."""
        vmx = self.vmx
        calls: dict[Operation, Callable[[], o.Outcome | None]] = {
            Operation.VMXON: lambda: vmx.vmxon(self._pointer(request.address)),
            Operation.VMXOFF: vmx.vmxoff,
            Operation.VMCLEAR: lambda: vmx.vmclear(self._pointer(request.address)),
            Operation.VMPTRLD: lambda: vmx.vmptrld(self._pointer(request.address)),
            Operation.VMPTRST: vmx.vmptrst,
            Operation.VMREAD: lambda: vmx.vmread(ENCODINGS[Component(request.component)]),
            Operation.VMWRITE: lambda: vmx.vmwrite(ENCODINGS[Component(request.component)], _source(request)),
            Operation.VMLAUNCH: vmx.vmlaunch,
            Operation.VMRESUME: vmx.vmresume,
            Operation.VMCALL: vmx.vmcall,
            Operation.INVEPT: lambda: vmx.invept(
                INVALIDATION_TYPES[request.invalidation], VALID_EPTP if request.eptp_valid else INVALID_EPTP
            ),
            Operation.INVVPID: lambda: vmx.invvpid(
                INVALIDATION_TYPES[request.invalidation],
                (0 if request.vpid_zero else 1) | request.reserved_set << 16,
                NOT_CANONICAL if request.not_canonical else 0,
            ),
            Operation.CPUID: self._cpuid,
            Operation.STORE_REVISION: lambda: self._store_revision(request),
        }
        if operation in (Operation.VMLAUNCH, Operation.VMRESUME):
            self._prepare_entry()
        return calls[operation]()

    def _pointer(self, address: int) -> int:
        if address < REGIONS:
            return REGION_ADDRESS[address]
        if address == Address.MISALIGNED:
            return REGION_ADDRESS[0] | 0x800
        return REGION_ADDRESS[0] | 1 << self.profile.physical_address_width

    def _cpuid(self) -> o.Outcome | None:
        if self.vmx.non_root and self.vmx.intercept(Simple(Plain.CPUID), CPUID):
            vmcs = self.vmx.current_vmcs
            assert vmcs is not None
            return o.VmExited(vmcs[f.EXIT_REASON], vmcs[f.EXIT_QUALIFICATION])
        return None

    def _store_revision(self, request: Request) -> None:
        identifier = self.capabilities.revision_identifier
        self.processor.memory.write_u32(REGION_ADDRESS[request.address], identifier ^ (0 if request.value & 1 else 1))

    # After: outcome and state in the block's terms

    def _classify(self, operation: Operation, request: Request, outcome: o.Outcome | None) -> tuple[Outcome, int, int]:
        """Outcome, number and value of the response."""
        match outcome:
            case None:
                return Outcome.RETIRED, 0, 0
            case o.VmSucceed(value=value):
                return Outcome.RETIRED, 0, self._destination(operation, request, value)
            case Fault(vector=Vector.UD, error_code=None):
                return Outcome.INVALID_OPCODE, 0, 0
            case Fault(vector=Vector.GP, error_code=0):
                return Outcome.GENERAL_PROTECTION, 0, 0
            case o.VmFailInvalid():
                return Outcome.FAIL_INVALID, 0, 0
            case o.VmFailValid(error=error):
                return Outcome.FAIL_VALID, int(error), 0
            case o.VmEntered():
                return Outcome.ENTERED, 0, 0
            case o.VmExited(reason=reason):
                return Outcome.EXITED, _reason(reason), 0
            case o.EntryFailed(reason=reason):
                return Outcome.ENTRY_FAILED, _reason(reason), 0
        raise AssertionError(f"the block has no outcome for {outcome}")

    def _destination(self, operation: Operation, request: Request, value: int) -> int:
        if operation is Operation.VMPTRST:
            return 0xFF if value == MASK64 else REGION_ADDRESS.index(value)
        if operation is Operation.VMREAD:
            return _observed(Component(request.component), value)
        return value

    def _flags(self) -> int:
        rflags = self.processor.state.rflags
        return sum((rflags >> bit & 1) << position for position, bit in enumerate(FLAG_BITS.values()))

    def _observe(self) -> State:
        operation = self.vmx.operation
        contents = [self._content(address) for address in REGION_ADDRESS]
        memory, identifier = self.processor.memory, self.capabilities.revision_identifier

        def lane(component: Component) -> tuple[int, ...]:
            return tuple(_observed(component, vmcs.values[ENCODINGS[component]]) for vmcs in contents)

        mode = VmxMode.NON_ROOT if self.vmx.non_root else VmxMode.ROOT
        return State(
            mode=int(mode) if self.vmx.in_vmx_operation else int(VmxMode.OUTSIDE),
            vmxon_pointer=_region_of(operation.vmxon_pointer),
            current=_region_of(self.vmx.current_pointer),
            active=tuple(int(address in operation.active) for address in REGION_ADDRESS),
            launched=tuple(int(vmcs.launch_state is LaunchState.LAUNCHED) for vmcs in contents),
            revision_ok=tuple(int(memory.read_u32(address) == identifier) for address in REGION_ADDRESS),
            bad_controls=lane(Component.CONTROLS),
            bad_host=lane(Component.HOST_STATE),
            bad_guest=lane(Component.GUEST_STATE),
            bad_msr_list=lane(Component.MSR_LIST),
            plain=lane(Component.PLAIN),
            instruction_error=lane(Component.INSTRUCTION_ERROR),
            exit_reason=lane(Component.EXIT_REASON),
        )

    def _content(self, address: int) -> Vmcs:
        """The VMCS of a region: the processor's own if it is active, else what its memory says."""
        active = self.vmx.operation.active.get(address)
        if active is not None:
            return active.vmcs
        image = self.processor.memory.read(address, self.capabilities.region_size)
        if image not in self._parsed:
            self._parsed[image] = Vmcs.from_image(image, self.capabilities)
        return self._parsed[image]


def _region_of(pointer: int | None) -> int:
    return NO_REGION if pointer in (None, MASK64) else REGION_ADDRESS.index(pointer)


def _reason(reason: int) -> int:
    """A 32-bit exit reason in 8 bits."""
    if reason & ~(VM_ENTRY_FAILURE | 0x7F):
        raise AssertionError(f"exit reason {reason:#x} does not fit the block")
    return reason & 0x7F | (ENTRY_FAILURE if reason & VM_ENTRY_FAILURE else 0)


def _source(request: Request) -> int:
    """What VMWRITE writes to the field behind the component."""
    component = Component(request.component)
    element = CHECKED.get(component)
    if element is not None:
        return element.bad if request.value & 1 else element.good
    if component is Component.EXIT_REASON:
        return request.value & 0x7F | (VM_ENTRY_FAILURE if request.value & ENTRY_FAILURE else 0)
    return request.value


def _observed(component: Component, value: int) -> int:
    """The component behind a field's ``value``."""
    element = CHECKED.get(component)
    if element is not None:
        return {element.good: 0, element.bad: 1}[value]
    return _reason(value) if component is Component.EXIT_REASON else value
