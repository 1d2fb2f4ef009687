"""A machine with a GPU may have torch and pytest and little else: `pytest -m gpu` collects there all the same."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).parent
OPTIONAL = ["hypothesis", "expecttest", "numpy", "psutil", "pybind11", "rich", "matplotlib", "tokenizers", "tqdm"]
OPTIONAL += ["triton", "xdist", "pytest_benchmark"]
COLLECT = """
import sys
from importlib.machinery import PathFinder

class Without(PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        return None if name.partition(".")[0] in sys.argv[2:] else super().find_spec(name, path, target)

sys.meta_path[sys.meta_path.index(PathFinder)] = Without
import pytest
sys.exit(pytest.main(["-q", "-p", "no:cacheprovider", "--collect-only", "-m", "gpu", sys.argv[1]]))
"""


@pytest.mark.parametrize(
    "missing",
    [
        pytest.param(OPTIONAL, id="all"),
        *(pytest.param([name], id=name, marks=pytest.mark.slow) for name in OPTIONAL),
    ],
)
def test_gpu_tests_are_collected(missing):
    """A test file that cannot do without a package is skipped; none is an error, which would end the run."""
    done = subprocess.run(
        [sys.executable, "-c", COLLECT, TESTS, *missing],
        env={**os.environ, "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"},
        cwd=TESTS.parent,
        capture_output=True,
        text=True,
    )
    none_marked = done.returncode == pytest.ExitCode.NO_TESTS_COLLECTED  # where torch sees no GPU
    assert done.returncode == 0 or none_marked, done.stdout[-6000:]
    assert sum(map(int, re.findall(r"(\d+) (?:tests collected|deselected)", done.stdout))) > 5000
