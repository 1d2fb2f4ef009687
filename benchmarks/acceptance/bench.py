"""Stage `bench`: the table of `python -m fastloss bench`, whose reports are handed over after each case."""

from __future__ import annotations

import json
import shutil
import subprocess
import time
from pathlib import Path
from typing import NamedTuple

from .places import FAKE, ROOT, build_folder, fastloss_command
from .results import already, emit


class Part(NamedTuple):
    """A run of the benchmark, in a folder of its own: torch.compile takes as long as all the rest, and runs for few."""

    name: str
    only: str
    compiled: bool


PARTS = [
    Part("plain bfloat16", r"plain\W+bfloat16", True),
    Part("table", r"^(?!.*(plain\W+bfloat16|shared vocabulary|import time))", False),
]
_FAKE_PARTS = [
    Part("plain bfloat16", r"plain\W+bfloat16", False),
    Part("table", "^linear|label smoothing|^error", False),
]


def bench() -> int:
    done = already("bench")
    failed = 0
    for part in _FAKE_PARTS if FAKE else PARTS:
        folder = build_folder() / "bench" / part.name.replace(" ", "-")
        shutil.rmtree(folder, ignore_errors=True)
        if part.name in done:  # what a resumed run has, from wherever it was measured
            folder.mkdir(parents=True)
            (folder / "report.json").write_text(json.dumps(done[part.name]))
        failed |= _run(part, folder)
    return failed


def command(part: Part, folder: Path) -> list[str]:
    options = [*(["--quick"] if FAKE else []), *([] if part.compiled else ["--no-compile"])]
    chosen = ["--only", part.only, "--resume", "--out", str(folder)]
    return [*fastloss_command(), "bench", "--device", "cuda", *chosen, *options]


def _run(part: Part, folder: Path) -> int:
    process = subprocess.Popen(command(part, folder), cwd=ROOT)
    path, seen = folder / "report.json", 0.0
    while True:
        status = process.poll()
        if path.exists() and path.stat().st_mtime != seen:
            seen = path.stat().st_mtime
            emit(part.name, json.loads(path.read_text()))
        if status is not None:
            break
        time.sleep(0.5)
    report = json.loads(path.read_text()) if path.exists() else {"skipped": {}}
    emit(f"{part.name}: all measured", {"ok": status == 0, "status": status, "not_measured": report["skipped"]})
    return int(status != 0)
