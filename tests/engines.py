"""Every backend on what this machine has: the native one on each instruction set, the CUDA one compiled for the host,
and both GPU backends on a GPU if there is one (`pytest -m gpu`)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any

import pytest
import torch
from cuda_engine import cuda_on_host
from torch import Tensor
from triton_engine import emulated

import fastloss
from fastloss.backends import native

ISAS = [f"cpu:{isa}" for isa in native._native.available_isas()]
GPUS = ["cuda:gpu", "triton:gpu"] if torch.cuda.is_available() else []
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
    stack.enter_context(fastloss.use_backend(backend))
    if where == "gpu":
        stack.enter_context(tensors_on("cuda"))
    elif where:
        stack.callback(native._native.use_isa, native._native.current_isa())
        native._native.use_isa(where)
    return stack


@contextmanager
def tensors_on(device: str) -> Iterator[None]:
    """fastloss.cross_entropy takes CPU tensors to a device and brings what it returns back, gradients too."""
    loss = fastloss.cross_entropy

    def there(x: Any) -> Any:
        return x.to(device) if isinstance(x, Tensor) else x

    def back(x: Any) -> Any:
        if isinstance(x, Tensor):
            return x.cpu()
        return type(x)(*map(back, x)) if hasattr(x, "_fields") else x

    def cross_entropy(*args: Any, **kwargs: Any) -> Any:
        out = loss(*map(there, args), **{name: there(value) for name, value in kwargs.items()})
        return tuple(map(back, out)) if type(out) is tuple else back(out)

    fastloss.cross_entropy = cross_entropy  # type: ignore[assignment]
    try:
        yield
    finally:
        fastloss.cross_entropy = loss
