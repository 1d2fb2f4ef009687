"""The CPU kernels: torch tensors to the addresses and sizes that fastloss._native takes."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor

from ..spec import COMPUTE_DTYPE, REDUCTIONS, Objective, Reduction, Rows
from ..strides import lines_of
from ..strides import readable as readable_lines
from . import products

try:
    from .. import _native
except ImportError as error:  # a source tree, or a wheel built without its kernels
    _native = None  # type: ignore[assignment]
    _import_error = str(error)

DTYPE_CODES = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3}
_num_threads = torch.get_num_threads
FEWEST_CLASSES = 8192  # of a head whose logits never reach memory
HEAD_OBJECTIVES = (Objective.INDEX, Objective.TOPK)
WORTH_ROUNDING = 1.5  # times faster
_RECYCLE_BYTES = 8 << 20  # below this, malloc itself keeps memory warm

if _native is not None and "FASTLOSS_ISA" in os.environ:
    try:
        _native.use_isa(os.environ["FASTLOSS_ISA"])
    except ValueError as error:
        raise ValueError(f"environment variable FASTLOSS_ISA: {error}") from None


def refuses(device: torch.device, dtype: torch.dtype, target_dtype: torch.dtype, objective: Objective) -> str | None:
    """Why these kernels cannot run such a call; None if they can."""
    if _native is None:
        return f"fastloss._native is not built: {_import_error}"
    if device.type != "cpu":
        return f"runs on cpu tensors, not on {device.type}"
    if dtype not in DTYPE_CODES:
        return f"takes float32, bfloat16, float16 or float64, not {dtype}"
    return None


def empty_grad(input: Tensor) -> tuple[Tensor, bool]:
    """An uninitialised gradient of input's shape, contiguous, and whether its memory is recycled (its pages exist)."""
    if input.numel() * input.element_size() < _RECYCLE_BYTES:
        return (torch.empty_like(input) if input.is_contiguous() else input.new_empty(input.shape)), False
    return _from_buffer(input.shape, input.dtype)


def empty(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """An uninitialised tensor, in recycled memory where it is large."""
    small = _native is None or math.prod(shape) * dtype.itemsize < _RECYCLE_BYTES
    return torch.empty(shape, dtype=dtype, device="cpu") if small else _from_buffer(shape, dtype)[0]


def _from_buffer(shape: tuple[int, ...], dtype: torch.dtype) -> tuple[Tensor, bool]:
    count = math.prod(shape)
    buffer = _native.Buffer(count * dtype.itemsize)
    return torch.frombuffer(buffer, dtype=dtype, count=count).view(shape), buffer.recycled


def readable(rows: Rows) -> Rows:
    """The rows as kernels read them; copies only what they could not: logits, probabilities and target logits with
    contiguous classes, their rows at one or two strides (`lines_of`), the rest contiguous, weights in the compute
    dtype."""
    input, target, weight, spec, probs = rows
    plain, strides = weight is None and probs is None and spec.objective is Objective.INDEX, input.stride()
    if plain and len(strides) == 2 and strides[1] == 1 and target.is_contiguous():
        return rows  # as nearly every call's are
    target = target.contiguous() if spec.objective.indexed else _beside(target, input.dtype)
    if weight is not None:
        weight = weight.detach().to(rows.compute_dtype).contiguous()
    if probs is not None:
        probs = probs.detach().to(rows.compute_dtype).contiguous()
    return Rows(readable_lines(input), target, weight, spec, probs)


def _beside(q: Tensor, dtype: torch.dtype) -> Tensor:
    """Probabilities or logits in a dtype that the kernels read beside logits of `dtype`, where they can read them."""
    if (q.dtype == torch.float64) != (dtype == torch.float64) or q.dtype not in DTYPE_CODES:
        q = q.to(COMPUTE_DTYPE[dtype])
    return readable_lines(q)


def lines(x: Tensor) -> tuple[int, int, int, int]:
    """Address, and where the rows of a tensor (..., V) lie that `readable_lines` gave."""
    if x.dim() == 2:
        return x.data_ptr(), x.stride(0), 0, 0
    found = lines_of(x)
    assert found is not None
    return x.data_ptr(), *found


_NO_MATRIX = (0, 0, 0, 0, 0)


def rows_fields(rows: Rows, threads: int = 1) -> tuple[Any, ...]:
    """What csrc/python.h, parse_rows, reads of `readable` rows."""
    input, target, weight, spec, probs = rows
    objective = spec.objective
    indices, picks, dense = (target.data_ptr(), 1, probs) if objective.indexed else (0, 0, target)
    if objective.indexed and target.dim() == 2:  # of no classes, there is no address
        picks = target.shape[1]
    beside = _NO_MATRIX if dense is None else (*lines(dense), DTYPE_CODES[dense.dtype])
    weights = 0 if weight is None else weight.data_ptr()
    if input.dim() == 2:  # as nearly every call's: small ones must be quick
        N, V = input.shape
        logits = (input.data_ptr(), N, V, input.stride(0), 0, 0, DTYPE_CODES[input.dtype])
    else:
        address, stride, group, group_stride = lines(input)
        logits = (address, rows.N, rows.V, stride, group, group_stride, DTYPE_CODES[input.dtype])
    return (*logits, indices, picks, *beside, weights, *spec, threads)


def row_states(rows: Rows) -> Tensor:
    """(N, 5) float64: the state of each row over this part of the vocabulary (csrc/row_state.h)."""
    rows = readable(rows)
    states = torch.empty((rows.N, 5), dtype=torch.float64, device="cpu")
    _native.row_states(rows_fields(rows, _num_threads()), states.data_ptr())
    return states


def merge_states(a: Tensor, b: Tensor) -> Tensor:
    """The states of the union of two disjoint parts of the vocabulary."""
    a, b = a.contiguous(), b.contiguous()
    out = torch.empty_like(a)
    _native.merge_states(a.data_ptr(), b.data_ptr(), out.data_ptr(), a.shape[0])
    return out


def _strided(matrix: Tensor) -> tuple[int, ...]:
    """What csrc/bindings.cpp, strided, reads."""
    return matrix.data_ptr(), *matrix.shape, *matrix.stride(), DTYPE_CODES[matrix.dtype]


def matmul(a: Tensor, b: Tensor, out: Tensor, add: bool = False, start: Tensor | None = None) -> None:
    """`out` (M, N) = a (M, K) @ b (K, N) + start (N,); with `add` out += a @ b. `out`, of the compute dtype, has
    contiguous rows; a and b any strides and dtypes, whose products are summed in the compute dtype. Where the library's
    are much faster they are its own."""
    multiply = products.matmul if a.dtype == b.dtype and library_multiplies(a.dtype) else _matmul
    multiply(a, b, out, add, start)


def _matmul(a: Tensor, b: Tensor, out: Tensor, add: bool, start: Tensor | None) -> None:
    left, right = _strided(a), _strided(b)
    start = None if start is None else start.to(out.dtype).contiguous()
    first = 0 if start is None else start.data_ptr()
    _native.matmul(left, right, out.data_ptr(), out.stride(0), first, add, _num_threads())


def library_multiplies(dtype: torch.dtype) -> bool:
    """Whether torch's product of 16-bit numbers, which rounds to them, is worth it: in the tiles of AMX, if they are
    found to be much faster."""
    if dtype not in (torch.bfloat16, torch.float16) or not _has_tiles():
        return False
    return _seconds(products.matmul, dtype, dtype) * WORTH_ROUNDING < _seconds(_matmul, dtype, torch.float32)


def _has_tiles() -> bool:
    return bool(getattr(torch.cpu, "_is_amx_tile_supported", bool)())


@cache
def _seconds(multiply: Callable[..., None], dtype: torch.dtype, to: torch.dtype) -> float:
    """The best of a few products, once in a process."""
    a, b, out = (torch.ones(n, 1024, dtype=d, device="cpu") for n, d in ((256, dtype), (1024, dtype), (256, to)))
    times = []
    for _ in range(5):
        start = time.perf_counter()
        multiply(a, b, out, False, None)
        times.append(time.perf_counter() - start)
    return min(times)


def takes_head(rows: Rows, hidden: Tensor, head: Tensor) -> bool:
    """Whether head_loss computes rows like these. It shares out classes: of few, all logits are small."""
    alike = (hidden.dtype == torch.float64) == (head.dtype == torch.float64)
    if hidden.dtype == head.dtype and library_multiplies(hidden.dtype):
        return False
    return alike and rows.spec.objective in HEAD_OBJECTIVES and head.shape[0] >= FEWEST_CLASSES


def head_loss(
    rows: Rows, hidden: Tensor, head: Tensor, bias: Tensor | None, extras: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Losses, statistics and argmax of rows whose logits are never written, and the logits (N, K) of listed classes."""
    N, new, F = hidden.shape[0], hidden.new_empty, rows.compute_dtype
    loss, stats, argmax = new(N, dtype=F), new((5, N), dtype=F), new(N if extras else 0, dtype=torch.int64)
    target = rows.target.contiguous()
    listed = hidden.new_zeros(target.shape, dtype=F)
    weight, bias = (None if t is None else t.detach().to(F).contiguous() for t in (rows.weight, bias))
    probs = None if rows.probs is None else rows.probs.detach().to(F).contiguous()
    fields = rows_fields(Rows(rows.input, target, weight, rows.spec, probs), _num_threads())
    left, right = _strided(hidden), _strided(head.t())
    written = (0 if t is None else t.data_ptr() for t in (bias, loss, stats, argmax if extras else None, listed))
    _native.head_loss(fields, left, right, *written)
    return loss, stats, argmax, listed if rows.probs is not None else listed.new_empty((N, 0))


def logits_dtype(hidden: torch.dtype, weight: torch.dtype) -> torch.dtype:
    """What the product of hidden states and a weight comes in: not rounded to 16 bits, unless the library does."""
    return hidden if hidden == weight and library_multiplies(hidden) else COMPUTE_DTYPE[hidden]


def row_loss(rows: Rows, extras: bool, whole: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """See reference.row_loss. Of a JS `whole` are the statistics of whole rows, of which these are a part: the loss is
    what the part contributes, and the last of the statistics likewise."""
    rows = readable(rows)
    N, new, F = rows.N, rows.input.new_empty, rows.compute_dtype
    loss, stats = new(N, dtype=F), new((5, N), dtype=F) if whole is None else whole.clone()
    ranked = extras and rows.spec.objective == Objective.INDEX
    argmax, rank = (new(N if wanted else 0, dtype=torch.int64) for wanted in (extras, ranked))
    found = argmax.data_ptr() if extras else 0, rank.data_ptr() if ranked else 0
    fields, given = rows_fields(rows, _num_threads()), whole is not None
    _native.row_loss(fields, loss.data_ptr(), stats.data_ptr(), *found, extras, given)
    return loss, stats, argmax, rank


def row_grad(rows: Rows, stats: Tensor, upstream: list[Tensor | None], out: Tensor | None = None) -> Tensor:
    """See reference.row_grad."""
    rows = readable(rows)
    grad = empty_grad(rows.input)[0] if out is None else out
    upstream = [None if g is None else g.to(stats.dtype) for g in upstream]
    pointers = [(0, 0) if g is None else (g.data_ptr(), g.stride(0)) for g in upstream]
    fields = rows_fields(rows, _num_threads())
    _native.row_grad(fields, stats.data_ptr(), pointers, lines(grad))
    return grad


def row_loss_grad(
    rows: Rows,
    to: Reduction,
    upstream: float,
    need_grad: bool,
    out: Tensor | None = None,
    stats: Tensor | None = None,
    scale: Tensor | None = None,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """The reduced loss and, `upstream` times a `scale` (), its gradient: each row's while the row is in cache. No
    statistics."""
    rows = readable(rows)
    token_weight = None if to.token_weight is None else to.token_weight.contiguous()
    grad, streaming = out, False
    if need_grad and grad is None:
        grad, streaming = empty_grad(rows.input)
    value = _native.row_loss_grad(
        rows_fields(rows, _num_threads()),
        REDUCTIONS[to.kind],
        0 if token_weight is None else token_weight.data_ptr(),
        None if to.normalizer is None else float(to.normalizer),
        upstream if scale is None else upstream * scale.item(),
        None if grad is None else lines(grad),
        streaming,
    )
    return scalar(value, to.dtype), grad, None


# ---- rows of which other ranks have other classes: csrc/cpu/parts.h --------------------------------------------------

PART_COLUMNS = 4  # PartColumn


def part_loss(rows: Rows, start: int, vocab_size: int, columns: Tensor) -> int:
    """Into `columns` (PART_COLUMNS * N,), as bytes: what merge.contribution says of a part of class-index rows, which
    begins at class `start`. Returns how many rows count."""
    fields = rows_fields(readable(rows), _num_threads())
    return _native.part_loss(fields, start, vocab_size, columns.data_ptr())


def merge_parts(everyone: Tensor, first: int, N: int, dtype: torch.dtype) -> tuple[float, Tensor]:
    """The summed loss and the statistics (5, N) of whole rows, from bytes (R, B) of which those from `first` on are
    each part's columns."""
    stats = everyone.new_empty((5, N), dtype=dtype)
    parts, stride = everyone.shape
    columns, code = everyone.data_ptr() + first, DTYPE_CODES[dtype]
    return _native.merge_parts(columns, parts, stride, N, code, stats.data_ptr()), stats


def part_grad(rows: Rows, start: int, stats: Tensor, upstream: float, out: Tensor) -> None:
    """The gradient of a part's logits, `upstream` times that of every row's loss."""
    fields = rows_fields(readable(rows), _num_threads())
    _native.part_grad(fields, start, stats.data_ptr(), upstream, lines(out))


def scalar(value: float, dtype: torch.dtype) -> Tensor:
    """A loss as a tensor ()."""
    try:
        return torch.scalar_tensor(value, dtype=dtype, device="cpu")
    except RuntimeError:  # too large for it: infinity, as torch's sum would be
        return torch.tensor(value, dtype=torch.float64, device="cpu").to(dtype)


def empty_cache() -> int:
    """Gives the recycled gradient memory back to the system; returns the number of bytes."""
    return 0 if _native is None else _native.empty_cache()
