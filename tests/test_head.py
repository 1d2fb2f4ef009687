"""Logits that CPUs never write (csrc/cpu/head.h), on every instruction set: losses and statistics against float64, and
the same bits in any company."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
import torch
from check import error
from torch import Tensor

import fastloss
from fastloss.backends import choose_for, native, reference
from fastloss.linear.chunks import row_loss
from fastloss.linear.heads import Head, LinearRows, stand_in
from fastloss.spec import COMPUTE_DTYPE, Objective, Rows, make_spec

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
# (N, H, V): a row; one class; less than a vector, a slice, a panel; a slice and one more; several slices to a segment;
# sums longer than what is added up at once; several groups of rows.
SHAPES = [(1, 1, 1), (3, 5, 1), (7, 3, 9), (6, 16, 256), (13, 33, 257), (5, 20, 40000), (9, 1030, 700), (1100, 2, 300)]
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "softcap": {"softcap": 3.0, "logit_scale": 1.3, "z_loss": 1e-2},
    "smoothing": {"label_smoothing": 0.1, "logit_scale": 0.7},
}


@pytest.fixture(autouse=True)
def few_classes_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "FEWEST_CLASSES", 0)


def made(N: int, H: int, V: int, dtype: torch.dtype, g: torch.Generator, **options: Any) -> LinearRows:
    """Rows of logits of a few units, some of them ignored; with `weighted` class weights, with `picks` a list."""
    weighted, picks = options.pop("weighted", False), options.pop("picks", 0)
    sizes = (((N, H), 1.0), ((V, H), 2 / H**0.5), ((V,), 0.5))
    head = Head(*((torch.randn(s, generator=g) * k).to(dtype) for s, k in sizes))
    target = torch.randint(V, (N, picks) if picks else (N,), generator=g)
    target[2::5] = -100
    probs = torch.rand(N, picks, generator=g) if picks else None
    spec = make_spec(objective=Objective.TOPK if picks else Objective.INDEX, **options)
    weight = torch.rand(V, generator=g) if weighted else None
    return LinearRows(Rows(stand_in(head), target, weight, spec, probs), head, None, 7, 1 << 20)


def exact(given: LinearRows, dtype: torch.dtype, extras: bool) -> list[Tensor]:
    """The reference's way by all logits, in another dtype."""
    rows = given.rows
    floats = lambda t: None if t is None else t.to(dtype)  # noqa: E731
    head = Head(*map(floats, given.head))
    rows = rows._replace(input=stand_in(head), weight=floats(rows.weight), probs=floats(rows.probs))
    logits = given._replace(head=head, rows=rows).materialised()
    return list(reference.row_loss(logits, extras))


def assert_right(given: LinearRows, extras: bool) -> None:
    rows, head = given.rows, given.head
    assert native.takes_head(rows, head.hidden, head.weight)
    F = COMPUTE_DTYPE[head.hidden.dtype]
    loss, stats, argmax, listed = native.head_loss(rows, *head, extras)
    truth, same = exact(given, torch.float64, extras), exact(given, F, extras)
    compared = [(loss, same[0], truth[0]), *zip(stats[:, :], same[1], truth[1], strict=True)]
    # The centre is the kernel's own choice: it counts with what is beside it.
    pairs = [compared[0], tuple(s[0].double() + s[1].double() for s in (stats, same[1], truth[1])), *compared[3:]]
    valid = rows.target != -100
    counts, pairs = valid if valid.dim() == 1 else valid.any(-1), pairs if extras else pairs[:-1]
    assert (loss[~counts] == 0).all() and (stats[:, ~counts] == 0).all()
    for name, (a, b, t) in zip(("loss", "lse", "log_prob", "mass", "entropy"), pairs, strict=False):
        allowed, found = (error(x[counts], t[counts], 1.0) for x in (b, a))
        limit = (allowed if allowed < float("inf") else 0) + (1e-12 if torch.float64 == F else 2e-6)
        assert found <= limit, f"{name} {tuple(head.weight.shape)}: {found:.2e}, torch {allowed:.2e}"
    if extras:
        z = given._replace(head=Head(*(t.double() for t in head))).materialised().input
        best = z.gather(1, argmax[:, None])[:, 0]
        torch.testing.assert_close(best[counts], z.max(1).values[counts], rtol=1e-5, atol=1e-5)
        assert not argmax[~counts].any()
    assert listed.shape == (len(loss), rows.target.shape[1] if rows.probs is not None else 0)


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_losses_and_statistics(isa, dtype, options, generator):
    for shape in SHAPES:
        for extras in False, True:
            assert_right(made(*shape, dtype, generator, weighted=extras, **OPTIONS[options]), extras)


def test_listed_classes(isa, generator):
    for shape in (3, 5, 1), (13, 33, 700):
        for picks in 1, 4:
            given = made(*shape, torch.float32, generator, picks=picks, label_smoothing=0.1)
            if picks > 1:
                given.rows.target[0, 1] = -100
            assert_right(given, True)
            *_, listed = native.head_loss(given.rows, *given.head, True)
            y = given.rows.target
            want = given.materialised().input.gather(1, y.clamp(min=0))
            torch.testing.assert_close(listed[y >= 0], want[y >= 0], rtol=1e-5, atol=1e-5)


def test_a_row_is_the_same_in_any_company(isa, generator):
    """To the bit: whatever rows are around it, and however many threads."""
    threads = torch.get_num_threads()
    given = made(60, 1030, 900, torch.float32, generator)
    rows, (hidden, weight, bias) = given.rows, given.head
    try:
        torch.set_num_threads(1)
        whole = native.head_loss(rows, hidden, weight, bias, True)
        for count in 1, 2, 3:
            torch.set_num_threads(count)
            for size in 1, 7, 60:
                for i in range(0, 60, size):
                    some = rows._replace(input=rows.input[i : i + size], target=rows.target[i : i + size])
                    part = native.head_loss(some, hidden[i : i + size], weight, bias, True)
                    assert torch.equal(part[0], whole[0][i : i + size]) and torch.equal(part[2], whole[2][i : i + size])
                    assert torch.equal(part[1], whole[1][:, i : i + size])
    finally:
        torch.set_num_threads(threads)


def test_strides_and_mixed_dtypes(isa, generator):
    given = made(13, 33, 300, torch.float32, generator)
    hidden, weight, bias = given.head
    want = native.head_loss(given.rows, hidden, weight, bias, False)
    strided = hidden.t().contiguous().t(), weight.repeat(2, 2)[:300, :33], bias.repeat_interleave(2)[::2]
    for a, b in zip(native.head_loss(given.rows, *strided, False), want, strict=True):
        assert torch.equal(a, b)
    rough = weight.bfloat16()
    a, b = (native.head_loss(given.rows, hidden, w, bias, False)[0] for w in (rough, rough.float()))
    assert torch.equal(a, b)
    assert not native.takes_head(given.rows, hidden, weight.double())


@pytest.mark.parametrize("options", OPTIONS)
def test_far_logits(isa, options, generator):
    """Of 1e4 and 1e9, whose exponentials need the maximum; the same losses as the kernels of rows of logits."""
    for dtype, bounds in (torch.float32, (1e4, 1e9)), (torch.float64, (1e4, 1e9)):
        for bound in bounds:
            given = made(9, 4, 700, dtype, generator, **OPTIONS[options])
            given.head.bias.mul_(bound)
            got = native.head_loss(given.rows, *given.head, True)
            logits = torch.empty(9, 700, dtype=dtype)
            native.matmul(given.head.hidden, given.head.weight.t(), logits, start=given.head.bias)
            want = native.row_loss(given.rows._replace(input=logits), True)
            close = {"rtol": 1e-6, "atol": 1e-6}
            torch.testing.assert_close(got[0], want[0], **close)
            torch.testing.assert_close(got[1][0] + got[1][1], want[1][0] + want[1][1], **close)
            torch.testing.assert_close(got[1][2:], want[1][2:], **close)
            assert torch.equal(got[2], want[2])


def test_masked_classes(isa, generator):
    """-inf in one class, in a whole slice, in all but one; the first of equal logits is the largest."""
    for masked in slice(5, 6), slice(0, 256), slice(1, 700):
        given = made(9, 4, 700, torch.float32, generator)
        given.head.bias[masked] = -torch.inf
        given.rows.target[:3] = torch.tensor([0, 5, 699])
        assert_right(given, True)
    given = made(9, 4, 700, torch.float32, generator)
    for head in given.head:
        head.zero_()
    assert (native.head_loss(given.rows, *given.head, True)[2] == 0).all()
    given.head.hidden[4, 1] = torch.nan
    loss = native.head_loss(given.rows, *given.head, False)[0]
    assert loss[4].isnan() and loss.isnan().sum() == 1


def test_no_rows_and_none_that_count(isa, generator):
    given = made(0, 5, 300, torch.float32, generator)
    assert native.head_loss(given.rows, *given.head, True)[1].shape == (5, 0)
    given = made(8, 5, 300, torch.float32, generator)
    given.rows.target.fill_(-100)
    given.head.hidden.fill_(torch.nan)  # which no product meets
    loss, stats, *_ = native.head_loss(given.rows, *given.head, False)
    assert (loss == 0).all() and (stats == 0).all()


def test_no_features(isa, generator):
    given = made(5, 1, 300, torch.float32, generator)
    head = Head(torch.zeros(5, 0), torch.zeros(300, 0), given.head.bias)
    assert_right(given._replace(head=head), True)


def test_rows_of_no_weight_meet_no_product(generator):
    given = made(12, 5, 300, torch.float32, generator)
    hidden, weight, bias = given.head
    y = given.rows.target.clamp(min=0)
    counts = torch.ones(12).index_fill(0, torch.tensor([1, 2, 9]), 0)
    score = lambda h: fastloss.linear_cross_entropy(h, weight, y, linear_bias=bias, token_weight=counts)  # noqa: E731
    want = score(hidden)
    hidden[counts == 0] = torch.nan
    torch.testing.assert_close(score(hidden), want)


def test_wrong_calls_are_refused():
    """Before anything is read."""
    h, w = torch.zeros(2, 3), torch.zeros(5, 3)
    rows = Rows(stand_in(Head(h, w, None)), torch.tensor([1, 5]), None, make_spec())
    with pytest.raises(IndexError, match="Target 5 is out of bounds"):
        native.head_loss(rows, h, w, None, False)
    rows = rows._replace(target=torch.tensor([1, 4]))
    for bad_h, bad_w in (h[:, 1:], w), (h[1:], w), (h, w[1:]), (h.double(), w):
        with pytest.raises(ValueError, match="head_loss: "):
            native.head_loss(rows, bad_h, bad_w, None, False)
    soft = rows._replace(spec=make_spec(objective=Objective.TOPK_TAIL))
    assert not native.takes_head(soft, h, w)
    with pytest.raises(ValueError, match="head_loss: expected class indices"):
        native.head_loss(soft._replace(target=rows.target[:, None], probs=torch.ones(2, 1)), h, w, None, False)


def test_who_takes_it(monkeypatch, generator):
    """Scoring of real vocabularies, no more than that: of few classes all logits are small."""
    monkeypatch.undo()
    given = made(3, 5, native.FEWEST_CLASSES, torch.float32, generator)
    backend = choose_for(torch.device("cpu"), torch.float32, torch.int64, Objective.INDEX)
    assert backend.takes_head(given.rows, *given.head[:2])
    assert not backend.takes_head(given.rows, given.head.hidden, given.head.weight[1:])
    assert torch.equal(row_loss(given, False)[0], native.head_loss(given.rows, *given.head, False)[0])


MEASURE = """
import torch, fastloss, sys
def status(key):
    with open("/proc/self/status") as f:
        return next(int(line.split()[1]) for line in f if line.startswith(key)) / 1024
N, H, V = 6000, 64, 16384
w = torch.ones(V, H, dtype=getattr(torch, sys.argv[1]))
x, y = torch.ones(N, H, dtype=w.dtype), torch.zeros(N, dtype=torch.int64)
torch.set_num_threads(2)
with torch.no_grad():
    fastloss.linear_cross_entropy(x[:4], w, y[:4])  # threads, workspaces
    before = status("VmRSS")
    fastloss.linear_cross_entropy(x, w, y)
print(status("VmHWM") - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_peak_of_scoring(dtype):
    """Less than 10 MiB, where all logits would be 375 and a chunk of them 56."""
    run = subprocess.run([sys.executable, "-c", MEASURE, dtype], capture_output=True, text=True, check=True)
    assert float(run.stdout) < 10, run.stdout
