"""Rows that lie at two strides, as those of x[:, :-1] do: every loss reads them where they lie."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from cases import CASES, LOSS_CASES, Case
from check import assert_as_good_as_torch, value_and_grad
from engines import on_engine
from torch import Tensor

import fastloss
from fastloss.strides import Lines, lines_of, overlap, readable, rows_at

pytestmark = pytest.mark.usefixtures("one_thread")

B, T = 2, 3
N = B * T
# From rows (N, V) to a view (B, T, V) that has them, with gaps between rows or in another order in memory.
VIEWS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda x: x.reshape(B, T, -1),
    "shifted": lambda x: F.pad(x.reshape(B, T, -1), (0, 0, 0, 1))[:, :-1],
    "time_first": lambda x: x.reshape(B, T, -1).transpose(0, 1).contiguous().transpose(0, 1),
    "padded": lambda x: F.pad(x.reshape(B, T, -1), (1, 3, 1, 0))[:, 1:, 1 : x.shape[1] + 1],
    "reversed_padding": lambda x: F.pad(x.reshape(B, T, -1).transpose(0, 1), (0, 0, 1, 1))[:, 1:-1].transpose(0, 1),
}
PAIRS = [("shifted", "shifted"), ("time_first", "shifted"), ("padded", "time_first"), ("contiguous", "padded"),
         ("shifted", "contiguous"), ("reversed_padding", "reversed_padding")]  # fmt: skip
TWO_STRIDES = ("shifted", "time_first", "padded", "reversed_padding")


def over(case: Case, of_input: str, of_target: str) -> Callable[..., Tensor]:
    """The case's loss of rows (N, V), by way of views (B, T, V) of logits and of a target that has classes."""

    def loss(x: Tensor, y: Tensor, **options: Any) -> Tensor:
        options = {
            name: v.reshape(B, T, *v.shape[1:]) if name in ("probs", "token_weight", "mask") else v
            for name, v in options.items()
        }
        x = VIEWS[of_input](x)
        y = VIEWS[of_target](y) if y.is_floating_point() else y.reshape(B, T, *y.shape[1:])
        if case.function == "cross_entropy":  # which has the classes second
            x, y = x.movedim(-1, 1), y.movedim(-1, 1) if y.is_floating_point() else y
        found = case.loss()(x, y, **options)
        return found.reshape(N, *found.shape[2:]) if found.dim() else found

    return loss


def rows_of(x: Tensor) -> Tensor:
    return x.reshape(-1, x.shape[-1])


@pytest.mark.parametrize("case", [*CASES, *LOSS_CASES], ids=lambda case: case.name)
def test_cases(engine, case, generator):
    """Values and gradients against float64, and the bits of the contiguous rows."""
    turn = [*CASES, *LOSS_CASES].index(case)
    compiles = engine.startswith("triton")
    pairs = PAIRS if not compiles else [PAIRS[turn % len(PAIRS)]]
    for k, (of_input, of_target) in enumerate(pairs):
        dtype = (torch.float32, torch.bfloat16)[(turn + k) % 2]
        V = (64, 203, 40)[(turn + k) % 3] if compiles or k else 4999
        x, y, options = case.inputs(N, V, dtype, generator)
        never = case.function == "selective_log_softmax"
        reduction = {} if never else {"reduction": ("mean", "none")[k % 2] if "normalizer" not in options else "sum"}
        upstream = case.upstream(N, generator) if never or reduction["reduction"] == "none" else None
        ours = over(case, of_input, of_target)
        assert_as_good_as_torch(ours, case.oracle, x, y, options | reduction, upstream)
        if engine != "reference" and not compiles:  # Triton's bits depend on how many elements an access may take
            found = value_and_grad(ours, x, upstream, y, **options, **reduction)
            plain = value_and_grad(case.loss(), x, upstream, y, **options, **reduction)
            assert torch.equal(found[0], plain[0]) and torch.equal(found[1], plain[1]), (of_input, of_target)


@pytest.mark.parametrize("view", TWO_STRIDES)
def test_statistics(engine, view, generator):
    """row_stats, softmax_entropy, and a loss with return_stats, of values and gradients."""
    x, y = torch.randn(N, 301, generator=generator).mul(3), torch.randint(301, (B, T), generator=generator)
    results = []
    for made in (VIEWS[view](x), x.double().reshape(B, T, -1)):
        leaf = made.detach().requires_grad_()
        if made.dtype == torch.float32:
            stats = fastloss.row_stats(leaf, y)
            entropy = fastloss.softmax_entropy(leaf)
            _, more = fastloss.cross_entropy(leaf.movedim(-1, 1), y, return_stats=True)
            assert torch.equal(stats.argmax, made.argmax(-1)) and torch.equal(more.argmax, stats.argmax)
            outputs = [stats.lse, stats.log_prob, entropy, more.log_prob]
        else:
            log_p = leaf.log_softmax(-1)
            log_prob = log_p.gather(-1, y[..., None])[..., 0]
            outputs = [leaf.logsumexp(-1), log_prob, -(log_p.exp() * log_p).sum(-1), log_prob]
        loss = sum((k + 1) * t.square().sum() for k, t in enumerate(outputs))
        results.append([*outputs, torch.autograd.grad(loss, leaf)[0]])
    for found, want in zip(*results, strict=True):
        torch.testing.assert_close(found.double(), want, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("view", TWO_STRIDES)
def test_losses_of_language_models(engine, view, generator):
    x, y = VIEWS[view](torch.randn(N, 67, generator=generator)), torch.randint(67, (B, T), generator=generator)
    calls = [
        lambda x: fastloss.lm.causal_lm_loss(x, y),
        lambda x: fastloss.lm.masked_lm_loss(x, y, reduction="none").square().sum(),
        lambda x: fastloss.lm.sequence_log_likelihood(x, y).sum(),
        lambda x: fastloss.pointer_generator_nll(
            x, torch.zeros(B, T), torch.full((B, T, 4), 0.25), torch.arange(B * 4).view(B, 4), y
        ),
    ]
    for call in calls:
        found = [value_and_grad(call, t, None) for t in (x.contiguous(), x.double().contiguous())]
        leaf = x.detach().requires_grad_()
        loss = call(leaf)
        (grad,) = torch.autograd.grad(loss, leaf)
        torch.testing.assert_close((loss, grad), found[0], rtol=1e-6, atol=1e-7)
        torch.testing.assert_close((loss.double(), grad.double()), found[1], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("view", TWO_STRIDES)
def test_inplace(engine, view, generator):
    """The gradient overwrites the rows where they lie, and nothing between them."""
    if engine == "reference":
        pytest.skip("writes no gradient in the forward")
    x, u = torch.randn(N, 150, generator=generator), torch.randn(N, 150, generator=generator)
    want = value_and_grad(fastloss.kl_div_with_logits, x, None, u)
    rows = VIEWS[view](x)
    base = rows if rows._base is None else rows._base
    place = rows.shape, rows.stride(), rows.storage_offset()
    leaf = base.detach().requires_grad_()
    memory = leaf * 1
    loss = fastloss.kl_div_with_logits(memory.as_strided(*place), VIEWS[view](u), inplace=True)
    expected = base.clone()
    expected.as_strided(*place).copy_(want[1].view(rows.shape))
    assert torch.equal(loss, want[0]) and torch.equal(memory.detach(), expected)
    (grad,) = torch.autograd.grad(loss, leaf)
    assert torch.equal(rows_of(grad.as_strided(*place)), want[1])


def test_inplace_of_overlapping_rows():
    x = torch.randn(1, T, 20).expand(B, T, 20)
    for overlapping in (x, torch.randn(100).as_strided((B, T, 20), (30, 15, 1)), torch.randn(2, 2, 3, 9)[..., ::2]):
        with pytest.raises(ValueError, match="rows do not overlap"):
            fastloss.kl_div_with_logits(overlapping, torch.zeros(overlapping.shape), inplace=True)


def test_what_is_copied(engine, generator):
    """Rows at three strides, and classes that are not contiguous: right all the same."""
    x, u = (torch.randn(2, 4, 5, 77, generator=generator) for _ in range(2))
    for view in (lambda t: t[:, :3, :4], lambda t: t[:, ::2, 1:, ::3], lambda t: t.movedim(-1, 0)):
        results = []
        for a, b in ((view(x), view(u)), (view(x).contiguous(), view(u).contiguous())):
            leaf = a.detach().requires_grad_()
            loss = fastloss.kl_div_with_logits(leaf, b)
            results.append((loss, torch.autograd.grad(loss, leaf)[0]))
        torch.testing.assert_close(*results, rtol=1e-6, atol=1e-7)


def test_lines():
    """What kernels read where it lies, and what they do not."""
    x = torch.zeros(4, 6, 10)
    assert lines_of(x) == lines_of(x[0]) == Lines(10)
    assert lines_of(x[:, :-1]) == Lines(10, 5, 60)
    assert lines_of(x.transpose(0, 1)) == Lines(60, 4, 10)
    assert lines_of(x[:, ::2]) == Lines(20)
    assert lines_of(x[:1, :-1, None]) == Lines(10)
    assert lines_of(x[:1].expand(4, 6, 10)) == Lines(10, 6, 0)
    assert lines_of(x[..., ::2]) is None and lines_of(x.view(2, 2, 6, 10)[:, :, :5].transpose(0, 1)) is None
    assert lines_of(x.view(2, 2, 6, 10)[:, :, :5]) == Lines(10, 5, 60)
    for nothing in (x[:, :0], x[..., :0], x[:0].movedim(1, -1), x.view(2, 2, 6, 10)[:, :, :0, ::2].transpose(0, 1)):
        assert lines_of(readable(nothing)) == Lines(nothing.shape[-1])
    assert readable(x[:, :-1]).data_ptr() == x.data_ptr()
    assert not overlap(x[:, :-1]) and not overlap(x.transpose(0, 1)) and overlap(x[:1].expand(4, 6, 10))
    assert overlap(x.flatten().as_strided((4, 6, 10), (55, 10, 1))) and overlap(x.flatten().as_strided((9, 10), (5, 1)))


def test_some_rows(generator):
    x = torch.randn(4, 6, 10, generator=generator)
    index = torch.tensor([7, 0, 3])
    for view in (x, x[:, :-1], x.transpose(0, 1), x[::2, :-1, ::2]):
        for where in (slice(2, 9), index):
            assert torch.equal(rows_at(view, where), rows_of(view)[where])


@pytest.mark.parametrize("view", TWO_STRIDES)
def test_probabilities_beside_hidden_states(view, generator):
    """A linear loss copies a chunk of its probabilities, whatever their strides."""
    h, w = torch.randn(N, 8, generator=generator), torch.randn(50, 8, generator=generator)
    q = torch.rand(N, 50, generator=generator).softmax(1)
    row = w.shape[0] * 4
    loss = lambda h: fastloss.linear_cross_entropy(  # noqa: E731
        h.view(B, T, 8), w, VIEWS[view](q), ignore_index=None, label_smoothing=0.1, max_chunk_bytes=3 * row
    )
    found = value_and_grad(loss, h, None)
    textbook = lambda h: F.cross_entropy(h @ w.double().t(), q.double(), label_smoothing=0.1)  # noqa: E731
    want = value_and_grad(textbook, h.double(), None)
    torch.testing.assert_close((found[0].double(), found[1].double()), want, rtol=1e-5, atol=1e-6)


# ---- memory ----------------------------------------------------------------------------------------------------------

LOSSES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "cross_entropy": lambda x, u: fastloss.cross_entropy(x.movedim(-1, 1), u.argmax(-1)),
    "per_row": lambda x, u: fastloss.cross_entropy(x.movedim(-1, 1), u.argmax(-1), reduction="none").sum(),
    "probabilities": lambda x, u: fastloss.cross_entropy(x.movedim(-1, 1), u.movedim(-1, 1)),
    "kl": lambda x, u: fastloss.kl_div_with_logits(x, u),
    "js": lambda x, u: fastloss.js_div_with_logits(x, u, reduction="none").sum(),
    "topk": lambda x, u: fastloss.topk_cross_entropy(x, u[..., :3].long(), u[..., :3], tail="lump"),
    "selective": lambda x, u: fastloss.selective_log_softmax(x, u[..., :3].long()).sum(),
    "entropy": lambda x, u: fastloss.softmax_entropy(x).sum(),
    "causal_lm": lambda x, u: fastloss.lm.causal_lm_loss(x, u.argmax(-1)),
}


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("engine", ["cpu", "cuda:host"])
def test_no_copy(engine, loss):
    """Of the size of the logits, one gradient is allocated, and nothing else."""
    for view in TWO_STRIDES:
        x, u = (VIEWS[view](torch.rand(N, 3000)) for _ in range(2))
        x = x.detach().requires_grad_()
        with on_engine(engine), torch.profiler.profile(profile_memory=True, acc_events=True) as profile:
            torch.autograd.grad(LOSSES[loss](x, u), x)
        large = [e.name for e in profile.events() for _ in range(e.self_cpu_memory_usage // (x.numel() * 4))]
        assert large == ["aten::empty"], (view, large)


MEASURE = """
import torch, fastloss
def status(key):
    with open("/proc/self/status") as f:
        return next(int(line.split()[1]) for line in f if line.startswith(key)) / 1024
x, u = (torch.ones(8, 257, 20000) for _ in range(2))
views = lambda b: (x[:b, :-1].detach().requires_grad_(), u[:b, :-1])
fastloss.kl_div_with_logits(*(t[:, :2] for t in views(1))).backward()
leaf, teacher = views(8)
before = status("VmRSS")
fastloss.kl_div_with_logits(leaf, teacher).backward()
print(status("VmHWM") - before - leaf.numel() * 4 / 2**20)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_peak():
    """Less than 10 MiB beyond the gradient, where a copy of an operand would be 156 MiB."""
    run = subprocess.run([sys.executable, "-c", MEASURE], capture_output=True, text=True, check=True)
    assert float(run.stdout) < 10, run.stdout
