"""Conv1d, Conv2d, Conv3d: y = conv(x, W) + bias + conv(dropout(x), scaling · (B A).view_as(W))."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ._base import LoRALayer
from .kernels.ops import autocast_dtype
from .variants import Variant, taken_from

if TYPE_CHECKING:
    from typing_extensions import Self, Unpack

    _Base = nn.modules.conv._ConvNd
else:
    _Base = object


class _Conv(LoRALayer, _Base):
    """Convolution with a low-rank update (loralib's ConvLoRA).

        y = conv(x, W) + bias + conv(dropout(x), scaling · ΔW),
        ΔW = (B A).view(W.shape),     scaling = lora_alpha / r

    weight W (out, in/groups, *kernel), frozen. With a square Conv2d kernel k, and with k = 1 in any
    dimension: lora_A (r·k, in·k), lora_B (out/groups·k, r·k), as in loralib. With any other kernel,
    which loralib refuses or fails on: lora_A (r, in/groups · prod(kernel)), lora_B (out, r).
    A is kaiming-uniform, B zero.

    Unlike in loralib, lora_dropout acts. Without dropout the layer is one convolution with W + ΔW;
    with it, or in half precision, where W + ΔW would round small updates away, it is two.
    merge_weights=True keeps a second tensor as large as the weight in eval mode (see `LoRALayer`).
    Of the options in `lora.variants` it has use_rslora. State dicts of loralib 0.1.2 (`conv.weight`,
    `conv.bias`) load.
    """

    _plain: ClassVar[type[nn.modules.conv._ConvNd]]

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, ...],
        r: int = 0,
        lora_alpha: float = 1,
        lora_dropout: float = 0.0,
        merge_weights: bool = True,
        **kwargs: Any,
    ) -> None:
        variant = taken_from(kwargs)
        self._plain.__init__(self, in_channels, out_channels, kernel_size, **kwargs)  # type: ignore[arg-type]
        LoRALayer.__init__(self, r, lora_alpha, lora_dropout, merge_weights, **variant)
        self._add_factors()
        if self.r > 0:
            self.weight.requires_grad = False
        self.reset_parameters()  # draws the weight again, as loralib does: same seed, same bits

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
        **variant: Unpack[Variant],
    ) -> Self:
        """Wrap a pretrained convolution, keeping its very Parameters (see `Linear.from_module`)."""
        new = cls._adopt(layer, (cls._plain,))
        LoRALayer.__init__(new, r, lora_alpha, lora_dropout, merge_weights, **variant)
        new._adapt(lora_dtype)
        return new

    def _factor_shapes(self) -> tuple[tuple[int, int], tuple[int, int]]:
        k, r = self.kernel_size[0], self.r
        square = all(size == k for size in self.kernel_size)
        if square and (k == 1 or len(self.kernel_size) == 2):
            return (r * k, self.in_channels * k), (self.out_channels // self.groups * k, r * k)
        fan_in = self.in_channels // self.groups * math.prod(self.kernel_size)
        return (r, fan_in), (self.out_channels, r)

    def reset_parameters(self) -> None:
        self._plain.reset_parameters(self)
        if "lora_A" in self._parameters:
            self._reset_factors()

    def _delta(self, lora_A: Tensor, lora_B: Tensor) -> Tensor:
        return (lora_B @ lora_A).view(self.weight.shape)

    def forward(self, x: Tensor) -> Tensor:
        if self.r == 0 or self.disabled:
            return self._convolve(x, self.weight, self.bias)
        merged = self._weight_to_use()
        if merged is not None:
            return self._convolve(x, merged, self.bias)
        delta = self.delta_weight().to(self.weight.dtype)
        p = self._dropout_p
        half = self.weight.element_size() < 4 or autocast_dtype(x.device) is not None
        if p == 0 and not half:
            return self._convolve(x, self.weight + delta, self.bias)
        x_dropped = F.dropout(x, p) if p > 0 else x
        return self._convolve(x, self.weight, self.bias) + self._convolve(x_dropped, delta, None)

    def _convolve(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        y: Tensor = self._conv_forward(x, weight, bias)
        return y

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any
    ) -> None:
        """Accept loralib's names; where both are there (its git head), they must agree."""
        for name in ("weight", "bias"):
            old = state_dict.pop(f"{prefix}conv.{name}", None)
            if old is None:
                continue
            new = state_dict.setdefault(f"{prefix}{name}", old)
            if new is not old and not (new.is_meta or torch.equal(new, old)):
                error_msgs: list[str] = args[-1]
                error_msgs.append(
                    f"{prefix}conv.{name} and {prefix}{name} are both in the state dict and differ"
                )
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)


class Conv1d(_Conv, nn.Conv1d):
    _plain = nn.Conv1d


class Conv2d(_Conv, nn.Conv2d):
    _plain = nn.Conv2d


class Conv3d(_Conv, nn.Conv3d):
    _plain = nn.Conv3d


for _kind in (Conv1d, Conv2d, Conv3d):
    _kind.__doc__ = _Conv.__doc__
