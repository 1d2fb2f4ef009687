"""The measurements as tables that people read, and as JSON; the picture is plot.py's."""

from __future__ import annotations

import contextlib
import json
import os
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import psutil
from rich.console import Console
from rich.table import Table

from ..doctor import build_facts, machine_facts
from .cases import CHUNKED, COMPILE, EAGER, FASTLOSS, FLOOR, FRESH_COPY, LIGER, Case, Settings
from .devices import Device
from .measure import Result


@dataclass
class Neighbours:
    """Whether other processes ran during the measurement: then the times are noise."""

    start: float = field(default_factory=time.perf_counter)
    machine: float = field(default_factory=lambda: _busy_seconds())
    own: float = field(default_factory=lambda: _own_seconds())

    def cores(self) -> float:
        """How many cores they kept busy, on average since the start."""
        foreign = (_busy_seconds() - self.machine) - (_own_seconds() - self.own)
        return max(0.0, foreign / (time.perf_counter() - self.start))


def _busy_seconds() -> float:
    times = psutil.cpu_times()._asdict()
    counted_elsewhere = ("idle", "iowait", "guest", "guest_nice")
    return sum(seconds for name, seconds in times.items() if name not in counted_elsewhere)


def _own_seconds() -> float:
    """Of this process and those it started: finished ones, and torch.compile's workers, which live on."""
    total = sum(os.times()[:4])
    for child in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.Error):  # it may end meanwhile
            total += sum(child.cpu_times()[:4])
    return total


@dataclass
class Report:
    settings: Settings
    device: Device = field(default_factory=Device)
    results: list[Result] = field(default_factory=list)
    records: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)
    build: dict[str, Any] = field(default_factory=build_facts)
    machine: dict[str, Any] = field(default_factory=machine_facts)
    neighbours: Neighbours = field(default_factory=Neighbours)

    def add(self, result: Result) -> None:
        self.results.append(result)

    def sort(self, table: list[Case]) -> None:
        """Into the table's order, whichever were measured first."""
        order = {case.name: place for place, case in enumerate(table)}
        self.results.sort(key=lambda result: order[result.case.name])

    def as_dict(self) -> dict[str, Any]:
        """Everything, as plain values."""
        return {
            "date": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
            "build": self.build,
            "machine": self.machine | self.device.describe() | {"cores_busy_elsewhere": self.neighbours.cores()},
            "settings": asdict(self.settings),
            "cases": [result.summary() for result in self.results],
            "records": self.records,
            "skipped": self.skipped,
        }

    def write(self, folder: Path) -> list[Path]:
        """report.json and, if a case was measured, report.png; returns their paths."""
        path = self.write_json(folder)
        if not self.results:
            return [path]
        from . import plot

        plot.draw(self.results, self._headline(), folder / "report.png")
        pictures = [folder / "report.png"]
        if rows := self.records.get("linear memory"):
            pictures.append(folder / "memory.png")
            plot.draw_memory(rows, self._headline(), pictures[-1])
        return [path, *pictures]

    def write_json(self, folder: Path) -> Path:
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / "report.json"
        part = folder / "report.json.part"
        part.write_text(json.dumps(self.as_dict(), indent=1) + "\n")
        part.replace(path)  # who is interrupted here leaves the last one
        return path

    def show(self, console: Console | None = None) -> None:
        """Prints the tables."""
        if console is None:
            console = Console()
            console.width = max(console.width, 175)  # folded by a narrow terminal, but complete
        console.print(f"\n{self._headline()}", highlight=False)
        console.print(
            "times in ms; [green]✓[/] meets its target, [red]✗[/] does not; "
            "targets: times as fast as torch, as torch.compile, share of the floor",
            highlight=False,
        )
        if self.neighbours.cores() > 0.1:
            console.print("[yellow]other processes held the processor: take these times for noise[/]")
        for work in ("forward+backward", "forward"):
            differ_in = self.device.regimes_differ_in(work == "forward+backward")
            for linear, title in ((False, work), (True, f"from hidden states (N x H x V), {work}")):
                chosen = [r for r in self.results if r.case.work == work and bool(r.case.H) == linear]
                if chosen:
                    console.print(f"\n{title}")
                    console.print(_linear_table(chosen, differ_in) if linear else _case_table(work, chosen, differ_in))
        for name, rows in self.records.items():
            console.print(f"\n{_TITLES[name]}", highlight=False)
            console.print(_record_table(name, rows))
        for name, reason in self._not_measured().items():
            console.print(f"not measured: {name}: {reason}", highlight=False, markup=False)

    def _headline(self) -> str:
        b, m = self.build, self.machine
        device = "".join(f"{name.replace('_', ' ')} {value}\n" for name, value in self.device.describe().items())
        return (
            f"{device}{m['cpu']}, {m['cores']} cores, {m['memory_gib']} GiB, huge pages {m['huge_pages']}\n"
            f"fastloss {b['fastloss']} ({b.get('isa', b['native'])}), torch {b['torch']}, Python {b['python']}, "
            f"{m['torch_threads']} threads\n"
            f"medians of {self.settings.rounds} interleaved rounds; other processes kept {self.neighbours.cores():.2f} "
            f"cores busy meanwhile".replace("[", "(").replace("]", ")")
        )

    def _not_measured(self) -> dict[str, str]:
        """Skipped cases, and baselines with their reason: named once if it is the same everywhere."""
        reasons: dict[tuple[str, str], list[Result]] = {}
        for result in self.results:
            for name, reason in result.skipped.items():
                reasons.setdefault((name, reason), []).append(result)
        notes = {
            name if len(where) == len(self.results) else f"{name} in {len(where)} of {len(self.results)} cases": reason
            for (name, reason), where in reasons.items()
        }
        return self.skipped | notes


def _mark(value: float | None, target: float | None, form: str) -> str:
    """A number, and whether it meets its target."""
    if value is None:
        return "-"
    text = form.format(value)
    if target is None:
        return text
    return f"{text} [green]✓[/]" if value >= target else f"{text} [red]✗[/]"


def _ms(seconds: float | None) -> str:
    if seconds is None:
        return "-"
    return f"{seconds * 1e3:.1f}" if seconds >= 0.01 else f"{seconds * 1e3:.2f}"


def _case_table(work: str, results: list[Result], differ_in: str | None) -> Table:
    backward = work == "forward+backward"
    liger = any(LIGER in result.seconds for result in results)
    table = Table(pad_edge=False)
    table.add_column("case", no_wrap=True)
    if differ_in:
        table.add_column(differ_in, no_wrap=True)
    names = ["fastloss", "torch", "x", "compile", "x", *(["liger", "x"] if liger else []), "floor", "of floor", "GB/s"]
    for name in [*names, *(["fresh copy"] if backward else [])]:
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("targets", no_wrap=True)
    if not backward:
        table.add_column("the floor is")
    for result in results:
        for regime in result.labels:
            row = _case_row(result, regime, backward, liger)
            table.add_row(row[0], *([result.labels[regime]] if differ_in else []), *row[1:])
        table.add_section()
    return table


def _linear_table(results: list[Result], differ_in: str | None) -> Table:
    """The floor is that of the matmuls; `compile` in the targets stands for torch's own chunked loss."""
    others = {"torch": EAGER, "compile": COMPILE, "chunked": CHUNKED, "liger": LIGER}
    always = ("torch", "chunked")
    shown = [n for n, key in others.items() if n in always or any(key in result.seconds for result in results)]
    table = Table(pad_edge=False)
    left = ("case", "backend", "targets", "the floor is")
    names = [
        "case",
        *(["backend"] if differ_in == "backend" else []),
        "fastloss",
        *[m for n in shown for m in (n, "x")],
    ]
    for name in [*names, "floor", "of floor", "GFLOP/s", "targets", "the floor is"]:
        table.add_column(name, justify="left" if name in left else "right", no_wrap=True)
    for result in results:
        target = result.case.target
        limits = {"torch": target.eager, "chunked": target.compile}
        for regime, label in result.labels.items():
            row = [f"{result.case.dtype} {result.case.shape}", *([label] if "backend" in names else [])]
            row.append(_ms(result.median(regime)))
            for name in shown:
                ratio = _mark(result.ratio(others[name], regime), limits.get(name), "{:.2f}")
                row += [_ms(result.median(others[name])), ratio]
            row += [_ms(result.median(FLOOR)), _mark(result.ratio(FLOOR, regime), target.floor, "{:.2f}")]
            row += [f"{result.rate(regime):.0f}", ", ".join("-" if limit is None else f"{limit:g}" for limit in target)]
            table.add_row(*row, result.floor)
    return table


def _case_row(result: Result, regime: str, backward: bool, liger: bool) -> list[str]:
    case, target, first = result.case, result.case.target, regime == FASTLOSS
    pages = " huge pages" if case.environment else ""
    name = f"{case.dtype} {case.N}x{case.V}{'' if case.loss == 'plain' else ' ' + case.loss}{pages}"

    def once(text: str) -> str:
        return text if first else ""  # the baselines are the same in both rows

    row = [once(name), _ms(result.median(regime))]
    row += [once(_ms(result.median(EAGER))), _mark(result.ratio(EAGER, regime), target.eager, "{:.1f}")]
    row += [once(_ms(result.median(COMPILE))), _mark(result.ratio(COMPILE, regime), target.compile, "{:.1f}")]
    if liger:
        row += [once(_ms(result.median(LIGER))), _mark(result.ratio(LIGER, regime), None, "{:.1f}")]
    row += [once(_ms(result.median(FLOOR))), _mark(result.ratio(FLOOR, regime), target.floor, "{:.2f}")]
    row += [f"{result.rate(regime):.1f}", *([once(_ms(result.median(FRESH_COPY)))] if backward else [])]
    targets = ", ".join("-" if limit is None else f"{limit:g}" for limit in target)
    return [*row, once(targets), *([] if backward else [result.floor])]


_TITLES = {
    "small calls": "one 8x16 call, microseconds (target: at most 5 more than torch, forward+backward)",
    "peak memory": "peak memory above logits and gradient, MiB (target: O(N) bytes)",
    "linear memory": "peak memory from hidden states, above inputs and gradients, MiB (target: 64, at any N)",
    "shared vocabulary": "two ranks, forward+backward, ms (targets: 4 x loss_parallel, 3 x three all-reduces)",
    "import time": "import fastloss beyond import torch (target: below 50 ms)",
    "error": "largest absolute error against float64 (target: never above torch's)",
}


def _record_table(name: str, rows: list[dict[str, Any]]) -> Table:
    table = Table(pad_edge=False)
    for column in rows[0]:
        table.add_column(column.replace("_", " "), justify="left" if isinstance(rows[0][column], str) else "right")
    table.add_column("target")
    for row in rows:
        cells = [_cell(value, "{:.2e}" if name == "error" else "{:.2f}") for value in row.values()]
        met = _record_met(name, row)
        table.add_row(*cells, {None: "", True: "[green]✓[/]", False: "[red]✗[/]"}[met])
    return table


def _cell(value: Any, form: str) -> str:
    return form.format(value) if isinstance(value, float) else str(value)


def _record_met(name: str, row: dict[str, Any]) -> bool | None:
    if name == "small calls":
        return row["extra_us"] <= 5 if row["work"] == "forward+backward" else None
    if name == "peak memory":
        return row["fastloss_mib"] <= 4  # buffers of O(N) and O(V) bytes, and the end of a huge page
    if name == "linear memory":
        return row["fastloss_mib"] <= 64
    if name == "shared vocabulary":
        return row["x loss_parallel"] >= 4 and row["x three all-reduces"] >= 3
    if name == "import time":
        return row["import_ms"] < 50
    return all(row[f"fastloss_{part}"] <= row[f"torch_{part}"] for part in ("loss", "grad"))
