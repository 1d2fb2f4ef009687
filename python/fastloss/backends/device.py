"""The torch side that the GPU backends share: allocations, the order of launches, what is skipped.

A backend brings `Kernels`: functions that only launch, on the current stream of the tensors' device. Nothing here or
there waits for the device, so that a training step can be captured in a CUDA graph; but for what triton/tuning.py times
in the first call of a kind.

A row's bits depend on the row, the options and the device alone: not on the batch around it, nor on its place in it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from ..spec import COMPUTE_DTYPE, Objective, Reduction, Rows
from .native import readable

STATE_FIELDS = 5  # csrc/row_state.h: centre, sum, moment, plain, mass
STATS = 5  # centre, log_sum, log_prob, mass, entropy; of other objectives what their kernels put there


def captures(device: torch.device) -> bool:
    """Whether what is launched there now only goes into a CUDA graph, to be run by its replays."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


class Passing(str):
    """Why a backend cannot run a call now, which may pass: the device's memory is full, its driver busy."""


class Upstream(NamedTuple):
    """Upstream gradients, in the compute dtype: (N,) of any stride, or None for zero. That of the loss may be a number,
    and is multiplied by the row's `token_weight` (N,) and divided by `denominator` (), where given."""

    loss: Tensor | float
    lse: Tensor | None = None
    log_prob: Tensor | None = None
    entropy: Tensor | None = None
    token_weight: Tensor | None = None
    denominator: Tensor | None = None


class Tiles(NamedTuple):
    """Which tiles of a gradient of logits are not zero: `kept` (tiles down, tiles across), 1 or 0, of `size` each."""

    kept: Tensor
    size: tuple[int, int]
    product: Callable[..., None]
    transposed: bool = False

    def t(self) -> Tiles:
        """Of the gradient's transpose."""
        return Tiles(self.kept.t(), self.size[::-1], self.product, not self.transposed)

    def matmul(self, grad: Tensor, other: Tensor, out: Tensor, add: bool = False) -> None:
        """See products.matmul; tiles of zero cost nothing."""
        other = other.detach() if other.stride(-1) == 1 else other.detach().contiguous()
        if out.numel():
            self.product(grad, self, other, out, add)


class Kernels(NamedTuple):
    """What a backend launches. Outputs are allocated by the caller; every row is written."""

    # can a row stay on chip?
    on_chip: Callable[[Rows], bool]
    # (rows, loss (N,), stats (STATS, N), argmax (N,) and rank (N,) or None); with argmax all of stats; of a JS a last
    # argument whether stats holds those of whole rows, of which these are a part
    row_stats: Callable[..., None]
    # (rows, stats, upstream, grad (..., V), unless_one): with `unless_one` nothing is written if upstream.loss is one
    row_grad: Callable[[Rows, Tensor, Upstream, Tensor, bool], None]
    # (rows, upstream, loss (N,), grad (..., V), unless_one): each row's gradient while the row is on chip
    row_loss_grad: Callable[[Rows, Upstream, Tensor, Tensor, bool], None]
    # (rows, token_weight, out ()): what a mean divides by, the summed weights of the rows that count
    denominator: Callable[[Rows, Tensor | None, Tensor], None]
    # (loss (N,), token_weight, denominator, out ()): the weighted sum, over the denominator if there is one
    total: Callable[[Tensor, Tensor | None, Tensor | None, Tensor], None]
    # (grad, upstream ()): grad *= upstream, untouched if that is one
    rescale: Callable[[Tensor, Tensor], None]
    # (rows, hidden, head): can logits stay on chip that are the product of these?
    takes_head: Callable[[Rows, Tensor, Tensor], bool] | None = None
    # (rows, hidden, head, bias, loss, stats, argmax, order): row_stats of rows that have no logits in memory, taken in
    # an order (N,)
    head_stats: Callable[..., None] | None = None
    # (rows, upstream): the height and width of head_grad's tiles
    head_tiles: Callable[[Rows, Upstream], tuple[int, int]] | None = None
    # (rows, hidden, head, bias, stats, upstream, grad, kept or None, filter_eps): row_grad of such rows; `kept` says of
    # which tiles an entry is not smaller than filter_eps times upstream, the others are zero
    head_grad: Callable[..., None] | None = None
    # (grad, tiles, other, out, add): out (M, H) = or += grad (M, K) @ other (K, H), by the tiles that are kept alone
    kept_product: Callable[[Tensor, Tiles, Tensor, Tensor, bool], None] | None = None


def _same_dtype(rows: Rows) -> Rows:
    """Logits and target logits are read alike: the narrower ones are copied where they are not of one dtype."""
    if not rows.spec.objective.paired or rows.target.dtype == rows.input.dtype:
        return readable(rows)
    dtype = torch.promote_types(rows.input.dtype, rows.target.dtype)
    return readable(rows._replace(input=rows.input.to(dtype), target=rows.target.to(dtype)))


def _empty_grad(input: Tensor) -> Tensor:
    return torch.empty_like(input) if input.is_contiguous() else input.new_empty(input.shape)


def _stats(
    kernels: Kernels, rows: Rows, extras: bool, whole: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    N = rows.N
    ranked = extras and rows.spec.objective == Objective.INDEX
    loss = rows.input.new_empty(N, dtype=rows.compute_dtype)
    stats = rows.input.new_empty((STATS, N), dtype=rows.compute_dtype) if whole is None else whole.clone()
    argmax, rank = (rows.input.new_empty(N if wanted else 0, dtype=torch.int64) for wanted in (extras, ranked))
    if N:
        second_round = () if whole is None else (True,)
        kernels.row_stats(rows, loss, stats, argmax if extras else None, rank if ranked else None, *second_round)
    return loss, stats, argmax, rank


def row_loss(
    kernels: Kernels, rows: Rows, extras: bool, whole: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """See native.row_loss."""
    return _stats(kernels, _same_dtype(rows), extras, whole)


def takes_head(kernels: Kernels, rows: Rows, hidden: Tensor, head: Tensor) -> bool:
    """Whether head_loss computes rows like these."""
    return kernels.takes_head is not None and kernels.takes_head(rows, hidden, head)


def head_loss(
    kernels: Kernels, rows: Rows, hidden: Tensor, head: Tensor, bias: Tensor | None, extras: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Losses, statistics and argmax of rows whose logits are never written; of classes that targets list none."""
    assert kernels.head_stats is not None
    given = _readable_head(rows, hidden, head, bias)
    N, new, F = hidden.shape[0], hidden.new_empty, rows.compute_dtype
    loss, stats, argmax = new(N, dtype=F), new((STATS, N), dtype=F), new(N if extras else 0, dtype=torch.int64)
    if N:
        # Tiles of a product hold either rows that count or rows that are ignored, of which there are no logits.
        order = set_first(rows.target != rows.spec.ignore_index)
        kernels.head_stats(*given, loss, stats, argmax if extras else None, order)
    return loss, stats, argmax, new((N, 0), dtype=F)


def set_first(flags: Tensor) -> Tensor:
    """The order along the last dimension in which those that are set come first; nothing is waited for."""
    return flags.to(torch.int8).argsort(descending=True, stable=True)


def _readable_head(
    rows: Rows, hidden: Tensor, head: Tensor, bias: Tensor | None
) -> tuple[Rows, Tensor, Tensor, Tensor | None]:
    """As the kernels take them."""
    hidden, head = (t.detach() if t.stride(-1) == 1 else t.detach().contiguous() for t in (hidden, head))
    weight = None if rows.weight is None else rows.weight.detach().to(rows.compute_dtype).contiguous()
    bias = None if bias is None else bias.detach().contiguous()
    return rows._replace(target=rows.target.contiguous(), weight=weight), hidden, head, bias


def head_grad(
    kernels: Kernels,
    rows: Rows,
    hidden: Tensor,
    head: Tensor,
    bias: Tensor | None,
    stats: Tensor,
    upstream: list[Tensor | None],
    out: Tensor,
    filter_eps: float | None,
) -> Tiles | None:
    """row_grad of rows whose logits are never written; and with a filter_eps which tiles of it are not zero."""
    assert kernels.head_grad is not None and kernels.head_tiles is not None and kernels.kept_product is not None
    factors, tiles = _factors(upstream, stats.dtype), None
    if filter_eps is not None and out.numel():
        size = kernels.head_tiles(rows, factors)
        shape = [-(-length // side) for length, side in zip(out.shape, size, strict=True)]
        tiles = Tiles(out.new_empty(shape, dtype=torch.int8), size, kernels.kept_product)
    if out.numel():
        given = _readable_head(rows, hidden, head, bias)
        kernels.head_grad(*given, stats, factors, out, None if tiles is None else tiles.kept, filter_eps or 0.0)
    return tiles


def _factors(upstream: list[Tensor | None], dtype: torch.dtype) -> Upstream:
    """Upstream gradients of losses and statistics, as kernels take them."""
    loss, *others = (None if g is None else g.to(dtype) for g in upstream)
    return Upstream(0.0 if loss is None else loss, *others)


def row_grad(
    kernels: Kernels, rows: Rows, stats: Tensor, upstream: list[Tensor | None], out: Tensor | None = None
) -> Tensor:
    """See reference.row_grad."""
    wide = _same_dtype(rows)
    grad = _empty_grad(wide.input) if out is None or out.dtype != wide.input.dtype else out
    if grad.numel():
        kernels.row_grad(wide, stats, _factors(upstream, stats.dtype), grad, False)
    return _narrowed(grad, rows.input.dtype, out)


def _narrowed(grad: Tensor, dtype: torch.dtype, out: Tensor | None) -> Tensor:
    """The gradient as the caller wants it, where the kernels wrote it in a wider dtype."""
    if grad.dtype == dtype:
        return grad
    return grad.to(dtype) if out is None else out.copy_(grad)


def row_loss_grad(
    kernels: Kernels,
    rows: Rows,
    to: Reduction,
    upstream: float | Tensor,
    need_grad: bool,
    out: Tensor | None = None,
    stats: Tensor | None = None,
    scale: Tensor | None = None,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """The reduced loss; its gradient, `upstream` times, or a `scale` () that is on the device; and, where the rows did
    not stay on chip, their statistics, to be given back with another upstream. With a tensor upstream and an `out` that
    holds the gradient for an upstream of one, the device decides whether there is anything left to do, and the loss is
    not computed again."""
    given, rows = rows.input, _same_dtype(rows)
    N = rows.N
    token_weight = None if to.token_weight is None else to.token_weight.contiguous()
    denominator = to.normalizer
    if denominator is None and to.kind == "mean":
        denominator = given.new_empty((), dtype=rows.compute_dtype)
        kernels.denominator(rows, token_weight, denominator)
    grad, again, wider = out, isinstance(upstream, Tensor), rows.input.dtype != given.dtype
    if need_grad and (grad is None or wider):
        grad = _empty_grad(rows.input if wider else given)
    upstream = upstream if scale is None else scale
    if isinstance(upstream, Tensor):
        upstream = upstream.to(rows.compute_dtype).expand(N)
    factors = Upstream(upstream, token_weight=token_weight, denominator=denominator)
    unless_one = again and out is not None and not wider
    loss = None
    if grad is not None and given.numel() and kernels.on_chip(rows):
        loss = given.new_empty(N, dtype=rows.compute_dtype)
        kernels.row_loss_grad(rows, factors, loss, grad, unless_one)
    else:
        if stats is None:
            loss, stats, *_ = _stats(kernels, rows, False)
        if grad is not None and given.numel():
            kernels.row_grad(rows, stats, factors, grad, unless_one)
    total = given.new_empty((), dtype=to.dtype if to.dtype in COMPUTE_DTYPE else rows.compute_dtype)
    if loss is not None and not again:
        kernels.total(loss, token_weight, denominator, total)
    return total.to(to.dtype), None if grad is None else _narrowed(grad, given.dtype, out), stats


def rescale(kernels: Kernels, grad: Tensor, upstream: Tensor) -> Tensor:
    """grad *= upstream, in place; nothing is touched if that is one."""
    if grad.numel():
        kernels.rescale(grad, upstream.to(COMPUTE_DTYPE[grad.dtype]))
    return grad
