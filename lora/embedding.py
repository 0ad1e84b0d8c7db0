"""Embedding: y = W[x] + scaling · Aᵀ[x] Bᵀ."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ._base import LoRALayer
from .variants import Variant, taken_from

if TYPE_CHECKING:
    from typing_extensions import Self, Unpack


class Embedding(LoRALayer, nn.Embedding):
    """Embedding table with a low-rank update (loralib's Embedding).

        y = W[x] + scaling · Aᵀ[x] Bᵀ,     scaling = lora_alpha / r

    weight W (num, dim), frozen; lora_A (r, num), zero; lora_B (dim, r), normal(0, 1): it is A that
    begins at zero here (microsoft/LoRA issues 14 and 76). x holds indices; y has weight's dtype.
    merge_weights=True keeps a second tensor as large as the table in eval mode (see `LoRALayer`).
    Of the options in `lora.variants` it has use_rslora.

    Raises ValueError for r > 0 with sparse=True (A has no sparse gradient) or with max_norm (it
    writes to the table in forward).

    >>> layer = Embedding(1000, 64, r=4)
    >>> layer(torch.tensor([[1, 2, 3]])).shape
    torch.Size([1, 3, 64])
    """

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        r: int = 0,
        lora_alpha: float = 1,
        merge_weights: bool = True,
        **kwargs: Any,
    ) -> None:
        variant = taken_from(kwargs)
        nn.Embedding.__init__(self, num_embeddings, embedding_dim, **kwargs)
        LoRALayer.__init__(self, r, lora_alpha, 0.0, merge_weights, **variant)
        self._check_options()
        self._add_factors()
        if self.r > 0:
            self.weight.requires_grad = False
        if kwargs.get("_weight") is None:
            self.reset_parameters()  # draws the weight again, as loralib does: same seed, same bits
        elif r > 0:
            self._reset_factors()

    @classmethod
    def from_module(
        cls,
        layer: nn.Module,
        r: int,
        lora_alpha: float = 1,
        merge_weights: bool = False,
        *,
        lora_dtype: torch.dtype | None = None,
        **variant: Unpack[Variant],
    ) -> Self:
        """Wrap a pretrained `nn.Embedding`, keeping its very Parameter (see `Linear.from_module`)."""
        new = cls._adopt(layer, (nn.Embedding,))
        LoRALayer.__init__(new, r, lora_alpha, 0.0, merge_weights, **variant)
        new._check_options()
        new._adapt(lora_dtype)
        return new

    def _check_options(self) -> None:
        if self.r > 0 and self.sparse:
            raise ValueError(
                f"Embedding: sparse=True with r={self.r}: lora_A has no sparse gradient; "
                "pass sparse=False"
            )
        if self.r > 0 and self.max_norm is not None:
            raise ValueError(
                f"Embedding: max_norm={self.max_norm} with r={self.r}: it rescales the table in "
                "place in forward, and the frozen weight is never written to; pass max_norm=None"
            )

    def _factor_shapes(self) -> tuple[tuple[int, int], tuple[int, int]]:
        return (self.r, self.num_embeddings), (self.embedding_dim, self.r)

    def _reset_factors(self) -> None:
        nn.init.zeros_(self.lora_A)
        nn.init.normal_(self.lora_B)

    def reset_parameters(self) -> None:
        nn.Embedding.reset_parameters(self)
        if "lora_A" in self._parameters:
            self._reset_factors()

    def _delta(self, lora_A: Tensor, lora_B: Tensor) -> Tensor:
        return (lora_B @ lora_A).t()

    def forward(self, x: Tensor) -> Tensor:
        if self.r == 0 or self.disabled:
            return nn.Embedding.forward(self, x)
        merged = self._weight_to_use()
        if merged is not None:
            return self._look_up(x, merged)
        rows_of_A = self._look_up(x, self.lora_A.t()).to(self.weight.dtype)
        update = rows_of_A @ self.lora_B.t().to(self.weight.dtype)
        return self._look_up(x, self.weight) + update.to(self.weight.dtype) * self.scaling

    def _look_up(self, x: Tensor, table: Tensor) -> Tensor:
        return F.embedding(x, table, self.padding_idx, scale_grad_by_freq=self.scale_grad_by_freq)
