"""Entry after entry through one VMCS gives what a fresh VMCS with the same fields gives.

Entry checks only what changed and keeps what it derived from the controls; this is the test that neither goes stale.
"""

from __future__ import annotations

import copy

from hypothesis import given, settings
from hypothesis import strategies as st
from vmx_machine import launch, make_vmx, prepare

from vmcs import controls as c
from vmcs import fields as f
from vmcs.fields import FIELDS, Field, Type
from vtx.vmx import Vmx
from vtx.vmx.outcome import Outcome
from vtx.x86.outcome import NotModelled

# Bits worth flipping and values worth writing: near the good ones, so that many entries succeed.
FLIPS = st.tuples(
    st.sampled_from([each for each in FIELDS if each.type is not Type.READ_ONLY_DATA]),
    st.integers(0, 63).map(lambda bit: 1 << bit),
)
TOGGLES = st.sampled_from(
    [
        (f.PRIMARY_PROCESSOR_BASED_CONTROLS, c.HLT_EXITING.mask),
        (f.PRIMARY_PROCESSOR_BASED_CONTROLS, c.USE_TSC_OFFSETTING.mask),
        (f.PRIMARY_PROCESSOR_BASED_CONTROLS, c.USE_IO_BITMAPS.mask),
        (f.PRIMARY_PROCESSOR_BASED_CONTROLS, c.ACTIVATE_SECONDARY_CONTROLS.mask),
        (f.SECONDARY_PROCESSOR_BASED_CONTROLS, c.ENABLE_VPID.mask),
        (f.SECONDARY_PROCESSOR_BASED_CONTROLS, c.WBINVD_EXITING.mask),
        (f.VM_ENTRY_CONTROLS, c.ENTRY_LOAD_IA32_PAT.mask),
        (f.VPID, 1),
        (f.TSC_OFFSET, 0x1000),
        (f.CR3_TARGET_COUNT, 2),
        (f.GUEST_RFLAGS, 2),
        (f.GUEST_RFLAGS, 0x40),
        (f.HOST_CR4, 0x2000),
        (f.HOST_FS_BASE, 1 << 60),
    ]
)


def apply(vmx: Vmx, field: Field, flip: int) -> None:
    value = getattr(vmx.vmread(field), "value", None)
    if value is not None:
        vmx.vmwrite(field, value ^ flip)


def enter(vmx: Vmx, *, launch: bool) -> Outcome | str:
    try:
        return vmx.vmlaunch() if launch else vmx.vmresume()
    except NotModelled as missing:
        return str(missing)


@settings(max_examples=120, deadline=None)
@given(rounds=st.lists(st.lists(FLIPS | TOGGLES, max_size=3), min_size=1, max_size=5))
def test_same_as_a_fresh_vmcs(rounds: list[list[tuple[Field, int]]]) -> None:
    processor, vmx, vmcs = launch()
    vmx.vmcall()
    for flips in rounds:
        for field, flip in flips:
            apply(vmx, field, flip)
        fresh_processor, fresh = make_vmx()
        fresh_vmcs = prepare(fresh)
        fresh_vmcs.values = dict(vmcs.values)
        fresh_processor.state = copy.deepcopy(processor.state)
        fresh_processor.msrs.restore(processor.msrs.snapshot())
        outcome, expected = enter(vmx, launch=False), enter(fresh, launch=True)
        assert outcome == expected
        assert processor.state == fresh_processor.state
        assert vmx.operation.view == fresh.operation.view
        assert vmx.next_deadline() == fresh.next_deadline()
        assert processor.mmu.asid == fresh_processor.mmu.asid
        if not vmx.non_root:
            if processor.shutdown is not None or isinstance(outcome, str):
                return
            for field, flip in reversed(flips):
                apply(vmx, field, flip)
        else:
            vmx.vmcall()
            if processor.shutdown is not None:
                return
