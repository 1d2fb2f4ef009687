"""What stands in for a GPU in these tests is itself tested: right kernels run right, and every kind of bug shows."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest

HERE = Path(__file__).parent
SOURCE = HERE / "cuda_on_host_selftest.cpp"
CHECKS = sorted({"block_sum", "cluster_sum", *re.findall(r'\breport\(\s*"(\w+)"', SOURCE.read_text())})
OTHER_BUILDS = {
    "sanitized": ["-fsanitize=address,undefined", "-fno-sanitize-recover=all"],
    "ucontext": ["-DCUDA_ON_HOST_UCONTEXT"],
}


def compiler() -> list[str]:
    found = shlex.split(os.environ.get("CXX", "")) or [p for p in (shutil.which("g++"), shutil.which("c++")) if p][:1]
    if not found:
        pytest.skip("no C++ compiler")
    return found


def run(command: list) -> str:
    done = subprocess.run(list(map(str, command)), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=3600)
    output = done.stdout.decode()
    assert done.returncode == 0, output
    return output


def build(folder: Path, flags: list[str], units: list[list[str]]) -> Path:
    """An executable of one object per entry of `units`, which are the flags that it alone is compiled with."""
    common = [*compiler(), "-std=c++17", "-Wall", "-Wextra", "-Werror", *flags]
    objects = [folder / f"{i}.o" for i in range(len(units))]
    for unit, target in zip(units, objects, strict=True):
        inject = ["-x", "c++", "-include", HERE / "cuda_on_host.h"]
        run([*common, *inject, *unit, "-c", SOURCE, "-o", target])
    run([*common, *objects, "-o", folder / "selftest", "-rdynamic", "-ldl"])
    return folder / "selftest"


@pytest.fixture(scope="module")
def lines(tmp_path_factory) -> list[str]:
    """What the self-test says, optimised and of two translation units."""
    executable = build(tmp_path_factory.mktemp("plain"), ["-O2"], [[], ["-DSECOND_UNIT"]])
    # The exit status is nonzero when a check fails, which is for the tests below to say.
    return subprocess.run([executable], capture_output=True, text=True, timeout=3600).stdout.splitlines()


@pytest.mark.parametrize("check", CHECKS)
def test_check(lines, check):
    mine = [line for line in lines if line.split()[1] == check]
    assert mine and all(line.startswith("PASS ") for line in mine), "\n".join(lines)


@pytest.mark.parametrize("name", OTHER_BUILDS)
def test_other_builds(tmp_path, name):
    output = run([build(tmp_path, OTHER_BUILDS[name], [[]])])
    assert "FAIL" not in output and output.count("PASS") > len(CHECKS)
