"""examples/train_tp.py in its own processes: many ranks train the model that one trains."""

from __future__ import annotations

import argparse
import inspect
import json
import math
import os
import socket
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


ENV = {**os.environ, "PYTHONUTF8": "1", "COLUMNS": "100", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node"]


def python(folder: Path, *command: str, **env: str) -> subprocess.CompletedProcess[str]:
    (folder / "text.txt").write_text(inspect.getsource(argparse), encoding="utf-8")
    return subprocess.run(
        [sys.executable, *command],
        cwd=folder,
        env=ENV | env,
        capture_output=True,
        text=True,
        encoding="utf-8",
        timeout=3600,
    )


def figures(folder: Path, ranks: int, *options: str) -> dict[str, Any]:
    done = python(folder, *TORCHRUN, str(ranks), str(SCRIPT), *SIZE, *options)
    assert done.returncode == 0, done.stderr
    assert "Warning" not in done.stderr
    found = json.loads((folder / "figures.json").read_text())
    assert found["loss at first"] == pytest.approx(math.log(VOCAB), rel=0.05), "an untrained model knows nothing"
    assert found["loss at last"] < found["loss at first"]
    assert found["largest difference"] < 5e-6
    return found


def test_vocabulary_over_ranks(tmp_path: Path) -> None:
    assert figures(tmp_path, 2)["copies of parameters differ by"] == 0


def test_fully_sharded(tmp_path: Path) -> None:
    figures(tmp_path, 2, "--fsdp")


@pytest.mark.slow
def test_mesh(tmp_path: Path) -> None:
    found = figures(tmp_path, 4, "--data-parallel", "2")
    assert found["ranks that share the batch"] == found["ranks that share the vocabulary"] == 2
    assert found["copies of parameters differ by"] == 0


def alone(folder: Path, *options: str) -> subprocess.CompletedProcess[str]:
    """A group of one rank, which needs no torchrun."""
    rank = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "1"}
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        rank |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
    return python(folder, str(SCRIPT), *SIZE, *options, **rank)


def test_exit_code(tmp_path: Path) -> None:
    """It says no where the curves are not as near as asked: none are, of less than nothing."""
    done = alone(tmp_path, "--steps", "1", "--tolerance", "-1")
    assert done.returncode == 1
    assert "the curves differ by more than -1.0 nats" in done.stderr


@pytest.mark.parametrize("options", [["--data-parallel", "2"], ["--text", "missing.txt"]], ids=["ranks", "text"])
def test_wrong_option(tmp_path: Path, options: list[str]) -> None:
    done = alone(tmp_path, *options)
    assert done.returncode != 0
    assert options[0 if options[0] == "--data-parallel" else 1] in done.stderr
    assert "Traceback" not in done.stderr
