"""What is measured: shapes, dtypes, losses, and the targets that each case is held to."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .losses import LOSSES

# The alternatives' names, as they stand in the JSON.
FASTLOSS, FIRST_TOUCH, EAGER, COMPILE, LIGER = "fastloss", "fastloss, first touch", "torch", "torch.compile", "liger"
CHUNKED = "torch, chunked"  # its own linear_cross_entropy
FLOOR, FRESH_COPY = "floor", "copy into a fresh buffer"


@dataclass(frozen=True)
class Settings:
    """How long to measure, and where."""

    rounds: int = 9
    small_blocks: int = 101  # of small calls
    starts: int = 5  # of the interpreter, for the import time
    record_shape: tuple[int, int] = (2048, 32000)  # of peak memory and error
    compiled: bool = True
    device: str = "cpu"

    def rounds_of(self, case: Case) -> int:
        """Matmuls take seconds on a CPU and tenths of one elsewhere, and are less noisy for it."""
        if not case.H:
            return self.rounds
        return min(3 if self.device == "cpu" else 15, self.rounds)

    @classmethod
    def of(cls, quick: bool, compiled: bool, device: str) -> Settings:
        """An accelerator's rounds take milliseconds: there are more of them."""
        if quick:
            return cls(3, small_blocks=11, starts=1, record_shape=(256, 8000), compiled=compiled, device=device)
        return cls(9 if device == "cpu" else 51, compiled=compiled, device=device)


class Target(NamedTuple):
    """At least this many times as fast as each, and this share of the floor; None: not held to anything. `compile`: of
    a loss of hidden states torch's own chunked one."""

    eager: float | None = None
    compile: float | None = None
    floor: float | None = None


NO_TARGET = Target()


@dataclass(frozen=True)
class Case:
    """One row of the table. `environment` is set in a process of its own, where torch reads it at start."""

    loss: str
    dtype: str
    N: int
    V: int
    backward: bool
    target: Target = NO_TARGET
    environment: tuple[tuple[str, str], ...] = ()
    compiled: bool = True  # also against torch.compile
    H: int = 0  # of hidden states, where the loss starts from them

    @property
    def work(self) -> str:
        return "forward+backward" if self.backward else "forward"

    @property
    def name(self) -> str:
        """Unique, also as a pytest id."""
        pages = "-huge-pages" if self.environment else ""
        return f"{self.work}-{self.loss}-{self.dtype}-{self.shape}{pages}".replace(" ", "-")

    @property
    def shape(self) -> str:
        """N x V, or N x H x V."""
        return f"{self.N}x{self.H}x{self.V}" if self.H else f"{self.N}x{self.V}"

    def __str__(self) -> str:
        pages = ", huge pages for torch" if self.environment else ""
        return f"{self.loss}, {self.dtype} {self.shape}, {self.work}{pages}"

    def torch_dtype(self) -> torch.dtype:
        return getattr(torch, self.dtype)


class Inputs(NamedTuple):
    x: Tensor
    target: Tensor
    arguments: dict[str, Any]

    def _learned(self) -> list[Tensor]:
        return [t for t in (self.x, *self.arguments.values()) if isinstance(t, Tensor) and t.requires_grad]

    def forget(self) -> None:
        """No gradient is kept."""
        for tensor in self._learned():
            tensor.grad = None

    def read_bytes(self, case: Case) -> int:
        """Of what a loss reads and a cache may keep: logits or hidden states, targets of their size, and the weight."""
        target = self.target.nbytes if LOSSES[case.loss].dense else 0
        return self.x.nbytes + target + (self.arguments["linear_weight"].nbytes if case.H else 0)

    def grad_bytes(self) -> int:
        return sum(tensor.grad.nbytes for tensor in self._learned() if tensor.grad is not None)


def inputs(case: Case, seed: int = 0, device: torch.device | None = None) -> Inputs:
    """Logits (N, V), or hidden states (N, H), that require a gradient where one is measured; target (N,) or (N, V)."""
    torch.manual_seed(seed)
    loss, device = LOSSES[case.loss], device or torch.device("cpu")
    x = torch.empty(case.N, case.H or case.V, dtype=case.torch_dtype(), device=device).normal_()
    return Inputs(x.requires_grad_(case.backward), loss.target(case, device), loss.arguments(case, device))


_SHAPES = ((4096, 32000), (1024, 128256), (512, 262144))
_ACCELERATOR_SHAPES = ((16384, 32000), (8192, 128256), (4096, 262144))
_OPTIONS = ("label smoothing", "class weights", "probabilities", "softcap + z-loss")
_OTHERS = {
    "forward KL": 12,
    "reverse KL": 12,
    "JS": 12,
    "top-k KL": 20,
    "top-k KL, lumped tail": 20,
    "log-prob + entropy": 10,
    "pointer-generator": 8,
}
_LINEAR_SHAPES = ((1024, 1024, 32000), (1024, 768, 128256), (4096, 512, 50257))
_ACCELERATOR_LINEAR_SHAPES = ((8192, 4096, 128256), (4096, 2048, 151936))
_HUGE_PAGES = (("THP_MEM_ALLOC_ENABLE", "1"),)


def cases(quick: bool = False, accelerator: bool = False) -> list[Case]:
    """The table, in the order of the report."""
    if quick:
        return [case for case in _quick() if not (accelerator and case.environment)]
    if accelerator:
        return _accelerator()
    plain = [
        Case("plain", dtype, N, V, backward, target)
        for backward in (True, False)
        for dtype in ("float32", "bfloat16")
        for N, V in _SHAPES
        for target in [_plain_target(dtype, backward)]
    ]
    options = [Case(loss, "float32", 2048, 32000, True, Target(eager=8)) for loss in _OPTIONS]
    pages = [
        Case("plain", dtype, *_SHAPES[0], True, Target(eager=2.5), _HUGE_PAGES) for dtype in ("float32", "bfloat16")
    ]
    others = [
        Case(loss, dtype, N, V, True, Target(eager=target), compiled=V == 32000)
        for loss, target in _OTHERS.items()
        for N, V in ((2048, 32000), (1024, 128256))
        for dtype in ("float32", "bfloat16")
    ]
    linear = [
        Case("linear", dtype, N, V, backward, _linear_target(dtype, backward), compiled=False, H=H)
        for backward in (True, False)
        for dtype in ("float32", "bfloat16")
        for N, H, V in _LINEAR_SHAPES
    ]
    return [*plain, *options, *others, *pages, *linear]


def _accelerator() -> list[Case]:
    plain = [
        Case("plain", dtype, N, V, backward)
        for backward in (True, False)
        for dtype in ("bfloat16", "float32")
        for N, V in _ACCELERATOR_SHAPES
    ]
    others = [Case(loss, "bfloat16", 8192, 32000, True) for loss in (*_OPTIONS, *_OTHERS)]
    linear = [
        Case("linear", "bfloat16", N, V, backward, H=H)
        for backward in (True, False)
        for N, H, V in _ACCELERATOR_LINEAR_SHAPES
    ]
    return [*plain, *others, *linear]


def _plain_target(dtype: str, backward: bool) -> Target:
    if not backward:
        return Target(eager=10, floor=0.8)
    return Target(eager=10, compile=5, floor=0.7) if dtype == "float32" else Target(eager=9, compile=4, floor=0.7)


def _linear_target(dtype: str, backward: bool) -> Target:
    single = dtype == "float32"
    if not backward:
        return Target(eager=1.8 if single else 1.5)
    return Target(eager=2.2 if single else 1.8, compile=4, floor=0.85)


def _quick() -> list[Case]:
    # torch.compile takes seconds for each: once is enough to see that it runs.
    plain = [
        Case("plain", dtype, 512, 8000, backward, compiled=backward and dtype == "float32")
        for backward in (True, False)
        for dtype in ("float32", "bfloat16")
    ]
    options = [Case(loss, "float32", 512, 8000, True, compiled=False) for loss in (*_OPTIONS, *_OTHERS)]
    pages = Case("plain", "float32", 512, 8000, True, environment=_HUGE_PAGES, compiled=False)
    linear = [Case("linear", "float32", 256, 8000, backward, compiled=False, H=64) for backward in (True, False)]
    return [*plain, *options, pages, *linear]
