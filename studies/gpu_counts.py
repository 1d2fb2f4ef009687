"""What the compiled GPU kernels execute and move, counted by executing their PTX with tests/cuda_ptx.py and
tests/triton_engine.py. Nothing here is timed, nothing needs a GPU, and the same counts come out on every machine."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

import fastloss
from fastloss.backends import cuda
from fastloss.backends.native import readable
from fastloss.bench.cases import Case
from fastloss.bench.losses import LOSSES
from fastloss.spec import Rows, make_spec

sys.path.append(str(Path(__file__).resolve().parent.parent / "tests"))  # where kernels are executed without a GPU

import cuda_ptx
import triton_engine
from gpu_on_cpu import find_ptxemu

SECTOR = 32  # bytes
CPU = torch.device("cpu")
MANY = 4096  # rows of a real step, over which the kernels that run once a call are counted
STEP, TWO, PER_ROW, FORWARD = "loss + gradient", "loss + gradient, on-chip path off", "row_stats + row_grad", "forward"
LONG = 32000
ONCE = ("denominator", "total")  # kernels of one block, however many rows


class Work(NamedTuple):
    """One loss, executed: by which library's kernels, for which architecture, what of it."""

    engine: str  # cuda, triton or liger
    way: str
    dtype: torch.dtype
    N: int
    V: int
    arch: str = "sm_80"
    loss: str = "plain"  # of fastloss.bench.losses

    @property
    def dtype_name(self) -> str:
        return str(self.dtype).removeprefix("torch.")

    @property
    def passes(self) -> int:
        """How often the logits' size has to move: read, and with target logits these too; the gradient written."""
        return (1 if self.way == FORWARD else 2) + LOSSES[self.loss].dense


@dataclass
class Count:
    """The launches of one Work, each with the share of it that belongs to N rows."""

    work: Work
    launches: list[tuple[Any, float]]
    error: float  # of the gradient (forward: of the loss) against float64, relative to the largest
    elements: int = field(init=False)
    ideal: int = field(init=False)

    def __post_init__(self) -> None:
        self.elements = self.work.N * self.work.V
        self.ideal = self.work.passes * self.elements * self.work.dtype.itemsize

    def sum(self, name: str) -> float:
        return sum(getattr(stats, name) * share for stats, share in self.launches)

    @property
    def on_chip(self) -> bool:
        """Whether one kernel made the loss and the gradient of rows that it read once."""
        return any("_loss_grad" in stats.kernel for stats, _ in self.launches)

    @property
    def kind(self) -> str:
        if self.work.engine == "liger" or self.work.way == FORWARD:
            return self.work.engine if self.work.engine == "liger" else FORWARD
        return "on chip" if self.on_chip else "two kernels"

    @property
    def figures(self) -> dict[str, float]:
        """`instructions`: by active threads, for each logit. `slots`: of whole warps, idle lanes too. `sectors`: as
        warps request them, without any cache, over N V size once (forward) or twice. `unique`: with an infinite cache
        in each kernel. `efficiency`: of the bytes in requested sectors, the share that was asked for."""
        loads, stores = self.sum("load_sectors") * SECTOR, self.sum("store_sectors") * SECTOR
        unique = self.sum("dram_read_bytes") + self.sum("dram_write_bytes")
        return {
            "instructions": self.sum("thread_instructions") / self.elements,
            "slots": self.sum("warp_instructions") * 32 / self.elements,
            "sectors": self.sum("sector_bytes") / self.ideal,
            "reads": loads / (self.elements * self.work.dtype.itemsize),
            "unique": unique / self.ideal,
            "efficiency": (self.sum("load_distinct_bytes") + self.sum("store_distinct_bytes")) / (loads + stores),
            "local bytes": self.sum("local_bytes"),
        }

    def targets(self) -> dict[str, tuple[float, bool]]:
        """The bound of each figure that has one, and whether it is met."""
        figures, long = self.figures, self.work.V >= LONG
        if self.work.loss != "plain":
            return {}
        met = {name: (limit, figures[name] <= limit) for name, limit in _LIMITS.get((self.kind, long), {}).items()}
        if self.kind != "liger" and long:  # in a short row the sectors at its ends and of its target weigh more
            met["efficiency"] = (0.95, figures["efficiency"] >= 0.95)
        return met

    def as_dict(self) -> dict[str, Any]:
        work = self.work._asdict() | {"dtype": self.work.dtype_name, "kind": self.kind}
        launches = [
            {"kernel": kernel_name(s), "grid": s.grid, "block": s.block, "share": share,
             "shared_bytes": s.shared_bytes + s.static_shared, "thread_instructions": s.thread_instructions}
            for s, share in self.launches
        ]  # fmt: skip
        targets = {name: {"limit": limit, "met": met} for name, (limit, met) in self.targets().items()}
        return {**work, "figures": self.figures, "error": self.error, "targets": targets, "launches": launches}


# (kind, whether rows are long) -> what they may take
_LIMITS = {
    ("on chip", True): {"instructions": 14.0, "sectors": 1.02},
    ("on chip", False): {"sectors": 1.10},
    ("two kernels", True): {"instructions": 18.0, "sectors": 1.52},
    ("two kernels", False): {"sectors": 1.60},
    (FORWARD, True): {"reads": 1.02},
}


def kernel_name(stats: Any) -> str:
    """As in the sources: mangled names hold it among others."""
    pairs = ("pair_loss_grad", "pair_states", "pair_stats", "pair_finish", "pair_mixtures", "pair_mixed", "pair_grad")
    listed = ("listed_loss_grad", "listed_stats", "listed_finish", "listed_grad")
    known = (*pairs, *listed, "row_loss_grad", "row_states", "row_stats", "row_finish", "row_grad", *ONCE)
    return next((name for name in known if name in stats.kernel), stats.kernel)


# ---- who executes ----------------------------------------------------------------------------------------------------


def missing(engine: str) -> str | None:
    """Why this engine's kernels cannot be counted here; None if they can."""
    if find_ptxemu() is None:
        return "ptxemu, which executes PTX, is neither installed nor in ../shared"
    if engine == "cuda":
        return cuda_ptx.missing()
    if find_spec("triton") is None:
        return "triton is not installed: pip install triton"
    if engine == "liger" and find_spec("liger_kernel") is None:
        return "liger_kernel is not installed: pip download --no-deps liger-kernel, unpack it, --liger FOLDER"
    return None


@contextmanager
def executed(engine: str, arch: str) -> Iterator[list[Any]]:
    """Inside, the engine's launches on CPU tensors are executed as PTX; yields the counters of each."""
    if engine == "cuda":
        with cuda_ptx.cuda_as_ptx(arch, check_races=False) as emulator:
            yield emulator.log
    elif engine == "triton":
        with triton_engine.emulated() as log:
            yield log
    else:
        ptxemu = find_ptxemu()
        assert ptxemu is not None
        with ptxemu.triton_emulate() as log, warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Triton's, of an option that Liger does not set
            yield log


@contextmanager
def off_chip() -> Iterator[None]:
    """No row stays on chip, however short."""
    from fastloss.backends.triton import listed, pairs, rows

    families = (rows, listed, pairs)
    before = cuda._KERNELS, *(family.on_chip for family in families)
    cuda._KERNELS = cuda._KERNELS._replace(on_chip=lambda rows: False)
    for family in families:
        family.on_chip = lambda rows: False
    try:
        yield
    finally:
        cuda._KERNELS, *saved = before
        for family, on_chip in zip(families, saved, strict=True):
            family.on_chip = on_chip


def _liger(x: Tensor, y: Tensor) -> Tensor:
    """Not through its module `transformers`, which wants that package."""
    from liger_kernel.ops.cross_entropy import LigerCrossEntropyFunction

    out = LigerCrossEntropyFunction.apply(x, y, None, -100, 0.0, 0.0, "mean", None, False)
    return out[0] if isinstance(out, tuple) else out


# ---- counting --------------------------------------------------------------------------------------------------------


def count(work: Work) -> Count:
    """All launches of the work, small kernels and the backward that finds nothing left to do included."""
    generator = torch.Generator().manual_seed(20)
    x = torch.randn(work.N, work.V, generator=generator).to(work.dtype)
    case = Case(work.loss, work.dtype_name, work.N, work.V, work.way != FORWARD)
    torch.manual_seed(21)  # target logits that are not the logits
    y, made = LOSSES[work.loss].target(case, CPU), LOSSES[work.loss].arguments(case, CPU)
    leaf = x.clone().requires_grad_(work.way != FORWARD)
    ours = fastloss.cross_entropy if work.loss == "plain" else LOSSES[work.loss].ours
    loss: Callable[..., Tensor] = _liger if work.engine == "liger" else ours
    options = made | ({"reduction": "none"} if work.way == PER_ROW else {})
    with executed(work.engine, work.arch) as log, off_chip() if work.way == TWO else nullcontext():
        logits = leaf * 1 if work.engine == "liger" and leaf.requires_grad else leaf  # Liger overwrites its logits
        value = loss(logits, y, **options)
        if work.way != FORWARD:
            value.backward(torch.ones_like(value))
        launched = list(log)
    error = _error(work.loss, x, y, options, value.detach(), leaf.grad)
    if not error < 2**-6:
        raise AssertionError(f"{work}: wrong by {error}, not worth counting")
    main = [(stats, 1.0) for stats in launched if kernel_name(stats) not in ONCE]
    often = [kernel_name(stats) for stats in launched if kernel_name(stats) in ONCE]
    once = _once(work.engine, work.arch, work.dtype) if often else {}
    return Count(work, main + [(once[name], work.N / MANY) for name in often], error)


def _error(name: str, x: Tensor, y: Tensor, options: dict[str, Any], value: Tensor, grad: Tensor | None) -> float:
    """Against torch's expression; of a lumped tail, which has none, against the reference backend."""
    exact = x.double().requires_grad_()
    target = y.double() if y.is_floating_point() else y
    if "tail" in options:
        with fastloss.use_backend("reference"):
            loss = LOSSES[name].ours(exact, target, **options)
    else:
        expression = F.cross_entropy if name == "plain" else LOSSES[name].torch
        loss = expression(exact, target, **options)
    got, want = value, loss.detach()
    if grad is not None:
        (want,) = torch.autograd.grad(loss, exact, torch.ones_like(loss))
        got = grad
    return float((got.double() - want).abs().max() / want.abs().max())


@lru_cache
def _once(engine: str, arch: str, dtype: torch.dtype) -> dict[str, Any]:
    """The kernels that run once a call, over as many rows as a step has: over the few that are counted here one block
    would seem to weigh on each logit."""
    x, y = torch.zeros(MANY, 16, dtype=dtype), torch.zeros(MANY, dtype=torch.int64)
    rows = readable(Rows(x, y, None, make_spec()))
    loss, out = torch.zeros(MANY, dtype=rows.compute_dtype), torch.ones((), dtype=rows.compute_dtype)
    with executed(engine, arch) as log:
        kernels = cuda.kernels() if engine == "cuda" else fastloss.backends.triton.kernels()
        kernels.denominator(rows, None, out)
        kernels.total(loss, None, out, torch.empty_like(out))
        return {kernel_name(stats): stats for stats in log}
