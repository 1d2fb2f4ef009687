"""Losses of hidden states on every engine: the case tables, with logits that are a product, against the float64
textbook of all logits; then what is about the product: chunks, gradients that are not asked for, memory, dtypes."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from cases import CASES, LOSS_CASES, in_turn
from check import to
from linear_calls import ALL_CASES, ROWS, Call, H, assert_as_good_as_torch, head, results
from torch import Tensor

import fastloss
from fastloss.backends import native
from fastloss.linear import heads


@pytest.fixture(autouse=True)
def few_classes_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """What CPUs do with logits that are never written they do here with any number of them."""
    monkeypatch.setattr(native, "FEWEST_CLASSES", 0)


MEASURED = native._seconds  # before conftest.py hides it from tests
HOW = [(d, r) for d in (torch.float32, torch.bfloat16) for r in ("mean", "none")] + [(torch.float64, "sum")]


@pytest.mark.parametrize(("dtype", "reduction"), HOW, ids=str)
@pytest.mark.parametrize("case", ALL_CASES, ids=lambda case: case.name)
def test_case(engine, case, dtype, reduction, generator):
    per_row = case.function == "selective_log_softmax"
    if reduction == "none" and case.name in ("normalizer", "everything"):
        pytest.skip("a normalizer divides a mean or a sum")
    for N, V in in_turn(engine, ((3, 1), (16, 65), (17, 301)), ALL_CASES.index(case), dtype):
        call = Call(case, N, V, dtype, generator)
        upstream = case.upstream(N, generator) if per_row or reduction == "none" else None
        assert_as_good_as_torch(call, upstream, **({} if per_row else {"reduction": reduction}))


@pytest.mark.parametrize("V", [32000, 50257])
def test_real_vocabularies(engine, V, generator):
    for case in CASES[0], CASES[-1]:
        assert_as_good_as_torch(Call(case, 5, V, torch.float32, generator))


def test_chunks_change_nothing(engine, generator):
    """Neither losses nor gradients of hidden states, to the bit; the weight's only as sums in another order."""
    for case in ALL_CASES[:: 3 if engine in ("cuda:host", "triton:gpu") else 1]:
        call = Call(case, 40, 203, torch.float32, generator)
        upstream = case.upstream(40, generator)
        options = {} if case.function == "selective_log_softmax" else {"reduction": "none"}
        call.options.pop("normalizer", None)
        whole = results(call.ours, call.head, upstream, max_chunk_bytes=1 << 30, **options)
        for rows in 1, 12, 17, 39:
            got = results(call.ours, call.head, upstream, max_chunk_bytes=rows * 203 * 8, **options)
            if not engine.startswith("cpu"):  # whose products are a library's
                torch.testing.assert_close(got, whole, rtol=1e-5, atol=1e-6)
            else:
                assert torch.equal(got[0], whole[0]) and torch.equal(got[1], whole[1]), case.name
                torch.testing.assert_close(got[2:], whole[2:], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("asked", [(1, 0, 0), (0, 1, 0), (0, 0, 1), (1, 0, 1), (0, 1, 1)], ids=str)
def test_only_what_is_asked_for(engine, asked, generator, monkeypatch):
    """A frozen body or head costs no product, and gets no gradient."""
    for reduction, forward in ("mean", 1), ("none", 2):
        call = Call(CASES[1], 20, 101, torch.float32, generator)
        want = results(call.ours, call.head, None if reduction == "mean" else torch.ones(20), reduction=reduction)
        leaves = [t.clone().requires_grad_(bool(a)) for t, a in zip(call.head, asked, strict=True)]
        products = count_products(monkeypatch)
        call.ours(*leaves, reduction=reduction, max_chunk_bytes=1 << 30).sum().backward()
        assert products() == forward + asked[0] + asked[1]
        for leaf, grad, a in zip(leaves, want[1:], asked, strict=True):
            assert (leaf.grad is not None) == bool(a)
            if a:
                torch.testing.assert_close(leaf.grad, grad, rtol=1e-5, atol=1e-6)


def count_products(monkeypatch: pytest.MonkeyPatch) -> Callable[[], int]:
    """How many matrix products have been made since."""
    from fastloss import backends

    count = 0
    choose = backends.choose_for

    def counted(*request: Any) -> backends.Backend:
        backend = choose(*request)

        def matmul(*args: Any) -> None:
            nonlocal count
            count += 1
            backend.matmul(*args)

        def head_loss(*args: Any) -> Any:
            nonlocal count
            count += 1
            return backend.head_loss(*args)

        return backend._replace(matmul=matmul, head_loss=head_loss)

    monkeypatch.setattr(heads, "choose_for", counted)
    return lambda: count


def test_nothing_is_differentiated(engine, generator, monkeypatch):
    """Scoring takes one product."""
    for case in ALL_CASES:
        call = Call(case, 9, 101, torch.float32, generator)
        products = count_products(monkeypatch)
        with torch.no_grad():
            got = call.ours(*call.head, max_chunk_bytes=1 << 30)
        assert products() == (2 if case.objective.paired else 1)
        assert not got.requires_grad
        torch.testing.assert_close(got, call.textbook(*call.head), rtol=1e-4, atol=1e-5)


def test_rows_that_do_not_count_meet_no_product(generator):
    """Ignored, masked or weightless rows: whatever they hold, and with it the time that they would take."""
    for case in [CASES[1], LOSS_CASES[1], LOSS_CASES[13]]:
        call = Call(case, 12, 101, torch.float32, generator)
        dead = torch.tensor([0, 5, 6, 11])
        if case.objective.paired:
            call.options["mask"] = torch.ones(12, dtype=torch.bool).index_fill(0, dead, False)
        else:
            call.target[dead] = -100
        want = results(call.ours, call.head, None)
        call.head[0][dead] = torch.nan
        got = results(call.ours, call.head, None)
        for a, b in zip(got, want, strict=True):
            assert torch.equal(a, b), case.name
        assert (got[1][dead] == 0).all()


def test_all_rows_ignored(engine, generator):
    hidden, weight, bias = head(50, H, torch.float32, generator)
    y = torch.full((16,), -100)
    loss = lambda *t, **k: fastloss.linear_cross_entropy(*t[:2], y, linear_bias=t[2], **k)  # noqa: E731
    for reduction, value in ("mean", torch.nan), ("sum", 0.0):
        got = results(loss, [hidden, weight, bias], None, reduction=reduction)
        torch.testing.assert_close(got[0], torch.tensor(value), equal_nan=True)
        assert all((g == 0).all() for g in got[1:])
    empty = [t.clone().requires_grad_() for t in (hidden[:0], weight, bias)]
    fastloss.linear_cross_entropy(*empty[:2], y[:0], linear_bias=empty[2], reduction="sum").backward()
    assert empty[0].grad.shape == (0, H) and (empty[1].grad == 0).all() and (empty[2].grad == 0).all()


@pytest.mark.parametrize("upstream", [1.0, 0.25, -2.0, 0.0])
def test_upstream_gradients(engine, upstream, generator):
    for dtype in torch.float32, torch.float16:
        assert_as_good_as_torch(Call(CASES[1], 20, 101, dtype, generator), torch.tensor(upstream))


def test_leading_dimensions_and_strides(engine, generator):
    call = Call(CASES[1], 24, 101, torch.float32, generator)
    hidden, weight, bias = call.head
    want = results(call.ours, call.head, None)
    call.target = call.target.view(2, 3, 4)
    got = results(call.ours, [hidden.view(2, 3, 4, H), weight, bias], None)
    assert torch.equal(got[0], want[0]) and torch.equal(got[1].view(24, H), want[1])
    call.target = call.target.flatten()
    strided = [hidden.t().contiguous().t(), torch.cat([weight, weight], 1)[:, :H], bias.repeat_interleave(2)[::2]]
    leaves = [t.requires_grad_() for t in strided]
    loss = call.ours(*leaves)
    for a, b in zip((loss, *torch.autograd.grad(loss, leaves)), want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)


def test_class_probabilities_of_leading_dimensions(generator):
    hidden, weight, _ = head(50, H, torch.float64, generator, 6)
    q = torch.rand(2, 3, 50, generator=generator).double().softmax(-1)
    want = F.cross_entropy(F.linear(hidden, weight), q.view(6, 50))
    torch.testing.assert_close(fastloss.linear_cross_entropy(hidden.view(2, 3, H), weight, q), want)


@pytest.mark.parametrize("soft", [False, True], ids=["indices", "probabilities"])
def test_weight_of_more_dimensions(engine, soft, generator):
    """One classifier for each of d1 x d2 positions."""
    hidden, weight, bias = (torch.randn(s, generator=generator).double() for s in ((5, 7), (11, 2, 3, 7), (11, 2, 3)))
    y = torch.randint(11, (5, 2, 3), generator=generator)
    y[1] = -100
    y = torch.rand(5, 11, 2, 3, generator=generator).double().softmax(1) if soft else y
    options = {"label_smoothing": 0.1, "weight": torch.rand(11, generator=generator).double()}
    for reduction in "mean", "sum", "none":

        def textbook(h, w, b, reduction=reduction):
            logits = F.linear(h, w.reshape(-1, 7), b.reshape(-1)).reshape(5, 11, 2, 3)
            return F.cross_entropy(logits, y, reduction=reduction, **options)

        def ours(h, w, b, reduction=reduction):
            return fastloss.linear_cross_entropy(h, w, y, linear_bias=b, reduction=reduction, **options)

        upstream = torch.rand(5, 2, 3, generator=generator) if reduction == "none" else None
        got, want = (results(f, [hidden, weight, bias], upstream) for f in (ours, textbook))
        torch.testing.assert_close(got, want)


def test_stats(engine, generator):
    call = Call(CASES[1], 20, 101, torch.float64, generator)
    leaves = [t.clone().requires_grad_() for t in call.head]
    loss, stats = call.ours(*leaves, return_stats=True)
    logits = F.linear(*leaves)
    want, expected = fastloss.cross_entropy(logits, call.target, return_stats=True)
    torch.testing.assert_close((loss, *stats), (want, *expected))
    weights = [torch.rand(20, generator=generator, dtype=torch.float64) for _ in range(3)]
    got = torch.autograd.grad([loss, *stats[:3]], leaves, [torch.ones_like(loss), *weights])
    want = torch.autograd.grad([want, *expected[:3]], leaves, [torch.ones_like(loss), *weights])
    torch.testing.assert_close(got, want)


def test_selected_with_entropy(engine, generator):
    for shape in (9,), (9, 4):
        hidden, weight, bias = head(60, H, torch.float64, generator, 9)
        index = torch.randint(60, shape, generator=generator)

        def both(select, *args):
            log_prob, entropy = select(*args, return_entropy=True, temperature=1.3)
            return log_prob.sum(-1).flatten().sum() * 0.5 + (entropy * torch.arange(9)).sum()

        def ours(h, w, b, index=index):
            f = lambda *a, **k: fastloss.linear_selective_log_softmax(*a, linear_bias=b, **k)  # noqa: E731
            return both(f, h, w, index)

        def textbook(h, w, b, index=index):
            return both(fastloss.selective_log_softmax, F.linear(h, w, b), index)

        got, want = (results(f, [hidden, weight, bias], None) for f in (ours, textbook))
        torch.testing.assert_close(got, want)


@pytest.mark.parametrize("symmetric", [False, True])
def test_info_nce(engine, symmetric, generator):
    query, key = (torch.randn(20, 8, generator=generator, dtype=torch.float64) for _ in range(2))
    temperature = torch.tensor(0.3, dtype=torch.float64)
    negatives = None if symmetric else torch.randn(5, 8, generator=generator, dtype=torch.float64)

    def loss(f, **more):
        return lambda q, k, t: f(q, k, temperature=t, symmetric=symmetric, negatives=negatives, **more)

    got = results(loss(fastloss.linear_info_nce, max_chunk_bytes=3 * 20 * 8), [query, key, temperature], None)
    want = results(loss(fastloss.info_nce), [query, key, temperature], None)
    torch.testing.assert_close(got, want)
    half = torch.tensor([0.3])  # one element, of another dtype than the items
    for f in fastloss.linear_info_nce, fastloss.info_nce:
        close = f(query.bfloat16(), key.bfloat16(), temperature=half, symmetric=symmetric, out_dtype=torch.float64)
        assert abs(close - fastloss.info_nce(query, key, temperature=0.3, symmetric=symmetric)) < 0.05
    number = fastloss.linear_info_nce(query, key, temperature=0.3, symmetric=symmetric, negatives=negatives)
    torch.testing.assert_close(number, want[0])


def test_a_second_backward(engine, generator):
    call = Call(CASES[1], 20, 101, torch.float32, generator)
    leaves = [t.clone().requires_grad_() for t in call.head]
    loss = call.ours(*leaves)
    first = torch.autograd.grad(loss, leaves, retain_graph=True)
    kept = [g.clone() for g in first]
    for g in first:
        g.fill_(torch.nan)  # they are the caller's, to do with as he likes
    second = torch.autograd.grad(loss, leaves, torch.tensor(2.0))
    torch.testing.assert_close(second, tuple(2 * g for g in kept), rtol=1e-6, atol=1e-7)


def test_tied_embeddings(generator):
    """The weight of the head is that of the embedding as well."""
    tokens, y = (torch.randint(50, (12,), generator=generator) for _ in range(2))
    grads = []
    for loss in fastloss.linear_cross_entropy, lambda h, w, y: F.cross_entropy(F.linear(h, w), y):
        table = torch.nn.Embedding(50, 8, dtype=torch.float64)
        with torch.no_grad():
            table.weight.copy_(torch.arange(400).view(50, 8).sin())
        loss(table(tokens).tanh(), table.weight, y).backward()
        grads.append(table.weight.grad)
    torch.testing.assert_close(*grads)


def test_tied_embeddings_twice(generator):
    """Second derivatives: what reaches the table through the hidden states is counted once."""
    tokens, y = (torch.randint(7, (5,), generator=generator) for _ in range(2))
    table = torch.randn(7, 4, generator=generator, dtype=torch.float64).requires_grad_()
    for reduction in "mean", "none":

        def loss(table, f=fastloss.linear_cross_entropy, reduction=reduction):
            return f(table[tokens].tanh(), table, y, reduction=reduction)

        assert torch.autograd.gradgradcheck(loss, (table,))
        plain, graph = (torch.autograd.grad(loss(table).sum(), table, create_graph=c)[0] for c in (False, True))
        torch.testing.assert_close(plain, graph.detach())


def test_many_rows_of_float16(generator):
    """Where a probability over the number of rows is below float16's smallest, on backends that keep logits so."""
    hidden, weight, bias = head(2000, H, torch.float16, generator, 2048)
    y = torch.randint(2000, (2048,), generator=generator)
    loss = lambda *t: fastloss.linear_cross_entropy(*t[:2], y, linear_bias=t[2])  # noqa: E731
    want = results(lambda *t: F.cross_entropy(F.linear(*t), y), [t.double() for t in (hidden, weight, bias)], None)
    with fastloss.use_backend("reference"):
        got = results(loss, [hidden, weight, bias], torch.tensor(16384.0))
    for g, w in zip(got[1:], want[1:], strict=True):
        assert ((g.double() / 16384 - w).norm() / w.norm()) < 1e-3


@pytest.mark.no_launch
def test_nothing_to_take_the_mean_of(engine, generator):
    hidden, weight, _ = head(50, H, torch.float32, generator)
    q = torch.rand(0, 50)
    for target in torch.zeros(0, dtype=torch.int64), q:
        assert fastloss.linear_cross_entropy(hidden[:0], weight, target).isnan()
        assert fastloss.linear_cross_entropy(hidden[:0], weight, target, reduction="sum") == 0
    assert fastloss.linear_kl_div(hidden[:0], weight, hidden[:0], weight).isnan()


def test_no_features(generator):
    y = torch.tensor([0, 2, 4])
    got = fastloss.linear_cross_entropy(torch.zeros(3, 0), torch.randn(5, 0), y)
    torch.testing.assert_close(got, torch.tensor(5.0).log())


def test_a_bad_index_of_no_weight():
    for options in {"token_weight": torch.tensor([1.0, 1.0, 0.0])}, {"max_chunk_bytes": 1}:
        with pytest.raises(IndexError, match="Target 9 is out of bounds"):
            fastloss.linear_cross_entropy(torch.zeros(3, 4), torch.randn(5, 4), torch.tensor([1, 2, 9]), **options)


def test_autocast(generator):
    """Hidden states in bfloat16 meet a float32 weight as it is; the loss is float32, each gradient in its dtype."""
    hidden, weight, bias = head(301, H, torch.float32, generator)
    y = torch.randint(301, (16,), generator=generator)
    leaves = [hidden.bfloat16().requires_grad_(), weight.requires_grad_(), bias.requires_grad_()]
    with torch.autocast("cpu"):
        loss = fastloss.linear_cross_entropy(*leaves[:2], y, linear_bias=leaves[2])
    assert loss.dtype == torch.float32
    loss.backward()
    assert [t.grad.dtype for t in leaves] == [torch.bfloat16, torch.float32, torch.float32]
    exact = [t.detach().double().requires_grad_() for t in leaves]
    want = F.cross_entropy(F.linear(*exact), y)
    want.backward()
    torch.testing.assert_close(loss.double(), want, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(leaves[1].grad.double(), exact[1].grad, rtol=1e-4, atol=1e-6)


def test_sums_of_16_bit_gradients_are_float32(generator):
    """Against gradients that are rounded after each chunk: their error grows with their number, ours does not."""
    call = Call(CASES[0], 512, 65, torch.bfloat16, generator)
    exact = results(call.textbook, [t.double() for t in call.head], None, reduction="sum")[2]
    ours = results(call.ours, call.head, None, reduction="sum")[2]
    rounded = torch.zeros_like(ours)
    for part in range(0, 512, ROWS):
        some = Call(CASES[0], 512, 65, torch.bfloat16, generator)
        some.head = [call.head[0][part : part + ROWS], *call.head[1:]]
        some.target = call.target[part : part + ROWS]
        rounded += results(some.ours, some.head, None, reduction="sum")[2]
    scale = exact.abs().max()
    worst = [((g.double() - exact).abs().max() / scale).item() for g in (ours, rounded)]
    assert worst[0] < worst[1] / 2, worst


def test_second_derivatives(generator):
    for case in CASES[1], CASES[4], LOSS_CASES[0], LOSS_CASES[12], LOSS_CASES[-1]:
        call = Call(case, 4, 11, torch.float64, generator)
        call.options = {k: to(v, torch.float64) for k, v in call.options.items()}
        leaves = [t.requires_grad_() for t in call.head]
        assert torch.autograd.gradcheck(call.ours, leaves)
        assert torch.autograd.gradgradcheck(call.ours, leaves)


def test_functional_transforms(generator):
    for case in CASES[1], LOSS_CASES[0]:
        call = Call(case, 4, 11, torch.float64, generator)
        got = torch.func.grad(call.ours, (0, 1, 2))(*call.head)
        torch.testing.assert_close(list(got), results(call.ours, call.head, None)[1:])
        value, tangent = torch.func.jvp(call.ours, tuple(call.head), tuple(torch.ones_like(t) for t in call.head))
        want = torch.func.jvp(call.textbook, tuple(call.head), tuple(torch.ones_like(t) for t in call.head))
        torch.testing.assert_close((value, tangent), want)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of torch._dynamo's own
@pytest.mark.parametrize("case", [CASES[1], CASES[14], *LOSS_CASES[::4], LOSS_CASES[-1]], ids=lambda case: case.name)
def test_compiles_in_one_graph(case, generator):
    call = Call(case, 9, 64, torch.float32, generator)
    torch._dynamo.reset()  # it counts how often a function was compiled
    for reduction in ("none",) if case.function == "selective_log_softmax" else ("mean", "none"):
        more = {} if case.function == "selective_log_softmax" else {"reduction": reduction}
        upstream = case.upstream(9, generator) if reduction == "none" else torch.tensor(0.5)
        compiled = torch.compile(call.ours, fullgraph=True, backend="aot_eager")
        got, want = (results(f, call.head, upstream, **more) for f in (compiled, call.ours))
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)


def test_operators_are_torchs(generator):
    """opcheck: schema, fake tensors, dynamic shapes."""
    from fastloss.linear import rows
    from fastloss.spec import Rows, make_spec

    made = heads.Head(*head(31, H, torch.float32, generator))
    y = torch.randint(31, (16,), generator=generator)
    given = heads.LinearRows(Rows(heads.stand_in(made), y, None, make_spec()), made, None, 5, 1 << 20)
    flat = rows.flat(given)
    tests = ("test_schema", "test_faketensor")
    for needs in [True, True, True], [False, True, False]:
        torch.library.opcheck(torch.ops.fastloss.linear_loss, (*flat, None, torch.tensor(3.0), needs), test_utils=tests)
    for extras in False, True:
        torch.library.opcheck(torch.ops.fastloss.linear_row_loss, (*flat, extras), test_utils=tests)
    stats = torch.ops.fastloss.linear_row_loss(*flat, True)[1]
    upstream = [torch.rand(16, generator=generator), None, None, None]
    torch.library.opcheck(
        torch.ops.fastloss.linear_row_grad, (*flat, stats, upstream, [True, True, True]), test_utils=tests
    )


def test_checkpointing(generator):
    from torch.utils.checkpoint import checkpoint

    call = Call(CASES[1], 20, 101, torch.float32, generator)
    want = results(call.ours, call.head, None)
    got = results(lambda *t: checkpoint(call.ours, *t, use_reentrant=False), call.head, None)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)


def test_module(generator):
    module = fastloss.LinearCrossEntropyLoss(H, 50, bias=True, label_smoothing=0.1, z_loss=1e-3)
    hidden, y = torch.randn(6, H, generator=generator), torch.randint(50, (6,), generator=generator)
    want = fastloss.cross_entropy(module.linear(hidden), y, label_smoothing=0.1, z_loss=1e-3)
    torch.testing.assert_close(module(hidden, y), want)
    assert set(module.state_dict()) == {"linear.weight", "linear.bias"}
    deep = fastloss.LinearCrossEntropyLoss(H, 5, out_features=(3,))
    y = torch.randint(5, (6, 3), generator=generator)
    want = F.cross_entropy(deep.linear(hidden).view(6, 5, 3), y)
    torch.testing.assert_close(deep(hidden, y), want)


def test_language_model_recipes(generator):
    """fastloss.lm from hidden states: what it gives from their logits."""
    hidden, weight, bias = head(50, H, torch.float64, generator, 24)
    hidden, labels = hidden.view(2, 12, H), torch.randint(50, (2, 12), generator=generator)
    labels[0, 3] = -100
    logits, of_head = F.linear(hidden, weight, bias), {"linear_weight": weight, "linear_bias": bias}
    lm = fastloss.lm
    for loss in lm.causal_lm_loss, lm.masked_lm_loss, lm.sequence_cross_entropy, lm.sequence_log_likelihood:
        torch.testing.assert_close(loss(hidden, labels, **of_head), loss(logits, labels))
    scores = [lm.Perplexity(), lm.Perplexity()]
    scores[0].update(hidden, labels, **of_head)
    scores[1].update(logits, labels)
    torch.testing.assert_close(scores[0].compute(), scores[1].compute())
    with pytest.raises(TypeError, match="linear_bias: expected linear_weight"):
        lm.causal_lm_loss(hidden, labels, linear_bias=bias)


class Allocations:
    """Bytes of what is made to be written by kernels and products, but for gradients of the dtypes given."""

    def __init__(self, *gradients: tuple[tuple[int, ...], torch.dtype]) -> None:
        self.gradients, self.now, self.peak = gradients, 0, 0
        self.original = native.empty

    def empty(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        made = self.original(shape, dtype)
        if (tuple(shape), dtype) not in self.gradients:
            self.now += made.nbytes
            self.peak = max(self.peak, self.now)
            weakref.finalize(made, self._free, made.nbytes)
        return made

    def _free(self, nbytes: int) -> None:
        self.now -= nbytes


@pytest.mark.parametrize("of", ["mean", "none", "weight", "hidden"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("N", "V"), [(64, 5000), (512, 5000), (9000, 40), (64, 20000), (512, 20000), (300, 2600)])
def test_memory_is_that_of_a_chunk(N, V, dtype, of, monkeypatch):
    """Beyond inputs and gradients, whatever N and V are: also of the float32 sums of 16-bit gradients."""
    hidden, weight = (torch.randn(n, 32).to(dtype) for n in (N, V))
    inputs = [t.requires_grad_() for t in {"weight": [weight], "hidden": [hidden]}.get(of, [hidden, weight])]
    made = Allocations(*((t.shape, dtype) for t in inputs))
    monkeypatch.setattr(native, "empty", made.empty)
    options = {"max_chunk_bytes": 1 << 20, "reduction": of if of == "none" else "mean"}
    loss = fastloss.linear_cross_entropy(hidden, weight, torch.zeros(N, dtype=torch.int64), **options)
    loss.sum().backward()
    assert 1 << 15 < made.peak <= 1 << 20


@pytest.mark.parametrize("case", ALL_CASES[::3], ids=lambda case: case.name)
def test_16_bit_heads_in_one_piece(engine, case, generator):
    """The other cases' sums are of blocks; here there is memory enough for all."""
    call = Call(case, 16, 65, torch.bfloat16, generator)
    upstream = case.upstream(16, generator) if case.function == "selective_log_softmax" else None
    assert_as_good_as_torch(call, upstream, max_chunk_bytes=1 << 20)


@pytest.mark.parametrize("case", ALL_CASES, ids=lambda case: case.name)
@pytest.mark.parametrize("limit", [{}, {"max_chunk_bytes": 1 << 20}])
def test_products_of_the_library(case, limit, generator, monkeypatch):
    """As where AMX multiplies 16-bit numbers: logits are rounded, what is made of them is as good as torch's."""
    monkeypatch.setattr(native, "library_multiplies", lambda dtype: dtype.itemsize == 2)
    call = Call(case, 16, 65, torch.bfloat16, generator)
    upstream = case.upstream(16, generator) if case.function == "selective_log_softmax" else None
    assert_as_good_as_torch(call, upstream, **limit)
    said = fastloss.explain(torch.randn(6, H).bfloat16(), torch.arange(6), linear_weight=call.head[1])
    assert "by torch's matmul, in bfloat16" in said and "likewise" in said


@pytest.mark.parametrize(("own", "library", "chosen"), [(3.0, 1.0, True), (1.0, 1.0, False)])
def test_the_library_multiplies_where_it_is_faster(own, library, chosen, monkeypatch):
    seconds = {native._matmul: own, native.products.matmul: library}
    monkeypatch.setattr(native, "_seconds", lambda multiply, *_: seconds[multiply])
    assert not native.library_multiplies(torch.bfloat16) or native._has_tiles()
    monkeypatch.setattr(native, "_has_tiles", lambda: True)
    assert native.library_multiplies(torch.bfloat16) is chosen and not native.library_multiplies(torch.float32)
    assert MEASURED(native._matmul, torch.bfloat16, torch.float32) > 0


BAD = {
    "linear_weight: expected linear_weight with dimensionality": lambda h, w, y: (h, w[0], y, {}),
    "linear_weight: expected equal input and linear_weight last": lambda h, w, y: (h, w[:, 1:], y, {}),
    "linear_bias: expected linear_bias shape": lambda h, w, y: (h, w, y, {"linear_bias": w[:3, 0]}),
    "linear_weight: expected input's dtype": lambda h, w, y: (h, w.double(), y, {}),
    "input: expected input with dimensionality": lambda h, w, y: (h[0, 0], w, y, {}),
    "argument 'linear_weight' must be Tensor": lambda h, w, y: (h, w.tolist(), y, {}),
    "input: expected a strided tensor in float32": lambda h, w, y: (h.long(), w, y, {}),
    "max_chunk_bytes: expected": lambda h, w, y: (h, w, y, {"max_chunk_bytes": 0}),
    "Expected input batch_size": lambda h, w, y: (h, w, y[1:], {}),
    "target: expected shape": lambda h, w, y: (h.view(2, 3, -1), w, y.view(3, 2), {}),
    "out of bounds": lambda h, w, y: (h, w, y + 50, {}),
    "token_weight: expected shape": lambda h, w, y: (h, w, y, {"token_weight": torch.ones(5)}),
    "normalizer: expected reduction": lambda h, w, y: (h, w, y, {"normalizer": 2, "reduction": "none"}),
    "reduction: 'all'": lambda h, w, y: (h, w, y, {"reduction": "all"}),
    "requires batched input": lambda h, w, y: (h[0], w[:, None], y, {}),
    "ignore_index cannot be specified": lambda h, w, y: (h, w, torch.rand(6, 50), {"ignore_index": 1}),
}


@pytest.mark.parametrize("message", BAD)
def test_bad_input(message):
    h, w = torch.randn(6, H), torch.randn(50, H)
    *args, options = BAD[message](h, w, torch.arange(6))
    with pytest.raises((RuntimeError, ValueError, TypeError, IndexError, NotImplementedError), match=message):
        fastloss.linear_cross_entropy(*args, **options)


def test_bad_teachers():
    h, w = torch.randn(6, H), torch.randn(50, H)
    with pytest.raises(RuntimeError, match="target_linear_weight: expected equal input"):
        fastloss.linear_kl_div(h, w, h, w[:, 1:])
    with pytest.raises(ValueError, match="target_input and target_linear_weight: logits: expected shape"):
        fastloss.linear_kl_div(h, w, h, w[1:])
    with pytest.raises(TypeError, match="neither weight nor label_smoothing"):
        fastloss.linear_topk_kl_div(h, w, torch.zeros(6, 2).long(), torch.rand(6, 2), weight=torch.ones(50))


def test_explain_says_who_makes_the_logits():
    h, w, y = torch.randn(6, H).bfloat16(), torch.randn(50, H).bfloat16(), torch.arange(6)
    said = fastloss.explain(h, y, linear_weight=w)
    assert "its own products, summed in float32" in said and "scoring    without logits in memory" in said
    with fastloss.use_backend("reference"):
        lines = fastloss.explain(h, y, linear_weight=w).splitlines()[-3:]
        assert lines[0].endswith("some rows at a time by torch's matmul, in bfloat16")
        assert lines[1:] == ["   scoring    likewise", "   filter_eps no effect: the gradient is exact"]
    assert "logits  " not in fastloss.explain(h, y)


def _rank(rank: int, file: str) -> None:
    """Half of the rows on each of two ranks; every gradient is that of all rows."""
    import torch.distributed as dist

    dist.init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=2)
    try:
        torch.manual_seed(0)
        body, loss = torch.nn.Linear(8, H), fastloss.LinearCrossEntropyLoss(H, 50, bias=True)
        x, y = torch.randn(12, 8), torch.randint(50, (12,))
        model = torch.nn.ModuleDict({"body": body, "loss": loss})
        model.forward = lambda x, y: loss(body(x), y)  # type: ignore[method-assign]
        want = torch.autograd.grad(F.cross_entropy(loss.linear(body(x)), y), list(model.parameters()))
        replica = torch.nn.parallel.DistributedDataParallel(model)
        replica(x[rank::2], y[rank::2]).backward()
        torch.testing.assert_close([p.grad for p in model.parameters()], list(want), rtol=1e-4, atol=1e-6)
    finally:
        dist.destroy_process_group()


def test_data_parallel(tmp_path):
    torch.multiprocessing.spawn(_rank, (str(tmp_path / "store"),), nprocs=2)
