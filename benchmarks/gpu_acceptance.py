"""What a first hour on a GPU should tell, by one command, offline: build, self-test, tests, benchmarks, sanitizer,
profiler. Each stage is a process with a time limit of its own; what it finds is in one JSON and one log at once.

    python benchmarks/gpu_acceptance.py [--stages A,B] [--minutes 9] [--resume] [--out DIR] [--wheels DIR] [--fake]

Exit status: 0 if every stage that ran is ok, 1 if one is not, 2 if there is no device or the arguments are wrong.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).resolve().parent))

_RESERVE = 5  # seconds, for writing and printing at the end
_FAKE_LIMIT = 1800  # seconds for each stage of a dry run: a slow machine is no reason to fail it
_SAME = ("device", "capability", "python", "torch_cuda")  # what a resumed run must share with the first
_SAME_PACKAGES = ("torch", "triton")


class Refused(Exception):
    """There is nothing to run, or it must not be; the message says why."""


def parser() -> argparse.ArgumentParser:
    from acceptance.stages import STAGES

    stages = "\n".join(f"  {stage.name:<10} {stage.about} (at most {stage.limit} s)" for stage in STAGES)
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=f"stages:\n{stages}", formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--stages", metavar="A,B", help="only these, in the order of the list below")
    parser.add_argument("--minutes", type=float, metavar="TOTAL", help="end in time: cut or skip what does not fit")
    parser.add_argument("--resume", action="store_true", help="keep what DIR/result.json has, run the rest")
    parser.add_argument(
        "--out", type=Path, default=Path("out/gpu"), metavar="DIR", help="result.json, log.txt (%(default)s)"
    )
    parser.add_argument("--wheels", type=Path, metavar="DIR", help="wheels of what is not installed here")
    parser.add_argument(
        "--limit", action="append", default=[], metavar="STAGE=SECONDS", help="another limit of a stage"
    )
    parser.add_argument("--fake", action="store_true", help="a dry run without a GPU, on the fake device of the tests")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    if "--fake" in (sys.argv[1:] if argv is None else argv):
        os.environ["FASTLOSS_FAKE_GPU"] = "1"  # before anything is imported that asks
    arguments = parser().parse_args(argv)
    signal.signal(signal.SIGTERM, _ended)
    try:
        return Run(arguments).all()
    except Refused as why:
        print(why, file=sys.stderr)
        return 2


def _ended(*_: Any) -> None:
    raise KeyboardInterrupt


class Run:
    def __init__(self, arguments: argparse.Namespace) -> None:
        from acceptance import places
        from acceptance.stages import BY_NAME, STAGES

        self.start = time.monotonic()
        self.end = None if arguments.minutes is None else self.start + arguments.minutes * 60
        self.out, self.resume, self.fake = arguments.out.resolve(), arguments.resume, places.FAKE
        names = [stage.name for stage in STAGES] if arguments.stages is None else arguments.stages.split(",")
        limits = dict(_limit(text) for text in arguments.limit)
        if unknown := [name for name in (*names, *limits) if name not in BY_NAME]:
            raise Refused(f"no such stage: {', '.join(unknown)}; there are {', '.join(BY_NAME)}")
        self.stages = [stage for stage in STAGES if stage.name in names]
        self.limits = {stage.name: _FAKE_LIMIT if self.fake else stage.limit for stage in STAGES} | limits
        self.out.mkdir(parents=True, exist_ok=True)
        self.log = self.out / "log.txt"
        self.refused_wheels = self._wheels(arguments.wheels)
        self.results = self._open()

    def _wheels(self, folder: Path | None) -> dict[str, str]:
        from acceptance import wheels

        refused = {} if folder is None else wheels.install(folder)
        for name, reason in refused.items():
            self._say(f"not installed: {name}: {reason}")
        return refused

    def _open(self) -> Any:
        """The file of results, with the machine's facts in it before anything runs."""
        from acceptance import places
        from acceptance.results import Results, Unreadable

        machine = self._machine()
        if not any(stage.name == "build" for stage in self.stages) and not (self.fake or places.is_up_to_date()):
            raise Refused("fastloss is not built here from these sources: add build to --stages")
        path = self.out / "result.json"
        if path.exists() and self.resume:
            try:
                results = Results.read(path)
            except Unreadable as why:
                raise Refused(f"--resume: {why}") from None
            _check_same(results, machine, self.fake)
            return results
        if path.exists():  # of another run: kept
            path.replace(
                path.with_name(f"result-{time.strftime('%Y%m%d-%H%M%S', time.localtime(path.stat().st_mtime))}.json")
            )
        results = Results.new(path, self.fake, machine)
        results.write()
        return results

    def _machine(self) -> dict[str, Any]:
        from acceptance import places

        command = [sys.executable, "-m", "acceptance.facts"]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=120, env=places.environment())
        except subprocess.TimeoutExpired:
            raise Refused("torch did not say within two minutes what device there is") from None
        if done.returncode:
            raise Refused(f"the machine could not be described:\n{done.stderr[-2000:]}")
        machine = json.loads(done.stdout.splitlines()[-1])
        if machine["device"] is None:
            raise Refused("torch sees no CUDA device here; --fake makes a dry run")
        return machine | {"date": time.strftime("%Y-%m-%dT%H:%M:%S%z"), "wheels_refused": self.refused_wheels}

    def all(self) -> int:
        """Every stage; returns the exit status."""
        ran = []
        for stage in self.stages:
            entry = self.results.entry(stage.name)
            if self.resume and entry and entry["status"] == "ok" and not self._must_build(stage.name):
                self._say(f"{stage.name}: ok already")
                continue
            ran.append(self._one(stage))
        self._say(f"{self.results.path}, {self.log}")
        return 0 if all(status in ("ok", "skipped") for status in ran) else 1

    def _must_build(self, name: str) -> bool:
        """A build is no result: another machine, or other sources, need theirs."""
        from acceptance import places

        return name == "build" and not places.is_up_to_date()

    def _one(self, stage: Any) -> str:
        limit = self.limits[stage.name]
        if self.end is not None:
            left = self.end - time.monotonic() - _RESERVE
            if left < min(stage.least, limit):
                reason = f"needs at least {stage.least} s, {max(0, left):.0f} s of --minutes are left"
                self.results.begin(stage.name, "skipped", reason)
                self._say(f"{stage.name}: skipped: {reason}")
                return "skipped"
            limit = min(limit, left)
        self.results.begin(stage.name)
        self._say(f"{stage.name}: {time.strftime('%H:%M:%S')}, at most {limit:.0f} s")
        before = self.log.stat().st_size
        try:
            ended = self._process(stage.name, limit)
        except KeyboardInterrupt:
            self.results.end(stage.name, "failed", "interrupted", 0)
            raise
        self.results.end(stage.name, *ended)
        self._clocks(stage.name)
        return self._summary(stage.name, before)

    def _process(self, name: str, limit: float) -> Any:
        from acceptance import places, process

        environment = places.environment() | {
            "FASTLOSS_GPU_RESULT_FILE": str(self.results.path),
            "FASTLOSS_GPU_END": str(time.time() + limit),
        }
        return process.run(
            stage_command(name), limit, self.log, environment, lambda key, value: self.results.put(name, key, value)
        )

    def _clocks(self, name: str) -> None:
        """At the end of the stage: a card that is throttled explains its times."""
        from acceptance import facts

        if clocks := facts.clocks():
            self.results.entry(name)["clocks"] = clocks
            self.results.write()

    def _summary(self, name: str, log_before: int) -> str:
        """Says how the stage ended, with the end of its log if it did not end well; returns its status."""
        entry = self.results.entry(name)
        reason = f": {entry['reason']}" if entry["reason"] else ""
        self._say(f"{name}: {entry['status']}{reason}, {entry['seconds']:.0f} s, {len(entry['data'])} results")
        if entry["status"] in ("failed", "timeout"):
            with self.log.open("rb") as log:
                log.seek(log_before)
                lines = log.read().decode(errors="replace").splitlines()
            print("\n".join(f"  | {line[:200]}" for line in lines[-25:-1]), flush=True)
        return entry["status"]

    def _say(self, text: str) -> None:
        """On the terminal and in the log."""
        print(text, flush=True)
        with self.log.open("a") as log:
            log.write(f"=== {text}\n")


def stage_command(name: str) -> list[str]:
    return [sys.executable, "-m", "acceptance.stages", name]


def _limit(text: str) -> tuple[str, int]:
    name, _, seconds = text.partition("=")
    if not seconds.isdigit():
        raise Refused(f"--limit takes STAGE=SECONDS, got {text}")
    return name, int(seconds)


def _check_same(results: Any, machine: dict[str, Any], fake: bool) -> None:
    """Numbers of two devices, or of two versions, are not mixed."""
    pairs = [(name, results.content["machine"].get(name), machine.get(name)) for name in _SAME]
    versions = results.content["machine"].get("packages", {}), machine["packages"]
    pairs += [(name, *(of.get(name) for of in versions)) for name in _SAME_PACKAGES]
    if results.content["fake"] != fake:
        raise Refused(f"--resume: {results.path} is of a {'dry run' if results.content['fake'] else 'real device'}")
    if differ := [f"{name} was {before}, is {after}" for name, before, after in pairs if before != after]:
        raise Refused(f"--resume: {results.path} is of another machine: {'; '.join(differ)}")


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(1)
