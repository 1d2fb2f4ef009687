"""What Nsight Compute prints."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Iterable
from typing import Any

_MARK = "spin_kernel"
STALLS = (
    "barrier", "branch_resolving", "dispatch_stall", "drain", "gmma", "imc_miss", "lg_throttle", "long_scoreboard",
    "math_pipe_throttle", "membar", "mio_throttle", "misc", "no_instruction", "not_selected", "selected",
    "short_scoreboard", "sleeping", "tex_throttle", "wait",
)  # fmt: skip
STALL = "smsp__average_warps_issue_stalled_{}_per_issue_active.ratio"
_DENIED = "ERR_NVGPUCTRPERM"


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
    stalls = {reason: kernel.pop(STALL.format(reason)) for reason in STALLS if STALL.format(reason) in kernel}
    kernel["stalls"] = dict(sorted(stalls.items(), key=lambda item: -item[1]))
    moved = [kernel.get(f"dram__bytes_{way}.sum") for way in ("read", "write")]
    if (ns := kernel.get("gpu__time_duration.sum")) and None not in moved:
        kernel["dram_gb_per_s"] = sum(filter(None, moved)) / ns
    return kernel
