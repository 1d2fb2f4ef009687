"""The Jensen-Shannon divergence of a student that is nearly its teacher, and of probabilities and mixtures that nearly
vanish: right in its leading digits, not only beside one."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from cases import LOSS_CASES, textbook_divergence
from check import value_and_grad
from engines import ENGINES, ISAS, on_engine
from test_parts import in_parts
from torch import Tensor

import fastloss

pytestmark = pytest.mark.usefixtures("one_thread")
JS = next(case for case in LOSS_CASES if case.name == "js")
BETAS = 0.1, 0.5, 0.9
# Of JS: by how much the loss may be off. Three times what is measured, and far below what a float32 sum of logarithms
# of about ten is off by.
LIMITS = {1e-3: 2e-6, 1e-7: 1e-4, 1e-10: 1e-2}


@pytest.fixture(params=[*ENGINES, "triton:ptx"])
def engine(request: pytest.FixtureRequest) -> Iterator[str]:
    """All of them."""
    with on_engine(request.param):
        yield request.param


def pair(N: int, V: int, js: float, g: torch.Generator) -> tuple[Tensor, Tensor]:
    """Float32 logits of a student and of a teacher, of about that divergence at beta = 0.5."""
    u = torch.randn(N, V, generator=g) * 3
    return u + torch.randn(N, V, generator=g) * (8 * js) ** 0.5, u


def off(got: Tensor, exact: Tensor) -> float:
    return ((got.double() - exact).norm() / exact.norm()).item()


def textbook(x: Tensor, u: Tensor, dtype: torch.dtype, **options: Any) -> tuple[Tensor, Tensor]:
    return value_and_grad(textbook_divergence, x.to(dtype), None, u.to(dtype), **options)


@pytest.mark.parametrize("js", LIMITS)
def test_a_student_that_is_nearly_its_teacher(engine, js, generator):
    for beta in BETAS:
        for V in (300, 9000) if engine != "triton:ptx" else (300,):
            x, u = pair(4, V, js, generator)
            loss, grad = value_and_grad(fastloss.js_div_with_logits, x, None, u, beta=beta)
            exact, torchs = (textbook(x, u, dtype, beta=beta) for dtype in (torch.float64, torch.float32))
            assert off(loss, exact[0]) < LIMITS[js], (beta, V)
            assert off(grad, exact[1]) < off(torchs[1], exact[1]), (beta, V)


def test_long_rows_of_such_a_student(generator):
    """Of which Triton makes slices."""
    x, u = pair(1, 40001, 1e-7, generator)
    with on_engine("triton:ptx"):
        loss, grad = value_and_grad(fastloss.js_div_with_logits, x, None, u, beta=0.3)
    exact, torchs = (textbook(x, u, dtype, beta=0.3) for dtype in (torch.float64, torch.float32))
    assert off(loss, exact[0]) < LIMITS[1e-7]
    assert off(grad, exact[1]) < off(torchs[1], exact[1])


def test_float64(engine, generator):
    """Against the textbook in wider numbers than double."""
    np = pytest.importorskip("numpy")
    if np.finfo(np.longdouble).eps > 1e-18:
        pytest.skip("no floating point wider than double")
    u = torch.randn(2, 300, generator=generator, dtype=torch.float64)
    x = u + 1e-7 * torch.randn(2, 300, generator=generator, dtype=torch.float64)
    for beta in BETAS:
        p, q = (np.exp(t.numpy().astype(np.longdouble)) for t in (x, u))
        p, q = p / p.sum(1, keepdims=True), q / q.sum(1, keepdims=True)
        m = np.longdouble(beta) * q + (1 - np.longdouble(beta)) * p
        want = (np.longdouble(beta) * q * np.log(q / m) + (1 - np.longdouble(beta)) * p * np.log(p / m)).sum(1).mean()
        assert 1e-17 < want < 1e-14
        assert abs(fastloss.js_div_with_logits(x, u, beta=beta).item() / float(want) - 1) < 1e-3, beta


def test_a_student_that_is_its_teacher(engine, generator):
    """Nothing, and with the least difference not less than that."""
    for scale in 3, 60:
        u = torch.randn(16, 500, generator=generator) * scale
        loss, grad = value_and_grad(fastloss.js_div_with_logits, u, None, u, reduction="none")
        assert (loss == 0).all() or engine == "reference"
        assert (grad == 0).all() or grad.abs().max() < 1e-7
        if engine != "reference":
            assert (fastloss.js_div_with_logits(u * (1 + 1e-7), u, reduction="none") >= 0).all()


@pytest.mark.parametrize("beta", [1e-6, 0.3, 1 - 1e-6])
def test_what_vanishes(engine, beta, generator):
    """Classes that one side, the other or neither has; probabilities below the normal range; small weights of either
    side. The textbook has -1e4 for -inf: the same in float64, and differentiable."""
    x, u = torch.randn(6, 400, generator=generator) * 3, torch.randn(6, 400, generator=generator) * 3
    x[0, :50], u[1, 30:90] = -torch.inf, -torch.inf
    x[2, ::2], u[2, ::3] = -torch.inf, -torch.inf
    x[3], u[3] = x[3] * 30, u[3] * 30
    x[4, 200:], u[4, 200:] = -torch.linspace(80, 110, 200), -torch.linspace(110, 80, 200)
    x[5], u[5] = x[5] * 1e3, u[5] * 1e3 + 1e4
    loss, grad = value_and_grad(fastloss.js_div_with_logits, x, None, u, beta=beta, reduction="none")
    want, want_grad = textbook(*(t.clamp(min=-1e5) for t in (x, u)), torch.float64, beta=beta, reduction="none")
    for row in range(6):
        assert off(loss[row], want[row]) < (3e-4 if row in (3, 5) else 2e-5), row
        assert off(grad[row], want_grad[row]) < 3e-4 or want_grad[row].norm() < 1e-9, row
    assert (grad[0, :50] == 0).all() and (grad[2, ::2] == 0).all()


@pytest.mark.parametrize("name", [*ISAS, "cuda:host", "triton:ptx"])
def test_parts_of_a_vocabulary(name, generator):
    """Each rank's share adds up, though over its classes p and m do not."""
    x, u = pair(3, 301, 1e-7, generator)
    for beta in BETAS:
        options = {"beta": beta, "reduction": "none"}
        with on_engine(name):
            loss, grad = in_parts(JS, x, u, options, None, [0, 7, 200, 200, 301])
        exact, torchs = (textbook(x, u, dtype, **options) for dtype in (torch.float64, torch.float32))
        assert off(loss, exact[0]) < 3 * LIMITS[1e-7], beta
        assert off(grad, exact[1]) < off(torchs[1], exact[1]), beta


# Where torch makes the product, it rounds bfloat16 logits of student and teacher apart.
HEADS = [*((name, dtype) for name in ISAS for dtype in (torch.float32, torch.bfloat16)), ("cuda:host", torch.float32)]


@pytest.mark.parametrize(("name", "dtype"), HEADS, ids=str)
def test_hidden_states(name, dtype, generator):
    """Chunks of rows, and of a 16-bit head's gradient blocks of classes too. The bias tells student from teacher."""
    h, w, b = (torch.randn(*s, generator=generator).to(dtype) for s in ((12, 32), (700, 32), (700,)))
    other = (b.float() + 2e-3 * torch.randn(700, generator=generator)).to(dtype)
    leaves = [t.clone().requires_grad_() for t in (h, w, other)]
    budget = {"max_chunk_bytes": 40_000, "out_dtype": torch.float32}
    with on_engine(name):
        loss = fastloss.linear_js_div(
            *leaves[:2], h, w, linear_bias=leaves[2], target_linear_bias=b, beta=0.5, **budget
        )
        loss.backward()
    exact = [t.double().requires_grad_() for t in (h, w, other)]
    want = textbook_divergence(F.linear(*exact), F.linear(h.double(), w.double(), b.double()), beta=0.5)
    want.backward()
    assert want < 1e-4
    assert off(loss.detach(), want.detach()) < 1e-3
    for got, leaf in zip(leaves, exact, strict=True):
        assert off(got.grad, leaf.grad) < (1e-2 if dtype == torch.bfloat16 else 2e-3)


def test_second_derivatives_near_the_teacher():
    """The reference's two expressions meet without a step in their derivatives."""
    u = torch.zeros(1, 6, dtype=torch.float64)
    for gap in 1e-3, 0.29, 0.31:
        x = torch.tensor([[gap, 0, 0, -gap, gap / 2, 0.0]], dtype=torch.float64, requires_grad=True)
        loss = lambda t: fastloss.js_div_with_logits(t, u, beta=0.3)  # noqa: E731
        hessian = torch.autograd.functional.hessian(loss, x)
        want = torch.autograd.functional.hessian(lambda t: textbook_divergence(t, u, beta=0.3), x)
        torch.testing.assert_close(hessian, want, rtol=1e-9, atol=1e-11)
        assert math.isclose(loss(x).item(), textbook_divergence(x, u, beta=0.3).item(), rel_tol=1e-8)
