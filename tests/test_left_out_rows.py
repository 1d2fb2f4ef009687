"""Rows that no one reads: ignored, masked, of no weight, or of no upstream gradient. Whatever they hold, here NaN and
infinities, the others' results are those of the others alone, and what they give to any gradient is exactly zero."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from copy import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from cases import TOLERANCE, Case
from check import error, to
from engines import ISAS, ONE_OF_EACH, on_engine
from linear_calls import ALL_CASES, Call
from ranks import ranks
from torch import Tensor

import fastloss
from fastloss import VocabShard
from fastloss.backends import native
from fastloss.linear import blocks, chunks
from fastloss.linear.heads import LinearRows

N, V = 9, 70
WAYS = ("ignored", "weight", "upstream")
NORMALIZED = ("normalizer", "everything")  # which are not for reduction="none"


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def on_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody may wait for a number of rows."""
    monkeypatch.setattr(chunks, "may_wait_for", lambda device: False)


def of_no_one(g: torch.Generator) -> Tensor:
    unread = torch.rand(N, generator=g) < 0.5
    unread[0], unread[1] = True, False
    return unread


def spoilt(x: Tensor, rows: Tensor) -> Tensor:
    """With NaN in some rows, and infinities in the first of them."""
    x = x.clone()
    x[rows] = torch.nan
    x[rows.nonzero()[0], :3] = torch.inf
    return x


class Spoilt:
    """A call of the table whose `unread` rows hold NaN and are read by no one, for one of WAYS; and of the others
    alone."""

    def __init__(self, case: Case, way: str, dtype: torch.dtype, g: torch.Generator, dense: bool) -> None:
        self.dense, self.case = dense, case
        call, self.unread = Call(case, N, V, dtype, g), of_no_one(g)
        options, selective = call.options, case.function == "selective_log_softmax"
        counts, shape = ~self.unread, (N, case.picks) if selective else (N,)
        self.upstream = torch.rand(shape, generator=g) + 0.1
        self.alone = copy(call)
        if way == "ignored":
            call.target = call.target.clone()
            call.target[self.unread] = options.get("ignore_index", -100)
        if way == "weight" and selective:
            call.options = options = {**options, "row_mask": counts}
        elif way == "weight":
            weight = options.get("token_weight", torch.ones(N))
            call.options = options = {**options, "token_weight": torch.where(counts, weight, 0)}
        if way == "upstream":
            self.upstream[self.unread] = 0
        self.call = self._spoil(call)
        self.alone.options = {k: self._some(k, v) for k, v in self.alone.options.items()}
        self.alone.target = self._some("target", self.alone.target)
        self.alone.head = [call.head[0][counts], *call.head[1:]]

    def _some(self, name: str, value: Any) -> Any:
        if isinstance(value, list):
            return [value[0][~self.unread], *value[1:]]
        by_row = name in ("token_weight", "mask", "probs", "target")
        return value[~self.unread] if by_row and isinstance(value, Tensor) else value

    def _spoil(self, call: Call) -> Call:
        call = copy(call)
        call.head = [spoilt(call.head[0], self.unread), *call.head[1:]]
        if isinstance(call.target, list):
            call.target = [spoilt(call.target[0], self.unread), *call.target[1:]]
        elif call.target.is_floating_point():
            call.target = spoilt(call.target, self.unread)
        if "probs" in call.options:
            call.options = {**call.options, "probs": spoilt(call.options["probs"], self.unread)}
        return call

    def run(
        self, loss: Callable[..., Tensor], call: Call, reduction: str, upstream: Tensor, **more: Any
    ) -> list[Tensor]:
        """The loss and the gradients of what it is differentiable in: logits, or hidden states, weight and bias."""
        options = {} if self.case.function == "selective_log_softmax" else {"reduction": reduction}
        inputs = [F.linear(*call.head)] if self.dense else call.head
        inputs = [t.detach().clone().requires_grad_() for t in inputs]
        create_graph = more.pop("create_graph", False)
        found = loss(*inputs, **options, **more)
        g = upstream if reduction == "none" else torch.tensor(2.0)
        return [found.detach(), *torch.autograd.grad(found, inputs, g.to(found.dtype), create_graph=create_graph)]

    def ours(self, reduction: str, **more: Any) -> list[Tensor]:
        call = self.call
        if not self.dense:
            return self.run(call.ours, call, reduction, self.upstream, **more)
        target = F.linear(*call.target) if isinstance(call.target, list) else call.target
        loss = lambda x, **options: self.case.loss()(x, target, **call.options, **options)  # noqa: E731
        return self.run(loss, call, reduction, self.upstream, **more)

    def textbook(self, reduction: str) -> list[Tensor]:
        """In float64, of the others alone."""
        call = copy(self.alone)
        call.head, call.target = [t.double() for t in call.head], to(call.target, torch.float64)
        if isinstance(call.target, list):
            call.target = [t.double() for t in call.target]
        target = F.linear(*call.target) if isinstance(call.target, list) else call.target
        dense = lambda x, **more: self.case.oracle(  # noqa: E731
            x, target, **{k: to(v, torch.float64) for k, v in call.options.items()}, **more
        )
        return self.run(dense if self.dense else call.textbook, call, reduction, self.upstream[~self.unread])

    def check(self, reduction: str, **more: Any) -> None:
        loss, by_row, *others = self.ours(reduction, **more)
        want_loss, want_by_row, *want_others = self.textbook(reduction)
        assert not by_row[self.unread].any(), "a row that no one reads has a gradient"
        loss = loss[~self.unread] if reduction == "none" else loss
        got, want = [loss, by_row[~self.unread], *others], [want_loss, want_by_row, *want_others]
        for a, t in zip(got, want, strict=True):
            found = error(a, t, 1.0 / N)
            assert found <= 40 * TOLERANCE[a.dtype], f"{self.case.name} {reduction} {found:.2e}"


def reductions(case: Case, way: str) -> tuple[str, ...]:
    if way == "upstream" or case.function == "selective_log_softmax":
        return ("none",)
    return ("mean", "sum") if case.name in NORMALIZED else ("none", "mean", "sum")


def takes(case: Case, way: str) -> bool:
    if way == "upstream" and case.name in NORMALIZED:
        return False
    return way != "ignored" or case.objective.indexed


def every_case(**more: Any) -> Iterator[None]:
    for case in ALL_CASES:
        for way in WAYS:
            if takes(case, way):
                yield case, way


BY_NAME = pytest.mark.parametrize(("case", "way"), [pytest.param(c, w, id=f"{c.name}-{w}") for c, w in every_case()])


@BY_NAME
def test_dense(engine, case, way, generator):
    for reduction in reductions(case, way):
        Spoilt(case, way, torch.float32, generator, dense=True).check(reduction)


@BY_NAME
@pytest.mark.parametrize("backend", [*ISAS[:1], *ONE_OF_EACH[1:]])
def test_linear(backend, case, way, generator):
    with on_engine(backend):
        for reduction in reductions(case, way):
            Spoilt(case, way, torch.float32, generator, dense=False).check(reduction)


@BY_NAME
@pytest.mark.parametrize("backend", ONE_OF_EACH)
def test_linear_on_a_device(backend, on_device, case, way, generator):
    with on_engine(backend):
        for reduction in reductions(case, way):
            Spoilt(case, way, torch.float32, generator, dense=False).check(reduction)


@BY_NAME
def test_by_formulas(case, way, generator):
    """create_graph=True: gradients as differentiable functions of all logits."""
    for dense in True, False:
        for reduction in reductions(case, way):
            Spoilt(case, way, torch.float32, generator, dense).check(reduction, create_graph=True)


@BY_NAME
def test_shard(case, way, generator):
    """All classes in one part, on this rank alone."""
    for dense in True, False:
        for reduction in reductions(case, way):
            Spoilt(case, way, torch.float32, generator, dense).check(reduction, shard=VocabShard(0, V, V))


@pytest.mark.parametrize("device", [False, True])
@BY_NAME
def test_in_blocks_of_classes(device, case, way, monkeypatch, generator):
    """The weight's gradient a block of classes at a time: 64, and what is left."""
    if device:
        monkeypatch.setattr(chunks, "may_wait_for", lambda device: False)
    monkeypatch.setattr(blocks, "needed", lambda given, needs: needs[1])
    monkeypatch.setattr(blocks, "sum_bytes", lambda head, of: 80)
    for reduction in reductions(case, way):
        Spoilt(case, way, torch.float32, generator, dense=False).check(reduction, max_chunk_bytes=2 * 64 * 80)


# ---- statistics ------------------------------------------------------------------------------------------------------


def stats_textbook(x: Tensor, y: Tensor) -> list[Tensor]:
    """(lse, log_prob, entropy) of logits and class indices (N,) or (N, K)."""
    log_p = x.log_softmax(-1)
    chosen = log_p.gather(-1, y if y.dim() == 2 else y[:, None])
    return [x.logsumexp(-1), chosen if y.dim() == 2 else chosen[:, 0], -(log_p.exp() * log_p).sum(-1)]


class Stats:
    """Rows of which some are left out, and functions whose statistics are to be those of the others alone."""

    def __init__(self, g: torch.Generator, K: int = 0, masked: bool = False) -> None:
        self.unread = of_no_one(g)
        hidden, weight = torch.randn(N, 20, generator=g), torch.randn(V, 20, generator=g) / 3
        self.y = torch.randint(V, (N, K) if K else (N,), generator=g)
        self.hidden, self.weight, self.spoilt = hidden, weight, spoilt(hidden, self.unread)
        self.target, self.mask = self.y.clone(), {"row_mask": ~self.unread} if masked else {}
        if not masked:
            self.target[self.unread] = -100

    def calls(self, dense: bool, K: int, targetless: bool, shard: Any) -> Iterator[Callable[[Tensor, Tensor], Any]]:
        """(hidden states, weight) -> what is wanted of {lse, log_prob, entropy} as a dict, and integers."""
        more = {**self.mask, "shard": shard}

        def selective(h: Tensor, w: Tensor) -> dict[str, Tensor]:
            if dense:
                log_prob, entropy = fastloss.selective_log_softmax(h @ w.t(), self.target, return_entropy=True, **more)
            else:
                log_prob, entropy = fastloss.linear_selective_log_softmax(
                    h, w, self.target, return_entropy=True, max_chunk_bytes=4 * V * 4, **more
                )
            return {"log_prob": log_prob, "entropy": entropy}

        def row_stats(h: Tensor, w: Tensor) -> dict[str, Tensor]:
            s = fastloss.row_stats(h @ w.t(), None if targetless else self.target, **more)
            found = {"lse": s.lse, "log_prob": s.log_prob, "entropy": s.entropy, "argmax": s.argmax, "rank": s.rank}
            return {k: v for k, v in found.items() if v is not None}

        def cross_entropy(h: Tensor, w: Tensor) -> dict[str, Tensor]:
            if dense:
                loss, s = fastloss.cross_entropy(
                    h @ w.t(), self.target, reduction="none", return_stats=True, shard=shard
                )
            else:
                loss, s = fastloss.linear_cross_entropy(
                    h, w, self.target, reduction="none", return_stats=True, max_chunk_bytes=4 * V * 4, shard=shard
                )
            torch.testing.assert_close(loss, -s.log_prob)
            assert torch.equal(s.correct, (s.argmax == self.target) & ~self.unread)
            return {"lse": s.lse, "log_prob": s.log_prob, "entropy": s.entropy, "argmax": s.argmax}

        yield selective
        if dense and not K:
            yield row_stats
        if dense and not K and self.mask:
            yield lambda h, w: {"entropy": fastloss.softmax_entropy(h @ w.t(), **more)}
        if not K and not self.mask:
            yield cross_entropy

    def check(self, call: Callable[[Tensor, Tensor], Any], create_graph: bool = False) -> None:
        counts = ~self.unread
        leaves = [self.spoilt.clone().requires_grad_(), self.weight.clone().requires_grad_()]
        exact = [self.hidden[counts].double().requires_grad_(), self.weight.double().requires_grad_()]
        logits = exact[0] @ exact[1].t()
        names = "lse", "log_prob", "entropy"
        want = dict(zip(names, stats_textbook(logits, self.y[counts]), strict=True))
        found = call(*leaves)
        for name, value in found.items():
            assert not value[self.unread].any(), f"{name} of a row that is left out"
        if "argmax" in found:
            assert torch.equal(found["argmax"][counts], logits.argmax(-1))
        if found.get("rank") is not None:
            own = logits.gather(1, self.y[counts][:, None])
            assert torch.equal(found["rank"][counts], (logits > own).sum(-1))
        floats = [name for name in names if name in found]
        for name in floats:
            torch.testing.assert_close(found[name][counts].double(), want[name], rtol=1e-5, atol=1e-5)
        upstream = [torch.rand_like(found[name]) for name in floats]  # of rows that are left out, too
        grads = torch.autograd.grad([found[name] for name in floats], leaves, upstream, create_graph=create_graph)
        g = [u[counts].double() for u in upstream]
        want_grads = torch.autograd.grad([want[name] for name in floats], exact, g)
        assert not grads[0][self.unread].any()
        got = grads[0][counts].double(), grads[1].double()
        torch.testing.assert_close(got, want_grads, rtol=1e-4, atol=1e-5)


EVERY_STATS = [(K, masked) for K in (0, 1, 4) for masked in (False, True)]


@contextmanager
def logits_of_rows_alone() -> Iterator[None]:
    """A dense call's logits are made by the tests, with torch's matmul: what NaN does there is not ours."""

    class Product(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, h: Tensor, w: Tensor) -> Tensor:
            ctx.save_for_backward(h, w)
            return torch.nn.functional.linear(h, w)

        @staticmethod
        def backward(ctx: Any, dz: Tensor) -> Any:
            h, w = ctx.saved_tensors
            assert dz.isfinite().all()
            return dz @ w, dz.t() @ h.nan_to_num(0, 0, 0)

    before = Tensor.__matmul__
    Tensor.__matmul__ = lambda h, w: Product.apply(h, w.t()) if w.shape == (20, V) else before(h, w)  # type: ignore
    try:
        yield
    finally:
        Tensor.__matmul__ = before  # type: ignore


@pytest.mark.parametrize("create_graph", [False, True])
@pytest.mark.parametrize("shard", [None, VocabShard(0, V, V)], ids=["", "shard"])
def test_statistics_of_logits(engine, shard, create_graph, generator):
    if shard is not None and (create_graph or engine == "reference"):
        pytest.skip("not implemented with shard")
    with logits_of_rows_alone():
        for K, masked in EVERY_STATS:
            for targetless in {False, masked}:
                stats = Stats(generator, K, masked)
                for call in stats.calls(True, K, targetless, shard):
                    stats.check(call, create_graph)


@pytest.mark.parametrize("create_graph", [False, True])
@pytest.mark.parametrize("device", [False, True])
@pytest.mark.parametrize("shard", [None, VocabShard(0, V, V)], ids=["", "shard"])
def test_statistics_of_hidden_states(engine, shard, device, create_graph, monkeypatch, generator):
    if shard is not None and (create_graph or engine == "reference"):
        pytest.skip("not implemented with shard")
    if device:
        monkeypatch.setattr(chunks, "may_wait_for", lambda device: False)
    for fewest in 0, 8192:  # of classes that need no logits in memory
        monkeypatch.setattr(native, "FEWEST_CLASSES", fewest)
        for K, masked in EVERY_STATS:
            stats = Stats(generator, K, masked)
            for call in stats.calls(False, K, False, shard):
                stats.check(call, create_graph)


def test_without_a_target_no_row_is_left_out(engine, generator):
    """Whatever index is ignored, of statistics that have none."""
    x = torch.randn(4, V, generator=generator, dtype=torch.float64).requires_grad_()
    for ignore_index in -100, 0:
        stats = fastloss.row_stats(x, ignore_index=ignore_index)
        lse, _, entropy = stats_textbook(x, x.argmax(-1))
        torch.testing.assert_close((stats.lse, stats.entropy), (lse, entropy))
        assert torch.equal(stats.argmax, x.argmax(-1))
        g = torch.autograd.grad((stats.lse + stats.entropy**2).sum(), x)
        torch.testing.assert_close(g, torch.autograd.grad((lse + entropy**2).sum(), x))


@pytest.mark.no_launch
def test_no_classes_and_no_target(engine):
    stats = fastloss.row_stats(torch.zeros(2, 0), row_mask=torch.tensor([True, False]))
    assert stats.lse.tolist() == [-torch.inf, 0] and stats.argmax.tolist() == [0, 0]
    assert stats.entropy[0].isnan() and stats.entropy[1] == 0


def test_a_row_of_nothing_but_zero_upstream_keeps_its_second_derivative(engine):
    """What is differentiated twice is a function of the upstream gradient, also at zero."""
    x = torch.randn(3, V, dtype=torch.float64).requires_grad_()
    y = torch.tensor([1, 2, -100])
    g = torch.tensor([0.0, 1.0, 1.0]).double().requires_grad_()
    loss = fastloss.cross_entropy(x, y, reduction="none")
    (grad,) = torch.autograd.grad(loss, x, g, create_graph=True)
    direction = torch.randn_like(x)
    (found,) = torch.autograd.grad((grad * direction).sum(), g)
    p = x.detach().softmax(1) - F.one_hot(y.clamp(min=0), V)
    want = (p * direction).sum(1) * (y >= 0)
    torch.testing.assert_close(found, want)


# ---- matmuls ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def matmuls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int, int]]:
    """The (M, K, N) of every matmul of a head."""
    seen: list[tuple[int, int, int]] = []
    backend_of = LinearRows.backend

    def backend(self: LinearRows) -> Any:
        chosen = backend_of(self)

        def matmul(a: Tensor, b: Tensor, *args: Any) -> None:
            seen.append((*a.shape, b.shape[1]))
            chosen.matmul(a, b, *args)

        return chosen._replace(matmul=matmul)

    monkeypatch.setattr(LinearRows, "backend", backend)
    return seen


@pytest.mark.parametrize("shard", [None, VocabShard(0, V, V)], ids=["", "shard"])
@pytest.mark.parametrize("K", [0, 4])
def test_rows_in_matmuls(matmuls, K, shard, generator):
    """Of what is ignored none in any; of what has no upstream gradient none in the backward's."""
    hidden, weight = torch.randn(N, 20, generator=generator), torch.randn(V, 20, generator=generator)
    y = torch.randint(V, (N, K) if K else (N,), generator=generator)
    y[:4] = -100
    if K:
        y[4, 0] = -100  # of several classes one is still there
    hidden[:6] = torch.nan
    hidden.requires_grad_(), weight.requires_grad_()
    log_prob, entropy = fastloss.linear_selective_log_softmax(hidden, weight, y, return_entropy=True, shard=shard)
    assert matmuls == [(N - 4, 20, V)]
    matmuls.clear()
    (log_prob[6:].sum() + entropy[7:].sum()).backward()
    assert sorted(matmuls) == sorted([(N - 6, 20, V), (N - 6, V, 20), (V, N - 6, 20)])
    assert weight.grad.isfinite().all() and not hidden.grad[:6].any() and hidden.grad[6:].any(1).all()
    matmuls.clear()
    _, stats = fastloss.linear_cross_entropy(hidden, weight, y if not K else y[:, 1], return_stats=True, shard=shard)
    assert matmuls == [(N - 4, 20, V)]
    matmuls.clear()
    stats.lse[8].backward()
    assert sorted(matmuls) == sorted([(1, 20, V), (1, V, 20), (V, 1, 20)])


def test_all_rows_in_matmuls_of_a_device(matmuls, on_device, generator):
    hidden, weight = torch.randn(N, 20, generator=generator), torch.randn(V, 20, generator=generator)
    y = torch.full((N,), -100)
    y[0] = 3
    log_prob = fastloss.linear_selective_log_softmax(hidden.requires_grad_(), weight.requires_grad_(), y)
    log_prob.sum().backward()
    assert {max(m[:2]) if m[2] == 20 else m[0] for m in matmuls} == {N, V}
    assert matmuls[0] == (N, 20, V) and (V, N, 20) in matmuls


# ---- compiled, transformed, on ranks ---------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore:The .grad attribute:UserWarning")
def test_compiled(generator):
    torch.compiler.reset()

    def of_hidden(h: Tensor, w: Tensor, y: Tensor, mask: Tensor) -> Tensor:
        log_prob, entropy = fastloss.linear_selective_log_softmax(h, w, y, return_entropy=True, row_mask=mask)
        return (log_prob + entropy)[1:].sum()

    def of_logits(x: Tensor, y: Tensor, mask: Tensor) -> Tensor:
        stats = fastloss.row_stats(x, y, row_mask=mask)
        entropy = fastloss.softmax_entropy(x, row_mask=mask & (y != -100))
        _, selected = fastloss.selective_log_softmax(x, y[:, None], return_entropy=True, row_mask=mask)
        return (stats.lse + stats.log_prob + entropy + selected)[1:].sum()

    h, w = torch.randn(N, 20, generator=generator), torch.randn(V, 20, generator=generator)
    y, mask = torch.randint(V, (N,), generator=generator), torch.rand(N, generator=generator) < 0.5
    mask[:2] = True
    y[1] = -100
    unread = ~mask | (y == -100)
    unread[0] = True  # by the slice
    h = spoilt(h, unread)
    x = spoilt(h.nan_to_num(0, 0, 0) @ w.t(), unread)
    for loss, inputs in (of_hidden, [h, w]), (of_logits, [x]):
        inputs = [t.clone().requires_grad_() for t in inputs]
        found = torch.compile(loss, fullgraph=True)(*inputs, y, mask)
        want = loss(*inputs, y, mask)
        torch.testing.assert_close(found, want)
        grads, plain = torch.autograd.grad(found, inputs), torch.autograd.grad(want, inputs)
        torch.testing.assert_close(grads, plain)
        assert not grads[0][unread].any() and all(g.isfinite().all() for g in grads)


@pytest.mark.parametrize("masked", [False, True])
def test_transformed(masked, generator):
    """torch.func takes the textbook's operations."""
    unread = of_no_one(generator)
    hidden, weight = torch.randn(N, 20, generator=generator), torch.randn(V, 20, generator=generator)
    y = torch.randint(V, (N,), generator=generator)
    options = {"row_mask": ~unread} if masked else {}
    target = y if masked else torch.where(unread, -100, y)
    bad = spoilt(hidden, unread)

    def linear(h: Tensor, w: Tensor) -> Tensor:
        log_prob, entropy = fastloss.linear_selective_log_softmax(h, w, target, return_entropy=True, **options)
        weighted = fastloss.linear_cross_entropy(h, w, y, token_weight=(~unread).float(), reduction="sum")
        return log_prob.sum() + entropy.sum() + weighted

    def dense(x: Tensor) -> Tensor:
        stats = fastloss.row_stats(x, target, **options)
        weighted = fastloss.cross_entropy(x, y, token_weight=(~unread).float(), reduction="sum")
        return stats.lse.sum() + stats.log_prob.sum() + stats.entropy.sum() + weighted

    exact = hidden[~unread].double().requires_grad_(), weight.double().requires_grad_()
    logits = exact[0] @ exact[1].t()
    lse, _, entropy = (t.sum() for t in stats_textbook(logits, y[~unread]))
    want = torch.autograd.grad(entropy, exact, retain_graph=True)
    got = torch.func.grad(linear, (0, 1))(bad, weight)
    assert not got[0][unread].any()
    torch.testing.assert_close((got[0][~unread].double(), got[1].double()), want, rtol=1e-4, atol=1e-4)
    (want,) = torch.autograd.grad(lse + entropy, logits)
    x = spoilt(hidden @ weight.t(), unread)
    (got,) = torch.func.grad(dense, (0,))(x)
    assert not got[unread].any()
    torch.testing.assert_close(got[~unread].double(), want, rtol=1e-4, atol=1e-4)


def on_rank(K: int, masked: bool) -> list[Tensor]:
    """What this rank has of log-probabilities, entropies, and the gradients of hidden states and of its classes."""
    stats, shard = Stats(torch.Generator().manual_seed(5), K, masked), VocabShard.even(V)
    h, w = stats.spoilt.requires_grad_(), stats.weight[shard.start : shard.stop].clone().requires_grad_()
    found = fastloss.linear_selective_log_softmax(h, w, stats.target, return_entropy=True, shard=shard, **stats.mask)
    sum(t.sum() for t in found).backward()
    return [*(t.detach() for t in found), h.grad, w.grad]


def test_ranks():
    with ranks(2) as world:
        for K, masked in EVERY_STATS:
            stats = Stats(torch.Generator().manual_seed(5), K, masked)
            found = [list(t) for t in zip(*world.run(on_rank, K, masked), strict=True)]
            for name, (mine, other) in zip(("log_prob", "entropy", "hidden"), found, strict=False):
                assert torch.equal(mine, other) and not mine[stats.unread].any(), name
            counts = ~stats.unread
            exact = [stats.hidden[counts].double().requires_grad_(), stats.weight.double().requires_grad_()]
            _, log_prob, entropy = stats_textbook(exact[0] @ exact[1].t(), stats.y[counts])
            want = [log_prob, entropy, *torch.autograd.grad(log_prob.sum() + entropy.sum(), exact)]
            got = [*(t[0][counts] for t in found[:3]), torch.cat(found[3])]
            for a, t in zip(got, want, strict=True):
                torch.testing.assert_close(a.double(), t, rtol=1e-4, atol=1e-5)


# ---- arguments -------------------------------------------------------------------------------------------------------


def test_row_mask_is_checked():
    x, w, y = torch.randn(2, 3, V), torch.randn(V, V), torch.zeros(2, 3, dtype=torch.int64)
    calls = [
        lambda mask: fastloss.row_stats(x, y, row_mask=mask),
        lambda mask: fastloss.softmax_entropy(x, row_mask=mask),
        lambda mask: fastloss.selective_log_softmax(x, y, row_mask=mask),
        lambda mask: fastloss.linear_selective_log_softmax(x, w, y, row_mask=mask),
    ]
    for call in calls:
        call(torch.ones(2, 3, dtype=torch.bool))
        with pytest.raises(ValueError, match=r"row_mask: expected a bool Tensor of shape \(2, 3\).*float32"):
            call(torch.ones(2, 3))
        with pytest.raises(ValueError, match=r"row_mask: expected a bool Tensor of shape \(2, 3\).*\(6,\)"):
            call(torch.ones(6, dtype=torch.bool))
        with pytest.raises(TypeError, match="row_mask: expected a bool Tensor or None, got list"):
            call([True])
        with pytest.raises(RuntimeError, match="row_mask: expected a tensor on cpu like input, got one on meta"):
            call(torch.ones(2, 3, dtype=torch.bool, device="meta"))
