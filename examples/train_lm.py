"""Trains one small language model twice: with torch's cross-entropy, and with fastloss's.

    python examples/train_lm.py                      on the sources and docstrings of Python's standard library
    python examples/train_lm.py --text my_book.txt   on a text of yours

Both runs start from the same seed and see the same tokens; the whole difference between them is `choose_loss`. Each has
its own process, so that its memory can be told, and they take turns of a few steps, so that whatever else the machine
does slows both. It prints a table and writes out/report.png and out/report.json.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

WIDTH, LAYERS, HEADS = 256, 4, 4
LEARNING_RATE, WARMUP, MAX_GRADIENT = 1e-3, 20, 1.0


def choose_loss(name: str) -> Callable[[Tensor, Tensor], Tensor]:
    if name == "fastloss":
        from fastloss import cross_entropy
    else:
        from torch.nn.functional import cross_entropy
    return cross_entropy


class Block(nn.Module):
    """Causal self-attention and an MLP, each added to its input."""

    def __init__(self) -> None:
        super().__init__()
        self.attention_norm, self.mlp_norm = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH, bias=False)
        self.out = nn.Linear(WIDTH, WIDTH, bias=False)
        self.mlp = nn.Sequential(nn.Linear(WIDTH, 4 * WIDTH), nn.GELU(), nn.Linear(4 * WIDTH, WIDTH))

    def forward(self, x: Tensor) -> Tensor:  # (B, T, WIDTH)
        heads = self.qkv(self.attention_norm(x)).unflatten(-1, (3, HEADS, -1))  # (B, T, 3, HEADS, WIDTH / HEADS)
        q, k, v = heads.permute(2, 0, 3, 1, 4)
        x = x + self.out(scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))
        return x + self.mlp(self.mlp_norm(x))


class LanguageModel(nn.Module):
    """A decoder-only transformer whose head is its embedding, transposed."""

    def __init__(self, vocab: int, context: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocab, WIDTH)
        self.positions = nn.Parameter(torch.zeros(context, WIDTH))
        self.blocks = nn.Sequential(*(Block() for _ in range(LAYERS)))
        self.norm = nn.LayerNorm(WIDTH)
        nn.init.normal_(self.embedding.weight, std=0.02)

    def forward(self, tokens: Tensor) -> Tensor:  # (B, T) -> (B, T, vocab)
        # The head wants small embeddings. Unscaled, the first LayerNorm would enlarge their gradients 50 times, and
        # training every rounding error with them: two runs with the very same loss would drift apart.
        x = math.sqrt(WIDTH) * self.embedding(tokens) + self.positions[: tokens.shape[1]]
        return self.norm(self.blocks(x)) @ self.embedding.weight.T


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
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=LEARNING_RATE, weight_decay=0.1, fused=True)
        self.schedule = torch.optim.lr_scheduler.LambdaLR(self.optimizer, self._rate)

    def _rate(self, step: int) -> float:
        """Up in a straight line, then down along a cosine."""
        progress = min(1.0, step / self.options.steps)
        return min(1.0, (step + 1) / WARMUP) * (0.1 + 0.45 * (1 + math.cos(math.pi * progress)))

    def _windows(self, tokens: Tensor, starts: Tensor) -> tuple[Tensor, Tensor]:
        """The tokens from each start on, (B, T), and those that follow each of them."""
        at = starts[:, None] + torch.arange(self.options.context)
        return tokens[at].long(), tokens[at + 1].long()

    def step(self) -> Step:
        batch, context = self.options.batch, self.options.context
        starts = torch.randint(len(self.train_tokens) - context, (batch,))
        inputs, targets = self._windows(self.train_tokens, starts)
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
            inputs, targets = self._windows(self.validation_tokens, some)
            losses.append(self.cross_entropy(self.model(inputs).flatten(0, 1), targets.flatten()))
        return torch.stack(losses).mean().item()


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Train one small language model twice, with torch's cross-entropy and with fastloss's.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add, threads = parser.add_argument, torch.get_num_threads()
    add("--text", type=Path, help="a text file to train on; without it, Python's standard library")
    add("--steps", type=_at_least(1), default=160, help="training steps of each run")
    add("--batch", type=_at_least(1), default=8, help="sequences per step")
    add("--context", type=_at_least(1), default=128, help="tokens per sequence")
    add("--vocab", type=_at_least(257), default=32000, help="entries of the tokenizer: bytes, pairs and an end mark")
    add("--out", type=Path, default=Path("out"), help="folder for the report")
    add("--seed", type=int, default=0, help="of the weights, the batches and the validation split")
    add("--threads", type=_at_least(1), default=threads, help="CPU threads of each run")
    return parser.parse_args()


def _at_least(minimum: int) -> Callable[[str], int]:
    def number(text: str) -> int:
        if not text.isdecimal() or int(text) < minimum:
            raise argparse.ArgumentTypeError(f"expected a whole number of at least {minimum}, got {text!r}")
        return int(text)

    return number


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
