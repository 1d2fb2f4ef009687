"""examples/train_tp.py in its own processes: many ranks train the model that one trains."""

from __future__ import annotations

import argparse
import inspect
import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

for _library in ("tokenizers", "rich", "tqdm"):
    pytest.importorskip(_library, reason=f"the examples need {_library}: pip install 'fastloss[demo]'")
if not dist.is_available() or not dist.is_gloo_available():
    pytest.skip("needs torch.distributed with Gloo", allow_module_level=True)

SCRIPT = Path(__file__).parent.parent / "examples" / "train_tp.py"
VOCAB = 303
SIZE = f"--steps 4 --vocab {VOCAB} --batch 4 --context 16 --text text.txt --json figures.json".split()


def launch(folder: Path, ranks: int, *options: str) -> subprocess.CompletedProcess[str]:
    (folder / "text.txt").write_text(inspect.getsource(argparse), encoding="utf-8")
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    env = {**os.environ, "PYTHONUTF8": "1", "COLUMNS": "100", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    command = [*torchrun, str(SCRIPT), *SIZE, *options]
    return subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, encoding="utf-8", timeout=300)


def figures(folder: Path, ranks: int, *options: str) -> dict[str, Any]:
    done = launch(folder, ranks, *options)
    assert done.returncode == 0, done.stderr
    found = json.loads((folder / "figures.json").read_text())
    assert found["loss at first"] == pytest.approx(math.log(VOCAB), rel=0.05), "an untrained model knows nothing"
    assert found["loss at last"] < found["loss at first"]
    assert found["largest difference"] < 2e-5
    return found


def test_vocabulary_over_ranks(tmp_path: Path) -> None:
    assert figures(tmp_path, 2)["copies of parameters differ by"] == 0


def test_fully_sharded(tmp_path: Path) -> None:
    figures(tmp_path, 2, "--fsdp")


@pytest.mark.slow
def test_mesh(tmp_path: Path) -> None:
    found = figures(tmp_path, 4, "--data-parallel", "2")
    assert found["rows of the batch on"] == "2 ranks"
    assert found["copies of parameters differ by"] == 0


def test_exit_code(tmp_path: Path) -> None:
    """One that says no, where no two curves are near enough."""
    done = launch(tmp_path, 2, "--tolerance", "-1")
    assert done.returncode != 0
    assert "the curves differ by more than -1.0 nats" in done.stderr
