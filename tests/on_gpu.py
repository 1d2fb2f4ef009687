"""What tests of the GPU share: tensors there, streams, processes of their own."""

from __future__ import annotations

import copy
import multiprocessing
import pickle
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection
from typing import Any

import pytest
import torch
from engines import on_gpu_backend
from gpu_device import BACKENDS, DEVICE, FAKE, counting, launches
from linear_calls import Call
from torch import Tensor

from fastloss.backends import refusals

_SECONDS = 300  # after which a process of its own hangs: more than a busy machine ever needs


def must_run(backend: str) -> None:
    """Skips where a backend is not installed. On a GPU any other refusal is a failure."""
    assert DEVICE is not None
    if backend not in BACKENDS:
        pytest.skip(f"FASTLOSS_FAKE_GPU={backend} has it on the fake device")
    with on_gpu_backend(backend):
        reason = refusals(DEVICE, torch.float32, torch.int64)[backend]
    if reason is None:
        return
    if "No module named" in reason or "is not installed" in reason:
        pytest.skip(reason)
    pytest.fail(f"{backend}: {reason}")


def moved(value: Any, move: Callable[[Tensor], Tensor]) -> Any:
    """With its tensors moved: a tensor, a tuple, list or dictionary, or a call."""
    if isinstance(value, Tensor):
        return move(value)
    if isinstance(value, dict):
        return {name: moved(v, move) for name, v in value.items()}
    if isinstance(value, (tuple, list)):
        each = [moved(v, move) for v in value]
        return type(value)(*each) if hasattr(value, "_fields") else type(value)(each)
    if isinstance(value, Call):
        own = copy.copy(value)
        own.target, own.options, own.head = (moved(v, move) for v in (value.target, value.options, value.head))
        return own
    return value


def there(value: Any) -> Any:
    """With tensors on the GPU."""
    return moved(value, lambda t: t.to(DEVICE))


def here(value: Any) -> Any:
    """With tensors on the CPU."""
    return moved(value, lambda t: t.cpu())


def size(real: int, fake: int) -> int:
    """Of a tensor: what the fake device computes on the host is small."""
    return fake if FAKE else real


@contextmanager
def side_stream() -> Iterator[None]:
    """Inside, another stream is the current one. It waits for nothing."""
    if FAKE:
        yield
        return
    with torch.cuda.stream(torch.cuda.Stream(DEVICE)):
        yield


def keep_busy(cycles: int) -> None:
    """Of the current stream."""
    if not FAKE:
        torch.cuda._sleep(cycles)  # type: ignore[no-untyped-call]


def in_own_process(backend: str, function: Callable[..., Any], *args: Any) -> Any:
    """function(*args) with the backend, in a Python of its own; its launches count here. Results are CPU tensors and
    what else can be pickled; arguments have no tensors."""
    context = multiprocessing.get_context("spawn")
    mine, other = context.Pipe()
    process = context.Process(target=_run, args=(other, backend, function, args), daemon=True)
    process.start()
    other.close()
    try:
        assert mine.poll(_SECONDS), "the process hangs"
        # Not as torch sends tensors to processes, in memory that is shared: the other process may be gone already.
        value, number, error = pickle.loads(mine.recv_bytes())
    finally:
        process.join(20)
        process.kill()
    launches.number += number
    assert error is None, error
    return value


def _run(pipe: Connection, backend: str, function: Callable[..., Any], args: tuple[Any, ...]) -> None:
    value, error = None, None
    # In this order: an emulator puts itself in the place of what is counted.
    with on_gpu_backend(backend), counting() as seen:
        try:
            value = function(*args)
        except Exception:
            error = traceback.format_exc()
        pipe.send_bytes(pickle.dumps((value, seen.number, error)))
