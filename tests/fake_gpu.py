"""A GPU where there is none, for `pytest -m gpu` with FASTLOSS_FAKE_GPU=1: tests/fake_gpu.cpp is a torch device whose
memory is the host's, and the cuda backend runs on it, its sources compiled for the host (tests/cuda_engine.py).

It shows that a test reaches the device, and that tensors are made there: operators refuse what CUDA's refuse. It has no
streams or graphs, no half of a microsecond in which something could go wrong, and nothing of torch.cuda.
"""

from __future__ import annotations

import ctypes
import os
import sys
import types
from contextlib import nullcontext
from functools import lru_cache
from pathlib import Path
from typing import Any

import cuda_engine
import torch

from fastloss.backends import cuda

NAME = "fakegpu"
SOURCE = Path(__file__).with_suffix(".cpp")


@lru_cache(maxsize=1)
def device() -> torch.device:
    """Makes the device known to torch, once, and the cuda backend's kernels run on it."""
    torch.utils.rename_privateuse1_backend(NAME)
    ctypes.CDLL(str(_library()), ctypes.RTLD_GLOBAL).fastloss_fake_gpu()
    torch._register_device_module(NAME, _device_module())
    torch.utils.generate_methods_for_privateuse1_backend()
    built = _on_device(cuda_engine.modules()[0])
    cuda.module = lambda: built  # type: ignore[assignment]
    return torch.device(NAME, 0)


def on_host(x: Any) -> Any:
    """A tensor of the device as one of the CPU that has the same memory; anything else as it is."""
    return torch.ops.fastloss_fake_gpu.on_host(x) if isinstance(x, torch.Tensor) else x


def _on_device(host: Any) -> types.ModuleType:
    """fastloss._cuda for the host, which says that it runs on the fake device."""
    found = types.ModuleType("fastloss._cuda")
    vars(found).update({name: value for name, value in vars(host).items() if not name.startswith("__")})
    found.device_type = NAME  # type: ignore[attr-defined]
    return found


def _library() -> Path:
    root = Path(torch.__file__).parent
    include = [f"-I{root / 'include'}", f"-I{root / 'include' / 'torch' / 'csrc' / 'api' / 'include'}"]
    flags = ["-std=c++20", "-O1", "-fPIC", "-shared", "-w", *include]
    folder = cuda_engine.BUILD.with_name("fake_gpu") / cuda_engine.fingerprint(
        cuda_engine.compiler(), torch.__version__, sys.version, SOURCE.read_text(), *flags
    )
    library = folder / "fake_gpu.so"
    if not library.exists():
        folder.mkdir(parents=True, exist_ok=True)
        part = folder / f"{os.getpid()}.part"
        linked = [f"-L{root / 'lib'}", "-ltorch_cpu", "-lc10", f"-Wl,-rpath,{root / 'lib'}"]
        cuda_engine.run([cuda_engine.compiler(), *flags, str(SOURCE), "-o", str(part), *linked])
        part.replace(library)
    return library


class _Properties(types.SimpleNamespace):
    name, total_memory, L2_cache_size, multi_processor_count = "fake device", 8 << 30, 1 << 20, 1


def _device_module() -> types.ModuleType:
    """What torch and the benchmark ask a device's module."""
    found = types.ModuleType(f"torch.{NAME}")
    vars(found).update(
        is_available=lambda: True,
        is_initialized=lambda: True,
        device_count=lambda: 1,
        current_device=lambda: 0,
        set_device=lambda device: None,
        device=lambda device: nullcontext(),
        synchronize=lambda device=None: None,
        manual_seed_all=lambda seed: None,
        _is_in_bad_fork=lambda: False,
        get_amp_supported_dtype=lambda: [torch.float16, torch.bfloat16],
        get_device_properties=lambda device=None: _Properties(),
        get_device_name=lambda device=None: _Properties.name,
    )
    return found
