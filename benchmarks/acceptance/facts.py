"""What the machine is: its device, driver, clocks and memory, and the versions of everything. Prints JSON."""

from __future__ import annotations

import json
import os
import platform
import re
import shutil
import subprocess
import sys
from importlib import metadata
from typing import Any

from .places import FAKE, fingerprint

_QUERY = (
    "name", "driver_version", "memory.total", "clocks.sm", "clocks.max.sm", "clocks.mem", "clocks.max.mem",
    "power.limit", "temperature.gpu", "mig.mode.current", "ecc.mode.current", "persistence_mode",
)  # fmt: skip
_CLOCKS = ("clocks.sm", "clocks.mem", "temperature.gpu", "power.draw")
_PACKAGES = (
    "torch", "triton", "numpy", "pytest", "pytest-xdist", "pytest-timeout", "hypothesis", "expecttest",
    "scikit-build-core", "pybind11", "cmake", "ninja", "liger-kernel", "cut-cross-entropy", "quack-kernels",
    "nvidia-cutlass-dsl", "matplotlib", "psutil", "rich", "pytest-benchmark",
)  # fmt: skip
_PROGRAMS = ("nvcc", "g++", "cmake", "ninja", "ncu", "compute-sanitizer")


def main() -> int:
    found = {
        "fake": FAKE,
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "cores": os.cpu_count(),
        "python": sys.version.split()[0],
        "packages": {name: version for name in _PACKAGES if (version := _version(name))},
        "programs": {name: line for name in _PROGRAMS if (line := _program(name))},
        "nvidia_smi": nvidia_smi(_QUERY),
        "commit": _commit(),
        "sources": fingerprint(),
        **_torch_facts(),
    }
    print(json.dumps(found))
    return 0


def clocks() -> dict[str, str]:
    """The device's, now."""
    return nvidia_smi(_CLOCKS)


def nvidia_smi(query: tuple[str, ...]) -> dict[str, str]:
    """What nvidia-smi says of the first device; empty where it does not run."""
    command = ["nvidia-smi", "--id=0", f"--query-gpu={','.join(query)}", "--format=csv,noheader"]
    values = [value.strip() for value in _output(command).partition("\n")[0].split(",")]
    return dict(zip(query, values, strict=True)) if len(values) == len(query) else {}


def _output(command: list[str]) -> str:
    if shutil.which(command[0]) is None:
        return ""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout if done.returncode == 0 else ""


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _program(name: str) -> str | None:
    """The line of --version that has the version in it."""
    lines = [line.strip() for line in _output([name, "--version"]).splitlines() if re.search(r"\d+\.\d+", line)]
    return next((line for line in lines if "elease" in line or "ersion" in line), lines[0] if lines else None)


def _commit() -> str | None:
    return _output(["git", "describe", "--always", "--dirty"]).strip() or None


def _torch_facts() -> dict[str, Any]:
    import torch

    if FAKE:
        return {"device": "fake device", "torch_cuda": torch.version.cuda, "capability": None}
    if not torch.cuda.is_available():
        return {"device": None, "torch_cuda": torch.version.cuda}
    properties = torch.cuda.get_device_properties(0)
    return {
        "device": properties.name,
        "capability": list(torch.cuda.get_device_capability(0)),
        "multiprocessors": properties.multi_processor_count,
        "memory_gib": round(properties.total_memory / 2**30, 1),
        "l2_mib": round(properties.L2_cache_size / 2**20, 1),
        "devices": torch.cuda.device_count(),
        "torch_cuda": torch.version.cuda,
    }


if __name__ == "__main__":
    sys.exit(main())
