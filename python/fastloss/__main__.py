"""python -m fastloss: `doctor` says what is built and which backend runs a call, `bench` measures it here."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"expected a number of at least 1, got {text}")
    return value


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m fastloss", description=__doc__)
    commands = parser.add_subparsers(dest="command", metavar="COMMAND")

    doctor = commands.add_parser("doctor", help="what is built, what is chosen and why, and a self-test")
    doctor.add_argument("--json", action="store_true", help="the same as JSON")

    bench = commands.add_parser("bench", help="measure the losses beside torch's, in one interleaved run")
    bench.add_argument("--quick", action="store_true", help="small shapes, few rounds: a smoke test, no measurement")
    bench.add_argument("--out", default="out/bench", metavar="DIR", help="for report.json and report.png (%(default)s)")
    bench.add_argument("--threads", type=_positive, metavar="N", help="threads (default: torch.get_num_threads())")
    bench.add_argument("--device", default="cpu", help="cpu, cuda, cuda:1, xpu: where to measure (%(default)s)")
    bench.add_argument("--only", metavar="REGEX", help="measure what has it in its name: cases, and records as 'error'")
    bench.add_argument("--resume", action="store_true", help="keep what report.json in --out has, measure the rest")
    bench.add_argument("--no-compile", action="store_true", help="leave out torch.compile, which needs a C++ compiler")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit status: 0, or 1 where the self-test fails or something is missing."""
    parser = build_parser()
    arguments = parser.parse_args(argv)
    if arguments.command == "doctor":
        from . import doctor

        return doctor.main(as_json=arguments.json)
    if arguments.command == "bench":
        from . import bench

        a = arguments
        return bench.main(a.quick, a.out, a.threads, not a.no_compile, a.device, a.only, a.resume)
    parser.print_help()
    return 0


if __name__ == "__main__":
    sys.exit(main())
