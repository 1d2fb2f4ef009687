"""The one JSON of a run, written whole after each result, so that a run that is cut off keeps what it had."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

FORMAT = 1
_PIPE = "FASTLOSS_GPU_RESULTS"  # the file descriptor that a stage writes its results to


class Unreadable(ValueError):
    """A file that is no result of this script; the message says so."""


class Results:
    """{"format", "fake", "machine", "stages": [{"stage", "started", "seconds", "status", "reason", "data"}]}. A status
    is ok, failed, timeout, skipped, or running: of a stage that was cut off with the whole run."""

    def __init__(self, path: Path, content: dict[str, Any]) -> None:
        self.path, self.content = path, content

    @classmethod
    def new(cls, path: Path, fake: bool, machine: dict[str, Any]) -> Results:
        return cls(path, {"format": FORMAT, "fake": fake, "machine": machine, "stages": []})

    @classmethod
    def read(cls, path: Path) -> Results:
        try:
            content = json.loads(path.read_text())
            if content["format"] != FORMAT:
                raise ValueError(f"format {content['format']}, not {FORMAT}")
            if missing := {"fake", "machine", "stages"} - content.keys():
                raise ValueError(f"it has no {', '.join(sorted(missing))}")
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise Unreadable(f"{path} is no result of gpu_acceptance.py: {type(error).__name__}: {error}") from None
        return cls(path, content)

    def entry(self, stage: str) -> dict[str, Any] | None:
        return next((entry for entry in self.content["stages"] if entry["stage"] == stage), None)

    def begin(self, stage: str, status: str = "running", reason: str = "") -> None:
        """A new entry of the stage, in the place of an older one, whose results it takes over but for failed ones."""
        before = self.entry(stage)
        kept = {key: value for key, value in (before or {"data": {}})["data"].items() if not _failed(value)}
        entry = {"stage": stage, "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"), "seconds": 0.0}
        entry |= {"status": status, "reason": reason, "data": kept}
        if before is None:
            self.content["stages"].append(entry)
        else:
            before.clear()
            before.update(entry)
        self.write()

    def put(self, stage: str, key: str, value: Any) -> None:
        """One result."""
        entry = self.entry(stage)
        assert entry is not None
        entry["data"][key] = value
        self.write()

    def end(self, stage: str, status: str, reason: str, seconds: float) -> None:
        """How the stage ended. One that ended well and has failed results has failed."""
        entry = self.entry(stage)
        assert entry is not None
        failed = [key for key, value in entry["data"].items() if _failed(value)]
        if failed and status == "ok":
            status, reason = "failed", f"{len(failed)} failed: {', '.join(failed[:5])}{', ...' if failed[5:] else ''}"
        entry.update(status=status, reason=reason, seconds=round(seconds, 1))
        self.write()

    def write(self) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        part = self.path.with_name(self.path.name + ".part")
        part.write_text(json.dumps(self.content, indent=1, default=str) + "\n")
        part.replace(self.path)


def _failed(value: Any) -> bool:
    return isinstance(value, dict) and value.get("ok") is False


# ---- what the processes of the stages call ---------------------------------------------------------------------------


class Skip(Exception):
    """The stage cannot run here; the message says why. That is no failure."""


def emit(key: str, value: Any) -> None:
    """Hands a result over, at once. `value["ok"]` says of a dict whether it is one that a resumed run keeps."""
    _send({"key": key, "value": value})


def emit_skip(reason: str) -> None:
    _send({"skip": reason})


def _send(message: dict[str, Any]) -> None:
    line = (json.dumps(message, default=str) + "\n").encode()
    if _PIPE not in os.environ:  # a stage that was started by hand
        print(line.decode(), end="", flush=True)
        return
    while line:
        line = line[os.write(int(os.environ[_PIPE]), line) :]


def pipe_environment(descriptor: int) -> dict[str, str]:
    """Of a process whose results are read from the other end."""
    return {_PIPE: str(descriptor)}


def pipe_descriptors() -> tuple[int, ...]:
    """What a stage hands on to processes that it starts, if they emit too."""
    return (int(os.environ[_PIPE]),) if _PIPE in os.environ else ()


def already(stage: str) -> dict[str, Any]:
    """The stage's results of a run that is resumed, as the file named in the environment has them."""
    path = os.environ.get("FASTLOSS_GPU_RESULT_FILE")
    if not path or not Path(path).exists():
        return {}
    entry = Results.read(Path(path)).entry(stage)
    return entry["data"] if entry else {}


def is_done(value: Any) -> bool:
    return isinstance(value, dict) and value.get("ok") is True
