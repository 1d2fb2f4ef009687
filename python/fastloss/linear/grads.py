"""The gradients of a head: a chunk's logits become their own gradient where they are, and that the gradients of hidden
states, weight and bias, before the next chunk is made.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..backends import Backend
from ..backends.device import Tiles
from ..parallel.merge import Part, Whole
from ..parallel.rows import gradients
from ..reduction import reduce_rows
from ..spec import COMPUTE_DTYPE, Reduction, Rows
from .chunks import Chunk, chunks, counting_first, row_loss, without_effect
from .heads import Head, LinearRows, empty, filters, grads_on_chip, on_chip

Factors = Sequence[Tensor | None]
NO_FACTORS: Factors = (None, None, None)


class HeadGrads:
    """The gradients of hidden states (N, H), weight (V, H) and bias (V,), each times its factor (), if it has one, and
    only where it is needed, else empty. The first is complete with its chunk, in its own dtype; the others are summed
    over chunks in the compute dtype. Factors come before the rounding. `begin_sum` begins the sum over ranks of what a
    chunk has of the first, and returns what is to be waited for: not before the next chunk is made."""

    def __init__(
        self,
        head: Head,
        needs: list[bool],
        matmul: Callable[..., None],
        factors: Factors = NO_FACTORS,
        begin_sum: Callable[[Tensor], Any] | None = None,
    ) -> None:
        self.head, self.needs, self.matmul, self.started = head, needs, matmul, False
        self.factors, self.begin_sum = factors, begin_sum
        self.under_way = deque[tuple[Any, slice | Tensor, Tensor]]()
        self.new = partial(empty, dtype=COMPUTE_DTYPE[head.dtype()], device=head.hidden.device)
        own, weight, bias = head.grad_shapes(needs)
        self.hidden = empty(own, head.hidden.dtype, head.hidden.device)
        self.weight, self.bias = self.new(weight), self.new(bias)

    def add(self, chunk: Chunk, tiles: Tiles | None = None) -> None:
        """What a chunk's rows contribute, whose logits have become their gradient, or those `tiles` of it."""
        where, hidden, dlogits = chunk.where, chunk.hidden, chunk.rows.input
        matmul, matmul_t = (self.matmul, self.matmul) if tiles is None else (tiles.matmul, tiles.t().matmul)
        if self.needs[0]:
            part = self.hidden[where] if self._in_place(where) else self.new(tuple(hidden.shape))
            matmul(dlogits, self.head.weight, part)
            self.under_way.append((None if self.begin_sum is None else self.begin_sum(part), where, part))
            self._put(len(self.under_way) - (self.begin_sum is not None))
        if self.needs[1]:
            # Zero times NaN is NaN: the gradient of idle rows' logits is zero, but their hidden states may be NaN.
            hidden = hidden if chunk.idle is None else hidden.masked_fill(chunk.idle[:, None], 0)
            matmul_t(dlogits.t(), hidden, self.weight, self.started)
        if self.needs[2]:
            total = dlogits.sum(0, dtype=self.bias.dtype)
            self.bias = self.bias + total if self.started else total
        self.started = True

    def _in_place(self, where: slice | Tensor) -> bool:
        return isinstance(where, slice) and self.hidden.dtype == self.weight.dtype

    def _put(self, count: int) -> None:
        """The gradients of hidden states that came first to where they belong."""
        for _ in range(count):
            work, where, part = self.under_way.popleft()
            if work is not None:
                work.wait()
            if self.factors[0] is not None:
                part.mul_(self.factors[0])
            if not self._in_place(where):
                self.hidden[where] = part.to(self.hidden.dtype)

    def result(self, skipped: Tensor | None) -> list[Tensor]:
        """The three; rows that were `skipped` (N,) have a gradient of zero."""
        self._put(len(self.under_way))
        if not self.started:
            self.weight.zero_()
            self.bias.zero_()
        if skipped is not None and self.needs[0]:
            self.hidden.masked_fill_(skipped[:, None], 0)  # an index would wait for their number
        for total, factor in zip((self.weight, self.bias), self.factors[1:], strict=True):
            if factor is not None:
                total.mul_(factor)
        return [self.hidden, self.weight, self.bias]


def loss_and_grads(
    given: LinearRows, to: Reduction, needs: list[bool], upstream: Tensor | None = None
) -> tuple[Tensor, list[Tensor]]:
    """The summed loss () over the normalizer, and what it gives to the head: of what is rounded here (16-bit hidden
    states) for an upstream gradient () or one, of the rest for one."""
    backend, rows, wanted = given.backend(), given.rows, any(needs)
    if on_chip(given, backend) and not wanted:
        return summed(row_loss(given, False, None, to.token_weight)[0], rows, to), no_grads(given)
    inside, scale, factors = scaled(
        given, backend, to, upstream, [given.head.hidden.dtype != rows.compute_dtype, False]
    )
    if wanted and filters(given, backend):  # four products, but two of them of few tiles
        loss, stats, *_ = row_loss(given, False, None, to.token_weight)
        of_rows: list[Tensor | None] = [upstream_of(rows, inside, scale), None, None, None]
        return summed(loss, rows, to), row_grads(given, stats, of_rows, needs, factors)
    grads, skipped = HeadGrads(given.head, needs, backend.matmul, factors), without_effect(rows, to.token_weight)
    total, over = given.head.hidden.new_zeros((), dtype=rows.compute_dtype), False
    for chunk in chunks(given, backend, skipped):
        of_chunk = inside._replace(token_weight=chunk.of(to.token_weight))
        total += _chunk_loss(backend, chunk.rows, of_chunk, wanted, scale)
        over = inside.normalizer is not None
        if wanted:
            grads.add(chunk)
    if to.normalizer is not None and not over:
        total = total / to.normalizer  # NaN where it is the mean of nothing
    return total, grads.result(skipped)


def logits_dtype(given: LinearRows, backend: Backend) -> torch.dtype:
    """What logits, and their gradients, are rounded to."""
    return backend.logits_dtype(given.head.hidden.dtype, given.head.weight.dtype)


def scaled(
    given: LinearRows, backend: Backend, to: Reduction, upstream: Tensor | None, rounded: list[bool]
) -> tuple[Reduction, Tensor | None, Factors]:
    """The reduction as gradients of logits have it, a scale () of those, and the factors of their sums: with the
    upstream gradient where the gradient of hidden states, or of the weight, is `rounded` here.

    Where logits are 16-bit a product is rounded before any factor comes to it, which must then be a power of two: the
    rest of it reaches the logits. So does all of it in float16 if it makes them larger, as in torch; but normalizers,
    which make them next to nothing there, do not."""
    dtype = logits_dtype(given, backend)
    half = dtype == torch.float16  # which has few exponents
    if dtype.itemsize > 2 or (upstream is None and not (half and to.normalizer is not None)):
        return to, None, [upstream if r else None for r in (*rounded, False)]
    whole = inverse = given.head.hidden.new_ones((), dtype=given.rows.compute_dtype)
    if half and to.normalizer is not None:  # zero where nothing counts, and so are the gradients
        whole = inverse = 1 / torch.where(to.normalizer == 0, 1, to.normalizer)
    if upstream is not None:
        whole = whole * upstream
    mantissa = 2 * torch.frexp(whole)[0]
    scale = torch.where(mantissa == 0, 1, torch.where(whole.abs() < 1, mantissa, whole) if half else mantissa)
    factors = [(whole if r else inverse) / scale for r in (*rounded, False)]
    return to._replace(normalizer=None) if half else to, scale, factors


def summed(loss: Tensor, rows: Rows, to: Reduction) -> Tensor:
    """Of losses (N,), as the kernels of rows sum them."""
    return reduce_rows(loss.double(), rows, to).to(rows.compute_dtype)


def no_grads(given: LinearRows) -> list[Tensor]:
    """Where none is needed."""
    return HeadGrads(given.head, [False, False, False], given.backend().matmul).result(None)


def _chunk_loss(backend: Backend, rows: Rows, to: Reduction, overwrite: bool, scale: Tensor | None) -> Tensor:
    """The reduced loss; the gradient of the logits, if wanted, in their place, times a scale."""
    out = rows.input if overwrite else None
    if backend.row_loss_grad is not None:
        return backend.row_loss_grad(rows, to, 1.0, overwrite, out, scale=scale)[0]
    loss, stats, *_ = backend.row_loss(rows, False)
    if overwrite:
        backend.row_grad(rows, stats, [upstream_of(rows, to, scale), None, None, None], out)
    return reduce_rows(loss, rows, to)


def upstream_of(rows: Rows, to: Reduction, scale: Tensor | None = None) -> Tensor:
    """What the reduced loss, times a scale, gives to losses (N,)."""
    upstream = to.token_weight
    if upstream is None:
        upstream = torch.ones(rows.input.shape[0], dtype=rows.compute_dtype, device=rows.input.device)
    upstream = upstream if to.normalizer is None else upstream / to.normalizer
    return upstream if scale is None else upstream * scale


def row_grads(
    given: LinearRows,
    stats: Tensor,
    upstream: list[Tensor | None],
    needs: list[bool],
    factors: Factors = NO_FACTORS,
) -> list[Tensor]:
    """What losses and statistics give to the head, for their upstream gradients (N,), times factors."""
    backend = given.backend()
    tiled = grads_on_chip(given, backend)
    skipped = without_effect(given.rows, *upstream)

    def write(chunk: Chunk) -> Tiles | None:
        args = stats[:, chunk.where].contiguous(), [chunk.of(g) for g in upstream], chunk.rows.input
        if not tiled or backend.head_grad is None:
            backend.row_grad(chunk.rows, *args)
            return None
        _, weight, bias = given.head
        return backend.head_grad(chunk.rows, chunk.hidden, weight, bias, *args, given.filter_eps)

    # Rows that ask for nothing are tiles of their own, which no product takes.
    order = counting_first(given.rows, *upstream) if filters(given, backend) else None
    return sum_up(given, HeadGrads(given.head, needs, backend.matmul, factors), write, skipped, not tiled, order)


def sum_up(
    given: LinearRows,
    grads: HeadGrads,
    write: Callable[[Chunk], Tiles | None],
    skipped: Tensor | None = None,
    filled: bool = True,
    order: Tensor | None = None,
) -> list[Tensor]:
    """The gradients of a head; `write` puts that of a chunk's logits in their place, where they are unless not
    `filled`, and may say which tiles of it count. With an `order` (N,) chunks take the rows in it."""
    for chunk in chunks(given, given.backend(), skipped, filled, order):
        grads.add(chunk, write(chunk))
    return grads.result(skipped)


def write_part(given: LinearRows, part: Part, whole: Whole, upstream: Sequence[Tensor | None], chunk: Chunk) -> None:
    """The gradient of a chunk's logits of a part of the classes, in their place; `given` are the rows of all classes,
    `upstream` gradients (N, ...) of an Outcome's first four."""
    row_grad = given.backend().row_grad
    target = given.rows.target[chunk.where] if given.rows.spec.objective.indexed else chunk.rows.target
    of_all = given.rows._replace(input=chunk.rows.input, target=target, probs=chunk.of(given.rows.probs))
    gradients(
        of_all,
        chunk.rows,
        part,
        whole.at(chunk.where),
        tuple(chunk.of(g) for g in upstream),
        lambda local, stats, g: row_grad(local, stats, g, local.input),
    )
