"""A stage as a process with a time limit, whose results are read as it says them."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from .places import ROOT
from .results import pipe_environment

_GRACE = 3.0  # seconds between asking a process to end and ending it


class Ended(NamedTuple):
    """How a stage's process ended: ok, failed, timeout or skipped, and why."""

    status: str
    reason: str
    seconds: float


def run(
    command: Sequence[str],
    limit: float,
    log: Path,
    environment: dict[str, str],
    on_result: Callable[[str, Any], None],
) -> Ended:
    """Runs the command at most `limit` seconds, in a process group of its own, which is ended whatever happens. What it
    prints goes to the log, what it emits to `on_result`."""
    reads, writes = os.pipe()
    skipped: list[str] = []
    start = time.monotonic()
    with log.open("ab") as output:
        process = subprocess.Popen(
            list(command),
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            cwd=ROOT,
            env=environment | pipe_environment(writes),
            pass_fds=(writes,),
            **_own_group(),
        )
        os.close(writes)
        reader = threading.Thread(target=_read, args=(reads, on_result, skipped), daemon=True)
        reader.start()
        timed_out = False
        try:
            process.wait(limit)
        except subprocess.TimeoutExpired:
            timed_out = True
        finally:  # also when this process is told to end
            _end_group(process)
            reader.join(10)
    seconds = time.monotonic() - start
    if timed_out:
        return Ended("timeout", f"cut at its limit of {limit:.0f} s", seconds)
    if process.returncode:
        return Ended("failed", _exit_reason(process.returncode), seconds)
    if skipped:
        return Ended("skipped", skipped[0], seconds)
    return Ended("ok", "", seconds)


def _own_group() -> dict[str, Any]:
    """Not a session of its own where Python can do without: a machine that is given back ends only what is in ours."""
    return {"process_group": 0} if sys.version_info >= (3, 11) else {"start_new_session": True}


def _exit_reason(status: int) -> str:
    if status > 0:
        return f"exit status {status}"
    return f"ended by {signal.Signals(-status).name}"


def _end_group(process: subprocess.Popen[bytes]) -> None:
    """The process and whatever it started: asked first, so that it can end its own children."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGTERM)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(_GRACE)
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _read(descriptor: int, on_result: Callable[[str, Any], None], skipped: list[str]) -> None:
    with os.fdopen(descriptor, encoding="utf-8", errors="replace") as lines:
        for line in lines:
            try:
                message = json.loads(line)
            except ValueError:  # the last line of a process that was ended while it wrote
                continue
            if "skip" in message:
                skipped.append(message["skip"])
            else:
                on_result(message["key"], message["value"])
