"""VMRUN of near-valid VMCBs on this model, on Bochs and on QEMU: nothing differs but what is known to."""

import shutil
from functools import partial
from itertools import islice

import pytest

from vtx.cli.images import find_image
from vtx.fuzz import compare
from vtx.fuzz.exchange import Report
from vtx.fuzz.on_vtx import on_vtx
from vtx.fuzz.readings import explain
from vtx.fuzz.vmruns.case import case_of
from vtx.fuzz.vmruns.experiment import IMAGE, ORACLES, experiment
from vtx.fuzz.vmruns.known import KNOWN
from vtx.fuzz.vmruns.results import Result
from vtx.x86.cpuid_features import FEATURES

COUNT = 300
PROGRAMS = {"bochs": "bochs", "qemu": "qemu-system-x86_64"}
# What VMRUN and intercepts depend on; for the rest, the model may lack what the other one has.
MUST_AGREE = {
    *("VME", "DE", "PSE", "PAE", "MCE", "PGE", "XSAVE", "FSGSBASE", "SMEP", "SMAP", "PCID", "UMIP", "INVPCID"),
    *("SVM", "NX", "LM", "SYSCALL", "RDTSCP", "PAGE1GB", "SKINIT", "AltMovCr8", "RDPRU"),
    *("NP", "LbrVirt", "SVML", "NRIPS", "TscRateMsr", "VmcbClean", "FlushByAsid", "DecodeAssists", "PauseFilter"),
    *("PauseFilterThreshold", "AVIC", "VmsaveVirt", "VGIF", "GMET", "VNMI"),
}
REGISTERS = ("EAX", "EBX", "ECX", "EDX")

pytestmark = pytest.mark.slow


@pytest.fixture(params=ORACLES)
def oracle(request: pytest.FixtureRequest) -> str:
    if shutil.which(PROGRAMS[request.param]) is None:
        pytest.skip(f"{PROGRAMS[request.param]} is not installed")
    return str(request.param)


def features(report: Report[Result]) -> dict[str, bool]:
    return {
        name: bool(report.processor.get(f"CPUID {at.leaf:x} {REGISTERS[at.register]}", 0) >> at.bit & 1)
        for name, at in FEATURES.items()
        if name in MUST_AGREE
    }


def test_the_profile_is_that_of_the_oracle(oracle: str) -> None:
    other = ORACLES[oracle]
    generator = other.generator(0)
    image = find_image(IMAGE).data
    (_, ours), (_, theirs) = (
        compare.run(experiment(generator), [], partial(runner, generator.profile, image))
        for runner in (on_vtx, other.runner)
    )
    assert len(ours.processor) == 24
    assert features(ours) == features(theirs)
    assert len(features(ours)) == len(MUST_AGREE)
    widths = "CPUID 80000008 EAX"
    assert ours.processor[widths] == theirs.processor[widths]


def test_vmruns(oracle: str) -> None:
    other = ORACLES[oracle]
    generator = other.generator(2026)
    image = find_image(IMAGE).data
    here, there = (partial(runner, generator.profile, image) for runner in (on_vtx, other.runner))
    what = experiment(generator)
    found = compare.compare(what, list(islice(generator, COUNT)), here, there)
    outcome = explain(what, KNOWN[oracle], case_of(generator), found, here, there)
    assert [str(each) for each in outcome.unexplained] == []
