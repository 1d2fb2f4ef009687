"""Registers, shared memory and blocks of the compiled kernels, and the bytes that they have in flight.

A multiprocessor has its share of the memory's bandwidth only while latency x bandwidth bytes, for which it has asked,
are still to come."""

from __future__ import annotations

import re
from collections.abc import Iterable
from functools import lru_cache
from typing import Any, NamedTuple

import cuda_ptx
import torch
import triton_engine
from gpu_counts import SECTOR, STEP, Count, kernel_name

from fastloss.backends.device import Upstream

LATENCY = 800e-9  # seconds from a load to its data under load; what is assumed, not measured
MAIN = ("row_loss_grad", "row_states", "row_grad")


class Gpu(NamedTuple):
    name: str
    arch: str  # that kernels are compiled for
    executed: str  # the architecture for which CUDA launches were counted: rows are cut as on this GPU
    multiprocessors: int
    bandwidth: float  # bytes a second
    shared: int  # bytes of a multiprocessor

    @property
    def needed(self) -> float:
        """Bytes in flight per multiprocessor."""
        return LATENCY * self.bandwidth / self.multiprocessors


# The A100 of 80 GB: that of 40 GB, 1555 GB/s, needs three quarters of it.
GPUS = (
    Gpu("A100", "sm_80", "sm_80", 108, 2039e9, 164 << 10),
    Gpu("H100", "sm_90", "sm_90", 132, 3350e9, 228 << 10),
    Gpu("B200", "sm_100", "sm_90", 148, 8000e9, 228 << 10),
)


class Occupancy(NamedTuple):
    """One kernel on one GPU. `in_flight`: bytes that a block asks for before it uses the first of them."""

    gpu: Gpu
    threads: int
    registers: int
    spilled: int
    shared: int
    in_flight: float

    @property
    def blocks(self) -> int:
        """Per multiprocessor: what registers, threads and shared memory leave room for."""
        per_warp = -(-self.registers * 32 // 256) * 256
        by_registers = 65536 // (per_warp * (self.threads // 32))
        by_shared = self.gpu.shared // (self.shared + 1024)  # the system takes 1 KiB for each block
        return min(by_registers, by_shared, 2048 // self.threads, 32)

    @property
    def have(self) -> float:
        """Bytes in flight per multiprocessor while all its blocks load."""
        return self.blocks * self.in_flight

    def as_dict(self) -> dict[str, Any]:
        return self._asdict() | {
            "gpu": self.gpu.name,
            "blocks": self.blocks,
            "have": self.have,
            "need": self.gpu.needed,
        }


def in_flight(stats: Any) -> float:
    """Bytes that a block asks for at once, from what was executed: all asynchronous copies, which are issued before the
    first is waited for; otherwise the loads of sixteen bytes up to the first such store."""
    blocks = stats.grid[0] * stats.grid[1] * stats.grid[2]
    lines = sorted(stats.per_pc.items())
    copied = sum(sectors for _, (text, _, _, sectors) in lines if "cp.async" in text)
    if copied:
        return copied * SECTOR / blocks
    wide = [(text, moved / requests) for _, (text, requests, moved, _) in lines if ".v4" in text]
    first_store = next((i for i, (text, _) in enumerate(wide) if "st.global" in text), len(wide))
    warps = stats.block[0] // 32
    return sum(per_warp for _, per_warp in wide[:first_store]) * warps


# ---- what the assembler says -----------------------------------------------------------------------------------------


@lru_cache
def _cuda_resources(dtype: str, arch: str) -> dict[str, tuple[int, int]]:
    """(registers, bytes spilled) of each kernel."""
    said = cuda_ptx.compile_element(dtype, arch, "cubin", "--resource-usage")[1]
    found = {}
    for block in said.split("Compiling entry function '")[1:]:
        spilled = sum(int(n) for n in re.findall(r"(\d+) bytes spill", block))
        registers = re.search(r"Used (\d+) registers", block)
        assert registers is not None, block
        found[block.split("'")[0]] = int(registers[1]), spilled
    return found


def spills(arches: Iterable[str], dtypes: Iterable[str]) -> tuple[int, list[str]]:
    """How many kernels of the cuda backend the assembler made, and those that spill registers."""
    made = [
        (f"{name} ({arch})", spilled)
        for arch in arches
        for dtype in dtypes
        for name, (_, spilled) in _cuda_resources(dtype, arch).items()
    ]
    return len(made), [name for name, spilled in made if spilled]


@lru_cache
def _triton_resources(dtype: torch.dtype, V: int, arch: str) -> dict[str, tuple[int, int]]:
    rows, out = triton_engine.make_rows(2, V, dtype)
    upstream = Upstream(1.0, denominator=out["denominator"])
    launches = triton_engine.launches(lambda k: k.row_loss_grad(rows, upstream, out["loss"], out["grad"], False))
    launches += triton_engine.launches(lambda k: k.row_stats(rows, out["loss"], out["stats"], None, False))
    launches += triton_engine.launches(lambda k: k.row_grad(rows, out["stats"], upstream, out["grad"], False))
    return {
        launch.kernel.__name__: tuple(triton_engine.resources(triton_engine.compiled(launch, arch)))
        for launch in launches
        if launch.kernel.__name__ in MAIN
    }


def occupancies(counts: Iterable[Count], gpus: tuple[Gpu, ...] = GPUS) -> dict[tuple[Any, ...], list[Occupancy]]:
    """(engine, kernel, dtype, V) -> the kernel on each GPU that launches it for a loss and its gradient."""
    found: dict[tuple[Any, ...], list[Occupancy]] = {}
    for count in counts:
        work = count.work
        if work.way != STEP or work.engine not in ("cuda", "triton") or work.V not in (32000, 128256):
            continue
        for gpu in gpus:
            for name, stats in _main_launches(count).items():
                if work.arch == _executed(work.engine, name, gpu):
                    key = work.engine, name, work.dtype_name, work.V
                    found.setdefault(key, []).append(_occupancy(count, name, stats, gpu))
    return found


def _executed(engine: str, kernel: str, gpu: Gpu) -> str:
    """The architecture whose launches are like this GPU's: of the CUDA kernels only row_loss_grad is cut to fit it."""
    return gpu.executed if engine == "cuda" and kernel == "row_loss_grad" else "sm_80"


def _main_launches(count: Count) -> dict[str, Any]:
    """The first launch of each: the backward's finds nothing left to do."""
    first: dict[str, Any] = {}
    for stats, _ in count.launches:
        if kernel_name(stats) in MAIN:
            first.setdefault(kernel_name(stats), stats)
    return first


def _occupancy(count: Count, name: str, stats: Any, gpu: Gpu) -> Occupancy:
    work = count.work
    if work.engine == "cuda":
        registers, spilled = _cuda_resources(work.dtype_name, gpu.arch)[stats.kernel]
    else:
        registers, spilled = _triton_resources(work.dtype, work.V, gpu.arch)[name]
    shared = stats.shared_bytes + stats.static_shared
    return Occupancy(gpu, stats.block[0], registers, spilled, shared, in_flight(stats))
