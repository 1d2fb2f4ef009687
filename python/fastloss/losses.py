"""The losses that users call."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal, NamedTuple, overload

import torch
from torch import Tensor
from torch.nn import _reduction as _legacy

from . import arguments
from .evaluate import reduced_loss, row_losses
from .parallel import VocabShard
from .public import public_loss
from .reduction import reduce_rows, valid_rows
from .rows import RowLoss
from .saved import savable
from .spec import REDUCTIONS, Objective, Reduction, Rows, make_spec

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from .keywords import CrossEntropyKeywords


class CrossEntropyStats(NamedTuple):
    """Per-target statistics in the compute dtype, shaped like the unreduced loss.

    `lse`, `log_prob` and `entropy` are differentiable. With class probabilities `log_prob` is their expectation
    sum q log p (q weighted and smoothed as in the loss) and `correct` is None. Where the target is ignored, all are 0,
    `correct` False, and none has a gradient. The logits of such a row are not read, and may be NaN.
    """

    lse: Tensor
    log_prob: Tensor
    entropy: Tensor
    argmax: Tensor
    correct: Tensor | None


@overload
def cross_entropy(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = ...,
    *of_torch: Any,
    return_stats: Literal[True],
    **keywords: Unpack[CrossEntropyKeywords],
) -> tuple[Tensor, CrossEntropyStats]: ...


@overload
def cross_entropy(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = ...,
    *of_torch: Any,
    return_stats: Literal[False] = ...,
    **keywords: Unpack[CrossEntropyKeywords],
) -> Tensor: ...


@public_loss  # type: ignore[misc]  # *of_torch are at most five
def cross_entropy(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    size_average: bool | None = None,
    ignore_index: int = -100,
    reduce: bool | None = None,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    *,
    z_loss: float = 0.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    token_weight: Tensor | None = None,
    mask: Tensor | None = None,
    normalizer: Tensor | float | None = None,
    out_dtype: torch.dtype | None = None,
    inplace: bool = False,
    return_stats: bool = False,
    shard: VocabShard | None = None,
) -> Tensor | tuple[Tensor, CrossEntropyStats]:
    r"""``torch.nn.functional.cross_entropy(input, target, weight, ignore_index=..., reduction=..., ...)``

    with the same arguments, shapes, defaults, result and exceptions, and beyond torch:
    ``F.cross_entropy(softcap * tanh(logit_scale * input / softcap), target) + z_loss * logsumexp(...) ** 2``.

    Args:
        input: logits (C), (N, C) or (N, C, d1, ..., dK); float32, bfloat16, float16 or float64, any strides: read where
            they lie, and copied only where classes are not contiguous in memory or rows lie at more than two strides
            (those of x[:, :-1] and x.transpose(0, 1) lie at two). Sums are float32 (float64 for float64). A logit of
            -inf is a class that does not exist: gradient exactly zero.
        target: class indices (), (N) or (N, d1, ..., dK) in [0, C), int64, int32 or uint8; or class probabilities of
            input's shape, floating point, any strides as input's.
        weight: (C), one weight per class, of input's dtype. A mean divides by the summed weights of the targets.
        size_average, reduce: deprecated, as in torch.
        ignore_index: targets of this index have zero loss, zero statistics and exactly zero gradient.
        reduction: "none", "mean" or "sum". The mean of no target at all is NaN, its gradient zero.
        label_smoothing: eps in [0, 1]; the target becomes (1 - eps) one_hot + eps / C (Szegedy et al. 2016,
            arXiv:1512.00567, section 7).
        z_loss: adds z_loss * lse ** 2 per target, lse the log-partition (PaLM, arXiv:2204.02311, section 5: 1e-4).
        softcap: replaces the scaled logits z by softcap * tanh(z / softcap), softcap > 0 (Gemma 2, arXiv:2408.00118).
        logit_scale: multiplies the logits first, > 0: an inverse temperature.
        token_weight: (N) or target's shape: multiplies each target's loss, and counts in the mean's denominator.
        mask: bool, of the shape of the class indices. Where it is False a target counts for nothing, as an ignored one.
        normalizer: a number or a tensor of one element that replaces the mean's denominator, or divides the sum: the
            ``num_items_in_batch`` of trainers. On its device, never synchronised.
        out_dtype: dtype of the loss; by default torch's: input's, but float32 under autocast.
        inplace: the gradient may overwrite the logits. Whatever else saved them for its backward raises; they must not
            be used afterwards.
        return_stats: also returns `CrossEntropyStats`, computed in the same pass.
        shard: a `VocabShard`, where each rank of a process group has some of the classes.

    Returns:
        The loss: a scalar, or with reduction="none" the shape of the class indices. With return_stats, (loss, stats).

    Raises:
        IndexError: a class index out of range (on the CPU).  RuntimeError, ValueError, TypeError, NotImplementedError:
        as torch raises, naming the argument.

    Memory: the gradient, made with the loss where a mean or sum is differentiated, and O(N) beyond it, O(C) per thread.

    >>> logits, labels = torch.zeros(2, 4), torch.tensor([1, -100])
    >>> cross_entropy(logits, labels)
    tensor(1.3863)
    """
    if size_average is not None or reduce is not None:
        reduction = _legacy.legacy_get_string(size_average, reduce)
    if reduction not in REDUCTIONS:
        raise ValueError(f"reduction: {reduction!r} is not a valid value for reduction ('none', 'mean' or 'sum')")
    if not (isinstance(input, Tensor) and isinstance(target, Tensor)):
        name, value = ("target", target) if isinstance(input, Tensor) else ("input", input)
        raise TypeError(f"argument '{name}' must be Tensor, not {type(value).__name__}")
    objective = Objective.PROBS if target.is_floating_point() else Objective.INDEX
    spec = make_spec(ignore_index, label_smoothing, z_loss, softcap, logit_scale, objective)
    x, y = arguments.as_rows(input, target, spec.ignore_index)
    if weight is not None:
        weight = arguments.as_class_weights(weight, input, y, x.shape[-1], spec, reduction)
    if token_weight is not None:
        token_weight = arguments.check_token_weight(token_weight, x, _row_shape(input, target))
    if mask is not None:
        y, token_weight = arguments.leave_out(mask, _row_shape(input, target), x, y, token_weight, spec.ignore_index)
    if normalizer is not None:
        normalizer = arguments.as_normalizer(normalizer, x, reduction)
    if inplace:
        arguments.check_inplace(input, x)
    rows = Rows(x, y, weight, spec)
    to = Reduction(reduction, token_weight, normalizer, arguments.loss_dtype(input, target, weight, out_dtype))
    if not return_stats:
        loss = reduced_loss(rows, to, inplace, shard)
        return loss.reshape(_row_shape(input, target)) if reduction == "none" else loss
    row = row_losses(rows, True, inplace, shard)
    loss, shape = reduce_rows(row.loss, rows, to, row.target_weight).to(to.dtype), _row_shape(input, target)
    return loss.reshape(shape) if reduction == "none" else loss, stats_of(row, rows, shape, mask)


def _row_shape(input: Tensor, target: Tensor) -> torch.Size:
    """The shape of the unreduced loss."""
    if not arguments.equal_shapes(target.shape, input.shape):
        return target.shape if input.dim() > 1 else torch.Size(())
    return input.shape[:1] + input.shape[2:] if input.dim() > 1 else torch.Size(())


def stats_of(row: RowLoss, rows: Rows, shape: torch.Size, mask: Tensor | None) -> CrossEntropyStats:
    """What return_stats gives, from the rows' statistics; zero where the mask is False."""
    valid = valid_rows(rows)
    correct = None if valid is None else ((row.argmax == rows.target) & valid).reshape(shape)
    each = (t.reshape(shape) for t in row[1:5] if t is not None)
    lse, log_prob, entropy, argmax = each if mask is None else (torch.where(savable(mask), t, 0) for t in each)
    return CrossEntropyStats(lse, log_prob, entropy, argmax, correct)
