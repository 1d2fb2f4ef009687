"""The losses as torch.nn modules."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .dense import kl_div
from .losses import cross_entropy


class CrossEntropyLoss(torch.nn.CrossEntropyLoss):
    """``torch.nn.CrossEntropyLoss(weight, size_average, ignore_index, reduce, reduction, label_smoothing)``

    with the same arguments, state and pickles, and the keyword arguments of `fastloss.cross_entropy`; `token_weight`
    and `normalizer` belong to a batch and go to ``forward``.
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

    def forward(  # type: ignore[override]
        self,
        input: Tensor,
        target: Tensor,
        *,
        token_weight: Tensor | None = None,
        normalizer: Tensor | float | None = None,
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
            normalizer=normalizer,
            out_dtype=self.out_dtype,
            inplace=self.inplace,
            return_stats=self.return_stats,
        )


class KLDivLoss(torch.nn.KLDivLoss):
    """``torch.nn.KLDivLoss(size_average, reduce, reduction, log_target)``: see `fastloss.kl_div`."""

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        return kl_div(input, target, reduction=self.reduction, log_target=self.log_target)
