"""The upstream gradient that the forward of a reduced loss makes its gradients for.

A gradient that is rounded to 16 bits in the forward must have its loss scale by then: what it rounds to nothing no
later factor brings back. But the forward does not know the factor. It takes that of the last backward: a training
loop's is the same at every step (1, one over the accumulation steps, a loss scale).

On CPUs the backward compares. Where the guess was wrong it makes those gradients again, from hidden states: a guess
changes the time, never a bit of the result. Devices are not waited for: there the guess stays a number on the device,
and the backward multiplies by the quotient of the true upstream gradient and the expected one. That is one, and exact,
unless the scale has just changed: such a step rounds twice.

The guess is not the one of rows.py. A wrong guess costs a loss of logits one more pass over them, but a linear loss
matrix multiplications; so it has one for each objective, and a cross-entropy beside a divergence does not disturb it.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..backends.device import captures
from ..spec import Objective
from . import blocks, grads
from .heads import LinearRows

_of_host: dict[Objective, float] = {}
_of_device: dict[tuple[torch.device, Objective], Tensor] = {}


def on_host(upstream: Tensor) -> bool:
    """Whether it can be read without waiting for a device."""
    return upstream.device.type == "cpu"


def rounded(given: LinearRows, needs: list[bool]) -> list[bool]:
    """Which gradients of hidden states, weight and bias leave the forward rounded to fewer digits than they are summed
    in, for the expected upstream gradient. The others are for one, and lose nothing by a later factor."""
    hidden = given.head.hidden.dtype != given.rows.compute_dtype
    return [needs[0] and hidden, blocks.needed(given, needs), False]


def narrow(given: LinearRows) -> bool:
    """Whether logits are 16-bit: then their gradients are rounded, and any number depends on the guess."""
    return grads.logits_dtype(given, given.backend()).itemsize == 2


def is_guessed(given: LinearRows, needs: list[bool]) -> bool:
    """Whether any gradient depends on the guess."""
    return any(rounded(given, needs)) or (any(needs) and narrow(given))


def expected(given: LinearRows) -> Tensor:
    """The guess, () in the compute dtype."""
    hidden, dtype, objective = given.head.hidden, given.rows.compute_dtype, given.rows.spec.objective
    if on_host(hidden):
        return hidden.new_full((), _of_host.get(objective, 1.0), dtype=dtype)
    # A copy: the next backward overwrites the guess in its place, which a CUDA graph has captured.
    return _on_device(hidden.device, objective).to(dtype, copy=True)


def remember(given: LinearRows, upstream: Tensor) -> None:
    """For the next forward, unless it is not finite; on devices nor zero, as it becomes a divisor there."""
    objective = given.rows.spec.objective
    if on_host(upstream):
        if math.isfinite(value := upstream.item()):
            _of_host[objective] = value
        return
    last = _on_device(upstream.device, objective)
    upstream = upstream.to(last.dtype)
    last.copy_(torch.where(upstream.isfinite() & (upstream != 0), upstream, last))


def _on_device(device: torch.device, objective: Objective) -> Tensor:
    """The last upstream gradient, () and float32; one where there is none yet. A one that is made while a CUDA graph is
    captured is not kept: until the graph is replayed its memory holds anything, and other steps would read it."""
    key = device, objective
    last = _of_device.get(key)
    if last is None:
        last = torch.ones((), dtype=torch.float32, device=device)
        if not captures(device):
            _of_device[key] = last
    return last
