"""The one public entry: check the arguments, settle the dtype, draw the mask, choose the code."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn import functional as F

from . import reference
from .dropout import draw_keep_bits, keep, keep_scale, seeded_keep_bits
from .ops import LoRALinear, autocast_dtype
from .reference import part_rows

_IMPLEMENTATIONS = ("auto", "torch")


def lora_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: float,
    *,
    splits: Sequence[int] | None = None,
    enabled: Sequence[bool] | None = None,
    dropout_p: float = 0.0,
    seed: Tensor | int | None = None,
    impl: str = "auto",
) -> Tensor:
    """x Wᵀ + bias + scaling · (dropout(x) A_jᵀ) B_jᵀ in the rows of every enabled part j.

    LoRA, arXiv 2106.09685, section 4.1 (one part); loralib's MergedLinear (several).

    Args:
        x: (..., K), one dimension or more, possibly empty.
        weight: (N, K), frozen or not; any strides, so a (K, N) weight is passed as `weight.t()`.
        bias: (N,) or None.
        lora_A: (n·r, K), the factors of the n enabled parts, stacked.
        lora_B: (rows of the enabled parts, r), stacked likewise.
        scaling: the factor of the update, lora_alpha / r.
        splits: output rows of every part, N in the sum; None is one part.
        enabled: which parts have an update; None is all of them.
        dropout_p: probability in [0, 1) with which an element of x is dropped from the update's
            input, resolved to 2^-16; one mask for all parts.
        seed: one int64 element on x's device that alone decides the mask; None draws the mask from
            torch's generator of the device.
        impl: "auto" or "torch".

    Returns:
        (..., N) in x's dtype, or in autocast's where that is on. weight must have x's dtype unless
        autocast is on; bias and factors may have any (fp32 factors on a bf16 base: the products run
        in bf16, the factors' gradients are fp32).

    Raises:
        ValueError: shapes, parts, dropout_p or impl that do not fit.
        TypeError: x and weight of different dtypes without autocast.
    """
    splits = (weight.shape[0],) if splits is None else tuple(splits)
    enabled = (True,) * len(splits) if enabled is None else tuple(enabled)
    if impl not in _IMPLEMENTATIONS:
        raise ValueError(f"impl={impl!r}: expected one of {_IMPLEMENTATIONS}")
    if not 0 <= dropout_p < 1:
        raise ValueError(f"dropout_p={dropout_p!r}: expected a probability in [0, 1)")
    tracing: bool = torch.jit.is_tracing()  # type: ignore[attr-defined, no-untyped-call]
    if not tracing:  # which would record every comparison
        _check_shapes(x, weight, bias, lora_A, lora_B, splits, enabled)

    if lora_A.shape[0] == 0:  # rank 0, or no enabled part
        return F.linear(x, weight, bias)
    autocast = autocast_dtype(x.device)
    if autocast is not None and x.is_floating_point() and x.dtype != torch.float64:
        x = x.to(autocast)
    elif x.dtype != weight.dtype:
        raise TypeError(
            f"x is {x.dtype} and weight is {weight.dtype}: expected the same dtype; "
            f"pass x.to({weight.dtype}) or run under torch.autocast({x.device.type!r})"
        )

    bits, alpha = None, float(scaling)
    if tracing or forward_ad._current_level >= 0:  # the Function is opaque to both
        return reference.lora_linear(
            x,
            weight.to(x.dtype),
            None if bias is None else bias.to(x.dtype),
            lora_A.to(x.dtype),
            lora_B.to(x.dtype),
            alpha,
            splits=splits,
            enabled=enabled,
            mask=_mask(x, dropout_p, seed) if dropout_p > 0 else None,
        )
    if dropout_p > 0:
        bits = _draw(x, dropout_p, seed)
        alpha *= keep_scale(dropout_p)
    parts = part_rows(splits, enabled)
    y: Tensor = LoRALinear.apply(x, weight, bias, lora_A, lora_B, bits, alpha, parts)[0]  # type: ignore[no-untyped-call]
    return y


def _draw(x: Tensor, p: float, seed: Tensor | int | None) -> Tensor:
    """Packed mask of x, from the seed or from torch's generator."""
    rows, columns = x.shape[:-1].numel(), x.shape[-1]
    if seed is None:
        bits: Tensor = draw_keep_bits(rows * columns, p, device=x.device)
        return bits
    seed = torch.as_tensor(seed, dtype=torch.int64, device=x.device)
    if seed.numel() != 1:
        raise ValueError(f"seed has shape {tuple(seed.shape)}: expected one element")
    return seeded_keep_bits(seed, rows, columns, p)


def _mask(x: Tensor, p: float, seed: Tensor | int | None) -> Tensor:
    """The mask as a tensor like x, with its keep-scale, by operations that can be traced."""
    ones = torch.ones_like(x)
    if seed is None:
        return F.dropout(ones, p)
    kept: Tensor = keep(ones, _draw(x, p, seed))
    return kept * keep_scale(p)


def _check_shapes(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_A: Tensor,
    lora_B: Tensor,
    splits: tuple[int, ...],
    enabled: tuple[bool, ...],
) -> None:
    if weight.dim() != 2 or lora_A.dim() != 2 or lora_B.dim() != 2:
        raise ValueError(
            "weight, lora_A and lora_B must be matrices, got shapes "
            f"{tuple(weight.shape)}, {tuple(lora_A.shape)}, {tuple(lora_B.shape)}"
        )
    out_features, in_features = weight.shape
    if x.dim() == 0 or x.shape[-1] != in_features:
        raise ValueError(f"x has shape {tuple(x.shape)}: expected (..., {in_features})")
    if bias is not None and bias.shape != (out_features,):
        raise ValueError(f"bias has shape {tuple(bias.shape)}: expected ({out_features},)")
    if len(enabled) != len(splits) or sum(splits) != out_features or min(splits) < 0:
        raise ValueError(
            f"splits={splits} and enabled={enabled}: expected one flag a part, "
            f"and parts that sum to the {out_features} rows of weight"
        )
    r, parts = lora_B.shape[1], sum(map(bool, enabled))
    rows = sum(size for size, on in zip(splits, enabled, strict=True) if on)
    if lora_A.shape != (r * parts, in_features) or lora_B.shape[0] != rows:
        raise ValueError(
            f"lora_A {tuple(lora_A.shape)} and lora_B {tuple(lora_B.shape)} do not fit: {parts} "
            f"enabled parts with {rows} rows need lora_A ({parts}·r, {in_features}) and "
            f"lora_B ({rows}, r)"
        )
