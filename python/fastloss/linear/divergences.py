"""Divergences between two models' last layers, from the hidden states of both."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import arguments
from ..divergences import KL_REDUCTIONS, objective_of, objective_of_beta
from ..parallel import VocabShard
from ..public import public_loss
from ..spec import Objective, Rows, make_spec
from .evaluate import reduced_loss
from .heads import MAX_CHUNK_BYTES, Head, LinearRows, flattened, room, stand_in


@public_loss
def linear_kl_div(
    input: Tensor,
    linear_weight: Tensor,
    target_input: Tensor,
    target_linear_weight: Tensor,
    *,
    linear_bias: Tensor | None = None,
    target_linear_bias: Tensor | None = None,
    direction: str = "forward",
    **options: Any,
) -> Tensor:
    r"""``fastloss.kl_div_with_logits(F.linear(input, linear_weight, linear_bias), F.linear(target_input, ...), ...)``

    without either's (..., V) logits.

    Args:
        input: the student's hidden states (..., H); float32, bfloat16, float16 or float64.
        linear_weight, linear_bias: the student's last layer, (V, H) and (V).
        target_input: the teacher's hidden states (..., G), of input's leading dimensions; G may differ from H.
        target_linear_weight, target_linear_bias: the teacher's last layer, (V, G) and (V). A teacher whose tensors
            require gradients gets them by way of torch's own operations, with all logits.
        direction: "forward", KL(teacher || student), or "reverse".
        options: of `kl_div_with_logits`, without inplace: temperature, softcap, logit_scale, z_loss, token_weight,
            mask, reduction, normalizer, out_dtype, shard; and max_chunk_bytes, of both logits.

    Returns:
        A scalar, or with reduction="none" a tensor of shape (...).

    Raises, and memory: as `linear_cross_entropy`.
    """
    student, teacher = Head(input, linear_weight, linear_bias), (target_input, target_linear_weight, target_linear_bias)
    return _divergence(student, Head(*teacher), objective_of(direction), 0.5, **options)


@public_loss
def linear_js_div(
    input: Tensor,
    linear_weight: Tensor,
    target_input: Tensor,
    target_linear_weight: Tensor,
    *,
    linear_bias: Tensor | None = None,
    target_linear_bias: Tensor | None = None,
    beta: float = 0.5,
    **options: Any,
) -> Tensor:
    r"""``fastloss.js_div_with_logits(F.linear(input, linear_weight, linear_bias), F.linear(target_input, ...), ...)``

    without either's (..., V) logits. Arguments as in `linear_kl_div`; `beta` in [0, 1] as in `js_div_with_logits`.
    """
    student, teacher = Head(input, linear_weight, linear_bias), (target_input, target_linear_weight, target_linear_bias)
    return _divergence(student, Head(*teacher), *objective_of_beta(beta), **options)


def _divergence(
    student: Head,
    teacher: Head,
    objective: Objective,
    beta: float,
    *,
    temperature: float = 1.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    z_loss: float = 0.0,
    token_weight: Tensor | None = None,
    mask: Tensor | None = None,
    reduction: str = "mean",
    normalizer: Tensor | float | None = None,
    out_dtype: torch.dtype | None = None,
    max_chunk_bytes: int = MAX_CHUNK_BYTES,
    shard: VocabShard | None = None,
) -> Tensor:
    arguments.check_linear(*student)
    arguments.check_linear(*teacher, prefix="target_")
    logits = stand_in(student)
    shape = logits.shape[:-1]
    arguments.beside(stand_in(teacher), "target_input and target_linear_weight: logits", logits, logits.shape)
    to = arguments.as_reduction(logits, reduction, token_weight, mask, normalizer, out_dtype, KL_REDUCTIONS)
    spec = make_spec(-100, 0.0, z_loss, softcap, logit_scale, objective, temperature, beta)
    x = arguments.classes_last(logits).flatten(0, -2)
    limits = room(student, max_chunk_bytes, True, None, shard)
    loss = reduced_loss(LinearRows(Rows(x, x, None, spec), flattened(student), flattened(teacher), *limits), to, shard)
    return loss.reshape(shape) if to.kind == "none" else loss
