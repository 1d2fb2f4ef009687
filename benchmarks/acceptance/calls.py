"""One call of each kernel family: what compute-sanitizer looks at (small) and what Nsight Compute measures (large).

python -m acceptance.calls small BACKEND            odd sizes, rows in one block and in a cluster of eight
python -m acceptance.calls large BACKEND V [torch]  between cudaProfilerStart and Stop, a mark before each family
"""

from __future__ import annotations

import contextlib
import json
import sys
import traceback
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch

from fastloss.bench.cases import Case, inputs
from fastloss.bench.losses import LOSSES

from .target import FAKE, device, fastloss, leave, synchronize

FAMILY = "family: "  # begins the line that names the next one
_SMALL_ROWS, _SMALL_V, _SMALL_H = 4, 1003, 24
_CLUSTER_V = 5001 if FAKE else 200003  # bfloat16: eight blocks where there are clusters
_PAIRS_V = 2501 if FAKE else 100003
_LARGE_LOGITS = 1 << 14 if FAKE else 1 << 27


class Call(NamedTuple):
    """A loss of the benchmark's table; `reduction` none takes the kernels of statistics and of gradients apart."""

    loss: str
    dtype: str = "bfloat16"
    backward: bool = True
    reduction: str | None = None
    V: int | None = None
    upstream: float = 1.0

    def __str__(self) -> str:
        parts = [
            self.loss,
            self.dtype,
            "" if self.backward else "forward",
            f"reduction={self.reduction}" if self.reduction else "",
        ]
        parts += [f"V={self.V}" if self.V else "", f"upstream={self.upstream:g}" if self.upstream != 1 else ""]
        return ", ".join(filter(None, parts))


_LISTED = ("top-k KL", "top-k KL, lumped tail")
_PAIRED = ("forward KL", "reverse KL", "JS")
_GENERAL = ("label smoothing", "class weights", "probabilities", "softcap + z-loss")
SMALL = [
    *(Call("plain", dtype) for dtype in ("bfloat16", "float16", "float32", "float64")),
    Call("plain", backward=False), Call("plain", reduction="none"), Call("plain", upstream=0.5),
    *(Call(loss) for loss in (*_GENERAL, *_PAIRED, *_LISTED, "log-prob + entropy", "pointer-generator")),
    *(Call(loss, reduction="none") for loss in ("label smoothing", "forward KL", "JS", "top-k KL, lumped tail")),
    *(Call(loss, "float32") for loss in ("softcap + z-loss", "JS", "top-k KL")),
    Call("linear"), Call("linear", reduction="none"), Call("linear", backward=False),
    Call("plain", V=_CLUSTER_V), Call("label smoothing", V=_CLUSTER_V), Call("top-k KL", V=_CLUSTER_V),
    Call("forward KL", V=_PAIRS_V),
]  # fmt: skip
LARGE = [
    Call("plain"), Call("plain", "float32"), Call("plain", backward=False), Call("plain", reduction="none"),
    Call("plain", upstream=0.5), *(Call(loss) for loss in ("label smoothing", "probabilities", "softcap + z-loss")),
    *(Call(loss) for loss in ("forward KL", "JS", "top-k KL")),
]  # fmt: skip


def prepared(call: Call, N: int, V: int, H: int) -> Callable[[], None]:
    """Makes the inputs; what it returns runs the loss, and its gradient."""
    x, target, arguments = inputs(Case(call.loss, call.dtype, N, V, call.backward, H=H), device=device)
    if call.reduction is not None:
        arguments["reduction"] = call.reduction
    loss: Callable[..., Any] = LOSSES[call.loss].ours
    if call.loss == "linear":
        weight = arguments.pop("linear_weight")
        loss = lambda x, target, **options: fastloss.linear_cross_entropy(x, weight, target, **options)  # noqa: E731

    def run() -> None:
        with torch.set_grad_enabled(call.backward):
            value = loss(x, target, **arguments)
            if call.backward:
                value.backward(torch.full_like(value, call.upstream))
                x.grad = None

    return run


def small() -> int:
    """All of them; 1 if one could not be called."""
    failed = 0
    for call in SMALL:
        print(f"{FAMILY}{call}", flush=True)
        try:
            V, N = (call.V or _SMALL_V), (2 if call.V else _SMALL_ROWS)
            prepared(call, N, V, _SMALL_H if call.loss == "linear" else 0)()
            synchronize()
        except Exception:
            traceback.print_exc()
            failed = 1
    return failed


def large(V: int, by_torch: bool) -> int:
    """Each after a call that is not measured, and a plain copy for comparison."""
    N = max(1, _LARGE_LOGITS // V)
    for call in (None, *LARGE):
        name = str(call or "copy, bfloat16")
        try:
            run = prepared(call, N, V, 0) if call else _copy(N, V)
            run()
            synchronize()
            if by_torch:
                print(json.dumps({"family": name, "kernels": _profiled(run)}), flush=True)
                continue
            print(f"{FAMILY}{name}", flush=True)
            with _profiler_range():
                _mark()
                run()
        except Exception:
            traceback.print_exc()
            return 1
    return 0


def _copy(N: int, V: int) -> Callable[[], None]:
    x = torch.empty(N, V, dtype=torch.bfloat16, device=device).normal_()
    out = torch.empty_like(x)

    def copy() -> None:
        out.copy_(x)

    return copy


@contextlib.contextmanager
def _profiler_range() -> Iterator[None]:
    if FAKE:
        yield
        return
    torch.cuda.profiler.start()
    yield
    synchronize()
    torch.cuda.profiler.stop()


def _mark() -> None:
    """A kernel by whose name the profiler's list is cut into families."""
    if not FAKE:
        torch.cuda._sleep(1)


def _profiled(run: Callable[[], None]) -> list[dict[str, Any]]:
    """Kernel times of one call, by torch's own profiler, which needs no permission to read counters."""
    from torch.profiler import ProfilerActivity, profile

    activities = [ProfilerActivity.CPU] if FAKE else [ProfilerActivity.CUDA]
    with profile(activities=activities) as profiler:
        run()
        synchronize()
    kernels = [event for event in profiler.events() if event.device_type == torch.autograd.DeviceType.CUDA]
    return [{"kernel": event.name[:120], "gpu__time_duration.sum": event.device_time * 1e3} for event in kernels]


def main(arguments: list[str]) -> int:
    kind, backend, *rest = arguments
    with fastloss.use_backend(backend):
        return small() if kind == "small" else large(int(rest[0]), rest[1:] == ["torch"])


if __name__ == "__main__":
    leave(main(sys.argv[1:]))
