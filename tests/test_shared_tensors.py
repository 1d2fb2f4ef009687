"""One tensor in two places of a call: the frozen LM head of student and teacher, hidden states against themselves."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from cases import textbook_cross_entropy, textbook_divergence
from torch import Tensor

import fastloss

pytestmark = pytest.mark.filterwarnings(
    "ignore:.class 'torch.autograd.function.Function'. should not be instantiated:DeprecationWarning",
    "ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning",
)

N, V, H = 6, 37, 8
Y = torch.arange(N) * 5
ALL = torch.arange(V)
WHOLE = fastloss.VocabShard(0, V, V)
Loss = Callable[..., Tensor]


def divergence(hidden: Tensor, weight: Tensor, target: Tensor, target_weight: Tensor, **options: Any) -> Tensor:
    return textbook_divergence(F.linear(hidden, weight), F.linear(target, target_weight), **options)


def info_nce(query: Tensor, key: Tensor, normalize: bool = True, symmetric: bool = False) -> Tensor:
    query, key = (F.normalize(t, dim=-1) if normalize else t for t in (query, key))
    losses = [F.cross_entropy(a @ b.T / 0.07, torch.arange(len(a))) for a, b in ((query, key), (key, query))]
    return sum(losses) / 2 if symmetric else losses[0]


def student(loss: Loss, **options: Any) -> Loss:
    """Another model's hidden states, the same head."""
    return lambda h, W, u: loss(h, W, u, W, **options)


def teacher_detached(loss: Loss, **options: Any) -> Loss:
    return lambda h, W, u: loss(h, W, u.detach(), W.detach(), **options)


def one_model(loss: Loss, **options: Any) -> Loss:
    """Two heads over the same hidden states."""
    return lambda h, W, U: loss(h, W, h.detach(), U, **options)


hidden, weight, other = torch.randn(N, H), torch.randn(V, H), torch.randn(N, H)
kl, js = fastloss.linear_kl_div, fastloss.linear_js_div
lce, q = fastloss.linear_cross_entropy, torch.rand(V, V).softmax(-1)
square = torch.randn(V, V)
sharded, beta = {"shard": WHOLE}, {"beta": 0.5}

# What is called, what a textbook says, the tensors and which of them are learned.
CALLS: dict[str, tuple[Loss, Loss, list[Tensor], list[bool]]] = {
    "frozen_head": (student(kl), student(divergence), [hidden, weight, other], [True, False, False]),
    "frozen_head_none": (
        student(kl, reduction="none"), student(divergence, reduction="none"), [hidden, weight, other],
        [True, False, False],
    ),
    "frozen_head_js": (student(js), student(divergence, **beta), [hidden, weight, other], [True, False, False]),
    "frozen_head_sharded": (student(kl, **sharded), student(divergence), [hidden, weight, other], [True, False, False]),
    "learned_head": (student(kl), student(divergence), [hidden, weight, other], [True, True, False]),
    "learned_head_js": (student(js), student(divergence, **beta), [hidden, weight, other], [True, True, True]),
    "teacher_detached": (
        teacher_detached(kl), teacher_detached(divergence), [hidden, weight, other], [True, True, True]
    ),
    "one_model": (one_model(kl), one_model(divergence), [hidden, weight, weight.flip(0)], [True, True, False]),
    "frozen_model": (
        lambda h, W, U: kl(h, W, h, U), lambda h, W, U: divergence(h, W, h, U), [hidden, weight, weight.flip(0)],
        [False, True, False],
    ),
    "head_is_hidden": (
        lambda W: lce(W, W, ALL), lambda W: F.cross_entropy(W @ W.T, ALL), [weight], [True]
    ),
    "head_is_hidden_none": (
        lambda W: lce(W, W, ALL, reduction="none"), lambda W: F.cross_entropy(W @ W.T, ALL, reduction="none"),
        [weight], [True],
    ),
    "target_is_head": (
        lambda h, W: lce(h, W, W), lambda h, W: F.cross_entropy(h @ W.T, W), [square, q], [True, False]
    ),
    "target_is_hidden": (
        lambda h, W: lce(h, W, h), lambda h, W: F.cross_entropy(h @ W.T, h), [q, square], [False, True]
    ),
    "bias_is_class_weight": (
        lambda h, W, b: lce(h, W, Y, linear_bias=b, weight=b),
        lambda h, W, b: textbook_cross_entropy(F.linear(h, W, b), Y, b), [hidden, weight, torch.rand(V)],
        [True, True, False],
    ),
    "bias_is_token_weight": (
        lambda h, W, b: lce(h, W, ALL, linear_bias=b, token_weight=b),
        lambda h, W, b: textbook_cross_entropy(F.linear(h, W, b), ALL, token_weight=b),
        [square, square.flip(0), torch.rand(V)], [True, True, False],
    ),
    "query_is_key": (
        lambda x: fastloss.linear_info_nce(x, x, normalize=False), lambda x: info_nce(x, x, False), [hidden], [True]
    ),
    "query_is_key_symmetric": (
        lambda x: fastloss.linear_info_nce(x, x, normalize=False, symmetric=True),
        lambda x: info_nce(x, x, False, True), [hidden], [True],
    ),
    "query_is_key_dense": (
        lambda x: fastloss.info_nce(x, x, symmetric=True), lambda x: info_nce(x, x, True, True), [hidden], [True]
    ),
    "teacher_is_student": (
        lambda x: fastloss.kl_div_with_logits(x, x.detach() * 2), lambda x: textbook_divergence(x, x.detach() * 2),
        [square], [True],
    ),
    "probs_are_logits": (
        lambda x: fastloss.topk_cross_entropy(x, ALL.expand(V, V), x.detach()),
        lambda x: F.cross_entropy(x, x.detach()), [q], [True],
    ),
}  # fmt: skip


def results(f: Loss, tensors: list[Tensor], learned: list[bool]) -> list[Tensor]:
    given = [t.clone().requires_grad_(wanted) for t, wanted in zip(tensors, learned, strict=True)]
    loss = f(*given)
    grads = torch.autograd.grad(loss.sum(), [t for t in given if t.requires_grad], allow_unused=True)
    return [loss.detach(), *(g for g in grads if g is not None)]


@pytest.mark.parametrize("name", CALLS)
def test_eager_and_compiled(name: str) -> None:
    ours, textbook, tensors, learned = CALLS[name]
    exact = [t.float() for t in results(textbook, [t.double() for t in tensors], learned)]
    torch.compiler.reset()
    for f in ours, torch.compile(ours, fullgraph=True, backend="aot_eager"):
        torch.testing.assert_close(results(f, tensors, learned), exact, rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("name", CALLS)
def test_exported(name: str, strict: bool) -> None:
    ours, textbook, tensors, learned = CALLS[name]

    class Loss(torch.nn.Module):
        def forward(self, *given: Tensor) -> Tensor:
            return ours(*given)

    torch.compiler.reset()
    given = tuple(t.clone().requires_grad_(wanted) for t, wanted in zip(tensors, learned, strict=True))
    try:
        program = torch.export.export(Loss(), given, strict=strict)
    except torch._dynamo.exc.UserError as error:
        if strict and torch.__version__.startswith("2.9") and "references tensors that are neither" in str(error):
            pytest.skip(f"torch {torch.__version__} exports no global tensor strictly")
        raise
    exact = textbook(*(t.double() for t in tensors)).float()
    torch.testing.assert_close(program.module()(*tensors), exact, rtol=2e-5, atol=2e-6)


def test_compiled_model_with_one_head() -> None:
    """Of two modules, as a model holds it, and given twice by who calls."""

    class Pair(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.student, self.teacher = torch.nn.Linear(H, V, bias=False), torch.nn.Linear(H, V, bias=False)
            self.teacher.weight = self.student.weight.requires_grad_(False)

        def forward(self, h: Tensor, u: Tensor) -> Tensor:
            return kl(h, self.student.weight, u, self.teacher.weight)

    model = Pair()
    W = model.student.weight
    calls: list[Loss] = [torch.compile(model, fullgraph=True, backend="aot_eager")]
    twice = torch.compile(lambda *given: kl(*given), fullgraph=True, backend="aot_eager")
    calls.append(lambda h, u: twice(h, W, u, W))
    exact = results(
        lambda h, u: divergence(h, W.double(), u, W.double()), [hidden.double(), other.double()], [True, False]
    )
    for f in calls:
        torch.compiler.reset()
        torch.testing.assert_close(results(f, [hidden, other], [True, False]), [t.float() for t in exact])
