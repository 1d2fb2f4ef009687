"""fastloss.lm: every recipe against the textbook's expression in float64, values and gradients."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fastloss import lm

B, T, V = 3, 7, 11


@pytest.fixture
def logits(generator: torch.Generator) -> Tensor:
    return torch.randn(B, T, V, generator=generator, dtype=torch.float64).requires_grad_()


@pytest.fixture
def tokens(generator: torch.Generator) -> Tensor:
    return torch.randint(V, (B, T), generator=generator)


def token_losses(logits: Tensor, tokens: Tensor) -> Tensor:
    """(B, T - 1): of the token after each position."""
    return -logits[:, :-1].log_softmax(-1).gather(-1, tokens[:, 1:, None]).squeeze(-1)


def same(got: Tensor, want: Tensor, logits: Tensor) -> None:
    torch.testing.assert_close(got, want)
    upstream = torch.rand(want.shape, dtype=want.dtype)
    gradients = [torch.autograd.grad(y, logits, upstream, retain_graph=True)[0] for y in (got, want)]
    torch.testing.assert_close(*gradients)


def weighted_mean(losses: Tensor, weights: Tensor) -> Tensor:
    return (losses * weights).sum() / weights.sum()


# ---- causal ----------------------------------------------------------------------------------------------------------


def test_causal(logits, tokens):
    same(lm.causal_lm_loss(logits, tokens), token_losses(logits, tokens).mean(), logits)
    same(lm.causal_lm_loss(logits, tokens, reduction="sum"), token_losses(logits, tokens).sum(), logits)
    per_token = lm.causal_lm_loss(logits, tokens, reduction="none")
    same(per_token, F.pad(token_losses(logits, tokens), (0, 1)), logits)
    same(lm.causal_lm_loss(logits, tokens, normalizer=5.0), token_losses(logits, tokens).sum() / 5, logits)


def test_causal_with_labels_shifted_before(logits, tokens):
    shifted = F.pad(tokens, (0, 1), value=-100)[:, 1:]
    same(lm.causal_lm_loss(logits, shifted, shift=False), token_losses(logits, tokens).mean(), logits)


def test_causal_options_are_cross_entropys(logits, tokens):
    w = torch.rand(V, dtype=torch.float64)
    want = F.cross_entropy(
        logits[:, :-1].reshape(-1, V), tokens[:, 1:].reshape(-1), weight=w, label_smoothing=0.1, ignore_index=3
    )
    same(lm.causal_lm_loss(logits, tokens, weight=w, label_smoothing=0.1, ignore_index=3), want, logits)
    loss, stats = lm.causal_lm_loss(logits, tokens, return_stats=True)
    assert stats.lse.shape == tokens.shape and loss.shape == ()


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding(logits, tokens, side):
    lengths = torch.tensor([7, 4, 2])
    at = torch.arange(T)
    mask = at < lengths[:, None] if side == "right" else at >= T - lengths[:, None]
    weights = (mask[:, 1:] & mask[:, :-1]).double()
    same(
        lm.causal_lm_loss(logits, tokens, attention_mask=mask),
        weighted_mean(token_losses(logits, tokens), weights),
        logits,
    )
    same(
        lm.causal_lm_loss(logits, tokens, attention_mask=mask.long(), reduction="sum"),
        (token_losses(logits, tokens) * weights).sum(),
        logits,
    )


def test_packed_documents(logits, tokens):
    """Nothing is predicted across a border, said by ids or by positions."""
    ids = torch.tensor([[0, 0, 0, 1, 1, 2, 2], [0] * 7, [0, 1, 2, 3, 4, 5, 6]])
    positions = torch.tensor([[0, 1, 2, 0, 1, 0, 1], list(range(7)), [0] * 7])
    weights = (ids[:, 1:] == ids[:, :-1]).double()
    want = weighted_mean(token_losses(logits, tokens), weights)
    same(lm.causal_lm_loss(logits, tokens, document_ids=ids), want, logits)
    same(lm.causal_lm_loss(logits, tokens, position_ids=positions), want, logits)


def test_token_weight_moves_with_its_label(logits, tokens, generator):
    w = torch.rand(B, T, generator=generator, dtype=torch.float64)
    want = weighted_mean(token_losses(logits, tokens), w[:, 1:])
    same(lm.causal_lm_loss(logits, tokens, token_weight=w), want, logits)


def test_nothing_counts(logits, tokens):
    nothing = torch.full_like(tokens, -100)
    loss = lm.causal_lm_loss(logits, nothing)
    assert loss.isnan()
    assert not torch.autograd.grad(loss, logits)[0].any()
    assert lm.causal_lm_loss(logits, nothing, reduction="sum") == 0


def test_labels_are_counted_as_trainers_do(tokens):
    mask = torch.ones_like(tokens)
    mask[1, 4:] = 0
    target = lm.next_token_labels(tokens, attention_mask=mask)
    assert (target != -100).sum() == B * (T - 1) - 3


# ---- masked, next sentence ------------------------------------------------------------------------------------------


def test_masked(logits, tokens, generator):
    labels = torch.where(torch.rand(B, T, generator=generator) < 0.4, tokens, -100)
    want = F.cross_entropy(logits.reshape(-1, V), labels.reshape(-1))
    same(lm.masked_lm_loss(logits, labels), want, logits)
    positions = lm.masked_positions(labels)
    rows = logits.reshape(-1, V)[positions]
    assert len(rows) < B * T
    same(lm.masked_lm_loss(rows, labels, positions), want, logits)
    assert lm.masked_lm_loss(rows, labels, positions, reduction="none").shape == positions.shape


def test_next_sentence(generator):
    x = torch.randn(5, 2, generator=generator, dtype=torch.float64).requires_grad_()
    y = torch.tensor([0, 1, 1, 0, 1])
    same(lm.next_sentence_loss(x, y), F.cross_entropy(x, y), x)
    with pytest.raises(ValueError, match="logits: expected shape"):
        lm.next_sentence_loss(torch.zeros(5, 3), y)


# ---- sequences -------------------------------------------------------------------------------------------------------


def by_sequence(logits: Tensor, tokens: Tensor, lengths: Tensor, reduce: Callable[[Tensor], Tensor]) -> Tensor:
    return torch.stack([reduce(t[: n - 1]) for t, n in zip(token_losses(logits, tokens), lengths, strict=True)])


def test_sequences_count_alike(logits, tokens):
    lengths = torch.tensor([7, 3, 2])
    means = by_sequence(logits, tokens, lengths, torch.mean)
    same(lm.sequence_cross_entropy(logits, tokens, lengths=lengths), means.mean(), logits)
    same(lm.sequence_cross_entropy(logits, tokens, lengths=lengths, reduction="none"), means, logits)
    mask = torch.arange(T) < lengths[:, None]
    same(lm.sequence_cross_entropy(logits, tokens, mask=mask, reduction="sum"), means.sum(), logits)
    sums = by_sequence(logits, tokens, lengths, torch.sum)
    got = lm.sequence_cross_entropy(logits, tokens, lengths=lengths, length_normalised=False, reduction="none")
    same(got, sums, logits)


def test_sequences_without_labels_do_not_count(logits, tokens):
    lengths = torch.tensor([7, 1, 0])
    want = token_losses(logits, tokens)[0].mean()
    same(lm.sequence_cross_entropy(logits, tokens, lengths=lengths), want, logits)
    assert lm.sequence_cross_entropy(logits, tokens, lengths=lengths, reduction="none")[1:].eq(0).all()


def test_context_is_not_scored(logits, tokens):
    want = token_losses(logits, tokens)[:, 3:].mean(1).mean()
    same(lm.sequence_cross_entropy(logits, tokens, context=4), want, logits)


def test_log_likelihood(logits, tokens):
    lengths = torch.tensor([7, 3, 2])
    want = -by_sequence(logits, tokens, lengths, torch.sum)
    same(lm.sequence_log_likelihood(logits, tokens, lengths=lengths), want, logits)
    want = -by_sequence(logits, tokens, lengths, torch.mean)
    same(lm.sequence_log_likelihood(logits, tokens, lengths=lengths, length_normalised=True), want, logits)
    assert lm.sequence_log_likelihood(logits.detach().bfloat16(), tokens).dtype == torch.float32


@pytest.mark.parametrize(
    ("length", "window", "stride"), [(20, 8, 3), (20, 8, 7), (8, 8, 4), (5, 8, 4), (9, 8, 1), (2, 2, 1)]
)
def test_windows_count_each_token_once(length, window, stride):
    text = torch.arange(length)
    inputs, labels = lm.sliding_windows(text, window, stride)
    counted = labels[labels != -100]
    assert counted.tolist() == text.tolist()
    assert (inputs[labels != -100] == counted).all()
    for k, row in enumerate(labels[1:]):
        assert (row == -100).sum() >= window - stride, k


def test_windows_score_a_text_with_its_context(generator):
    """A model that sees one token back gives the same loss in windows as in one piece."""
    table = torch.randn(V, V, generator=generator, dtype=torch.float64)
    text = torch.randint(V, (50,), generator=generator)
    inputs, labels = lm.sliding_windows(text, 12, 5)
    whole = lm.causal_lm_loss(table[text], text, reduction="sum")
    torch.testing.assert_close(lm.causal_lm_loss(table[inputs], labels, reduction="sum"), whole)


# ---- perplexity ------------------------------------------------------------------------------------------------------


def test_perplexity_of_a_corpus(generator):
    """Batches of any size weigh as much as their tokens; nothing is lost between them."""
    sizes = [(1, 5), (4, 9), (2, 2), (3, 30)]
    batches = [
        (torch.randn(b, t, V, generator=generator), torch.randint(V, (b, t), generator=generator)) for b, t in sizes
    ]
    losses = torch.cat([token_losses(x.double(), y).flatten() for x, y in batches])
    want = losses.mean().exp()
    torch.testing.assert_close(lm.perplexity(iter(batches)), want, rtol=1e-7, atol=0)
    streams = [lm.Perplexity(), lm.Perplexity()]
    for k, (x, y) in enumerate(batches):
        streams[k % 2].update(x, y, byte_count=10)
    streams[0].merge(streams[1])
    torch.testing.assert_close(streams[0].compute(), want, rtol=1e-7, atol=0)
    assert streams[0].tokens == len(losses)
    torch.testing.assert_close(streams[0].bits_per_byte(), losses.sum() / (40 * math.log(2)), rtol=1e-7, atol=0)
    torch.testing.assert_close(streams[0].all_reduce().compute(), want, rtol=1e-7, atol=0)
    streams[0].reset()
    assert streams[0].compute().isnan()


def test_perplexity_keeps_the_digits_of_many_small_batches():
    stream = lm.Perplexity(shift=False)
    x, y = torch.tensor([[0.1, 0.0]]), torch.tensor([0])
    for _ in range(1000):
        stream.update(x, y)
    torch.testing.assert_close(stream.mean(), F.cross_entropy(x.double(), y), rtol=1e-7, atol=0)


# ---- bad input -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda x, y: lm.causal_lm_loss(x, y[:, 1:]), ValueError, "logits: expected shape"),
        (lambda x, y: lm.causal_lm_loss(x, y.float()), RuntimeError, "labels: expected an integer"),
        (lambda x, y: lm.causal_lm_loss(x, [1, 2]), TypeError, "'labels' must be Tensor"),
        (lambda x, y: lm.causal_lm_loss(None, y), TypeError, "'logits' must be Tensor"),
        (lambda x, y: lm.causal_lm_loss(x, y, attention_mask=y[:1]), ValueError, "attention_mask: expected"),
        (lambda x, y: lm.causal_lm_loss(x, y, token_weight=x), ValueError, "token_weight: expected"),
        (lambda x, y: lm.causal_lm_loss(x, y + V), IndexError, "out of bounds"),
        (lambda x, y: lm.masked_lm_loss(x, y, torch.arange(3)), ValueError, r"positions \(M\)"),
        (lambda x, y: lm.sequence_cross_entropy(x, y, lengths=y), ValueError, "lengths: expected"),
        (lambda x, y: lm.sequence_cross_entropy(x, y, context=-1), ValueError, "context: expected"),
        (lambda x, y: lm.sequence_cross_entropy(x, y, reduction="max"), ValueError, "reduction"),
        (lambda x, y: lm.sliding_windows(y, 4, 2), ValueError, "tokens: expected shape"),
        (lambda x, y: lm.sliding_windows(y[0], 4, 4), ValueError, "stride"),
        (lambda x, y: lm.sliding_windows(y[0], 1, 1), ValueError, "window"),
    ],
)
def test_bad_input(call, error, message):
    with pytest.raises(error, match=message):
        call(torch.zeros(B, T, V), torch.zeros(B, T, dtype=torch.int64))


# ---- predicting the k-th next token ---------------------------------------------------------------------------------


def in_loops(
    logits: Tensor, tokens: Tensor, k: int, counts: Callable[[int, int], bool], weight: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Losses (B, T), of position t that of token t + k where that counts, and their weights, one by one."""
    losses = [[logits.sum() * 0 for _ in range(T)] for _ in range(B)]
    weights = torch.zeros(B, T, dtype=torch.float64)
    for b in range(B):
        for t in range(T):
            if t + k < T and counts(b, t):
                losses[b][t] = logits[b, t].logsumexp(-1) - logits[b, t, tokens[b, t + k]]
                weights[b, t] = 1 if weight is None else weight[b, t + k]
    return torch.stack([torch.stack(row) for row in losses]), weights


SHIFTS = [True, 1, 2, 3, T - 1]


@pytest.mark.parametrize("shift", SHIFTS)
def test_shift(logits, tokens, generator, shift):
    w = torch.rand(B, T, generator=generator, dtype=torch.float64)
    losses, counted = in_loops(logits, tokens, int(shift), lambda b, t: True)
    same(lm.causal_lm_loss(logits, tokens, shift=shift, reduction="none"), losses, logits)
    same(lm.causal_lm_loss(logits, tokens, shift=shift), weighted_mean(losses, counted), logits)
    losses, weights = in_loops(logits, tokens, int(shift), lambda b, t: True, w)
    got = lm.causal_lm_loss(logits, tokens, shift=shift, token_weight=w)
    same(got, weighted_mean(losses, weights), logits)
    by_sequence = (losses * weights).sum(1) / weights.sum(1)
    same(lm.sequence_cross_entropy(logits, tokens, shift=shift, token_weight=w), by_sequence.mean(), logits)
    stream = lm.Perplexity(shift=shift)
    stream.update(logits, tokens)
    want = (losses.sum() / (counted > 0).sum()).exp()
    torch.testing.assert_close(stream.compute(), want.detach())
    torch.testing.assert_close(lm.perplexity([(logits, tokens)], shift=shift), want.detach())


@pytest.mark.parametrize("shift", SHIFTS)
def test_shift_of_hidden_states(tokens, generator, shift):
    hidden = torch.randn(B, T, 5, generator=generator, dtype=torch.float64).requires_grad_()
    head = torch.randn(V, 5, generator=generator, dtype=torch.float64)
    losses, counted = in_loops(hidden @ head.T, tokens, int(shift), lambda b, t: True)
    same(lm.causal_lm_loss(hidden, tokens, linear_weight=head, shift=shift), weighted_mean(losses, counted), hidden)
    got = lm.sequence_log_likelihood(hidden, tokens, linear_weight=head, shift=shift)
    same(got, -losses.sum(1), hidden)


@pytest.mark.parametrize("shift", SHIFTS)
@pytest.mark.parametrize("said", ["document_ids", "position_ids", "attention_mask"])
def test_shift_over_borders(logits, tokens, shift, said):
    """No border may lie between t and t + k, also where a document's id comes again; neither may be padding."""
    k = int(shift)
    values = {
        "document_ids": [[0, 0, 0, 1, 1, 0, 0], [0] * T, [0, 1, 1, 1, 0, 0, 0]],
        "position_ids": [[0, 1, 2, 0, 1, 0, 1], list(range(T)), [5, 9, 2, 8, 9, 9, 11]],
        "attention_mask": [[0, 1, 1, 1, 1, 1, 1], [1] * T, [1, 1, 1, 1, 1, 0, 0]],
    }[said]

    def counts(b: int, t: int) -> bool:
        row, steps = values[b], range(t, t + k)
        if said == "document_ids":
            return all(row[s] == row[s + 1] for s in steps)
        if said == "position_ids":
            return all(row[s] < row[s + 1] for s in steps)
        return bool(row[t] and row[t + k])

    losses, weights = in_loops(logits, tokens, k, counts)
    options = {said: torch.tensor(values), "shift": shift}
    same(lm.causal_lm_loss(logits, tokens, reduction="sum", **options), losses.sum(), logits)
    assert (lm.next_token_labels(tokens, **options) != -100).sum() == weights.sum()
    stream = lm.Perplexity(shift=shift)
    stream.update(logits, tokens, **{said: options[said]})
    assert stream.tokens == weights.sum()
    torch.testing.assert_close(stream.nll, losses.sum().detach())


@pytest.mark.parametrize("shift", [1, 2, 3])
def test_shift_within_lengths_mask_and_context(logits, tokens, generator, shift):
    lengths, context = torch.tensor([7, 5, 2]), 3
    mask = torch.rand(B, T, generator=generator) < 0.7

    def counts(b: int, t: int) -> bool:
        return bool(t + shift < lengths[b] and mask[b, t + shift])

    losses, _ = in_loops(logits, tokens, shift, counts)
    options = {"lengths": lengths, "mask": mask, "shift": shift}
    same(lm.sequence_log_likelihood(logits, tokens, **options), -losses.sum(1), logits)
    losses, weights = in_loops(logits, tokens, shift, lambda b, t: counts(b, t) and t + shift >= context)
    got = lm.sequence_cross_entropy(logits, tokens, context=context, reduction="none", **options)
    same(got, losses.sum(1) / weights.sum(1).clamp(min=1), logits)


@pytest.mark.parametrize("shift", [0, 1, 2, 5])
def test_windows_count_each_token_that_a_shift_predicts_once(generator, shift):
    """The loss of a model that sees nothing back is that of the text in one piece."""
    table = torch.randn(V, V, generator=generator, dtype=torch.float64)
    text = torch.randint(V, (50,), generator=generator)
    whole = lm.causal_lm_loss(table[text], text, shift=shift, reduction="sum")
    for stride in (12 - shift, 3):
        inputs, labels = lm.sliding_windows(text, 12, stride, shift=shift)
        got = lm.causal_lm_loss(table[inputs], labels, shift=shift, reduction="sum")
        torch.testing.assert_close(got, whole)
    with pytest.raises(ValueError, match="stride"):
        lm.sliding_windows(text, 12, 13 - shift, shift=shift)
    with pytest.raises(ValueError, match="window"):
        lm.sliding_windows(text, shift, 1, shift=shift)


@pytest.mark.parametrize("shift", [T, T + 1, 10**6])
def test_shift_past_the_end(logits, tokens, shift):
    ids = torch.zeros_like(tokens)
    assert (lm.next_token_labels(tokens, shift=shift, document_ids=ids, attention_mask=ids + 1) == -100).all()
    loss = lm.causal_lm_loss(logits, tokens, shift=shift, token_weight=torch.ones(B, T))
    assert loss.isnan()
    assert lm.sequence_log_likelihood(logits, tokens, shift=shift).eq(0).all()
    empty = torch.zeros(2, 0, dtype=torch.int64)
    assert lm.next_token_labels(empty, shift=shift, document_ids=empty, position_ids=empty).shape == (2, 0)


def test_no_shift(logits, tokens):
    for shift in (False, 0):
        want = F.cross_entropy(logits.reshape(-1, V), tokens.reshape(-1))
        same(lm.causal_lm_loss(logits, tokens, shift=shift), want, logits)
        assert torch.equal(lm.next_token_labels(tokens, shift=shift), tokens)


@pytest.mark.parametrize(
    ("shift", "error"),
    [(-1, ValueError), (1.0, TypeError), ("1", TypeError), (None, TypeError), (torch.tensor(1), TypeError)],
)
def test_bad_shift(logits, tokens, shift, error):
    calls = [
        lambda: lm.causal_lm_loss(logits, tokens, shift=shift),
        lambda: lm.next_token_labels(tokens, shift=shift),
        lambda: lm.sequence_cross_entropy(logits, tokens, shift=shift),
        lambda: lm.sequence_log_likelihood(logits, tokens, shift=shift),
        lambda: lm.Perplexity(shift=shift),
        lambda: lm.perplexity([], shift=shift),
        lambda: lm.sliding_windows(tokens[0], 4, 2, shift=shift),
    ]
    for call in calls:
        with pytest.raises(error, match="shift: expected a bool or an int >= 0"):
            call()


@pytest.mark.parametrize("dtype", [torch.bool, torch.int64, torch.int32, torch.uint8])
@pytest.mark.parametrize("shift", [False, True, 2])
def test_token_weights_of_integers(logits, tokens, dtype, shift):
    w = (torch.arange(B * T).view(B, T) % 3).to(dtype)
    for loss in (lm.causal_lm_loss, lm.sequence_cross_entropy):
        for reduction in ("mean", "sum", "none"):
            want = loss(logits, tokens, shift=shift, token_weight=w.double(), reduction=reduction)
            same(loss(logits, tokens, shift=shift, token_weight=w, reduction=reduction), want, logits)
    target = torch.where(w > 0, tokens, -100)
    same(
        lm.masked_lm_loss(logits, target, token_weight=w),
        lm.masked_lm_loss(logits, target, token_weight=w.double()),
        logits,
    )
