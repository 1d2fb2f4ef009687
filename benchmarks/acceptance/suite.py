"""Stage `tests`: pytest -m gpu. Failures are handed over as they come, the sum at the end, from junit.xml."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
import xml.etree.ElementTree as ElementTree
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from .places import FAKE, ROOT, build_folder
from .results import emit, pipe_descriptors

_WORKERS = 12
_MESSAGE = 600  # characters of a failure that are kept
_CLEANUP = 20  # seconds before the stage's limit, for junit.xml
# Of a dry run: enough to see that tests reach the device. FASTLOSS_GPU_TESTS names others.
_FAKE_TESTS = ["tests/test_cross_entropy.py", "-k", "test_case and index-"]


def tests() -> int:
    junit = build_folder() / "junit.xml"
    junit.parent.mkdir(parents=True, exist_ok=True)
    junit.unlink(missing_ok=True)
    command = pytest_command(junit)
    print(" ".join(command), flush=True)
    process = subprocess.Popen(command, cwd=ROOT, pass_fds=pipe_descriptors())
    left = float(os.environ.get("FASTLOSS_GPU_END", "inf")) - time.time() - _CLEANUP
    cut = False
    try:
        process.wait(None if left == float("inf") else max(1.0, left))
    except subprocess.TimeoutExpired:
        cut = True
        process.send_signal(signal.SIGINT)  # it still writes what it has
        process.wait()
    summary = parse_junit(junit.read_text()) if junit.exists() else {"ok": False, "error": "no junit.xml was written"}
    if cut:
        summary |= {"ok": False, "error": "cut before all tests had run"}
    elif process.returncode != 0:
        summary |= {"ok": False, "status": process.returncode}
    emit("summary", summary)
    return 0 if summary["ok"] else 1


def pytest_command(junit: Path) -> list[str]:
    """What is installed here is used: xdist's workers, a time limit of each test."""
    command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "-p", "acceptance.reports", "-p", "no:cacheprovider"]
    if find_spec("xdist") is not None:
        command += ["-n", str(min(_WORKERS, os.cpu_count() or 1)), "--dist", "worksteal"]
    if find_spec("pytest_timeout") is not None:
        command += ["--timeout", "120"]
    chosen = os.environ.get("FASTLOSS_GPU_TESTS")
    where = chosen.split() if chosen else _FAKE_TESTS if FAKE else ["tests"]
    return [*command, "--junitxml", str(junit), *where]


def parse_junit(text: str) -> dict[str, Any]:
    """Counts, the slowest tests, and the failures with their messages. No test at all is no success."""
    root = ElementTree.fromstring(text)
    # By the suites' own counts: a test that was interrupted has an entry that looks like one of a test that passed.
    total, failed, errors, skipped = (
        sum(int(of.get(name) or 0) for of in root.iter("testsuite"))
        for name in ("tests", "failures", "errors", "skipped")
    )
    counts = {"passed": total - failed - errors - skipped, "failed": failed, "error": errors, "skipped": skipped}
    failures, seconds, skips = {}, {}, {}
    for case in root.iter("testcase"):
        name = f"{case.get('classname', '')}::{case.get('name', '')}"
        seconds[name] = max(float(case.get("time") or 0), seconds.get(name, 0.0))
        for said in case:
            message = said.get("message") or said.text or ""
            if said.tag in ("failure", "error"):
                failures[name] = f"{said.tag}: {message}"[:_MESSAGE]
            elif said.tag == "skipped":
                skips[message[:200]] = skips.get(message[:200], 0) + 1
    slowest = dict(sorted(seconds.items(), key=lambda item: -item[1])[:15])
    ok = not failures and counts["passed"] > 0
    return {"ok": ok, **counts, "failures": failures, "skip_reasons": skips, "slowest_seconds": slowest}
