"""Linear: y = x Wᵀ + bias + scaling · dropout(x) Aᵀ Bᵀ."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ._base import LoRALayer
from .kernels import lora_linear

if TYPE_CHECKING:
    from typing_extensions import Self


def is_transformers_conv1d(layer: object) -> bool:
    """Whether `layer` is GPT-2's linear layer of transformers, whose weight is (in, out)."""
    kind = type(layer)
    return kind.__name__ == "Conv1D" and kind.__module__ == "transformers.pytorch_utils"


class Linear(LoRALayer, nn.Linear):
    """Linear layer with a low-rank update (LoRA, arXiv 2106.09685, section 4.1).

        y = x Wᵀ + bias + scaling · (dropout(x) Aᵀ) Bᵀ,     scaling = lora_alpha / r

    weight W (out, in), frozen (stored as (in, out) with fan_in_fan_out=True); lora_A (r, in),
    kaiming-uniform; lora_B (out, r), zero; bias as in `nn.Linear`. r=0 is the plain,
    trainable layer.
    merge_weights=True keeps a second tensor as large as the weight in eval mode (see `LoRALayer`).

    Raises ValueError for r, lora_alpha or lora_dropout out of range.

    >>> layer = Linear(768, 768, r=16, lora_alpha=32, lora_dropout=0.05)
    >>> layer(torch.randn(2, 10, 768)).shape
    torch.Size([2, 10, 768])
    """

    _OWN = (*LoRALayer._OWN, "fan_in_fan_out")
    fan_in_fan_out = False
    out_splits: tuple[int, ...] | None = None  # one part, see MergedLinear
    enable_lora: Sequence[bool] | None = None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        r: int = 0,
        lora_alpha: float = 1,
        lora_dropout: float = 0.0,
        fan_in_fan_out: bool = False,
        merge_weights: bool = True,
        **kwargs: Any,
    ) -> None:
        nn.Linear.__init__(self, in_features, out_features, **kwargs)
        LoRALayer.__init__(self, r, lora_alpha, lora_dropout, merge_weights)
        self._add_factors()
        self.reset_parameters()  # draws the weight again, as loralib does: same seed, same bits
        if fan_in_fan_out:
            self.weight.data = self.weight.data.t().contiguous()
            self.fan_in_fan_out = True

    @classmethod
    def from_module(
        cls,
        layer: nn.Module,
        r: int,
        lora_alpha: float = 1,
        lora_dropout: float = 0.0,
        merge_weights: bool = False,
        *,
        lora_dtype: torch.dtype | None = None,
        **options: Any,
    ) -> Self:
        """Wrap a pretrained `nn.Linear` (or transformers' `Conv1D`), keeping its very Parameters.

        Device, mode and hooks stay; the factors are on weight's device, in lora_dtype or else in
        weight's dtype; the output is unchanged to the bit until B is trained (on a GPU: see README,
        Limits). `layer` itself is left alone, but its weight is frozen. Raises TypeError for any
        other type.
        """
        plain_types = (type(layer),) if is_transformers_conv1d(layer) else (nn.Linear,)
        new = cls._adopt(layer, plain_types)
        LoRALayer.__init__(new, r, lora_alpha, lora_dropout, merge_weights)
        if is_transformers_conv1d(layer):
            new.in_features, new.out_features = layer.weight.shape  # type: ignore[misc]
            new.fan_in_fan_out = True
        new._set_parts(**options)
        new._add_factors(lora_dtype)
        if r > 0:
            new._reset_factors()
        return new

    def _set_parts(self) -> None:
        """Check and set what MergedLinear adds; a Linear has no such options."""

    def _factor_shapes(self) -> tuple[tuple[int, int], tuple[int, int]]:
        return (self.r, self.in_features), (self.out_features, self.r)

    def _matrix(self, weight: Tensor) -> Tensor:
        """weight or update as (out, in)."""
        return weight.t() if self.fan_in_fan_out else weight

    def reset_parameters(self) -> None:
        if self.fan_in_fan_out:
            nn.init.kaiming_uniform_(self.weight.t(), a=math.sqrt(5))
            if self.bias is not None:
                bound = 1 / math.sqrt(self.in_features)
                nn.init.uniform_(self.bias, -bound, bound)
        else:
            nn.Linear.reset_parameters(self)
        if "lora_A" in self._parameters:
            self._reset_factors()

    def _delta(self, lora_A: Tensor, lora_B: Tensor) -> Tensor:
        return self._matrix(lora_B @ lora_A)

    def to_module(self, merge: bool = False) -> nn.Module:
        plain = super().to_module(merge)
        if self.fan_in_fan_out and type(plain) is nn.Linear:  # which stores (out, in)
            weight = plain.weight.detach().t().contiguous()
            plain.weight = nn.Parameter(weight, plain.weight.requires_grad)
        return plain

    def forward(self, x: Tensor) -> Tensor:
        if self.r == 0 or self.disabled:
            return F.linear(x, self._matrix(self.weight), self.bias)
        merged = self._weight_to_use()
        if merged is not None:
            return F.linear(x, self._matrix(merged), self.bias)
        y: Tensor = lora_linear(
            x,
            self._matrix(self.weight),
            self.bias,
            self.lora_A,
            self.lora_B,
            self.scaling,
            splits=self.out_splits,
            enabled=self.enable_lora,
            dropout_p=self._dropout_p,
        )
        return y
