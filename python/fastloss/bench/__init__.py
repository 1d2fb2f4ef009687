"""The benchmark: every loss beside torch's own and beside the memory floor, interleaved in one run.

`python -m fastloss bench` and `pytest benchmarks --benchmark-only` measure the same table, `cases.CASES`.
"""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import torch

_EXTRA = ("matplotlib", "psutil", "rich")


def missing() -> str | None:
    """What to install before measuring; None if everything is there."""
    absent = [name for name in _EXTRA if importlib.util.find_spec(name) is None]
    if not absent:
        return None
    return f"the benchmark needs {', '.join(absent)}: pip install 'fastloss[bench]'"


def main(quick: bool, out: str, threads: int | None = None, compiled: bool = True) -> int:
    """Measures, prints the tables, writes report.json and report.png into `out`; returns the exit status."""
    if absent := missing():
        print(absent, file=sys.stderr)
        return 1
    from . import measure, records, report
    from .cases import Settings, cases

    if threads is not None:
        torch.set_num_threads(threads)
    settings = Settings.quick(compiled) if quick else Settings(compiled=compiled)
    results = report.Report(settings)
    for case in cases(quick):
        print(f"measuring {case} ...", file=sys.stderr, flush=True)
        if why := measure.not_enough_memory(case):
            results.skipped[str(case)] = why
        elif case.environment:
            results.add(records.in_child(case, settings))
        else:
            results.add(measure.run(case, settings))
    for name, record in records.RECORDS.items():
        print(f"measuring {name} ...", file=sys.stderr, flush=True)
        results.records[name] = record(settings)
    results.show()
    for path in results.write(Path(out)):
        print(path)
    return 0
