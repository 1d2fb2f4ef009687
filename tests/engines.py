"""Every backend on what this machine has: the native one on each instruction set, the CUDA one compiled for the host,
and both GPU backends on a GPU if there is one (`pytest -m gpu`; gpu_device.py)."""

from __future__ import annotations

from contextlib import AbstractContextManager, ExitStack, nullcontext
from typing import Any

import gpu_device
import pytest
import torch
from cuda_engine import cuda_on_host
from gpu_device import DEVICE, FAKE
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map_only
from triton_engine import emulated

import fastloss
from fastloss.backends import native

ISAS = [f"cpu:{isa}" for isa in native._native.available_isas()]
GPUS = [] if DEVICE is None else [f"{backend}:gpu" for backend in gpu_device.BACKENDS]
ENGINES = [*ISAS, "cuda:host", "reference", *(pytest.param(gpu, marks=pytest.mark.gpu) for gpu in GPUS)]
ONE_OF_EACH = ("cpu", "cuda:host", "reference")  # for what does not depend on the instruction set


def on_engine(name: str) -> AbstractContextManager[Any]:
    """Everything inside runs on this backend, and where it has several ways to run, in this one."""
    backend, _, where = name.partition(":")
    if where == "host":
        return cuda_on_host()
    if where == "ptx":
        return emulated()
    stack = ExitStack()
    stack.enter_context(emulated() if FAKE and name == "triton:gpu" else fastloss.use_backend(backend))
    if where == "gpu":
        stack.enter_context(OnDevice())
    elif where:
        stack.callback(native._native.use_isa, native._native.current_isa())
        native._native.use_isa(where)
    return stack


class _There(torch.autograd.Function):
    """A copy on the device, of the same strides and the same place in its memory: some tests are about them."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return _copied(x, DEVICE)

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> Tensor:
        return _Back.apply(upstream)  # differentiable again


class _Back(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return _copied(x, "cpu")

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> Tensor:
        return _There.apply(upstream)


def _copied(x: Tensor, device: Any) -> Tensor:
    if x.numel() == 0:
        return x.detach().to(device)
    return _memory(x).to(device).as_strided(x.shape, x.stride(), x.storage_offset())


def _memory(x: Tensor) -> Tensor:
    """What a tensor is a view of, as far as it goes."""
    extent = 1 + sum((n - 1) * stride for n, stride in zip(x.shape, x.stride(), strict=True))
    return x.detach().as_strided((x.storage_offset() + extent,), (1,), 0)


class OnDevice(TorchFunctionMode):
    """Public functions of fastloss take CPU tensors to the device and bring what they return back, gradients too."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if not (getattr(func, "__module__", None) or "").startswith("fastloss"):
            return func(*args, **kwargs)
        there, options = tree_map_only(Tensor, _There.apply, args), tree_map_only(Tensor, _There.apply, kwargs)
        lower = torch.is_autocast_enabled("cpu")
        with torch.autocast(DEVICE.type, torch.get_autocast_dtype("cpu"), lower) if lower else nullcontext():
            out = func(*there, **options)
        if kwargs.get("inplace"):
            _memory(args[0]).copy_(_memory(there[0]))
        return tree_map_only(Tensor, _Back.apply, out)
