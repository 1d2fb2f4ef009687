"""An argument that is taken is obeyed: every keyword of every public loss changes the result, raises, or is on the
short list of those that by design do not, with a test elsewhere of what they do."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import fastloss
from fastloss import VocabShard, lm
from fastloss.integrations import megatron

B, T, V, H, K = 2, 5, 9, 4, 3
N = B * T


def numbers(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def positive(*shape: int) -> Tensor:
    return numbers(*shape, seed=9).exp()


X, HIDDEN, HEAD, TEACHER = numbers(B, T, V), numbers(B, T, H, seed=1), numbers(V, H, seed=2), numbers(B, T, V, seed=3)
TOKENS = torch.randint(V - 1, (B, T), generator=torch.Generator().manual_seed(4))
TOKENS[0, 2] = 3
INDICES = torch.stack([torch.randperm(V, generator=torch.Generator().manual_seed(i))[:K] for i in range(N)])
INDICES[1] = torch.tensor([3, 1, 2])  # 3 is what ignore_index says
INDICES = INDICES.view(B, T, K)
PROBS = numbers(B, T, K, seed=5).softmax(-1) * 0.9
MASK = torch.arange(T).expand(B, T) < 3
ROWS, ROW_TOKENS = X.flatten(0, 1), TOKENS.flatten()

# What has no effect on values, and the test of what it does instead.
BY_DESIGN = {
    "inplace": "test_losses.py::test_inplace",
    "max_chunk_bytes": "test_linear.py::test_memory_is_that_of_a_chunk",
    "filter_eps": "test_triton_head_grads.py::test_the_gradient_of_logits",
    "options": "test_linear_options.py::test_batch_chunk_size",
    "is_cg_capturable": "test_obeyed.py::test_graphs_may_be_captured",
    "shard": "test_sharded.py::test_case",
    "dist_process_group": "test_megatron.py::test_transformer_engine",
}


@pytest.mark.parametrize("place", BY_DESIGN.values())
def test_by_design_has_a_test(place: str) -> None:
    file, _, name = place.partition("::")
    assert f"def {name}(" in (Path(__file__).parent / file).read_text()


NUMBERS: dict[str, Any] = {
    "z_loss": 0.1, "softcap": 2.0, "logit_scale": 0.5, "normalizer": 7.0, "out_dtype": torch.float32,
    "label_smoothing": 0.1, "temperature": 2.0, "ignore_index": 3,
}  # fmt: skip
REDUCED = {"size_average": False, "reduce": False, "reduction": "sum", "weight": positive(V), "return_stats": True}
PER_TOKEN = {"token_weight": positive(B, T), "mask": MASK}
CROSS = {**NUMBERS, **REDUCED}
CE = {**CROSS, "token_weight": positive(N), "mask": MASK.flatten()}
LINEAR = {**CROSS, **PER_TOKEN, "linear_bias": positive(V)}
DIVERGENCE = {**NUMBERS, **PER_TOKEN, "reduction": "batchmean", "direction": "reverse", "beta": 0.2}
LINEAR_DIVERGENCE = {**DIVERGENCE, "linear_bias": positive(V), "target_linear_bias": positive(V)}
LISTED = {**NUMBERS, **PER_TOKEN, "reduction": "sum", "tail": "lump", "weight": positive(V), "linear_bias": positive(V)}
NCE = {**NUMBERS, "negatives": numbers(3, H, seed=8), "symmetric": True, "normalize": False}
NCE |= {"token_weight": positive(N), "reduction": "sum"}
SELECTED = {**NUMBERS, "return_entropy": True, "linear_bias": positive(V), "row_mask": MASK}
LM = {**CROSS, **PER_TOKEN, "shift": 2, "attention_mask": MASK, "document_ids": MASK.long(), "lengths": MASK.sum(1)}
LM |= {"position_ids": MASK.long(), "context": 2, "length_normalised": None}
LM |= {"linear_weight": numbers(V, V, seed=7), "linear_bias": positive(V)}
ELEMENTS = {"size_average": False, "reduce": False, "reduction": "sum", "weight": positive(B, T, V)}
ELEMENTS |= {"log_target": True, "pos_weight": positive(V)}

Table = dict[str, tuple[Callable[..., Any], tuple[Any, ...], dict[str, Any], Any]]
LOSSES: Table = {  # the function, its tensors, values of its keywords, and whose its **options are
    "cross_entropy": (fastloss.cross_entropy, (ROWS, ROW_TOKENS), CE, None),
    "linear_cross_entropy": (fastloss.linear_cross_entropy, (HIDDEN, HEAD, TOKENS), LINEAR, None),
    "kl_div_with_logits": (fastloss.kl_div_with_logits, (X, TEACHER), DIVERGENCE, None),
    "js_div_with_logits": (fastloss.js_div_with_logits, (X, TEACHER), DIVERGENCE, None),
    "linear_kl_div": (
        fastloss.linear_kl_div, (HIDDEN, HEAD, HIDDEN.flip(0), HEAD.flip(1)), LINEAR_DIVERGENCE, "kl_div_with_logits"
    ),
    "linear_js_div": (
        fastloss.linear_js_div, (HIDDEN, HEAD, HIDDEN.flip(0), HEAD.flip(1)), LINEAR_DIVERGENCE, "js_div_with_logits"
    ),
    "topk_cross_entropy": (fastloss.topk_cross_entropy, (X, INDICES, PROBS), LISTED, None),
    "topk_kl_div": (fastloss.topk_kl_div, (X, INDICES, PROBS), LISTED, None),
    "linear_topk_cross_entropy": (
        fastloss.linear_topk_cross_entropy, (HIDDEN, HEAD, INDICES, PROBS), LISTED, "topk_cross_entropy"
    ),
    "linear_topk_kl_div": (fastloss.linear_topk_kl_div, (HIDDEN, HEAD, INDICES, PROBS), LISTED, "topk_kl_div"),
    "selective_log_softmax": (fastloss.selective_log_softmax, (X, TOKENS), SELECTED, None),
    "linear_selective_log_softmax": (fastloss.linear_selective_log_softmax, (HIDDEN, HEAD, TOKENS), SELECTED, None),
    "softmax_entropy": (fastloss.softmax_entropy, (X,), {**NUMBERS, "row_mask": MASK}, None),
    "row_stats": (fastloss.row_stats, (X, TOKENS), {**NUMBERS, "row_mask": MASK}, None),
    "pointer_generator_nll": (
        fastloss.pointer_generator_nll,
        (X, numbers(B, T, seed=6), numbers(B, T, 4).softmax(-1), TOKENS[:, :4], TOKENS),
        {**NUMBERS, **PER_TOKEN, "coverage_weight": 0.5, "eps": 0.1, "reduction": "sum"},
        None,
    ),
    "info_nce": (fastloss.info_nce, (HIDDEN.flatten(0, 1), numbers(N, H, seed=5)), NCE, None),
    "linear_info_nce": (fastloss.linear_info_nce, (HIDDEN.flatten(0, 1), numbers(N, H, seed=5)), NCE, None),
    "kl_div": (fastloss.kl_div, (X.log_softmax(-1), TEACHER.softmax(-1)), ELEMENTS, None),
    "mse_loss": (fastloss.mse_loss, (X, TEACHER), ELEMENTS, None),
    "l1_loss": (fastloss.l1_loss, (X, TEACHER), ELEMENTS, None),
    "binary_cross_entropy_with_logits": (
        fastloss.binary_cross_entropy_with_logits, (X, TEACHER.sigmoid()), ELEMENTS, None
    ),
    "cosine_embedding_loss": (
        fastloss.cosine_embedding_loss,
        (ROWS, TEACHER.flatten(0, 1), torch.tensor([1, -1] * (N // 2))),
        {"margin": -0.5, "size_average": False, "reduce": False, "reduction": "sum"},
        None,
    ),
    "cosine_similarity_loss": (
        fastloss.cosine_similarity_loss, (X, TEACHER), {"dim": 0, "eps": 100.0, "reduction": "sum"}, None
    ),
    "triplet_margin_loss": (
        fastloss.triplet_margin_loss,
        (ROWS, TEACHER.flatten(0, 1), -0.1 * ROWS),
        {"margin": 2.0, "p": 1, "eps": 0.5, "swap": True, "size_average": False, "reduce": False, "reduction": "sum"},
        None,
    ),
    "gaussian_kl": (
        fastloss.gaussian_kl, (X, TEACHER), {"prior_mean": 1.0, "prior_log_var": 1.0, "reduction": "sum"}, None
    ),
    "robust_loss": (fastloss.robust_loss, (X, 1.0), {"scale": 2.0}, None),
    "lm.causal_lm_loss": (lm.causal_lm_loss, (X, TOKENS), LM, "cross_entropy"),
    "lm.masked_lm_loss": (lm.masked_lm_loss, (X, TOKENS), LM | {"positions": torch.arange(N)}, "cross_entropy"),
    "lm.next_sentence_loss": (
        lm.next_sentence_loss,
        (X[..., :2], TOKENS % 2),
        LM | {"weight": positive(2), "ignore_index": 1},
        "cross_entropy",
    ),
    "lm.sequence_cross_entropy": (
        lm.sequence_cross_entropy, (X, TOKENS), LM | {"length_normalised": False}, "cross_entropy"
    ),
    "lm.sequence_log_likelihood": (
        lm.sequence_log_likelihood, (X, TOKENS), LM | {"length_normalised": True}, None
    ),
    "lm.next_token_labels": (lm.next_token_labels, (TOKENS,), LM | {"ignore_index": -1}, None),
    "lm.masked_positions": (lm.masked_positions, (TOKENS,), LM, None),
    "lm.sliding_windows": (lm.sliding_windows, (TOKENS[0], 4, 3), {"shift": 2, "ignore_index": -1}, None),
    "lm.perplexity": (lambda x, y, **o: lm.perplexity([(x, y)], **o), (X, TOKENS), LM, None),
    "megatron.parallel_cross_entropy": (
        megatron.parallel_cross_entropy,
        (X, TOKENS),
        {**CE, "reduce_loss": True, "ignore_idx": 3, "z_loss_weight": 0.1, "vocab_size": V - 1},
        "cross_entropy",
    ),
}  # fmt: skip
SIGNATURES = {"lm.perplexity": lm.perplexity}
# Positional arguments of torch's beside the tensors, which the table gives.
PLACES = {"target", "positions", "alpha"}


def keywords(name: str) -> list[str]:
    """All that a function takes, also what it passes on."""
    function, _, _, passed_on = LOSSES[name]
    parameters = inspect.signature(SIGNATURES.get(name, function)).parameters.values()
    own = [p.name for p in parameters if p.default is not p.empty]
    more = keywords(passed_on) if passed_on else []
    if name.startswith("lm.") and passed_on:
        more += ["linear_weight", "linear_bias"]
    return list(dict.fromkeys(k for k in own + more if k not in PLACES or k in LOSSES[name][2]))


def leaves(result: Any) -> list[Tensor]:
    return [t for r in (result if isinstance(result, tuple) else (result,)) if r is not None for t in
            (leaves(r) if isinstance(r, tuple) else [r])]  # fmt: skip


def changes(function: Callable[..., Any], tensors: tuple[Any, ...], keyword: str, value: Any) -> bool:
    """Whether the result is another; an error that names the argument is as good."""
    before = leaves(function(*tensors))
    try:
        after = leaves(function(*tensors, **{keyword: value}))
    except (TypeError, ValueError, RuntimeError, NotImplementedError) as error:
        assert keyword in str(error), error
        return True
    alike = len(before) == len(after) and all(
        a.dtype == b.dtype and a.shape == b.shape and torch.allclose(a, b, equal_nan=True)
        for a, b in zip(before, after, strict=True)
    )
    return not alike


CALLS = [(name, keyword) for name in LOSSES for keyword in keywords(name) if keyword not in BY_DESIGN]


@pytest.mark.parametrize("backend", [None, "reference"])
@pytest.mark.parametrize(("name", "keyword"), CALLS)
@pytest.mark.filterwarnings("ignore:size_average and reduce:UserWarning")  # deprecated, as in torch
@pytest.mark.filterwarnings("ignore:reduction. 'mean' divides:UserWarning")  # torch's own of kl_div
def test_keyword_is_obeyed(name: str, keyword: str, backend: str | None) -> None:
    function, tensors, values, _ = LOSSES[name]
    assert keyword in values, f"give {keyword} of {name} a value that changes the result, or a place in BY_DESIGN"
    with fastloss.use_backend(backend):
        assert changes(function, tensors, keyword, values[keyword]), f"{name} takes {keyword} and does nothing with it"


def test_every_loss_has_its_place() -> None:
    others = {
        "empty_cache", "explain", "use_backend", "lm",  # no losses
        "AdaptiveLoss", "CrossEntropyLoss", "CrossEntropyStats", "KLDivLoss", "LinearCrossEntropyLoss", "RowStats",
        "UncertaintyWeighting", "VocabShard", "lm.Perplexity",  # no functions
    }  # fmt: skip
    public = set(fastloss.__all__) | {f"lm.{name}" for name in lm.__all__}
    assert public - others == {name for name in LOSSES if not name.startswith("megatron")}


MODULES = [
    (fastloss.CrossEntropyLoss, (), (ROWS, ROW_TOKENS), CE | {"reduce": False, "normalizer": 7.0}),
    (fastloss.KLDivLoss, (), (X.log_softmax(-1), TEACHER.softmax(-1)), ELEMENTS),
]


@pytest.mark.parametrize(("module", "made", "tensors", "values"), MODULES, ids=lambda m: getattr(m, "__name__", ""))
@pytest.mark.filterwarnings("ignore:size_average and reduce:UserWarning")
@pytest.mark.filterwarnings("ignore:reduction. 'mean' divides:UserWarning")
def test_modules_obey(module: Any, made: Any, tensors: Any, values: Any) -> None:
    before = leaves(module()(*tensors))
    for when, signature in (("made", module.__init__), ("called", module.forward)):
        for p in inspect.signature(signature).parameters.values():
            if p.default is p.empty or p.name in BY_DESIGN:
                continue
            given = {p.name: values[p.name]}
            after = leaves(module(**given)(*tensors) if when == "made" else module()(*tensors, **given))
            alike = len(before) == len(after) and all(
                a.dtype == b.dtype and a.shape == b.shape and torch.allclose(a, b)
                for a, b in zip(before, after, strict=True)
            )
            assert not alike, p.name


def test_linear_module_obeys() -> None:
    def result(when: str = "", **given: Any) -> list[Tensor]:
        made = fastloss.LinearCrossEntropyLoss(H, V, dtype=torch.float64, **(given if when == "made" else {}))
        made.linear.weight.data.copy_(HEAD)
        if made.linear.bias is not None:
            made.linear.bias.data.copy_(positive(V))
        return leaves(made(HIDDEN, TOKENS, **(given if when == "called" else {})))

    before = result()
    values = LINEAR | {"bias": True}
    names = {"made": ["bias", "reduction", "weight", "ignore_index", "label_smoothing", "z_loss", "softcap"]}
    names["made"] += ["logit_scale", "out_dtype", "return_stats"]
    names["called"] = ["token_weight", "normalizer"]
    for when, some in names.items():
        for name in some:
            after = result(when, **{name: values[name]})
            alike = len(before) == len(after) and before[0].dtype == after[0].dtype
            assert not (alike and before[0].shape == after[0].shape and torch.allclose(before[0], after[0])), name


# ---- with others, what does nothing raises ---------------------------------------------------------------------------

ALONE = VocabShard(0, V, V)


def linear(**options: Any) -> Tensor:
    return fastloss.linear_cross_entropy(HIDDEN, HEAD, TOKENS, **options)


def linear_module(**options: Any) -> Tensor:
    return fastloss.LinearCrossEntropyLoss(H, V, dtype=torch.float64, **options)(HIDDEN, TOKENS, shard=ALONE)


def causal(**options: Any) -> Tensor:
    return lm.causal_lm_loss(HIDDEN, TOKENS, linear_weight=HEAD, **options)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: linear(filter_eps=1e-3, shard=ALONE), ValueError, "filter_eps"),
        (lambda: linear(filter_eps=0, shard=ALONE), ValueError, "filter_eps"),
        (lambda: linear_module(filter_eps=1e-3), ValueError, "filter_eps"),
        (lambda: causal(filter_eps=1e-3, shard=ALONE), ValueError, "filter_eps"),
        (lambda: linear(options={"batch_chunk_size": 2}), TypeError, "options"),
        (lambda: megatron.parallel_cross_entropy(X, TOKENS, vocab_size=V + 1), ValueError, "vocab_size"),
        (lambda: megatron.parallel_cross_entropy(X, TOKENS, return_stats=True), TypeError, "return_stats"),
        (lambda: lm.sequence_cross_entropy(X, TOKENS, size_average=False), TypeError, "size_average"),
        (lambda: lm.sequence_cross_entropy(X, TOKENS, reduce=False), TypeError, "reduce"),
        (
            lambda: fastloss.info_nce(ROWS, ROWS, temperature=torch.ones(N, 1)),
            ValueError,
            "temperature: expected a number or a tensor of one element",
        ),
    ],
)  # fmt: skip
def test_what_does_nothing_raises(call: Callable[[], Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call()


APART = VocabShard(0, V, V, sum_hidden=False)


@pytest.mark.parametrize(
    "call",
    [
        lambda: fastloss.cross_entropy(ROWS, ROW_TOKENS, shard=APART),
        lambda: fastloss.row_stats(X, TOKENS, shard=APART),
        lambda: fastloss.selective_log_softmax(X, INDICES, shard=APART),
        lambda: fastloss.kl_div_with_logits(X, TEACHER, shard=APART),
        lambda: fastloss.topk_cross_entropy(X, INDICES, PROBS, shard=APART),
        lambda: fastloss.info_nce(ROWS, ROWS, shard=VocabShard(0, N, N, sum_hidden=False)),
        lambda: fastloss.linear_info_nce(ROWS, ROWS, shard=VocabShard(0, N, N, sum_hidden=False)),
    ],
)
def test_no_hidden_states_to_sum(call: Callable[[], Any]) -> None:
    with pytest.raises(ValueError, match="sum_hidden: expected True"):
        call()


def test_padding_without_ranks() -> None:
    """vocab_size leaves out what logits hold beyond it, also where no group is given."""
    x = torch.cat([X, torch.full((B, T, 3), 50.0, dtype=torch.float64)], -1).requires_grad_()
    options = {"label_smoothing": 0.1, "vocab_size": V}
    got = megatron.parallel_cross_entropy(x, TOKENS, **options)
    want = torch.nn.functional.cross_entropy(ROWS, ROW_TOKENS, label_smoothing=0.1, reduction="none").view(B, T)
    torch.testing.assert_close(got, want.float())
    got.sum().backward()
    assert not x.grad[..., V:].any() and x.grad[..., :V].any()


def test_graphs_may_be_captured() -> None:
    """With is_cg_capturable or without the loss is the same, and on a device it reads no number on the host."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    losses = [megatron.parallel_cross_entropy(X, TOKENS, is_cg_capturable=said) for said in (False, True)]
    assert torch.equal(*losses)
    with FakeTensorMode():  # where a number that is read is an error
        x, y = torch.empty(B, T, V, device="meta"), torch.empty(B, T, device="meta", dtype=torch.int64)
        with fastloss.use_backend("reference"):
            assert megatron.parallel_cross_entropy(x, y, is_cg_capturable=True, reduce_loss=True).shape == ()
