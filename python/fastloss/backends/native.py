"""The CPU kernels: torch tensors to the addresses and sizes that fastloss._native takes."""

from __future__ import annotations

import os
from typing import Any

import torch
from torch import Tensor

from ..arguments import COMPUTE_DTYPE
from ..spec import REDUCTIONS, Spec

try:
    from .. import _native
except ImportError as error:  # a source tree, or a wheel built without its kernels
    _native = None  # type: ignore[assignment]
    _import_error = str(error)

DTYPE_CODES = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3}
_num_threads = torch.get_num_threads
_RECYCLE_BYTES = 8 << 20  # below this, malloc itself keeps memory warm

if _native is not None and "FASTLOSS_ISA" in os.environ:
    try:
        _native.use_isa(os.environ["FASTLOSS_ISA"])
    except ValueError as error:
        raise ValueError(f"environment variable FASTLOSS_ISA: {error}") from None


def refuses(device: torch.device, dtype: torch.dtype, target_dtype: torch.dtype) -> str | None:
    """Why these kernels cannot run such a call; None if they can."""
    if _native is None:
        return f"fastloss._native is not built: {_import_error}"
    if device.type != "cpu":
        return f"runs on cpu tensors, not on {device.type}"
    if dtype not in DTYPE_CODES:
        return f"takes float32, bfloat16, float16 or float64, not {dtype}"
    return None


def empty_grad(input: Tensor) -> tuple[Tensor, bool]:
    """An uninitialised (N, V) gradient, and whether its memory is recycled (its pages exist)."""
    count = input.numel()
    if count * input.element_size() < _RECYCLE_BYTES:
        return (torch.empty_like(input) if input.is_contiguous() else input.new_empty(input.shape)), False
    buffer = _native.Buffer(count * input.element_size())
    return torch.frombuffer(buffer, dtype=input.dtype, count=count).view(input.shape), buffer.recycled


def _rows(input: Tensor, target: Tensor, weight: Tensor | None, spec: Spec) -> tuple[tuple[Any, ...], Any]:
    """The rows as the kernels read them, and the tensors that own their memory."""
    if input.shape[1] > 1 and input.stride(1) != 1:
        input = input.contiguous()
    dtype = input.dtype
    if target.dtype is not torch.int64:
        target = as_probs(target, dtype)
    elif not target.is_contiguous():
        target = target.contiguous()
    if weight is not None:
        weight = weight.detach().to(COMPUTE_DTYPE[dtype]).contiguous()
    return rows_fields(input, target, weight, spec, _num_threads()), (input, target, weight)


def rows_fields(input: Tensor, target: Tensor, weight: Tensor | None, spec: Spec, threads: int = 1) -> tuple[Any, ...]:
    """What csrc/python.h, parse_rows, reads: tensors must be as it expects them."""
    N, V = input.shape
    soft = target.dtype is not torch.int64
    stride, code = (target.stride(0), DTYPE_CODES[target.dtype]) if soft else (0, 0)
    address = 0 if weight is None else weight.data_ptr()
    logits = (input.data_ptr(), N, V, input.stride(0), DTYPE_CODES[input.dtype])
    return (*logits, soft, target.data_ptr(), stride, code, address, *spec, threads)


def as_probs(q: Tensor, dtype: torch.dtype) -> Tensor:
    """Class probabilities in a dtype that the kernels read beside logits of `dtype`, classes contiguous."""
    if (q.dtype == torch.float64) != (dtype == torch.float64) or q.dtype not in DTYPE_CODES:
        q = q.to(COMPUTE_DTYPE[dtype])
    return q.contiguous() if q.shape[1] > 1 and q.stride(1) != 1 else q


def row_states(input: Tensor, target: Tensor, weight: Tensor | None, spec: Spec) -> Tensor:
    """(N, 5) float64: the state of each row over this part of the vocabulary (csrc/row_state.h)."""
    rows, owners = _rows(input, target, weight, spec)
    states = torch.empty((input.shape[0], 5), dtype=torch.float64)
    _native.row_states(rows, states.data_ptr())
    del owners
    return states


def merge_states(a: Tensor, b: Tensor) -> Tensor:
    """The states of the union of two disjoint parts of the vocabulary."""
    a, b = a.contiguous(), b.contiguous()
    out = torch.empty_like(a)
    _native.merge_states(a.data_ptr(), b.data_ptr(), out.data_ptr(), a.shape[0])
    return out


def row_loss(
    input: Tensor, target: Tensor, weight: Tensor | None, spec: Spec, extras: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """See reference.row_loss."""
    rows, owners = _rows(input, target, weight, spec)
    N = input.shape[0]
    dtype = COMPUTE_DTYPE[input.dtype]
    loss, stats = torch.empty(N, dtype=dtype), torch.empty((5, N), dtype=dtype)
    argmax = torch.empty(N if extras else 0, dtype=torch.int64)
    _native.row_loss(rows, loss.data_ptr(), stats.data_ptr(), argmax.data_ptr() if extras else 0, extras)
    del owners
    return loss, stats, argmax


def row_grad(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None,
    spec: Spec,
    stats: Tensor,
    upstream: list[Tensor | None],
    out: Tensor | None = None,
) -> Tensor:
    """See reference.row_grad."""
    rows, owners = _rows(input, target, weight, spec)
    grad = empty_grad(input)[0] if out is None else out
    upstream = [None if g is None else g.to(stats.dtype) for g in upstream]
    pointers = [(0, 0) if g is None else (g.data_ptr(), g.stride(0)) for g in upstream]
    _native.row_grad(rows, stats.data_ptr(), pointers, grad.data_ptr(), grad.stride(0))
    del owners
    return grad


def row_loss_grad(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None,
    token_weight: Tensor | None,
    normalizer: Tensor | None,
    spec: Spec,
    reduction: str,
    out_dtype: torch.dtype,
    upstream: float,
    need_grad: bool,
    out: Tensor | None = None,
    stats: Tensor | None = None,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """The reduced loss and, `upstream` times, its gradient: each row's while the row is in cache. No statistics."""
    rows, owners = _rows(input, target, weight, spec)
    if token_weight is not None:
        token_weight = token_weight.contiguous()
    grad, streaming = out, False
    if need_grad and grad is None:
        grad, streaming = empty_grad(input)
    value = _native.row_loss_grad(
        rows,
        REDUCTIONS[reduction],
        0 if token_weight is None else token_weight.data_ptr(),
        None if normalizer is None else float(normalizer),
        upstream,
        0 if grad is None else grad.data_ptr(),
        0 if grad is None else grad.stride(0),
        streaming,
    )
    del owners
    return _scalar(value, out_dtype), grad, None


def _scalar(value: float, dtype: torch.dtype) -> Tensor:
    try:
        return torch.scalar_tensor(value, dtype=dtype)
    except RuntimeError:  # too large for it: infinity, as torch's sum would be
        return torch.tensor(value, dtype=torch.float64).to(dtype)


def empty_cache() -> int:
    """Gives the recycled gradient memory back to the system; returns the number of bytes."""
    return 0 if _native is None else _native.empty_cache()
