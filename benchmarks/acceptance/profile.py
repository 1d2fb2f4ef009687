"""Stage `profile`: Nsight Compute over one call of each kernel family; without it, or its permission, kernel times."""

from __future__ import annotations

import csv
import io
import json
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterable
from typing import Any

from .calls import FAMILY
from .places import FAKE, ROOT
from .results import already, emit, is_done
from .target import backends

VOCABULARIES = (504, 1003) if FAKE else (32000, 128256, 262144)
_PATIENCE = 120  # seconds for one vocabulary
_MARK = "spin_kernel"
_STALLS = (
    "barrier", "branch_resolving", "dispatch_stall", "drain", "gmma", "imc_miss", "lg_throttle", "long_scoreboard",
    "math_pipe_throttle", "membar", "mio_throttle", "misc", "no_instruction", "not_selected", "selected",
    "short_scoreboard", "sleeping", "tex_throttle", "wait",
)  # fmt: skip
_STALL = "smsp__average_warps_issue_stalled_{}_per_issue_active.ratio"
METRICS = [
    "gpu__time_duration.sum",
    "dram__bytes_read.sum",
    "dram__bytes_write.sum",
    "sm__warps_active.avg.pct_of_peak_sustained_active",
    "smsp__issue_active.avg.pct_of_peak_sustained_active",
    "launch__registers_per_thread",
    "launch__shared_mem_per_block_dynamic",
    *(_STALL.format(reason) for reason in _STALLS),
]
_DENIED = "ERR_NVGPUCTRPERM"


def profile() -> int:
    done, status = already("profile"), 0
    why = None if shutil.which("ncu") else "ncu is not on the PATH, nor where CUDA puts it"
    for backend in backends():
        for V in VOCABULARIES:
            name = f"{backend}: V = {V}"
            if is_done(done.get(name)):
                continue
            found = None if why else _by_ncu(backend, V)
            if found and found.get("unusable"):
                why, found = found["unusable"], None
            if found is None:
                found = _by_torch(backend, V) | {"without_ncu": why}
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
        return {"unusable": reason}
    names = [line.removeprefix(FAMILY) for line in done.stdout.splitlines() if line.startswith(FAMILY)]
    families = in_families(parse(done.stdout), names)
    found: dict[str, Any] = {"ok": done.returncode == 0 and bool(families), "by": "ncu", "families": families}
    if not found["ok"]:
        found["error"] = f"exit status {done.returncode}, {len(families)} families: {done.stderr.strip()[-300:]}"
    return found | {"seconds": round(time.monotonic() - start, 1)}


def refusal(text: str) -> str | None:
    """Why ncu cannot profile here at all, in its own words."""
    for line in text.splitlines():
        if _DENIED in line or "Failed to initialize the profiler" in line or "driver resource was unavailable" in line:
            return line.strip()[:300]
    return None


def parse(text: str) -> list[dict[str, Any]]:
    """The kernels of ncu's CSV in their order, each with its metrics; those that the device does not have are left out.
    The table is long: a line for each metric of each kernel."""
    lines = [line for line in text.splitlines() if line.startswith('"')]
    kernels: dict[str, dict[str, Any]] = {}
    for row in csv.DictReader(io.StringIO("\n".join(lines))):
        sizes = {"grid": row.get("Grid Size"), "block": row.get("Block Size")}
        kernel = kernels.setdefault(row["ID"], {"kernel": _short(row["Kernel Name"]), **sizes})
        value = _number(row.get("Metric Value"))
        if row.get("Metric Name") and value is not None:
            kernel[row["Metric Name"]] = value
    return list(kernels.values())


def _short(name: str) -> str:
    """Without the arguments, which are long and say nothing."""
    return re.sub(r"\((?!anonymous|bool|int)[^()]*\)$", "", name)[:120]


def _number(text: str | None) -> float | None:
    try:
        return float((text or "").replace(",", ""))
    except ValueError:  # n/a
        return None


def in_families(kernels: Iterable[dict[str, Any]], names: list[str]) -> dict[str, list[dict[str, Any]]]:
    """Cut at the marks, of which there is one before each family."""
    groups: list[list[dict[str, Any]]] = []
    for kernel in kernels:
        if _MARK in kernel["kernel"]:
            groups.append([])
        elif groups:
            groups[-1].append(_derived(kernel))
    return dict(zip(names, groups, strict=False))


def _derived(kernel: dict[str, Any]) -> dict[str, Any]:
    """With achieved GB/s, and the stall reasons beside each other, the largest first."""
    stalls = {reason: kernel.pop(_STALL.format(reason)) for reason in _STALLS if _STALL.format(reason) in kernel}
    kernel["stalls"] = dict(sorted(stalls.items(), key=lambda item: -item[1]))
    moved = [kernel.get(f"dram__bytes_{way}.sum") for way in ("read", "write")]
    if (ns := kernel.get("gpu__time_duration.sum")) and None not in moved:
        kernel["dram_gb_per_s"] = sum(filter(None, moved)) / ns
    return kernel


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
