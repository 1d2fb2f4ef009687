"""What ranks that share a vocabulary tell each other in a step: bytes, counted from the library's own messages, and
time, modelled as NCCL models its collectives (docs/scaling.md says with which figures, and whose). Needs no GPU, and
measures no GPU's time.

    python studies/scaling.py [--vocab V ...] [--rows N ...] [--hidden H ...] [--tflops F] [--latency-scale X]
    python studies/scaling.py --measure        # the same messages over Gloo, between two processes of this machine
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from itertools import product
from math import ceil

from scaling_measure import measured
from scaling_messages import WAYS, Way, chunk_rows, fields, kept, logits_ways, merge_peak, received, sent
from scaling_model import FABRICS, Fabric, Model

Table = list[list[str]]
TPS = (2, 4, 8, 16, 32, 64)
ROWS = (2048, 8192, 32768)
HIDDEN = (4096, 8192)
VOCAB = (131072, 262144, 1048576)
TFLOPS = 700.0
MOST_ROWS = 1 << 20
HIDDEN_ROWS = 8192


def size(count: float) -> str:
    """Bytes, as people read them."""
    for unit, least in (("GiB", 1 << 30), ("MiB", 1 << 20), ("KiB", 1 << 10)):
        if count >= least:
            return f"{count / least:.{3 if count < 1000 * least else 4}g} {unit}"
    return f"{count:.0f} B"


def show(title: str, head: Sequence[str], rows: Table) -> None:
    """A Markdown table."""
    print(f"\n{title}\n\n| {' | '.join(head)} |\n|{' --- |' * len(head)}")
    for row in rows:
        print(f"| {' | '.join(row)} |")


def fields_table() -> Table:
    """What a rank says of a row, for each loss."""
    table = []
    for name, rounds in fields().items():
        columns = rounds, [4 * count for count in rounds], [_rows_in_block(count) for count in rounds]
        table.append([name, *(" + ".join(map(str, column)) for column in columns)])
    return table


def _rows_in_block(count: int) -> int:
    low, high = 1, MOST_ROWS
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if len(sent(middle, count)) == 1 else (low, middle - 1)
    return low


def bytes_table(rows: Sequence[int], tps: Sequence[int]) -> Table:
    """What a rank receives in the forward of a cross-entropy, for each way."""
    return [
        [name, str(n), str(len(way(n, 2))), *(size(received(way(n, tp), tp)) for tp in tps)]
        for n in rows
        for name, way in WAYS.items()
    ]


def logits_table(vocab: Sequence[int], rows: Sequence[int], tps: Sequence[int], model: Model) -> Table:
    """Gathering bfloat16 logits instead: what a rank receives, and how long that takes where NVLink reaches."""
    table = []
    for V in vocab:
        for n in rows:
            messages = [logits_ways(n, V, tp) for tp in tps]
            table.append(
                [str(V), str(n), size(received(messages[0], tps[0])), size(received(messages[-1], tps[-1]))]
                + [f"{model.time(FABRICS['nvl72'], tp, m) / 1e3:.2f}" for tp, m in zip(tps, messages, strict=True)]
            )
    return table


def time_table(fabric: Fabric, rows: Sequence[int], tps: Sequence[int], model: Model) -> Table:
    """Modelled microseconds of a forward's collectives."""
    return [
        [str(n), str(tp), *(f"{model.time(fabric, tp, way(n, tp)):.0f}" for way in WAYS.values())]
        for n in rows
        for tp in tps
        if tp in fabric.sizes
    ]


def slower_from(fabric: Fabric, tp: int, model: Model, other: Way, mine: Way) -> int:
    """The least number of rows from which `mine` takes longer than `other`, for all that follow; more than MOST_ROWS if
    there is none."""
    slower = MOST_ROWS + 64
    for n in _row_numbers():
        if model.time(fabric, tp, mine(n, tp)) <= model.time(fabric, tp, other(n, tp)):
            break
        slower = n
    return slower


def _row_numbers() -> Iterator[int]:
    """Multiples of 64, from the most to the least in steps of a 64th."""
    n = MOST_ROWS
    while n > 0:
        yield n
        n -= max(64, n // 64 // 64 * 64)


def crossover_table(tps: Sequence[int]) -> Table:
    """From how many rows on the all-gather is modelled to be slower than each alternative, with all latencies halved,
    as they are, and doubled."""
    ours, _, *others = WAYS.values()
    return [
        [fabric.name, str(tp), *(_crossovers(fabric, tp, other, ours) for other in others)]
        for fabric in FABRICS.values()
        for tp in tps
        if tp in fabric.sizes
    ]


def _crossovers(fabric: Fabric, tp: int, other: Way, mine: Way) -> str:
    return " / ".join(_count(slower_from(fabric, tp, Model(scale), other, mine)) for scale in (0.5, 1.0, 2.0))


def _count(n: int) -> str:
    return "-" if n > MOST_ROWS else "all" if n == 64 else f"{n / 1000:.1f}k" if n < 1e5 else f"{n / 1000:.0f}k"


def hidden_table(hidden: Sequence[int], vocab: Sequence[int], tflops: float, model: Model) -> Table:
    """The sum of the hidden states' gradient, and the products that it can hide under."""
    table = []
    for name, tp in (("hgx", 8), ("nvl72", 8), ("nvl72", 64), ("ib", 16), ("ib", 64)):
        for H, V in product(hidden, vocab):
            fabric, total, rows = FABRICS[name], 4 * HIDDEN_ROWS * H, chunk_rows(HIDDEN_ROWS, H, V, tp)
            reduce = model.all_reduce(fabric, tp, total, "sum")
            weight = 2 * HIDDEN_ROWS * H * V / tp / tflops / 1e6
            of_chunk = weight * rows / HIDDEN_ROWS
            sums = model.all_reduce(fabric, tp, 4 * rows * H, "sum")
            figures = [reduce, model.reduce_scatter(fabric, tp, total), weight]
            figures.append(_not_hidden(HIDDEN_ROWS / rows, of_chunk, sums))
            table.append([fabric.name, str(tp), str(H), str(V), *(f"{figure:.0f}" for figure in figures)])
    return table


def _not_hidden(chunks: float, product: float, sum_of_chunk: float) -> float:
    """What goes on after the last product. A chunk has three, and its part is summed when the second has made it."""
    now = done = 0.0
    for _ in range(ceil(chunks)):
        now += 2 * product
        done = max(done, now) + sum_of_chunk
        now += product
    return max(0.0, done - now)


def memory_table(tps: Sequence[int]) -> Table:
    """Bytes beside the logits and their gradient, for each row of a cross-entropy."""
    n = 1 << 16
    gathered = [sum(m.bytes for m in WAYS["ours"](n, tp)) * tp / n for tp in tps]
    return [
        [str(tp), f"{kept():.0f}", f"{arrived:.0f}", f"{merge_peak(tp):.0f}"]
        for tp, arrived in zip(tps, gathered, strict=True)
    ]


def report(args: argparse.Namespace) -> None:
    """All tables."""
    model = Model(args.latency_scale)
    show("Fields of a row", ("loss", "fields", "bytes a row", "rows in the first collective"), fields_table())
    ranks = [f"tp = {tp}" for tp in args.tp]
    show("Received by a rank", ("way", "N", "collectives", *ranks), bytes_table(args.rows, args.tp))
    for fabric in FABRICS.values():
        title = f"Modelled us of a forward's collectives: {fabric.name}"
        show(title, ("N", "tp", *WAYS), time_table(fabric, args.rows, args.tp, model))
    title = "Rows from which ours is modelled as slower, with half the latencies / with them / with twice"
    show(title, ("ranks on", "tp", *list(WAYS)[2:]), crossover_table(args.tp))
    head = ("V", "N", f"received, {ranks[0]}", f"received, {ranks[-1]}", *(f"ms, {tp}" for tp in ranks))
    show("Gathering logits (bfloat16), modelled on NVL72", head, logits_table(args.vocab, args.rows, args.tp, model))
    head = ("ranks on", "tp", "H", "V", "all-reduce", "reduce-scatter", "weight product")
    title = f"Sum of d_hidden, float32, N = {HIDDEN_ROWS}, at {args.tflops:g} TFLOP/s, modelled us"
    table = hidden_table(args.hidden, args.vocab, args.tflops, model)
    show(title, (*head, "not hidden"), table)
    show("Bytes a row", ("tp", "kept for the backward", "gathered", "peak of the merge"), memory_table(args.tp))


def arguments(given: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tp", type=int, nargs="+", default=TPS)
    parser.add_argument("--rows", type=int, nargs="+", default=ROWS, help="tokens of a step, N")
    parser.add_argument("--hidden", type=int, nargs="+", default=HIDDEN)
    parser.add_argument("--vocab", type=int, nargs="+", default=VOCAB)
    parser.add_argument("--tflops", type=float, default=TFLOPS, help="rate of the weight product")
    parser.add_argument("--latency-scale", type=float, default=1.0, help="all of NCCL's latencies times this")
    parser.add_argument("--measure", action="store_true", help="send the messages over Gloo, between two processes")
    parser.add_argument("--rounds", type=int, default=15, help="of which --measure takes the median")
    parser.add_argument("--measure-vocab", type=int, default=16384, help="V of the logits that --measure gathers")
    return parser.parse_args(given)


def main(given: Sequence[str] | None = None) -> None:
    """The command."""
    args = arguments(given)
    if args.measure:
        head = ("N", "way", "sent by a rank", "ms of each collective", "ms together")
        show(f"Gloo, 2 processes, medians of {args.rounds}", head, measured(args.rows, args.measure_vocab, args.rounds))
    else:
        report(args)


if __name__ == "__main__":
    main()
