"""studies/scaling.py: it says that ranks send what they send, and its model is NCCL's."""

from __future__ import annotations

import sys
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import gathers, ranks

import fastloss
from fastloss import VocabShard

pytest.importorskip("numpy", reason="torch.distributed.tensor.debug needs it")
from torch.distributed.tensor.debug import CommDebugMode

sys.path.append(str(Path(__file__).resolve().parent.parent / "studies"))

import scaling
from scaling_messages import fields, kept, merge_peak, sent, three
from scaling_model import FABRICS, Model

pytestmark = pytest.mark.usefixtures("one_thread")

V = 6
CALLS: dict[str, Any] = {
    "cross-entropy": lambda x, y, shard: fastloss.cross_entropy(x, y, shard=shard),
    "with class weights": lambda x, y, shard: fastloss.cross_entropy(x, y, torch.ones(V // 2), shard=shard),
    "with statistics": lambda x, y, shard: fastloss.cross_entropy(x, y, shard=shard, return_stats=True),
    "KL": lambda x, y, shard: fastloss.kl_div_with_logits(x, x, shard=shard),
    "JS": lambda x, y, shard: fastloss.js_div_with_logits(x, x, shard=shard),
    "top-k": lambda x, y, shard: fastloss.topk_cross_entropy(x, y[:, None], torch.ones(len(y), 1), shard=shard),
}


@pytest.fixture(scope="module")
def two():
    with ranks(2) as started:
        yield started


def gathered(name: str, N: int) -> list[int]:
    """Bytes that this rank puts into each all-gather of a loss."""
    with gathers() as seen, CommDebugMode() as mode:
        CALLS[name](torch.zeros(N, V // 2), torch.zeros(N, dtype=torch.int64), VocabShard.even(V))
    assert mode.get_total_counts() == len(seen)
    return seen


@pytest.mark.parametrize("N", [16, 4092, 4093, 9000])
@pytest.mark.parametrize("name", CALLS)
def test_bytes_are_those_that_are_sent(two, name, N):
    said = [message for count in fields()[name] for message in sent(N, count)]
    assert two.run(gathered, name, N) == [said, said]


def test_kept_bytes_are_those_that_are_saved():
    """Of one rank without a group: what autograd holds for the backward, but for the logits."""
    N, saved = 64, []
    x = torch.zeros(N, 4, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (saved.append(t), t)[1], lambda t: t):
        fastloss.cross_entropy(x, torch.zeros(N, dtype=torch.int64), shard=VocabShard(0, 4, 4), reduction="sum")
    assert sum(t.nbytes for t in saved if t.data_ptr() != x.data_ptr()) == kept() * N


def test_model_is_what_nccl_prints():
    """NVIDIA/nccl#1453: a log of two nodes of eight H100 estimates 25.214764 us for an all-reduce of 128 bytes."""
    assert Model().all_reduce(FABRICS["ib"], 16, 128, "max") == pytest.approx(25.2, abs=0.05)


def test_model_of_a_ring():
    """Long messages take bytes over bandwidth; short ones latencies."""
    hgx, large = FABRICS["hgx"], 1 << 34
    assert Model().all_gather(hgx, 8, large) == pytest.approx(large * 7 / 8 / 370e3, rel=0.01)
    assert Model().all_reduce(hgx, 4, large, "max") == pytest.approx(large * 2 * 3 / 4 / 370e3, rel=0.01)
    assert Model().all_gather(hgx, 8, 0) == pytest.approx(6.6 + 7 * 0.6)
    assert Model(2).time(hgx, 8, three(0, 8)) == pytest.approx(2 * 3 * (6.6 + 14 * 0.6))


def test_memory_of_the_merge_grows_with_ranks():
    assert merge_peak(4) < merge_peak(16) < 4 * merge_peak(4)


@pytest.fixture(scope="module")
def printed():
    out = StringIO()
    with redirect_stdout(out):
        scaling.main([])
    return out.getvalue()


def test_tables(printed):
    assert "| ours | 2048 | 1 | 64 KiB | 192 KiB | 448 KiB | 960 KiB | 1.94 MiB | 3.94 MiB |" in printed
    assert printed.count("Modelled us") == len(FABRICS)


def test_the_document_shows_what_is_printed(printed):
    """Between the marks of docs/scaling.md; it may leave rows out."""
    document = (Path(scaling.__file__).parent.parent / "docs" / "scaling.md").read_text()
    parts = [part.split("<!-- end -->")[0] for part in document.split("<!-- printed -->")[1:]]
    shown, lines = [line for part in parts for line in part.splitlines()], set(printed.splitlines())
    assert len(shown) > 50
    assert not [line for line in shown if line not in lines]


@pytest.mark.slow
def test_measuring(capsys):
    scaling.main(["--measure", "--rows", "64", "--rounds", "1", "--measure-vocab", "64"])
    assert "| 64 | three all-reduces | 256 + 256 + 256 |" in capsys.readouterr().out
