"""Every loss over a vocabulary as a call whose sizes have names: what is exported or compiled once for all sizes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from cases import textbook_cross_entropy, textbook_divergence, textbook_log_probs, textbook_topk, textbook_topk_kl
from torch import Tensor

import fastloss
from fastloss import lm

Sizes = dict[str, int]
EXAMPLE: Sizes = {"B": 3, "T": 5, "V": 11, "H": 7, "G": 9, "K": 4, "N": 6, "S": 8, "M": 10}
CHUNKS = 400  # bytes of logits: a few rows of any of these vocabularies


@dataclass(frozen=True)
class Call:
    """`tensors`: by the argument's name, what it holds and a letter for each dimension. `textbook` takes them too."""

    loss: Callable[..., Any]
    tensors: dict[str, str]
    textbook: Callable[..., Any]
    options: dict[str, Any] = field(default_factory=dict)

    def dims(self) -> list[str]:
        """The letters of each tensor's dimensions."""
        return [held.partition(" ")[2] for held in self.tensors.values()]

    def inputs(self, sizes: Sizes, g: torch.Generator) -> list[Tensor]:
        return [_made(held, sizes, g) for held in self.tensors.values()]

    def ours(self, *tensors: Tensor) -> list[Tensor]:
        return leaves(self.loss(**dict(zip(self.tensors, tensors, strict=True)), **self.options))

    def exact(self, *tensors: Tensor) -> list[Tensor]:
        """As a textbook has it, in float64."""
        wide = [t.double() if t.is_floating_point() else t for t in tensors]
        return leaves(self.textbook(**dict(zip(self.tensors, wide, strict=True)), **self.options))


def leaves(value: Any) -> list[Tensor]:
    return [value] if isinstance(value, Tensor) else [t for v in value for t in leaves(v)]


def _made(held: str, sizes: Sizes, g: torch.Generator) -> Tensor:
    kind, _, dims = held.partition(" ")
    shape = [sizes[d] for d in dims]
    if kind == "normal":
        return torch.randn(shape, generator=g)
    if kind == "positive":
        return torch.rand(shape, generator=g) + 0.1
    if kind == "probs":
        return torch.rand(shape, generator=g).softmax(-1) * 0.9
    if kind == "lengths":
        return torch.randint(1, sizes["T"] + 1, shape, generator=g)
    if kind == "first":
        return torch.arange(shape[0])
    if kind == "documents":
        return torch.randint(3, shape, generator=g).sort(-1).values
    if kind == "positions":  # another document begins now and then
        return (torch.arange(shape[1]) + torch.randint(4, shape[:1], generator=g)[:, None]) % 4
    if kind == "mask":
        return (torch.rand(shape, generator=g) < 0.7).index_fill(0, torch.tensor(0), True)
    y = torch.randint(sizes["V"], shape, generator=g)
    if kind == "some" and y.numel() > 1:  # not all of them count
        y.view(-1)[0] = -100
    return y


CALLS: dict[str, Call] = {}


def _add(
    name: str,
    loss: Callable[..., Any],
    textbook: Callable[..., Any],
    tensors: dict[str, str],
    linear: Callable[..., Any] | None = None,
    **options: Any,
) -> None:
    """A loss of logits (..., V), which come first; and the same of hidden states."""
    CALLS[name] = Call(loss, tensors, textbook, options)
    if linear is None:
        return
    (first, held), *rest = tensors.items()
    head = {first: held[:-1] + "H", "linear_weight": "normal VH", "linear_bias": "normal V"}
    teacher = dict(rest).pop("target_logits", None)
    if teacher is not None:
        rest = [item for item in rest if item[0] != "target_logits"]
        head |= {"target_input": teacher[:-1] + "G", "target_linear_weight": "normal VG"}

    def of_all_logits(**given: Any) -> Any:
        given.pop("max_chunk_bytes")
        logits = F.linear(given.pop(first), given.pop("linear_weight"), given.pop("linear_bias"))
        if teacher is not None:
            given["target_logits"] = F.linear(given.pop("target_input"), given.pop("target_linear_weight"))
        return textbook(**{first: logits}, **given)

    options = options | {"max_chunk_bytes": CHUNKS}
    CALLS[f"linear_{name}"] = Call(linear, head | dict(rest), of_all_logits, options)


def _of_rows(textbook: Callable[..., Tensor], classes: int = -1) -> Callable[..., Tensor]:
    """A textbook's (N, V) loss of more dimensions, the classes in one of them."""

    def loss(input: Tensor, *args: Tensor, **given: Any) -> Tensor:
        x, shape = input.movedim(classes, -1), args[0].shape
        as_rows = [x.flatten(0, -2)]
        for t in args:
            t = t.movedim(classes, -1) if t.shape == input.shape else t
            as_rows.append(t.flatten() if t.dim() < x.dim() else t.flatten(0, -2))
        for name in ("token_weight", "mask"):
            if name in given:
                given[name] = given[name].flatten()
        result = textbook(*as_rows, **given)
        return result if result.dim() == 0 else result.reshape(x.shape[:-1] if shape == input.shape else shape)

    return loss


def _class_second(input: Tensor, target: Tensor, **given: Any) -> Tensor:
    return _of_rows(textbook_cross_entropy, 1)(input, target, **given)


def _cross_entropy(input: Tensor, target: Tensor, **given: Any) -> Tensor:
    return _of_rows(textbook_cross_entropy)(input, target, **given)


def _divergence(input: Tensor, target_logits: Tensor, **given: Any) -> Tensor:
    return _of_rows(textbook_divergence)(input, target_logits, **given)


def _topk(textbook: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def loss(input: Tensor, indices: Tensor, probs: Tensor, reduction: str = "mean", **given: Any) -> Tensor:
        result = textbook(*(t.flatten(0, -2) for t in (input, indices, probs)), reduction=reduction, **given)
        return result.reshape(input.shape[:-1]) if reduction == "none" else result

    return loss


def _selective(input: Tensor, index: Tensor, temperature: float, return_entropy: bool) -> Any:
    many = index if index.dim() == input.dim() else index[..., None]
    log_prob = textbook_log_probs(input, many, temperature).reshape(index.shape)
    entropy = torch.distributions.Categorical(logits=input / temperature).entropy()
    return log_prob, torch.where((many != -100).any(-1), entropy, 0)  # an ignored row has none


def _row_stats(input: Tensor, target: Tensor) -> list[Tensor]:
    y = torch.where(target == -100, 0, target)[..., None]
    lse, logit = input.logsumexp(-1), input.gather(-1, y)
    entropy = torch.distributions.Categorical(logits=input).entropy()
    valid = target != -100
    rank = (input > logit).sum(-1)
    found = lse, logit[..., 0], logit[..., 0] - lse, entropy, input.argmax(-1), rank
    return [torch.where(valid, t, 0) for t in found]  # an ignored row has none


def _pointer(
    input: Tensor, gate_logit: Tensor, attention: Tensor, source_ids: Tensor, target: Tensor, reduction: str, **_: Any
) -> Tensor:
    y, gate = torch.where(target == -100, 0, target), gate_logit.sigmoid()
    copied = (attention * (source_ids[:, None] == y[..., None])).sum(-1)
    generated = input.softmax(-1).gather(-1, y[..., None])[..., 0]
    coverage = torch.minimum(attention, attention.cumsum(1) - attention).sum(-1)
    loss = torch.where(target == -100, 0, coverage - (gate * generated + (1 - gate) * copied + 1e-3).log())
    return loss if reduction == "none" else loss.sum() / (target != -100).sum()


def _info_nce(
    query: Tensor,
    key: Tensor,
    negatives: Tensor | None = None,
    symmetric: bool = False,
    reduction: str = "mean",
    **_: Any,
) -> Tensor:
    query, key = F.normalize(query, dim=-1), F.normalize(key, dim=-1)
    keys = key if negatives is None else torch.cat([key, F.normalize(negatives, dim=-1)])
    y = torch.arange(query.shape[0])
    loss = F.cross_entropy(query @ keys.T / 0.07, y, reduction=reduction)
    return (loss + F.cross_entropy(key @ query.T / 0.07, y, reduction=reduction)) / 2 if symmetric else loss


def _next_token(logits: Tensor, labels: Tensor, reduction: str = "mean", **given: Any) -> Tensor:
    """Of logits (B, T, V); what does not count is cut off or ignored."""
    padding, weight = given.get("attention_mask"), given.get("token_weight")
    ids, positions = given.get("document_ids"), given.get("position_ids")
    y = labels[:, 1:].clone()
    if padding is not None:
        y[~padding[:, 1:] | ~padding[:, :-1]] = -100
    if ids is not None and positions is not None:
        y[(ids[:, 1:] != ids[:, :-1]) | (positions[:, 1:] <= positions[:, :-1])] = -100
    w = torch.ones_like(y, dtype=logits.dtype) if weight is None else weight[:, 1:]
    loss = F.cross_entropy(logits[:, :-1].movedim(-1, 1), y, reduction="none") * w
    return F.pad(loss, (0, 1)) if reduction == "none" else loss.sum() / w[y != -100].sum()


def _sequences(logits: Tensor, labels: Tensor, lengths: Tensor, reduction: str = "mean") -> Tensor:
    losses, counted = [], 0
    for x, y, n in zip(logits, labels, lengths.tolist(), strict=True):
        losses.append(F.cross_entropy(x[: n - 1], y[1:n]) if n > 1 else x.new_zeros(()))
        counted += n > 1
    each = torch.stack(losses)
    return each if reduction == "none" else each.sum() / counted


def _likelihood(logits: Tensor, labels: Tensor, lengths: Tensor) -> Tensor:
    rows = zip(logits, labels, lengths.tolist(), strict=True)
    return torch.stack([-F.cross_entropy(x[: n - 1], y[1:n], reduction="sum") for x, y, n in rows])


def _masked(logits: Tensor, labels: Tensor, positions: Tensor | None = None, reduction: str = "mean") -> Tensor:
    y = labels if positions is None else labels.flatten()[positions]
    loss = F.cross_entropy(logits.reshape(-1, logits.shape[-1]), y.flatten(), reduction=reduction)
    return loss.reshape(y.shape) if reduction == "none" else loss


for _r in ("mean", "none"):
    _n = {"reduction": _r}
    _weights = {"token_weight": "positive BT", "mask": "mask BT"}
    _ce, _lce = fastloss.cross_entropy, fastloss.linear_cross_entropy
    _add(f"cross_entropy_{_r}", _ce, _cross_entropy, {"input": "normal NV", "target": "some N"}, _lce, **_n)
    _add(f"probabilities_{_r}", _ce, _cross_entropy, {"input": "normal NV", "target": "probs NV"}, _lce, **_n)
    _add(f"time_{_r}", _ce, _class_second, {"input": "normal BVT", "target": "some BT"}, **_n)
    _add(f"image_{_r}", _ce, _class_second, {"input": "normal BVTS", "target": "some BTS"}, **_n)
    _add(f"time_probabilities_{_r}", _ce, _class_second, {"input": "normal BVT", "target": "probs BVT"}, **_n)
    _given = {"weight": "positive V", **_weights}
    _squashed = {"label_smoothing": 0.1, "z_loss": 1e-3, "softcap": 5.0, **_n}
    _add(f"options_{_r}", _ce, _class_second, {"input": "normal BVT", "target": "some BT", **_given}, **_squashed)
    _given = {"input": "normal BTH", "linear_weight": "normal VH", "target": "some BT", **_given}
    _textbook = lambda input, linear_weight, **given: _cross_entropy(F.linear(input, linear_weight), **given)  # noqa: E731
    CALLS[f"linear_options_{_r}"] = Call(_lce, _given, _textbook, _squashed)
    for _d in ("forward", "reverse"):
        _given = {"input": "normal BTV", "target_logits": "normal BTV", **_weights}
        _both = fastloss.kl_div_with_logits, fastloss.linear_kl_div
        _add(f"{_d}_kl_{_r}", _both[0], _divergence, _given, _both[1], direction=_d, **_n)
    _given = {"input": "normal BTV", "target_logits": "normal BTV"}
    _both = fastloss.js_div_with_logits, fastloss.linear_js_div
    _add(f"js_{_r}", _both[0], _divergence, _given, _both[1], beta=0.3, **_n)
    _given = {"input": "normal BTV", "indices": "some BTK", "probs": "probs BTK"}
    for _t in ("ignore", "lump"):
        _both = fastloss.topk_cross_entropy, fastloss.linear_topk_cross_entropy
        _add(f"topk_{_t}_{_r}", _both[0], _topk(textbook_topk), _given, _both[1], tail=_t, **_n)
        _both = fastloss.topk_kl_div, fastloss.linear_topk_kl_div
        _add(f"topk_kl_{_t}_{_r}", _both[0], _topk(textbook_topk_kl), _given, _both[1], tail=_t, **_n)
    _given = {"gate_logit": "normal BT", "attention": "probs BTS", "source_ids": "any BS", "target": "some BT"}
    _more = {"coverage_weight": 1.0, "eps": 1e-3, **_n}
    _add(f"pointer_{_r}", fastloss.pointer_generator_nll, _pointer, {"input": "normal BTV", **_given}, **_more)
    _pair = {"query": "normal NH", "key": "normal NH"}
    for _name, _f in (("info_nce", fastloss.info_nce), ("linear_info_nce", fastloss.linear_info_nce)):
        _more = {"max_chunk_bytes": CHUNKS, **_n} if _name.startswith("linear") else _n
        CALLS[f"{_name}_{_r}"] = Call(_f, _pair, _info_nce, _more)
        CALLS[f"{_name}_symmetric_{_r}"] = Call(_f, _pair, _info_nce, {"symmetric": True, **_more})
        CALLS[f"{_name}_negatives_{_r}"] = Call(_f, {**_pair, "negatives": "normal MH"}, _info_nce, _more)
    _given = {"logits": "normal BTV", "labels": "any BT"}
    _packed = {"document_ids": "documents BT", "position_ids": "positions BT", "token_weight": "positive BT"}
    _add(f"causal_lm_{_r}", lm.causal_lm_loss, _next_token, _given, lm.causal_lm_loss, **_n)
    _given |= {"attention_mask": "mask BT"}
    _add(f"packed_lm_{_r}", lm.causal_lm_loss, _next_token, {**_given, **_packed}, lm.causal_lm_loss, **_n)
    _given = {"logits": "normal BTV", "labels": "some BT"}
    _add(f"masked_lm_{_r}", lm.masked_lm_loss, _masked, _given, lm.masked_lm_loss, **_n)
    _given = {"logits": "normal MV", "labels": "any BT", "positions": "first M"}
    _add(f"masked_positions_{_r}", lm.masked_lm_loss, _masked, _given, lm.masked_lm_loss, **_n)
    _given = {"logits": "normal BTV", "labels": "any BT", "lengths": "lengths B"}
    _add(f"sequences_{_r}", lm.sequence_cross_entropy, _sequences, _given, lm.sequence_cross_entropy, **_n)

_add("likelihood", lm.sequence_log_likelihood, _likelihood, _given)
_given = {"input": "normal NV", "target_logits": "normal NV"}
_both = fastloss.kl_div_with_logits, fastloss.linear_kl_div
_add("kl_batchmean", _both[0], _divergence, _given, _both[1], reduction="batchmean")
_add("row_stats", fastloss.row_stats, _row_stats, {"input": "normal BTV", "target": "some BT"})
for _name, _held in (("one", "some BT"), ("many", "some BTK")):
    _both = fastloss.selective_log_softmax, fastloss.linear_selective_log_softmax
    _more = {"temperature": 1.5, "return_entropy": True}
    _add(f"selective_{_name}", _both[0], _selective, {"input": "normal BTV", "index": _held}, _both[1], **_more)
