"""The CPU kernels of processors that need not be here: `make avx512` and `make aarch64`, where what they need is."""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest

from fastloss.backends import native

ROOT = Path(__file__).parent.parent
TARGETS = {"on-avx2-avx512": "avx512", "on-avx2-avx512_bf16": "avx512_bf16", "aarch64": "baseline"}


def missing(target: str) -> str | None:
    """What the target needs and this machine has not."""
    if target == "aarch64":
        needed = ("make", "aarch64-linux-gnu-g++", "qemu-aarch64")
        return next((f"no {program}" for program in needed if not shutil.which(program)), None)
    compiler = shlex.split(os.environ.get("CXX", "g++"))
    if "avx2" not in native._native.available_isas():
        return "no AVX2"
    if not all(map(shutil.which, ("make", compiler[0]))):
        return "no make, or no compiler"
    header = "#include <simde/x86/avx512.h>"
    found = subprocess.run([*compiler, "-E", "-x", "c++", "-"], input=header, capture_output=True, text=True)
    return None if found.returncode == 0 else "no <simde/x86/avx512.h>: apt install libsimde-dev"


@pytest.mark.parametrize("target", TARGETS)
def test_kernels_alone(target):
    if reason := missing(target):
        pytest.skip(reason)
    run = subprocess.run(["make", target], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert run.returncode == 0, run.stdout
    assert f"\n{TARGETS[target]}: " in run.stdout and " cases, 0 wrong" in run.stdout
