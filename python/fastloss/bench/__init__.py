"""The benchmark: every loss beside torch's own and beside the memory floor, interleaved in one run.

`python -m fastloss bench` and `pytest benchmarks --benchmark-only` measure the same table, `cases.CASES`.
"""

from __future__ import annotations

import importlib.util
import sys
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from .cases import Case
    from .report import Report

_EXTRA = ("matplotlib", "psutil", "rich")


def missing() -> str | None:
    """What to install before measuring; None if everything is there."""
    absent = [name for name in _EXTRA if importlib.util.find_spec(name) is None]
    if not absent:
        return None
    return f"the benchmark needs {', '.join(absent)}: pip install 'fastloss[bench]'"


def main(quick: bool, out: str, threads: int | None = None, compiled: bool = True, device: str = "cpu") -> int:
    """Measures, prints the tables, writes report.json and report.png into `out`; returns the exit status."""
    if absent := missing():
        print(absent, file=sys.stderr)
        return 1
    from . import records, report
    from .cases import Settings, cases
    from .devices import Unavailable, open_device

    try:
        opened = open_device(device)
    except Unavailable as why:
        print(f"--device {device}: {why}", file=sys.stderr)
        return 1
    if threads is not None:
        torch.set_num_threads(threads)
    settings = Settings.of(quick, compiled, device)
    results = report.Report(settings, opened)
    failed = 0
    for name, work in [
        *((str(case), partial(_measure, case, results)) for case in cases(quick, opened.accelerator)),
        *((name, partial(_record, name, results)) for name in records.RECORDS),
    ]:
        print(f"measuring {name} ...", file=sys.stderr, flush=True)
        try:
            work()
            opened.release()
        except Exception as error:  # out of memory, a kernel that failed or does not compile: the rest is still wanted
            said = str(error).partition("\n")[0][:200]
            results.skipped[name] = f"failed: {type(error).__name__}: {said}"
            failed = 1
        results.write_json(Path(out))  # whatever happens to the next
    results.show()
    for path in results.write(Path(out)):
        print(path)
    return failed


def _measure(case: Case, results: Report) -> None:
    from . import measure, records

    if why := measure.not_enough_memory(case, results.device):
        results.skipped[str(case)] = why
    elif case.environment:
        results.add(records.in_child(case, results.settings))
    else:
        results.add(measure.run(case, results.settings, results.device))


def _record(name: str, results: Report) -> None:
    from . import records

    results.records[name] = records.RECORDS[name](results.settings, results.device)
