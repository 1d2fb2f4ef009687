"""`pytest --benchmark` at the root of the checkout: benchmarks alone, with their options."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("pytest_benchmark")
ROOT = Path(__file__).resolve().parent.parent


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
    command = [sys.executable, "-m", "pytest", "--collect-only", "-q", "-p", "no:cacheprovider", *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    files = {line.partition("::")[0] for line in done.stdout.splitlines() if "::" in line}
    assert files == {"benchmarks/bench_cross_entropy.py" if measures else "tests/test_docs.py"}


def test_options_of_the_benchmarks_are_listed() -> None:
    done = subprocess.run([sys.executable, "-m", "pytest", "--help"], cwd=ROOT, capture_output=True, text=True)
    assert all(option in done.stdout for option in ("--benchmark ", "--quick", "--device=DEVICE"))
