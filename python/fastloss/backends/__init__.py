"""The registry: which backend runs a call, and why the others do not."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..spec import Objective, Rows, Spec
from . import cuda, device, native, products, reference, triton
from .device import Passing


class Backend(NamedTuple):
    """Functions that compute `spec.Rows`: reference.row_loss and row_grad, native.row_loss_grad say how. The last, loss
    and gradient in one pass, may be missing. With `rescale` the upstream gradient of a reduced loss is read on the
    device; without it, on the host. `matmul` and `logits_dtype` make logits from hidden states: products.py says how;
    where it `takes_head`, `head_loss` and `head_grad` need none in memory. `in_parts`: rows may be some classes of all,
    and their gradient is made from the statistics of the whole."""

    name: str
    runs_on: str
    refuses: Callable[[torch.device, torch.dtype, torch.dtype, Objective], str | None]
    row_loss: Callable[..., tuple[Tensor, Tensor, Tensor, Tensor]]
    row_grad: Callable[..., Tensor]
    row_loss_grad: Callable[..., tuple[Tensor, Tensor | None, Tensor | None]] | None = None
    rescale: Callable[[Tensor, Tensor], Tensor] | None = None
    products_by: str = "torch's matmul"
    matmul: Callable[..., None] = products.matmul
    logits_dtype: Callable[[torch.dtype, torch.dtype], torch.dtype] = products.logits_dtype
    in_parts: bool = True
    takes_head: Callable[..., bool] | None = None
    head_loss: Callable[..., tuple[Tensor, Tensor, Tensor, Tensor]] | None = None
    head_grad: Callable[..., device.Tiles | None] | None = None


def _on_device(
    name: str, runs_on: str, refuses: Callable[..., str | None], kernels: Callable[[], device.Kernels]
) -> Backend:
    """A backend of `device.Kernels`, which are made when they are first needed."""

    def lazily(function: Callable[..., Any]) -> Callable[..., Any]:
        return lambda *args, **kwargs: function(kernels(), *args, **kwargs)

    row_loss, row_grad = lazily(device.row_loss), lazily(device.row_grad)
    return Backend(
        name,
        runs_on,
        refuses,
        row_loss,
        row_grad,
        lazily(device.row_loss_grad),
        lazily(device.rescale),
        takes_head=lazily(device.takes_head),
        head_loss=lazily(device.head_loss),
        head_grad=lazily(device.head_grad),
    )


BACKENDS = (
    Backend(
        "cpu",
        "CPUs: x86-64, aarch64",
        native.refuses,
        native.row_loss,
        native.row_grad,
        native.row_loss_grad,
        products_by="its own products, summed in float32 (float64 for float64)",
        matmul=native.matmul,
        logits_dtype=native.logits_dtype,
        takes_head=native.takes_head,
        head_loss=native.head_loss,
    ),
    _on_device("cuda", "NVIDIA GPUs, compute capability 8.0 and later", cuda.refuses, cuda.kernels),
    _on_device("triton", "GPUs that Triton knows: NVIDIA, AMD, Intel", triton.refuses, triton.kernels),
    Backend(
        "reference", "all that torch runs on", reference.refuses, reference.row_loss, reference.row_grad, in_parts=False
    ),
)

_forced: str | None = None
_chosen: dict[Any, Backend] = {}


def names() -> list[str]:
    """The backends' names, in the order they are asked."""
    return [backend.name for backend in BACKENDS]


def force(name: str | None) -> None:
    """Only this backend from now on; None or "auto" for the usual order."""
    global _forced
    name = None if name == "auto" else name
    if name is not None and name not in names():
        raise ValueError(f"backend: expected one of {', '.join(['auto', *names()])}, got {name!r}")
    _forced = name
    _chosen.clear()


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """`with fastloss.use_backend("reference"):` only this backend inside; for the whole process, not per thread."""
    before = _forced
    force(name)
    try:
        yield
    finally:
        force(before)


def choose(rows: Rows) -> Backend:
    """The first backend that does not refuse rows like these."""
    return choose_for(rows.input.device, rows.input.dtype, rows.target.dtype, rows.spec.objective)


def choose_for(device: torch.device, dtype: torch.dtype, target_dtype: torch.dtype, objective: Objective) -> Backend:
    """The first backend that does not refuse such logits and target."""
    # By the number: torch.compile before 2.12 hashes no Objective.
    request = device, dtype, target_dtype, objective._value_
    return _chosen.get(request) or _choose(*request)


def _choose(device: torch.device, dtype: torch.dtype, target_dtype: torch.dtype, number: int) -> Backend:
    reasons = refusals(device, dtype, target_dtype, Objective(number))
    for backend in BACKENDS:
        if reasons[backend.name] is None:
            if not any(isinstance(reason, Passing) for reason in reasons.values()):
                _chosen[device, dtype, target_dtype, number] = backend
            return backend
    table = "\n".join(f"  {name}: {reason}" for name, reason in reasons.items())
    raise NotImplementedError(f"no backend runs this call:\n{table}")


def refusals(
    device: torch.device, dtype: torch.dtype, target_dtype: torch.dtype, objective: Objective = Objective.INDEX
) -> dict[str, str | None]:
    """For each backend, why it would not run such a call; None where it would."""
    request = device, dtype, target_dtype, objective
    forced = f"{_forced!r} is forced (FASTLOSS_BACKEND or use_backend)" if _forced else None
    return {
        backend.name: forced if forced and backend.name != _forced else backend.refuses(*request)
        for backend in BACKENDS
    }


def explain(input: Tensor, target: Tensor, objective: str | None = None, *, linear_weight: Tensor | None = None) -> str:
    """Which backend would compute a loss of these tensors, and why the others would not, as a small table. `objective`:
    "index", "probs", "topk", "topk_tail", "forward_kl", "reverse_kl" or "js"; by default a cross-entropy. With
    `linear_weight`, `input` is hidden states, and three lines say who makes their logits, also where only losses are
    wanted, and what filter_eps does."""
    name = ("probs" if target.is_floating_point() else "index") if objective is None else objective
    if name.upper() not in Objective.__members__:
        known = ", ".join(member.lower() for member in Objective.__members__)
        raise ValueError(f"objective: expected one of {known}, got {objective!r}")
    asked = Objective[name.upper()]
    reasons = refusals(input.device, input.dtype, target.dtype, asked)
    chosen = next((name for name, reason in reasons.items() if reason is None), None)
    lines = [
        f"{'->' if name == chosen else '  '} {name:10s} {_status(name, reason, chosen)}"
        for name, reason in reasons.items()
    ]
    if linear_weight is not None and chosen is not None:
        source = next(backend for backend in BACKENDS if backend.name == chosen)
        dtype = source.logits_dtype(input.dtype, linear_weight.dtype)
        by = source.products_by if dtype.itemsize > 2 else BACKENDS[-1].products_by  # only the library rounds them
        lines.append(f"   logits     some rows at a time by {by}, in {str(dtype).removeprefix('torch.')}")
        rows = Rows(input[..., :1].expand(*input.shape[:-1], len(linear_weight)), target, None, Spec(objective=asked))
        tiled = source.takes_head is not None and source.takes_head(rows, input, linear_weight)
        lines.append(f"   scoring    {'without logits in memory' if tiled else 'likewise'}")
        filters = tiled and source.head_grad is not None
        effect = (
            "leaves out small tiles of the gradient; 0: ignored rows" if filters else "no effect: the gradient is exact"
        )
        lines.append(f"   filter_eps {effect}")
    return "\n".join(lines)


def _status(name: str, reason: str | None, chosen: str | None) -> str:
    if reason is not None:
        return reason
    return "chosen" if name == chosen else f"would run, but {chosen} comes first"


try:
    force(os.environ.get("FASTLOSS_BACKEND"))
except ValueError as error:
    raise ValueError(f"environment variable FASTLOSS_BACKEND: {error}") from None
