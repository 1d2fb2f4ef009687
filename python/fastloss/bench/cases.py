"""What is measured: shapes, dtypes, losses, and the targets that each case is held to."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

# The alternatives' names, as they stand in the JSON.
FASTLOSS, FIRST_TOUCH, EAGER, COMPILE, LIGER = "fastloss", "fastloss, first touch", "torch", "torch.compile", "liger"
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

    @classmethod
    def of(cls, quick: bool, compiled: bool, device: str) -> Settings:
        """An accelerator's rounds take milliseconds: there are more of them."""
        if quick:
            return cls(3, small_blocks=11, starts=1, record_shape=(256, 8000), compiled=compiled, device=device)
        return cls(9 if device == "cpu" else 51, compiled=compiled, device=device)


class Target(NamedTuple):
    """At least this many times as fast as each, and this share of the floor; None: not held to anything."""

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

    @property
    def work(self) -> str:
        return "forward+backward" if self.backward else "forward"

    @property
    def name(self) -> str:
        """Unique, also as a pytest id."""
        pages = "-huge-pages" if self.environment else ""
        return f"{self.work}-{self.loss}-{self.dtype}-{self.N}x{self.V}{pages}".replace(" ", "-")

    def __str__(self) -> str:
        pages = ", huge pages for torch" if self.environment else ""
        return f"{self.loss}, {self.dtype} {self.N}x{self.V}, {self.work}{pages}"

    def torch_dtype(self) -> torch.dtype:
        return getattr(torch, self.dtype)


def softcapped(x: Tensor, target: Tensor, softcap: float, z_loss: float) -> Tensor:
    """The torch expression of fastloss's softcap and z_loss."""
    z = softcap * torch.tanh(x / softcap)
    return F.cross_entropy(z, target) + z_loss * torch.logsumexp(z, -1).square().mean()


class Loss(NamedTuple):
    """torch's expression, and the keyword arguments that both sides get."""

    torch: Callable[..., Tensor]
    arguments: Callable[[Case], dict[str, Any]]
    soft: bool = False  # class probabilities as the target


LOSSES = {
    "plain": Loss(F.cross_entropy, lambda case: {}),
    "label smoothing": Loss(F.cross_entropy, lambda case: {"label_smoothing": 0.1}),
    "class weights": Loss(F.cross_entropy, lambda case: {"weight": torch.rand(case.V).to(case.torch_dtype())}),
    "probabilities": Loss(F.cross_entropy, lambda case: {}, soft=True),
    "softcap + z-loss": Loss(softcapped, lambda case: {"softcap": 30.0, "z_loss": 1e-4}),
}


class Inputs(NamedTuple):
    x: Tensor
    target: Tensor
    arguments: dict[str, Any]


def inputs(case: Case, seed: int = 0, device: torch.device | None = None) -> Inputs:
    """Logits (N, V) that require a gradient where one is measured; target (N,) or (N, V)."""
    torch.manual_seed(seed)
    loss = LOSSES[case.loss]
    with torch.device(device or "cpu"):
        x = torch.empty(case.N, case.V, dtype=case.torch_dtype()).normal_()
        target = torch.empty_like(x).normal_().softmax(-1) if loss.soft else torch.randint(0, case.V, (case.N,))
        return Inputs(x.requires_grad_(case.backward), target, loss.arguments(case))


_SHAPES = ((4096, 32000), (1024, 128256), (512, 262144))
_ACCELERATOR_SHAPES = ((16384, 32000), (8192, 128256), (4096, 262144))
_OPTIONS = ("label smoothing", "class weights", "probabilities", "softcap + z-loss")
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
    return [*plain, *options, *pages]


def _accelerator() -> list[Case]:
    plain = [
        Case("plain", dtype, N, V, backward)
        for backward in (True, False)
        for dtype in ("bfloat16", "float32")
        for N, V in _ACCELERATOR_SHAPES
    ]
    return [*plain, *(Case(loss, "bfloat16", 8192, 32000, True) for loss in _OPTIONS)]


def _plain_target(dtype: str, backward: bool) -> Target:
    if not backward:
        return Target(eager=10, floor=0.8)
    return Target(eager=10, compile=5, floor=0.7) if dtype == "float32" else Target(eager=9, compile=4, floor=0.7)


def _quick() -> list[Case]:
    # torch.compile takes seconds for each: once is enough to see that it runs.
    plain = [
        Case("plain", dtype, 512, 8000, backward, compiled=backward and dtype == "float32")
        for backward in (True, False)
        for dtype in ("float32", "bfloat16")
    ]
    options = [Case(loss, "float32", 512, 8000, True, compiled=False) for loss in _OPTIONS]
    pages = Case("plain", "float32", 512, 8000, True, environment=_HUGE_PAGES, compiled=False)
    return [*plain, *options, pages]
