"""Where the rows of logits (..., V) lie: what kernels can read without a copy."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor


class Lines(NamedTuple):
    """Rows of contiguous classes, in row-major order of the leading dimensions: `stride` elements from one to the next;
    with a `group` so many rows, and then the next group, `group_stride` elements after the first. csrc/view.h, Matrix,
    has the same."""

    stride: int
    group: int = 0  # none: one stride leads from each row to the next
    group_stride: int = 0


def count_rows(x: Tensor) -> int:
    """N of logits (..., V)."""
    shape = x.shape
    return shape[0] if len(shape) == 2 else math.prod(shape[:-1])


def lines_of(x: Tensor) -> Lines | None:
    """Of logits (..., V); None where they must be copied: classes that are not contiguous, rows at more than two
    strides."""
    strides = x.stride()
    if x.numel() == 0:  # contiguous, whatever the strides say
        return Lines(x.shape[-1])
    if strides[-1] != 1 and x.shape[-1] > 1:
        return None
    if len(strides) == 2:
        return Lines(strides[0])
    merged = _merged(x.shape[:-1], strides[:-1])
    if len(merged) > 2:
        return None
    if len(merged) < 2:
        return Lines(merged[0][1] if merged else x.shape[-1])
    (_, group_stride), (group, stride) = merged
    return Lines(stride, group, group_stride)


def _merged(sizes: tuple[int, ...], strides: tuple[int, ...]) -> list[tuple[int, int]]:
    """(size, stride) of the fewest dimensions that walk over the same elements in the same order."""
    found: list[tuple[int, int]] = []
    for size, stride in zip(sizes, strides, strict=True):
        if size == 1:
            continue
        if found and found[-1][1] == size * stride:
            found[-1] = found[-1][0] * size, stride
        else:
            found.append((size, stride))
    return found


def readable(x: Tensor) -> Tensor:
    """Logits (..., V) as kernels can read them; a copy only where they could not."""
    return x.contiguous() if lines_of(x) is None else x


def rows_at(x: Tensor, where: slice | Tensor) -> Tensor:
    """Some rows of (..., V), in row-major order: (n, V), a copy of no others."""
    if len(_merged(x.shape[:-1], x.stride()[:-1])) < 2:
        return x.flatten(0, -2)[where]
    index = torch.arange(count_rows(x), device=x.device)[where]
    return x[torch.unravel_index(index, x.shape[:-1])]


def overlap(x: Tensor) -> bool:
    """Whether rows (..., V) share memory, or classes are not contiguous."""
    lines = lines_of(x)
    if lines is None:
        return True
    N, V = count_rows(x), x.shape[-1]
    if not lines.group:
        return N > 1 and lines.stride < V
    levels = (lines.stride, lines.group), (lines.group_stride, N // lines.group)
    (near, size), (far, _) = sorted(levels)
    return near < V or far < (size - 1) * near + V
