"""Logits that are never kept: made from hidden states some rows at a time, into memory that is used again.

A chunk's logits become their own gradient there, and that the gradients of hidden states, weight and bias, before the
next chunk is made. The kernels of rows of logits do not know; every loss and every backend comes this way.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from ..arguments import check_indices
from ..backends import Backend, choose_for, native
from ..backends.device import Tiles
from ..parallel import VocabShard
from ..parallel.merge import Part, Whole
from ..parallel.rows import gradients
from ..reduction import reduce_rows, valid_rows
from ..spec import COMPUTE_DTYPE, Reduction, Rows

MAX_CHUNK_BYTES = 56 << 20  # of logits that exist at once: with what the products pack, below 64 MiB
_PANEL = 12  # chunks are whole panels of the matrix product's


class Head(NamedTuple):
    """Logits are hidden (N, H) @ weight (V, H).T + bias (V,); of an input as given, before it is rows, (..., H)."""

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None

    @property
    def dtype(self) -> torch.dtype:
        """Of hidden states and weight multiplied, where they differ (under autocast)."""
        return torch.promote_types(self.hidden.dtype, self.weight.dtype)

    def grad_shapes(self, needs: list[bool]) -> list[tuple[int, ...]]:
        """Of the three gradients: empty where one is not needed."""
        shapes = self.hidden.shape, self.weight.shape, self.weight.shape[:1]
        return [tuple(shape) if needed else (0,) for shape, needed in zip(shapes, needs, strict=True)]

    def of_classes(self, start: int, stop: int) -> Head:
        """Of some of the classes; itself of all."""
        if (start, stop) == (0, self.weight.shape[0]):
            return self
        bias = None if self.bias is None else self.bias[start:stop]
        return Head(self.hidden, self.weight[start:stop], bias)

    def logits(self) -> Tensor:
        """All of them, as a textbook writes it."""
        dtype = self.dtype
        bias = None if self.bias is None else self.bias.to(dtype)
        return torch.nn.functional.linear(self.hidden.to(dtype), self.weight.to(dtype), bias)


class LinearRows(NamedTuple):
    """Rows whose logits, and with a teacher whose target logits, come from heads. `rows` describes them: in place of
    logits it has one number in their shape. At most `limit` rows' logits exist at once. What of their gradient is
    smaller than `filter_eps` may be left out."""

    rows: Rows
    head: Head
    teacher: Head | None
    limit: int
    filter_eps: float = 0.0

    def materialised(self) -> Rows:
        """The rows with all their logits, for the reference alone."""
        target = self.rows.target if self.teacher is None else self.teacher.logits()
        return self.rows._replace(input=self.head.logits(), target=target)

    def backend(self) -> Backend:
        """Which one computes the rows."""
        head, target = self.head, self.rows.target if self.teacher is None else self.teacher.hidden
        return choose_for(head.hidden.device, head.dtype, target.dtype, self.rows.spec.objective)


def stand_in(head: Head) -> Tensor:
    """One number in the shape, dtype and place of a head's logits."""
    return head.hidden.new_empty((), dtype=head.dtype).expand(*head.hidden.shape[:-1], *head.weight.shape[:-1])


def flattened(head: Head) -> Head:
    """With hidden states as rows."""
    return head._replace(hidden=head.hidden.flatten(0, -2) if head.hidden.dim() > 1 else head.hidden[None])


def rows_at_once(
    logits: Tensor, max_chunk_bytes: int, teacher: bool, rows: int | None = None, shard: VocabShard | None = None
) -> int:
    """How many rows' logits (N, V) may exist at once, from the bytes that the caller allows (those of float32 where
    they are 16-bit, as a product may leave them) or from their number. The same for all ranks of a shard, which sum
    their chunks: as if its parts were even."""
    if not isinstance(max_chunk_bytes, int) or max_chunk_bytes < 1:
        raise ValueError(f"max_chunk_bytes: expected a number of bytes > 0, got {max_chunk_bytes!r}")
    if rows is not None:
        return rows
    V = logits.shape[1] if shard is None else -(-shard.vocab_size // shard.ranks)
    return max(1, max_chunk_bytes // max(row_bytes(V, logits.dtype, teacher), 1))


def row_bytes(V: int, dtype: torch.dtype, teacher: bool) -> int:
    """Of a row's logits, and of a teacher's, at the widest."""
    return V * COMPUTE_DTYPE[dtype].itemsize * (2 if teacher else 1)


class HeadGrads:
    """The gradients of hidden states (N, H), weight (V, H) and bias (V,), summed over chunks in the compute dtype; each
    only where it is needed, else empty. Of the first, `on_hidden` is given each chunk's rows and their part, and puts
    it there if the rows are no slice; with `hidden` it is added to that."""

    def __init__(
        self,
        head: Head,
        needs: list[bool],
        matmul: Callable[..., None],
        on_hidden: Callable[[slice | Tensor, Tensor], None] | None = None,
        hidden: Tensor | None = None,
    ) -> None:
        self.head, self.matmul, self.on_hidden, self.started = head, matmul, on_hidden, False
        own, weight, bias = head.grad_shapes(needs)
        new = partial(empty, dtype=COMPUTE_DTYPE[head.dtype], device=head.hidden.device)
        self.weight, self.bias, self.adds, self.needs = new(weight), new(bias), hidden is not None, needs
        self.hidden = new(own) if hidden is None else hidden

    def add(self, chunk: Chunk, tiles: Tiles | None = None) -> None:
        """What a chunk's rows contribute, whose logits have become their gradient, or those `tiles` of it."""
        where, hidden, dlogits = chunk.where, chunk.hidden, chunk.rows.input
        matmul, matmul_t = (self.matmul, self.matmul) if tiles is None else (tiles.matmul, tiles.t().matmul)
        if self.needs[0]:
            there = self.adds or isinstance(where, slice)
            part = self.hidden[where] if there else self.hidden.new_empty(hidden.shape)
            matmul(dlogits, self.head.weight, part, self.adds)
            if self.on_hidden is not None:
                self.on_hidden(where, part)
            elif isinstance(where, Tensor):
                self.hidden[where] = part
        if self.needs[1]:
            matmul_t(dlogits.t(), hidden, self.weight, self.started)
        if self.needs[2]:
            total = dlogits.sum(0, dtype=self.bias.dtype)
            self.bias = self.bias + total if self.started else total
        self.started = True

    def result(self, skipped: Tensor | None, divisor: Tensor | None = None) -> list[Tensor]:
        """The three, over a divisor; rows that were `skipped` (N,) have a gradient of zero."""
        if not self.started:
            self.weight.zero_()
            self.bias.zero_()
        if skipped is not None and self.needs[0]:
            self.hidden[skipped] = 0
        grads = [self.hidden, self.weight, self.bias]
        if divisor is not None:
            for grad in grads:
                grad.div_(torch.where(divisor == 0, 1, divisor))  # where nothing counts, all are zero
        return grads


class Chunk(NamedTuple):
    """Some of the rows: which, their hidden states, and their logits in memory that the next chunk will use."""

    where: slice | Tensor
    hidden: Tensor
    rows: Rows

    def of(self, vector: Tensor | None) -> Tensor | None:
        """A vector's (N, ...) part of these rows."""
        return None if vector is None else vector[self.where]


def chunks(given: LinearRows, backend: Backend, skipped: Tensor | None = None, filled: bool = True) -> Iterator[Chunk]:
    """The rows that are not skipped, in equal parts; not `filled`, there is only memory for their logits."""
    rows, head, teacher = given.rows, given.head, given.teacher
    _check(rows)
    index = None if skipped is None else (~skipped).nonzero()[:, 0]
    N = rows.input.shape[0] if index is None else len(index)
    if N == 0:
        return
    size = equal_parts(N, given.limit)
    buffer = _logits_buffer(head, size, backend)
    target_buffer = None if teacher is None else _logits_buffer(teacher, size, backend)
    for begin in range(0, N, size):
        where: slice | Tensor = slice(begin, min(begin + size, N))
        where = where if index is None else index[where]
        hidden = head.hidden[where]
        logits = _fill(buffer, hidden, head, backend) if filled else buffer[: hidden.shape[0]]
        if teacher is None or target_buffer is None:
            target = rows.target[where]
        else:
            target = _fill(target_buffer, teacher.hidden[where], teacher, backend)
        probs = None if rows.probs is None else rows.probs[where]
        yield Chunk(where, hidden, rows._replace(input=logits, target=target, probs=probs))


def _check(rows: Rows) -> None:
    """Also of rows that are skipped."""
    if rows.spec.objective.indexed:
        check_indices(rows.target, rows.spec.ignore_index, rows.input.shape[1])


def equal_parts(N: int, limit: int, panel: int = _PANEL) -> int:
    """The size of each: no more parts than the limit asks for, the last no smaller than it must be, of whole panels
    where that is within the limit."""
    size = -(-N // -(-N // limit))
    whole = -(-size // panel) * panel
    return whole if whole <= limit else size


def _logits_buffer(head: Head, size: int, backend: Backend) -> Tensor:
    dtype = backend.logits_dtype(head.hidden.dtype, head.weight.dtype)
    return empty((size, head.weight.shape[0]), dtype, head.hidden.device)


def _fill(buffer: Tensor, hidden: Tensor, head: Head, backend: Backend) -> Tensor:
    logits = buffer[: hidden.shape[0]]
    backend.matmul(hidden, head.weight.t(), logits, False, head.bias)
    return logits


def empty(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Uninitialised, in recycled memory where it is large."""
    return native.empty(shape, dtype) if device.type == "cpu" else torch.empty(shape, dtype=dtype, device=device)


def without_effect(rows: Rows, token_weight: Tensor | None = None) -> Tensor | None:
    """The rows (N,) that need no logits at all: ignored, or of no weight. None where all do, and on devices, where it
    would have to be waited for."""
    if rows.target.device.type != "cpu":
        return None
    valid = valid_rows(rows)
    if token_weight is not None:
        valid = token_weight != 0 if valid is None else valid & (token_weight != 0)
    return None if valid is None or bool(valid.all()) else ~valid


def not_asked_for(rows: Rows, upstream: Sequence[Tensor | None]) -> Tensor | None:
    """Those without effect for upstream gradients (N,) of losses and, of all rows, other statistics."""
    others = any(g is not None for g in upstream[1:])
    return None if others else without_effect(rows, upstream[0])


def loss_and_grads(given: LinearRows, to: Reduction, needs: list[bool]) -> tuple[Tensor, list[Tensor]]:
    """The summed loss () over the normalizer, and what it gives to the head, for an upstream gradient of one."""
    backend, rows = given.backend(), given.rows
    grads, wanted = HeadGrads(given.head, needs, backend.matmul), any(needs)
    skipped = without_effect(rows, to.token_weight)
    if not wanted and on_chip(given, backend):
        loss = row_loss(_ignoring(given, skipped), False)[0].double()  # as the kernels of rows sum them
        return reduce_rows(loss, rows, to).to(rows.compute_dtype), grads.result(None)
    total, divided = given.head.hidden.new_zeros((), dtype=rows.compute_dtype), False
    # A probability over the number of tokens is next to nothing in float16: what is summed in float32 is divided then.
    half = backend.logits_dtype(given.head.hidden.dtype, given.head.weight.dtype) == torch.float16
    normalizer, divisor = (None, to.normalizer) if half else (to.normalizer, None)
    if wanted and given.filter_eps > 0 and grads_on_chip(given, backend):  # four products, but two of them of few tiles
        loss, stats, *_ = row_loss(given, False)
        upstream = _upstream(loss, to._replace(normalizer=normalizer))
        return reduce_rows(loss, rows, to), row_grads(given, stats, [upstream, None, None, None], needs, divisor)
    for chunk in chunks(given, backend, skipped):
        part = to._replace(token_weight=chunk.of(to.token_weight), normalizer=normalizer)
        total += _chunk_loss(backend, chunk.rows, part, wanted)
        divided = normalizer is not None
        if wanted:
            grads.add(chunk)
    if to.normalizer is not None and not divided:
        total = total / to.normalizer  # NaN where it is the mean of nothing
    return total, grads.result(skipped, divisor)


def _chunk_loss(backend: Backend, rows: Rows, to: Reduction, overwrite: bool) -> Tensor:
    """The reduced loss; the gradient of the logits, if wanted, in their place."""
    out = rows.input if overwrite else None
    if backend.row_loss_grad is not None:
        return backend.row_loss_grad(rows, to, 1.0, overwrite, out)[0]
    loss, stats, *_ = backend.row_loss(rows, False)
    if overwrite:
        backend.row_grad(rows, stats, [_upstream(loss, to), None, None, None], out)
    return reduce_rows(loss, rows, to)


def _upstream(loss: Tensor, to: Reduction) -> Tensor:
    """What the reduced loss gives to losses (N,)."""
    upstream = torch.ones_like(loss) if to.token_weight is None else to.token_weight
    return upstream if to.normalizer is None else upstream / to.normalizer


def on_chip(given: LinearRows, backend: Backend) -> bool:
    """Whether losses need no logits in memory."""
    hidden, weight, _ = given.head
    return given.teacher is None and backend.takes_head is not None and backend.takes_head(given.rows, hidden, weight)


def grads_on_chip(given: LinearRows, backend: Backend) -> bool:
    """Whether the gradient of logits needs no logits in memory."""
    return backend.head_grad is not None and on_chip(given, backend)


def _ignoring(given: LinearRows, skipped: Tensor | None) -> LinearRows:
    """With what makes rows ignored where they are skipped."""
    if skipped is None:
        return given
    _check(given.rows)
    target, rows = given.rows.target, given.rows
    target = target.masked_fill(skipped.view(-1, *(1,) * (target.dim() - 1)), rows.spec.ignore_index)
    return given._replace(rows=rows._replace(target=target))


def row_loss(given: LinearRows, extras: bool, whole: Tensor | None = None) -> list[Tensor]:
    """Losses (N,), statistics (5, N) and argmax as native.row_loss has them; and of targets that list classes the
    logits of those, (N, K)."""
    backend, rows = given.backend(), given.rows
    if whole is None and on_chip(given, backend):
        assert backend.head_loss is not None
        return list(backend.head_loss(rows, *given.head, extras))
    skipped = None if extras else without_effect(rows)
    N, K = rows.input.shape[0], rows.target.shape[1] if rows.probs is not None else 0
    new, F = given.head.hidden.new_zeros, rows.compute_dtype
    out = [new(N, dtype=F), new((5, N), dtype=F), new(N if extras else 0, dtype=torch.int64)]
    out.append(new((N, K), dtype=F))
    for chunk in chunks(given, backend, skipped):
        within = () if whole is None else (whole[:, chunk.where].contiguous(),)
        loss, stats, argmax, _ = backend.row_loss(chunk.rows, extras, *within)
        out[0][chunk.where], out[1][:, chunk.where] = loss, stats
        if extras:
            out[2][chunk.where] = argmax
        if K:
            listed = torch.where(chunk.rows.target == rows.spec.ignore_index, 0, chunk.rows.target)
            out[3][chunk.where] = chunk.rows.input.gather(1, listed).to(F)
    return out


def row_grads(
    given: LinearRows,
    stats: Tensor,
    upstream: list[Tensor | None],
    needs: list[bool],
    divisor: Tensor | None = None,
) -> list[Tensor]:
    """What losses and statistics give to the head, for their upstream gradients (N,), over a divisor."""
    backend = given.backend()
    tiled = grads_on_chip(given, backend)
    skipped = not_asked_for(given.rows, upstream)
    grads = HeadGrads(given.head, needs, backend.matmul)

    def write(chunk: Chunk) -> Tiles | None:
        args = stats[:, chunk.where].contiguous(), [chunk.of(g) for g in upstream], chunk.rows.input
        if not tiled or backend.head_grad is None:
            backend.row_grad(chunk.rows, *args)
            return None
        _, weight, bias = given.head
        return backend.head_grad(chunk.rows, chunk.hidden, weight, bias, *args, given.filter_eps)

    return sum_up(given, grads, write, skipped, divisor, not tiled)


def sum_up(
    given: LinearRows,
    grads: HeadGrads,
    write: Callable[[Chunk], Tiles | None],
    skipped: Tensor | None = None,
    divisor: Tensor | None = None,
    filled: bool = True,
) -> list[Tensor]:
    """The gradients of a head, over a divisor; `write` puts that of a chunk's logits in their place, where they are
    unless not `filled`, and may say which tiles of it count."""
    for chunk in chunks(given, given.backend(), skipped, filled):
        grads.add(chunk, write(chunk))
    return grads.result(skipped, divisor)


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
