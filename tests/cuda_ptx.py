"""The CUDA backend's launches executed as what nvcc compiles for a GPU: PTX, by ptxemu, on tensors where they lie."""

from __future__ import annotations

import bisect
import ctypes
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from importlib.util import find_spec
from typing import Any

import torch
from cuda_engine import BUILD, ELEMENTS, SOURCES, cuda_on_host, element_flags, fingerprint
from gpu_on_cpu import find_ptxemu


def missing() -> str | None:
    """What is not on this machine; None if kernels can be compiled and executed."""
    if find_spec("numpy") is None:
        return "numpy is not installed"
    if find_ptxemu() is None:
        return "ptxemu is not on the path"
    return None if shutil.which("nvcc") else "nvcc is not installed"


def compile_element(name: str, arch: str, kind: str, *flags: str) -> tuple[str, str]:
    """The path of rows.cu compiled for an element type and architecture to a `kind` (ptx or cubin), and what nvcc said;
    kept until a source changes."""
    folder = BUILD / fingerprint("nvcc", *flags)
    folder.mkdir(parents=True, exist_ok=True)
    output, said = folder / f"{name}.{arch}.{kind}", folder / f"{name}.{arch}.{kind}.txt"
    if not (output.exists() and said.exists()):
        command = ["nvcc", "-std=c++17", "-O3", f"-arch={arch}", f"-{kind}", *flags, *element_flags(name)]
        done = subprocess.run([*command, str(SOURCES / "rows.cu"), "-o", str(output)], capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(done.stderr)
        said.write_text(done.stdout + done.stderr)
    return str(output), said.read_text()


@lru_cache
def _module(name: str, arch: str) -> Any:
    ptxemu = find_ptxemu()
    assert ptxemu is not None
    with open(compile_element(name, arch, "ptx")[0]) as file:
        module = ptxemu.Module(file.read(), name)
    module.constants = module.mem
    return module


def _memory(constants: Any, tensors: list[torch.Tensor]) -> Any:
    """Emulated memory in which an address is what it is on the host; only a module's constants and these tensors are
    there."""
    import numpy as np
    from ptxemu.memory import Buffer, GlobalMem

    class HostMemory(GlobalMem):
        def add_host(self, name, ptr, nbytes, base_ptr, base_nbytes, keep, readonly=False):
            buffer = self.by_host.get((base_ptr, base_nbytes))
            if buffer is None:
                raw = (ctypes.c_uint8 * base_nbytes).from_address(base_ptr)
                buffer = Buffer(name, np.frombuffer(raw, np.uint8), base_ptr, readonly, keep)
                place = bisect.bisect(self.starts, base_ptr)
                self.bufs.insert(place, buffer)
                self.starts.insert(place, base_ptr)
                self.by_host[base_ptr, base_nbytes] = buffer
            buffer.allow(ptr, ptr + nbytes)
            return ptr

    memory = HostMemory()
    memory.bufs, memory.starts = list(constants.bufs), list(constants.starts)
    for tensor in tensors:
        find_ptxemu().Module._map(memory, tensor, "tensor")
    return memory


class Emulator:
    """A launcher for `cuda_on_host`. `log`: the counters of each launch."""

    def __init__(self, arch: str, check_races: bool = True) -> None:
        self.arch = arch
        self.check_races = check_races
        self.log: list[Any] = []
        self.tensors: dict[int, list[torch.Tensor]] = {}

    def remember(self, tensor: torch.Tensor) -> None:
        """A tensor whose address the backend has taken."""
        if tensor.numel():
            self.tensors.setdefault(_data_ptr(tensor), []).append(tensor.detach())

    def __call__(self, kernel: str, grid: int, block: int, cluster: int, shared: int, params: bytes) -> None:
        import numpy as np

        name = next(name for name in ELEMENTS if f"cuda_{name}" in kernel)
        module = _module(name, self.arch)
        words = np.frombuffer(params, np.uint64).tolist()
        module.mem = _memory(module.constants, [t for word in words for t in self.tensors.get(word, [])])
        self.log.append(
            module.launch(
                kernel,
                grid,
                block,
                [params],
                shared_bytes=shared,
                check_races=self.check_races,
                cluster=cluster if cluster > 1 else None,
            )
        )


_data_ptr = torch.Tensor.data_ptr


@contextmanager
def cuda_as_ptx(arch: str = "sm_80", check_races: bool = True) -> Iterator[Emulator]:
    """The cuda backend on CPU tensors, every kernel as compiled PTX; yields the emulator."""
    emulator = Emulator(arch, check_races)

    def data_ptr(tensor: torch.Tensor) -> int:
        emulator.remember(tensor)
        return _data_ptr(tensor)

    torch.Tensor.data_ptr = data_ptr  # type: ignore[assignment,method-assign]
    try:
        with cuda_on_host(arch, emulator):
            yield emulator
    finally:
        torch.Tensor.data_ptr = _data_ptr  # type: ignore[method-assign]
