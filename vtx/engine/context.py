"""The processor state inside Unicorn, saved to and restored from one context that the model reads and writes.

Saving and restoring a context copies a block of memory; reading it as bytes is an order of magnitude faster than asking
for registers one by one. See `vtx.engine.layout` for what is where.
"""

from __future__ import annotations

import ctypes
import struct
from typing import Any, Final

from attrs import evolve

from vtx.engine import layout, native, x87_sse
from vtx.engine.code_kind import UNMASKED_SIMD, kind_of
from vtx.engine.transfer import register_transfer
from vtx.x86.state import MASK32, CpuState, Cr0, Rflags, Shadow

_TF: Final = int(Rflags.TF)
_DF: Final = int(Rflags.DF)
_AC: Final = int(Rflags.AC)
_AM: Final = int(Cr0.AM)
_NO_SHADOW: Final = Shadow.NONE
_INHIBIT: Final = layout.INHIBIT_INTERRUPTS
_QWORD: Final = struct.Struct("<Q")
_DWORD: Final = struct.Struct("<I")


class Context:
    """The saved state of one Unicorn processor, and the way from and to `CpuState`.

    Guest mode and all interceptions are turned on in it once; ``vmcb_frame`` is where the library expects a control
    block. ``saved`` is the library's context.
    """

    def __init__(self, handle: ctypes.c_void_p, vmcb_frame: int, *, allow_compiled: bool) -> None:
        self._handle = handle
        self._library: Any = native.library
        self.saved, self._release = native.allocate_context(self, handle)
        self._buffer = (ctypes.c_char * layout.CONTEXT_SIZE).from_address(self.saved.value or 0)
        self._image = image = memoryview(self._buffer).cast("B")
        self._transfer = register_transfer(handle, self.saved, image, allow_compiled=allow_compiled)
        self._hidden = self._hidden_flags = 0
        self._traps_popf = False
        self.kind = 16
        """Kind of the code being run (see `vtx.engine.code_kind`)."""
        self._kind_flags = self._unmasked = 0
        self.save()
        self.set_legacy_area(x87_sse.POWER_UP)
        self.power_up_fpu = self.fpu()
        struct.pack_into("<i", image, layout.OLD_EXCEPTION, -1)
        _QWORD.pack_into(image, layout.VMCB, vmcb_frame)
        struct.pack_into("<QHHHHI", image, layout.INTERCEPTS, layout.INTERCEPT_ALWAYS, *[0xFFFF] * 4, MASK32)

    def close(self) -> None:
        """Release the library's memory."""
        self._image.release()
        self._release()

    def save(self) -> None:
        """Take the state out of the processor."""
        self._transfer.save()

    def restore(self) -> None:
        """Put the state into the processor."""
        self._transfer.restore()

    def copy(self) -> bytes:
        """The saved state, for `restore_copy`."""
        return bytes(self._image)

    def restore_copy(self, image: bytes) -> None:
        """Go back to a state."""
        self._image[:] = image
        self.restore()

    # Single facts about the saved state.

    def linear_rip(self) -> int:
        """Linear address of the next instruction."""
        rip, hidden, base = layout.PLACE.unpack_from(self._image, layout.RIP)
        return int(rip) if hidden & layout.CODE64 else int(rip + base & MASK32)

    def wrapped(self, address: int) -> int:
        """The linear address of a fetch: outside 64-bit mode the library adds CS base and EIP without wrapping."""
        _, hidden, _ = layout.PLACE.unpack_from(self._image, layout.RIP)
        return address if hidden & layout.CODE64 else address & MASK32

    def beyond_4_gib(self) -> int:
        """How much higher the library's address of the next instruction is than the linear one: 0 or 4 GiB."""
        rip, hidden, base = layout.PLACE.unpack_from(self._image, layout.RIP)
        return 0 if hidden & layout.CODE64 else int(rip + base & ~MASK32)

    def room(self) -> int:
        """Bytes from the next instruction to the end of the code segment, outside 64-bit mode; negative beyond it."""
        rip, _, _ = layout.PLACE.unpack_from(self._image, layout.RIP)
        limit = layout.SEGMENT.unpack_from(self._image, layout.SEGMENTS + layout.SEGMENT.size)[2]
        return int(limit - rip + 1)

    def address(self) -> int:
        """Where the saved state is."""
        return ctypes.addressof(self._buffer)

    def access(self) -> tuple[int, bool]:
        """What an access depends on: current privilege level, and RFLAGS.AC."""
        eager, hidden = layout.PRIVILEGE.unpack_from(self._image, layout.EFLAGS)
        return hidden & 3, bool(eager & _AC)

    def cpl(self) -> int:
        """Current privilege level."""
        return self._image[layout.HFLAGS] & 3

    def error_code(self) -> int:
        """Error code of the exception that was just intercepted."""
        (code,) = _DWORD.unpack_from(self._image, layout.ERROR_CODE)
        return int(code)

    def fpu(self) -> bytes:
        """The x87/SSE state as opaque bytes for ``CpuState.fpu``."""
        return bytes(self._image[layout.FPU : layout.FPU_END])

    def set_fpu(self, fpu: bytes) -> None:
        """Replace the x87/SSE state; it reaches the processor with the next `load`."""
        self._image[layout.FPU : layout.FPU_END] = fpu
        self.follow_mxcsr()

    def settle_mxcsr(self) -> None:
        """Put the SIMD floating-point exceptions met so far into MXCSR."""
        x87_sse.settle(self._image)

    def follow_mxcsr(self) -> None:
        """MXCSR may have been loaded; `load` must be told to reload."""
        self._unmasked = UNMASKED_SIMD if x87_sse.follow_mxcsr(self._image) else 0

    def simd_exceptions(self) -> int:
        """The SIMD floating-point exceptions met since MXCSR was settled."""
        return x87_sse.simd_exceptions(self._image)

    def legacy_area(self) -> bytes:
        """The x87/SSE state as FXSAVE64 stores it."""
        return x87_sse.legacy_area(self._image)

    def set_legacy_area(self, area: bytes) -> None:
        """Replace the x87/SSE state by that of ``area``."""
        control, mxcsr = wanted = x87_sse.set_legacy_area(self._image, area)
        if wanted == x87_sse.controls(self._image):
            return  # the rest gets there with the next `load`
        self.restore()
        # The library derives the rounding and the like of its arithmetic from these two when they are written.
        for register, value in (
            (native.REG_FPCW, ctypes.c_uint16(control)),
            (native.REG_MXCSR, ctypes.c_uint32(mxcsr)),
        ):
            self._library.uc_reg_write(self._handle, register, ctypes.byref(value))
        self.save()
        self.follow_mxcsr()

    # From and to the architectural state.

    def load(self, state: CpuState, *, reload: bool, step: bool) -> None:
        """Put ``state`` into the processor; all of it if ``reload``. A ``step`` has the trap flag set."""
        if reload:
            self._load_system(state)
        if reload or (state.rflags ^ self._kind_flags) & _AC:
            self.kind, self._kind_flags = kind_of(state) | self._unmasked, state.rflags
        # The engine's own POPF must neither clear the trap flag of a step nor begin to check alignment unnoticed.
        traps_popf = step or state.popf_intercepted or bool(state.cr0 & _AM)
        if traps_popf != self._traps_popf:
            self._traps_popf = traps_popf
            intercepts = layout.INTERCEPT_ALWAYS | (layout.INTERCEPT_POPF if traps_popf else 0)
            _QWORD.pack_into(self._image, layout.INTERCEPTS, intercepts)
        hidden = self._hidden_flags
        self._transfer.put(
            state.gpr,
            state.rip,
            state.rflags | _TF if step else state.rflags,
            hidden | layout.INHIBIT_INTERRUPTS if state.shadow else hidden,
        )

    def give(self, state: CpuState) -> None:
        """Put GPRs, RIP and RFLAGS back into the processor, after `take` in the middle of a run."""
        self._transfer.give(state.gpr, state.rip, state.rflags)

    def _load_system(self, state: CpuState) -> None:
        segments, base = state.segments, state.cs.base
        seen = 0
        if not state.in_64_bit_mode:
            seen = base & MASK32
            state.rip &= MASK32
        if seen != base:
            # The library adds all of the base of CS to RIP, in 64-bit mode too, where a processor ignores it.
            segments = [segments[0], evolve(segments[1], base=seen), *segments[2:]]
        self._transfer.put_system(
            *segments,
            state.ldtr,
            state.tr,
            state.gdtr,
            state.idtr,
            state.cr0,
            state.cr2,
            state.cr4 & layout.CR4_SEEN,
            state.efer & layout.EFER_SEEN | layout.EFER_FORCED,
            state.kernel_gs_base,
        )
        self._hidden_flags = layout.hidden_flags(state)
        if state.fpu:
            self.set_fpu(state.fpu)

    def take(self, state: CpuState) -> tuple[int, int]:
        """Put the saved state but the interrupt shadow into ``state``; linear address and kind of the code at RIP."""
        state.rip, state.rflags, self._hidden, linear, state.kernel_gs_base, changed = self._transfer.take(state.gpr)
        if changed:
            self._store_segments(state)
        self._hidden_flags = self._hidden & ~_INHIBIT
        return linear, self.kind

    def store(self, state: CpuState, *, hide_trap_flag: bool) -> bool:
        """Put the saved state into ``state``, with RFLAGS.TF clear if it was set for a step only.

        Returns what `take_shadow` does.
        """
        self.take(state)
        if hide_trap_flag:
            state.rflags &= ~_TF
        return self.take_shadow(state)

    def take_shadow(self, state: CpuState) -> bool:
        """Put the interrupt shadow into ``state``, after `take`.

        Returns whether interrupts are blocked by an instruction that was executed in the run; ``state.shadow`` is then
        for the caller to set.
        """
        if not self._hidden & _INHIBIT:
            state.shadow = _NO_SHADOW
            return False
        return not state.shadow

    def _store_segments(self, state: CpuState) -> None:
        code_base = state.cs.base
        for i, segment in enumerate(state.segments):
            place = layout.SEGMENTS + layout.SEGMENT.size * i
            segment.selector, segment.base, segment.limit, flags = layout.SEGMENT.unpack_from(self._image, place)
            segment.access_rights = layout.access_rights(flags)
        if self._hidden & layout.CODE64 or state.cs.base == code_base & MASK32:
            state.cs.base = code_base  # of which the library was told the low half at most
        if not state.segments[2].usable:
            # A null SS keeps the privilege level, which the engine holds apart from the segment.
            state.segments[2].access_rights |= self.cpl() << 5
