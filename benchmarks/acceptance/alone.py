"""python -m acceptance.alone capture|label: checks of `smoke` that need a process of their own. Exit status 0: as it
should be."""

from __future__ import annotations

import sys

import torch
from gpu_device import captured

from fastloss.bench.ranks import leave

from .smoke import _indices, compare
from .target import FAKE, fastloss, synchronize


def capture() -> int:
    """A CUDA graph of the first call that this process makes, replayed with other logits."""
    x, y = _indices(64, 503 if FAKE else 32000)
    x.requires_grad_()
    out: list[torch.Tensor] = []

    def step() -> None:
        loss = fastloss.cross_entropy(x, y)
        out[:] = [loss.detach(), *torch.autograd.grad(loss, x)]

    replay = captured(step)
    with torch.no_grad():
        x.mul_(0.5)
    replay()
    synchronize()
    captured_loss, captured_grad = (t.clone() for t in out)

    def as_captured(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return _Known.apply(x, captured_loss, captured_grad)

    found = compare(as_captured, torch.nn.functional.cross_entropy, x.detach(), y, {})
    print(found)
    return 0 if found["ok"] else 1


class _Known(torch.autograd.Function):
    """A loss and a gradient that were computed elsewhere."""

    @staticmethod
    def forward(ctx, x, loss, grad):
        ctx.save_for_backward(grad)
        return loss.clone()

    @staticmethod
    def backward(ctx, upstream):
        return ctx.saved_tensors[0], None, None


def label() -> int:
    """A class index out of range trips the device's assertion, and nothing worse."""
    if FAKE:
        print("the fake device has no assertions")
        return 0
    x, y = _indices(64, 32000)
    y[3] = 32005
    synchronize()
    try:
        fastloss.cross_entropy(x, y)
        synchronize()
    except Exception as error:
        print(str(error).splitlines()[0])
        return 0 if "assert" in str(error) else 1
    print("a label out of range was taken without a word")
    return 1


if __name__ == "__main__":
    status = {"capture": capture, "label": label}[sys.argv[1]]()
    leave(status)  # what a device with a tripped assertion says when Python ends is of no interest
