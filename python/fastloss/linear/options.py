"""What ``torch.nn.LinearCrossEntropyOptions`` asks of a loss: each of its fields is obeyed, holds anyway, or raises."""

from __future__ import annotations

from typing import Any

from ..spec import COMPUTE_DTYPE
from .heads import Head


def chunk_rows(options: Any, head: Head) -> int | None:
    """How many rows' logits may exist at once; None where max_chunk_bytes alone decides."""
    if options is None:
        return None
    if not hasattr(options, "batch_chunk_size"):
        raise TypeError(f"options: expected a torch.nn.LinearCrossEntropyOptions or None, got {type(options).__name__}")
    wide, asked = COMPUTE_DTYPE[head.dtype()], options.acc_dtype
    if asked is not None and asked.itemsize > wide.itemsize:
        raise ValueError(f"options: sums of {head.dtype()} are {wide}, got acc_dtype={asked}")
    size, method = options.batch_chunk_size, options.chunking_method
    if method in (None, "auto"):
        return None if size is None else int(size)
    rows = _by_aspect_ratio(method, head)
    if size is not None and size != rows:
        raise ValueError(
            f"options: batch_chunk_size (={size}) and chunking_method ({method!r}) give different chunk sizes "
            f"({size} vs {rows}); pass only one"
        )
    return rows


def _by_aspect_ratio(method: str, head: Head) -> int:
    """torch's rule: a chunk's logits are as large as the hidden states, divided by N of "aspect_ratio:N"."""
    N, H, V = head.hidden.shape[:-1].numel(), head.hidden.shape[-1], head.weight.shape[0]
    factor = int(method.partition(":")[2] or 1)
    rows = -(-N // max(1, -(-V // max(1, H))))
    return max(1, min((1 << max(0, rows - 1).bit_length()) // factor, N))
