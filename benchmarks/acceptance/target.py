"""The device that stages run on: the one of the tests marked gpu (tests/gpu_device.py), a real one or the fake one."""

from __future__ import annotations

import sys
from typing import NoReturn

import torch
from gpu_device import DEVICE, FAKE, synchronize

import fastloss
from fastloss.backends import refusals
from fastloss.bench import ranks

if DEVICE is None:
    raise SystemExit("torch sees no CUDA device here")
device: torch.device = DEVICE
__all__ = ["FAKE", "backends", "bench_device", "device", "fastloss", "leave", "occupy", "synchronize"]


def backends() -> list[str]:
    """The GPU backends that would run a bfloat16 loss on the device, the one that users get first."""
    reasons = refusals(device, torch.bfloat16, torch.int64)
    return [name for name, reason in reasons.items() if reason is None and name in ("cuda", "triton")]


def bench_device():
    """The device as the benchmark sees it: its clock, its memory."""
    if FAKE:
        from fake_gpu_bench import open_device

        return open_device("cuda")
    from fastloss.bench.devices import open_device

    return open_device("cuda")


def leave(status: int) -> NoReturn:
    """Ends this process. The fake device's thread of autograd may still give up its last tensor, for which it wants
    Python's lock: when Python shuts down meanwhile, that thread aborts the process."""
    if FAKE:
        ranks.leave(status)
    sys.exit(status)


def occupy(milliseconds: float) -> None:
    """Gives the device something to do."""
    if not FAKE:
        torch.cuda._sleep(int(milliseconds * 1.5e6))
