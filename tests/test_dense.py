"""The losses around the vocabulary's: torch's own samples, sparse weights, and the formulas of the papers."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

import fastloss
from fastloss.adaptive import log_partition

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:Sparse"),  # CSR is in beta state; invariants are not checked
]
DROP_INS = [
    "kl_div",
    "mse_loss",
    "l1_loss",
    "binary_cross_entropy_with_logits",
    "cosine_embedding_loss",
    "triplet_margin_loss",
]


@pytest.mark.filterwarnings("ignore")  # torch's own, of its samples
@pytest.mark.parametrize("name", DROP_INS)
def test_torch_samples(name):
    pytest.importorskip("expecttest", reason="torch.testing._internal needs it")
    from torch.testing._internal.common_methods_invocations import op_db

    samples = [op for op in op_db if op.name == f"nn.functional.{name}"]
    assert samples
    for op in samples:
        for dtype in torch.float32, torch.float64, torch.bfloat16:
            if dtype not in op.supported_dtypes("cpu"):
                continue
            for sample in op.sample_inputs("cpu", dtype, requires_grad=True):
                tensors = [t for t in (sample.input, *sample.args) if isinstance(t, torch.Tensor) and t.requires_grad]
                ours = getattr(fastloss, name)(sample.input, *sample.args, **sample.kwargs)
                theirs = getattr(F, name)(sample.input, *sample.args, **sample.kwargs)
                assert torch.equal(ours, theirs)
                up = torch.rand_like(theirs)
                got, want = (torch.autograd.grad(t, tensors, up, allow_unused=True) for t in (ours, theirs))
                assert all((a is b is None) or torch.equal(a, b) for a, b in zip(got, want, strict=True))


def sparse_weight(shape: tuple[int, ...], layout: torch.layout, generator: torch.Generator) -> torch.Tensor:
    w = torch.rand(shape, generator=generator, dtype=torch.float64)
    w = torch.where(w < 0.3, w, 0)
    return w.to_sparse_csr() if layout is torch.sparse_csr else w.to_sparse_coo()


LOSSES = {"mse_loss": torch.square, "l1_loss": torch.abs}


@pytest.mark.parametrize("layout", [torch.sparse_coo, torch.sparse_csr], ids=str)
@pytest.mark.parametrize("name", LOSSES)
def test_sparse_weights(name, layout, generator):
    """Only what is stored is read: elsewhere there may be NaN, and the gradient is zero."""
    w = sparse_weight((7, 11), layout, generator)
    dense = w.to_dense()
    x, y = (torch.randn(7, 11, generator=generator, dtype=torch.float64) for _ in range(2))
    x, y = torch.where(dense == 0, torch.nan, x).requires_grad_(), torch.where(dense == 0, torch.inf, y)
    clean = torch.where(dense == 0, 0, x.detach()).requires_grad_()
    want = (dense * LOSSES[name](clean - torch.where(dense == 0, 0, y))).sum()
    for reduction, expected in ("sum", want), ("mean", want / dense.sum()):
        got = getattr(fastloss, name)(x, y, reduction=reduction, weight=w)
        torch.testing.assert_close(got, expected)
        grads = torch.autograd.grad(got, x), torch.autograd.grad(expected, clean, retain_graph=True)
        torch.testing.assert_close(*grads)
    each = getattr(fastloss, name)(x, y, reduction="none", weight=w)
    assert each.layout == layout
    torch.testing.assert_close(each.to_dense().sum(), want)


@pytest.mark.parametrize("layout", [torch.sparse_coo, torch.sparse_csr], ids=str)
def test_sparse_operands(layout, generator):
    """Of one pattern: only values are touched, in the gradient too."""
    w = sparse_weight((5, 6), layout, generator)
    make = (lambda t: t.to_sparse_csr()) if layout is torch.sparse_csr else (lambda t: t.to_sparse_coo())
    pattern = w.to_dense() != 0
    x = make(torch.where(pattern, torch.rand(5, 6, generator=generator, dtype=torch.float64) + 1, 0)).requires_grad_()
    y = make(torch.where(pattern, torch.rand(5, 6, generator=generator, dtype=torch.float64) + 1, 0))
    loss = fastloss.l1_loss(x, y, weight=w, reduction="sum")
    torch.testing.assert_close(loss, (w.to_dense() * (x.to_dense() - y.to_dense()).abs()).sum())
    (grad,) = torch.autograd.grad(loss, x)
    assert grad.layout == layout
    torch.testing.assert_close(grad.to_dense(), (w.to_dense() * (x.to_dense() - y.to_dense()).sign()).detach())
    with pytest.raises(ValueError, match="target: expected the weight's pattern"):
        fastloss.l1_loss(x, make(torch.eye(5, 6).double()), weight=w)


def test_uncoalesced_and_empty_weights():
    x, y = torch.arange(6.0).view(2, 3), torch.zeros(2, 3)
    twice = torch.sparse_coo_tensor(torch.tensor([[1, 1], [2, 2]]), torch.tensor([1.0, 2.0]), (2, 3))
    assert fastloss.l1_loss(x, y, weight=twice, reduction="sum") == 15
    empty = torch.sparse_coo_tensor(torch.empty(2, 0, dtype=torch.int64), torch.empty(0), (2, 3))
    assert fastloss.mse_loss(x, y, weight=empty, reduction="sum") == 0
    with pytest.raises(ValueError, match="input: expected the weight's shape"):
        fastloss.mse_loss(x.T, y, weight=empty)
    with pytest.raises(ValueError, match="input: expected a dense tensor without a sparse weight"):
        fastloss.mse_loss(empty, y)


def test_cosine_similarity_loss(generator):
    x, y = torch.randn(4, 5, generator=generator), torch.randn(4, 5, generator=generator)
    want = 1 - F.cosine_similarity(x, y)
    torch.testing.assert_close(fastloss.cosine_similarity_loss(x, y, reduction="none"), want)
    torch.testing.assert_close(fastloss.cosine_similarity_loss(x, y), want.mean())
    with pytest.raises(ValueError, match="target: expected input's shape"):
        fastloss.cosine_similarity_loss(x, y[:, :4])


def test_gaussian_kl(generator):
    mean, log_var, prior_mean, prior_log_var = torch.randn(4, 3, 5, generator=generator, dtype=torch.float64)
    normal = torch.distributions.Normal
    q, p = normal(mean, (log_var / 2).exp()), normal(prior_mean, (prior_log_var / 2).exp())
    want = torch.distributions.kl_divergence(q, p).sum(-1)
    got = fastloss.gaussian_kl(mean, log_var, prior_mean, prior_log_var, reduction="none")
    torch.testing.assert_close(got, want)
    standard = 0.5 * (log_var.exp() + mean**2 - 1 - log_var).sum(-1)
    torch.testing.assert_close(fastloss.gaussian_kl(mean, log_var), standard.mean())
    tiny = fastloss.gaussian_kl(torch.zeros(1), torch.full((1,), 1e-3), reduction="sum")
    torch.testing.assert_close(tiny, torch.tensor(0.5 * (math.expm1(1e-3) - 1e-3)), rtol=1e-3, atol=0)


def test_robust_loss_and_its_limits(generator):
    x = torch.randn(200, generator=generator, dtype=torch.float64) * 4
    s = (x / 1.7) ** 2
    for alpha, want in (
        (2.0, s / 2),
        (0.0, torch.log1p(s / 2)),
        (-math.inf, 1 - torch.exp(-s / 2)),
        (1.0, torch.sqrt(s + 1) - 1),
        (-2.0, 2 * s / (s + 4)),
        (0.5, 3 * ((s / 1.5 + 1) ** 0.25 - 1)),
    ):
        torch.testing.assert_close(fastloss.robust_loss(x, alpha, 1.7), want)
    for alpha in 0.0, 2.0:  # continuous there
        near = fastloss.robust_loss(x, alpha + (1e-9 if alpha == 0 else -1e-9), 1.7)
        torch.testing.assert_close(near, fastloss.robust_loss(x, alpha, 1.7), rtol=1e-6, atol=1e-8)
    alpha = torch.tensor(1.3, dtype=torch.float64, requires_grad=True)
    scale = torch.tensor(0.7, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(fastloss.robust_loss, (x[:9].requires_grad_(), alpha, scale))


def test_partition_function():
    """Known values, and a plain sum over a fine grid."""
    one = 2 * math.e * 0.6019072301972346  # 2 e K_1(1)
    known = torch.tensor([math.pi * math.sqrt(2), one, math.sqrt(2 * math.pi)], dtype=torch.float64)
    got = log_partition(torch.tensor([0.0, 1.0, 2.0])).exp()
    torch.testing.assert_close(got, known, rtol=1e-11, atol=0)
    x = torch.linspace(-4000, 4000, 4_000_001, dtype=torch.float64)
    for alpha in 0.7, 1.2, 1.7:
        want = torch.trapezoid(torch.exp(-fastloss.robust_loss(x, alpha)), x)
        torch.testing.assert_close(log_partition(torch.tensor(alpha, dtype=torch.float64)).exp(), want)
    alpha = torch.tensor([0.3, 1.9], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(log_partition, (alpha,))


def test_adaptive_loss_learns_the_shape(generator):
    """Gaussian residuals want alpha near 2, Cauchy ones near 0, and either its own scale."""
    normal = torch.randn(4000, generator=generator) * 3
    cauchy = torch.randn(4000, generator=generator) / torch.randn(4000, generator=generator)
    residuals = torch.stack([normal, cauchy], -1)
    loss = fastloss.AdaptiveLoss(2)
    optimizer = torch.optim.Adam(loss.parameters(), 0.1)
    first = loss(residuals).item()
    for _ in range(150):
        optimizer.zero_grad()
        value = loss(residuals)
        value.backward()
        optimizer.step()
    assert value.item() < first
    assert loss.alpha[0] > 1.6 and loss.alpha[1] < 0.3
    assert 2.3 < loss.scale[0] < 3.5
    fixed = fastloss.AdaptiveLoss(alpha=2.0, alpha_range=(2.0, 2.0), learn_scale=False, reduction="none")
    want = 0.5 * normal**2 + 0.5 * math.log(2 * math.pi)
    torch.testing.assert_close(fixed(normal[:, None])[:, 0], want, rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match="input: expected shape"):
        loss(torch.zeros(3, 5))
    with pytest.raises(ValueError, match="alpha: expected"):
        fastloss.AdaptiveLoss(alpha=3.0)


def test_uncertainty_weighting():
    combine = fastloss.UncertaintyWeighting(["regression", "classification"])
    with torch.no_grad():
        combine.log_variance.copy_(torch.tensor([0.4, -0.6]))
    mse, ce = torch.tensor(2.0, requires_grad=True), torch.tensor(3.0, requires_grad=True)
    value = combine(mse, ce)
    want = 2 * math.exp(-0.4) / 2 + 0.2 + 3 * math.exp(0.6) - 0.3
    torch.testing.assert_close(value, torch.tensor(want))
    value.backward()
    torch.testing.assert_close(mse.grad, torch.tensor(math.exp(-0.4) / 2))
    best = torch.tensor([math.log(2.0), math.log(6.0)])  # where the derivative by s vanishes
    with torch.no_grad():
        combine.log_variance.copy_(best)
    (grad,) = torch.autograd.grad(combine(mse.detach(), ce.detach()), combine.log_variance)
    torch.testing.assert_close(grad, torch.zeros(2), rtol=0, atol=1e-6)
    with pytest.raises(ValueError, match="losses: expected 2"):
        combine(mse)
    with pytest.raises(ValueError, match="kinds: expected"):
        fastloss.UncertaintyWeighting(["other"])


@pytest.mark.filterwarnings("ignore:reduction. 'mean':UserWarning")  # torch's own
def test_kl_div_modules(generator):
    """PyTorch's own samples for its module, through ours."""
    common = pytest.importorskip("torch.testing._internal.common_modules")
    (info,) = [m for m in common.module_db if m.module_cls is torch.nn.KLDivLoss]
    samples = info.module_inputs_func(info, device="cpu", dtype=torch.float64, requires_grad=True, training=True)
    assert len(samples) > 5
    for sample in samples:
        made, given = sample.constructor_input, sample.forward_input
        modules = [cls(*made.args, **made.kwargs) for cls in (fastloss.KLDivLoss, torch.nn.KLDivLoss)]
        # Targets below zero are among the samples: NaN on both sides.
        torch.testing.assert_close(*(module(*given.args, **given.kwargs) for module in modules), equal_nan=True)
        assert repr(modules[0]) == repr(modules[1])


@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
@pytest.mark.parametrize("name", ["l1_loss", "mse_loss"])
def test_weights_are_there_when_compiled(name, reduction):
    """torch.compile forgets that of torch's own l1_loss."""
    x, y, w = torch.randn(6, 11, requires_grad=True), torch.randn(6, 11), torch.rand(6, 11)
    loss = getattr(fastloss, name)
    found = torch.compile(loss, backend="aot_eager", fullgraph=True)(x, y, weight=w, reduction=reduction)
    want = loss(x.detach().double().requires_grad_(), y.double(), weight=w.double(), reduction=reduction)
    torch.testing.assert_close(found.double(), want)


def test_deprecated_reductions_when_compiled():
    """They were not obeyed beside a weight."""
    x, y, w = torch.randn(6, 11), torch.randn(6, 11), torch.rand(6, 11)
    loss = torch.compile(lambda *a: fastloss.l1_loss(*a, size_average=False, weight=w), backend="aot_eager")
    with pytest.warns(UserWarning, match="size_average and reduce"):
        found = loss(x, y)
    torch.testing.assert_close(found, ((x - y).abs() * w).sum())
