"""The one table of cases: losses, the options to call them with, shapes with their reasons, and the float64 oracle.

A case says how to make the arguments; the oracle says what the loss is, as a textbook writes it: no state, no shortcut.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]

# What we allow beyond the error that torch makes in the same dtype, relative to the largest value.
TOLERANCE = {torch.float32: 5e-7, torch.bfloat16: 4e-3, torch.float16: 1e-3, torch.float64: 5e-14}

# (N, V): V and the reason for it.
SHAPES = {
    "one_class": (3, 1),
    "one_row": (1, 7),
    "less_than_a_vector": (5, 13),
    "one_vector_less_one": (4, 15),
    "whole_vectors": (6, 64),
    "whole_vectors_and_one": (6, 65),
    "one_tile": (3, 2048),
    "one_tile_and_one": (3, 2049),
    "two_tiles_and_some": (3, 4999),
}
VOCABULARIES = {"llama2": 32000, "gpt2": 50257, "llama3": 128256, "qwen2": 151936, "gemma": 262144}


def textbook_cross_entropy(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    token_weight: Tensor | None = None,
    normalizer: float | Tensor | None = None,
) -> Tensor:
    """- sum_j q_j w_j log p_j of logits (N, V), in the input's own dtype."""
    z = input * logit_scale
    if softcap is not None:
        z = softcap * torch.tanh(z / softcap)
    V = z.shape[1]
    w = torch.ones(V, dtype=z.dtype) if weight is None else weight.to(z.dtype)
    log_p = torch.log_softmax(z, 1)
    if target.is_floating_point():
        valid = torch.ones(len(z), dtype=torch.bool)
        sharp = target.to(z.dtype) * w
        row_weight = torch.ones(len(z), dtype=z.dtype)
    else:
        valid = target != ignore_index
        y = torch.where(valid, target.long(), 0)
        sharp = torch.nn.functional.one_hot(y, V).to(z.dtype) * w
        row_weight = w[y]
    q = (1 - label_smoothing) * sharp + label_smoothing / V * w
    loss = -torch.where(q == 0, 0, q * log_p).sum(1) + z_loss * torch.logsumexp(z, 1) ** 2
    t = torch.ones_like(loss) if token_weight is None else token_weight.to(z.dtype)
    loss = torch.where(valid, loss * t, 0)
    if reduction == "none":
        return loss
    denominator = torch.where(valid, row_weight * t, 0).sum() if normalizer is None else normalizer
    if reduction == "sum":
        return loss.sum() if normalizer is None else loss.sum() / denominator
    return loss.sum() / denominator


@dataclass(frozen=True)
class Case:
    """`options(N, V, dtype, generator)` makes keyword arguments; `soft` asks for class probabilities."""

    name: str
    options: Callable[[int, int, torch.dtype, torch.Generator], dict[str, Any]] = field(default=lambda *_: {})
    soft: bool = False
    ignored: float = 0.0  # share of the rows whose target is ignored
    oracle: Callable[..., Tensor] = textbook_cross_entropy

    def inputs(self, N: int, V: int, dtype: torch.dtype, g: torch.Generator) -> tuple[Tensor, Tensor, dict[str, Any]]:
        """Logits (N, V), targets and options."""
        x = (torch.randn(N, V, generator=g) * 3).to(dtype)
        options = self.options(N, V, dtype, g)
        if self.soft:
            return x, torch.rand(N, V, generator=g).softmax(1).to(dtype), options
        y = torch.randint(V, (N,), generator=g)
        y[torch.rand(N, generator=g) < self.ignored] = options.get("ignore_index", -100)
        return x, y, options


def _weight(N: int, V: int, dtype: torch.dtype, g: torch.Generator) -> Tensor:
    w = torch.rand(V, generator=g) + 0.1
    w[::7] = 0 if V > 7 else 1  # a class of no weight
    return w.to(dtype)


def _token_weight(N: int, V: int, dtype: torch.dtype, g: torch.Generator) -> Tensor:
    return torch.rand(N, generator=g) + 0.1


CASES = [
    Case("index"),
    Case("ignored", ignored=0.4),
    Case("ignore_index_is_a_class", lambda *_: {"ignore_index": 0}, ignored=0.3),
    Case("weight", lambda *a: {"weight": _weight(*a)}),
    Case("smoothing", lambda *_: {"label_smoothing": 0.1}, ignored=0.2),
    Case("smoothing_weight", lambda *a: {"label_smoothing": 0.3, "weight": _weight(*a)}, ignored=0.2),
    Case("smoothing_one", lambda *_: {"label_smoothing": 1.0}),
    Case("z_loss", lambda *_: {"z_loss": 1e-2}, ignored=0.2),
    Case("softcap", lambda *_: {"softcap": 5.0}),
    Case("logit_scale", lambda *_: {"logit_scale": 0.37}),
    Case("softcap_logit_scale", lambda *_: {"softcap": 4.0, "logit_scale": 1.7, "z_loss": 1e-3}),
    Case("token_weight", lambda *a: {"token_weight": _token_weight(*a)}, ignored=0.2),
    Case("normalizer", lambda *_: {"normalizer": 17.0}, ignored=0.2),
    Case("probabilities", soft=True),
    Case("probabilities_weight_smoothing", lambda *a: {"weight": _weight(*a), "label_smoothing": 0.2}, soft=True),
    Case(
        "everything",
        lambda *a: {
            "weight": _weight(*a),
            "label_smoothing": 0.1,
            "z_loss": 1e-3,
            "softcap": 20.0,
            "logit_scale": 0.8,
            "token_weight": _token_weight(*a),
            "normalizer": torch.tensor(3.0),
        },
        ignored=0.2,
    ),
]
