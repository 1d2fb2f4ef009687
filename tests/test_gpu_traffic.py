"""The GPU kernels' instructions and memory traffic, counted by executing them (studies/gpu_counts.py): the targets
hold, and what the tables say is what was counted."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

sys.path.append(str(Path(__file__).resolve().parent.parent / "studies"))

pytest.importorskip("rich", reason="the tables need rich: pip install 'fastloss[bench]'")

import gpu_counts
import gpu_occupancy
import gpu_traffic
from gpu_counts import FORWARD, PER_ROW, STEP, Work, count

pytestmark = pytest.mark.usefixtures("one_thread")

SHAPES = [
    (STEP, 4, 32000), (STEP, 2, 128256), (STEP, 64, 3000), (PER_ROW, 4, 32000), (PER_ROW, 64, 3000), (FORWARD, 2, 32000)
]  # fmt: skip
WORKS = [
    Work(engine, way, dtype, N, V)
    for engine in ("cuda", "triton")
    for way, N, V in SHAPES
    for dtype in (torch.bfloat16, torch.float32)
]
# Beside their targets, by a hair: every one of the sixteen warps of a row reads its target and upstream gradient.
NEARLY = {(Work("triton", STEP, torch.bfloat16, 4, 32000), "sectors"): 1.021}


def counted(work: Work) -> gpu_counts.Count:
    if why := gpu_counts.missing(work.engine):
        pytest.skip(why)
    return count(work)


@pytest.mark.parametrize("work", WORKS, ids=lambda w: f"{w.engine}-{w.way}-{w.dtype_name}-{w.V}".replace(" ", ""))
def test_targets(work):
    done = counted(work)
    targets = done.targets()
    assert targets
    for name, (limit, met) in targets.items():
        nearly = NEARLY.get((work, name), limit)
        assert met or done.figures[name] <= nearly, f"{name}: {done.figures[name]:.4f}, at most {limit}"
    assert done.figures["local bytes"] == 0  # no thread's registers went to memory


def test_a_step_is_counted_whole():
    """Everything a training step launches, the backward that finds nothing to do too; kernels of one block by share."""
    done = counted(Work("cuda", STEP, torch.float32, 2, 3000))
    names = sorted(gpu_counts.kernel_name(stats) for stats, _ in done.launches)
    assert names == ["denominator", "denominator", "row_loss_grad", "row_loss_grad", "total"]
    for stats, share in done.launches:
        assert share == (2 / gpu_counts.MANY if gpu_counts.kernel_name(stats) in gpu_counts.ONCE else 1)


def test_a_wrong_kernel_is_not_counted(monkeypatch):
    if why := gpu_counts.missing("cuda"):
        pytest.skip(why)
    right = gpu_counts.fastloss.cross_entropy
    monkeypatch.setattr(gpu_counts.fastloss, "cross_entropy", lambda x, y: right(x, y) * 1.05)
    with pytest.raises(AssertionError, match="not worth counting"):
        count(Work("cuda", STEP, torch.float32, 2, 256))


def test_script(tmp_path, monkeypatch, capsys):
    """Its tables and its JSON; where nothing can be executed, it says why and ends with 1."""
    if why := gpu_counts.missing("cuda"):
        pytest.skip(why)
    monkeypatch.setattr(gpu_traffic, "_QUICK", ((STEP, 2, 3000),))
    assert gpu_traffic.main(["--quick", "--engine", "cuda", "--json", str(tmp_path / "counts.json")]) == 0
    assert "✓" in capsys.readouterr().out
    written = json.loads((tmp_path / "counts.json").read_text())
    assert [c["dtype"] for c in written["counts"]] == ["bfloat16", "float32"]
    assert all(c["targets"]["sectors"]["met"] for c in written["counts"])
    monkeypatch.setattr(gpu_traffic, "missing", lambda engine: "no emulator")
    assert gpu_traffic.main(["--quick"]) == 1
    assert "no emulator" in capsys.readouterr().out


def test_blocks_of_a_multiprocessor():
    """By registers, by shared memory, by threads; and whether their bytes in flight are enough."""
    a100 = gpu_occupancy.GPUS[0]
    by_registers = gpu_occupancy.Occupancy(a100, 512, 104, 0, 64, 64 << 10)
    by_shared = gpu_occupancy.Occupancy(a100, 128, 72, 0, 64 << 10, 62 << 10)
    by_threads = gpu_occupancy.Occupancy(a100, 1024, 32, 0, 0, 1 << 10)
    assert [o.blocks for o in (by_registers, by_shared, by_threads)] == [1, 2, 2]
    assert by_shared.have == 124 << 10 > a100.needed > by_threads.have
    assert round(a100.needed) == 15104  # 800 ns x 2039 GB/s / 108


def test_bytes_in_flight():
    """All asynchronous copies; otherwise the loads before the first store of their width."""
    copies = {
        5: ["cp.async.cg.shared.global [%r1], [%rd1], 16", 4, 2048, 64],
        9: ["st.global.v4.b32 [%rd1]", 4, 2048, 64],
    }
    loads = {
        1: ["ld.global.b32 %r1, [%rd1]", 2, 8, 2],
        2: ["ld.global.v4.b32 {}, [%rd1]", 2, 1024, 32],
        3: ["@%p1 ld.global.v4.b32 {}, [%rd1]", 2, 1024, 32],
        4: ["st.global.v4.b32 [%rd1], {}", 2, 1024, 32],
        5: ["ld.global.v4.b32 {}, [%rd1]", 2, 1024, 32],  # the next round, or the end of the row
    }
    stats = SimpleNamespace(grid=(2, 1, 1), block=(64, 1, 1))
    stats.per_pc = copies
    assert gpu_occupancy.in_flight(stats) == 1024
    stats.per_pc = loads
    assert gpu_occupancy.in_flight(stats) == 2048


@pytest.mark.parametrize(
    ("loss", "limit"), [("forward KL", 1.01), ("JS", 1.01), ("top-k KL", 1.05), ("top-k KL, lumped tail", 1.05)]
)
def test_other_losses_move_what_they_must(loss, limit):
    """On chip each operand is read once and the gradient written once, JS's two rounds or not."""
    done = counted(Work("cuda", STEP, torch.bfloat16, 2, 32000, loss=loss))
    assert done.on_chip and done.figures["local bytes"] == 0
    assert done.figures["sectors"] <= limit
    assert done.work.passes == (2 if "top-k" in loss else 3)
