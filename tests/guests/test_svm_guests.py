"""The bundled AMD-V hypervisor from the first instruction to the exit status, and what the command line says of it."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from tiny_guests import RunVtx

from vtx import events as e
from vtx.trace import read_trace

# Numbers that depend on where the compiler put things.
ADDRESS = re.compile(r"(RIP|EXITINFO2) 0x1[0-9a-f]+")

SVM_HELLO = """\
[svm_hello] switching SVM on
[svm_hello] running a guest at RIP *
[svm_hello] #VMEXIT 1: code 0x3 (CR3 read), EXITINFO1 0x8000000000000000, EXITINFO2 0x0, guest RIP *
[svm_hello] #VMEXIT 2: code 0x13 (CR3 write), EXITINFO1 0x8000000000000000, EXITINFO2 0x0, guest RIP *
[svm_hello] #VMEXIT 3: code 0x72 (CPUID), EXITINFO1 0x0, EXITINFO2 0x0, guest RIP *
[svm_hello] #VMEXIT 4: code 0x7b (I/O instruction), EXITINFO1 0x800240, EXITINFO2 *, guest RIP *
[svm_hello]     the guest wrote 0x6c6c6568 to port 0x80
[svm_hello] #VMEXIT 5: code 0x400 (nested page fault), EXITINFO1 0x100000004, EXITINFO2 0x3fe00000, guest RIP *
[svm_hello] #VMEXIT 6: code 0x81 (VMMCALL), EXITINFO1 0x0, EXITINFO2 0x0, guest RIP *
[svm_hello]     the guest read 0x70727573
[svm_hello] #VMEXIT 7: code 0x78 (HLT), EXITINFO1 0x0, EXITINFO2 0x0, guest RIP *
[svm_hello] the guest halted after 7 exits: done
"""


@pytest.mark.parametrize("profile", ["zen-server", "everything-amd"])
def test_svm_hello__prints_each_exit_and_passes(vtx: RunVtx, svm_hello: str, profile: str) -> None:
    done = vtx("run", svm_hello, "--profile", profile)
    assert done.status == 0
    assert ADDRESS.sub(r"\1 *", done.stdout.decode()).replace("\r\n", "\n") == SVM_HELLO


def test_svm_hello__needs_svm(vtx: RunVtx, svm_hello: str) -> None:
    done = vtx("run", svm_hello)
    assert done.status != 0
    assert b"[svm_hello] FAIL: this processor has no SVM" in done.stdout


def test_svm_hello__summary_and_trace_agree(vtx: RunVtx, svm_hello: str, tmp_path: Path) -> None:
    trace = tmp_path / "trace.jsonl"
    done = vtx("run", svm_hello, "--profile", "zen-server", "--json", "--trace", trace)
    exits = [event for event in read_trace(trace) if isinstance(event, e.Vmexit)]
    summary = json.loads(done.stderr)
    assert sum(summary["vm_exits"].values()) == len(exits) == 7
    assert summary["vm_exits"]["nested page fault"] == 1
    assert [(event.info1, event.info2) for event in exits if event.code == 0x400] == [(0x1_0000_0004, 0x3FE0_0000)]
    assert len([event for event in read_trace(trace) if isinstance(event, e.Vmrun)]) == 7


def test_svm_nested__svm_hello_cannot_tell_that_it_is_not_alone(vtx: RunVtx, svm_nested: str) -> None:
    done = vtx("run", svm_nested, "--profile", "zen-server")
    assert done.status == 0
    lines = ADDRESS.sub(r"\1 *", done.stdout.decode()).replace("\r\n", "\n").splitlines(keepends=True)
    assert "".join(line for line in lines if line.startswith("[svm_hello]")) == SVM_HELLO
    assert [line for line in lines if not line.startswith("[svm_hello]")] == [
        "[L1] switching SVM on\n",
        "[L1] running L2 at RIP *\n",
        "[L1] L2 switches SVM on\n",
        "[L1] L2 ended its run with 0x0\n",
        "[L1] exits of L2 30, of them MSR accesses 8, VMRUN 7\n",
        "[L1] exits of L3 to L2 7, page faults of L3 that L1 kept from L2 15\n",
        "[L1] done\n",
    ]
