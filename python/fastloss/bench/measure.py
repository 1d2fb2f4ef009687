"""Interleaved timing: in each round every alternative runs once, so that a slow minute of the machine falls on all."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

import fastloss

from .cases import CHUNKED, COMPILE, EAGER, FASTLOSS, FLOOR, FRESH_COPY, LIGER, LOSSES, Case, Inputs, Settings, inputs
from .devices import Device, nothing
from .losses import chunked, liger_linear

_PATIENCE = 60.0  # seconds; what would take longer is said to, and left out


@dataclass
class Alternative:
    """`call` is timed, `prepare` runs before it and is not; both inside `context`."""

    call: Callable[[], object]
    prepare: Callable[[], object] = nothing
    context: Callable[[], AbstractContextManager[Any]] = nullcontext


@dataclass
class Result:
    """Seconds of every round, by alternative. `work` is the bytes that the floor reads and writes, or with hidden
    states the operations of its products; `labels` tells fastloss's own alternatives apart."""

    case: Case
    seconds: dict[str, list[float]]
    skipped: dict[str, str]
    floor: str
    work: int
    labels: dict[str, str]

    def median(self, name: str) -> float | None:
        return statistics.median(self.seconds[name]) if self.seconds.get(name) else None

    def ratio(self, name: str, to: str = FASTLOSS) -> float | None:
        """How many times as long as `to` the alternative `name` takes."""
        over, under = self.median(name), self.median(to)
        return over / under if over and under else None

    def rate(self, name: str = FASTLOSS) -> float | None:
        """Achieved GB/s of the unavoidable traffic, or GFLOP/s."""
        seconds = self.median(name)
        return self.work / seconds / 1e9 if seconds else None

    def summary(self) -> dict[str, Any]:
        """Medians, and the ratios that the targets speak of."""
        return {
            "name": self.case.name,
            "target": self.case.target._asdict(),
            "floor": self.floor,
            "flop" if self.case.H else "bytes": self.work,
            "skipped": self.skipped,
            "fastloss": self.labels,
            "median_ms": {name: self.median(name) * 1e3 for name in self.seconds},  # type: ignore[operator]
            "ratios": {
                regime: {
                    "over_torch": self.ratio(EAGER, regime),
                    "over_compile": self.ratio(COMPILE, regime),
                    "share_of_floor": self.ratio(FLOOR, regime),
                    "over_chunked": self.ratio(CHUNKED, regime),
                    "gflop_per_s" if self.case.H else "gb_per_s": self.rate(regime),
                }
                for regime in self.labels
            },
            "seconds": self.seconds,
        }


def not_enough_memory(case: Case, device: Device) -> str | None:
    """Why the case cannot be measured here: its tensors and torch's copies of them would not fit."""
    size = case.torch_dtype().itemsize
    logits, weight = case.N * case.V * size, case.V * case.H * size
    # Of a weight: its gradient, that of the floor, and sums of one in float32 beside their conversion.
    layer = weight * (3 if case.backward else 1) + (8 * case.V * case.H if case.backward else 0)
    rotated = weight + case.N * case.H * size if case.H else logits
    needed = logits * LOSSES[case.loss].memory + layer + rotated * (device.copies(rotated) - 1)
    available = device.available_bytes()
    if needed <= available:
        return None
    return f"needs {needed / 2**30:.1f} GiB of memory, {available / 2**30:.1f} GiB are available"


class Rotation:
    """Inputs of the same kind that take turns."""

    def __init__(self, sets: list[Inputs]) -> None:
        self.sets, self.turn = sets, 0

    @property
    def now(self) -> Inputs:
        return self.sets[self.turn]

    def advance(self) -> None:
        self.turn = (self.turn + 1) % len(self.sets)

    def forget(self) -> None:
        """No gradient is kept, nor its memory held."""
        for data in self.sets:
            data.forget()


@dataclass
class Race:
    """One case's alternatives on the same tensors."""

    case: Case
    settings: Settings
    device: Device = field(default_factory=Device)
    entries: dict[str, Alternative] = field(init=False)
    seconds: dict[str, list[float]] = field(init=False)
    skipped: dict[str, str] = field(init=False, default_factory=dict)
    labels: dict[str, str] = field(init=False)
    floor: str = field(init=False)
    work: int = field(init=False)

    def __post_init__(self) -> None:
        first = inputs(self.case, device=self.device.device)
        read = first.read_bytes(self.case)
        more = [inputs(self.case, seed, self.device.device) for seed in range(1, self.device.copies(read))]
        self.data = Rotation([first, *more])
        self.work = read + (first.x.nbytes if self.case.backward else 0)
        self.entries = self._losses() | (self._products() if self.case.H else self._floors())
        for name in list(self.entries) * self.device.warm_ups:
            self._timed(name)
        self.device.wait()
        self.seconds = {name: [] for name in self.entries}

    def _timed(self, name: str) -> tuple[Any, Any]:
        """The marks before and after a call."""
        entry, device = self.entries[name], self.device
        self.data.advance()
        with entry.context():
            entry.prepare()
            device.occupy()
            start = device.mark()
            entry.call()
            return start, device.mark()

    def round(self, skip: Iterable[str] = ()) -> None:
        """Times every alternative once."""
        marks = {name: self._timed(name) for name in self.entries if name not in skip}
        self.device.wait()
        for name, (start, end) in marks.items():
            self.seconds[name].append(self.device.seconds(start, end))

    def result(self) -> Result:
        return Result(self.case, self.seconds, self.skipped, self.floor, self.work, self.labels)

    def _losses(self) -> dict[str, Alternative]:
        eager, entries = LOSSES[self.case.loss].torch, {}
        regimes = self.device.regimes(self.case)
        self.labels = {name: regime.label for name, regime in regimes.items()}
        for name, regime in regimes.items():
            entries[name] = self._step(LOSSES[self.case.loss].ours, regime.prepare)
            entries[name].context = regime.context
        self._try(entries, EAGER, lambda: self._patient(eager))
        if self.settings.compiled and self.case.compiled:
            self._try(entries, COMPILE, lambda: self._compiled(eager))
        else:
            self.skipped[COMPILE] = "left out (--no-compile or --quick)"
        if self.case.H:
            self._try(entries, CHUNKED, lambda: self._patient(chunked))
        self._try(entries, LIGER, self._liger)
        return entries

    def _step(
        self, loss: Callable[..., Tensor], prepare: Callable[[], object] = nothing, data: Rotation | None = None
    ) -> Alternative:
        turns = data or self.data

        def call() -> Tensor:
            x, target, arguments = turns.now
            return loss(x, target, **arguments)

        if not self.case.backward:
            return Alternative(torch.no_grad()(call), prepare)

        def forget() -> None:
            turns.forget()
            self.data.forget()
            prepare()

        return Alternative(lambda: call().backward(), forget)

    def _try(self, entries: dict[str, Alternative], name: str, make: Callable[[], Alternative]) -> None:
        """A baseline that cannot run here is named in the report with its reason."""
        try:
            entry = make()
            entry.prepare()
            entry.call()
            self.device.wait()
        except Exception as error:  # whatever a compiler or a foreign package raises
            message = str(error).strip() or "no message"
            self.skipped[name] = f"{type(error).__name__}: {message.splitlines()[0][:200]}"
        else:
            entries[name] = entry

    def _patient(self, loss: Callable[..., Tensor]) -> Alternative:
        """The loss of hidden states, unless a sixteenth of the rows says that nobody would wait for it: libraries that
        have no product for 16-bit numbers on a processor take minutes."""
        if self.case.H and self.device.wall_clock:
            x, target, arguments = self.data.now
            few = max(1, len(x) // 16)
            some = Inputs(x.detach()[:few].requires_grad_(x.requires_grad), target[:few], arguments)
            start = time.perf_counter()
            self._step(loss, data=Rotation([some])).call()
            seconds = (time.perf_counter() - start) * len(x) / few
            if seconds > _PATIENCE:
                raise TimeoutError(f"would take {seconds:.0f} s, from {few} of its {len(x)} rows")
        return self._step(loss)

    def _compiled(self, eager: Callable[..., Tensor]) -> Alternative:
        torch._dynamo.reset()  # no shape of an earlier case makes this one dynamic

        @torch.compile(dynamic=False, fullgraph=True)
        def compiled(x: Tensor, target: Tensor, **arguments: Any) -> Tensor:
            return eager(x, target, **arguments)

        return self._step(compiled)

    def _liger(self) -> Alternative:
        if self.case.H:
            return self._step(liger_linear)
        if LOSSES[self.case.loss].ours is not fastloss.cross_entropy:
            raise NotImplementedError("only its cross-entropy is compared")
        from liger_kernel.transformers.functional import liger_cross_entropy

        names = {"z_loss": "lse_square_scale"}
        first = self.data.now
        arguments = {names.get(name, name): value for name, value in first.arguments.items()}
        mine = first.x.detach().clone().requires_grad_(first.x.requires_grad)  # it overwrites its logits
        data = Rotation([Inputs(mine, first.target, arguments)])
        return self._step(liger_cross_entropy, lambda: mine.data.copy_(first.x), data)

    def _products(self) -> dict[str, Alternative]:
        """The matmuls that a loss of hidden states cannot do without, by the fastest library call found here: on CPUs
        of chunks of float32 rows, since 16-bit ones may take minutes there; elsewhere of all rows in the case's own
        dtype."""
        case, on = self.case, self.device
        count = 3 if case.backward else 1
        self.work = 2 * case.N * case.H * case.V * count
        N, dtype = (case.N, case.torch_dtype()) if on.accelerator else (min(512, case.N), torch.float32)
        x = torch.randn(N, case.H, device=on.device, dtype=dtype)
        weight = torch.randn(case.V, case.H, device=on.device, dtype=dtype)
        self.floor, product = fastest_product(x, weight, on)
        return {FLOOR: Alternative(lambda: [product() for _ in range(count * case.N // N)], self.data.forget)}

    def _floors(self) -> dict[str, Alternative]:
        """The same bytes with no arithmetic to speak of: what no loss can beat."""
        data = self.data
        if not self.case.backward:
            self.floor, read = fastest_read(data.now.x.detach(), self.device)
            return {FLOOR: Alternative(lambda: read(data.now.x.detach()))}
        out = torch.empty_like(data.now.x.detach())
        fresh = Alternative(lambda: torch.empty_like(out).copy_(data.now.x.detach()), data.forget)
        if LOSSES[self.case.loss].dense:
            self.floor = "torch.add(x, target, out=out)"
            add = Alternative(lambda: torch.add(data.now.x.detach(), data.now.target, out=out), data.forget)
            return {FLOOR: add, FRESH_COPY: fresh}
        self.floor = "out.copy_(x), out reused"
        return {FLOOR: Alternative(lambda: out.copy_(data.now.x.detach()), data.forget), FRESH_COPY: fresh}


def run(case: Case, settings: Settings, device: Device | None = None) -> Result:
    """All rounds of a case, in this process."""
    race = Race(case, settings, device or Device())
    for _ in range(settings.rounds_of(case)):
        race.round()
    return race.result()


def fastest_read(x: Tensor, device: Device) -> tuple[str, Callable[[Tensor], object]]:
    """The quickest torch operation on this machine that reads every byte of `x`; which one differs by dtype."""
    ones = x.new_ones(x.view(torch.float32).shape[1], dtype=torch.float32)
    reads: dict[str, Callable[[Tensor], object]] = {
        "x.sum()": lambda x: x.sum(),
        "x.max()": lambda x: x.max(),
        "x.view(int16).max()": lambda x: x.view(torch.int16).max(),
        "x.view(float32) @ ones": lambda x: torch.mv(x.view(torch.float32), ones),
        "dot(x.view(float32), x.view(float32))": lambda x: torch.dot(*[x.view(-1).view(torch.float32)] * 2),
    }
    best = fastest(reads, x, device)
    return best, reads[best]


def fastest_product(x: Tensor, weight: Tensor, device: Device) -> tuple[str, Callable[[], object]]:
    """The fastest matmul of an LM head, hidden states (N, H) and weight (V, H), as torch computes it on the device."""
    logits, hidden, grad = x @ weight.t(), torch.empty_like(x), torch.zeros_like(weight)
    products: dict[str, Callable[[Tensor], object]] = {
        "torch.mm(x, weight.T)": lambda x: torch.mm(x, weight.t(), out=logits),
        "torch.mm(dlogits, weight)": lambda x: torch.mm(logits, weight, out=hidden),
        "torch.addmm(dweight, dlogits.T, x)": lambda x: torch.addmm(grad, logits.t(), x, out=grad),
    }
    best = fastest(products, x, device)
    return f"{best}, once for each product", lambda: products[best](x)


def fastest(calls: dict[str, Callable[[Tensor], object]], x: Tensor, device: Device) -> str:
    """Which of the calls takes the least time on `x`."""
    marks: dict[str, list[Any]] = {name: [] for name in calls}
    for _ in range(4):  # the first is for warming up
        for name, call in calls.items():
            device.occupy()
            start = device.mark()
            call(x)
            marks[name].append((start, device.mark()))
    device.wait()
    return min(calls, key=lambda name: statistics.median(device.seconds(*pair) for pair in marks[name][1:]))
