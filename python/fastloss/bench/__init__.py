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


def main(
    quick: bool,
    out: str,
    threads: int | None = None,
    compiled: bool = True,
    device: str = "cpu",
    only: str | None = None,
    resume: bool = False,
) -> int:
    """Measures, prints the tables, writes report.json and report.png into `out`; returns the exit status. `only`: a
    regular expression, found in the names of what is measured. `resume`: what report.json in `out` has, is kept."""
    if absent := missing():
        print(absent, file=sys.stderr)
        return 1
    from . import records
    from .cases import Settings, cases
    from .devices import Unavailable, open_device
    from .report import Report
    from .resume import Refused, restore, select

    try:
        opened = open_device(device)
        table, names = select(only, all_cases := cases(quick, opened.accelerator), list(records.RECORDS))
        if threads is not None:
            torch.set_num_threads(threads)
        results = Report(Settings.of(quick, compiled, device), opened)
        gone = restore(results, Path(out), all_cases) if resume else []
    except Unavailable as why:
        print(f"--device {device}: {why}", file=sys.stderr)
        return 1
    except Refused as why:
        print(why, file=sys.stderr)
        return 1
    if gone:
        print(f"left out, no longer in the table: {', '.join(gone)}", file=sys.stderr)
    failed = _measure_all(table, names, results, Path(out))
    results.sort(all_cases)
    results.show()
    for path in results.write(Path(out)):
        print(path)
    return failed


def _measure_all(table: list[Case], names: list[str], results: Report, out: Path) -> int:
    """What is not in the results yet, with a report after each; 1 if something failed."""
    measured, failed = {result.case.name for result in results.results}, 0
    for name, work in [
        *((str(case), partial(_measure, case, results)) for case in table if case.name not in measured),
        *((name, partial(_record, name, results)) for name in names if name not in results.records),
    ]:
        print(f"measuring {name} ...", file=sys.stderr, flush=True)
        try:
            work()
            results.device.release()
        except Exception as error:  # out of memory, a kernel that failed or does not compile: the rest is still wanted
            said = str(error).partition("\n")[0][:200]
            results.skipped[name] = f"failed: {type(error).__name__}: {said}"
            failed = 1
        results.write_json(out)  # whatever happens to the next
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
