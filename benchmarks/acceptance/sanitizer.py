"""Stage `sanitizer`: compute-sanitizer's four tools over one small call of each kernel family."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from typing import Any

from .places import ROOT
from .results import Skip, already, emit, is_done
from .sanitizer_output import parse
from .target import backends

TOOLS = ("memcheck", "racecheck", "synccheck", "initcheck")
_PATIENCE = 150  # seconds for one tool over one backend
_OWN = {"memcheck": ["--leak-check", "no"]}


def sanitizer() -> int:
    if shutil.which("compute-sanitizer") is None:
        raise Skip("compute-sanitizer is not on the PATH, nor where CUDA puts it")
    done, status = already("sanitizer"), 0
    for backend in backends():
        for tool in TOOLS:
            name = f"{backend}: {tool}"
            if not is_done(done.get(name)):
                found = _run(tool, backend)
                emit(name, found)
                status |= not found["ok"]
    return status


def command(tool: str, backend: str) -> list[str]:
    # Errors of the API are what libraries get when they ask whether a driver knows a newer function.
    options = ["--tool", tool, "--report-api-errors", "no", "--print-limit", "20", *_OWN.get(tool, [])]
    return ["compute-sanitizer", *options, sys.executable, "-m", "acceptance.calls", "small", backend]


def _run(tool: str, backend: str) -> dict[str, Any]:
    # Each tensor an allocation of its own: what torch's allocator would hand out beside it is out of bounds, too.
    environment = os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    start = time.monotonic()
    try:
        done = subprocess.run(
            command(tool, backend), cwd=ROOT, env=environment, capture_output=True, text=True, timeout=_PATIENCE
        )
    except subprocess.TimeoutExpired as late:
        text = late.stdout.decode(errors="replace") if isinstance(late.stdout, bytes) else late.stdout or ""
        print(text, flush=True)
        return {"ok": False, "error": f"took longer than {_PATIENCE} s", "reports": parse(text)["reports"]}
    print(done.stdout, done.stderr, flush=True)
    if "Device not supported" in done.stdout + done.stderr:
        raise Skip("compute-sanitizer says that the device is not supported")
    found = parse(done.stdout)
    found["ok"] = done.returncode == 0 and found["errors"] == 0
    if found["errors"] is None:
        found["error"] = f"it printed no summary; exit status {done.returncode}: {done.stderr.strip()[-300:]}"
    return found | {"status": done.returncode, "seconds": round(time.monotonic() - start, 1)}
