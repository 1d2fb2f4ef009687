"""Fake tensors and tensors on the meta device: what losses and gradients are like, without their numbers."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from cases import Case
from linear_calls import ALL_CASES, Call, H, head
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import _disable_current_modes

import fastloss

N, V = 6, 37
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
WHOLE = 1 << 20  # max_chunk_bytes in which a 16-bit head's gradient is summed in one piece; the cases' own takes blocks
Fakes = Callable[[Any], Any]


@pytest.fixture(params=["cpu", "meta", "cuda"])
def fakes(request: pytest.FixtureRequest) -> Iterator[Fakes]:
    """Everything in tensors without numbers: under FakeTensorMode, or on the meta device. A torch without CUDA has fake
    tensors of it, but cannot differentiate them: those are losses alone."""
    if request.param == "cuda" and torch.backends.cuda.is_built() and not torch.cuda.is_available():
        pytest.skip("this torch asks the driver about fake tensors, and there is none")
    mode = torch.enable_grad() if request.param == "meta" else FakeTensorMode()

    def made(t: Any) -> Any:
        if isinstance(t, (list, tuple)):
            return type(t)(map(made, t))
        if isinstance(t, dict):
            return {name: made(value) for name, value in t.items()}
        return torch.empty(t.shape, dtype=t.dtype, device=request.param) if isinstance(t, Tensor) else t

    with mode, torch.set_grad_enabled(request.param != "cuda" or torch.backends.cuda.is_built()):
        yield made


def check(loss: Callable[..., Tensor], leaves: list[Tensor], shape: tuple[int, ...], dtype: torch.dtype) -> None:
    """Shapes, dtypes, devices, and that nothing became a real tensor on the way: of the loss and of its gradients."""
    if torch.is_grad_enabled():
        leaves = [t.requires_grad_() for t in leaves]
    value = loss(*leaves)
    assert (tuple(value.shape), value.dtype) == (shape, dtype)
    found = [(value, leaves[0])]
    if torch.is_grad_enabled():
        for _ in range(2):  # the first gives its gradients away
            grads = torch.autograd.grad(value.sum() * 0.5, leaves, retain_graph=True)
            found += zip(grads, leaves, strict=True)
        assert [(g.shape, g.dtype) for g in grads] == [(t.shape, t.dtype) for t in leaves]
    for made, given in found:
        assert made.device == given.device and isinstance(made, FakeTensor) == isinstance(given, FakeTensor)


def skip_without_views() -> None:
    if not torch.is_grad_enabled():
        pytest.skip("a torch without CUDA cannot take views of fake tensors of it")


def reductions(case: Case) -> list[str]:
    if case.function == "selective_log_softmax":
        return ["none"]
    return ["mean", "sum"] if case.name in ("normalizer", "everything") else ["mean", "sum", "none"]


def expected(case: Case, reduction: str, dtype: torch.dtype) -> tuple[tuple[int, ...], torch.dtype]:
    if case.function == "selective_log_softmax":
        return (N, case.picks), torch.float32
    return (N,) if reduction == "none" else (), dtype


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
@pytest.mark.parametrize("case", ALL_CASES, ids=lambda case: case.name)
def test_logits(case: Case, dtype: torch.dtype, fakes: Fakes) -> None:
    g = torch.Generator().manual_seed(0)
    x, y, options = fakes(real(lambda: case.inputs(N, V, dtype, g)))
    for reduction in reductions(case):
        more = {} if case.function == "selective_log_softmax" else {"reduction": reduction}
        check(lambda x, more=more: case.loss()(x, y, **options, **more), [x], *expected(case, reduction, dtype))


def real(make: Callable[[], Any]) -> Any:
    """Numbers, whatever mode is on."""
    with _disable_current_modes():
        return make()


HEADS = [(torch.float32, {}), (torch.bfloat16, {}), (torch.bfloat16, {"max_chunk_bytes": WHOLE}), (torch.float16, {})]


@pytest.mark.parametrize(("dtype", "limit"), HEADS, ids=str)
@pytest.mark.parametrize("case", ALL_CASES, ids=lambda case: case.name)
def test_hidden_states(case: Case, dtype: torch.dtype, limit: dict[str, int], fakes: Fakes) -> None:
    g = torch.Generator().manual_seed(0)
    call = real(lambda: Call(case, N, V, dtype, g))
    call.target, call.options, call.head = fakes(call.target), fakes(call.options), fakes(call.head)
    for reduction in reductions(case):
        more = {} if case.function == "selective_log_softmax" else {"reduction": reduction}
        check(lambda *t, more=more: call.ours(*t, **limit, **more), call.head, *expected(case, reduction, dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_statistics(dtype: torch.dtype, fakes: Fakes) -> None:
    skip_without_views()
    g = torch.Generator().manual_seed(0)
    hidden, weight, bias = fakes(real(lambda: head(V, H, dtype, g, N)))
    y, logits = fakes(real(lambda: (torch.zeros(N, dtype=torch.int64), torch.randn(N, V).to(dtype))))

    def total(loss: Tensor, stats: Any) -> Tensor:
        assert stats.argmax.dtype == torch.int64 and stats.argmax.shape == (N,)
        return loss.sum() + stats.lse.sum() + stats.log_prob.sum() + stats.entropy.sum()

    def of_hidden(h: Tensor, w: Tensor, b: Tensor) -> Tensor:
        return total(*fastloss.linear_cross_entropy(h, w, y, linear_bias=b, return_stats=True))

    check(lambda x: total(*fastloss.cross_entropy(x, y, return_stats=True)), [logits], (), torch.float32)
    check(of_hidden, [hidden, weight, bias], (), torch.float32)

    def both(log_prob: Tensor, entropy: Tensor) -> Tensor:
        return log_prob.sum() + entropy.sum()

    entropy = {"return_entropy": True}
    check(lambda x: both(*fastloss.selective_log_softmax(x, y, **entropy)), [logits], (), torch.float32)
    select = fastloss.linear_selective_log_softmax
    check(lambda h, w: both(*select(h, w, y, **entropy)), [hidden, weight], (), torch.float32)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_pointers_and_pairs(dtype: torch.dtype, reduction: str, fakes: Fakes) -> None:
    skip_without_views()
    B, T, S = 2, 3, 5

    def inputs() -> list[Tensor]:
        return [torch.randn(B, T, V).to(dtype), torch.randn(B, T).to(dtype), torch.rand(B, T, S).to(dtype)]

    source, target = fakes(real(lambda: [torch.zeros(B, S, dtype=torch.int64), torch.ones(B, T, dtype=torch.int64)]))
    generator = fastloss.pointer_generator_nll
    nll = lambda *t: generator(*t, source, target, reduction=reduction, coverage_weight=0.5)  # noqa: E731
    check(nll, fakes(real(inputs)), (B, T) if reduction == "none" else (), dtype)
    pairs = fakes(real(lambda: [torch.randn(N, H).to(dtype) for _ in range(2)]))
    shape = (N,) if reduction == "none" else ()
    for loss in fastloss.info_nce, fastloss.linear_info_nce:
        for symmetric in False, True:
            made = lambda q, k, f=loss, s=symmetric: f(q, k, symmetric=s, reduction=reduction)  # noqa: E731
            check(made, pairs, shape, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_language_models(dtype: torch.dtype, fakes: Fakes) -> None:
    skip_without_views()
    lm, B, T = fastloss.lm, 2, 7
    labels, mask = fakes(real(lambda: [torch.zeros(B, T, dtype=torch.int64), torch.ones(B, T, dtype=torch.int64)]))
    logits, hidden, weight = fakes(real(lambda: [torch.randn(s).to(dtype) for s in ((B, T, V), (B, T, H), (V, H))]))
    for loss, options, shape, out in (
        (lm.causal_lm_loss, {"attention_mask": mask}, (), dtype),
        (lm.masked_lm_loss, {}, (), dtype),
        (lm.sequence_cross_entropy, {"mask": mask}, (), dtype),
        (lm.sequence_log_likelihood, {"mask": mask}, (B,), torch.float32),
    ):
        check(lambda x, f=loss, o=options: f(x, labels, **o), [logits], shape, out)
        of_head = lambda h, w, f=loss, o=options: f(h, labels, linear_weight=w, **o)  # noqa: E731
        check(of_head, [hidden, weight], shape, out)


@pytest.mark.parametrize("device", ["cpu", "cuda", "meta", "xpu"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gradients_of_the_operators(dtype: torch.dtype, device: str) -> None:
    """Without autograd, also of devices that this torch was not built for."""
    from fastloss.linear import heads, rows
    from fastloss.spec import Rows, make_spec

    with FakeTensorMode(), torch.no_grad():
        sizes = (N, H), (V, H), (V,)
        of = heads.Head(*(torch.empty(s, dtype=dtype, device=device) for s in sizes))
        y = torch.empty(N, dtype=torch.int64, device=device)
        given = heads.LinearRows(Rows(heads.stand_in(of), y, None, make_spec()), of, None, 5, 1 << 20)
        for needs in [True] * 3, [False, True, False]:
            call = *rows.flat(given), None, None, needs
            loss, *made = torch.ops.fastloss.linear_loss(*call)
            grads = torch.ops.fastloss.linear_loss_grad(*call, made, torch.empty((), device=device))
            assert {t.device.type for t in (loss, *made, *grads)} == {device}
            want = [(torch.Size(s if n else (0,)), dtype) for s, n in zip(sizes, needs, strict=True)]
            assert [(g.shape, g.dtype) for g in grads] == want
