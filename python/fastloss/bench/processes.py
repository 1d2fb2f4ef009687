"""Other interpreters, for what cannot be measured in this one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import Any

import torch


def child(work: str, environment: dict[str, str] | None = None, **arguments: Any) -> Any:
    """What a function of child.py returns, over there."""
    request = json.dumps({"work": work, "threads": torch.get_num_threads(), **arguments})
    return json.loads(run(["-m", "fastloss.bench.child", request], environment))


def run(arguments: list[str], environment: dict[str, str] | None = None) -> str:
    """The last line that another interpreter prints."""
    command = [sys.executable, *arguments]
    done = subprocess.run(command, env=os.environ | (environment or {}), capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} failed:\n{done.stderr}")
    return done.stdout.splitlines()[-1]
