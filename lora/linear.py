"""Linear: y = x Wᵀ + bias + scaling · dropout(x) Aᵀ Bᵀ, and its variants."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ._base import LoRALayer
from .kernels import lora_linear
from .kernels.nf4_tensor import NF4Tensor
from .kernels.ops import autocast_off
from .quantized import LinearNF4, NF4State, adoptable
from .sharded import assign_to
from .variants import (
    NAMES,
    begins_as,
    check_principal,
    checked,
    principal_factors,
    row_norms,
    taken_from,
)

if TYPE_CHECKING:
    from typing_extensions import Self


def is_transformers_conv1d(layer: object) -> bool:
    """Whether `layer` is GPT-2's linear layer of transformers, whose weight is (in, out)."""
    kind = type(layer)
    return kind.__name__ == "Conv1D" and kind.__module__ == "transformers.pytorch_utils"


class Linear(NF4State, LoRALayer, nn.Linear):
    """Linear layer with a low-rank update (LoRA, arXiv 2106.09685, section 4.1).

        y = x Wᵀ + bias + scaling · (dropout(x) Aᵀ) Bᵀ,     scaling = lora_alpha / r

    weight W (out, in), frozen (stored as (in, out) with fan_in_fan_out=True); lora_A (r, in),
    kaiming-uniform; lora_B (out, r), zero; bias as in `nn.Linear`. r=0 is the plain,
    trainable layer.
    merge_weights=True keeps a second tensor as large as the weight in eval mode (see `LoRALayer`).

    Further keywords: those of `nn.Linear` (bias, device, dtype), and the variants (`lora.variants`
    has their formulas and papers):
        use_rslora=True: scaling = lora_alpha / √r.
        use_dora=True: y = lora_magnitude / ‖W + scaling · B A‖ ∘ (x Wᵀ + scaling · dropout(x) Aᵀ Bᵀ)
            + bias, with lora_magnitude (out,), in at least fp32, ‖W‖ at first, and the norms of
            rows, which have no gradient. It reads W once more a forward, and keeps y for backward.
        init_lora_weights="pissa" or "pissa_niter_N": B A - lora_B0 lora_A0 in the place of B A; both
            pairs begin as W's principal part; lora_A0 and lora_B0 stay. Twice the rank's cost.
            Or "loftq", "loftq_niter_N", for a weight that is to be quantised (`quantize_weight`).
        use_lorafa=True: lora_A is never trained; S alone is kept for backward, not x.
        lora_bias=True: bias + scaling · lora_bias in the place of bias; lora_bias (out,), zero.

    Raises ValueError for r, lora_alpha or lora_dropout out of range, for unknown values of a variant,
    for lora_bias with use_dora, and for PiSSA with more ranks than the weight has.

    >>> layer = Linear(768, 768, r=16, lora_alpha=32, lora_dropout=0.05)
    >>> layer(torch.randn(2, 10, 768)).shape
    torch.Size([2, 10, 768])
    """

    _OWN = (*LoRALayer._OWN, "fan_in_fan_out")
    _VARIANTS = NAMES
    lora_A0: Tensor
    lora_B0: Tensor
    lora_magnitude: Tensor
    lora_bias: Tensor
    fan_in_fan_out = False
    dropout_seed: Tensor | None = None  # None: the mask is drawn from torch's generator
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
        variant = taken_from(kwargs)
        nn.Linear.__init__(self, in_features, out_features, **kwargs)
        LoRALayer.__init__(self, r, lora_alpha, lora_dropout, merge_weights, **variant)
        self._add_factors()
        if self.r > 0:
            self.weight.requires_grad = False
        self.reset_parameters()  # draws the weight again, as loralib does: same seed, same bits
        if fan_in_fan_out:
            self.weight.data = self.weight.data.t().contiguous()
            self.fan_in_fan_out = True
            self._derive_magnitude()  # norms are added up in another order now

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

        Or a linear layer on a 4-bit weight: a `LinearNF4`, or bitsandbytes' `Linear4bit` of NF4, whose
        very codes are taken over. Such a weight is not merged in eval mode.

        Device, mode and hooks stay; the factors are on weight's device, in lora_dtype or else in
        weight's dtype; the output is unchanged to the bit until B is trained (on a GPU: see README,
        Limits; with PiSSA: up to rounding). `layer` itself is left alone, but its weight is frozen.
        options: the variants of the constructor. Raises TypeError for any other type of layer.
        """
        layer = adoptable(layer)
        plain_types = (type(layer),) if is_transformers_conv1d(layer) else (nn.Linear, LinearNF4)
        new = cls._adopt(layer, plain_types)
        if merge_weights and isinstance(layer, LinearNF4):
            raise ValueError(
                "merge_weights=True on a 4-bit weight: eval would keep a dense one; expected False, "
                "and lora.unpatch(model, merge=True, dtype=...) for a merged model"
            )
        variant = taken_from(options)
        LoRALayer.__init__(new, r, lora_alpha, lora_dropout, merge_weights, **variant)
        if is_transformers_conv1d(layer):
            new.in_features, new.out_features = layer.weight.shape  # type: ignore[misc]
            new.fan_in_fan_out = True
        new._set_parts(**options)
        new._adapt(lora_dtype)
        return new

    def _set_parts(self, **unknown: Any) -> None:
        """Check and set what MergedLinear adds; a Linear has no such options."""
        checked(type(self).__name__, unknown)  # type: ignore[arg-type]

    @property
    def rows(self) -> tuple[tuple[int, int], ...]:
        """(first row, last row + 1) of every part of the output that has an update."""
        return ((0, self.out_features),)

    def _factor_shapes(self) -> tuple[tuple[int, int], tuple[int, int]]:
        return (self.r, self.in_features), (self.out_features, self.r)

    def _update_shapes(self) -> dict[str, tuple[int, ...]]:
        shapes = super()._update_shapes()
        shape_A, shape_B = shapes["lora_A"], shapes["lora_B"]
        if begins_as(self.variant, "pissa"):
            shapes |= {"lora_A0": shape_A, "lora_B0": shape_B}
        if "use_dora" in self.variant:
            shapes["lora_magnitude"] = shape_B[:1]
        if "lora_bias" in self.variant:
            shapes["lora_bias"] = shape_B[:1]
        return shapes

    def _update_dtype(self, own: str, dtype: torch.dtype | None) -> torch.dtype:
        asked = super()._update_dtype(own, dtype)
        if own == "lora_magnitude":  # in half precision its steps would round to nothing
            return torch.promote_types(asked, torch.float32)
        return asked

    def is_frozen(self, own: str) -> bool:
        return own in ("lora_A0", "lora_B0") or (own == "lora_A" and "use_lorafa" in self.variant)

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

    def _reset_factors(self) -> None:
        super()._reset_factors()
        if "lora_bias" in self.variant:
            nn.init.zeros_(self.lora_bias)
        self._derive_from_weight()

    @torch.no_grad()
    def _derive_from_weight(self) -> None:
        """Set what begins as a function of the frozen weight: PiSSA's factors, DoRA's magnitude."""
        if begins_as(self.variant, "loftq"):
            self._check_loftq()
        if not self.depends_on_weight:
            return
        if self.is_sharded:
            one = self.in_one_process()
            one._derive_from_weight()
            for own, parameter in one.update_parameters().items():
                assign_to(self, own, parameter)
            return
        if begins_as(self.variant, "pissa"):
            A, B = self._principal_factors(self._matrix(self.weight))
            for own, value in {"lora_A": A, "lora_A0": A, "lora_B": B, "lora_B0": B}.items():
                getattr(self, own).copy_(value)
        self._derive_magnitude()

    @property
    def depends_on_weight(self) -> bool:
        """Whether the update begins as a function of the weight."""
        return begins_as(self.variant, "pissa") or "use_dora" in self.variant

    def _principal_factors(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """(A, B) of every part's rows of `weight` (out, in), stacked."""
        init = str(self.variant["init_lora_weights"])
        pairs = [
            principal_factors(weight[start:stop], self.r, self.scaling, init)
            for start, stop in self.rows
        ]
        A, B = (torch.cat(factors) for factors in zip(*pairs, strict=True))
        return A, B

    def _check_loftq(self) -> None:
        init = str(self.variant["init_lora_weights"])
        if isinstance(self.weight, NF4Tensor):
            raise ValueError(
                f"init_lora_weights={init!r}: what quantising lost is not known of a weight that is "
                "quantised already; expected the original one, and quantize='nf4'"
            )
        for start, stop in self.rows:
            check_principal(self._matrix(self.weight)[start:stop], self.r, self.scaling, init)

    @torch.no_grad()
    def quantize_weight(self) -> None:
        """Put an NF4 weight in the place of the dense one, and let the update begin on it.

        With init_lora_weights="loftq" the factors take up what is lost; with use_dora the magnitudes
        are those of the new weight. ValueError for a weight that cannot be quantised, or is (in, out).
        """
        if self.fan_in_fan_out:
            raise ValueError("a weight that is stored as (in, out) is not quantised")
        if self.merge_weights:
            raise ValueError("merge_weights=True on a 4-bit weight; see Linear.from_module")
        weight = NF4Tensor.quantize(self.weight.detach())
        if begins_as(self.variant, "loftq") and not weight.is_meta:
            A, B = self._principal_factors(self.weight.float() - weight.dequantize())
            self.lora_A.copy_(A)
            self.lora_B.copy_(B)
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.__dict__["_plain_type"] = LinearNF4
        self._drop_merged()
        self._derive_magnitude()

    @torch.no_grad()
    def _derive_magnitude(self) -> None:
        if "use_dora" in self.variant:
            self.lora_magnitude.copy_(self._row_norms())

    def factors(self) -> tuple[Tensor, Tensor]:
        """(A, B) of the whole update: with PiSSA [A_j; A₀_j] and [B, -B₀], of rank 2 r."""
        if not begins_as(self.variant, "pissa"):
            return self.lora_A, self.lora_B
        A, A0 = (torch.unflatten(factor, 0, (-1, self.r)) for factor in (self.lora_A, self.lora_A0))
        return torch.cat([A, A0], 1).flatten(0, 1), torch.cat([self.lora_B, -self.lora_B0], 1)

    def _row_norms(self) -> Tensor:
        """‖W + scaling · B A‖ of the rows that have an update."""
        with autocast_off(self.weight.device):
            weight = self._matrix(self.weight.detach())
            if isinstance(weight, NF4Tensor):
                weight = weight.dequantize()
            return row_norms(weight, *self.factors(), self.scaling, self.rows)

    def _row_scale(self, norms: Tensor) -> Tensor:
        """DoRA's factor of every row of the output: lora_magnitude / ‖W + scaling · B A‖ (out,)."""
        magnitude = self.lora_magnitude.to(norms.dtype)
        norms = norms.to(self.lora_magnitude.dtype).to(norms.dtype)  # where the model was cast
        return self.all_rows(magnitude / norms.masked_fill(norms == 0, 1.0), 1.0)

    def all_rows(self, values: Tensor, fill: float) -> Tensor:
        """`values` in the rows that have an update, `fill` in the others (out,)."""
        return values

    def total_bias(self) -> Tensor | None:
        """bias, and with lora_bias the update's, scaling included; in bias's or weight's dtype."""
        if "lora_bias" not in self.variant:
            return self.bias
        update = self.all_rows(self.lora_bias * self.scaling, 0.0)
        if self.bias is None:
            return update.to(self.weight.dtype)
        return (self.bias + update).to(self.bias.dtype)

    def delta_weight(self) -> Tensor:
        delta = super().delta_weight()
        if "use_dora" not in self.variant:
            return delta
        weight = self.weight.to(delta.dtype)
        dense = weight + delta
        norms = [torch.linalg.vector_norm(self._matrix(dense)[i:j], dim=1) for i, j in self.rows]
        scale = self._row_scale(torch.cat(norms).detach())
        return dense * self._matrix(scale[:, None]) - weight

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
        merged, bias = self._weight_to_use(), self.total_bias()
        if merged is not None:
            return F.linear(x, self._matrix(merged), bias)
        y: Tensor = lora_linear(
            x,
            self._matrix(self.weight),
            bias,
            *self.factors(),
            self.scaling,
            splits=self.out_splits,
            enabled=self.enable_lora,
            dropout_p=self._dropout_p,
            seed=self.dropout_seed,
        )
        if "use_dora" not in self.variant:
            return y
        product = y if bias is None else y - bias.to(y.dtype)
        scale = self._row_scale(self._row_norms())
        return torch.addcmul(y, product, (scale - 1).to(y.dtype))  # y itself while scale is 1

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any
    ) -> None:
        """Load; of an update that is untrained and not in the state, derive what depends on weight."""
        own = [name for name in self.update_parameters() if prefix + name in state_dict]
        derive = f"{prefix}weight" in state_dict and not own and self._is_underived()
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)
        if derive and not self.weight.is_meta:
            self._derive_from_weight()

    def _is_underived(self) -> bool:
        """Whether the update depends on the weight that it began with, and is as it began."""
        if not self.depends_on_weight or self.lora_B.is_meta:
            return False
        if begins_as(self.variant, "pissa"):
            pairs = (self.lora_A, self.lora_A0), (self.lora_B, self.lora_B0)
            return all(torch.equal(*pair) for pair in pairs)
        return not self.lora_B.any()
