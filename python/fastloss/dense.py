"""Elementwise losses, with weights that may be sparse.

Without sparse weights these are torch's own functions: reading both operands and writing one gradient is what they do,
and only fusing them with what comes before would save anything.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn import _reduction as _legacy

from .public import public

_SPARSE = (torch.sparse_coo, torch.sparse_csr)


@public
def kl_div(
    input: Tensor,
    target: Tensor,
    size_average: bool | None = None,
    reduce: bool | None = None,
    reduction: str = "mean",
    log_target: bool = False,
) -> Tensor:
    r"""``torch.nn.functional.kl_div(input, target, reduction=..., log_target=...)``

    of log-probabilities, exactly: torch's function. From logits, `kl_div_with_logits` reads both operands once and
    keeps neither set of log-probabilities.
    """
    return F.kl_div(input, target, size_average, reduce, reduction, log_target)


@public
def mse_loss(
    input: Tensor,
    target: Tensor,
    size_average: bool | None = None,
    reduce: bool | None = None,
    reduction: str = "mean",
    weight: Tensor | None = None,
) -> Tensor:
    r"""``torch.nn.functional.mse_loss(input, target, reduction=..., weight=...)``

    Args:
        input, target: alike in shape; dense, or (with a sparse weight) sparse with the weight's own pattern.
        weight: of input's shape, dense as in torch; or sparse COO or CSR: sum of w_ij (input_ij - target_ij) ** 2 over
            the entries that are stored, the only ones that are read.
        reduction: "none", "mean" (over the sum of the weights) or "sum". With a sparse weight "none" gives a sparse
            tensor of its layout and pattern.

    Raises:
        ValueError, RuntimeError: as torch, and for a pattern that is not the weight's.

    Memory: torch's; with a sparse weight O(stored entries), and the gradient of a dense input.
    """
    return _elementwise(F.mse_loss, torch.square, input, target, size_average, reduce, reduction, weight)


@public
def l1_loss(
    input: Tensor,
    target: Tensor,
    size_average: bool | None = None,
    reduce: bool | None = None,
    reduction: str = "mean",
    weight: Tensor | None = None,
) -> Tensor:
    r"""``torch.nn.functional.l1_loss(input, target, reduction=..., weight=...)``

    With a sparse `weight` the sparse-matrix loss, sum of w_ij |input_ij - target_ij| over the entries that are stored.
    Arguments, errors and memory as in `mse_loss`.
    """
    return _elementwise(F.l1_loss, torch.abs, input, target, size_average, reduce, reduction, weight)


@public
def binary_cross_entropy_with_logits(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    size_average: bool | None = None,
    reduce: bool | None = None,
    reduction: str = "mean",
    pos_weight: Tensor | None = None,
) -> Tensor:
    r"""``torch.nn.functional.binary_cross_entropy_with_logits(input, target, weight, reduction=..., pos_weight=...)``

    exactly: torch's function.
    """
    return F.binary_cross_entropy_with_logits(input, target, weight, size_average, reduce, reduction, pos_weight)


def _elementwise(
    dense: Callable[..., Tensor],
    of_difference: Callable[[Tensor], Tensor],
    input: Tensor,
    target: Tensor,
    size_average: bool | None,
    reduce: bool | None,
    reduction: str,
    weight: Tensor | None,
) -> Tensor:
    sparse = weight is not None and weight.layout in _SPARSE
    if not sparse:
        for name, x in (("input", input), ("target", target)):
            if x.layout in _SPARSE:
                raise ValueError(f"{name}: expected a dense tensor without a sparse weight, got {x.layout}")
        if weight is None or not torch.compiler.is_compiling():
            return dense(input, target, size_average, reduce, reduction, weight)
    assert weight is not None
    if size_average is not None or reduce is not None:
        reduction = _legacy.legacy_get_string(size_average, reduce)
    if reduction not in ("none", "mean", "sum"):
        raise ValueError(f"reduction: expected 'none', 'mean' or 'sum', got {reduction!r}")
    if not sparse:  # compiled: torch.compile forgets the weight of torch's own l1_loss (torch 2.13)
        if weight.shape != input.shape:
            raise ValueError(f"weight: expected input's shape {tuple(input.shape)}, got {tuple(weight.shape)}")
        stored, loss = weight, of_difference(input - target) * weight
    else:
        weight = weight.coalesce() if weight.layout is torch.sparse_coo else weight
        stored = weight.values()
        difference = _stored(input, "input", weight) - _stored(target, "target", weight)
        # An entry of no weight is none: zero times infinity is zero.
        loss = torch.where(stored == 0, 0, stored * of_difference(torch.where(stored == 0, 0, difference)))
    if reduction == "none":
        return _with_values(weight, loss) if sparse else loss
    return loss.sum() if reduction == "sum" else loss.sum() / stored.sum()


def _stored(x: Tensor, name: str, weight: Tensor) -> Tensor:
    """The entries of x where the weight has one, in its order."""
    if x.shape != weight.shape:
        raise ValueError(f"{name}: expected the weight's shape {tuple(weight.shape)}, got {tuple(x.shape)}")
    if x.layout not in _SPARSE:
        return x[_indices(weight)]
    if x.layout != weight.layout:
        raise ValueError(f"{name}: expected a dense tensor or the weight's layout {weight.layout}, got {x.layout}")
    x = x.coalesce() if x.layout is torch.sparse_coo else x
    if any(a.shape != b.shape or not torch.equal(a, b) for a, b in zip(_pattern(x), _pattern(weight), strict=True)):
        raise ValueError(f"{name}: expected the weight's pattern, got another")
    return x.values()


def _pattern(x: Tensor) -> tuple[Tensor, ...]:
    return (x.indices(),) if x.layout is torch.sparse_coo else (x.crow_indices(), x.col_indices())


def _indices(x: Tensor) -> tuple[Tensor, ...]:
    """For each stored entry, its place in a dense tensor."""
    if x.layout is torch.sparse_coo:
        return tuple(x.indices())
    if x.dim() != 2:
        raise ValueError(f"weight: expected a CSR matrix, got {x.dim()} dimensions")
    counts = x.crow_indices().diff()
    rows = torch.repeat_interleave(torch.arange(len(counts), device=x.device), counts)
    return rows, x.col_indices()


def _with_values(x: Tensor, values: Tensor) -> Tensor:
    if x.layout is torch.sparse_coo:
        return torch.sparse_coo_tensor(x.indices(), values, x.shape, is_coalesced=True)
    made: Any = torch.sparse_csr_tensor(x.crow_indices(), x.col_indices(), values, x.shape)
    return made
