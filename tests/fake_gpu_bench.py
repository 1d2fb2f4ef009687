"""python tests/fake_gpu_bench.py doctor|bench ...: `python -m fastloss` where the fake GPU is the device, for dry runs
of benchmarks/gpu_acceptance.py. Its clock is the host's: nothing that it says of time is a measurement of anything."""

from __future__ import annotations

import time
from typing import Any

import torch
from gpu_device import DEVICE, FAKE

from fastloss.bench import devices


class Event:
    """A moment. The fake device has done its work when a call returns."""

    def __init__(self, enable_timing: bool) -> None:
        self.moment = 0.0

    def record(self) -> None:
        self.moment = time.perf_counter()

    def elapsed_time(self, end: Event) -> float:
        return (end.moment - self.moment) * 1e3 or 1e-6


class Module:
    """What the benchmark takes from torch.cuda."""

    Event = Event

    def __init__(self) -> None:
        self._torch = torch.get_device_module(DEVICE)

    def get_device_properties(self, device: torch.device) -> Any:
        return self._torch.get_device_properties(device)

    def synchronize(self) -> None:
        self._torch.synchronize()

    def mem_get_info(self) -> tuple[int, int]:
        return 8 << 30, 8 << 30

    def memory_reserved(self) -> int:
        return 0

    def memory_allocated(self) -> int:
        return 0

    def max_memory_allocated(self) -> int:
        return 1 << 30  # nobody counts

    def reset_peak_memory_stats(self) -> None:
        pass

    def empty_cache(self) -> None:
        pass


def open_device(text: str) -> devices.Accelerator:
    """The fake device, whatever the name."""
    assert FAKE and DEVICE is not None, "FASTLOSS_FAKE_GPU=1 is not set"
    return devices.Accelerator(DEVICE, Module())


if __name__ == "__main__":
    from fastloss.__main__ import main
    from fastloss.bench.ranks import leave

    devices.open_device = open_device
    leave(main())  # the thread of autograd may abort a process whose Python shuts down
