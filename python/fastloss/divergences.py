"""Divergences between the softmaxes of two sets of logits: distillation, and regularisation towards a reference."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import arguments
from .evaluate import reduced_loss
from .parallel import VocabShard
from .public import public_loss
from .spec import Objective, Rows, make_spec

_DIRECTIONS = {"forward": Objective.FORWARD_KL, "reverse": Objective.REVERSE_KL}
KL_REDUCTIONS = ("none", "mean", "batchmean", "sum")


@public_loss
def kl_div_with_logits(
    input: Tensor,
    target_logits: Tensor,
    *,
    direction: str = "forward",
    temperature: float = 1.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    z_loss: float = 0.0,
    token_weight: Tensor | None = None,
    mask: Tensor | None = None,
    reduction: str = "mean",
    normalizer: Tensor | float | None = None,
    out_dtype: torch.dtype | None = None,
    inplace: bool = False,
    shard: VocabShard | None = None,
) -> Tensor:
    r"""``F.kl_div((input / T).log_softmax(-1), (target_logits / T).log_softmax(-1), log_target=True, ...).sum(-1)``

    of each row, KL(q || p) with p = softmax(input / T) and q = softmax(target_logits / T); with direction="reverse"
    KL(p || q). No softmax is materialised, and gradients are finite at any finite logits.

    Args:
        input: the student's logits (..., V); float32, bfloat16, float16 or float64, any strides, which cost a copy only
            where `cross_entropy` says. Sums are float32 (float64 for float64). A class whose logit is -inf on both
            sides does not exist.
        target_logits: the teacher's logits, of input's shape, any strides likewise. Differentiable, by the slower
            textbook expression.
        direction: "forward", KL(q || p), or "reverse", KL(p || q).
        temperature: T > 0 divides both; the loss is not multiplied by T ** 2 (Hinton et al. 2015, arXiv:1503.02531,
            section 2, does so to keep gradients of hard and soft targets in proportion).
        softcap, logit_scale, z_loss: of `input`, as in `cross_entropy`.
        token_weight: (...): multiplies each row's loss, and counts in the mean's denominator.
        mask: (...), bool: rows that are False count for nothing: zero loss, exactly zero gradient, not in the mean.
        reduction: "none", "mean" (over rows, weighted), "batchmean" (the sum over input.shape[0]) or "sum".
        normalizer: a number or a tensor of one element that replaces the mean's denominator, or divides the sum.
        out_dtype: dtype of the loss; by default input's, but float32 under autocast.
        inplace: the gradient may overwrite `input`, which must not be used afterwards.
        shard: a `VocabShard`, where each rank of a process group has some of the classes.

    Returns:
        A scalar, or with reduction="none" a tensor of shape (...).

    Raises:
        ValueError, RuntimeError, TypeError, NotImplementedError: naming the argument.

    Accuracy: in float32 the value is off by about 1e-8, a tenth of a KL of 1e-7, and may be below zero; torch's
    expression is off by several times that. The gradient does not suffer from it. `js_div_with_logits` keeps its
    digits.

    Memory: the gradient of `input`, and O(N + V) beyond it.

    >>> student, teacher = torch.zeros(2, 4), torch.tensor([[0.0, 1.0, 2.0, 3.0]]).expand(2, 4)
    >>> kl_div_with_logits(student, teacher)
    tensor(0.4388)
    """
    shape = (softcap, logit_scale, z_loss, temperature)
    weights = (token_weight, mask, reduction, normalizer, out_dtype, inplace, shard)
    return _divergence(input, target_logits, objective_of(direction), 0.5, shape, weights)


def objective_of(direction: str) -> Objective:
    """Of a KL."""
    if direction not in _DIRECTIONS:
        raise ValueError(f"direction: expected 'forward' or 'reverse', got {direction!r}")
    return _DIRECTIONS[direction]


@public_loss
def js_div_with_logits(
    input: Tensor,
    target_logits: Tensor,
    *,
    beta: float = 0.5,
    temperature: float = 1.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    z_loss: float = 0.0,
    token_weight: Tensor | None = None,
    mask: Tensor | None = None,
    reduction: str = "mean",
    normalizer: Tensor | float | None = None,
    out_dtype: torch.dtype | None = None,
    inplace: bool = False,
    shard: VocabShard | None = None,
) -> Tensor:
    r"""``beta * KL(q || m) + (1 - beta) * KL(p || m)``, ``m = beta * q + (1 - beta) * p``

    of each row, the generalised Jensen-Shannon divergence of Agarwal et al. 2024 (arXiv:2306.13649, section 2), with
    p = softmax(input / T) and q = softmax(target_logits / T). In the limits, where it vanishes, it is defined as what
    it tends to over beta or 1 - beta: beta = 0 is the forward KL(q || p), beta = 1 the reverse KL(p || q).

    Args:
        beta: in [0, 1].

    All else as in `kl_div_with_logits`. The loss keeps its digits as the student learns: in float32 it is off by about
    1e-5 of its value where that is 1e-7, and by 1e-3 where it is 1e-12. With 0 < beta < 1 the kernels' is never
    below zero.
    """
    shape = (softcap, logit_scale, z_loss, temperature)
    weights = (token_weight, mask, reduction, normalizer, out_dtype, inplace, shard)
    return _divergence(input, target_logits, *objective_of_beta(beta), shape, weights)


def objective_of_beta(beta: float) -> tuple[Objective, float]:
    """Of a JS, which in its limits is a KL."""
    if not isinstance(beta, (int, float)) or not 0 <= beta <= 1:
        raise ValueError(f"beta: expected a number in [0, 1], got {beta!r}")
    return Objective.FORWARD_KL if beta == 0 else Objective.REVERSE_KL if beta == 1 else Objective.JS, float(beta)


def _divergence(
    input: Tensor, target_logits: Tensor, objective: Objective, beta: float, shape: tuple[Any, ...], weights: Any
) -> Tensor:
    softcap, logit_scale, z_loss, temperature = shape
    token_weight, mask, reduction, normalizer, out_dtype, inplace, shard = weights
    x = arguments.classes_last(input)
    u = arguments.classes_last(arguments.beside(target_logits, "target_logits", input, input.shape), "target_logits")
    to = arguments.as_reduction(input, reduction, token_weight, mask, normalizer, out_dtype, KL_REDUCTIONS)
    if inplace:
        arguments.check_inplace(input, x)
    spec = make_spec(-100, 0.0, z_loss, softcap, logit_scale, objective, temperature, beta)
    loss = reduced_loss(Rows(x, u, None, spec), to, inplace, shard)
    return loss.reshape(input.shape[:-1]) if to.kind == "none" else loss
