"""Cross-entropy from hidden states and the weight of the last layer."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, Literal, overload

import torch
from torch import Tensor

from .. import arguments
from ..losses import CrossEntropyStats, stats_of
from ..parallel import VocabShard
from ..public import public_loss
from ..reduction import reduce_rows
from ..rows import RowLoss
from ..spec import REDUCTIONS, Objective, Reduction, Rows, make_spec
from . import heads
from .evaluate import per_row, reduced_loss
from .heads import MAX_CHUNK_BYTES, Head, LinearRows
from .options import chunk_rows

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from ..keywords import LinearCrossEntropyKeywords


@overload
def linear_cross_entropy(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    *,
    return_stats: Literal[True],
    **keywords: Unpack[LinearCrossEntropyKeywords],
) -> tuple[Tensor, CrossEntropyStats]: ...


@overload
def linear_cross_entropy(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    *,
    return_stats: Literal[False] = ...,
    **keywords: Unpack[LinearCrossEntropyKeywords],
) -> Tensor: ...


@public_loss
def linear_cross_entropy(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    *,
    linear_bias: Tensor | None = None,
    weight: Tensor | None = None,
    reduction: str = "mean",
    ignore_index: int | None = None,
    label_smoothing: float = 0.0,
    options: Any = None,
    z_loss: float = 0.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    token_weight: Tensor | None = None,
    mask: Tensor | None = None,
    normalizer: Tensor | float | None = None,
    out_dtype: torch.dtype | None = None,
    return_stats: bool = False,
    max_chunk_bytes: int = MAX_CHUNK_BYTES,
    filter_eps: float | None = None,
    shard: VocabShard | None = None,
) -> Tensor | tuple[Tensor, CrossEntropyStats]:
    r"""``F.cross_entropy(F.linear(input, linear_weight, linear_bias), target, weight, ...)``

    without the (N, C) logits: a drop-in for ``torch.nn.functional.linear_cross_entropy`` of torch 2.13, with everything
    that `fastloss.cross_entropy` has beyond torch. The logits of one chunk of rows exist at a time, and
    become the gradients of `input`, `linear_weight` and `linear_bias` before those of the next chunk are made. That
    takes three matmuls in all, and none for what needs no gradient.

    Rows without effect are left out: ignored rows, rows of no weight, and in a backward rows whose upstream gradients
    (of the loss and all statistics) are zero. On CPUs they are in no matmul. On GPUs their number is known on the
    device alone: Triton's matmuls (losses and statistics, and gradients with `filter_eps`) skip them, the library's
    take their hidden states for zeros. So NaN in such a row reaches no gradient.

    Args:
        input: hidden states (..., H); float32, bfloat16, float16 or float64, any strides.
        linear_weight: (C, H), of input's dtype (any under autocast, and is not copied on the CPU); or (C, d1, ..., dK,
            H) for logits (N, C, d1, ..., dK).
        target: class indices (...), int64, int32 or uint8, or class probabilities (..., C); with a linear_weight of
            more dimensions (N, d1, ..., dK) or (N, C, d1, ..., dK).
        linear_bias: (C), or (C, d1, ..., dK).
        weight, reduction, label_smoothing: as in `cross_entropy`.
        ignore_index: as in `cross_entropy`; None is -100, and the only one with class probabilities.
        options: a ``torch.nn.LinearCrossEntropyOptions``, or None. Its batch_chunk_size, or a chunking_method other
            than "auto", is the number of rows whose logits may exist at once. What the rest asks for is so anyway: sums
            are float32 (float64 for float64), and a wider acc_dtype raises; allow_retain_graph always holds.
        z_loss, softcap, logit_scale, token_weight, mask, normalizer, out_dtype, return_stats: as in `cross_entropy`.
        max_chunk_bytes: what logits, and the float32 sums of 16-bit gradients, may take at once; one row's always may.
            Packed operands of the products take a few MiB more. 16-bit weights of more than an eighth of it in numbers
            have their logits made once more, a fourth product.
        filter_eps: gradient filtering (Wijmans et al. 2024, arXiv:2411.09009, with 2**-12 for bfloat16).
            A tile of rows x classes of which every |softmax - target| is smaller counts as zero, and its part of the
            gradients' products is not computed. No entry of the logits' gradient is off by as much as filter_eps times
            the upstream gradient of its row (with several of a row, their absolute sum); docs/math.md measures what
            that does to input's. 0 is exact, and leaves out the rows that are ignored or weigh nothing, wherever they
            are; None, the default, takes them all, and one product less. On GPUs where Triton is, of class indices,
            16-bit input and linear_weight, not with `shard`; elsewhere the gradient is exact (`fastloss.explain` says
            which).
        shard: a `VocabShard`, where each rank of a process group has some rows of the last layer. Hidden states are the
            same on all ranks, and so is their gradient, which is summed over them.

    Returns:
        The loss: a scalar, or with reduction="none" of the class indices' shape. With return_stats, (loss, stats).

    Raises:
        IndexError: a class index out of range (on the CPU).  RuntimeError, ValueError, TypeError, NotImplementedError:
        as torch raises, naming the argument.

    Memory: the gradients, which the forward makes, and max_chunk_bytes; O(N) beyond them. A second backward, and every
    backward of reduction="none" or with return_stats, makes the logits again; so does checkpointing, and on CPUs the
    first backward with another loss scale if gradients are 16-bit. Double backward,
    ``torch.func`` and forward mode take torch's own operations, with all logits.

    >>> hidden, head = torch.zeros(2, 3), torch.zeros(4, 3)
    >>> linear_cross_entropy(hidden, head, torch.tensor([1, -100]))
    tensor(1.3863)
    """
    if reduction not in REDUCTIONS:
        raise ValueError(f"reduction: {reduction!r} is not a valid value for reduction ('none', 'mean' or 'sum')")
    arguments.check_linear(input, linear_weight, linear_bias, positions=True)
    if not isinstance(target, Tensor):
        raise TypeError(f"argument 'target' must be Tensor, not {type(target).__name__}")
    shape = torch.Size((*input.shape[:-1], *linear_weight.shape[:-1]))  # of the logits
    if ignore_index is not None and arguments.equal_shapes(target.shape, shape):
        raise RuntimeError("ignore_index cannot be specified when target contains probabilities")
    soft, index = target.is_floating_point(), -100 if ignore_index is None else ignore_index
    spec = make_spec(index, label_smoothing, z_loss, softcap, logit_scale, Objective.PROBS if soft else Objective.INDEX)
    head = Head(input, linear_weight, linear_bias)
    logits = heads.stand_in(head)
    x, y = arguments.as_rows(*_class_second(logits, target, linear_weight.dim() > 2), spec.ignore_index)
    if weight is not None:
        weight = arguments.as_class_weights(weight, logits, y, x.shape[-1], spec, reduction)
    losses = shape[:-1] if linear_weight.dim() == 2 else shape[:1] + shape[2:]
    if token_weight is not None:
        token_weight = arguments.check_token_weight(token_weight, x, losses)
    if mask is not None:
        y, token_weight = arguments.leave_out(mask, losses, x, y, token_weight, spec.ignore_index)
    if normalizer is not None:
        normalizer = arguments.as_normalizer(normalizer, x, reduction)
    to = Reduction(reduction, token_weight, normalizer, arguments.loss_dtype(logits, target, weight, out_dtype))
    filter_eps = arguments.check_filter_eps(filter_eps)
    if filter_eps is not None and shard is not None:
        raise ValueError("filter_eps: expected None with shard, whose gradient is exact")
    limits = heads.room(head, max_chunk_bytes, False, chunk_rows(options, head), shard)
    rows = Rows(x.flatten(0, -2), y, weight, spec)
    parts = [LinearRows(some, part, None, *limits, filter_eps) for some, part in _parts(rows, head)]
    if not return_stats and len(parts) == 1:
        loss = reduced_loss(parts[0], to, shard)
        return loss.reshape(losses) if reduction == "none" else loss
    each = [per_row(part, return_stats, shard) for part in parts]
    row = each[0] if len(each) == 1 else _interleaved(each)
    loss = reduce_rows(row.loss, rows, to, row.target_weight).to(to.dtype)
    loss = loss.reshape(losses) if reduction == "none" else loss
    return (loss, stats_of(row, rows, losses, mask)) if return_stats else loss


def _class_second(logits: Tensor, target: Tensor, positions: bool) -> tuple[Tensor, Tensor]:
    """Logits (..., C) and their target as cross_entropy takes them, where they are not already."""
    if positions or logits.dim() < 3:
        return logits, target
    if arguments.equal_shapes(target.shape, logits.shape):
        return logits.movedim(-1, 1), target.movedim(-1, 1)
    if target.shape != logits.shape[:-1]:
        raise ValueError(
            f"target: expected shape {tuple(logits.shape[:-1])} (class indices) or {tuple(logits.shape)} (class "
            f"probabilities), got {tuple(target.shape)}"
        )
    return logits.flatten(0, -2), target.flatten()


def _parts(rows: Rows, head: Head) -> list[tuple[Rows, Head]]:
    """The rows by the classifier they belong to: one of (C, H), or of (C, d1, ..., dK, H) one for each position; row
    i * positions + d is hidden state i's."""
    hidden, weight, bias = heads.flattened(head)
    if weight.dim() == 2:
        return [(rows, Head(hidden, weight, bias))]
    D = math.prod(weight.shape[1:-1])
    if D == 0:
        return [(rows, Head(hidden[:0], weight.new_empty(weight.shape[0], hidden.shape[1]), None))]
    # Unbound rather than indexed: gradients are stacked once, not added to zeros for each.
    weights = weight.flatten(1, -2).unbind(1)
    biases = [None] * D if bias is None else bias.flatten(1).unbind(1)
    target = rows.flat().target
    return [
        (rows._replace(input=rows.input[d::D], target=target[d::D]), Head(hidden, weights[d], biases[d]))
        for d in range(D)
    ]


def _interleaved(each: list[RowLoss]) -> RowLoss:
    """(N,) of each position to (N * positions,)."""
    loss, *more = (None if f[0] is None else torch.stack(f, 1).flatten() for f in zip(*each, strict=True))
    assert loss is not None
    return RowLoss(loss, *more)
