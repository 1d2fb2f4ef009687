"""The losses as torch.nn modules."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from .dense import kl_div
from .linear import linear_cross_entropy
from .losses import cross_entropy
from .parallel import VocabShard

# What a module of hidden states takes beyond torch's, and hands on.
_LINEAR_OPTIONS = {"z_loss", "softcap", "logit_scale", "out_dtype", "return_stats", "max_chunk_bytes", "filter_eps"}


class CrossEntropyLoss(torch.nn.CrossEntropyLoss):
    """``torch.nn.CrossEntropyLoss(weight, size_average, ignore_index, reduce, reduction, label_smoothing)``

    with the same arguments, state and pickles, and the keyword arguments of `fastloss.cross_entropy`; `token_weight`,
    `mask`, `normalizer` and `shard` go to ``forward``.
    """

    def __init__(
        self,
        weight: Tensor | None = None,
        size_average: bool | None = None,
        ignore_index: int = -100,
        reduce: bool | None = None,
        reduction: str = "mean",
        label_smoothing: float = 0.0,
        *,
        z_loss: float = 0.0,
        softcap: float | None = None,
        logit_scale: float = 1.0,
        out_dtype: torch.dtype | None = None,
        inplace: bool = False,
        return_stats: bool = False,
    ) -> None:
        super().__init__(weight, size_average, ignore_index, reduce, reduction, label_smoothing)
        self.z_loss = z_loss
        self.softcap = softcap
        self.logit_scale = logit_scale
        self.out_dtype = out_dtype
        self.inplace = inplace
        self.return_stats = return_stats

    def forward(
        self,
        input: Tensor,
        target: Tensor,
        *,
        token_weight: Tensor | None = None,
        mask: Tensor | None = None,
        normalizer: Tensor | float | None = None,
        shard: VocabShard | None = None,
    ) -> Any:
        """See `fastloss.cross_entropy`: a Tensor, or with return_stats (Tensor, CrossEntropyStats)."""
        return cross_entropy(  # type: ignore[call-overload,misc]
            input,
            target,
            self.weight,
            ignore_index=self.ignore_index,
            reduction=self.reduction,
            label_smoothing=self.label_smoothing,
            z_loss=self.z_loss,
            softcap=self.softcap,
            logit_scale=self.logit_scale,
            token_weight=token_weight,
            mask=mask,
            normalizer=normalizer,
            out_dtype=self.out_dtype,
            inplace=self.inplace,
            return_stats=self.return_stats,
            shard=shard,
        )


class LinearCrossEntropyLoss(torch.nn.modules.loss._WeightedLoss):
    """``torch.nn.LinearCrossEntropyLoss(in_features, num_classes, out_features=(), bias=False, ...)`` of torch 2.13

    with the same arguments, parameters (``linear.weight``, ``linear.bias``) and state, and the keyword arguments of
    `fastloss.linear_cross_entropy`; `token_weight`, `mask`, `normalizer` and `shard` go to
    ``forward``.
    """

    def __init__(
        self,
        in_features: int,
        num_classes: int,
        *,
        out_features: tuple[int, ...] = (),
        bias: bool = False,
        device: Any = None,
        dtype: torch.dtype | None = None,
        reduction: str = "mean",
        weight: Tensor | None = None,
        ignore_index: int | None = None,
        label_smoothing: float = 0.0,
        options: Any = None,
        **more: Any,
    ) -> None:
        if weight is not None and weight.shape != (num_classes,):
            raise RuntimeError(f"weight: expected weight shape to be {(num_classes,)}, got {tuple(weight.shape)}")
        if label_smoothing < 0 or label_smoothing > 1.0:
            raise RuntimeError(f"expected label_smoothing to be in range [0, 1], got {label_smoothing}")
        if unknown := set(more) - _LINEAR_OPTIONS:
            raise TypeError(f"LinearCrossEntropyLoss() got an unexpected keyword argument '{min(unknown)}'")
        super().__init__(weight, None, None, reduction)
        self.num_classes, self.out_features = num_classes, tuple(out_features)
        self.ignore_index, self.label_smoothing = ignore_index, label_smoothing
        self.options, self.more = options, more
        rows = math.prod(out_features, start=num_classes)
        self.linear = torch.nn.Linear(in_features, rows, bias=bias, device=device, dtype=dtype)

    def forward(
        self,
        input: Tensor,
        target: Tensor,
        *,
        token_weight: Tensor | None = None,
        mask: Tensor | None = None,
        normalizer: Tensor | float | None = None,
        shard: VocabShard | None = None,
    ) -> Any:
        """See `fastloss.linear_cross_entropy`: a Tensor, or with return_stats (Tensor, CrossEntropyStats)."""
        shape, bias = (self.num_classes, *self.out_features), self.linear.bias
        return linear_cross_entropy(
            input,
            self.linear.weight.reshape(*shape, self.linear.in_features),
            target,
            linear_bias=None if bias is None else bias.reshape(shape),
            weight=self.weight,
            reduction=self.reduction,
            ignore_index=self.ignore_index,
            label_smoothing=self.label_smoothing,
            options=self.options,
            token_weight=token_weight,
            mask=mask,
            normalizer=normalizer,
            shard=shard,
            **self.more,
        )

    def extra_repr(self) -> str:
        more = "".join(f", {name}={value}" for name, value in self.more.items())
        return (
            f"in_features={self.linear.in_features}, num_classes={self.num_classes}, "
            f"out_features={self.out_features}, bias={self.linear.bias is not None}, reduction={self.reduction}, "
            f"ignore_index={self.ignore_index}, label_smoothing={self.label_smoothing}{more}"
        )


class KLDivLoss(torch.nn.KLDivLoss):
    """``torch.nn.KLDivLoss(size_average, reduce, reduction, log_target)``: see `fastloss.kl_div`."""

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        return kl_div(input, target, reduction=self.reduction, log_target=self.log_target)
