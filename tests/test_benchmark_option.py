"""`pytest --benchmark` at the root of the checkout: benchmarks alone, with their options."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("pytest_benchmark")
ROOT = Path(__file__).resolve().parent.parent


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    """pytest, which must not take itself for one of the workers that these tests may run in."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", *arguments]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)


@pytest.mark.parametrize(
    ("arguments", "measures"),
    [
        (["--benchmark", "--quick"], True),
        (["--benchmark-only", "--quick"], True),
        (["tests/test_docs.py"], False),
        (["benchmarks", "--quick"], True),
    ],
)
def test_what_is_collected(arguments: list[str], measures: bool) -> None:
    done = run("--collect-only", "-q", *arguments)
    assert done.returncode == 0, done.stdout + done.stderr
    files = {line.partition("::")[0] for line in done.stdout.splitlines() if "::" in line}
    assert files == {"benchmarks/bench_cross_entropy.py" if measures else "tests/test_docs.py"}


def test_options_of_the_benchmarks_are_listed() -> None:
    done = run("--help")
    assert all(option in done.stdout for option in ("--benchmark ", "--quick", "--device=DEVICE"))
