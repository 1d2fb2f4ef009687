"""The last layer: hidden states and a weight that logits are the product of, and what its losses may take of memory."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..backends import Backend, choose_for, native
from ..backends.reference import quiet
from ..parallel import VocabShard
from ..reduction import rows_that_count
from ..saved import savable
from ..spec import COMPUTE_DTYPE, Rows

MAX_CHUNK_BYTES = 56 << 20  # of logits that exist at once: with what the products pack, below 64 MiB


class Head(NamedTuple):
    """Logits are hidden (N, H) @ weight (V, H).T + bias (V,); of an input as given, before it is rows, (..., H)."""

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None

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

    def quiet(self, counts: Tensor | None) -> Head:
        """Without hidden states that are not finite, in rows that do not count (N,): in the weight's matmul they would
        meet a gradient of zero, and zero times NaN is NaN."""
        if counts is None:
            return self
        broken = ~self.hidden.detach().isfinite().all(-1) & ~counts
        return self._replace(hidden=torch.where(broken[:, None], 0, self.hidden))

    def logits(self) -> Tensor:
        """All of them, as a textbook writes it."""
        dtype = self.dtype()
        bias = None if self.bias is None else self.bias.to(dtype)
        return torch.nn.functional.linear(self.hidden.to(dtype), savable(self.weight).to(dtype), bias)


class LinearRows(NamedTuple):
    """Rows whose logits, and with a teacher whose target logits, come from heads. `rows` describes them: in place of
    logits it has one number in their shape. At most `limit` rows' logits exist at once. What a 16-bit weight's
    gradient is summed in may take `block_bytes`, and if it is made of blocks of classes so may the logits of one. What
    of the logits' gradient is smaller than `filter_eps` may be left out; of None, nothing."""

    rows: Rows
    head: Head
    teacher: Head | None
    limit: int
    block_bytes: int
    filter_eps: float | None = None

    def materialised(self, *factors: Tensor | None) -> Rows:
        """The rows with all their logits, for the reference alone; those without effect (see rows_that_count of the
        `factors`) with no NaN and no infinity."""
        counts = rows_that_count(self.rows, *factors)
        target = self.rows.target if self.teacher is None else self.teacher.quiet(counts).logits()
        return quiet(self.rows._replace(input=self.head.quiet(counts).logits(), target=target), *factors)

    def backend(self) -> Backend:
        """Which one computes the rows."""
        head, target = self.head, self.rows.target if self.teacher is None else self.teacher.hidden
        return choose_for(head.hidden.device, head.dtype(), target.dtype, self.rows.spec.objective)


def stand_in(head: Head) -> Tensor:
    """One number in the shape, dtype and place of a head's logits."""
    return head.hidden.new_empty((), dtype=head.dtype()).expand(*head.hidden.shape[:-1], *head.weight.shape[:-1])


def flattened(head: Head) -> Head:
    """With hidden states as rows."""
    return head._replace(hidden=head.hidden.flatten(0, -2) if head.hidden.dim() > 1 else head.hidden[None])


def room(
    head: Head, max_chunk_bytes: int, teacher: bool = False, rows: int | None = None, shard: VocabShard | None = None
) -> tuple[int, int]:
    """`limit` and `block_bytes` of LinearRows, from the bytes that the caller allows. Beside the logits (those of
    float32 where they are 16-bit, as a product may leave them) 16-bit gradients take the sums that they are rounded
    from. The same for all ranks of a shard, which sum their chunks: as if its parts were even."""
    if not isinstance(max_chunk_bytes, (int, torch.SymInt)) or max_chunk_bytes < 1:
        raise ValueError(f"max_chunk_bytes: expected a number of bytes > 0, got {max_chunk_bytes!r}")
    block_bytes = max_chunk_bytes // 2
    if rows is not None:
        return rows, block_bytes
    V = head.weight.shape[0] if shard is None else -(-shard.vocab_size // shard.ranks)
    of_hidden, of_weight = (sum_bytes(head, t) if t.requires_grad else 0 for t in head[:2])
    sums, each = V * of_weight, row_bytes(V, head.dtype(), teacher) + of_hidden
    return max(1, (max_chunk_bytes - (sums if sums <= block_bytes else 0)) // max(each, 1)), block_bytes


def row_bytes(V: int, dtype: torch.dtype, teacher: bool) -> int:
    """Of a row's logits, and of a teacher's, at the widest."""
    return V * COMPUTE_DTYPE[dtype].itemsize * (2 if teacher else 1)


def sum_bytes(head: Head, of: Tensor) -> int:
    """What a row of hidden states or of a weight needs beside its gradient, while that is summed."""
    wide = COMPUTE_DTYPE[head.dtype()].itemsize
    return of.shape[-1] * wide if of.dtype.itemsize < wide else 0


def on_chip(given: LinearRows, backend: Backend) -> bool:
    """Whether losses need no logits in memory."""
    hidden, weight, _ = given.head
    return given.teacher is None and backend.takes_head is not None and backend.takes_head(given.rows, hidden, weight)


def filters(given: LinearRows, backend: Backend) -> bool:
    """Whether tiles of the gradient are left out of its products."""
    return given.filter_eps is not None and grads_on_chip(given, backend)


def grads_on_chip(given: LinearRows, backend: Backend) -> bool:
    """Whether the gradient of logits needs no logits in memory."""
    return backend.head_grad is not None and on_chip(given, backend)


def empty(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Uninitialised, in recycled memory where it is large."""
    return native.empty(shape, dtype) if device.type == "cpu" else torch.empty(shape, dtype=dtype, device=device)
