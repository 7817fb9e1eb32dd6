"""SKINIT as far as it goes, STGI beside it, and the key that unlocks VM_CR."""

from __future__ import annotations

import pytest
from attrs import evolve
from svm_machine import CLGI, GUEST_RIP, SKINIT, STGI, Machine

from vtx.x86.outcome import Fault, NotModelled, Vector
from vtx.x86.state import Rflags

UD, GP = Fault(Vector.UD), Fault(Vector.GP, 0)
SKINIT_INTERCEPT = 0x86
VM_CR, SVM_KEY = 0xC001_0114, 0xC001_0118
SVMDIS, LOCK = 1 << 4, 1 << 3


def test_measures_nothing() -> None:
    with pytest.raises(NotModelled, match="secure startup by SKINIT"):
        Machine().execute(SKINIT)


def test_needs_privilege_and_protected_mode() -> None:
    machine = Machine()
    machine.state.segments[2].access_rights |= 3 << 5
    assert machine.fault_of(SKINIT) == GP
    machine.state.rflags |= Rflags.VM
    machine.state.efer &= ~0x400
    assert machine.fault_of(SKINIT) == UD


def test_svm_need_not_be_enabled_for_skinit_and_stgi() -> None:
    machine = Machine()
    machine.execute(CLGI)
    machine.state.efer &= ~0x1000
    assert machine.fault_of(CLGI) == UD
    machine.execute(STGI)
    assert machine.state.gif
    with pytest.raises(NotModelled):
        machine.execute(SKINIT)


def test_without_the_feature() -> None:
    machine = Machine()
    svm = machine.svm.operation
    svm.features = evolve(svm.features, skinit=False)
    assert not machine.execute(SKINIT)  # not an instruction of SVM's: the processor raises #UD
    machine.state.efer &= ~0x1000
    assert machine.fault_of(STGI) == UD


def test_intercept_comes_after_the_faults() -> None:
    machine = Machine()
    machine.intercept(SKINIT_INTERCEPT)
    machine.fields["CPL"] = 3
    machine.run()
    assert machine.fault_of(SKINIT) == GP
    machine = Machine()
    machine.intercept(SKINIT_INTERCEPT)
    machine.run()
    machine.execute(SKINIT)
    assert (machine.stored("EXITCODE"), machine.stored("nRIP")) == (SKINIT_INTERCEPT, GUEST_RIP + 3)


@pytest.mark.parametrize(("key", "tried", "unlocks"), [(5, 5, True), (5, 6, False), (0, 0, False), (0, 5, False)])
def test_key_unlocks(key: int, tried: int, unlocks: bool) -> None:
    msrs = Machine().processor.msrs
    assert msrs.write(SVM_KEY, key)
    assert msrs.write(VM_CR, LOCK)
    assert msrs.write(SVM_KEY, tried)
    assert msrs.read(VM_CR) == (0 if unlocks else LOCK)
    assert msrs.write(VM_CR, 0) is unlocks


def test_key_cannot_be_read_or_changed_while_locked() -> None:
    msrs = Machine().processor.msrs
    assert msrs.read(SVM_KEY) is None
    msrs.write(SVM_KEY, 5)
    msrs.write(VM_CR, LOCK)
    msrs.write(SVM_KEY, 7)
    msrs.write(SVM_KEY, 7)
    assert msrs.read(VM_CR) == LOCK
