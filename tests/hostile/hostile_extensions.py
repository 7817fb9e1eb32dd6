"""Hostile guests of VT-x and AMD-V, and hostile hypervisors: a control structure that mostly lets the guest run."""

from __future__ import annotations

import random
import struct

import hostile_code
import hostile_places as at
from hostile_modes import LONG_MODES, install_host_tables, install_long_tables, new_state

from vmcs import controls as c
from vmcs import fields as f
from vmcs.controls import ControlWord
from vmcs.fields import FIELDS, Field, Type, Width
from vmcs.vmcb.fields import BY_NAME, Vmcb
from vtx.machine import Machine
from vtx.x86.memory import PhysicalMemory
from vtx.x86.msr_table import IA32_FEATURE_CONTROL, VM_HSAVE_PA
from vtx.x86.state import CpuState, DescriptorTable, Segment

_SEGMENTS = ("ES", "CS", "SS", "DS", "FS", "GS", "LDTR", "TR")
_WORDS = {
    ControlWord.PIN_BASED: f.PIN_BASED_CONTROLS,
    ControlWord.PRIMARY: f.PRIMARY_PROCESSOR_BASED_CONTROLS,
    ControlWord.SECONDARY: f.SECONDARY_PROCESSOR_BASED_CONTROLS,
    ControlWord.EXIT: f.VM_EXIT_CONTROLS,
    ControlWord.ENTRY: f.VM_ENTRY_CONTROLS,
}
_ALL = 7


def host_state(memory: PhysicalMemory, source: random.Random) -> CpuState:
    """A 64-bit host at CPL 0 with page tables of its own."""
    root = install_long_tables(memory, random.Random(0), at.HOST_TABLES, 4)
    state = new_state(memory, random.Random(0), "64-bit", root, 0)
    state.cr0, state.cr4, state.efer, state.rflags, state.rip = 0x8001_0033, 0x620, 0xD01, 2, at.HOST_CODE
    state.ldtr = Segment(0, 0, 0, 0x1_0000)
    state.tr = Segment(0x48, at.TSS, 0x67, 0x8B)
    state.gdtr, state.idtr = DescriptorTable(at.HOST_GDT, 0x97), DescriptorTable(at.HOST_IDT, 0xFFF)
    install_host_tables(memory, source)
    state.gpr[4] = at.STACK + 0x1000
    state.gpr[15] = source.randrange(1, 30)
    return state


# VT-x.


def _host_code(source: random.Random) -> bytes:
    """VMLAUNCH; at every VM exit skip the instruction, change the VMCS a little, resume."""
    code = bytearray(b"\x0f\x01\xc2" + b"\xeb\x00")
    mixture = hostile_code.generators(source, "vmx")
    blocks = 8
    for i in range(blocks):
        code += bytes.fromhex("ba02440000 0f78d0 ba0c440000 0f78d1 ba1e680000 0f78d3 4801cb 0f79d3")
        for _ in range(source.choice((0, 0, 0, 1))):
            code += hostile_code.instruction(source, 64, mixture)
        follows = len(code) + 5 + 5 + 3 + 3
        target = at.HOST_CODE + (follows if i < blocks - 1 else 5)
        code += b"\xba" + struct.pack("<I", f.HOST_RIP.encoding) + b"\xb8" + struct.pack("<I", target)
        code += b"\x0f\x79\xd0" + b"\x0f\x01\xc3"
    code += hostile_code.page(source, 64, "vmx", 0x1800)[0]
    return bytes(code)


def _guest_fields(guest: CpuState) -> dict[Field, int]:
    values = {
        f.GUEST_CR0: guest.cr0,
        f.GUEST_CR3: guest.cr3,
        f.GUEST_CR4: guest.cr4,
        f.GUEST_DR7: 0x400,
        f.GUEST_RIP: guest.rip,
        f.GUEST_RSP: guest.gpr[4],
        f.GUEST_RFLAGS: guest.rflags,
        f.GUEST_GDTR_BASE: guest.gdtr.base,
        f.GUEST_GDTR_LIMIT: guest.gdtr.limit,
        f.GUEST_IDTR_BASE: guest.idtr.base,
        f.GUEST_IDTR_LIMIT: guest.idtr.limit,
        f.GUEST_IA32_EFER: guest.efer,
        f.GUEST_IA32_BNDCFGS: guest.bndcfgs,
        f.GUEST_IA32_S_CET: guest.s_cet,
        f.GUEST_SSP: guest.ssp,
        f.GUEST_IA32_INTERRUPT_SSP_TABLE_ADDR: guest.interrupt_ssp_table,
    }
    for name, segment in zip(_SEGMENTS, (*guest.segments, guest.ldtr, guest.tr), strict=True):
        values[getattr(f, f"GUEST_{name}_SELECTOR")] = segment.selector
        values[getattr(f, f"GUEST_{name}_BASE")] = segment.base
        values[getattr(f, f"GUEST_{name}_LIMIT")] = segment.limit
        values[getattr(f, f"GUEST_{name}_ACCESS_RIGHTS")] = segment.access_rights
    return values


def _install_fred(values: dict[Field, int], state: CpuState, guest: CpuState) -> None:
    """Load and save the registers of FRED; those that are no part of the VMCS are the guest's."""
    state.fred_rsp[0] = guest.fred_rsp[0]
    values[f.VM_ENTRY_CONTROLS] |= c.ENTRY_LOAD_FRED.mask
    values[f.VM_EXIT_CONTROLS] |= c.EXIT_ACTIVATE_SECONDARY_CONTROLS.mask
    values[f.SECONDARY_VM_EXIT_CONTROLS] = c.EXIT_SAVE_FRED.mask | c.EXIT_LOAD_FRED.mask
    values |= {
        f.GUEST_IA32_FRED_CONFIG: guest.fred_config,
        f.GUEST_IA32_FRED_STKLVLS: guest.fred_stack_levels,
        f.GUEST_IA32_FRED_RSP1: guest.fred_rsp[1],
        f.GUEST_IA32_FRED_RSP2: guest.fred_rsp[2],
        f.GUEST_IA32_FRED_RSP3: guest.fred_rsp[3],
        f.GUEST_IA32_FRED_SSP1: guest.fred_ssp[0],
        f.GUEST_IA32_FRED_SSP2: guest.fred_ssp[1],
        f.GUEST_IA32_FRED_SSP3: guest.fred_ssp[2],
    }


def _host_fields(host: CpuState) -> dict[Field, int]:
    values = {
        f.HOST_CR0: host.cr0 | 0x20,
        f.HOST_CR3: host.cr3,
        f.HOST_CR4: host.cr4,
        f.HOST_RIP: at.HOST_CODE + 5,
        f.HOST_RSP: host.gpr[4],
        f.HOST_TR_SELECTOR: host.tr.selector,
        f.HOST_TR_BASE: host.tr.base,
        f.HOST_GDTR_BASE: host.gdtr.base,
        f.HOST_IDTR_BASE: host.idtr.base,
        f.HOST_IA32_EFER: host.efer,
    }
    for name, segment in zip(_SEGMENTS[:6], host.segments, strict=True):
        values[getattr(f, f"HOST_{name}_SELECTOR")] = segment.selector & ~7
    return values


_POINTERS = {
    f.IO_BITMAP_A_ADDRESS: at.IO_BITMAPS,
    f.IO_BITMAP_B_ADDRESS: at.IO_BITMAPS + 0x1000,
    f.MSR_BITMAP_ADDRESS: at.MSR_BITMAP,
    f.VIRTUAL_APIC_ADDRESS: at.VIRTUAL_APIC,
    f.APIC_ACCESS_ADDRESS: at.LOCAL_APIC,
    f.POSTED_INTERRUPT_DESCRIPTOR_ADDRESS: at.LISTS,
    f.PML_ADDRESS: at.LISTS + 0x1000,
    f.VMREAD_BITMAP_ADDRESS: at.MSR_BITMAP,
    f.VMWRITE_BITMAP_ADDRESS: at.MSR_BITMAP,
    f.VM_ENTRY_MSR_LOAD_ADDRESS: at.MSR_AREA,
    f.VM_EXIT_MSR_STORE_ADDRESS: at.MSR_AREA,
    f.VM_EXIT_MSR_LOAD_ADDRESS: at.MSR_AREA + 0x800,
    f.VMCS_LINK_POINTER: (1 << 64) - 1,
}


_NEEDS = {
    c.NMI_WINDOW_EXITING: (c.VIRTUAL_NMIS,),
    c.VIRTUAL_NMIS: (c.NMI_EXITING,),
    c.VIRTUALIZE_X2APIC_MODE: (c.USE_TPR_SHADOW,),
    c.APIC_REGISTER_VIRTUALIZATION: (c.USE_TPR_SHADOW,),
    c.VIRTUAL_INTERRUPT_DELIVERY: (c.USE_TPR_SHADOW, c.EXTERNAL_INTERRUPT_EXITING),
    c.PROCESS_POSTED_INTERRUPTS: (c.VIRTUAL_INTERRUPT_DELIVERY, c.EXIT_ACKNOWLEDGE_INTERRUPT_ON_EXIT),
    c.UNRESTRICTED_GUEST: (c.ENABLE_EPT,),
    c.ENABLE_PML: (c.ENABLE_EPT,),
    c.MODE_BASED_EXECUTE_CONTROL_FOR_EPT: (c.ENABLE_EPT,),
    c.EPT_VIOLATION_VE: (c.ENABLE_EPT,),
    c.SUB_PAGE_WRITE_PERMISSIONS_FOR_EPT: (c.ENABLE_EPT,),
    c.ENABLE_VM_FUNCTIONS: (c.ENABLE_EPT,),
}


def _controls(machine: Machine, source: random.Random, guest: CpuState, mode: str) -> dict[Field, int]:
    allowed = machine.cpu.vmx.operation.capabilities.allowed
    values = {field: allowed[word].must_be_1 for word, field in _WORDS.items()}
    wanted = [c.EXIT_HOST_ADDRESS_SPACE_SIZE, c.EXIT_LOAD_IA32_EFER, c.EXIT_SAVE_IA32_EFER, c.ENTRY_LOAD_IA32_EFER]
    if mode in LONG_MODES:
        wanted.append(c.ENTRY_IA32E_MODE_GUEST)
    if not guest.cr0 >> 31 or source.random() < 0.5:
        wanted += c.ENABLE_EPT, c.UNRESTRICTED_GUEST
    pool = [
        control for control in c.CONTROLS if control.word in _WORDS and allowed[control.word].may_be_1 & control.mask
    ]
    wanted += source.sample(pool, source.choice((0, 1, 3, 6, 12)))
    for control in wanted:
        wanted += _NEEDS.get(control, ())
        if allowed[control.word].may_be_1 & control.mask:
            values[_WORDS[control.word]] |= control.mask
    if values[f.SECONDARY_PROCESSOR_BASED_CONTROLS]:
        values[f.PRIMARY_PROCESSOR_BASED_CONTROLS] |= c.ACTIVATE_SECONDARY_CONTROLS.mask
    return values


def _spoil_fields(values: dict[Field, int], source: random.Random) -> None:
    if source.random() < 0.6:
        return
    for _ in range(source.choice((1, 1, 2, 5))):
        field = source.choice(FIELDS)
        if field.type is Type.READ_ONLY_DATA:
            continue
        if source.random() < 0.5:
            values[field] = values.get(field, 0) ^ 1 << source.randrange(field.bits)
        elif field.width is Width.BITS_64:
            values[field] = source.choice((*at.ADDRESSES, *at.WIDE_ADDRESSES)) & ~0xFFF
        else:
            values[field] = source.getrandbits(field.bits)


def _second_level(memory: PhysicalMemory, source: random.Random, *, ept: bool) -> int:
    """EPT or nested page tables of the first 4 MiB and the devices; the root."""
    root = at.SECOND_LEVEL
    leaf = 0x37 if ept else 0x67
    for i in range(1024):
        memory.write_u64(root + 8 * i, i << 12 | leaf)
    for _ in range(source.choice((0, 0, 3, 20))):
        i = source.randrange(0, 0x90)
        entry = source.choice((0, i << 12 | 1, i << 12 | 5, i << 12 | 0x31, source.getrandbits(52), at.NOWHERE | leaf))
        memory.write_u64(root + 8 * i, entry)
    for i in range(2):
        memory.write_u64(root + 0x2000 + 8 * i, root + 0x1000 * i | _ALL)
    for device in (at.IO_APIC, at.LOCAL_APIC, at.NOWHERE, at.ROM):
        memory.write_u64(root + 0x3000 + 8 * (device >> 21 & 511), device >> 21 << 21 | leaf | 0x80)
    memory.write_u64(root + 0x4000, root + 0x2000 | _ALL)
    memory.write_u64(root + 0x4018, root + 0x3000 | _ALL)
    memory.write_u64(root + 0x5000, root + 0x4000 | _ALL)
    if source.random() < 0.2:
        memory.write_u64(root + 8 * source.randrange(0x400 * 6), source.getrandbits(64))
    return root + 0x5000


def install_vmx(machine: Machine, source: random.Random, guest: CpuState | None, mode: str) -> None:
    """Put the processor into VMX operation: as a host about to launch ``guest``, or with an empty VMCS as it is."""
    cpu, memory = machine.cpu, machine.memory
    if guest is not None:
        cpu.state = host_state(memory, source)
        memory.write(at.HOST_CODE, _host_code(source))
    state = cpu.state
    state.cr0 |= 0x20
    state.cr4 |= 0x2000
    cpu.msrs.write(IA32_FEATURE_CONTROL, 5)
    capabilities = cpu.vmx.operation.capabilities
    for region in (at.VMXON_REGION, at.VMCS_REGION, at.OTHER_VMCS):
        memory.write_u32(region, capabilities.revision_identifier | (source.random() < 0.05) << 31)
    cpu.load_control_state()
    vmx = cpu.vmx
    vmx.vmxon(at.VMXON_REGION)
    vmx.vmclear(at.VMCS_REGION)
    vmx.vmptrld(at.VMCS_REGION)
    if guest is None:
        guest = state
    guest.cr0 |= 0x20
    guest.cr4 |= 0x2000
    root = _second_level(memory, source, ept=True)
    values = dict(_POINTERS) | _controls(machine, source, guest, mode) | _host_fields(state) | _guest_fields(guest)
    values |= {f.EPT_POINTER: root | 0x1E | source.choice((0, 0x40)), f.VPID: 1}
    values |= {f.TSC_MULTIPLIER: 3 << 47, f.POSTED_INTERRUPT_NOTIFICATION_VECTOR: 0xF2, f.PML_INDEX: 3}
    values[f.EXCEPTION_BITMAP] = source.choice((0, 0, (1 << 32) - 1, source.getrandbits(32)))
    values[f.GUEST_PDPTE0], values[f.GUEST_PDPTE3] = memory.read_u64(guest.cr3 & ~31), 0
    state.user_interrupt_flag = guest.user_interrupt_flag
    values[f.GUEST_UINV] = source.choice((0xEC, source.randrange(32)))
    if guest.cr4 >> 23 & 1:
        state.u_cet, state.pl_ssp = guest.u_cet, list(guest.pl_ssp)
        values[f.VM_ENTRY_CONTROLS] |= c.ENTRY_LOAD_CET_STATE.mask
        values[f.VM_EXIT_CONTROLS] |= c.EXIT_LOAD_CET_STATE.mask
    if guest.cr4 >> 32 & 1:
        _install_fred(values, state, guest)
    if guest.bndcfgs or guest.bndcfgu:
        state.cr4, state.xcr0, state.bndcfgu = state.cr4 | 1 << 18, guest.xcr0, guest.bndcfgu
        state.lower_bounds, state.upper_bounds = list(guest.lower_bounds), list(guest.upper_bounds)
        values[f.VM_ENTRY_CONTROLS] |= c.ENTRY_LOAD_IA32_BNDCFGS.mask
        values[f.VM_EXIT_CONTROLS] |= source.choice((0, c.EXIT_CLEAR_IA32_BNDCFGS.mask))
    if source.random() < 0.3:
        memory.write(at.MSR_BITMAP, source.randbytes(0x1000))
        memory.write(at.IO_BITMAPS, source.randbytes(0x2000))
    if source.random() < 0.2:
        information = source.choice((0x8000_0000, 0x8000_0B00, 0x8000_0300, 0x8000_0400, source.getrandbits(32)))
        values[f.VM_ENTRY_INTERRUPTION_INFORMATION] = information | source.choice((source.randrange(32), 0xEC))
        values[f.VM_ENTRY_INSTRUCTION_LENGTH] = source.randrange(4)
    _spoil_fields(values, source)
    for field, value in values.items():
        vmx.vmwrite(field, value & field.mask)


# AMD-V.


def _svm_host_code(source: random.Random) -> bytes:
    """VMRUN; at every #VMEXIT take nRIP if there is one, execute something, run on."""
    code = bytearray()
    mixture = hostile_code.generators(source, "svm")
    load = b"\xb8" + struct.pack("<I", at.VMCS_REGION)
    for _ in range(10):
        code += load + b"\x0f\x01\xd8" + load
        code += bytes.fromhex("488b88c8000000 4885c9 7407 488988780500 00")
        if source.random() < 0.3:
            code += hostile_code.instruction(source, 64, mixture)
    code += b"\xe9" + struct.pack("<i", -len(code) - 5)
    return bytes(code) + hostile_code.page(source, 64, "svm", 0x1000)[0]


def _vmcb(source: random.Random, guest: CpuState, nested_root: int) -> Vmcb:
    values: dict[str, int] = {
        "intercept vector 3": source.choice((0, source.getrandbits(32), 1 << source.randrange(32))),
        "intercept vector 4": 1 | source.choice((0, source.getrandbits(32))),
        "exception intercepts": source.choice((0, 0, (1 << 32) - 1, source.getrandbits(32))),
        "CR intercepts": source.choice((0, source.getrandbits(32))),
        "DR intercepts": source.choice((0, source.getrandbits(32))),
        "guest ASID": 1,
        "MSRPM_BASE_PA": at.MSR_BITMAP,
        "IOPM_BASE_PA": at.IO_BITMAPS,
        "EFER": guest.efer | 0x1000,
        "CR0": guest.cr0,
        "CR3": guest.cr3,
        "CR4": guest.cr4,
        "DR6": 0xFFFF_0FF0,
        "DR7": 0x400,
        "RFLAGS": guest.rflags,
        "RIP": guest.rip,
        "RSP": guest.gpr[4],
        "RAX": guest.gpr[0],
        "CPL": guest.cpl,
        "G_PAT": 0x0007_0406_0007_0406,
        "GDTR limit": guest.gdtr.limit,
        "GDTR base": guest.gdtr.base,
        "IDTR limit": guest.idtr.limit,
        "IDTR base": guest.idtr.base,
        "nested paging and encryption control": source.choice((0, 1)),
        "N_CR3": nested_root,
        "virtual interrupt control": source.choice((0, 0, 1 << 24, 1 << 8 | 1 << 24, source.getrandbits(40))),
        "EVENTINJ": source.choice((0, 0, 0, 0x8000_0000 | source.getrandbits(12), source.getrandbits(64))),
    }
    for name, segment in zip(_SEGMENTS, (*guest.segments, guest.ldtr, guest.tr), strict=True):
        rights = segment.access_rights
        attributes = rights & 0xFF | rights >> 4 & 0xF00 if segment.usable else 0
        values |= {f"{name} selector": segment.selector, f"{name} attributes": attributes}
        values |= {f"{name} limit": segment.limit, f"{name} base": segment.base}
    vmcb = Vmcb()
    for name, value in values.items():
        vmcb[BY_NAME[name]] = value & BY_NAME[name].mask
    if source.random() < 0.4:
        for _ in range(source.choice((1, 2, 5))):
            field = source.choice(list(BY_NAME.values()))
            vmcb[field] = source.choice(
                (vmcb[field] ^ 1 << source.randrange(8 * field.size), source.getrandbits(8 * field.size))
            )
    return vmcb


def _with_avic(memory: PhysicalMemory, image: bytes) -> bytes:
    """Now and then, the control block with AVIC: tables with something wrong in them, a page in the guest's way."""
    source = random.Random(image)
    if source.random() > 0.3:
        return image
    vmcb = Vmcb.from_image(image)
    vmcb[BY_NAME["virtual interrupt control"]] |= source.choice((1 << 31, 1 << 31, 3 << 30)) | 1 << 24
    vmcb[BY_NAME["nested paging and encryption control"]] |= 1
    vmcb[BY_NAME["AVIC APIC_BAR"]] = source.choice(at.ADDRESSES) & ~0xFFF
    vmcb[BY_NAME["AVIC APIC_BACKING_PAGE pointer"]] = source.choice((at.VIRTUAL_APIC, at.VIRTUAL_APIC, at.NOWHERE))
    vmcb[BY_NAME["AVIC PHYSICAL_TABLE pointer"]] = at.LISTS | source.choice((0, 1, 3, 0xFF, 0x1FF))
    vmcb[BY_NAME["AVIC LOGICAL_TABLE pointer"]] = at.LISTS + source.choice((0, 0x1000))
    for number in range(4):
        page = source.choice((at.VIRTUAL_APIC, at.VIRTUAL_APIC, at.DATA, at.NOWHERE, 1 << 51))
        memory.write_u64(at.LISTS + 8 * number, page | source.getrandbits(2) << 62 | source.randrange(3))
    if source.random() < 0.5:
        memory.write(at.VIRTUAL_APIC, source.randbytes(0x400))
    return vmcb.to_image()


def install_svm(machine: Machine, source: random.Random, guest: CpuState | None) -> None:
    """Enable SVM: with a host about to run ``guest``, or as it is."""
    cpu, memory = machine.cpu, machine.memory
    if guest is not None:
        cpu.state = host_state(memory, source)
        memory.write(at.HOST_CODE, _svm_host_code(source))
    cpu.state.efer |= 0x1000
    cpu.msrs.write(VM_HSAVE_PA, at.OTHER_VMCS + 0x1000)
    root = _second_level(memory, source, ept=False)
    image = _with_avic(memory, _vmcb(source, guest or cpu.state, root).to_image())
    memory.write(at.VMCS_REGION, image)
    memory.write(at.OTHER_VMCS, image)
    if source.random() < 0.4:
        memory.write(at.MSR_BITMAP, source.randbytes(0x2000))
        memory.write(at.IO_BITMAPS, source.randbytes(0x3000))
