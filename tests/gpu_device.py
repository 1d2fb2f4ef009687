"""The device of the tests marked `gpu`, and the count of kernels that they launch there.

It is torch's CUDA device. With FASTLOSS_FAKE_GPU=1 it is a fake one (tests/fake_gpu.py): its memory is the host's, its
kernels are the CUDA sources compiled for the host; FASTLOSS_FAKE_GPU=triton adds Triton's, as PTX in an emulator, which
takes an hour. So the tests themselves are tested where there is no GPU.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from typing import Any
from unittest.mock import patch

import torch

from fastloss.backends import cuda

_FAKE = os.environ.get("FASTLOSS_FAKE_GPU", "0")
FAKE = _FAKE != "0"
BACKENDS = ("cuda",) if _FAKE == "1" else ("cuda", "triton")


def _device() -> torch.device | None:
    if FAKE:
        import fake_gpu

        return fake_gpu.device()
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else None


DEVICE = _device()


class Launches:
    """How many kernels of ours were launched on the device. A test that runs them in another process adds their number
    itself: `launches.number += ...`."""

    number = 0


launches = Launches()


@contextmanager
def counting() -> Iterator[Launches]:
    """Inside, `launches.number` begins with zero and counts the launches of both GPU backends."""
    launches.number = 0
    launch = cuda._launch

    def counted(function: Callable[..., None], on: torch.Tensor, *args: Any) -> None:
        launches.number += on.device == DEVICE or DEVICE is None
        launch(function, on, *args)

    with patch.object(cuda, "_launch", counted), _counting_triton():
        yield launches


@contextmanager
def _counting_triton() -> Iterator[None]:
    if find_spec("triton") is None:
        yield
        return
    from triton.runtime.jit import JITFunction

    run = JITFunction.run

    def counted(self: Any, *args: Any, **options: Any) -> Any:
        launches.number += not options.get("warmup", False)
        return run(self, *args, **options)

    with patch.object(JITFunction, "run", counted):
        yield


def synchronize() -> None:
    """Waits for the device."""
    if not FAKE:
        torch.cuda.synchronize()


def captured(work: Callable[[], Any]) -> Callable[[], None]:
    """A CUDA graph of what `work` does, with no warm-up before; the fake device does it again each time."""
    if FAKE:
        work()
        return lambda: work() and None
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        work()
    return graph.replay
