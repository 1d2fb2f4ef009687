"""Stage `linear`: losses of hidden states, forward and backward, over budgets of memory and beside other libraries.

In each round every alternative runs once; times are the device's own, peak memory that of torch's allocator.
"""

from __future__ import annotations

import math
import statistics
import traceback
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fastloss.bench.losses import chunked, liger_linear, linear_then_loss

from .results import already, emit, is_done
from .target import FAKE, bench_device, device, fastloss

Loss = Callable[[Tensor, Tensor, Tensor], Tensor]  # hidden states, labels, weight
BUDGETS = {"56 MiB": 56 << 20, **{f"{gib:g} GiB": int(gib * 2**30) for gib in (0.5, 1, 2, 4, 6)}}
_ROUNDS = 2 if FAKE else 9
_AGREE = 0.02  # of the losses: more is no rounding


class Shape(NamedTuple):
    N: int
    H: int
    V: int

    def __str__(self) -> str:
        return f"{self.N} x {self.H} x {self.V}"


SHAPES = [Shape(8192, 4096, 128256), Shape(4096, 2048, 151936)]
_FAKE_SHAPES = [Shape(64, 16, 500)]


def linear() -> int:
    done = already("linear")
    status = 0
    for shape in _FAKE_SHAPES if FAKE else SHAPES:
        if is_done(done.get(str(shape))):
            continue
        status |= not _measure(shape)
    return status


# ---- the alternatives ------------------------------------------------------------------------------------------------


def alternatives() -> dict[str, Loss]:
    """Those that would be tried; what is not installed, or refuses, says so when it is called."""
    ours: dict[str, Loss] = {"fastloss": lambda x, y, w: fastloss.linear_cross_entropy(x, w, y)}
    for name, budget in BUDGETS.items():
        ours[f"fastloss, {name}"] = lambda x, y, w, b=budget: fastloss.linear_cross_entropy(x, w, y, max_chunk_bytes=b)
    others: dict[str, Loss] = {"torch": linear_then_loss, "torch.compile": _compiled()}
    if hasattr(F, "linear_cross_entropy"):
        others["torch, chunked"] = chunked
    return {**others, **ours, "liger": liger_linear, "cut-cross-entropy": _cut, "quack": _quack}


def _compiled() -> Loss:
    if FAKE:
        return _not_compiled
    torch._dynamo.reset()
    return torch.compile(linear_then_loss, dynamic=False, fullgraph=True)


def _not_compiled(x: Tensor, y: Tensor, weight: Tensor) -> Tensor:
    raise NotImplementedError("torch.compile knows no fake device")


def _cut(x: Tensor, y: Tensor, weight: Tensor) -> Tensor:
    """With its default filter, which leaves out small gradients."""
    from cut_cross_entropy import linear_cross_entropy

    return linear_cross_entropy(x, weight, y)


def _quack(x: Tensor, y: Tensor, weight: Tensor) -> Tensor:
    from quack.linear_cross_entropy import chunked_linear_cross_entropy

    return chunked_linear_cross_entropy(x, weight, y)


# ---- measuring -------------------------------------------------------------------------------------------------------


class _Case:
    """One shape's tensors, and what was found of each alternative."""

    def __init__(self, shape: Shape) -> None:
        torch.manual_seed(0)
        self.shape, self.on = shape, bench_device()
        self.x = torch.randn(shape.N, shape.H, device=device, dtype=torch.bfloat16).requires_grad_()
        self.weight = torch.randn(shape.V, shape.H, device=device, dtype=torch.bfloat16).mul_(shape.H**-0.5)
        self.weight.requires_grad_()
        self.y = torch.randint(shape.V, (shape.N,), device=device)
        self.found: dict[str, dict[str, Any]] = {}
        self.skipped: dict[str, str] = {}
        self.calls: dict[str, Callable[[], object]] = {}

    def forget(self) -> None:
        self.x.grad = self.weight.grad = None

    def step(self, loss: Loss) -> Tensor:
        value = loss(self.x, self.y, self.weight)
        value.backward()
        return value.detach()

    def add(self, name: str, loss: Loss) -> None:
        """Two calls, which compile and tune what they need, and one whose memory is looked at."""
        try:
            for _ in range(2):
                self.forget()
                value = self.step(loss).item()
            self.forget()
            self.on.release()
            before = self.on.module.memory_allocated()
            self.on.module.reset_peak_memory_stats()
            self.step(loss)
            self.on.wait()
            peak = self.on.module.max_memory_allocated() - before - self.x.nbytes - self.weight.nbytes
        except Exception as why:  # not installed, out of memory, not for this device
            traceback.print_exc()
            self.skipped[name] = f"{type(why).__name__}: {(str(why).splitlines() or ['no message'])[0][:200]}"
            return
        finally:
            self.forget()
            self.on.release()
        self.found[name] = {"seconds": [], "loss": value, "peak_extra_bytes": peak}
        self.calls[name] = lambda: self.step(loss)

    def add_floor(self) -> None:
        """The three matmuls without which there is no loss and gradient, in the case's dtype."""
        x, weight = self.x.detach(), self.weight.detach()
        logits, dx, dw = x @ weight.t(), torch.empty_like(x), torch.empty_like(weight)

        def floor() -> None:
            torch.mm(x, weight.t(), out=logits)
            torch.mm(logits, weight, out=dx)
            torch.mm(logits.t(), x, out=dw)

        floor()
        self.found["floor"] = {"seconds": []}
        self.calls["floor"] = floor

    def round(self) -> None:
        marks = {}
        for name, call in self.calls.items():
            self.forget()
            self.on.occupy()
            start = self.on.mark()
            call()
            marks[name] = start, self.on.mark()
        self.on.wait()
        for name, pair in marks.items():
            self.found[name]["seconds"].append(self.on.seconds(*pair))
            self.found[name]["median_ms"] = statistics.median(self.found[name]["seconds"]) * 1e3

    def wrong(self) -> list[str]:
        """Ours that do not agree with torch's loss."""
        reference = self.found.get("torch", {}).get("loss")
        ours = {name: f["loss"] for name, f in self.found.items() if name.startswith("fastloss")}
        if reference is None:
            return []
        return [name for name, loss in ours.items() if not abs(loss - reference) <= _AGREE * abs(reference)]

    def say(self, rounds: int, ok: bool | None) -> None:
        emit(str(self.shape), {
            "ok": ok, "rounds": rounds, "dtype": "bfloat16", **self.shape._asdict(), "flop": 6 * math.prod(self.shape),
            "alternatives": self.found, "skipped": self.skipped,
        })  # fmt: skip


def _measure(shape: Shape) -> bool:
    """Whether fastloss ran in every budget and agrees with torch. Emits after each round."""
    case = _Case(shape)
    for name, loss in alternatives().items():
        print(f"{shape}: {name}", flush=True)
        case.add(name, loss)
    case.add_floor()
    for n in range(_ROUNDS):
        case.round()
        case.say(n + 1, None)
    failed = [name for name in case.skipped if name.startswith("fastloss")] + case.wrong()
    print(
        f"{shape}: {'these fail: ' + ', '.join(failed) if failed else 'all of fastloss agrees with torch'}", flush=True
    )
    case.say(_ROUNDS, not failed)
    return not failed
