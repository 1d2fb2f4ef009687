"""The tables and pictures of docs/gpu.md, from a result of benchmarks/gpu_acceptance.py.

    python benchmarks/gpu_report.py RESULT.json             into docs/gpu.md, between its markers, and docs/gpu_*.png
    python benchmarks/gpu_report.py RESULT.json --out DIR   into DIR/gpu.md and DIR/gpu_*.png
    python benchmarks/gpu_report.py RESULT.json --stdout    the tables alone, printed

A dry run measures nothing: its result is refused for docs/gpu.md.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parent))

from acceptance.results import Results, Unreadable
from acceptance.tables import markdown

DOCS = Path(__file__).resolve().parents[1] / "docs"
BEGIN, END = "<!-- measured: begin (benchmarks/gpu_report.py) -->", "<!-- measured: end -->"


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("result", type=Path, metavar="RESULT.json")
    where = parser.add_mutually_exclusive_group()
    where.add_argument("--out", type=Path, metavar="DIR", help="instead of docs/")
    where.add_argument("--stdout", action="store_true", help="print the tables, write nothing")
    arguments = parser.parse_args(argv)
    try:
        result = Results.read(arguments.result).content
    except Unreadable as why:
        print(why, file=sys.stderr)
        return 2
    if arguments.stdout:
        print(markdown(result))
        return 0
    if arguments.out is None and result["fake"]:
        print(f"{arguments.result} is of a dry run: nothing of it goes into docs/gpu.md (--out DIR)", file=sys.stderr)
        return 1
    folder = arguments.out or DOCS
    page = folder / "gpu.md"
    before = page.read_text() if page.exists() else f"{BEGIN}\n{END}\n"
    if before.count(BEGIN) != 1 or before.count(END) != 1:
        print(f"{page} has not one pair of the markers {BEGIN} and {END}", file=sys.stderr)
        return 1
    from acceptance.plots import draw

    folder.mkdir(parents=True, exist_ok=True)
    pictures = draw(result, folder)
    head, _, rest = before.partition(BEGIN)
    page.write_text(f"{head}{BEGIN}\n\n{markdown(result, pictures)}\n\n{END}{rest.partition(END)[2]}")
    print("\n".join(str(folder / name) for name in ("gpu.md", *pictures)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
