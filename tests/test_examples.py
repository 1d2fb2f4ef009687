"""The demo at a size of seconds: what it prints and writes, and that both losses train the same model."""

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

for _library in ("tokenizers", "matplotlib", "rich", "tqdm"):
    pytest.importorskip(_library, reason=f"the demo needs {_library}: pip install 'fastloss[demo]'")

SCRIPT = Path(__file__).parent.parent / "examples" / "train_lm.py"
STEPS, VOCAB = 20, 300
SIZE = f"--steps {STEPS} --vocab {VOCAB} --batch 4 --context 32 --threads 1 --seed 7".split()


def run(folder: Path, *options: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(SCRIPT), *options]
    env = {**os.environ, "PYTHONUTF8": "1", "COLUMNS": "100"}
    return subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, encoding="utf-8", timeout=3600)


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A real text of about 100 kB."""
    path = tmp_path_factory.mktemp("text") / "argparse.txt"
    path.write_text(inspect.getsource(argparse), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def demo(text: Path) -> subprocess.CompletedProcess[str]:
    done = run(text.parent, "--text", str(text), "--out", "first", *SIZE)
    assert done.returncode == 0, done.stderr
    return done


@pytest.fixture(scope="module")
def report(text: Path, demo: subprocess.CompletedProcess[str]) -> Any:
    return json.loads((text.parent / "first" / "report.json").read_text())


def test_table(demo: subprocess.CompletedProcess[str], report: Any) -> None:
    rows = demo.stdout.splitlines()
    for label in ("Training loss", "Validation loss", "perplexity", "Largest gap", "Loss layer", "Whole step", "Peak"):
        assert any(label in row for row in rows), f"no row {label!r} in\n{demo.stdout}"
    (validation,) = [row for row in rows if "Validation loss" in row]
    for summary in report["summary"].values():
        assert f"{summary['validation_loss']:.4f}" in validation


def test_progress_bar(demo: subprocess.CompletedProcess[str]) -> None:
    assert f"{2 * STEPS}/{2 * STEPS}" in demo.stderr


def test_picture(text: Path, demo: subprocess.CompletedProcess[str]) -> None:
    from matplotlib.image import imread

    height, width, _ = (pixels := imread(text.parent / "first" / "report.png")).shape
    assert height >= 600
    assert width >= 1000
    assert pixels[..., :3].std() > 0.05, "the picture is empty"


def test_curves_agree(report: Any) -> None:
    torch_run, fastloss_run = (report["runs"][loss] for loss in ("torch", "fastloss"))
    assert len(torch_run["loss"]) == len(fastloss_run["loss"]) == STEPS
    assert fastloss_run["loss"] == pytest.approx(torch_run["loss"], rel=1e-5)
    assert fastloss_run["validation_loss"] == pytest.approx(torch_run["validation_loss"], rel=1e-5)
    gaps = [abs(a - b) for a, b in zip(torch_run["loss"], fastloss_run["loss"], strict=True)]
    assert report["largest_difference"] == max(gaps)


@pytest.mark.parametrize("loss", ["torch", "fastloss"])
def test_learns(report: Any, loss: str) -> None:
    run, summary = report["runs"][loss], report["summary"][loss]
    assert run["loss"][0] == pytest.approx(math.log(VOCAB), rel=0.05), "an untrained model knows nothing"
    assert run["validation_loss"] < run["loss"][0] - 1
    assert summary["perplexity"] == pytest.approx(math.exp(run["validation_loss"]))


@pytest.mark.parametrize("loss", ["torch", "fastloss"])
def test_measures(report: Any, loss: str) -> None:
    run = report["runs"][loss]
    assert len(run["loss_ms"]) == len(run["step_ms"]) == STEPS
    assert all(0 < part < whole for part, whole in zip(run["loss_ms"], run["step_ms"], strict=True))
    assert 50e6 < run["peak_bytes"] < 5e9


def test_same_seed_same_curves(text: Path, report: Any) -> None:
    done = run(text.parent, "--text", str(text), "--out", "second", *SIZE)
    assert done.returncode == 0, done.stderr
    again = json.loads((text.parent / "second" / "report.json").read_text())
    for loss in ("torch", "fastloss"):
        assert again["runs"][loss]["loss"] == report["runs"][loss]["loss"]


@pytest.mark.parametrize("content", [None, "", "To be, or not to be.\n"], ids=["missing", "empty", "short"])
def test_unusable_text(tmp_path: Path, content: str | None) -> None:
    path = tmp_path / "hamlet.txt"
    if content is not None:
        path.write_text(content)
    done = run(tmp_path, "--text", str(path), *SIZE)
    assert done.returncode == 1
    assert str(path) in done.stderr
    assert ("cannot read" if content is None else "too short") in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("option", ["--steps=0", "--batch=x", "--vocab=16", "--context=-1"])
def test_wrong_option(tmp_path: Path, option: str) -> None:
    done = run(tmp_path, option)
    assert done.returncode == 2
    assert "expected a whole number of at least" in done.stderr
