"""Stage `profile`: Nsight Compute over one call of each kernel family; without it, or its permission, kernel times."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
from typing import Any

from .calls import FAMILY
from .places import FAKE, ROOT
from .profile_output import STALL, STALLS, in_families, parse, refusal
from .results import already, emit, is_done
from .target import backends

VOCABULARIES = (504,) if FAKE else (32000, 128256, 262144)
_PATIENCE = 120  # seconds for one vocabulary
METRICS = [
    "gpu__time_duration.sum",
    "dram__bytes_read.sum",
    "dram__bytes_write.sum",
    "sm__warps_active.avg.pct_of_peak_sustained_active",
    "smsp__issue_active.avg.pct_of_peak_sustained_active",
    "launch__registers_per_thread",
    "launch__shared_mem_per_block_dynamic",
    *(STALL.format(reason) for reason in STALLS),
]


def profile() -> int:
    done, status = already("profile"), 0
    why = None if shutil.which("ncu") else "ncu is not on the PATH, nor where CUDA puts it"
    for backend in backends():
        for V in VOCABULARIES:
            name = f"{backend}: V = {V}"
            if is_done(done.get(name)):
                continue
            found = {"ok": False, "unusable": why} if why else _by_ncu(backend, V)
            why = found.get("unusable", why)
            if not found["ok"]:  # the times at least; what cannot be had here is no failure
                by_torch = _by_torch(backend, V) | {"without_ncu": why or found["error"]}
                found = by_torch | {"ok": bool(why) and by_torch["ok"]}
            emit(name, found)
            status |= not found["ok"]
    return status


def command(backend: str, V: int) -> list[str]:
    options = ["--csv", "--print-units", "base", "--clock-control", "none", "--profile-from-start", "off"]
    metrics = ["--metrics", ",".join(METRICS)]
    return ["ncu", *options, *metrics, sys.executable, "-m", "acceptance.calls", "large", backend, str(V)]


def _by_ncu(backend: str, V: int) -> dict[str, Any]:
    start = time.monotonic()
    try:
        done = subprocess.run(command(backend, V), cwd=ROOT, capture_output=True, text=True, timeout=_PATIENCE)
    except subprocess.TimeoutExpired:
        return {"ok": False, "by": "ncu", "error": f"took longer than {_PATIENCE} s"}
    print(done.stdout, done.stderr, flush=True)
    if reason := refusal(done.stdout + done.stderr):
        return {"ok": False, "unusable": reason}
    names = [line.removeprefix(FAMILY) for line in done.stdout.splitlines() if line.startswith(FAMILY)]
    families = in_families(parse(done.stdout), names)
    found: dict[str, Any] = {"ok": done.returncode == 0 and bool(families), "by": "ncu", "families": families}
    if not found["ok"]:
        found["error"] = f"exit status {done.returncode}, {len(families)} families: {done.stderr.strip()[-300:]}"
    return found | {"seconds": round(time.monotonic() - start, 1)}


def _by_torch(backend: str, V: int) -> dict[str, Any]:
    """Times alone, in nanoseconds as ncu's."""
    call = [sys.executable, "-m", "acceptance.calls", "large", backend, str(V), "torch"]
    try:
        done = subprocess.run(call, cwd=ROOT, capture_output=True, text=True, timeout=_PATIENCE)
    except subprocess.TimeoutExpired:
        return {"ok": False, "by": "torch.profiler", "error": f"took longer than {_PATIENCE} s"}
    print(done.stdout, done.stderr, flush=True)
    lines = [json.loads(line) for line in done.stdout.splitlines() if line.startswith('{"family"')]
    families = {line["family"]: line["kernels"] for line in lines}
    return {"ok": done.returncode == 0 and bool(families), "by": "torch.profiler", "families": families}
