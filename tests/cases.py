"""The one table of cases: losses, the options to call them with, shapes with their reasons, and the float64 oracle.

A case says how to make the arguments; the oracle says what the loss is, as a textbook writes it: no state, no shortcut.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

import fastloss
from fastloss.spec import Objective

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


def in_turn(engine: str, shapes: Iterable[tuple[int, int]], turn: int, dtype: torch.dtype) -> list[tuple[int, int]]:
    """The shapes; for Triton on a GPU some of them, as it compiles its kernels for almost every one: a third, or one
    where the dtype is float16 or float64, whose kernels differ from others' in conversions alone. Cases, whose number
    `turn` is, take turns: each kernel meets all."""
    shapes = list(shapes)
    if engine != "triton:gpu":
        return shapes
    some = shapes[turn % 3 :: 3]
    return some if dtype in (torch.float32, torch.bfloat16) else some[turn // 3 % len(some) :][:1]


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
    mask: Tensor | None = None,
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
    valid = valid if mask is None else valid & mask
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


def transformed(input: Tensor, softcap: float | None, logit_scale: float) -> Tensor:
    z = input * logit_scale
    return z if softcap is None else softcap * torch.tanh(z / softcap)


def reduced(loss: Tensor, valid: Tensor, token_weight: Tensor | None, normalizer: Any, reduction: str) -> Tensor:
    """Losses (N,) of the rows that count to a mean over them, or to what was asked for."""
    t = torch.ones_like(loss) if token_weight is None else token_weight.to(loss.dtype)
    t = torch.where(valid, t, 0)
    loss = torch.where(t == 0, 0, loss * t)
    if reduction == "none":
        return loss
    if reduction == "batchmean":
        return loss.sum() / len(loss)
    denominator = (t.sum() if reduction == "mean" else 1) if normalizer is None else normalizer
    return loss.sum() / denominator


def kl(log_q: Tensor, log_p: Tensor) -> Tensor:
    return torch.nn.functional.kl_div(log_p, log_q, log_target=True, reduction="none").sum(-1)


def textbook_divergence(
    input: Tensor,
    target_logits: Tensor,
    direction: str = "forward",
    beta: float | None = None,
    temperature: float = 1.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    z_loss: float = 0.0,
    token_weight: Tensor | None = None,
    mask: Tensor | None = None,
    reduction: str = "mean",
    normalizer: float | None = None,
) -> Tensor:
    """KL(q || p), KL(p || q), or with beta the generalised Jensen-Shannon divergence, of logits (N, V)."""
    z = transformed(input, softcap, logit_scale) / temperature
    log_p, log_q = torch.log_softmax(z, -1), torch.log_softmax(target_logits.to(z.dtype) / temperature, -1)
    if beta is None or beta in (0, 1):
        loss = kl(log_p, log_q) if direction == "reverse" or beta == 1 else kl(log_q, log_p)
    else:
        log_m = torch.logaddexp(log_q + math.log(beta), log_p + math.log(1 - beta))
        loss = beta * kl(log_q, log_m) + (1 - beta) * kl(log_p, log_m)
    loss = loss + z_loss * torch.logsumexp(z, -1) ** 2
    valid = torch.ones(len(z), dtype=torch.bool) if mask is None else mask
    return reduced(loss, valid, token_weight, normalizer, reduction)


def textbook_topk(
    input: Tensor,
    indices: Tensor,
    probs: Tensor,
    tail: str = "ignore",
    weight: Tensor | None = None,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    token_weight: Tensor | None = None,
    mask: Tensor | None = None,
    reduction: str = "mean",
    normalizer: float | None = None,
    divergence: bool = False,
) -> Tensor:
    """Cross-entropy (or divergence) against probabilities of K classes, by way of a dense (N, V) target."""
    z = transformed(input, softcap, logit_scale)
    V, dtype = z.shape[1], z.dtype
    valid = indices != ignore_index
    listed = torch.where(valid, indices.long(), 0), torch.where(valid, probs.to(dtype), 0)
    q = torch.zeros_like(z).scatter_add(1, *listed)
    log_p = torch.log_softmax(z, 1)
    w = torch.ones(V, dtype=dtype) if weight is None else weight.to(dtype)
    smoothed = (1 - label_smoothing) * q * w + label_smoothing / V * w
    loss = -torch.where(smoothed == 0, 0, smoothed * log_p).sum(1) + z_loss * torch.logsumexp(z, 1) ** 2
    entropy = -torch.xlogy(listed[1], listed[1]).sum(1)
    if tail == "lump":
        is_listed = torch.zeros_like(z).scatter_add(1, listed[0], valid.to(dtype)) > 0
        rest = (1 - listed[1].sum(1)).clamp(min=0)
        rest = torch.where((is_listed.sum(1) == V) & (rest < 1e-5), 0, rest)  # rounding, of a tail without classes
        log_tail = torch.logsumexp(torch.where(is_listed, -torch.inf, z), 1) - torch.logsumexp(z, 1)
        loss, entropy = loss - torch.where(rest == 0, 0, rest * log_tail), entropy - torch.xlogy(rest, rest)
    counts = valid.any(1) if mask is None else valid.any(1) & mask
    return reduced(loss - entropy if divergence else loss, counts, token_weight, normalizer, reduction)


def textbook_topk_kl(*args: Any, **kwargs: Any) -> Tensor:
    return textbook_topk(*args, **kwargs, divergence=True)


def textbook_log_probs(
    input: Tensor, index: Tensor, temperature: float = 1.0, ignore_index: int = -100, reduction: str = "none"
) -> Tensor:
    """Log-probabilities (N, K) of chosen classes."""
    chosen = (input / temperature).log_softmax(-1).gather(-1, torch.where(index == ignore_index, 0, index))
    return torch.where(index == ignore_index, 0, chosen)


@dataclass(frozen=True)
class Case:
    """`options(N, V, dtype, generator)` makes keyword arguments; `function` names what fastloss calls the loss, and
    `objective` what its backends do."""

    name: str
    options: Callable[[int, int, torch.dtype, torch.Generator], dict[str, Any]] = field(default=lambda *_: {})
    function: str = "cross_entropy"
    objective: Objective = Objective.INDEX
    ignored: float = 0.0  # share of the rows (or listed classes) that are ignored
    oracle: Callable[..., Tensor] = textbook_cross_entropy
    picks: int = 5

    def loss(self) -> Callable[..., Tensor]:
        """As users call it, on whatever engine is on now."""
        return getattr(fastloss, self.function)

    def inputs(self, N: int, V: int, dtype: torch.dtype, g: torch.Generator) -> tuple[Tensor, Tensor, dict[str, Any]]:
        """Logits (N, V), targets and options."""
        x = (torch.randn(N, V, generator=g) * 3).to(dtype)
        options = self.options(N, V, dtype, g)
        if self.objective == Objective.PROBS:
            return x, torch.rand(N, V, generator=g).softmax(1).to(dtype), options
        if self.objective.paired:
            return x, (torch.randn(N, V, generator=g) * 3 + 2).to(dtype), options
        shape = (N,) if self.objective == Objective.INDEX else (N, self.picks)
        y = torch.randint(V, shape, generator=g)
        y[torch.rand(shape, generator=g) < self.ignored] = options.get("ignore_index", -100)
        if self.function.startswith("topk"):
            options["probs"] = torch.rand(shape, generator=g).softmax(1) * 0.9
        return x, y, options

    def upstream(self, N: int, g: torch.Generator) -> Tensor:
        """For what is not reduced."""
        return torch.rand((N, self.picks) if self.function == "selective_log_softmax" else (N,), generator=g)


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
    Case("mask", lambda *a: {"mask": _mask(*a), "label_smoothing": 0.1}, ignored=0.2),
    Case("normalizer", lambda *_: {"normalizer": 17.0}, ignored=0.2),
    Case("probabilities", objective=Objective.PROBS),
    Case(
        "probabilities_mask",
        lambda *a: {"mask": _mask(*a), "token_weight": _token_weight(*a)},
        objective=Objective.PROBS,
    ),
    Case(
        "probabilities_weight_smoothing",
        lambda *a: {"weight": _weight(*a), "label_smoothing": 0.2},
        objective=Objective.PROBS,
    ),
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


def _mask(N: int, V: int, dtype: torch.dtype, g: torch.Generator) -> Tensor:
    mask = torch.rand(N, generator=g) < 0.7
    mask[:1] = True
    return mask


def _divergence(name: str, objective: Objective, **options: Any) -> Case:
    function = "js_div_with_logits" if "beta" in options else "kl_div_with_logits"
    made = lambda *a: {k: v(*a) if callable(v) else v for k, v in options.items()}  # noqa: E731
    return Case(name, made, function, objective, oracle=textbook_divergence)


def _topk(name: str, ignored: float = 0.0, divergence: bool = False, picks: int = 5, **options: Any) -> Case:
    objective = Objective.TOPK_TAIL if options.get("tail") == "lump" else Objective.TOPK
    made = lambda *a: {k: v(*a) if callable(v) else v for k, v in options.items()}  # noqa: E731
    function, oracle = ("topk_kl_div", textbook_topk_kl) if divergence else ("topk_cross_entropy", textbook_topk)
    return Case(name, made, function, objective, ignored, oracle, picks)


_SQUASHED = {"softcap": 6.0, "logit_scale": 1.3, "z_loss": 1e-3}
# Of all other losses over a vocabulary.
LOSS_CASES = [
    _divergence("forward_kl", Objective.FORWARD_KL),
    _divergence(
        "forward_kl_temperature", Objective.FORWARD_KL, temperature=2.5, token_weight=_token_weight, mask=_mask
    ),
    _divergence("forward_kl_squashed", Objective.FORWARD_KL, temperature=0.7, **_SQUASHED),
    _divergence("reverse_kl", Objective.REVERSE_KL, direction="reverse"),
    _divergence("reverse_kl_masked", Objective.REVERSE_KL, direction="reverse", temperature=3.0, mask=_mask),
    _divergence("reverse_kl_squashed", Objective.REVERSE_KL, direction="reverse", **_SQUASHED),
    _divergence("js", Objective.JS, beta=0.5),
    _divergence("js_mostly_student", Objective.JS, beta=0.1, temperature=2.0, mask=_mask),
    _divergence("js_squashed", Objective.JS, beta=0.9, token_weight=_token_weight, **_SQUASHED),
    _divergence("js_is_forward_kl", Objective.FORWARD_KL, beta=0.0),
    _divergence("js_is_reverse_kl", Objective.REVERSE_KL, beta=1.0),
    _topk("topk"),
    _topk("topk_ignored", ignored=0.5, mask=_mask, z_loss=1e-3),
    _topk("topk_weight_smoothing", ignored=0.2, weight=_weight, label_smoothing=0.2, softcap=6.0),
    _topk("topk_many", picks=70, token_weight=_token_weight),
    _topk("topk_tail", tail="lump"),
    _topk("topk_tail_squashed", ignored=0.3, tail="lump", token_weight=_token_weight, **_SQUASHED),
    _topk("topk_kl", divergence=True),
    _topk("topk_kl_tail", ignored=0.3, divergence=True, tail="lump", logit_scale=0.5),
    Case(
        "log_probs",
        lambda *_: {"temperature": 1.7},
        "selective_log_softmax",
        Objective.TOPK,
        ignored=0.3,
        oracle=textbook_log_probs,
    ),
]
