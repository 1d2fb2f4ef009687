"""What the GPU kernels execute and move for each logit, and what Liger-Kernel's do: counted by executing the compiled
kernels (PTX) on this machine's processor. Needs no GPU, measures no time.

    python studies/gpu_traffic.py [--quick] [--json FILE] [--liger FOLDER]
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from gpu_counts import FORWARD, MANY, PER_ROW, STEP, TWO, Count, Work, count, missing
from gpu_occupancy import GPUS, LATENCY, Occupancy, occupancies, spills
from rich.console import Console
from rich.table import Table

DTYPES = (torch.bfloat16, torch.float32)
ENGINES = ("cuda", "triton", "liger")
# Few rows are enough: each does the same. Where the kernels of a block for many rows weigh, there are more.
_SHAPES = (
    (STEP, 4, 32000), (STEP, 4, 50257), (STEP, 64, 3000), (STEP, 2, 128256),
    (TWO, 4, 32000), (TWO, 64, 3000),
    (PER_ROW, 4, 32000), (PER_ROW, 2, 128256), (PER_ROW, 64, 3000),
    (FORWARD, 4, 32000), (FORWARD, 2, 128256), (FORWARD, 64, 3000),
)  # fmt: skip
# The other losses: (name, V, whether rows are read once and stay on chip where they can).
_OTHERS = ("forward KL", "reverse KL", "JS", "top-k KL", "top-k KL, lumped tail")
_QUICK = ((STEP, 2, 32000), (STEP, 16, 3000), (TWO, 2, 32000))


def works(engine: str, quick: bool = False) -> list[Work]:
    """What is counted of an engine. Liger's has one way."""
    ways = (STEP, FORWARD) if engine == "liger" else (STEP, TWO, PER_ROW, FORWARD)
    shapes = [shape for shape in (_QUICK if quick else _SHAPES) if shape[0] in ways]
    table = [Work(engine, way, dtype, N, V) for way, N, V in shapes for dtype in DTYPES]
    if engine != "liger" and not quick:
        others = [(loss, V, dtype) for loss in _OTHERS for V in (32000, 128256) for dtype in DTYPES]
        table += [Work(engine, STEP, dtype, 2, V, loss=loss) for loss, V, dtype in others]
        if engine == "cuda":
            table += [Work(engine, STEP, torch.bfloat16, 2, 128256, "sm_90", loss) for loss in _OTHERS]
    if engine == "cuda" and not quick:  # where long rows lie in the shared memory of several blocks
        table += [Work(engine, STEP, dtype, 2, V, "sm_90") for V in (32000, 128256) for dtype in DTYPES]
    return table


def _marked(count: Count, name: str, form: str = "{:.3f}", value: float | None = None) -> str:
    text = form.format(count.figures[name] if value is None else value)
    if name not in count.targets():
        return text
    limit, met = count.targets()[name]
    return f"{text} [dim]{limit:g}[/] {'[green]✓[/]' if met else '[red]✗[/]'}"


def count_table(counts: Iterable[Count]) -> Table:
    table = Table(pad_edge=False)
    for name in ("engine", "arch", "loss", "way", "rows are", "dtype"):
        table.add_column(name, no_wrap=True)
    for name in ("V", "N", "instructions", "warp slots", "sectors", "reads", "unique", "sectors used", "wrong by"):
        table.add_column(name, justify="right", no_wrap=True)
    before = None
    for c in counts:
        w = c.work
        if before not in (None, (w.engine, w.way, w.arch, w.loss)):
            table.add_section()
        before = w.engine, w.way, w.arch, w.loss
        table.add_row(
            w.engine, w.arch, w.loss, w.way, "" if c.kind in ("liger", FORWARD) else c.kind, w.dtype_name,
            str(w.V), str(w.N),
            _marked(c, "instructions", "{:.2f}"), f"{c.figures['slots']:.2f}", _marked(c, "sectors"),
            _marked(c, "reads"), _marked(c, "unique"), _marked(c, "efficiency"), f"{c.error:.0e}",
        )  # fmt: skip
    return table


def occupancy_table(found: dict[tuple[Any, ...], list[Occupancy]]) -> Table:
    gpus = list(dict.fromkeys(o.gpu for group in found.values() for o in group))
    table = Table(pad_edge=False)
    for name in ("engine", "kernel", "dtype", "V"):
        table.add_column(name, no_wrap=True)
    for gpu in gpus:
        table.add_column(f"{gpu.name}: threads, registers, KiB;\nblocks x KiB in flight = have / need", no_wrap=True)
    for key, group in found.items():
        cells = {o.gpu: _occupancy_cell(o) for o in group}
        table.add_row(*map(str, key), *(cells.get(gpu, "-") for gpu in gpus))
    return table


def _occupancy_cell(o: Occupancy) -> str:
    mark = "[green]✓[/]" if o.have >= o.gpu.needed and not o.spilled else "[red]✗[/]"
    spilled = f", {o.spilled} bytes spilled" if o.spilled else ""
    return (
        f"{o.threads}, {o.registers}, {o.shared / 1024:.0f}{spilled}; "
        f"{o.blocks} x {o.in_flight / 1024:.0f} = {o.have / 1024:.0f} / {o.gpu.needed / 1024:.0f} {mark}"
    )


_NOTES = f"""\
instructions: PTX, by active threads, for each logit, of all launches of a step; kernels of one block are counted over
{MANY} rows. warp slots: idle lanes too. sectors: of 32 bytes, as warps request them, over 2 N V size (forward: N V
size; where the target is logits, one more). reads: those of loads over N V size. unique: if each kernel had an infinite
cache. sectors used: the share of their bytes that was asked for. Beside a figure stands its target. torch's kernels
around Liger's are not counted."""

_FLIGHT = f"""\
need: {LATENCY * 1e9:.0f} ns x bandwidth / multiprocessors. have: blocks on a multiprocessor x bytes that a block asks
for before it uses the first, so while all of them load; where only one block fits, it does not load while it computes.
Blocks: what 65536 registers, 2048 threads, and 164 or 228 KiB of shared memory leave room for."""


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="few shapes, no table of bytes in flight")
    parser.add_argument("--json", metavar="FILE", type=Path, help="write all counts there")
    parser.add_argument("--liger", metavar="FOLDER", help="an unpacked wheel of liger-kernel, if it is not installed")
    parser.add_argument("--engine", action="append", choices=ENGINES, help="only these")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit status: 1 where nothing could be counted."""
    arguments, start = _arguments(argv), time.perf_counter()
    if arguments.liger:
        sys.path.append(arguments.liger)
    torch.set_num_threads(1)  # for small tensors, waiting for a second thread takes longer than all the rest
    console = Console()
    console.width = max(console.width, 200)
    counts: list[Count] = []
    for engine in arguments.engine or ENGINES:
        if why := missing(engine):
            console.print(f"not counted: {engine}: {why}", highlight=False, markup=False)
            continue
        for work in works(engine, arguments.quick):
            print(f"counting {engine} {work.arch} {work.way} {work.dtype_name} {work.N}x{work.V}", file=sys.stderr)
            counts.append(count(work))
    if not counts:
        return 1
    console.print(count_table(counts))
    console.print(_NOTES, highlight=False)
    found = {} if arguments.quick else occupancies(counts)
    if found:
        console.print("\nbytes in flight for each multiprocessor")
        console.print(occupancy_table(found))
        console.print(_FLIGHT, highlight=False)
        if any(c.work.engine == "cuda" for c in counts):
            made, bad = spills([gpu.arch for gpu in GPUS], ["bfloat16", "float32"])
            which = f": {', '.join(bad)}" if bad else ""
            console.print(f"of {made} CUDA kernels (these dtypes and GPUs) {len(bad)} spill registers{which}")
    if arguments.json:
        _write(arguments.json, counts, found)
    console.print(f"{time.perf_counter() - start:.0f} s", highlight=False)
    return 0


def _write(path: Path, counts: list[Count], found: dict[tuple[Any, ...], list[Occupancy]]) -> None:
    names = ("engine", "kernel", "dtype", "V")
    flight = [dict(zip(names, key, strict=True)) | o.as_dict() for key, group in found.items() for o in group]
    path.write_text(json.dumps({"counts": [c.as_dict() for c in counts], "in_flight": flight}, indent=1) + "\n")


if __name__ == "__main__":
    sys.exit(main())
