"""`lora_linear` as its formula, in plain differentiable PyTorch: the documentation and the oracle.

    y = x Wᵀ + bias;   y[..., N_j] += scaling / (1 - p) · ((m ∘ x) A_jᵀ) B_jᵀ   for each enabled part j

(LoRA, arXiv 2106.09685, section 4.1; parts as in loralib's MergedLinear.) Run it in float64 to judge
the other implementations. It keeps every intermediate and makes no attempt at speed.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F


def part_rows(splits: Sequence[int], enabled: Sequence[bool]) -> tuple[tuple[int, int], ...]:
    """(first row, last row + 1) in the output of every enabled part."""
    stops = [sum(splits[: i + 1]) for i in range(len(splits))]
    return tuple(
        (stop - size, stop) for size, stop, on in zip(splits, stops, enabled, strict=True) if on
    )


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
    mask: Tensor | None = None,
    p: float = 0.0,
) -> Tensor:
    """x (..., K), weight (N, K), lora_A (n·r, K), lora_B (enabled rows, r), mask like x or None."""
    splits = (weight.shape[0],) if splits is None else splits
    enabled = (True,) * len(splits) if enabled is None else enabled
    dropped = x if mask is None else x * mask / (1 - p)
    factors_A = iter(torch.split(lora_A, max(lora_B.shape[1], 1)))
    rows = [size for size, on in zip(splits, enabled, strict=True) if on]
    factors_B = iter(torch.split(lora_B, rows))
    updates = [
        F.linear(F.linear(dropped, next(factors_A)), next(factors_B)) * scaling
        if on
        else x.new_zeros(*x.shape[:-1], size)
        for size, on in zip(splits, enabled, strict=True)
    ]
    return F.linear(x, weight, bias) + torch.cat(updates, dim=-1)
