"""Triton's kernels without a GPU: executed from their PTX, or only compiled, for any architecture."""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch

import pytest
import torch
from gpu_device import DEVICE, FAKE
from gpu_on_cpu import find_ptxemu

import fastloss
from fastloss.backends import device
from fastloss.backends import triton as backend
from fastloss.backends.native import readable
from fastloss.spec import Objective, Rows, make_spec

TARGETS = ("sm_80", "sm_90", "sm_100", "gfx942", "gfx950")


@contextmanager
def emulated(**options: Any) -> Iterator[list[Any]]:
    """Inside, the triton backend runs on CPU tensors: compiled for sm_80 and executed by ptxemu. Yields the counters of
    each launch."""
    if find_spec("triton") is None:
        pytest.skip("triton is not installed: pip install triton")
    if find_ptxemu() is None:
        pytest.skip("executes PTX with ptxemu, which is neither installed nor in ../shared")
    hosts = {"cpu", *([DEVICE.type] if FAKE and DEVICE is not None else [])}
    backend.device_types.update(hosts)
    try:
        emulator = find_ptxemu().triton_emulate(check_races=True, **options)
        with fastloss.use_backend("triton"), emulator as log, _of_fake_memory() if FAKE else nullcontext():
            yield log
    finally:
        backend.device_types.difference_update(hosts)


@contextmanager
def _of_fake_memory() -> Iterator[None]:
    """Inside, what runs kernels on CPU tensors gets those that have the fake device's memory."""
    from fake_gpu import on_host
    from triton.runtime.jit import JITFunction

    run = JITFunction.run

    def with_host_memory(self: Any, *args: Any, **options: Any) -> Any:
        return run(self, *map(on_host, args), **{name: on_host(value) for name, value in options.items()})

    with patch.object(JITFunction, "run", with_host_memory):
        yield


class Launch(NamedTuple):
    kernel: Any
    args: tuple[Any, ...]
    options: dict[str, Any]


@contextmanager
def in_shapes(choose: Callable[[list[Any]], list[Any]]) -> Iterator[None]:
    """Inside, kernels that are tuned are launched once in each shape that is chosen from those that would be timed."""
    from fastloss.backends.triton.tuning import Tuned

    def run(self: Tuned, grid: Any, *args: Any, **meta: Any) -> None:
        for config in choose(self.prune(self.configs, meta)):
            self.fn[grid](*args, **meta, **config.all_kwargs())

    with patch.object(Tuned, "run", run):
        yield


def taking_turns(turn: int) -> Callable[[list[Any]], list[Any]]:
    """One shape of each kernel, another one every turn."""
    return lambda shapes: [shapes[turn % len(shapes)]]


def launches(run: Callable[[device.Kernels], None], target: str = "sm_90") -> list[Launch]:
    """What `run` would launch, in every shape that would be timed, on AMD in the first; nothing is executed."""
    from triton.runtime.jit import JITFunction

    log: list[Launch] = []

    def record(self: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> None:
        log.append(Launch(self, args, options))

    shapes = taking_turns(0) if target.startswith("gfx") else lambda shapes: shapes
    with patch.object(JITFunction, "run", record), in_shapes(shapes):
        run(backend.kernels())
    return log


def make_rows(
    N: int, V: int, dtype: torch.dtype, objective: Objective = Objective.INDEX, weight: bool = False, **spec: Any
) -> tuple[Rows, dict[str, torch.Tensor]]:
    """Random rows, and memory for what is computed of them."""
    x, probs = torch.randn(N, V).mul(3).to(dtype), None
    if objective.indexed:
        y = torch.randint(V, (N,) if objective == Objective.INDEX else (N, 5))
        probs = torch.full(y.shape, 0.1) if y.dim() == 2 else None
    else:
        y = torch.rand(N, V).softmax(1).to(dtype)
    w = torch.rand(V).to(dtype) if weight else None
    rows = readable(Rows(x, y, w, make_spec(objective=objective, **spec), probs))
    F = rows.compute_dtype
    out = {"loss": torch.empty(N, dtype=F), "stats": torch.empty(device.STATS, N, dtype=F)}
    return rows, {**out, "grad": torch.empty_like(x), "denominator": torch.full((), N, dtype=F)}


def compiled(launch: Launch, target: str) -> Any:
    """The kernel as Triton's JIT would compile it for these arguments on a GPU of another architecture."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, make_backend
    from triton.runtime.jit import create_function_from_signature

    nvidia = target.startswith("sm_")
    gpu = GPUTarget("cuda", int(target[3:]), 32) if nvidia else GPUTarget("hip", target, 64)
    compiler = make_backend(gpu)
    bind = create_function_from_signature(launch.kernel.signature, launch.kernel.params, compiler)
    bound, specialization, options = bind(*launch.args, **launch.options)
    options, *source = launch.kernel._pack_args(compiler, launch.options, bound, specialization, options)
    return triton.compile(ASTSource(launch.kernel, *source), target=gpu, options=options.__dict__)


# The instructions that multiply tiles, and bytes of shared memory that one program may have.
MULTIPLIES = {"sm_80": "mma.sync", "sm_90": "wgmma", "sm_100": "tcgen05.mma", "gfx942": "v_mfma", "gfx950": "v_mfma"}
SHARED = {"sm_80": 163 << 10, "sm_90": 227 << 10, "sm_100": 227 << 10, "gfx942": 64 << 10, "gfx950": 160 << 10}


def assert_multiplies_well(launch: Launch, target: str) -> None:
    """By tensor cores, on operands that are loaded ahead, without a register that is spilled."""
    kernel, amd = compiled(launch, target), target.startswith("gfx")
    text = kernel.asm["amdgcn" if amd else "ptx"]
    assert MULTIPLIES[target] in text
    assert amd or "cp.async" in text
    shape = [launch.options.get(name) for name in ("ROWS", "COLUMNS", "DEPTH", "num_stages")]
    assert_spills(resources(kernel), launch, target, " x ".join(map(str, shape[:3])) + f", {shape[3]} stages")
    assert kernel.metadata.shared <= SHARED[target], (kernel.metadata.shared, launch.options)


# Bytes of a thread's stack, where one version of Triton finds no register for all: by Triton, target, kernel and case.
SPILLS = {
    ("3.5", "sm_80", "listed_loss_grad", "tail, torch.float64"): 24,
    ("3.5", "sm_90", "listed_loss_grad", "tail, torch.float64"): 8,
    ("3.5", "sm_100", "listed_loss_grad", "tail, torch.float64"): 8,
    ("3.5", "sm_100", "row_states", "statistics, torch.float32"): 8,
    **{("3.5", "sm_80", "row_finish", f"statistics, torch.{t}"): 16 for t in ("float32", "bfloat16", "float16")},
    ("3.6", "sm_80", "head_states", "128 x 128 x 64, 3 stages"): 8,
    ("3.6", "sm_80", "head_grad", "128 x 128 x 64, 3 stages"): 8,
    ("3.6", "sm_80", "head_grad", "128 x 128 x 64, 4 stages"): 8,
    ("3.6", "sm_80", "listed_loss_grad", "tail, torch.float64"): 8,
    ("3.6", "sm_90", "listed_loss_grad", "tail, torch.float64"): 16,
    ("3.6", "sm_90", "listed_loss_grad", "listed, torch.float32"): 8,
    ("3.6", "sm_100", "listed_loss_grad", "tail, torch.float64"): 8,
    ("3.6", "sm_100", "row_states", "statistics, torch.float32"): 8,
    ("3.9", "sm_80", "row_loss_grad", "weight, torch.float64"): 8,
    **{
        (triton, target, "row_grad", f"{case}, torch.float64"): 8
        for triton in ("3.5", "3.6")
        for target in ("sm_90", "sm_100")
        for case in ("plain", "short")
    },
}


def assert_spills(found: Resources, launch: Launch, target: str, case: str) -> None:
    """Exactly what SPILLS says, nothing for any other."""
    import triton

    which = (".".join(triton.__version__.split(".")[:2]), target, launch.kernel.__name__, case)
    assert found.spilled == SPILLS.get(which, 0), (which, found)


class Resources(NamedTuple):
    """What one thread takes, and how many bytes of it went to memory."""

    registers: int
    spilled: int


def resources(kernel: Any) -> Resources:
    if "amdgcn" in kernel.asm:
        # Scalars that find no register of their own go into lanes of vector registers, not to memory.
        found = dict(re.findall(r"\.(vgpr_count|private_segment_fixed_size): +(\d+)", kernel.asm["amdgcn"]))
        return Resources(int(found["vgpr_count"]), int(found["private_segment_fixed_size"]))
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        cubin.write(kernel.asm["cubin"])
        cubin.flush()
        usage = subprocess.run([tool, "-res-usage", cubin.name], capture_output=True, text=True, check=True).stdout
    registers, stack = re.search(r"REG:(\d+) STACK:(\d+)", usage).groups()
    return Resources(int(registers), int(stack))
