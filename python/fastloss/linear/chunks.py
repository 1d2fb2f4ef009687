"""Logits that are never kept: made from hidden states some rows at a time, into memory that is used again.

The kernels of rows of logits do not know; every loss and every backend comes this way.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..arguments import check_indices
from ..backends import Backend
from ..backends.device import set_first
from ..reduction import rows_that_count
from ..spec import Rows
from ..strides import rows_at
from .heads import Head, LinearRows, empty, on_chip

_PANEL = 12  # chunks are whole panels of the matrix product's


class Chunk(NamedTuple):
    """Some of the rows: which, their hidden states, and their logits in memory that the next chunk will use. `idle`
    (n,): those without effect, where they could not be left out; their hidden states may be anything."""

    where: slice | Tensor
    hidden: Tensor
    rows: Rows
    idle: Tensor | None = None

    def of(self, vector: Tensor | None) -> Tensor | None:
        """A vector's (N, ...) part of these rows."""
        return None if vector is None else vector[self.where]


def chunks(
    given: LinearRows, backend: Backend, skipped: Tensor | None = None, filled: bool = True, order: Tensor | None = None
) -> Iterator[Chunk]:
    """The rows that are not skipped (N,), or all in an order (N,), in equal parts; not `filled`, there is only memory
    for their logits. On devices whose numbers the host does not wait for, skipped rows are there as idle ones."""
    rows, head, teacher = given.rows, given.head, given.teacher
    _check(rows)
    idle = None if skipped is None or may_wait_for(skipped.device) else skipped
    index = order if skipped is None or idle is not None else (~skipped).nonzero()[:, 0]
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
            target = rows_at(rows.target, where) if rows.target.is_floating_point() else rows.target[where]
        else:
            target = _fill(target_buffer, teacher.hidden[where], teacher, backend)
        probs = None if rows.probs is None else rows.probs[where]
        some = rows._replace(input=logits, target=target, probs=probs)
        yield Chunk(where, hidden, some, None if idle is None else idle[where])


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


def may_wait_for(device: torch.device) -> bool:
    """Whether numbers of its tensors may be read here: a CPU has them already, others would have to be waited for."""
    return device.type == "cpu"


def without_effect(rows: Rows, *factors: Tensor | None) -> Tensor | None:
    """The rows (N,) that need no logits at all: ignored, or their factors (see rows_that_count) all zero. None where
    there are none, as far as it may be waited for."""
    counts = rows_that_count(rows, *factors)
    if counts is None or (may_wait_for(counts.device) and bool(counts.all())):
        return None
    return ~counts


def counting_first(rows: Rows, *factors: Tensor | None) -> Tensor | None:
    """An order (N,) of rows in which those without effect come last, for devices, where their number is not known; None
    where all have."""
    counts = rows_that_count(rows, *factors)
    return None if counts is None else set_first(counts)


def row_loss(
    given: LinearRows,
    extras: bool,
    whole: Tensor | None = None,
    token_weight: Tensor | None = None,
    then: Callable[[Chunk, Tensor], Any] | None = None,
) -> list[Tensor]:
    """Losses (N,), statistics (5, N) and argmax as native.row_loss has them; and of targets that list classes the
    logits of those, (N, K). All are zero of rows without effect that are left out. `then` is given each chunk with its
    statistics, and may do to its logits what it likes."""
    backend, rows = given.backend(), given.rows
    if whole is None and then is None and on_chip(given, backend):
        assert backend.head_loss is not None
        return list(backend.head_loss(_ignoring_weightless(rows, token_weight), *given.head, extras))
    skipped = without_effect(rows, token_weight)
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
        if then is not None:
            then(chunk, stats)
    return out


def _ignoring_weightless(rows: Rows, token_weight: Tensor | None) -> Rows:
    """As if rows of no weight were ignored."""
    if token_weight is None:
        return rows
    _check(rows)
    weightless = (token_weight == 0).view(-1, *(1,) * (rows.target.dim() - 1))
    return rows._replace(target=rows.target.masked_fill(weightless, rows.spec.ignore_index))
