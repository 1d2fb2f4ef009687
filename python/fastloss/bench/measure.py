"""Interleaved timing: in each round every alternative runs once, so that a slow minute of the machine falls on all."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import psutil
import torch
from torch import Tensor

import fastloss

from .cases import LOSSES, Case, Inputs, Settings, inputs

# The alternatives' names, as they stand in the JSON.
FASTLOSS, FIRST_TOUCH, EAGER, COMPILE, LIGER = "fastloss", "fastloss, first touch", "torch", "torch.compile", "liger"
FLOOR, FRESH_COPY = "floor", "copy into a fresh buffer"


def _nothing() -> None:
    pass


@dataclass
class Alternative:
    """`call` is timed, `prepare` runs before it and is not."""

    call: Callable[[], object]
    prepare: Callable[[], object] = _nothing


@dataclass
class Result:
    """Seconds of every round, by alternative; `nbytes` is what the floor reads and writes."""

    case: Case
    seconds: dict[str, list[float]]
    skipped: dict[str, str]
    floor: str
    nbytes: int

    def median(self, name: str) -> float | None:
        return statistics.median(self.seconds[name]) if self.seconds.get(name) else None

    def ratio(self, name: str, to: str = FASTLOSS) -> float | None:
        """How many times as long as `to` the alternative `name` takes."""
        over, under = self.median(name), self.median(to)
        return over / under if over and under else None

    def bandwidth(self, name: str = FASTLOSS) -> float | None:
        """Achieved GB/s of the unavoidable traffic."""
        seconds = self.median(name)
        return self.nbytes / seconds / 1e9 if seconds else None

    def regimes(self) -> list[str]:
        """fastloss with recycled gradient memory, and where there is a gradient, with memory never touched before."""
        return [name for name in (FASTLOSS, FIRST_TOUCH) if name in self.seconds]

    def summary(self) -> dict[str, Any]:
        """Medians, and the ratios that the targets speak of."""
        return {
            "name": self.case.name,
            "target": self.case.target._asdict(),
            "floor": self.floor,
            "bytes": self.nbytes,
            "skipped": self.skipped,
            "median_ms": {name: self.median(name) * 1e3 for name in self.seconds},  # type: ignore[operator]
            "ratios": {
                regime: {
                    "over_torch": self.ratio(EAGER, regime),
                    "over_compile": self.ratio(COMPILE, regime),
                    "share_of_floor": self.ratio(FLOOR, regime),
                    "gb_per_s": self.bandwidth(regime),
                }
                for regime in self.regimes()
            },
            "seconds": self.seconds,
        }


def not_enough_memory(case: Case) -> str | None:
    """Why the case cannot be measured here: its tensors and torch's copies of them would not fit."""
    copies = {"softcap + z-loss": 14, "probabilities": 12}.get(case.loss, 9)
    needed = case.N * case.V * case.torch_dtype().itemsize * copies
    available = psutil.virtual_memory().available
    if needed <= available:
        return None
    return f"needs {needed / 2**30:.1f} GiB of memory, {available / 2**30:.1f} GiB are available"


@dataclass
class Race:
    """One case's alternatives on the same tensors."""

    case: Case
    settings: Settings
    entries: dict[str, Alternative] = field(init=False)
    seconds: dict[str, list[float]] = field(init=False)
    skipped: dict[str, str] = field(init=False, default_factory=dict)
    floor: str = field(init=False)
    nbytes: int = field(init=False)

    def __post_init__(self) -> None:
        data = inputs(self.case)
        read = data.x.nbytes + (data.target.nbytes if LOSSES[self.case.loss].soft else 0)
        self.nbytes = read + (data.x.nbytes if self.case.backward else 0)
        self.entries = self._losses(data) | self._floors(data)
        for entry in self.entries.values():  # warm up
            entry.prepare()
            entry.call()
        self.seconds = {name: [] for name in self.entries}

    def round(self, skip: Iterable[str] = ()) -> None:
        """Times every alternative once."""
        for name, entry in self.entries.items():
            if name not in skip:
                entry.prepare()
                start = time.perf_counter()
                entry.call()
                self.seconds[name].append(time.perf_counter() - start)

    def result(self) -> Result:
        return Result(self.case, self.seconds, self.skipped, self.floor, self.nbytes)

    def _losses(self, data: Inputs) -> dict[str, Alternative]:
        eager = LOSSES[self.case.loss].torch
        entries = {FASTLOSS: self._step(fastloss.cross_entropy, data)}
        if self.case.backward:
            step = entries[FASTLOSS]
            entries[FIRST_TOUCH] = Alternative(step.call, lambda: (step.prepare(), fastloss.empty_cache()))
        entries[EAGER] = self._step(eager, data)
        if self.settings.compiled and self.case.compiled:
            self._try(entries, COMPILE, lambda: self._compiled(eager, data))
        else:
            self.skipped[COMPILE] = "left out (--no-compile or --quick)"
        self._try(entries, LIGER, lambda: self._liger(data))
        return entries

    def _step(self, loss: Callable[..., Tensor], data: Inputs) -> Alternative:
        x, target, arguments = data
        if not self.case.backward:
            return Alternative(torch.no_grad()(lambda: loss(x, target, **arguments)))

        def forget() -> None:
            x.grad = None

        return Alternative(lambda: loss(x, target, **arguments).backward(), forget)

    def _try(self, entries: dict[str, Alternative], name: str, make: Callable[[], Alternative]) -> None:
        """A baseline that cannot run here is named in the report with its reason."""
        try:
            entry = make()
            entry.prepare()
            entry.call()
        except Exception as error:  # whatever a compiler or a foreign package raises
            message = str(error).strip() or "no message"
            self.skipped[name] = f"{type(error).__name__}: {message.splitlines()[0][:200]}"
        else:
            entries[name] = entry

    def _compiled(self, eager: Callable[..., Tensor], data: Inputs) -> Alternative:
        torch._dynamo.reset()  # no shape of an earlier case makes this one dynamic

        @torch.compile(dynamic=False, fullgraph=True)
        def compiled(x: Tensor, target: Tensor, **arguments: Any) -> Tensor:
            return eager(x, target, **arguments)

        return self._step(compiled, data)

    def _liger(self, data: Inputs) -> Alternative:
        from liger_kernel.transformers.functional import liger_cross_entropy

        names = {"z_loss": "lse_square_scale"}
        arguments = {names.get(name, name): value for name, value in data.arguments.items()}
        mine = data.x.detach().clone().requires_grad_(data.x.requires_grad)  # it overwrites its logits
        step = self._step(liger_cross_entropy, Inputs(mine, data.target, arguments))
        return Alternative(step.call, lambda: (step.prepare(), mine.data.copy_(data.x)))

    def _floors(self, data: Inputs) -> dict[str, Alternative]:
        """The same bytes with no arithmetic to speak of: what no loss can beat."""
        x, soft = data.x.detach(), LOSSES[self.case.loss].soft
        if not self.case.backward:
            self.floor, read = fastest_read(x)
            return {FLOOR: Alternative(read)}
        out = torch.empty_like(x)
        fresh = Alternative(lambda: torch.empty_like(x).copy_(x))
        if soft:
            self.floor = "torch.add(x, target, out=out)"
            return {FLOOR: Alternative(lambda: torch.add(x, data.target, out=out)), FRESH_COPY: fresh}
        self.floor = "out.copy_(x), out reused"
        return {FLOOR: Alternative(lambda: out.copy_(x)), FRESH_COPY: fresh}


def run(case: Case, settings: Settings) -> Result:
    """All rounds of a case, in this process."""
    race = Race(case, settings)
    for _ in range(settings.rounds):
        race.round()
    return race.result()


def fastest_read(x: Tensor) -> tuple[str, Callable[[], object]]:
    """The quickest torch operation on this machine that reads every byte of `x`; which one differs by dtype."""
    flat = x.view(-1)
    wide = flat.view(torch.float32)
    rows = wide.view(x.shape[0], -1)
    ones = torch.ones(rows.shape[1])
    reads: dict[str, Callable[[], object]] = {
        "x.sum()": lambda: x.sum(),
        "x.max()": lambda: x.max(),
        "x.view(int16).max()": lambda: flat.view(torch.int16).max(),
        "x.view(float32) @ ones": lambda: torch.mv(rows, ones),
        "dot(x.view(float32), x.view(float32))": lambda: torch.dot(wide, wide),
    }
    seconds: dict[str, list[float]] = {name: [] for name in reads}
    for _ in range(4):  # the first is for warming up
        for name, read in reads.items():
            start = time.perf_counter()
            read()
            seconds[name].append(time.perf_counter() - start)
    best = min(reads, key=lambda name: statistics.median(seconds[name][1:]))
    return best, reads[best]
