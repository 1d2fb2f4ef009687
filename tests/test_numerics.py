"""Extreme numbers and sizes."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from cases import CASES, DTYPES
from check import assert_as_good_as_torch, value_and_grad

import fastloss


@pytest.mark.parametrize("offset", [1e4, -1e4, 3e5, -3e7])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
def test_logits_far_from_zero(engine, offset, dtype, case, generator):
    x, y, options = case.inputs(5, 3001, dtype, generator)
    noise = 4e-16 * abs(offset) if dtype == torch.float64 else 0.0  # the float64 oracle's own
    assert_as_good_as_torch(fastloss.cross_entropy, case.oracle, x + offset, y, options, noise=noise)


def test_logits_of_both_signs(engine, generator):
    for dtype in DTYPES:
        x = (torch.randn(5, 5000, generator=generator).sign() * 1e4).to(dtype)
        x[0, 4000] = 3e4  # the maximum comes late
        y = torch.tensor([4000, 0, 1, 2, 3])
        assert_as_good_as_torch(fastloss.cross_entropy, CASES[0].oracle, x, y, {})


def test_rising_rows(engine):
    """Each tile has a larger maximum than all before it."""
    x = torch.arange(20000.0)[None].repeat(2, 1) / 10
    y = torch.tensor([19990, 5])
    assert_as_good_as_torch(fastloss.cross_entropy, CASES[0].oracle, x, y, {"label_smoothing": 0.1})


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_masked_vocabulary(engine, dtype, reduction, generator):
    """Logits of -inf: exact zeros, never NaN, whatever tile they fill."""
    x, y, _ = CASES[0].inputs(6, 9000, dtype, generator)
    x[:, 5000:] = -torch.inf
    x[1, :4500] = -torch.inf
    x[2, ::2] = -torch.inf
    y = torch.tensor([3, 4600, 7, 4999, 0, 1])
    loss, grad = value_and_grad(fastloss.cross_entropy, x, None, y, reduction=reduction)
    assert loss.isfinite().all()
    assert grad.isfinite().all()
    assert (grad[x == -torch.inf] == 0).all()
    assert_as_good_as_torch(fastloss.cross_entropy, CASES[0].oracle, x, y, {"reduction": reduction})
    stats = fastloss.cross_entropy(x, y, return_stats=True)[1]
    log_p = x.double().log_softmax(1)
    entropy = -torch.where(log_p == -torch.inf, 0, log_p.exp() * log_p).sum(1)
    torch.testing.assert_close(stats.entropy.double(), entropy, rtol=1e-5, atol=1e-5)


def test_masked_vocabulary_with_weights_and_probabilities(engine, generator):
    """A masked class of no weight, or of no probability, contributes nothing."""
    x, y, _ = CASES[0].inputs(3, 3000, torch.float32, generator)
    x[:, 2000:] = -torch.inf
    y = y % 2000
    w = torch.rand(3000, generator=generator)
    w[2000:] = 0
    q = torch.rand(3, 3000, generator=generator)
    q[:, 2000:] = 0
    for target, options in (y, {"weight": w, "label_smoothing": 0.1}), (q, {}), (q, {"weight": w}):
        loss, grad = value_and_grad(fastloss.cross_entropy, x, None, target, **options)
        assert loss.isfinite() and grad.isfinite().all() and (grad[:, 2000:] == 0).all()
        want = value_and_grad(CASES[0].oracle, x.double(), None, target, **options)
        torch.testing.assert_close((loss.double(), grad.double()), want, rtol=1e-5, atol=1e-6)


def test_target_on_a_masked_class(engine, generator):
    x, _, _ = CASES[0].inputs(2, 100, torch.float32, generator)
    x[:, 5] = -torch.inf
    y = torch.tensor([5, 6])
    ours, torchs = (value_and_grad(f, x, None, y, reduction="none") for f in (fastloss.cross_entropy, F.cross_entropy))
    torch.testing.assert_close(ours, torchs)
    assert ours[0][0] == torch.inf


@pytest.mark.parametrize("scale", [1.0, 0.5, 0.7, 1.1])
@pytest.mark.parametrize("mask", [-1e10, -1e30, torch.finfo(torch.float32).min])
def test_finite_masks(engine, mask, scale, generator):
    """A large finite number in place of -inf: on the first classes, the last, all, and the target."""
    x, y, _ = CASES[0].inputs(5, 4000, torch.float32, generator)
    x[0, 1000:], y[0] = mask, 5
    x[3, :3000], y[3] = mask, 3001
    if scale in (1.0, 0.5):  # otherwise their product is rounded, by more than the numbers that are left
        x[1] = mask
        x[2, y[2]] = mask
    for options in {}, {"reduction": "none"}:
        ours = value_and_grad(fastloss.cross_entropy, x, None, y, logit_scale=scale, **options)
        exact = x.double().clamp(min=torch.finfo(torch.float32).min / max(scale, 1)) * scale
        want = value_and_grad(F.cross_entropy, exact, None, y, **options)
        finite = want[0] < 1e30  # float32 may overflow where the target is masked
        torch.testing.assert_close(ours[0].double()[finite], want[0][finite], rtol=1e-5, atol=1e-6)
        assert (ours[0][~finite] > 1e29).all()
        torch.testing.assert_close(ours[1].double(), want[1] * scale, rtol=2e-5, atol=1e-7)


def test_a_rare_target_keeps_its_gradient(engine, generator):
    """Where nothing is taken from the target's probability, its entry has all its digits however small it is."""
    x, y, _ = CASES[0].inputs(3, 50000, torch.float32, generator)
    want = x.double().softmax(1).gather(1, y[:, None])
    leaf = x.clone().requires_grad_()
    stats = fastloss.cross_entropy(leaf, y, return_stats=True)[1]
    (grad,) = torch.autograd.grad(stats.lse.sum(), leaf)
    torch.testing.assert_close(grad.gather(1, y[:, None]).double(), want, rtol=5e-6, atol=0)
    grad = value_and_grad(fastloss.cross_entropy, x, None, y, label_smoothing=1.0, reduction="sum")[1]
    torch.testing.assert_close(grad.gather(1, y[:, None]).double(), want - 1 / 50000, rtol=5e-3, atol=1e-11)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("column", [0, 1500, 2999])
def test_one_bad_row_stays_alone(engine, bad, column, generator):
    for dtype in torch.float32, torch.bfloat16:
        x, y, _ = CASES[0].inputs(5, 3000, dtype, generator)
        clean = value_and_grad(fastloss.cross_entropy, x, None, y, reduction="none")
        x[2, column] = bad
        loss, grad = value_and_grad(fastloss.cross_entropy, x, None, y, reduction="none")
        others = [0, 1, 3, 4]
        assert torch.equal(loss[others], clean[0][others])
        assert torch.equal(grad[others], clean[1][others])
        assert loss[2].isnan() and grad[2].isnan().any()


def test_ignored_rows_are_never_read(engine, generator):
    x, y, _ = CASES[0].inputs(4, 300, torch.float32, generator)
    x[1] = torch.nan
    y[1] = -100
    for reduction in "mean", "sum", "none":
        loss, grad = value_and_grad(fastloss.cross_entropy, x, None, y, reduction=reduction)
        assert loss.isfinite().all() and grad.isfinite().all() and (grad[1] == 0).all()


@pytest.mark.parametrize("options", [{}, {"label_smoothing": 0.1}, {"z_loss": 0.1}], ids=str)
def test_all_rows_ignored(engine, options, generator):
    x, y, _ = CASES[0].inputs(4, 30, torch.float32, generator)
    y[:] = -100
    for reduction, value in ("mean", torch.nan), ("sum", 0.0), ("none", 0.0):
        loss, grad = value_and_grad(fastloss.cross_entropy, x, None, y, reduction=reduction, **options)
        torch.testing.assert_close(loss, torch.full_like(loss, value), equal_nan=True)
        assert torch.equal(grad, torch.zeros_like(x))


def test_no_rows(engine):
    for dtype in DTYPES:
        x, y = torch.empty(0, 7, dtype=dtype), torch.empty(0, dtype=torch.int64)
        for reduction in "mean", "sum", "none":
            ours, torchs = (
                value_and_grad(f, x, None, y, reduction=reduction) for f in (fastloss.cross_entropy, F.cross_entropy)
            )
            torch.testing.assert_close(ours, torchs, equal_nan=True)


def test_bfloat16_subnormals(engine, generator):
    """Subnormal logits, and gradients that are subnormal in the end."""
    tiny = torch.tensor([1e-40, -3e-39, 9e-41, 0.0]).repeat(3, 25)
    for dtype in torch.bfloat16, torch.float32:
        x = tiny.to(dtype)
        assert_as_good_as_torch(fastloss.cross_entropy, CASES[0].oracle, x, torch.tensor([0, 1, 2]), {})
    x = torch.zeros(1, 100, dtype=torch.bfloat16)
    x[0, 1:] = -80
    loss, grad = value_and_grad(fastloss.cross_entropy, x, torch.tensor(1e-4), torch.tensor([0]))
    assert loss.isfinite() and grad.isfinite().all() and grad.double().abs().max() < 1e-30


def test_float16_gradients_do_not_underflow(engine, generator):
    """A loss scale is there to save small gradients; the kernel applies it before rounding, right or wrong guessed."""
    x = torch.randn(64, 30000, generator=generator).half()
    y = torch.randint(30000, (64,), generator=generator)
    for _ in range(2):
        grad = value_and_grad(fastloss.cross_entropy, x, torch.tensor(32768.0), y)[1]
        assert (grad == 0).float().mean() < 0.01
        value_and_grad(fastloss.cross_entropy, x, None, y)


def test_log_probabilities_are_never_positive(engine, generator):
    x = torch.randn(200, 4099, generator=generator) * 0.01
    x[torch.arange(200), torch.arange(200)] = 50.0
    stats = fastloss.cross_entropy(x, torch.arange(200), return_stats=True)[1]
    assert (stats.log_prob <= 0).all()


@pytest.mark.slow
def test_more_than_2_31_elements(generator):
    """Offsets beyond 32 bits: the last rows are as right as the first."""
    psutil = pytest.importorskip("psutil")
    N, V = 8200, 262145
    if psutil.virtual_memory().available < 2.2 * N * V * 2:
        pytest.skip("needs 10 GB of free memory")
    x = torch.zeros(N, V, dtype=torch.bfloat16)
    rows = torch.tensor([0, 1, 8190, 8191, 8192, 8199])
    x[rows] = torch.randn(len(rows), V, generator=generator).bfloat16()
    y = torch.randint(V, (N,), generator=generator)
    y[:] = torch.where(torch.isin(torch.arange(N), rows), y, -100)
    x.requires_grad_()
    loss = fastloss.cross_entropy(x, y, reduction="sum", out_dtype=torch.float32)
    loss.backward()
    part = x.detach()[rows].double().requires_grad_()
    want = F.cross_entropy(part, y[rows], reduction="sum")
    want.backward()
    torch.testing.assert_close(loss.double(), want, rtol=1e-5, atol=0)
    torch.testing.assert_close(x.grad[rows].double(), part.grad, rtol=1e-2, atol=1e-8)
    assert not x.grad[2:8000:977].any()
