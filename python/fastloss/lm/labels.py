"""Which label each position of a sequence predicts, and which of them count. Only integers: logits are never copied."""

from __future__ import annotations

import operator
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import pad

from ..public import public

_INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)


@public
def next_token_labels(
    labels: Tensor,
    *,
    shift: bool | int = True,
    ignore_index: int = -100,
    attention_mask: Tensor | None = None,
    document_ids: Tensor | None = None,
    position_ids: Tensor | None = None,
) -> Tensor:
    """``torch.nn.functional.pad(labels, (0, k), value=ignore_index)[..., k:]``, ``k = int(shift)``

    the label that each position predicts, `ignore_index` where there is none: after the last token, on padding, and
    across the border of two documents. ``(next_token_labels(...) != ignore_index).sum()`` is the number of labels that
    count, the ``num_items_in_batch`` of trainers.

    Args:
        labels: (..., T), integers: the tokens, or with ``shift=False`` what each position predicts.
        shift: k >= 1: position t predicts label t + k, as the heads of multi-token prediction do (arXiv:2404.19737,
            section 2). True is 1. False, or 0, where the labels have been shifted already, or belong to their own
            position. With ``k >= T`` no label counts.
        ignore_index: labels of this index do not count.
        attention_mask: labels' shape, zero on padding, which neither predicts nor is predicted: with padding on the
            left the first token has nothing to be predicted from.
        document_ids: labels' shape: documents packed into one sequence; a token is not predicted from a position that
            a border of documents separates it from.
        position_ids: labels' shape, the same said by positions that start anew: one that does not grow begins a
            document.

    Returns:
        int64, labels' shape.

    Raises:
        TypeError, RuntimeError, ValueError: as `fastloss.cross_entropy`, naming the argument.
    """
    shift = check_shift(shift)
    check_integers("labels", labels)
    if labels.dim() == 0:
        raise ValueError("labels: expected shape (..., T), got a scalar")
    following = ahead(labels.long(), shift, ignore_index)
    step = shift or 1  # labels that were shifted before are the next tokens
    if attention_mask is not None:
        # Of labels shifted before, the mask knows where they are predicted from, and the last one's own is unknown.
        padding = same_shape("attention_mask", attention_mask, labels) == 0
        following = following.masked_fill(padding | ahead(padding, step, False), ignore_index)
    if document_ids is not None:
        ids = same_shape("document_ids", document_ids, labels)
        following = following.masked_fill(_border_within(ids, torch.ne, step), ignore_index)
    if position_ids is not None:
        ids = same_shape("position_ids", position_ids, labels)
        following = following.masked_fill(_border_within(ids, torch.le, step), ignore_index)
    return following


@public
def masked_positions(labels: Tensor, ignore_index: int = -100) -> Tensor:
    """``(labels.flatten() != ignore_index).nonzero()[:, 0]``

    the positions that a masked language model has to predict, as indices (M) into the flattened labels: only they need
    the head. Their number depends on the labels, so on a GPU this waits for them.

    >>> labels = torch.tensor([[-100, 7], [8, -100]])
    >>> masked_positions(labels)  # logits = head(hidden.flatten(0, 1)[positions])
    tensor([1, 2])
    """
    check_integers("labels", labels)
    return (labels.reshape(-1) != ignore_index).nonzero().squeeze(1)


@public
def sliding_windows(
    tokens: Tensor, window: int, stride: int, *, ignore_index: int = -100, shift: bool | int = True
) -> tuple[Tensor, Tensor]:
    """``tokens.unfold(0, window, stride)``, and the labels of each window that no window before it has.

    A text longer than a model's context, to be evaluated with context for every token: each of its tokens counts once,
    and those after the first window have at least ``window - stride`` tokens before them in theirs. The last window
    begins earlier where the text is not long enough for it; a text no longer than `window` is one window.

    Args:
        tokens: (L), integers.
        window: tokens that the model sees at once.
        stride: tokens from one window's start to the next, from 1 to ``window - shift``: each begins within the last.
        ignore_index: the label of a token that counted before.
        shift: that of the loss; a window must overlap the one before it by so many tokens, which predict its first
            labels.

    Returns:
        Inputs (W, window), and labels (W, window), int64, for a loss with this `shift`.

    >>> sliding_windows(torch.arange(6), window=4, stride=2)
    (tensor([[0, 1, 2, 3],
            [2, 3, 4, 5]]), tensor([[   0,    1,    2,    3],
            [-100, -100,    4,    5]]))
    """
    check_integers("tokens", tokens)
    if tokens.dim() != 1:
        raise ValueError(f"tokens: expected shape (L), got {tuple(tokens.shape)}")
    shift = check_shift(shift)
    if window < shift + 1:
        raise ValueError(
            f"window: expected at least {shift + 1} tokens (one that predicts, one predicted by shift={shift}), "
            f"got {window}"
        )
    if not 1 <= stride <= window - shift:
        raise ValueError(f"stride: expected 1 <= stride <= window - shift ({window} - {shift}), got {stride}")
    last = max(len(tokens) - window, 0)
    starts = torch.arange(0, last + stride, stride, device=tokens.device).clamp(max=last)
    at = starts[:, None] + torch.arange(min(window, len(tokens)), device=tokens.device)
    counted = torch.cat([starts.new_zeros(1), starts[:-1] + window])  # up to here other windows have counted
    inputs = tokens[at]
    return inputs, inputs.long().masked_fill(at < counted[:, None], ignore_index)


def keep(
    labels: Tensor, *, ignore_index: int, lengths: Tensor | None = None, mask: Tensor | None = None, context: int = 0
) -> Tensor:
    """Labels (..., T), those ignored that lie beyond a sequence's length, under a zero of the mask, or within the first
    `context` tokens."""
    check_integers("labels", labels)
    if labels.dim() == 0:
        raise ValueError("labels: expected shape (..., T), got a scalar")
    if context < 0:
        raise ValueError(f"context: expected at least 0 tokens, got {context}")
    labels = labels.long()
    at = torch.arange(labels.shape[-1], device=labels.device)
    if lengths is not None:
        check_integers("lengths", lengths)
        if lengths.shape != labels.shape[:-1]:
            raise ValueError(
                f"lengths: expected shape {tuple(labels.shape[:-1])} (one per sequence), got {tuple(lengths.shape)}"
            )
        labels = labels.masked_fill(at >= lengths[..., None], ignore_index)
    if mask is not None:
        labels = labels.masked_fill(same_shape("mask", mask, labels) == 0, ignore_index)
    return labels.masked_fill(at < context, ignore_index) if context else labels


def check_integers(name: str, value: Tensor) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(f"argument '{name}' must be Tensor, not {type(value).__name__}")
    if value.dtype not in _INTEGERS:
        raise RuntimeError(f"{name}: expected an integer tensor (int64), got {value.dtype}")


def same_shape(name: str, value: Tensor, labels: Tensor) -> Tensor:
    if not isinstance(value, Tensor):
        raise TypeError(f"argument '{name}' must be Tensor, not {type(value).__name__}")
    if value.shape != labels.shape:
        raise ValueError(f"{name}: expected the labels' shape {tuple(labels.shape)}, got {tuple(value.shape)}")
    return value


def check_shift(shift: bool | int) -> int:
    """How many positions a label lies after the one that predicts it; anything but an int would be taken for 1."""
    try:
        if isinstance(shift, Tensor):
            raise TypeError
        number = operator.index(shift)
    except TypeError:
        raise TypeError(f"shift: expected a bool or an int >= 0, got {type(shift).__name__}") from None
    if number < 0:
        raise ValueError(f"shift: expected a bool or an int >= 0, got {number}")
    return int(number)


def ahead(tensor: Tensor, shift: int, value: float) -> Tensor:
    """(..., T), at t what stands at t + shift; `value` after the end."""
    if not torch.compiler.is_compiling():  # or torch.export would hold that as many tokens always come
        shift = min(shift, tensor.shape[-1])
    return pad(tensor, (0, shift), value=value)[..., shift:] if shift else tensor


def _border_within(ids: Tensor, is_border: Callable[[Tensor, Tensor], Tensor], step: int) -> Tensor:
    """(..., T), whether a border lies between t and t + step; nothing follows the last positions. Not of T - 1 ids:
    torch.export would hold that two tokens never come."""
    T = ids.shape[-1]
    border = is_border(pad(ids, (0, 1))[..., 1:], ids) & (torch.arange(1, T + 1, device=ids.device) < T)
    if step == 1:
        return border
    before = pad(border, (1, 0))[..., :-1].cumsum(-1)  # a document's number, also where an id comes again
    return ahead(before, step, -1) > before
