"""Every example at a size of seconds: it runs, and what it trains gets better at what it is for."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path
from typing import Any

import pytest

for _library in ("tokenizers", "rich", "tqdm"):
    pytest.importorskip(_library, reason=f"the examples need {_library}: pip install 'fastloss[demo]'")

EXAMPLES = Path(__file__).parent.parent / "examples"
SIZE = ["--width", "32", "--vocab", "600", "--threads", "1"]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """run(example, options): the figures that it writes."""
    monkeypatch.syspath_prepend(str(EXAMPLES))

    def call(name: str, options: str) -> dict[str, Any]:
        figures = importlib.import_module(name).main(
            [*SIZE, *options.split(), "--json", str(tmp_path / "figures.json")]
        )
        assert json.loads((tmp_path / "figures.json").read_text()) == figures
        return figures

    yield call
    for module in [name for name in sys.modules if name.partition(".")[0] == "parts"]:
        if module != "parts.text":  # the library's sources are parsed once
            del sys.modules[module]


@pytest.mark.parametrize("model", ["rnn", "lstm", "transformer"])
def test_language_models(run, model):
    figures = run("language_models", f"--model {model} --steps 40 --batch 8")
    assert figures[f"{model}: perplexity"] < 0.6 * figures[f"{model}: perplexity before"]
    assert len(figures[f"{model} writes"].split()) > 2


def test_bert(run):
    figures = run("bert", "--steps 40 --batch 8")
    assert figures["loss at last"] < figures["loss at first"] - 0.5
    assert 0.12 < figures["positions that reach the head"] < 0.18
    assert figures["masked words right"] > figures["masked words right before"]


def test_classify(run):
    figures = run("classify", "--steps 80 --batch 32")
    assert figures["loss at last"] < figures["loss at first"]
    assert figures["accuracy"] > figures["accuracy of the most frequent class"]


def test_summarise(run):
    figures = run("summarise", "--steps 80 --batch 8")
    assert figures["held-out nats per word"] < figures["held-out nats per word before"] - 1.0
    assert figures["source"] and figures["first line"]


def test_text_vae(run):
    figures = run("text_vae", "--steps 150 --batch 16")
    assert figures["bound, nats per text"] < 0.9 * figures["bound before, nats per text"]
    assert figures["of the code"] >= 0


@pytest.mark.parametrize("loss", ["forward", "reverse", "js", "topk"])
def test_distil(run, loss):
    figures = run("distil", f"--loss {loss} --steps 30 --batch 4")
    assert figures[f"{loss}: KL to the teacher"] < 0.9 * figures[f"{loss}: KL to the teacher before"]


def test_contrast(run):
    figures = run("contrast", "--steps 300 --batch 64")
    assert figures["loss at last"] < figures["loss at first"] - 0.3
    assert figures["right line found"] > 2 * figures["by chance"]


def test_grpo(run):
    figures = run("grpo", "--pretraining 30 --steps 30 --batch 4")
    assert figures["reward at last"] > figures["reward at first"] + 0.05
