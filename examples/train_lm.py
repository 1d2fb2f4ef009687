"""Trains one small language model twice: with torch's cross-entropy, and with fastloss's.

    python examples/train_lm.py                      on the sources and docstrings of Python's standard library
    python examples/train_lm.py --text my_book.txt   on a text of yours

Both runs start from the same seed and see the same tokens; the whole difference between them is `choose_loss`. Each has
its own process, so that its memory can be told, and they take turns of a few steps, so that whatever else the machine
does slows both. It prints a table and writes out/report.png and out/report.json.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from lm.model import LanguageModel
from lm.recipe import MAX_GRADIENT, at_least, optimizer, windows
from torch import Tensor, nn


def choose_loss(name: str) -> Callable[[Tensor, Tensor], Tensor]:
    if name == "fastloss":
        from fastloss import cross_entropy
    else:
        from torch.nn.functional import cross_entropy
    return cross_entropy


class Step(NamedTuple):
    """What one training step gave: its loss, and the milliseconds of the loss layer and of the whole step."""

    loss: float
    loss_ms: float
    step_ms: float


class Training:
    """A model, its optimizer and its data; `step()` and `validate()` are all that one does with them."""

    def __init__(self, loss: str, corpus: Path, options: argparse.Namespace) -> None:
        torch.set_num_threads(options.threads)
        torch.manual_seed(options.seed)
        self.cross_entropy = choose_loss(loss)
        self.options = options
        data = torch.load(corpus)
        self.train_tokens, self.validation_tokens = data["train"], data["validation"]
        self.model = LanguageModel(data["vocab"], options.context)
        self.optimizer, self.schedule = optimizer(self.model.parameters(), options.steps)

    def step(self) -> Step:
        batch, context = self.options.batch, self.options.context
        starts = torch.randint(len(self.train_tokens) - context, (batch,))
        inputs, targets = windows(self.train_tokens, starts, context)
        began = time.perf_counter()
        self.optimizer.zero_grad()
        logits = self.model(inputs).flatten(0, 1)  # (B T, vocab)

        # Forward and backward of the loss by themselves, to time them; otherwise one would write loss.backward().
        loss_began = time.perf_counter()
        loss = self.cross_entropy(logits, targets.flatten())
        (logits_grad,) = torch.autograd.grad(loss, logits)
        loss_ended = time.perf_counter()

        logits.backward(logits_grad)
        nn.utils.clip_grad_norm_(self.model.parameters(), MAX_GRADIENT)
        self.optimizer.step()
        self.schedule.step()
        ended = time.perf_counter()
        return Step(loss.item(), 1e3 * (loss_ended - loss_began), 1e3 * (ended - began))

    @torch.no_grad()
    def validate(self, batches: int = 16) -> float:
        """The mean loss over windows spread evenly over the validation tokens."""
        last = len(self.validation_tokens) - self.options.context - 1
        starts = torch.linspace(0, last, batches * self.options.batch).long()
        losses = []
        for some in starts.chunk(batches):
            inputs, targets = windows(self.validation_tokens, some, self.options.context)
            losses.append(self.cross_entropy(self.model(inputs).flatten(0, 1), targets.flatten()))
        return torch.stack(losses).mean().item()


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Train one small language model twice, with torch's cross-entropy and with fastloss's.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add, threads = parser.add_argument, torch.get_num_threads()
    add("--text", type=Path, help="a text file to train on; without it, Python's standard library")
    add("--steps", type=at_least(1), default=160, help="training steps of each run")
    add("--batch", type=at_least(1), default=8, help="sequences per step")
    add("--context", type=at_least(1), default=128, help="tokens per sequence")
    add("--vocab", type=at_least(257), default=32000, help="entries of the tokenizer: bytes, pairs and an end mark")
    add("--out", type=Path, default=Path("out"), help="folder for the report")
    add("--seed", type=int, default=0, help="of the weights, the batches and the validation split")
    add("--threads", type=at_least(1), default=threads, help="CPU threads of each run")
    return parser.parse_args()


def main() -> None:
    from lm import corpus, report, runs  # here, so that the runs' own processes do not carry matplotlib and the like

    options = parse_options()
    options.out.mkdir(parents=True, exist_ok=True)
    try:
        path = corpus.prepare(options)
    except corpus.UnusableText as error:
        raise SystemExit(f"train_lm.py: {error}") from None
    report.show(runs.side_by_side(Training, path, options), options)


if __name__ == "__main__":
    main()
