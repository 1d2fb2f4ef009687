"""The CUDA C++ kernels: torch tensors to the addresses and sizes that fastloss._cuda takes."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import lru_cache
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from ..spec import Objective, Rows
from ..strides import count_rows
from . import triton
from .device import STATE_FIELDS, Kernels, Passing, Upstream
from .native import DTYPE_CODES, lines, rows_fields


@lru_cache(maxsize=1)
def module() -> ModuleType | str:
    """fastloss._cuda, or why there is none."""
    try:
        return importlib.import_module("fastloss._cuda")
    except ImportError as error:  # built without nvcc, or for another Python
        return f"fastloss._cuda is not built: {error}"


def refuses(device: torch.device, dtype: torch.dtype, target_dtype: torch.dtype, objective: Objective) -> str | None:
    """Why these kernels cannot run such a call; None if they can."""
    built = module()
    if isinstance(built, str):
        return built
    if device.type != built.device_type:
        return f"runs on {built.device_type} tensors, not on {device.type}"
    if dtype not in DTYPE_CODES:
        return f"takes float32, bfloat16, float16 or float64, not {dtype}"
    if torch.version.hip is not None:
        return "this torch is built for ROCm"
    if device.type == "cuda" and not torch.cuda.is_available():
        return "torch sees no CUDA device"
    if device.type == "cuda" and device.index is None:
        device = torch.device("cuda", torch.cuda.current_device())
    if device.type == "cuda" and torch.cuda.get_device_capability(device) < (8, 0):
        return "its kernels need compute capability 8.0"
    return None if device in _able else _cannot_run(built, device)


_able: set[torch.device] = set()


def _cannot_run(built: ModuleType, device: torch.device) -> Passing | None:
    with _on(device):
        reason: str | None = built.cannot_run(device.index or 0)
    if reason is None:
        _able.add(device)
        return None
    return Passing(reason)


def _on(device: torch.device) -> AbstractContextManager[Any]:
    """The device as CUDA's current one; it stays as it is where it is that already."""
    if device.type != "cuda" or device.index == torch.cuda.current_device():
        return nullcontext()
    return torch.cuda.device(device)


def kernels() -> Kernels:
    """What fastloss._cuda launches."""
    return _KERNELS


def _address(x: Tensor | None) -> int:
    return 0 if x is None else x.data_ptr()


def _upstream_fields(upstream: Upstream) -> tuple[Any, ...]:
    """What csrc/cuda/bindings.cpp, parse_upstream, reads."""
    loss, *others, token_weight, denominator = upstream
    number, losses = (0.0, loss) if isinstance(loss, Tensor) else (loss, None)
    vectors = [v for g in (losses, *others) for v in ((0, 0) if g is None else (g.data_ptr(), g.stride(0)))]
    return (number, *vectors, _address(token_weight), _address(denominator))


def _cut(rows: Rows) -> tuple[int, int, int, int]:
    """What decides how rows are cut into blocks."""
    picks = rows.target.shape[1] if rows.probs is not None else 1
    return rows.V, DTYPE_CODES[rows.input.dtype], int(rows.spec.objective), picks


def _on_chip(rows: Rows) -> bool:
    return _chip_slices(_built(), rows.input.device, *_cut(rows)) > 0


@lru_cache
def _chip_slices(built: Any, device: torch.device, *cut: int) -> int:
    with _on(device):
        return built.chip_slices(device.index or 0, *cut)


def _row_stats(
    rows: Rows, loss: Tensor, stats: Tensor, argmax: Tensor | None, rank: Tensor | None, whole: bool = False
) -> None:
    x, built = rows.input, _built()
    N, slices = rows.N, built.slices(*_cut(rows))
    states = x.new_empty((N, slices, STATE_FIELDS), dtype=rows.compute_dtype)
    parts = None if argmax is None else x.new_empty((2, N, slices), dtype=torch.int32)
    addresses = (_address(t) for t in (states, parts, loss, stats, argmax, rank))
    _launch(built.row_stats, x, rows_fields(rows), *addresses, whole)


def _row_grad(rows: Rows, stats: Tensor, upstream: Upstream, grad: Tensor, unless_one: bool) -> None:
    fields = rows_fields(rows), stats.data_ptr(), _upstream_fields(upstream)
    _launch(_built().row_grad, grad, *fields, unless_one, lines(grad))


def _row_loss_grad(rows: Rows, upstream: Upstream, loss: Tensor, grad: Tensor, unless_one: bool) -> None:
    fields = rows_fields(rows), _upstream_fields(upstream)
    _launch(_built().row_loss_grad, grad, *fields, unless_one, loss.data_ptr(), lines(grad))


def _denominator(rows: Rows, token_weight: Tensor | None, out: Tensor) -> None:
    _launch(_built().denominator, out, rows_fields(rows), _address(token_weight), out.data_ptr())


def _total(loss: Tensor, token_weight: Tensor | None, denominator: Tensor | None, out: Tensor) -> None:
    losses = loss.data_ptr(), loss.shape[0], DTYPE_CODES[loss.dtype]
    operands = _address(token_weight), _address(denominator)
    _launch(_built().total, out, *losses, *operands, out.data_ptr(), DTYPE_CODES[out.dtype])


def _rescale(grad: Tensor, upstream: Tensor) -> None:
    matrix = lines(grad), count_rows(grad), grad.shape[-1], DTYPE_CODES[grad.dtype]
    _launch(_built().rescale, grad, *matrix, upstream.data_ptr())


def _launch(function: Callable[..., None], on: Tensor, *args: Any) -> None:
    """On the caller's stream of the device that the tensor is on."""
    if on.device.type != "cuda":  # the kernels compiled for the host, in the tests
        return function(*args, (0, 0))
    with _on(on.device):
        return function(*args, (on.device.index, torch.cuda.current_stream(on.device).cuda_stream))


def _built() -> Any:
    return module()


def _takes_head(rows: Rows, hidden: Tensor, head: Tensor) -> bool:
    """Whether Triton runs here and takes them: csrc/cuda has no kernels that multiply, and without Triton's
    `filter_eps` would have no effect wherever csrc/cuda is built."""
    refused = triton.refuses(hidden.device, hidden.dtype, rows.target.dtype, rows.spec.objective)
    return refused is None and triton.takes_head(rows, hidden, head)


def _of_triton(name: str) -> Callable[..., Any]:
    """A function of Triton's `Kernels`, which imports Triton when it is first called."""
    return lambda *args: getattr(triton.kernels(), name)(*args)


_KERNELS = Kernels(
    _on_chip,
    _row_stats,
    _row_grad,
    _row_loss_grad,
    _denominator,
    _total,
    _rescale,
    _takes_head,
    *map(_of_triton, ("head_stats", "head_tiles", "head_grad", "kept_product")),
)
