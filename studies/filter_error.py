"""What gradient filtering (`filter_eps`) leaves out, and what that does to the gradients, in float64:

    python studies/filter_error.py                     about three minutes on one core
    python studies/filter_error.py --tokens 300000     a model that has learned little

of a small language model trained for a while on the docstrings of Python's standard library, whose classes are words in
the order of their frequency. Tiles of 128 x 128, as the triton backend has them.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fastloss

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
from parts import text

CONTEXT, EMBEDDING, WIDTH, TILE = 8, 96, 192, 128


class Model(nn.Module):
    """Eight words to the hidden states of the next."""

    def __init__(self, vocabulary: int) -> None:
        super().__init__()
        self.words = nn.Embedding(vocabulary, EMBEDDING)
        self.layers = nn.Sequential(
            nn.Linear(CONTEXT * EMBEDDING, 512), nn.GELU(), nn.Linear(512, WIDTH), nn.LayerNorm(WIDTH)
        )
        self.head = nn.Linear(WIDTH, vocabulary, bias=False)

    def forward(self, context: Tensor) -> Tensor:
        return self.layers(self.words(context).flatten(1))


def at(tokens: Tensor, i: Tensor) -> tuple[Tensor, Tensor]:
    """The contexts and the words that follow them."""
    return torch.stack([tokens[i - CONTEXT + k] for k in range(CONTEXT)], 1), tokens[i]


def trained(tokens: Tensor, vocabulary: int, steps: int) -> Model:
    model = Model(vocabulary)
    optimizer = torch.optim.AdamW(model.parameters(), 2e-3)
    for _ in range(steps):
        context, target = at(tokens, torch.randint(CONTEXT, len(tokens), (512,)))
        loss = fastloss.linear_cross_entropy(model(context), model.head.weight, target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model


def relative(a: Tensor, b: Tensor) -> float:
    return ((a - b).norm() / b.norm()).item()


@torch.no_grad()
def report(name: str, model: Model, tokens: Tensor, rows: int = 1024) -> None:
    context, target = at(tokens, torch.arange(CONTEXT, CONTEXT + rows))
    hidden, weight = model(context).bfloat16().double(), model.head.weight.bfloat16().double()
    logits = hidden @ weight.t()
    exact = logits.softmax(1)
    exact[torch.arange(rows), target] -= 1
    gradients = exact @ weight, exact.t() @ hidden
    rounded = exact.bfloat16().double()
    print(f"{name}: loss {F.cross_entropy(logits, target):.2f}")
    print("| filter_eps | tiles kept | hidden states' gradient off by | weight's | \n| --- | --- | --- | --- |")
    errors = relative(rounded @ weight, gradients[0]), relative(rounded.t() @ hidden, gradients[1])
    print(f"| none, but in bfloat16 | 100% | {errors[0]:.2%} | {errors[1]:.2%} |")
    for power in (-16, -14, -12, -10):
        padded = F.pad(exact.abs(), (0, -exact.shape[1] % TILE, 0, -rows % TILE))
        kept = padded.unflatten(1, (-1, TILE)).unflatten(0, (-1, TILE)).amax((1, 3)) >= 2.0**power
        mask = kept.repeat_interleave(TILE, 0).repeat_interleave(TILE, 1)[:rows, : exact.shape[1]]
        left = exact * mask
        errors = relative(left @ weight, gradients[0]), relative(left.t() @ hidden, gradients[1])
        print(f"| 2^{power} | {kept.double().mean():.0%} | {errors[0]:.2%} | {errors[1]:.2%} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=40_000, help="to train on, again and again")
    parser.add_argument("--steps", type=int, default=350)
    options = parser.parse_args()
    torch.manual_seed(0)
    train, held_out = text.split(text.documents(), 400)
    words = text.Vocabulary(train, 8192)
    tokens, unseen = (text.token_stream(part, words) for part in (train, held_out))
    vocabulary = int(max(tokens.max(), unseen.max())) + 1
    model = trained(tokens[: options.tokens], vocabulary, options.steps)
    print(f"{vocabulary} classes, {options.steps} steps on {options.tokens} words")
    report("seen in training", model, tokens)
    report("held out", model, unseen)


if __name__ == "__main__":
    main()
