"""What the two runs showed: a table on the terminal, a picture and the numbers behind both."""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable
from pathlib import Path
from statistics import fmean, median

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator
from rich.console import Console
from rich.table import Table

from .runs import LOSSES, Run

COLORS = {"torch": "#e8833a", "fastloss": "#2266bb"}
NAMES = {"torch": "F.cross_entropy", "fastloss": "fastloss.cross_entropy"}
FINAL = 20  # steps whose mean is the final training loss: a single batch's is noisy


def show(runs: dict[str, Run], options: argparse.Namespace) -> None:
    """Prints the table and writes report.png and report.json."""
    summary = {loss: summarize(run) for loss, run in runs.items()}
    difference = curve_difference(runs)
    _print_table(summary, difference)
    _plot(runs, summary, options)
    settings = {name: str(value) if isinstance(value, Path) else value for name, value in vars(options).items()}
    report = {
        "options": settings,
        "largest_difference": difference,
        "summary": summary,
        "runs": {loss: run._asdict() for loss, run in runs.items()},
    }
    (options.out / "report.json").write_text(json.dumps(report, indent=1) + "\n")
    Console(highlight=False, soft_wrap=True).print(f"Written to {options.out}: report.png, report.json, tokenizer.json")


def summarize(run: Run) -> dict[str, float]:
    """The table's numbers of one run. Times are medians, so that the first, cold steps do not count."""
    return {
        "train_loss": fmean(run.loss[-FINAL:]),
        "validation_loss": run.validation_loss,
        "perplexity": math.exp(run.validation_loss),
        "loss_ms": median(run.loss_ms),
        "step_ms": median(run.step_ms),
        "total_s": sum(run.step_ms) / 1e3,
        "peak_mb": run.peak_bytes / 1e6,
    }


def curve_difference(runs: dict[str, Run]) -> float:
    """The largest difference of the two training losses at any step."""
    return max(abs(a - b) for a, b in zip(*(runs[loss].loss for loss in LOSSES), strict=True))


def _print_table(summary: dict[str, dict[str, float]], difference: float) -> None:
    table = Table(title="One model, one seed, two losses", title_style="bold")
    table.add_column()
    for loss in LOSSES:
        table.add_column(loss, justify="right", style=COLORS[loss])
    table.add_column("fastloss is", justify="right", style="bold")

    def row(label: str, key: str, form: str, verdict: Callable[[float, float], str] | None = None) -> None:
        torch, fastloss = (summary[loss][key] for loss in LOSSES)
        table.add_row(label, f"{torch:{form}}", f"{fastloss:{form}}", verdict(torch, fastloss) if verdict else "")

    row(f"Training loss, last {FINAL} steps", "train_loss", ".4f")
    row("Validation loss", "validation_loss", ".4f")
    row("Validation perplexity", "perplexity", ",.1f")
    table.add_row("Largest gap of the two curves", "", "", f"{difference:.1e} nats", end_section=True)
    row("Loss layer, ms per step (median)", "loss_ms", ",.1f", _speed)
    row("Whole step, ms (median)", "step_ms", ",.1f", _speed)
    row("All steps, s", "total_s", ",.1f", _speed)
    table.add_section()
    row("Peak memory of the process, MB", "peak_mb", ",.0f", _size)
    Console().print(table)


def _speed(torch: float, fastloss: float) -> str:
    return f"{torch / fastloss:.2f}x faster" if torch >= fastloss else f"{fastloss / torch:.2f}x slower"


def _size(torch: float, fastloss: float) -> str:
    return f"{abs(fastloss - torch):,.0f} MB {'less' if fastloss <= torch else 'more'}"


def _plot(runs: dict[str, Run], summary: dict[str, dict[str, float]], options: argparse.Namespace) -> None:
    style = {"axes.spines.top": False, "axes.spines.right": False, "axes.titlelocation": "left", "font.size": 10}
    with plt.rc_context(style):
        figure = plt.figure(figsize=(11, 6.2), layout="constrained")
        figure.get_layout_engine().set(w_pad=0.15, h_pad=0.1)
        figure.suptitle(
            f"One model trained twice: {options.steps} steps of {options.batch} x {options.context} tokens, "
            f"{options.threads} CPU threads",
            fontsize=12,
        )
        grid = figure.add_gridspec(6, 2, width_ratios=(1.5, 1))
        curves = figure.add_subplot(grid[:4, 0])
        _draw_curves(curves, runs)
        _draw_difference(figure.add_subplot(grid[4:, 0], sharex=curves), runs)
        panels = [
            ("loss_ms", "Loss layer, ms per step", ",.0f"),
            ("step_ms", "Whole training step, ms", ",.0f"),
            ("peak_mb", "Peak memory, MB", ",.0f"),
        ]
        for index, (key, title, form) in enumerate(panels):
            axes = figure.add_subplot(grid[2 * index : 2 * index + 2, 1])
            _draw_bars(axes, title, {loss: summary[loss][key] for loss in LOSSES}, form)
        figure.savefig(options.out / "report.png", dpi=150)
        plt.close(figure)


def _draw_curves(axes: Axes, runs: dict[str, Run]) -> None:
    """torch's curve wide and pale, fastloss's thin on top of it: both can be seen where they are one."""
    for loss, width, alpha in zip(LOSSES, (5.0, 1.2), (0.55, 1.0), strict=True):
        steps = range(1, len(runs[loss].loss) + 1)
        axes.plot(steps, runs[loss].loss, color=COLORS[loss], linewidth=width, alpha=alpha, label=NAMES[loss])
    axes.set_title("Training loss, same seed", fontweight="bold")
    axes.set_ylabel("nats per token")
    axes.tick_params(labelbottom=False)
    axes.grid(alpha=0.25)
    axes.legend(frameon=False)


def _draw_difference(axes: Axes, runs: dict[str, Run]) -> None:
    torch, fastloss = (runs[loss].loss for loss in LOSSES)
    differences = [abs(a - b) for a, b in zip(torch, fastloss, strict=True)]
    axes.plot(range(1, len(differences) + 1), differences, color="#555555", linewidth=1)
    axes.set_title(f"Difference of the two curves, at most {max(differences):.1e}")
    axes.set_ylim(0, max(*differences, 1e-6) * 1.15)
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:.1e}" if value else "0")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_xlabel("step")
    axes.set_ylabel("nats")
    axes.grid(alpha=0.25)


def _draw_bars(axes: Axes, title: str, values: dict[str, float], form: str) -> None:
    bars = axes.barh(list(values), list(values.values()), color=[COLORS[loss] for loss in values], height=0.62)
    axes.bar_label(bars, labels=[f"{value:{form}}" for value in values.values()], padding=5, fontweight="bold")
    axes.invert_yaxis()
    axes.set_xlim(0, 1.18 * max(values.values()))
    axes.set_title(title, fontweight="bold")
    axes.tick_params(left=False, bottom=False, labelbottom=False)
    axes.spines[["bottom", "left"]].set_visible(False)
