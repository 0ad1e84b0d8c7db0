"""How the fused kernels are judged: against float64, by the error of PyTorch's own products."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from lora.kernels import lora_linear

SEED = -(2**62) + 12345


class Case(NamedTuple):
    """tokens: all dimensions of x but the last; parts: rows of each and whether it is enabled."""

    tokens: tuple[int, ...]
    k: int
    splits: tuple[int, ...]
    enabled: tuple[bool, ...]
    r: int
    p: float
    bias: bool


def problem(case, dtype, factors=None, device="cpu"):
    """Leaves x, weight, bias, A, B, all with gradients, and the keywords of the call."""
    lead, k, splits, enabled, r, p, bias = case
    rows = sum(size for size, on in zip(splits, enabled, strict=True) if on)
    n = sum(splits)
    tensors = [
        torch.randn(*lead, k).to(dtype),
        (torch.randn(n, k) / k**0.5).to(dtype),
        torch.randn(n).to(dtype) if bias else None,
        (torch.randn(r * sum(enabled), k) / k**0.5).to(factors or dtype),
        torch.randn(rows, r).to(factors or dtype),
    ]
    options = {"splits": splits, "enabled": enabled, "dropout_p": p, "seed": SEED}
    return [None if t is None else t.to(device).requires_grad_() for t in tensors], options


def step(tensors, grad, options, impl, dtype=None, scaling=0.7):
    """y and the gradients of all tensors that want one, computed by `impl` in `dtype`."""
    own = [
        None if t is None else t.detach().to(dtype or t.dtype).requires_grad_(t.requires_grad)
        for t in tensors
    ]
    y = lora_linear(*own, scaling, impl=impl, **options)
    wanted = [t for t in own if t is not None and t.requires_grad]
    return [y.detach(), *torch.autograd.grad(y, wanted, grad.to(dtype or grad.dtype))]


def error_over_allowed(tensors, grad, options, fused: Sequence[Tensor]) -> float:
    """The largest error of `fused`, what `step` gives by the kernels, over what is allowed.

    Allowed, in the largest and in the root mean square error of each tensor, is twice PyTorch's error
    in the same dtype, and two roundings of a typical element, where PyTorch happens to hit the value.
    """
    exact = step(tensors, grad, options, "torch", torch.float64)
    eager = step(tensors, grad, options, "torch")
    more = [torch.zeros_like(value) for value in exact]
    if grad[..., 0].numel() == 1:
        # dA is dSᵀ x of one token: all its error is that of a sum, dS, which PyTorch may round luckily
        # or not. Allowed is one rounding to fp32 of the sum of absolute values.
        absolute = [None if t is None else t.detach().abs().requires_grad_() for t in tensors]
        sums = step(absolute, grad.abs(), options, "torch", torch.float64)
        more[-2] = sums[-2] * torch.finfo(torch.float32).eps / 2
    worst = 0.0
    for want, theirs, ours, extra in zip(exact, eager, fused, more, strict=True):
        if ours.dtype != theirs.dtype:
            raise AssertionError(f"{ours.dtype} where PyTorch gives {theirs.dtype}")
        small = 2 * torch.finfo(ours.dtype).eps * want.square().mean().sqrt()
        for norm in (lambda e: e.abs().max(), lambda e: e.square().mean().sqrt()):
            error, allowed = norm(ours - want), 2 * norm(theirs - want) + small + norm(extra)
            ratio = float(error / allowed) if error != 0 else 0.0
            worst = max(worst, ratio if error.isfinite() else float("inf"))
    return worst
