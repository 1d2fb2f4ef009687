"""What every public function does around its arguments: subclasses of Tensor find their way, tensors on another device
are refused, and errors name the function that was called."""

from __future__ import annotations

import inspect
import re
import sys
from collections.abc import Callable
from functools import wraps
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function
from torch.utils._pytree import tree_map_only

from .parallel.dtensor import arguments_by_name, on_shards
from .spec import PLAIN_TYPES

_F = TypeVar("_F", bound=Callable[..., Any])
_ERRORS = (IndexError, NotImplementedError, RuntimeError, TypeError, ValueError)
_is_compiling = torch.compiler.is_compiling
_mode_active = torch._C._is_torch_function_mode_enabled
# Arguments that may be numbers: as for torch, a tensor of one element on the CPU is one, wherever the others are.
_NUMBERS = {"alpha", "ignore_index", "label_smoothing", "logit_scale", "normalizer", "prior_log_var", "prior_mean"}
_NUMBERS |= {"scale", "softcap", "temperature", "z_loss", "byte_count"}


def public(function: _F) -> _F:
    """A function that users call; DTensors are left to what it calls."""
    return _around(function, _of_arrived(function))


def public_loss(function: _F) -> _F:
    """A loss that users call. Where DTensors shard the classes it is computed as with `shard`; it returns DTensors, and
    so are the gradients."""
    of_arrived = _of_arrived(function)

    def with_subclasses(*args: Any, **kwargs: Any) -> Any:
        if "torch.distributed.tensor" in sys.modules:  # else there are none
            from torch.distributed.tensor import DTensor

            if any(isinstance(t, DTensor) for t in (*args, *kwargs.values())):
                return on_shards(of_arrived, inspect.signature(function).bind(*args, **kwargs))
        return of_arrived(*args, **kwargs)

    return _around(function, with_subclasses)


def _of_arrived(function: _F) -> _F:
    """The function of tensors that have arrived, also where a DTensor's redistribution is under way."""

    @wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        return function(*map(_waited, args), **{name: _waited(value) for name, value in kwargs.items()})

    return call  # type: ignore[return-value]


def _around(function: _F, with_subclasses: Callable[..., Any]) -> _F:
    @wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        values = (*args, *kwargs.values()) if kwargs else args
        if has_torch_function(values):
            return _overridden(call, values, args, kwargs)
        if _is_compiling():  # errors are the tracer's to report
            return _by_kind(function, with_subclasses, values, args, kwargs)(*args, **kwargs)
        try:
            return _by_kind(function, with_subclasses, values, args, kwargs)(*args, **kwargs)
        except _ERRORS as error:
            _put_name(function.__qualname__, error)
            raise

    return call  # type: ignore[return-value]


def _overridden(call: _F, values: Any, args: Any, kwargs: Any) -> Any:
    """By the __torch_function__ of a mode or a subclass. What subclasses inherit gives them what comes back, but knows
    no named tuples."""
    kinds = [type(v) for v in values if isinstance(v, Tensor) and has_torch_function((v,))]
    if _mode_active() or any(_overrides(kind) for kind in kinds):
        return handle_torch_function(call, values, *args, **kwargs)
    with torch._C.DisableTorchFunctionSubclass():
        found = call(*args, **kwargs)
        return tree_map_only(Tensor, lambda t: t.as_subclass(kinds[0]), found)


def _overrides(kind: type[Tensor]) -> bool:
    return getattr(kind.__torch_function__, "__func__", None) is not Tensor.__torch_function__.__func__  # type: ignore[attr-defined]


def _by_kind(
    function: Callable[..., Any], with_subclasses: Callable[..., Any], values: Any, args: Any, kwargs: Any
) -> Callable[..., Any]:
    """Which of the two takes these tensors; none where they are on different devices."""
    device, run = None, function
    for value in values:
        if type(value) not in PLAIN_TYPES:
            if not isinstance(value, Tensor):
                continue
            run = with_subclasses
        if device is None:
            device = value.device
        elif value.device != device:
            _check_devices(inspect.signature(function).bind(*args, **kwargs))
    return run


def _check_devices(bound: inspect.BoundArguments) -> None:
    named = arguments_by_name(bound)
    tensors = {name: value for name, value in named.items() if isinstance(value, Tensor)}
    first = next(iter(tensors))
    device = tensors.pop(first).device
    for name, value in tensors.items():
        number = name in _NUMBERS and value.numel() == 1 and value.device.type == "cpu"
        if value.device != device and not number:
            raise RuntimeError(f"{name}: expected a tensor on {device} like {first}, got one on {value.device}")


class _Waited(torch.autograd.Function):
    """A tensor under way from other ranks -> the tensor that arrived."""

    @staticmethod
    def forward(ctx: Any, x: Any) -> Tensor:
        arrived: Tensor = x.trigger_wait()
        return arrived.view_as(arrived)

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> Tensor:
        return upstream


def _waited(value: Any) -> Any:
    """What functional collectives return (AsyncCollectiveTensor) has no memory to be read before it has arrived."""
    if not hasattr(value, "trigger_wait"):
        return value
    return _Waited.apply(value) if value.requires_grad else value.trigger_wait()


def _put_name(name: str, error: Exception) -> None:
    """As torch begins its messages. Of functions that call each other, the outermost is the one that the user knows."""
    message = error.args[0] if error.args else ""
    if type(error) in _ERRORS and isinstance(message, str):
        said = re.match(r"[\w.]+\(\)(:?) ", message)
        rest = message if said is None else message[said.end() :]
        error.args = (f"{name}(){':' if said is None else said[1]} {rest}", *error.args[1:])
