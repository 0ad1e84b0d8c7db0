"""The PyTorch implementation of `lora_linear`: one autograd Function.

With A_j, B_j the factors of the j-th enabled part and N_j its rows of the output (one part: all rows):

    S  = (m ∘ x) Aᵀ                       y = x Wᵀ + bias,  then  y[:, N_j] += α S_j B_jᵀ
    dS_j = dY[:, N_j] B_j                 dX = α m ∘ (dS A),  then  dX += dY W
    dA = α dSᵀ (m ∘ x)                    dB_j = α dY[:, N_j]ᵀ S_j

m is the dropout mask (all ones at p = 0) and α = scaling / (1 - p').

Shapes: x (..., K), W (N, K) of any strides, A (n·r, K), B (sum of N_j, r), S (M, n·r) with M the rows
of x. Saved for backward: x, S, one bit an element of x at p > 0, and the parameters themselves. Never
formed: the dense update B A, a second copy of y or dX, a dropped-out copy of x that outlives the call.
What autograd does not ask for is not computed.

S is an output of the Function because it is needed in backward: so gradients of gradients are right.
α stays out of S and dS and goes into the products as their `alpha`, in the precision of the
accumulator. The base product comes first and the update is added in place, so that with B = 0 the
output is the frozen layer's to the bit; in backward the small product comes first, because it must be
masked before the big one may be added.
"""

import inspect
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.amp.autocast_mode import is_autocast_available  # which torch 2.11 does not export
from torch.nn import functional as F

from .dropout import keep

Rows = tuple[tuple[int, int], ...]


def autocast_dtype(device: torch.device) -> torch.dtype | None:
    """What autocast casts to on this device; None where it is off or does not exist."""
    kind = device.type
    if _has_autocast(kind) and torch.is_autocast_enabled(kind):
        return torch.get_autocast_dtype(kind)
    return None


def _has_autocast(kind: str) -> bool:
    return is_autocast_available(kind)


# As torch.compiler.assume_constant_result, which would import the compiler; torch 2.11 cannot trace it.
_has_autocast._dynamo_marked_constant = True  # type: ignore[attr-defined]


def autocast_off(device: torch.device) -> AbstractContextManager[object]:
    """Within it, products run in the dtype of their operands."""
    if autocast_dtype(device) is None:
        return nullcontext()
    return torch.autocast(device.type, enabled=False)


def _mm(a: Tensor, b: Tensor, alpha: float) -> Tensor:
    """alpha · a b, scaled before the result is rounded."""
    return torch.addmm(a.new_zeros(()), a, b, beta=0, alpha=alpha)


def _cat(parts: list[Tensor], dim: int) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim)


def _columns(matrix: Tensor, rows: Rows) -> list[Tensor]:
    """The columns of y or dY that belong to each part."""
    return [matrix.narrow(1, start, stop - start) for start, stop in rows]


def _factors(lora_B: Tensor, rows: Rows) -> Sequence[Tensor]:
    """B_j of each part."""
    return torch.split(lora_B, [stop - start for start, stop in rows])


def _blocks(s: Tensor, r: int) -> Sequence[Tensor]:
    """S_j of each part."""
    return torch.split(s, r, dim=1)


class LoRALinear(torch.autograd.Function):
    """(x, weight, bias, A, B, keep bits or None, α, rows of each part) -> (y, S), all in x's dtype.

    Parameters of another dtype are cast for the products, in forward and again in backward, so that
    no cast copy is kept; their gradients come back in their own dtype.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        lora_A: Tensor,
        lora_B: Tensor,
        bits: Tensor | None,
        alpha: float,
        rows: Rows,
    ) -> tuple[Tensor, Tensor]:
        dtype = x.dtype
        y = F.linear(x, weight.to(dtype), None if bias is None else bias.to(dtype))
        x2 = x.reshape(-1, x.shape[-1])
        s = torch.mm(x2 if bits is None else keep(x2, bits), lora_A.to(dtype).t())
        y2, factors = y.view(-1, y.shape[-1]), _factors(lora_B.to(dtype), rows)
        blocks = _blocks(s, lora_B.shape[1])
        for y_j, s_j, factor in zip(_columns(y2, rows), blocks, factors, strict=True):
            y_j.addmm_(s_j, factor.t(), alpha=alpha)
        return y, s

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        *tensors, mask, ctx.alpha, ctx.rows = inputs
        save(ctx, tensors, mask, output[1])

    @staticmethod
    def backward(ctx: Any, grad_y: Tensor | None, grad_s: Tensor | None) -> tuple[Any, ...]:
        with autocast_off(ctx.device):
            return *gradients(ctx, ctx.saved_tensors, grad_y, grad_s), None, None, None


def save(ctx: Any, inputs: Sequence[Any], mask: Tensor | None, s: Tensor) -> None:
    """Keep what `gradients` needs of x, weight, bias, A and B, of the mask's bits or seed, and of S."""
    x, weight, bias, lora_A, lora_B = inputs
    needs_x, needs_weight, _, needs_A, needs_B = ctx.needs_input_grad[:5]
    ctx.save_for_backward(
        x if needs_A or needs_weight else None,
        weight if needs_x else None,
        lora_A,
        lora_B,
        mask,
        s if needs_B else None,
    )
    ctx.x_shape, ctx.device = x.shape, x.device
    ctx.weight_dtype, ctx.bias_dtype = weight.dtype, None if bias is None else bias.dtype
    ctx.set_materialize_grads(False)


def gradients(
    ctx: Any, saved: tuple[Any, ...], grad_y: Tensor | None, grad_s: Tensor | None
) -> tuple[Tensor | None, ...]:
    """Of x, weight, bias, A and B, given those of y and S (None: zero), by differentiable PyTorch."""
    x, weight, lora_A, lora_B, bits, s = saved
    needs_x, _, _, needs_A, needs_B = ctx.needs_input_grad[:5]
    grad_x = grad_weight = grad_bias = grad_A = grad_B = ds = None
    alpha, rows = ctx.alpha, ctx.rows
    if grad_y is not None:
        dtype, dy = grad_y.dtype, grad_y.reshape(-1, grad_y.shape[-1])
        parts = _columns(dy, rows)
        if needs_x or needs_A:
            factors = _factors(lora_B.to(dtype), rows)
            ds = _cat([dy_j @ factor for dy_j, factor in zip(parts, factors, strict=True)], 1)
        if needs_B:
            blocks = _blocks(s, lora_B.shape[1])
            grads = [_mm(dy_j.t(), s_j, alpha) for dy_j, s_j in zip(parts, blocks, strict=True)]
            grad_B = _cat(grads, 0).to(lora_B.dtype)
        grad_weight, grad_bias = frozen_gradients(ctx, x, grad_y)
    if grad_s is not None:  # only when a gradient is differentiated again
        ds, alpha = grad_s if ds is None else grad_s + alpha * ds, 1.0
    if needs_A and ds is not None:
        x2 = x.reshape(-1, x.shape[-1])
        masked = x2 if bits is None else keep(x2, bits)
        grad_A = _mm(ds.t(), masked, alpha).to(lora_A.dtype)
    if needs_x and ds is not None:
        dx = _mm(ds, lora_A.to(ds.dtype), alpha)
        dx = dx if bits is None else keep(dx, bits)
        if grad_y is not None:
            dx = dx.addmm_(dy, weight.to(dtype))
        grad_x = dx.view(ctx.x_shape)
    return grad_x, grad_weight, grad_bias, grad_A, grad_B


def frozen_gradients(ctx: Any, x: Tensor | None, grad_y: Tensor) -> tuple[Tensor | None, ...]:
    """Of weight and bias, where they train after all."""
    grad_weight = grad_bias = None
    dy = grad_y.reshape(-1, grad_y.shape[-1])
    if ctx.needs_input_grad[1] and x is not None:
        grad_weight = torch.mm(dy.t(), x.reshape(-1, x.shape[-1])).to(ctx.weight_dtype)
    if ctx.needs_input_grad[2]:
        grad_bias = dy.sum(0).to(ctx.bias_dtype)
    return grad_weight, grad_bias


# Function.apply reads the signature at every call, which takes longer than a small product.
LoRALinear.forward.__signature__ = inspect.signature(LoRALinear.forward)  # type: ignore[attr-defined]
