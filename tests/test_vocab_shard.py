"""What is about ranks, not losses: collectives and their bytes, agreement, padding, DTensors, FSDP."""

from __future__ import annotations

import os
from contextlib import nullcontext
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from ranks import gathers, ranks
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

import fastloss
from fastloss import VocabShard, backends

pytest.importorskip("numpy", reason="torch.distributed.tensor.debug needs it")
from torch.distributed.tensor.debug import CommDebugMode

N, V, H = 6, 103, 16


@pytest.fixture(scope="module")
def two():
    with ranks(2) as started:
        yield started


@pytest.fixture(scope="module")
def four():
    with ranks(4) as started:
        yield started


def numbers(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def classes(seed: int = 1) -> Tensor:
    y = torch.randint(V, (N,), generator=torch.Generator().manual_seed(seed))
    y[2] = -100
    return y


def mine(x: Tensor, shard: VocabShard, dim: int = 1) -> Tensor:
    return x.narrow(dim, shard.start, shard.stop - shard.start).clone().requires_grad_()


# ---- collectives ----------------------------------------------------------------------------------------------------


def counted(function: str, shape: int, **options: Any) -> tuple[int, int, int]:
    """Collectives of the forward and of the backward, and bytes gathered."""
    shard = VocabShard.even(V)
    if function.startswith("linear"):
        tensors = [numbers(N, H).requires_grad_(), mine(numbers(V, H, seed=3), shard, 0)]
        if "div" in function:
            tensors += [numbers(N, H, seed=5), mine(numbers(V, H, seed=6), shard, 0).detach()]
    else:
        tensors = [mine(numbers(N, V), shard)]
        if "div" in function:
            tensors.append(mine(numbers(N, V, seed=4), shard).detach())
    if "div" not in function:
        tensors.append(classes())
    loss_of = getattr(fastloss, function)
    summed: list[int] = []
    all_reduce = dist.all_reduce

    def count_sum(x: Tensor, *args: Any, **more: Any) -> Any:
        summed.append(x.nbytes)
        return all_reduce(x, *args, **more)

    with gathers() as gathered, patch.object(dist, "all_reduce", count_sum), CommDebugMode() as mode:
        loss = loss_of(*tensors, shard=shard, **options)
        forward = len(gathered), len(summed)
        loss.backward()
    assert not forward[1]
    if not function.startswith("linear"):  # what happens inside an operator the mode does not see
        assert mode.get_total_counts() == len(gathered) + len(summed)
    return forward[0], len(gathered) + len(summed) - forward[0], sum(gathered)


@pytest.mark.parametrize(
    ("function", "forward", "backward"),
    [
        ("cross_entropy", 1, 0),
        ("kl_div_with_logits", 1, 0),
        ("js_div_with_logits", 2, 0),
        ("linear_cross_entropy", 1, 1),
        ("linear_js_div", 2, 1),
    ],
)
def test_collectives(two, function, forward, backward):
    """One forward, two of a mixture; none backward but the sum of the hidden states' gradient."""
    for found in two.run(counted, function, 2):
        assert found == (forward, backward, forward * 65536)


def plainly(empty: bool) -> tuple[int, int]:
    """Collectives of a loss of class indices where no mode listens, and their bytes."""
    V, N = 7, 4
    shard = VocabShard(*((0, V) if dist.get_rank() == 0 else (V, V)), V) if empty else VocabShard.even(V)
    x, y = numbers(N, V).detach(), torch.tensor([0, -100, 6, 3])
    own = mine(x, shard).detach().requires_grad_()
    with gathers() as gathered:
        loss = fastloss.cross_entropy(own, y, shard=shard)
        loss.backward()
    whole = x.clone().requires_grad_()
    want = F.cross_entropy(whole, y)
    want.backward()
    torch.testing.assert_close(loss, want)
    torch.testing.assert_close(own.grad, whole.grad[:, shard.start : shard.stop])
    return len(gathered), sum(gathered)


@pytest.mark.parametrize("empty", [False, True])
def test_what_merges_natively_sends_the_same(two, empty):
    """A rank without classes comes another way, and says the same."""
    assert two.run(plainly, empty) == [(1, 65536)] * 2


def many_rows() -> tuple[int, int]:
    shard, rows = VocabShard.even(7), 5000
    x, y = torch.randn(rows, 7, generator=torch.Generator().manual_seed(0)), torch.arange(rows) % 7
    with CommDebugMode() as forward:
        loss = fastloss.cross_entropy(mine(x, shard), y, shard=shard)
    torch.testing.assert_close(loss, F.cross_entropy(x, y))
    return forward.get_total_counts()


def test_rows_that_do_not_fit_into_a_block(two):
    """16 bytes of each row: a second collective takes those beyond 64 KiB."""
    assert two.run(many_rows) == [2, 2]


def test_one_rank_says_nothing():
    with ranks(1) as one:
        assert one.run(counted, "cross_entropy", 1) == [(0, 0, 0)]
        assert one.run(counted, "linear_cross_entropy", 1) == [(0, 0, 0)]


# ---- agreement ------------------------------------------------------------------------------------------------------


def disagreeing(what: str) -> None:
    rank = dist.get_rank()
    shard = VocabShard.even(V)
    x, y, options = mine(numbers(N, V), shard), classes(), {}
    if what == "rows" and rank:
        x, y = x[1:], y[1:]
    if what == "dtype" and rank:
        x = x.double()
    if what == "options" and rank:
        options = {"label_smoothing": 0.1}
    if what == "class weights" and rank:
        options = {"weight": torch.ones(x.shape[1])}
    if what == "vocab_size":
        shard = VocabShard(shard.start, shard.stop, V + rank)
    if what == "cover":
        shard, x = VocabShard(0, 60, V), numbers(N, 60)
    fastloss.cross_entropy(x, y, shard=shard, **options)


@pytest.mark.parametrize("what", ["rows", "dtype", "options", "class weights", "vocab_size", "cover"])
def test_ranks_that_disagree(two, what):
    """The same error everywhere; and the next call works."""
    first, second = two.fails(disagreeing, what)
    assert isinstance(first, RuntimeError) and str(first) == str(second)
    assert ("cover" if what == "cover" else what) in str(first)
    assert two.run(counted, "cross_entropy", 2)[0][0] == 1


def bad(what: str) -> None:
    shard = VocabShard.even(V)
    x, y = mine(numbers(N, V), shard), classes()
    if what == "columns":
        fastloss.cross_entropy(x[:, 1:], y, shard=shard)
    elif what == "index":
        fastloss.cross_entropy(x, y + V, shard=shard)
    elif what == "type":
        fastloss.cross_entropy(x, y, shard=(0, 5))
    elif what == "twice":
        loss = fastloss.cross_entropy(x, y, shard=shard)
        torch.autograd.grad(loss, x, create_graph=True)
    elif what == "target":
        q = torch.rand(x.shape).requires_grad_()
        fastloss.cross_entropy(x, q, shard=shard)
    elif what == "reference":
        with fastloss.use_backend("reference"):
            fastloss.cross_entropy(x, y, shard=shard)


@pytest.mark.parametrize(
    ("what", "error", "says"),
    [
        ("columns", ValueError, "input: expected this rank's"),
        ("index", IndexError, "out of bounds"),
        ("type", TypeError, "shard: expected a fastloss.VocabShard"),
        ("twice", NotImplementedError, "differentiated once"),
        ("target", NotImplementedError, "target: expected no gradient"),
        ("reference", NotImplementedError, "backend of kernels"),
    ],
)
def test_bad_input(two, what, error, says):
    for found in two.fails(bad, what):
        assert isinstance(found, error) and says in str(found)


@pytest.mark.parametrize("bounds", [(-1, 3, 5), (3, 2, 5), (0, 6, 5)])
def test_bounds(bounds):
    with pytest.raises(ValueError, match="VocabShard: expected 0 <= start"):
        VocabShard(*bounds)


# ---- padding --------------------------------------------------------------------------------------------------------


def padded(linear: bool) -> list[Tensor]:
    """Tensors of 128 classes on two ranks, of which V exist; what is beyond holds nonsense."""
    rank, shard = dist.get_rank(), VocabShard.even(V, padded_size=128)
    if linear:
        weight = torch.cat([numbers(V, H, seed=3), torch.full((128 - V, H), 1e6)])[rank * 64 : rank * 64 + 64]
        weight = weight.clone().requires_grad_()
        hidden = numbers(N, H).requires_grad_()
        loss = fastloss.linear_cross_entropy(hidden, weight, classes(), shard=shard, label_smoothing=0.1)
        loss.backward()
        return [loss.detach(), hidden.grad, weight.grad]
    x = torch.cat([numbers(N, V), torch.full((N, 128 - V), torch.nan)], 1)[:, rank * 64 : rank * 64 + 64]
    x = x.clone().requires_grad_()
    loss = fastloss.cross_entropy(x, classes(), shard=shard, label_smoothing=0.1)
    loss.backward()
    return [loss.detach(), x.grad]


def test_padding(two):
    x = numbers(N, V).requires_grad_()
    want = F.cross_entropy(x, classes(), label_smoothing=0.1)
    want.backward()
    (loss, first), (_, second) = two.run(padded, False)
    got = torch.cat([first, second], 1)
    torch.testing.assert_close((loss, got[:, :V]), (want.detach(), x.grad))
    assert (got[:, V:] == 0).all()


def test_padding_of_a_head(two):
    hidden, weight = numbers(N, H).requires_grad_(), numbers(V, H, seed=3).requires_grad_()
    want = F.cross_entropy(hidden @ weight.T, classes(), label_smoothing=0.1)
    want.backward()
    (loss, d_hidden, first), (_, _, second) = two.run(padded, True)
    got = torch.cat([first, second])
    torch.testing.assert_close((loss, d_hidden, got[:V]), (want.detach(), hidden.grad, weight.grad))
    assert (got[V:] == 0).all()


# ---- statistics -----------------------------------------------------------------------------------------------------


def statistics(linear: bool) -> list[Tensor]:
    shard = VocabShard.even(V)
    if linear:
        x = numbers(N, H).requires_grad_()
        weight = mine(numbers(V, H, seed=3), shard, 0)
        loss, stats = fastloss.linear_cross_entropy(x, weight, classes(), shard=shard, return_stats=True)
    else:
        x = mine(numbers(N, V), shard)
        loss, stats = fastloss.cross_entropy(x, classes(), shard=shard, return_stats=True)
    (loss + stats.entropy.sum() + (stats.log_prob * stats.lse).sum()).backward()
    return [loss.detach(), *(t.detach() for t in stats), x.grad]


@pytest.mark.parametrize("linear", [False, True])
def test_statistics(two, linear):
    x = (numbers(N, H) if linear else numbers(N, V)).requires_grad_()
    z = (x @ numbers(V, H, seed=3).T) if linear else x
    with fastloss.use_backend("reference"):
        loss, stats = fastloss.cross_entropy(z, classes(), return_stats=True)
    (loss + stats.entropy.sum() + (stats.log_prob * stats.lse).sum()).backward()
    found = two.run(statistics, linear)
    got = found[0][-1] if linear else torch.cat([f[-1] for f in found], 1)
    torch.testing.assert_close(found[0][:-1], [loss.detach(), *(t.detach() for t in stats)])
    torch.testing.assert_close(got, x.grad, rtol=1e-4, atol=1e-4)


def large(scale: float) -> list[Tensor]:
    shard = VocabShard.even(V)
    x = mine(numbers(N, V) * scale, shard)
    loss = fastloss.cross_entropy(x, classes(), shard=shard, reduction="none")
    loss.sum().backward()
    return [loss.detach(), x.grad]


@pytest.mark.parametrize("scale", [1e4, 1e-4, 50.0])
def test_large_and_small_logits(two, scale):
    x = (numbers(N, V) * scale).double().requires_grad_()
    want = F.cross_entropy(x, classes(), reduction="none")
    want.sum().backward()
    found = two.run(large, scale)
    torch.testing.assert_close(found[0][0].double(), want.detach(), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(torch.cat([f[1] for f in found], 1).double(), x.grad, rtol=1e-4, atol=1e-6)


# ---- DTensors -------------------------------------------------------------------------------------------------------


def of_dtensors(linear: bool) -> list[Tensor]:
    mesh = init_device_mesh("cpu", (2,))
    weights = numbers(V, seed=7).abs()
    if linear:
        hidden = distribute_tensor(numbers(N, H), mesh, [Replicate()]).requires_grad_()
        head = distribute_tensor(numbers(V, H, seed=3), mesh, [Shard(0)]).requires_grad_()
        loss = fastloss.linear_cross_entropy(hidden, head, classes(), weight=weights)
        loss.backward()
        assert head.grad.placements == (Shard(0),)
        return [loss.full_tensor().detach(), hidden.grad.full_tensor(), head.grad.full_tensor()]
    x = distribute_tensor(numbers(N, V), mesh, [Shard(1)]).requires_grad_()
    loss = fastloss.cross_entropy(x, classes(), weight=weights)
    loss.backward()
    assert isinstance(loss, DTensor) and x.grad.placements == (Shard(1),)
    return [loss.full_tensor().detach(), x.grad.full_tensor()]


def test_dtensors(two):
    weights = numbers(V, seed=7).abs()
    x = numbers(N, V).requires_grad_()
    want = F.cross_entropy(x, classes(), weights)
    want.backward()
    for found in two.run(of_dtensors, False):
        torch.testing.assert_close(found, [want.detach(), x.grad])
    hidden, head = numbers(N, H).requires_grad_(), numbers(V, H, seed=3).requires_grad_()
    want = F.cross_entropy(hidden @ head.T, classes(), weights)
    want.backward()
    for found in two.run(of_dtensors, True):
        torch.testing.assert_close(found, [want.detach(), hidden.grad, head.grad])


def of_a_sequence() -> list[Any]:
    """The ranks that share the vocabulary share the rows as well."""
    mesh = init_device_mesh("cpu", (2,))
    hidden = distribute_tensor(numbers(N, H), mesh, [Shard(0)]).requires_grad_()
    head = distribute_tensor(numbers(V, H, seed=3), mesh, [Shard(0)]).requires_grad_()
    loss = fastloss.linear_cross_entropy(hidden, head, classes())
    with CommDebugMode() as backward:
        loss.backward()
    assert hidden.grad.placements == (Shard(0),)
    counts = {str(op): count for op, count in backward.get_comm_counts().items()}
    return [loss.full_tensor().detach(), hidden.grad.full_tensor(), head.grad.full_tensor(), counts]


def test_sequence_parallelism(two):
    """The hidden states' gradient is scattered as it is summed."""
    hidden, head = numbers(N, H).requires_grad_(), numbers(V, H, seed=3).requires_grad_()
    want = F.cross_entropy(hidden @ head.T, classes())
    want.backward()
    for *found, counts in two.run(of_a_sequence):
        torch.testing.assert_close(found, [want.detach(), hidden.grad, head.grad])
        assert len(counts) == 1 and "reduce_scatter" in next(iter(counts)), counts


def of_uneven_rows() -> list[Any]:
    """Three rows of two ranks, without a vocabulary's group."""
    mesh = init_device_mesh("cpu", (2,))
    x, y = (distribute_tensor(t[:3], mesh, [Shard(0)]) for t in (numbers(N, V), classes()))
    found = fastloss.cross_entropy(x, y, reduction="none"), fastloss.softmax_entropy(x), fastloss.row_stats(x).lse
    return [t.full_tensor() for t in found]


def test_uneven_rows(two):
    """The results know how many rows there are, and functions without a reduction take sharded rows."""
    x = numbers(N, V)[:3]
    log_p = x.log_softmax(-1)
    want = [F.cross_entropy(x, classes()[:3], reduction="none"), -(log_p.exp() * log_p).sum(-1), x.logsumexp(-1)]
    for found in two.run(of_uneven_rows):
        torch.testing.assert_close(found, want)


def of_fake_tensors() -> list[Any]:
    """Each loss once with fake tensors, and then with real ones: nothing fake may be remembered."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    shard = VocabShard.even(V)
    losses = (
        lambda x, h, w, y: fastloss.cross_entropy(x, y, shard=shard),
        lambda x, h, w, y: fastloss.cross_entropy(x, y, reduction="none", shard=shard).sum(),
        lambda x, h, w, y: fastloss.row_stats(x, y, shard=shard).entropy.sum(),
        lambda x, h, w, y: fastloss.linear_cross_entropy(h, w, y, shard=shard),
        lambda x, h, w, y: fastloss.linear_selective_log_softmax(h, w, y, row_mask=y >= 0, shard=shard).sum(),
    )
    shapes = []
    for loss in losses:
        for mode in (FakeTensorMode(), nullcontext()):
            with mode:
                sizes = (N, shard.part.size), (N, H), (shard.part.size, H)
                tensors = [torch.ones(size).requires_grad_() for size in sizes]
                found = loss(*tensors, torch.zeros(N, dtype=torch.int64))
                found.backward()
                shapes.append([found.shape, *(None if t.grad is None else t.grad.shape for t in tensors)])
    return shapes


def test_fake_tensors(two):
    """Shapes of the results and gradients, as of real tensors."""
    for shapes in two.run(of_fake_tensors):
        assert shapes[::2] == shapes[1::2]


def on_a_mesh() -> list[Tensor]:
    """Rows over one dimension, classes over the other."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "tensor"))
    hidden = distribute_tensor(numbers(N, H), mesh, [Shard(0), Replicate()]).requires_grad_()
    head = distribute_tensor(numbers(V, H, seed=3), mesh, [Replicate(), Shard(0)]).requires_grad_()
    y = distribute_tensor(classes(), mesh, [Shard(0), Replicate()])
    count = (classes() != -100).sum()
    loss = fastloss.linear_cross_entropy(hidden, head, y, normalizer=count)
    loss.backward()
    with pytest.raises(NotImplementedError, match="reduction: expected 'sum' or 'none'"):
        fastloss.linear_cross_entropy(hidden, head, y)
    each = fastloss.linear_cross_entropy(hidden, head, y, reduction="none")
    return [t.full_tensor().detach() for t in (loss, hidden.grad, head.grad, each)]


def test_a_mesh(four):
    hidden, head = numbers(N, H).requires_grad_(), numbers(V, H, seed=3).requires_grad_()
    want = F.cross_entropy(hidden @ head.T, classes())
    want.backward()
    each = F.cross_entropy(hidden @ head.T, classes(), reduction="none").detach()
    for found in four.run(on_a_mesh):
        torch.testing.assert_close(found, [want.detach(), hidden.grad, head.grad, each])


# ---- FSDP -----------------------------------------------------------------------------------------------------------


class Model(torch.nn.Module):
    def __init__(self, tied: bool) -> None:
        super().__init__()
        self.embedding = torch.nn.Embedding(V, H)
        self.body = torch.nn.Linear(H, H)
        self.head = torch.nn.Linear(H, V, bias=False)
        if tied:
            self.head.weight = self.embedding.weight

    def forward(self, ids: Tensor, labels: Tensor) -> Tensor:
        return fastloss.linear_cross_entropy(self.body(self.embedding(ids)), self.head.weight, labels)


def trained(how: str) -> list[Tensor]:
    torch.manual_seed(0)
    model = Model(tied="tied" in how)
    ids, labels = torch.arange(N) % V, classes()
    if "unit" in how:
        fully_shard(model.head, reshard_after_forward=False)
        fully_shard(model.body)
    if "plain" not in how:
        fully_shard(model)
        if "unit" in how:
            model.head.unshard()
    loss = model(ids, labels)
    loss.backward()
    grads = [p.grad for p in model.parameters()]
    return [loss.detach(), *(g.full_tensor() if isinstance(g, DTensor) else g for g in grads)]


@pytest.mark.parametrize("how", ["root", "root tied", "unit"])
def test_fully_sharded(two, how):
    """A head in the root, tied or not, or a unit of its own."""
    want = two.run(trained, f"plain {how.replace('unit', '')}")[0]
    for found in two.run(trained, how):
        torch.testing.assert_close(found, want)


def resharded(freed: bool) -> None:
    model = Model(False)
    fully_shard(model.head)
    fully_shard(model)
    if freed:
        model.head.unshard()
        weight = model.head.weight
        model.head.reshard()
        fastloss.linear_cross_entropy(numbers(N, H), weight, classes())
    model(torch.arange(N), classes())


@pytest.mark.parametrize("freed", [False, True])
def test_a_weight_that_was_sharded_again(two, freed):
    for found in two.fails(resharded, freed):
        assert isinstance(found, RuntimeError) and "module.unshard()" in str(found)


def beside_plain(name: str) -> None:
    mesh = init_device_mesh("cpu", (2,))

    def spread(x: Tensor) -> Tensor:
        return distribute_tensor(x, mesh, [Replicate()])

    x, hidden, head = numbers(N, V), numbers(N, H), numbers(V, H)
    if name == "target":
        fastloss.cross_entropy(x, spread(classes()))
    elif name == "target_logits":
        fastloss.kl_div_with_logits(x, spread(x))
    elif name == "input":
        fastloss.linear_cross_entropy(spread(hidden), head, classes())
    elif name == "labels":
        fastloss.linear_cross_entropy(hidden, head, spread(classes()))
    else:
        fastloss.linear_cross_entropy(hidden, spread(head), classes())


@pytest.mark.parametrize(
    ("name", "says"),
    {
        "target": "target: got a DTensor beside a plain input",
        "target_logits": "target_logits: got a DTensor beside a plain input",
        "input": "input: got a DTensor beside a plain linear_weight",
        "labels": "target: got a DTensor beside a plain input",
        "linear_weight": "linear_weight: got a DTensor beside a plain input",
    }.items(),
)
def test_a_dtensor_beside_plain_tensors(two, name, says):
    """What is said is about these tensors: of LM heads and FSDP only where it is the head."""
    for error in two.fails(beside_plain, name):
        assert type(error) is RuntimeError and says in str(error)
        of_head = name == "linear_weight"
        assert ("unshard()" in str(error)) == of_head == ("grad_placements" in str(error))
        assert ("full_tensor()" in str(error)) or of_head


def data_parallel(empty: bool) -> list[Tensor]:
    """Sums and the global number of tokens; a rank may have none that counts."""
    rank = dist.get_rank()
    x, y = numbers(N, V, seed=rank).requires_grad_(), classes(rank)
    if empty and rank:
        y[:] = -100
    count = (y != -100).sum()
    dist.all_reduce(count)
    loss = fastloss.cross_entropy(x, y, normalizer=count)
    loss.backward()
    total = loss.detach().clone()
    dist.all_reduce(total)
    return [total, x.grad]


def test_data_parallel(two):
    for empty in (False, True):
        found = two.run(data_parallel, empty)
        xs, ys = [numbers(N, V, seed=r).requires_grad_() for r in (0, 1)], [classes(0), classes(1)]
        if empty:
            ys[1][:] = -100
        want = F.cross_entropy(torch.cat(xs), torch.cat(ys))
        want.backward()
        torch.testing.assert_close([found[0][0], found[0][1], found[1][1]], [want.detach(), xs[0].grad, xs[1].grad])


def recipe(linear: bool) -> list[Tensor]:
    """A loss of fastloss.lm, and one of no rows at all."""
    shard, labels = VocabShard.even(V), torch.arange(N)[None] % V
    if linear:
        x, weight = numbers(1, N, H).requires_grad_(), mine(numbers(V, H, seed=3), shard, 0)
        loss = fastloss.lm.causal_lm_loss(x, labels, linear_weight=weight, shard=shard)
        none = fastloss.linear_cross_entropy(numbers(0, H), weight, labels[0, :0], shard=shard, reduction="sum")
    else:
        x = mine(numbers(1, N, V), shard, 2)
        loss = fastloss.lm.causal_lm_loss(x, labels, shard=shard)
        none = fastloss.cross_entropy(mine(numbers(0, V), shard), labels[0, :0], shard=shard, reduction="sum")
    loss.backward()
    assert none == 0
    return [loss.detach(), x.grad]


@pytest.mark.parametrize("linear", [False, True])
def test_language_model_recipes(two, linear):
    x = (numbers(1, N, H) if linear else numbers(1, N, V)).requires_grad_()
    z = x @ numbers(V, H, seed=3).T if linear else x
    want = F.cross_entropy(z[0, :-1], torch.arange(N)[1:])
    want.backward()
    found = two.run(recipe, linear)
    got = found[0][1] if linear else torch.cat([f[1] for f in found], 2)
    torch.testing.assert_close((found[0][0], got), (want.detach(), x.grad))


def compiled(linear: bool) -> None:
    """Traced with its collectives, as one graph; also as the first call, for which no backend is chosen yet."""
    backends._chosen.clear()
    shard = VocabShard.even(V)
    tensors = [numbers(N, H), mine(numbers(V, H, seed=3), shard, 0)] if linear else [mine(numbers(N, V), shard)]
    name = "linear_cross_entropy" if linear else "cross_entropy"

    y = classes()

    def loss(*tensors: Tensor) -> Tensor:
        return getattr(fastloss, name)(*tensors, y, shard=shard, label_smoothing=0.1)

    found = []
    for function in torch.compile(loss, fullgraph=True, backend="aot_eager"), loss:
        leaves = [t.detach().clone().requires_grad_() for t in tensors]
        value = function(*leaves)
        value.backward()
        found.append([value.detach(), *(t.grad for t in leaves)])
    torch.testing.assert_close(*found)


@pytest.mark.parametrize("linear", [False, True])
def test_compiles_in_one_graph(two, linear):
    two.run(compiled, linear)


def dying() -> None:
    """One of the ranks is gone before the others call."""
    shard = VocabShard.even(V)
    if dist.get_rank() == 1:
        os._exit(1)
    fastloss.cross_entropy(mine(numbers(N, V), shard), classes(), shard=shard)


def test_a_rank_that_dies():
    """torch.distributed's error, not silence."""
    with ranks(2) as pair:
        for pipe in pair.pipes:
            pipe.send((dying, ()))
        worked, (error, _) = pair.pipes[0].recv()
    assert not worked and isinstance(error, RuntimeError)


def with_dtensors(given: str) -> None:
    mesh = init_device_mesh("cpu", (2,))
    hidden = distribute_tensor(numbers(N, H), mesh, [Replicate()])
    weight = distribute_tensor(numbers(V, H), mesh, [Shard(0)])
    value: Any = 1e-3 if given == "filter_eps" else VocabShard.even(V)
    fastloss.linear_cross_entropy(hidden, weight, classes(), **{given: value})


@pytest.mark.parametrize("given", ["filter_eps", "shard"])
def test_what_dtensors_would_drop(two, given):
    for error in two.fails(with_dtensors, given):
        assert isinstance(error, ValueError) and f"(): {given}: expected None" in str(error)
