"""What needs a process of its own: memory peaks, and settings that torch reads at its start. Prints JSON."""

from __future__ import annotations

import json
import resource
import sys
from pathlib import Path
from typing import Any

import torch

from .cases import Case, Settings, inputs
from .measure import run
from .records import LINEAR_LOSSES, LOSSES


def peak_bytes() -> int:
    """The most memory this process has had resident."""
    status = Path("/proc/self/status")
    if status.exists():  # not ru_maxrss: on Linux it begins with the parent's
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def memory(name: str, loss: str, dtype: str, N: int, V: int, H: int) -> dict[str, Any]:
    """Peak above inputs and gradients. The inputs are made without temporaries, so that the peak is the loss's own."""
    call = (LINEAR_LOSSES if H else LOSSES)[name]

    def step(N: int, V: int) -> int:
        data = inputs(Case(loss, dtype, N, V, True, H=H))
        before = peak_bytes()
        call(data.x, data.target, **data.arguments).backward()
        return peak_bytes() - before - data.grad_bytes()

    step(64, 4096)  # code, threads and their stacks
    return {"extra_bytes": step(N, V)}


def rounds(case: dict[str, Any], rounds: int, compiled: bool) -> dict[str, Any]:
    """A case's rounds: everything of measure.Result but the case itself."""
    result = run(Case(**case), Settings(rounds=rounds, compiled=compiled))
    return {name: value for name, value in vars(result).items() if name != "case"}


def main(request: dict[str, Any]) -> None:
    torch.set_num_threads(request.pop("threads"))
    work: Any = {"memory": memory, "rounds": rounds}[request.pop("work")]
    print(json.dumps(work(**request)))


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
