"""Log-probabilities and other statistics of rows of logits: what losses written in plain torch are made of."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal, NamedTuple, overload

import torch
from torch import Tensor

from . import arguments, rows
from .evaluate import needs_reference, row_losses
from .parallel import VocabShard
from .parallel import rows as sharded
from .public import public_loss
from .rows import RowLoss
from .spec import COMPUTE_DTYPE, Objective, Rows, make_spec
from .strides import count_rows

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from .keywords import SelectiveKeywords


class RowStats(NamedTuple):
    """Statistics of each row in the compute dtype, (...): `lse`, `logit`, `log_prob` and `entropy` are differentiable,
    `argmax` and `rank` int64. Without a target `logit`, `log_prob` and `rank` are None. Of rows whose target is
    ignored, or where `row_mask` is False, all are 0 and have no gradient. The logits of such a row are not read."""

    lse: Tensor
    logit: Tensor | None
    log_prob: Tensor | None
    entropy: Tensor
    argmax: Tensor
    rank: Tensor | None


@public_loss
def row_stats(
    input: Tensor,
    target: Tensor | None = None,
    *,
    ignore_index: int = -100,
    temperature: float = 1.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    row_mask: Tensor | None = None,
    shard: VocabShard | None = None,
) -> RowStats:
    r"""``lse = z.logsumexp(-1)``, ``log_prob = z.log_softmax(-1).gather(-1, target[..., None])[..., 0]``,
    ``entropy = -(z.softmax(-1) * z.log_softmax(-1)).sum(-1)``, ``argmax = z.argmax(-1)``,
    ``rank = (z > logit[..., None]).sum(-1)``

    of z = softcap * tanh(logit_scale * input / softcap) / temperature, in one pass, for any loss that is a function of
    them. The backward takes one more pass, which writes the gradient of `input` and nothing else of its size.

    Args:
        input: logits (..., V); float32, bfloat16, float16 or float64, any strides as in `cross_entropy`.
        target: (...) class indices, or None.
        ignore_index: rows with a target of this index are left out. Without a target no row is.
        temperature, softcap, logit_scale: > 0.
        row_mask: (...) bool, or None. Rows where it is False are left out, too: their statistics are zero and so is
            their gradient. Their logits are not read, and may be NaN.
        shard: a `VocabShard`, where each rank of a process group has some of the classes; without `rank`.

    Returns:
        RowStats, float32 (float64 for float64 logits). `rank` 0 is the most probable class.

    Raises:
        IndexError: a class index out of range (on the CPU).  ValueError, RuntimeError, TypeError: naming the argument.

    Memory: O(N + V); in the backward the gradient.

    >>> stats = row_stats(torch.tensor([[0.0, 1.0, 3.0]]), torch.tensor([1]))
    >>> stats.rank, stats.log_prob
    (tensor([1]), tensor([-2.1698]))
    """
    rows = _stats_rows(input, target, row_mask, (ignore_index, temperature, softcap, logit_scale))
    shape = input.shape[:-1]
    if target is None and input.shape[-1] == 0 and shard is None:  # no class to list
        lse = input.to(COMPUTE_DTYPE[rows.input.dtype]).logsumexp(-1)
        lse = lse if row_mask is None else torch.where(row_mask, lse, 0)
        return RowStats(lse, None, None, lse - lse, torch.zeros_like(lse, dtype=torch.int64), None)
    row = row_losses(rows, extras=True, shard=shard)
    lse, log_prob, entropy, argmax = (t.reshape(shape) for t in row[1:5] if t is not None)
    if target is None:
        return RowStats(lse, None, None, entropy, argmax, None)
    rank, logit = (None if t is None else t.reshape(shape) for t in (row.rank, row.logit))
    return RowStats(lse, logit, log_prob, entropy, argmax, rank)


def _stats_rows(input: Tensor, target: Tensor | None, row_mask: Tensor | None, numbers: tuple[Any, ...]) -> Rows:
    """Checked rows of logits (..., V) for `row_stats`; numbers: ignore_index, temperature, softcap, logit_scale.
    Without a target each row lists one class of no probability: rows that are ignored would be left out."""
    x, (ignore_index, temperature, softcap, logit_scale) = arguments.classes_last(input), numbers
    counts = arguments.as_row_mask(row_mask, "row_mask", input.shape[:-1])
    objective = Objective.TOPK if target is None else Objective.INDEX
    spec = make_spec(ignore_index, 0.0, 0.0, softcap, logit_scale, objective, temperature)
    if target is not None:
        y = arguments.beside(target, "target", input, input.shape[:-1], integral=True).reshape(-1)
        return Rows(x, _masked(y, counts, spec.ignore_index), None, spec)
    spec = spec._replace(ignore_index=-100)  # which might be the class that is listed
    y = x.new_zeros((count_rows(x), 1), dtype=torch.int64)
    probs = x.new_zeros(y.shape, dtype=COMPUTE_DTYPE[x.dtype])
    return Rows(x, _masked(y, counts, spec.ignore_index), None, spec, probs)


def _masked(y: Tensor, counts: Tensor | None, ignore_index: int) -> Tensor:
    """Class indices (N,) or (N, K), ignored in rows that do not count (N,)."""
    if counts is None:
        return y
    return torch.where(counts if y.dim() == 1 else counts[:, None], y, ignore_index)


@public_loss
def softmax_entropy(
    input: Tensor,
    *,
    temperature: float = 1.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    row_mask: Tensor | None = None,
    shard: VocabShard | None = None,
) -> Tensor:
    r"""``-(input.softmax(-1) * input.log_softmax(-1)).sum(-1)``

    Args:
        input: logits (..., V). A class whose logit is -inf does not exist: 0 log 0 is 0.
        temperature, softcap, logit_scale, row_mask, shard: as in `row_stats`.

    Returns:
        (...), float32 (float64 for float64 logits), in nats, never below zero; differentiable.

    Memory: O(N + V); in the backward the gradient.
    """
    options: dict[str, Any] = {"temperature": temperature, "softcap": softcap, "logit_scale": logit_scale}
    return row_stats(input, **options, row_mask=row_mask, shard=shard).entropy


@overload
def selective_log_softmax(
    input: Tensor, index: Tensor, *, return_entropy: Literal[False] = ..., **keywords: Unpack[SelectiveKeywords]
) -> Tensor: ...


@overload
def selective_log_softmax(
    input: Tensor, index: Tensor, *, return_entropy: Literal[True], **keywords: Unpack[SelectiveKeywords]
) -> tuple[Tensor, Tensor]: ...


@public_loss
def selective_log_softmax(
    input: Tensor,
    index: Tensor,
    *,
    temperature: float = 1.0,
    return_entropy: bool = False,
    ignore_index: int = -100,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    row_mask: Tensor | None = None,
    shard: VocabShard | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    r"""``(input / temperature).log_softmax(-1).gather(-1, index)``

    without the (..., V) log-probabilities: the log-likelihood of chosen tokens, as RL (GRPO, PPO), DPO and scoring
    need.

    Args:
        input: logits (..., V); float32, bfloat16, float16 or float64, any strides as in `cross_entropy`.
        index: (...), one class of each row, or (..., K); int64, int32 or uint8. The result has its shape.
        temperature: > 0, divides the logits.
        return_entropy: also the entropy of each row, (...); differentiable.
        ignore_index: where the index is this, the result is 0 and has no gradient. A row of nothing else is left out:
            its entropy is 0, too.
        softcap, logit_scale: > 0, as in `cross_entropy`.
        row_mask: (...) bool, or None. Rows where it is False are left out: their results are zero and so is their
            gradient. Their logits are not read, and may be NaN.
        shard: a `VocabShard`, where each rank of a process group has some of the classes.

    Returns:
        log-probabilities, or (log-probabilities, entropy); float32 (float64 for float64 logits).

    Raises:
        IndexError: an index out of range (on the CPU).  ValueError, RuntimeError, TypeError: naming the argument.

    Memory: O(N K + V); in the backward the gradient.
    """
    chosen, expected = selective_rows(input, index, (ignore_index, temperature, softcap, logit_scale), row_mask)
    if chosen.probs is None:
        log_prob, entropy = of_one_class(row_losses(chosen, extras=return_entropy, shard=shard))
    elif shard is None:
        log_prob, entropy = rows.selected(*chosen[:2], chosen.spec, return_entropy, needs_reference(chosen))
    else:
        found = sharded.apply(chosen, shard, sharded.Asked(return_entropy, True))
        log_prob, entropy = sharded.selected(found, chosen)
    log_prob = log_prob.reshape(expected)
    return (log_prob, entropy.reshape(input.shape[:-1])) if return_entropy else log_prob


def of_one_class(row: RowLoss) -> tuple[Tensor, Tensor]:
    """The log-probability of each row's class, and the entropy if the rows were asked for extras."""
    log_prob = -row.loss if row.log_prob is None else row.log_prob
    return log_prob, log_prob if row.entropy is None else row.entropy


def selective_rows(
    input: Tensor, index: Tensor, numbers: tuple[Any, ...], row_mask: Tensor | None
) -> tuple[Rows, torch.Size]:
    """Checked rows of logits (..., V) and the classes (...) or (..., K) chosen of them, and the result's shape;
    numbers: ignore_index, temperature, softcap, logit_scale. `probs` is given where many are chosen."""
    ignore_index, temperature, softcap, logit_scale = numbers
    x, counts = arguments.classes_last(input), arguments.as_row_mask(row_mask, "row_mask", input.shape[:-1])
    many = isinstance(index, Tensor) and index.dim() == input.dim()
    expected = torch.Size((*input.shape[:-1], index.shape[-1])) if many else input.shape[:-1]
    y = arguments.beside(index, "index", input, expected, integral=True)
    objective = Objective.TOPK if many else Objective.INDEX
    spec = make_spec(ignore_index, 0.0, 0.0, softcap, logit_scale, objective, temperature)
    y = y.reshape(count_rows(x), index.shape[-1]) if many else y.reshape(-1)
    probs = x.new_zeros(y.shape, dtype=COMPUTE_DTYPE[x.dtype]) if many else None
    return Rows(x, _masked(y, counts, spec.ignore_index), None, spec, probs), expected
