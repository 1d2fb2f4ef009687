"""A result of gpu_acceptance.py as pictures."""

from __future__ import annotations

from pathlib import Path
from textwrap import wrap
from typing import Any

import matplotlib
from matplotlib.figure import Figure

from .tables import bench_cases, caption

matplotlib.use("Agg")
_COLORS = ("#1b6ca8", "#8fc1e3", "#0b3c5d")


def draw(result: dict[str, Any], folder: Path) -> list[str]:
    """gpu_bench.png and gpu_linear.png, where there is something to show; returns their names."""
    data = {entry["stage"]: entry["data"] for entry in result["stages"]}
    makers = {"gpu_bench.png": _shares, "gpu_linear.png": _budgets}
    made = []
    for name, maker in makers.items():
        if (figure := maker(data)) is None:
            continue
        width = int(figure.get_size_inches()[0] * 14)  # characters
        figure.suptitle("\n".join(wrap(caption(result), width)), x=0.01, ha="left", fontsize=8)
        folder.mkdir(parents=True, exist_ok=True)
        figure.savefig(folder / name, dpi=110)
        made.append(name)
    return made


def _shares(data: dict[str, Any]) -> Figure | None:
    """How near each case is to its floor, a bar for each backend, and torch's own."""
    cases = bench_cases(data)
    if not cases:
        return None
    figure = Figure(figsize=(11, 1.5 + 0.5 * len(cases)), layout="constrained")
    axes = figure.subplots()
    labels = list(dict.fromkeys(label for case in cases for label in case["fastloss"].values()))
    bars = {f"fastloss, {label}": color for label, color in zip(labels, _COLORS, strict=False)} | {"torch": "#b0b0b0"}
    height = 0.8 / len(bars)
    for index, (name, color) in enumerate(bars.items()):
        found = [(row, share) for row, case in enumerate(cases) if (share := _share(case, name)) is not None]
        places = [row + (index - (len(bars) - 1) / 2) * height for row, _ in found]
        drawn = axes.barh(places, [share for _, share in found], height * 0.92, color=color, label=name)
        axes.bar_label(drawn, [f"{share:.2f}" for _, share in found], padding=3, fontsize=7)
    axes.set_yticks(range(len(cases)), [case["name"] for case in cases], fontsize=8)
    axes.invert_yaxis()
    axes.axvline(1, color="black", linewidth=0.8)
    axes.set_title("share of the floor: a copy of the logits, or the matmuls", loc="left", fontsize=10)
    axes.legend(frameon=False, fontsize=8, loc="lower right")
    return figure


def _share(case: dict[str, Any], name: str) -> float | None:
    keys = {f"fastloss, {label}": key for key, label in case["fastloss"].items()} | {"torch": "torch"}
    ms, floor = case["median_ms"].get(keys.get(name, "")), case["median_ms"].get("floor")
    return floor / ms if ms and floor else None


def _budgets(data: dict[str, Any]) -> Figure | None:
    """Time against peak memory, a panel for each shape."""
    shapes = {shape: found for shape, found in data.get("linear", {}).items() if found.get("alternatives")}
    if not shapes:
        return None
    figure = Figure(figsize=(6.5 * len(shapes), 5), layout="constrained")
    for axes, (shape, found) in zip(figure.subplots(1, len(shapes), squeeze=False)[0], shapes.items(), strict=True):
        colors = matplotlib.colormaps["tab20"].colors  # type: ignore[attr-defined]
        for color, (name, one) in zip(colors, found["alternatives"].items(), strict=False):
            if one.get("median_ms") is None:
                continue
            if name == "floor":
                axes.axhline(one["median_ms"], color="black", linewidth=0.8, linestyle=":")
                continue
            mib = max(1.0, one.get("peak_extra_bytes", 0) / 2**20)
            axes.plot([mib], [one["median_ms"]], "o" if name.startswith("fastloss") else "s", color=color, label=name)
        axes.set_xscale("log", base=2)
        axes.set_xlabel("MiB at the peak, beyond inputs and gradients")
        axes.set_ylabel("milliseconds, forward and backward (dotted: the matmuls)")
        axes.set_ylim(bottom=0)
        axes.set_title(f"N x H x V = {shape}, {found['dtype']}", loc="left", fontsize=10)
        axes.legend(frameon=False, fontsize=7)
    return figure
