"""MergedLinear: one linear layer that stands for several, each with its own low-rank update."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from .kernels.reference import part_rows
from .linear import Linear
from .variants import Variant

if TYPE_CHECKING:
    from typing_extensions import Self, Unpack


class MergedLinear(Linear):
    """Several linear layers in one weight, such as a fused qkv projection (loralib's MergedLinear).

        y = x Wᵀ + bias;   y[..., N_j] += scaling · (dropout(x) A_jᵀ) B_jᵀ   for each enabled part j

    weight (out, in), frozen; with n enabled parts, lora_A (r·n, in) and lora_B (rows of the enabled
    parts, r), both stacked part by part; r is the rank of each part; scaling = lora_alpha / r. The
    parts are `out_splits` rows each, of equal size if it is None. The parts share one dropout mask.
    The dense update is formed for merging alone, never in an unmerged forward or backward. The
    variants are those of `Linear`, each part by itself; lora_magnitude and lora_bias have the rows of
    the enabled parts.

    Raises ValueError if r > 0 and enable_lora enables nothing (as its default, kept from loralib,
    does), and if mask and parts do not fit out_features.

    >>> layer = MergedLinear(768, 3 * 768, r=8, enable_lora=[True, False, True])
    >>> layer.lora_A.shape, layer.lora_B.shape
    (torch.Size([16, 768]), torch.Size([1536, 8]))
    """

    _OWN = (*Linear._OWN, "enable_lora", "out_splits")
    enable_lora: Sequence[bool]
    out_splits: tuple[int, ...]

    def __init__(
        self,
        in_features: int,
        out_features: int,
        r: int = 0,
        lora_alpha: float = 1,
        lora_dropout: float = 0.0,
        enable_lora: Sequence[bool] = (False,),
        fan_in_fan_out: bool = False,
        merge_weights: bool = True,
        *,
        out_splits: Sequence[int] | None = None,
        **kwargs: Any,
    ) -> None:
        parts = _checked_parts(out_features, r, enable_lora, out_splits)
        self.enable_lora, self.out_splits = parts  # first: the factors' shapes depend on them
        super().__init__(
            in_features,
            out_features,
            r,
            lora_alpha,
            lora_dropout,
            fan_in_fan_out,
            merge_weights,
            **kwargs,
        )

    @classmethod
    def from_module(  # type: ignore[override]  # its options are named here
        cls,
        layer: nn.Module,
        r: int,
        lora_alpha: float = 1,
        lora_dropout: float = 0.0,
        merge_weights: bool = False,
        *,
        enable_lora: Sequence[bool] = (False,),
        out_splits: Sequence[int] | None = None,
        lora_dtype: torch.dtype | None = None,
        **variant: Unpack[Variant],
    ) -> Self:
        """Wrap a pretrained linear layer as `Linear.from_module` does, with parts."""
        return super().from_module(
            layer,
            r,
            lora_alpha,
            lora_dropout,
            merge_weights,
            lora_dtype=lora_dtype,
            enable_lora=enable_lora,
            out_splits=out_splits,
            **variant,
        )

    def _set_parts(  # type: ignore[override]  # its options are named here
        self, enable_lora: Sequence[bool] = (False,), out_splits: Sequence[int] | None = None
    ) -> None:
        parts = _checked_parts(self.out_features, self.r, enable_lora, out_splits)
        self.enable_lora, self.out_splits = parts

    @property
    def rows(self) -> tuple[tuple[int, int], ...]:
        rows: tuple[tuple[int, int], ...] = part_rows(self.out_splits, self.enable_lora)
        return rows

    def all_rows(self, values: Tensor, fill: float) -> Tensor:
        if all(self.enable_lora):
            return values
        parts, updated = [], iter(torch.split(values, [stop - start for start, stop in self.rows]))
        for size, enabled in zip(self.out_splits, self.enable_lora, strict=True):
            parts.append(next(updated) if enabled else values.new_full((size,), fill))
        return torch.cat(parts)

    def _factor_shapes(self) -> tuple[tuple[int, int], tuple[int, int]]:
        rows = sum(stop - start for start, stop in self.rows)
        return (self.r * sum(self.enable_lora), self.in_features), (rows, self.r)

    def _delta(self, lora_A: Tensor, lora_B: Tensor) -> Tensor:
        delta = lora_A.new_zeros((self.out_features, self.in_features))
        factors_A = torch.split(lora_A, lora_B.shape[1])
        factors_B = torch.split(lora_B, [stop - start for start, stop in self.rows])
        for (start, stop), A, B in zip(self.rows, factors_A, factors_B, strict=True):
            delta[start:stop] = B @ A
        return self._matrix(delta)

    def extra_repr(self) -> str:
        parts = f"enable_lora={self.enable_lora}, out_splits={list(self.out_splits)}"
        return f"{super().extra_repr()}, {parts}"


def _checked_parts(
    out_features: int, r: int, enable_lora: Sequence[bool], out_splits: Sequence[int] | None
) -> tuple[list[bool], tuple[int, ...]]:
    """The mask, and the rows of every part; ValueError if they do not fit out_features or r."""
    if not isinstance(enable_lora, (list, tuple)) or not enable_lora:
        raise ValueError(
            f"MergedLinear: enable_lora={enable_lora!r}: expected a list with one bool a part, such "
            "as [True, False, True]"
        )
    if not all(flag in (True, False) for flag in enable_lora):
        raise ValueError(f"MergedLinear: enable_lora={enable_lora!r}: expected bools alone")
    parts = len(enable_lora)
    if out_splits is None:
        if out_features % parts:
            raise ValueError(
                f"MergedLinear: enable_lora={enable_lora!r} has {parts} parts, which do not divide "
                f"out_features={out_features}; give the sizes of unequal parts as out_splits"
            )
        out_splits = [out_features // parts] * parts
    if (
        not isinstance(out_splits, (list, tuple))
        or not all(isinstance(size, int) and size > 0 for size in out_splits)
        or len(out_splits) != parts
        or sum(out_splits) != out_features
    ):
        raise ValueError(
            f"MergedLinear: out_splits={out_splits!r} with enable_lora={enable_lora!r}: expected "
            f"a list with one positive size for each of the {parts} parts, {out_features} in the sum"
        )
    if r != 0 and not any(enable_lora):
        raise ValueError(
            f"MergedLinear: r={r} but enable_lora={enable_lora!r} enables no part; enable one, as "
            "in [True, False, True], or take r=0 for a plain layer"
        )
    return [bool(flag) for flag in enable_lora], tuple(out_splits)
