"""An interrupted benchmark, continued: which cases are wanted, and what an earlier report has of them already."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .cases import Case
from .measure import Result
from .report import Report

# Of `machine`: what an earlier measurement must share with this one.
_SAME_MACHINE = ("system", "cpu", "cores", "torch_threads", "accelerator", "device", "device_memory_gib")


class Refused(ValueError):
    """What was asked for cannot be done; the message says why."""


def select(only: str | None, table: Sequence[Case], records: Sequence[str]) -> tuple[list[Case], list[str]]:
    """The cases and records in whose name `only`, a regular expression, is found; all of them without one."""
    if only is None:
        return list(table), list(records)
    try:
        pattern = re.compile(only)
    except re.error as error:
        raise Refused(f"--only {only!r} is no regular expression: {error}") from None
    cases = [case for case in table if pattern.search(case.name) or pattern.search(str(case))]
    names = [name for name in records if pattern.search(name)]
    if cases or names:
        return cases, names
    some = [case.name for case in table][:: max(1, len(table) // 4)][:4]
    raise Refused(
        f"--only {only!r} matches no case and no record; there are, among others: {', '.join(some)}; {records}"
    )


def restore(report: Report, folder: Path, table: Sequence[Case]) -> list[str]:
    """Adds what folder/report.json holds of the table to the report. Returns the names of cases that it holds and the
    table does not. Refused if it was measured with other settings, versions, or on another machine."""
    path = folder / "report.json"
    if not path.exists():
        return []
    try:
        earlier = json.loads(path.read_text())
        differences = _differences(earlier, json.loads(json.dumps(report.as_dict())))
        summaries, records = earlier["cases"], earlier["records"]
    except (ValueError, KeyError, TypeError) as error:
        raise Refused(f"--resume: {path} is no report of a benchmark: {type(error).__name__}: {error}") from None
    if differences:
        raise Refused(
            f"--resume: {path} was measured otherwise: {'; '.join(differences)}. "
            "Name another folder with --out, or leave out --resume to measure again"
        )
    cases = {case.name: case for case in table}
    for summary in summaries:
        if summary["name"] in cases:
            report.add(_result(cases[summary["name"]], summary))
    report.records.update(records)
    return [summary["name"] for summary in summaries if summary["name"] not in cases]


def _differences(earlier: dict[str, Any], now: dict[str, Any]) -> list[str]:
    names = {"settings": now["settings"], "build": now["build"], "machine": _SAME_MACHINE}
    pairs = [(name, earlier[of].get(name), now[of].get(name)) for of, listed in names.items() for name in listed]
    return [f"{name} was {before}, and is {after}" for name, before, after in pairs if before != after]


def _result(case: Case, summary: dict[str, Any]) -> Result:
    work = summary["flop" if case.H else "bytes"]
    return Result(case, summary["seconds"], summary["skipped"], summary["floor"], work, summary["fastloss"])
