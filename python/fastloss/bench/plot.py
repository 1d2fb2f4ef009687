"""The measurements as one picture: how many times as fast as torch, and how near to the floor."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from .cases import COMPILE, EAGER, FLOOR
from .measure import Result

matplotlib.use("Agg")

_OURS, _COMPILE = ("#1b6ca8", "#8fc1e3", "#0b3c5d"), "#e08e45"
_LONGER = {"recycled": "recycled gradient memory", "first touch": "gradient memory never touched before"}


def draw(results: list[Result], headline: str, path: Path) -> None:
    """Grouped horizontal bars, a group per case, best read from the top."""
    figure = Figure(figsize=(15, 2.2 + 0.62 * len(results)), layout="constrained")
    speed, share = figure.subplots(1, 2, sharey=True, width_ratios=(3, 2))
    ours = {name: f"fastloss, {_LONGER.get(text, text)}" for result in results for name, text in result.labels.items()}
    entries = {name: (label, color) for (name, label), color in zip(ours.items(), _OURS, strict=False)}
    _bars(share, results, entries, lambda result, name: result.ratio(FLOOR, name), "{:.2f}")
    if any(COMPILE in result.seconds for result in results):
        entries[COMPILE] = "torch.compile of torch's loss", _COMPILE
    _bars(speed, results, entries, lambda result, name: result.ratio(EAGER, name), "{:.1f}x")
    for row, result in enumerate(results):
        _target(speed, row, result.case.target.eager)
        _target(share, row, result.case.target.floor)
    speed.set_yticks(range(len(results)), [_label(result) for result in results])
    speed.invert_yaxis()
    speed.axvline(1, color="black", linewidth=0.8)
    share.axvline(1, color="black", linewidth=0.8)
    speed.set_title("times as fast as torch eager (1 = torch)", loc="left")
    share.set_title("share of the floor: memory, or matrix products", loc="left")
    handles, labels = speed.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4, frameon=False)
    figure.suptitle(headline, x=0.01, ha="left", fontsize=10)
    figure.savefig(path, dpi=110)


def draw_memory(rows: list[dict[str, Any]], headline: str, path: Path) -> None:
    """Peak memory of losses of hidden states against the number of rows, a line for each loss."""
    figure = Figure(figsize=(8, 5.5), layout="constrained")
    axes = figure.subplots()
    for name in [name for name in rows[0] if name.endswith("_mib")]:
        style = {"fastloss_mib": "o-", "logits_mib": "k:"}.get(name, "s--")
        label = "one copy of the logits" if name == "logits_mib" else name.removesuffix("_mib")
        axes.plot([row["N"] for row in rows], [max(row[name], 1) for row in rows], style, label=label)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log", base=2)
    axes.set_xlabel(f"rows (V = {rows[0]['V']}, H = {rows[0]['H']}, float32)")
    axes.set_ylabel("MiB above inputs and gradients")
    axes.legend(frameon=False)
    figure.suptitle(headline, x=0.01, ha="left", fontsize=7)
    figure.savefig(path, dpi=110)


def _label(result: Result) -> str:
    case = result.case
    pages = ", huge pages for torch" if case.environment else ""
    return f"{case.loss}, {case.work}\n{case.dtype} {case.shape}{pages}"


def _bars(axes: Axes, results: list[Result], entries: dict[str, tuple[str, str]], value: Any, form: str) -> None:
    """`entries`: the label and color of each."""
    for axis in ("top", "right"):
        axes.spines[axis].set_visible(False)
    height = 0.8 / len(entries)
    for index, (name, (label, color)) in enumerate(entries.items()):
        found = [(row, value(result, name)) for row, result in enumerate(results) if result.median(name)]
        found = [(row, number) for row, number in found if number is not None]
        places = [row + (index - (len(entries) - 1) / 2) * height for row, _ in found]
        numbers = [number for _, number in found]
        bars = axes.barh(places, numbers, height * 0.92, color=color, label=label)
        axes.bar_label(bars, [form.format(number) for number in numbers], padding=3, fontsize=8)
    axes.margins(x=0.12, y=0.01)


def _target(axes: Axes, row: int, target: float | None) -> None:
    if target is not None:
        label = "target" if not any(line.get_label() == "target" for line in axes.lines) else "_"
        axes.plot([target, target], [row - 0.42, row + 0.42], color="#b3261e", linewidth=1.6, label=label)
