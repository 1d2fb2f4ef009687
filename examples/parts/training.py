"""Options, the loop with its bar, and what is shown at the end: the same in every example."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from tqdm import tqdm


def parser(description: str | None, steps: int, batch: int = 16) -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(
        description=(description or "").splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    made.add_argument("--steps", type=int, default=steps, help="training steps")
    made.add_argument("--batch", type=int, default=batch, help="examples per step")
    made.add_argument("--width", type=int, default=128, help="of the model's hidden states")
    made.add_argument("--vocab", type=int, default=4000, help="words that the model knows")
    made.add_argument("--seed", type=int, default=0, help="of the weights and the batches")
    made.add_argument("--threads", type=int, default=torch.get_num_threads(), help="CPU threads")
    made.add_argument("--json", type=Path, metavar="FILE", help="write the figures there")
    return made


def begin(made: argparse.ArgumentParser, argv: list[str] | None) -> argparse.Namespace:
    """The options, with the seed and the threads set."""
    options = made.parse_args(argv)
    torch.set_num_threads(options.threads)
    torch.manual_seed(options.seed)
    return options


def train(
    parameters: Iterable[nn.Parameter], loss_of: Callable[[int], Tensor], steps: int, rate: float = 2e-3, name: str = ""
) -> list[float]:
    """Steps of AdamW on `loss_of(step)`, the learning rate falling to a tenth; returns the losses."""
    trained = list(parameters)
    optimizer = torch.optim.AdamW(trained, rate, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.1, steps)
    losses = []
    with tqdm(range(steps), desc=name or "training", unit="step") as bar:
        for step in bar:
            optimizer.zero_grad()
            loss = loss_of(step)
            loss.backward()
            nn.utils.clip_grad_norm_(trained, 1.0)
            optimizer.step()
            schedule.step()
            losses.append(loss.item())
            bar.set_postfix(loss=f"{losses[-1]:.3f}", refresh=False)
    return losses


def finish(title: str, figures: dict[str, Any], options: argparse.Namespace) -> dict[str, Any]:
    """Shows what was measured, writes it to --json, and returns it."""
    table = Table(title=title, title_style="bold", show_header=False)
    for name, value in figures.items():
        table.add_row(name, f"{value:.4g}" if isinstance(value, float) else str(value))
    Console().print(table)
    if options.json:
        options.json.write_text(json.dumps(figures, indent=1) + "\n")
    return figures
