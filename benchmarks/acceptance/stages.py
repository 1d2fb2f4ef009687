"""The table of stages, in the order that gives most first, and the entrance of their processes."""

from __future__ import annotations

import importlib
import sys
from typing import NamedTuple

from .results import Skip, emit_skip


class Stage(NamedTuple):
    """`module` of this package has the function `name`; `limit` and `least` are seconds: what it may take, and what is
    too little to begin with."""

    name: str
    module: str
    limit: int
    least: int
    about: str


STAGES = [
    Stage("build", "build", 300, 60, "fastloss, compiled for the architecture of the device at hand alone"),
    Stage("doctor", "build", 90, 15, "python -m fastloss doctor: what is built, and its self-test on the device"),
    Stage("smoke", "smoke", 150, 20, "each kind of call beside float64 on the device; graphs, streams, bad labels"),
    Stage("tests", "suite", 330, 60, "pytest -m gpu"),
    Stage("bench", "bench", 480, 40, "python -m fastloss bench: the accelerator table, plain bfloat16 first"),
    Stage("linear", "linear", 300, 40, "losses of hidden states: a sweep over max_chunk_bytes, beside other libraries"),
    Stage("sanitizer", "sanitizer", 300, 40, "compute-sanitizer: memcheck, racecheck, synccheck, initcheck"),
    Stage("profile", "profile", 300, 40, "Nsight Compute: time, bytes, occupancy, stalls of each kernel family"),
]
BY_NAME = {stage.name: stage for stage in STAGES}


def main(name: str) -> int:
    """Runs a stage in this process; returns the exit status."""
    stage = BY_NAME[name]
    try:
        return getattr(importlib.import_module(f".{stage.module}", __package__), stage.name)()
    except Skip as why:
        print(f"skipped: {why}", flush=True)
        emit_skip(str(why))
        return 0


if __name__ == "__main__":
    status = main(sys.argv[1])
    if "torch" in sys.modules:
        from .target import leave

        leave(status)
    sys.exit(status)
