"""Launches that a CUDA graph captures.

Triton loads a kernel when it is first launched. CUDA refuses that while a stream is captured, unless the thread relaxes
its capture mode. Torch's allocator does the same when it needs memory.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import Any

_RELAXED = 2  # CU_STREAM_CAPTURE_MODE_RELAXED


@contextmanager
def loading_allowed() -> Iterator[None]:
    """Inside, this thread may load kernels while a graph is captured."""
    driver, mode = _driver(), ctypes.c_int(_RELAXED)
    if driver is None:
        yield
        return
    driver.cuThreadExchangeStreamCaptureMode(ctypes.byref(mode))  # which puts the former mode there
    try:
        yield
    finally:
        driver.cuThreadExchangeStreamCaptureMode(ctypes.byref(mode))


@lru_cache(maxsize=1)
def _driver() -> Any:
    """NVIDIA's driver library, which has been loaded already; None on other devices."""
    try:
        return ctypes.CDLL("libcuda.so.1")
    except OSError:
        return None
