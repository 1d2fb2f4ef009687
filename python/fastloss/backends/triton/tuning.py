"""Kernels whose shapes are timed on the device: the first call of a kind tries them all, and every later one of the
process takes what was fastest then. A kind is never of N: a row's bits must not depend on the batch around it.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from threading import RLock
from typing import Any

import torch
import triton

Prune = Callable[[list[Any], dict[str, Any]], list[Any]]  # (configs, constants of a call) -> those that suit, in order


class Tuned:
    """A kernel that is launched, kernel[grid](...), without what `configs` say. Their first is the shape where nothing
    can be timed. Options are triton.autotune's."""

    def __init__(self, fn: Any, configs: list[Any], prune: Prune, **options: Any) -> None:
        self.fn, self.configs, self.prune, self.options = fn, configs, prune, options
        self.tuners: dict[torch.device, Any] = {}
        self.lock = RLock()  # autograd has a thread for each device, and a tuner remembers what it is called with

    def __getitem__(self, grid: Any) -> Callable[..., None]:
        return partial(self.run, grid)

    def run(self, grid: Any, *args: Any, **meta: Any) -> None:
        """A launch on the device of the first argument."""
        device = args[0].device
        if not is_timed(device):
            self.fn[grid](*args, **meta, **self.prune(self.configs, meta)[0].all_kwargs())
            return
        with self.lock:
            if device not in self.tuners:  # Triton's own memory knows one device
                chosen_by = {"early_config_prune": self._candidates}
                options = {"prune_configs_by": chosen_by, "do_bench": partial(_time, device), **self.options}
                self.tuners[device] = triton.autotune(self.configs, **options)(self.fn)
            self.tuners[device][grid](*args, **meta)

    def _candidates(self, configs: list[Any], args: dict[str, Any], **meta: Any) -> list[Any]:
        """What is timed: inside a graph that is captured, where nothing may wait, one."""
        found = self.prune(configs, meta)
        return found[:1] if _captures(next(iter(args.values())).device) else found


def is_timed(device: torch.device) -> bool:
    """CPU tensors are the interpreter's; and what is asked to be deterministic must not depend on a clock."""
    return device.type != "cpu" and not torch.are_deterministic_algorithms_enabled()


def _time(device: torch.device, call: Callable[[], Any], quantiles: Any) -> Any:
    """Triton before 3.9 also times a single candidate, which waits for the device and so breaks a capture. Where the
    copy that `restored` takes finds no memory, nothing is timed, and the first candidate stays."""
    if _captures(device):
        return [0.0] * len(quantiles)
    try:
        return benchmark(call, quantiles)
    except torch.OutOfMemoryError:
        return [float("inf")] * len(quantiles)


def benchmark(call: Callable[[], Any], quantiles: Any) -> Any:
    """The clock of Triton's autotuner."""
    return triton.runtime.driver.active.get_benchmarker()(call, quantiles=quantiles)


def _captures(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def tuned(
    configs: list[Any], key: list[str], prune: Prune = lambda configs, meta: configs, **hooks: Any
) -> Callable[[Any], Tuned]:
    """Makes a kernel Tuned: `key` are the arguments that, beside dtypes, make a kind."""
    return lambda fn: Tuned(fn, configs, prune, key=key, **hooks)


def restored(name: str, when: str) -> dict[str, Callable[..., None]]:
    """Hooks for a kernel that adds to its argument `name` where its constant `when` is true: what is run to be timed
    leaves it as it was."""
    copies: list[torch.Tensor] = []

    def before(args: dict[str, Any], reset_only: bool = False) -> None:
        if args[when] and not reset_only:
            copies.append(args[name].clone())

    def after(args: dict[str, Any], exception: Exception | None) -> None:
        if copies:
            args[name].copy_(copies.pop())

    return {"pre_hook": before, "post_hook": after}
