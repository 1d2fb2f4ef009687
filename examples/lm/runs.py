"""The two runs side by side: a fresh process each, which take turns."""

from __future__ import annotations

import argparse
import multiprocessing
import re
import resource
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple

from tqdm import tqdm

LOSSES = ("torch", "fastloss")
TURN = 5  # steps: long enough to warm up after the other's turn, short against the moods of a shared machine


class Run(NamedTuple):
    """What one run gave: each step's loss, milliseconds of the loss layer and of the whole step; and its outcome."""

    loss: list[float]
    loss_ms: list[float]
    step_ms: list[float]
    validation_loss: float
    peak_bytes: int


def side_by_side(training: Callable[..., Any], corpus: Path, options: argparse.Namespace) -> dict[str, Run]:
    """Trains with each loss and returns its run. `training(loss, corpus, options)` must be importable by its name."""
    with _processes(training, corpus, options) as ask:
        steps: dict[str, list[Any]] = {loss: [] for loss in LOSSES}
        with tqdm(total=options.steps * len(LOSSES), desc="Training", unit="step") as bar:
            for turn, first in enumerate(range(0, options.steps, TURN)):
                # A, B, B, A: neither is always the one that comes second.
                for loss in LOSSES if turn % 2 == 0 else LOSSES[::-1]:
                    for _ in range(min(TURN, options.steps - first)):
                        steps[loss].append(ask(loss, "step"))
                        bar.update()
                    bar.set_postfix({name: f"{of[-1].loss:.3f}" for name, of in steps.items() if of}, refresh=False)
        runs = {}
        for loss in LOSSES:
            peak = ask(loss, "peak_memory")  # before the validation: it is the training's memory
            runs[loss] = Run(*map(list, zip(*steps[loss], strict=True)), ask(loss, "validate"), peak)
        return runs


@contextmanager
def _processes(
    training: Callable[..., Any], corpus: Path, options: argparse.Namespace
) -> Iterator[Callable[[str, str], Any]]:
    """Starts a process for each loss; yields `ask(loss, request)`, which returns its answer."""
    spawn = multiprocessing.get_context("spawn")  # a new interpreter: nothing of this one's memory
    pipes, processes = {}, {}
    for loss in LOSSES:
        pipes[loss], theirs = spawn.Pipe()
        processes[loss] = spawn.Process(target=_serve, args=(theirs, training, loss, corpus, options), daemon=True)
        processes[loss].start()
        theirs.close()

    def ask(loss: str, request: str) -> Any:
        try:
            pipes[loss].send(request)
            return pipes[loss].recv()
        except (EOFError, ConnectionError):
            processes[loss].join()
            code = processes[loss].exitcode
            advice = " It was killed, mostly for want of memory: try a smaller --batch." if code == -9 else ""
            raise SystemExit(f"train_lm.py: the run with {loss} ended early (exit code {code}).{advice}") from None

    try:
        yield ask
    finally:
        for process in processes.values():
            process.terminate()
            process.join()


def _serve(requests: Connection, training: Callable[..., Any], *arguments: Any) -> None:
    """The life of a run's process: it answers requests, each the name of a method."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle
    run = training(*arguments)
    with suppress(EOFError, ConnectionError):  # the parent was ended from outside: nobody is left to tell
        while True:
            request = requests.recv()
            requests.send(peak_memory() if request == "peak_memory" else getattr(run, request)())


def peak_memory() -> int:
    """The most bytes that this process has had in memory."""
    try:
        # First choice: Linux's ru_maxrss starts from that of the process which started this one.
        if found := re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text()):
            return 1024 * int(found[1])
    except OSError:
        pass
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak
