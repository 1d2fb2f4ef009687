"""Where the cases run. The CPU has done its work when a call returns. An accelerator does it while the host goes on:
its own events time it, and its second-level cache has to be kept from remembering the inputs."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any, NamedTuple

import psutil
import torch
from torch import Tensor

import fastloss

from ..backends import refusals, use_backend
from .cases import FASTLOSS, FIRST_TOUCH, Case, inputs
from .processes import child

KINDS = ("cpu", "cuda", "xpu")
_L2 = 128 << 20  # where the device does not say: more than any has
_SPIN = 2_000_000  # cycles, about a millisecond: what the host needs to launch one call


class Unavailable(RuntimeError):
    """There is no such device here."""


def nothing() -> None:
    pass


class Regime(NamedTuple):
    """One of the ways in which fastloss itself is measured; `prepare` runs before each call and is not timed."""

    label: str
    context: Callable[[], AbstractContextManager[Any]] = nullcontext
    prepare: Callable[[], object] = nothing


class Device:
    """What both have in common; this class is the CPU."""

    device = torch.device("cpu")
    warm_ups = 1
    wall_clock = True  # whether a call has done its work when it returns
    accelerator = False

    def describe(self) -> dict[str, Any]:
        """More than doctor says of the machine."""
        return {}

    def mark(self) -> Any:
        """A moment, between what was called before and what is called next."""
        return time.perf_counter()

    def seconds(self, start: Any, end: Any) -> float:
        """Between two marks, once the device was waited for."""
        return end - start

    def wait(self) -> None:
        """Until everything called is done."""

    def occupy(self) -> None:
        """Gives the device something to do while the host launches the next call."""

    def copies(self, nbytes: int) -> int:
        """How many inputs of this size take turns, so that none is in a cache when its turn comes. On the CPU one: the
        table's are larger than its caches."""
        return 1

    def available_bytes(self) -> int:
        return psutil.virtual_memory().available

    def release(self) -> None:
        """Gives memory back that nothing uses."""

    def regimes(self, case: Case) -> dict[str, Regime]:
        """Gradient memory that is used again, and memory that was never touched before."""
        recycled = {FASTLOSS: Regime("recycled")}
        if not case.backward or case.H:
            return recycled
        return recycled | {FIRST_TOUCH: Regime("first touch", prepare=fastloss.empty_cache)}

    def regimes_differ_in(self, backward: bool) -> str | None:
        """What tells them apart, if there is more than one."""
        return "gradient memory" if backward else None

    def extra_bytes(self, name: str, loss: Callable[..., Tensor], case: Case) -> int:
        """Peak memory of forward and backward above inputs and gradients, in a process of its own."""
        return child("memory", name=name, loss=case.loss, dtype=case.dtype, N=case.N, V=case.V, H=case.H)["extra_bytes"]


class Accelerator(Device):
    """A device of which `module` (torch.cuda, torch.xpu) tells events and memory."""

    warm_ups = 3
    wall_clock = False
    accelerator = True

    def __init__(self, device: torch.device, module: Any) -> None:
        self.device, self.module = device, module
        self.properties = module.get_device_properties(device)

    def describe(self) -> dict[str, Any]:
        return {
            "device": f"{self.device.type}: {self.properties.name}",
            "device_memory_gib": round(self.properties.total_memory / 2**30, 1),
            "l2_mib": round(self._l2_bytes() / 2**20, 1),
        }

    def mark(self) -> Any:
        event = self.module.Event(enable_timing=True)
        event.record()
        return event

    def seconds(self, start: Any, end: Any) -> float:
        return start.elapsed_time(end) / 1e3

    def wait(self) -> None:
        self.module.synchronize()

    def occupy(self) -> None:
        # Otherwise the time between two events would be the host's, where it launches more slowly than kernels run.
        if spin := getattr(self.module, "_sleep", None):
            spin(_SPIN)

    def copies(self, nbytes: int) -> int:
        return max(1, -(-2 * self._l2_bytes() // nbytes))

    def _l2_bytes(self) -> int:
        return getattr(self.properties, "L2_cache_size", 0) or _L2

    def available_bytes(self) -> int:
        cached = self.module.memory_reserved() - self.module.memory_allocated()
        return self.module.mem_get_info()[0] + cached

    def release(self) -> None:
        gc.collect()
        self.module.empty_cache()

    def regimes(self, case: Case) -> dict[str, Regime]:
        """Each backend that would take the case; the one that a user gets is the first."""
        reasons = refusals(self.device, case.torch_dtype(), torch.int64)
        names = [name for name, reason in reasons.items() if reason is None]
        names = [name for name in names if name != "reference"] or names
        entries = [FASTLOSS, *(f"{FASTLOSS}, {name}" for name in names[1:])]
        return {e: Regime(name, partial(use_backend, name)) for e, name in zip(entries, names, strict=True)}

    def regimes_differ_in(self, backward: bool) -> str | None:
        return "backend"

    def extra_bytes(self, name: str, loss: Callable[..., Tensor], case: Case) -> int:
        """What torch's allocator handed out at most."""
        data = inputs(case, device=self.device)
        for _ in range(2):  # the first compiles, and loads libraries with workspaces of their own
            data.forget()
            before = self.module.memory_allocated()
            self.module.reset_peak_memory_stats()
            loss(data.x, data.target, **data.arguments).backward()
            self.wait()
        return self.module.max_memory_allocated() - before - data.grad_bytes()


def open_device(text: str) -> Device:
    """The device of a name, or Unavailable."""
    try:
        device = torch.device(text)
    except RuntimeError as error:
        raise Unavailable(f"{text!r} is no device: {str(error).splitlines()[0]}") from None
    if device.type == "cpu":
        return Device()
    if device.type not in KINDS:
        raise Unavailable(f"measures on {', '.join(KINDS)}, not on {text}")
    module = torch.get_device_module(device)
    if not module.is_available():
        raise Unavailable(f"torch {torch.__version__} sees no {device.type} device here")
    try:
        if device.index is None:
            device = torch.device(device.type, module.current_device())
        module.set_device(device)  # whose stream events are recorded on
        return Accelerator(device, module)
    except (RuntimeError, AssertionError) as error:  # an index out of range, a driver that does not answer
        raise Unavailable(f"torch {torch.__version__} cannot use {text}: {str(error).splitlines()[0]}") from None
