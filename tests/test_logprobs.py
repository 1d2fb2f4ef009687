"""Log-probabilities and statistics on every engine; pointer-generator and InfoNCE, which are made of such."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from cases import SHAPES
from torch import Tensor

import fastloss

pytestmark = pytest.mark.usefixtures("one_thread")
DTYPES = (torch.float32, torch.bfloat16, torch.float64)


def textbook(x: Tensor, y: Tensor) -> tuple[Tensor, ...]:
    """(lse, logit, log_prob, entropy) of logits and labels that all count."""
    log_p = x.log_softmax(-1)
    logit = x.gather(-1, y[..., None]).squeeze(-1)
    return x.logsumexp(-1), logit, log_p.gather(-1, y[..., None]).squeeze(-1), -(log_p.exp() * log_p).sum(-1)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_row_stats(engine, dtype, generator):
    for N, V in [*SHAPES.values(), (2, 40001)]:
        x = (3 * torch.randn(N, V, generator=generator)).to(dtype).requires_grad_()
        y = torch.randint(V, (N,), generator=generator)
        stats = fastloss.row_stats(x, y)
        exact = x.detach().double().requires_grad_()
        want = textbook(exact, y)
        tolerance = {"rtol": 1e-10, "atol": 1e-10} if dtype == torch.float64 else {"rtol": 3e-6, "atol": 3e-6}
        got = tuple(s.double() for s in stats[:4])
        torch.testing.assert_close(got, tuple(want), **tolerance)
        assert torch.equal(x[torch.arange(N), stats.argmax], x.amax(-1))
        assert torch.equal(stats.rank, (x > x.gather(1, y[:, None])).sum(1))
        upstream = [torch.rand(N, generator=generator) for _ in range(4)]
        (grad,) = torch.autograd.grad(stats[:4], x, [g.to(s.dtype) for g, s in zip(upstream, stats[:4], strict=True)])
        (want_grad,) = torch.autograd.grad(want, exact, [g.double() for g in upstream])
        torch.testing.assert_close(grad.double(), want_grad, rtol=1e-2 if dtype == torch.bfloat16 else 1e-5, atol=1e-5)


def test_rank_of_equal_and_ignored(engine):
    x = torch.tensor([[1.0, 2.0, 2.0, 0.0], [5.0, 1.0, 1.0, 1.0], [0.0, -torch.inf, -torch.inf, -1.0], [1.0, 2, 3, 4]])
    stats = fastloss.row_stats(x, torch.tensor([1, 3, 2, -100]))
    assert stats.rank.tolist() == [0, 1, 2, 0]
    assert stats.log_prob[2] == -torch.inf and stats.log_prob[3] == 0


def test_the_logit_is_what_was_read(engine):
    """Not lse + log_prob, which at 1e4 has three digits."""
    x = torch.tensor([[1e4, 3.14159, 0.0], [-2.5, 1e30, -1e30], [7.0, -torch.inf, 1.0], [1.0, 2.0, 3.0]])
    y = torch.tensor([1, 0, 1, -100])
    stats = fastloss.row_stats(x, y)
    want = torch.tensor([3.14159, -2.5, -torch.inf, 0.0])
    assert torch.equal(stats.logit, want)
    softcapped = fastloss.row_stats(x[:1], y[:1], softcap=30.0, temperature=2.0, logit_scale=0.5).logit
    torch.testing.assert_close(softcapped, 30 * torch.tanh(0.5 * x[:1, 1] / 30) / 2)


def test_the_logit_has_its_gradient(engine, generator):
    """Alone, and beside those of the other statistics; of an ignored row none."""
    x = torch.randn(5, 9, generator=generator).requires_grad_()
    y = torch.tensor([1, 8, -100, 0, 3])
    g = torch.randn(3, 5, generator=generator)
    for kinds in (1, 3):
        stats = fastloss.row_stats(x, y, softcap=2.0)
        total = sum((s * v).sum() for s, v in zip((stats.logit, stats.lse, stats.entropy)[:kinds], g, strict=False))
        (got,) = torch.autograd.grad(total, x)
        z = 2 * torch.tanh(x.double() / 2)
        valid, p = y != -100, z.softmax(1)
        logit = z.gather(1, torch.where(valid, y, 0)[:, None])[:, 0]
        others = z.logsumexp(1), -(p * z.log_softmax(1)).sum(1)
        want = sum((s * v * valid).sum() for s, v in zip((logit, *others)[:kinds], g.double(), strict=False))
        torch.testing.assert_close(got.double(), torch.autograd.grad(want, x)[0].double(), rtol=1e-5, atol=1e-6)


def test_row_stats_without_a_target(engine, generator):
    x = torch.randn(2, 3, 50, generator=generator)
    stats = fastloss.row_stats(x)
    assert stats.logit is stats.log_prob is stats.rank is None
    assert stats.lse.shape == (2, 3)
    torch.testing.assert_close(stats.lse, x.logsumexp(-1))
    torch.testing.assert_close(fastloss.softmax_entropy(x), textbook(x, x.argmax(-1))[3])


@pytest.mark.parametrize(
    "options", [{"temperature": 1.7}, {"softcap": 3.0}, {"logit_scale": 0.3, "softcap": 5.0}], ids=str
)
def test_transformed_logits(engine, options, generator):
    x = torch.randn(4, 60, generator=generator)
    y = torch.randint(60, (4,), generator=generator)
    z = x.double() * options.get("logit_scale", 1) / options.get("temperature", 1)
    if "softcap" in options:
        z = options["softcap"] * torch.tanh(z / options["softcap"])
    stats = fastloss.row_stats(x, y, **options)
    torch.testing.assert_close(tuple(s.double() for s in stats[:4]), textbook(z, y), rtol=3e-6, atol=3e-6)


def test_selected_and_entropy_together(engine, generator):
    """One class or several of a row, some of them twice, with the entropy's gradient through the same pass."""
    for K in None, 1, 5:
        x = torch.randn(3, 70, generator=generator).requires_grad_()
        index = torch.randint(70, (3,) if K is None else (3, K), generator=generator)
        if K == 5:
            index[0, 1] = index[0, 0]
        log_prob, entropy = fastloss.selective_log_softmax(x, index, temperature=0.8, return_entropy=True)
        assert log_prob.shape == index.shape and entropy.shape == (3,)
        exact = x.detach().double().requires_grad_()
        log_p = (exact / 0.8).log_softmax(-1)
        want = log_p.gather(-1, index.view(3, -1)).view(index.shape), -(log_p.exp() * log_p).sum(-1)
        torch.testing.assert_close((log_prob.double(), entropy.double()), want, rtol=3e-6, atol=3e-6)
        g = torch.rand(index.shape, generator=generator), torch.rand(3, generator=generator)
        (grad,) = torch.autograd.grad((log_prob, entropy), x, g)
        (want_grad,) = torch.autograd.grad(want, exact, [t.double() for t in g])
        torch.testing.assert_close(grad.double(), want_grad, rtol=1e-5, atol=1e-6)


def test_selected_of_masked_classes(engine):
    x = torch.tensor([[0.0, -torch.inf, 1.0]]).requires_grad_()
    log_prob = fastloss.selective_log_softmax(x, torch.tensor([[0, 2]]))
    log_prob.sum().backward()
    assert log_prob.isfinite().all() and x.grad.isfinite().all() and x.grad[0, 1] == 0


# ---- pointer-generator -----------------------------------------------------------------------------------------------

B, T, S, WORDS, EXTRA = 2, 5, 7, 11, 3


def pointer_inputs(generator: torch.Generator, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    """Every target is in the vocabulary or in its source; source words come more than once."""
    x, gate = (torch.randn(*shape, generator=generator, dtype=dtype) for shape in ((B, T, WORDS), (B, T)))
    attention = torch.rand(B, T, S, generator=generator, dtype=dtype).softmax(-1)
    source = torch.randint(WORDS + EXTRA, (B, S), generator=generator)
    source[:, -1] = source[:, 0]
    target = source[torch.arange(B)[:, None], torch.randint(S, (B, T), generator=generator)]
    target[0, 0] = 3
    return [x.requires_grad_(), gate.requires_grad_(), attention.requires_grad_(), source, target]


def pointer_textbook(x: Tensor, gate: Tensor, attention: Tensor, source: Tensor, target: Tensor) -> Tensor:
    """A distribution over the extended vocabulary, (B, T)."""
    g = torch.sigmoid(gate)[..., None]
    extended = torch.cat([g * x.softmax(-1), x.new_zeros(B, T, EXTRA)], -1)
    extended = extended.scatter_add(-1, source[:, None].expand(B, T, S), (1 - g) * attention)
    return -extended.gather(-1, target[..., None]).squeeze(-1).log()


def test_pointer_generator(engine, generator):
    *inputs, source, target = pointer_inputs(generator)
    assert (target >= WORDS).any() and (target < WORDS).any()
    for reduction in "none", "mean", "sum":
        got = fastloss.pointer_generator_nll(*inputs, source, target, reduction=reduction)
        want = pointer_textbook(*inputs, source, target)
        want = want if reduction == "none" else getattr(want, reduction)()
        torch.testing.assert_close(got, want)
        upstream = torch.rand(got.shape, generator=generator, dtype=torch.float64)
        gradients = [torch.autograd.grad(loss, inputs, upstream) for loss in (got, want)]
        torch.testing.assert_close(*gradients)


def test_coverage(generator):
    *inputs, source, target = pointer_inputs(generator)
    attention = inputs[2]
    before = torch.stack([attention[:, :t].sum(1) for t in range(T)], 1)
    coverage = torch.minimum(attention, before).sum(-1)
    got = fastloss.pointer_generator_nll(*inputs, source, target, coverage_weight=0.7)
    want = (pointer_textbook(*inputs, source, target) + 0.7 * coverage).mean()
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(torch.autograd.grad(got, inputs), torch.autograd.grad(want, inputs))


def test_words_that_cannot_be_said(generator):
    """Neither in the vocabulary nor in the source: infinite, finite with eps, and nothing where ignored."""
    *inputs, source, target = pointer_inputs(generator)
    target[1, 2] = WORDS + EXTRA + 5
    assert fastloss.pointer_generator_nll(*inputs, source, target, reduction="none")[1, 2] == torch.inf
    loss = fastloss.pointer_generator_nll(*inputs, source, target, eps=1e-6)
    assert loss.isfinite() and all(g.isfinite().all() for g in torch.autograd.grad(loss, inputs))
    target[1, 2] = -100
    losses = fastloss.pointer_generator_nll(*inputs, source, target, reduction="none")
    assert losses[1, 2] == 0
    mean = fastloss.pointer_generator_nll(*inputs, source, target)
    torch.testing.assert_close(mean, losses.sum() / (B * T - 1))
    assert not torch.autograd.grad(mean, inputs)[0][1, 2].any()


def test_a_certain_gate(generator):
    """A gate that is shut to the last bit of float32: gradients stay finite, and the copy's are right."""
    *inputs, source, target = pointer_inputs(generator, torch.float32)
    inputs[1] = torch.full((B, T), -200.0).requires_grad_()
    target[:] = source[:, :T]
    loss = fastloss.pointer_generator_nll(*inputs, source, target)
    assert loss.isfinite() and all(g.isfinite().all() for g in torch.autograd.grad(loss, inputs))


# ---- InfoNCE ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("symmetric", [False, True])
def test_info_nce(engine, symmetric, generator):
    q, k = (torch.randn(9, 6, generator=generator, dtype=torch.float64).requires_grad_() for _ in "qk")
    temperature = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)
    similarity = F.normalize(q, dim=-1) @ F.normalize(k, dim=-1).T / temperature
    want = F.cross_entropy(similarity, torch.arange(9))
    if symmetric:
        want = (want + F.cross_entropy(similarity.T, torch.arange(9))) / 2
    got = fastloss.info_nce(q, k, temperature=temperature, symmetric=symmetric)
    torch.testing.assert_close(got, want)
    leaves = (q, k, temperature)
    torch.testing.assert_close(torch.autograd.grad(got, leaves), torch.autograd.grad(want, leaves))


def test_info_nce_with_negatives(generator):
    q, k, n = (torch.randn(m, 6, generator=generator, dtype=torch.float64).requires_grad_() for m in (4, 4, 7))
    similarity = q @ torch.cat([k, n]).T / 0.07
    got = fastloss.info_nce(q, k, negatives=n, normalize=False, reduction="none")
    want = F.cross_entropy(similarity, torch.arange(4), reduction="none")
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(torch.autograd.grad(got.sum(), (q, k, n)), torch.autograd.grad(want.sum(), (q, k, n)))


# ---- bad input -------------------------------------------------------------------------------------------------------

X, Y = torch.zeros(3, 5), torch.zeros(3, dtype=torch.int64)
BAD = {
    "stats_shape": (lambda: fastloss.row_stats(X, Y[:2]), "target"),
    "stats_dtype": (lambda: fastloss.row_stats(X, Y.float()), "target"),
    "stats_index": (lambda: fastloss.row_stats(X, Y + 5), "out of bounds"),
    "entropy_integers": (lambda: fastloss.softmax_entropy(Y), "input"),
    "temperature": (lambda: fastloss.row_stats(X, Y, temperature=0.0), "temperature"),
    "selected_shape": (lambda: fastloss.selective_log_softmax(X, Y[:2]), "index"),
    "selected_index": (lambda: fastloss.selective_log_softmax(X, torch.full((3, 2), 7)), "index|out of bounds"),
    "kl_shape": (lambda: fastloss.kl_div_with_logits(X, X[:, :4]), "target_logits"),
    "kl_integers": (lambda: fastloss.kl_div_with_logits(X, X.long()), "target_logits"),
    "kl_direction": (lambda: fastloss.kl_div_with_logits(X, X, direction="sideways"), "direction"),
    "kl_reduction": (lambda: fastloss.kl_div_with_logits(X, X, reduction="max"), "reduction"),
    "kl_mask": (lambda: fastloss.kl_div_with_logits(X, X, mask=Y[:1].bool()), "mask"),
    "js_beta": (lambda: fastloss.js_div_with_logits(X, X, beta=1.5), "beta"),
    "topk_shape": (lambda: fastloss.topk_cross_entropy(X, Y[:, None], X), "probs"),
    "topk_rows": (lambda: fastloss.topk_cross_entropy(X, Y[:2, None], X[:2, :1]), "indices"),
    "topk_index": (lambda: fastloss.topk_cross_entropy(X, Y[:, None] + 9, X[:, :1]), "indices|out of bounds"),
    "topk_tail": (lambda: fastloss.topk_kl_div(X, Y[:, None], X[:, :1], tail="keep"), "tail"),
    "pointer_logits": (lambda: fastloss.pointer_generator_nll(X, Y, Y, Y, Y), "input"),
    "pointer_gate": (lambda: fastloss.pointer_generator_nll(X[None], X, X[None], Y[None], Y[None]), "gate_logit"),
    "info_nce_widths": (lambda: fastloss.info_nce(X, X[:, :4]), "key"),
    "info_nce_temperature": (lambda: fastloss.info_nce(X, X, temperature=-1.0), "temperature"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input(name):
    call, argument = BAD[name]
    with pytest.raises((ValueError, RuntimeError, TypeError, IndexError, NotImplementedError), match=argument):
        call()
