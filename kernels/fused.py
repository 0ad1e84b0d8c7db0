"""The fused implementation of `lora_linear`: the schedule, as two operators of torch.library.

The algebra is that of ops.py. What differs is the order, so that no tensor as large as x, y or dX is
read or written for the sake of the update alone where a frozen product can do it in passing:

    forward    S  = (m ∘ x) Aᵀ                    triton_shrink        reads x
               Y  = α S_j B_jᵀ + bias             triton_expand        writes Y
               Y += x Wᵀ                          one GEMM, beta = 1   the frozen product
    backward   dS_j = dY_j B_j, dB_j = α dY_jᵀ S_j   triton_factor_grads  reads dY
               dA = α dSᵀ (m ∘ x), dX = α m ∘ (dS A)  triton_input_grads  reads x, writes dX
               dX += dY W                         one GEMM, beta = 1   the frozen product

Bytes over the frozen products, in elements: M (K + N) forward, M (N + 2 K) backward, where PyTorch's
own operations on a layer with dropout take M (3.5 K + 6 N) and M (7.5 K + 4 N). Saved for backward: x,
S, and the seed of m.

With few tokens y is small and W is all that counts: the frozen product runs as without LoRA and the
update is added to it. There B = 0 gives the frozen output to the bit; with many tokens it does if the
GEMM library takes the same kernel for beta = 1 as for beta = 0.

Gradients of gradients are computed by PyTorch (ops.py) on the same mask.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from . import ops
from .dropout import drop_level, keep_scale, seeded_keep_bits

FEW_TOKENS = 64  # up to here a frozen layer is limited by reading its weight


def _pairs(rows: Sequence[int]) -> ops.Rows:
    return tuple(zip(rows[::2], rows[1::2], strict=True))


def _mask(seed: Tensor | None, p: float) -> tuple[Tensor | None, int]:
    """(seed, level), without a seed if p is too small to drop anything."""
    level = drop_level(p)
    return (seed if level > 0 else None), level


@torch.library.custom_op("lora::fused_forward", mutates_args=())
def fused_forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_A: Tensor,
    lora_B: Tensor,
    seed: Tensor | None,
    p: float,
    scaling: float,
    rows: Sequence[int],
    keep_s: bool,
) -> tuple[Tensor, Tensor]:
    """(y, S) in x's dtype; rows: start and end of every part, flat; S is (0, n·r) unless keep_s."""
    from .tiling import matrix, sum_partials
    from .triton_expand import expand
    from .triton_shrink import shrink

    dtype, (n, k), r = x.dtype, weight.shape, lora_A.shape[0]
    m = x.shape[:-1].numel()
    s = x.new_empty((m if keep_s else 0, r))
    bias = None if bias is None else bias.to(dtype)
    weight = weight.to(dtype)
    if m == 0 or k == 0 or lora_B.numel() == 0:
        return F.linear(x, weight, bias), s.zero_()
    x2, (seed, level) = matrix(x), _mask(seed, p)
    few = m <= FEW_TOKENS
    A, B = lora_A.contiguous(), lora_B.contiguous()
    # Every tile of rows reads A; of few tokens there are few tiles, and a launch would cost more.
    slabs = shrink(x2, A if few else A.to(dtype), seed, level)
    if keep_s or not few:
        full = slabs[0] if len(slabs) == 1 else sum_partials(slabs, x.new_empty((m, r)))
        s, slabs = (full if keep_s else s), full[None]
    alpha = scaling * (keep_scale(p) if seed is not None else 1)
    with ops.autocast_off(x.device):
        if few:
            y = F.linear(x, weight, bias)
            expand(y.view(m, n), slabs, B, None, alpha, _pairs(rows), add=True)
        else:
            y = x.new_empty((*x.shape[:-1], n))
            expand(y.view(m, n), slabs, B, bias, alpha, _pairs(rows), add=False)
            y.view(m, n).addmm_(x2, weight.t())
    return y, s


@fused_forward.register_fake
def _(x, weight, bias, lora_A, lora_B, seed, p, scaling, rows, keep_s):  # type: ignore[no-untyped-def]
    m = math.prod(x.shape[:-1]) if keep_s else 0  # Size.numel() would fix a dynamic size
    return x.new_empty((*x.shape[:-1], weight.shape[0])), x.new_empty((m, lora_A.shape[0]))


@torch.library.custom_op("lora::fused_backward", mutates_args=())
def fused_backward(
    dy: Tensor,
    x: Tensor | None,
    weight: Tensor | None,
    lora_A: Tensor,
    lora_B: Tensor,
    seed: Tensor | None,
    s: Tensor | None,
    p: float,
    scaling: float,
    rows: Sequence[int],
    needs: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    """(dX like x, dA like A, dB like B); without elements where `needs`, in that order, is false.

    x is needed for dA, weight for dX, s for dB.
    """
    from .tiling import matrix
    from .triton_factor_grads import factor_grads
    from .triton_input_grads import input_grads

    need_x, need_A, need_B = needs
    k = lora_A.shape[1]
    empty = dy.new_empty(0), lora_A.new_empty(0), lora_B.new_empty(0)
    if dy.numel() == 0 or k == 0 or lora_B.numel() == 0:
        return (
            empty[0] if weight is None or not need_x else F.linear(dy, weight.to(dy.dtype).t()),
            torch.zeros_like(lora_A) if need_A else empty[1],
            torch.zeros_like(lora_B) if need_B else empty[2],
        )
    dy2, (seed, level) = matrix(dy), _mask(seed, p)
    alpha = scaling * (keep_scale(p) if seed is not None else 1)
    A, B = lora_A.contiguous(), lora_B.contiguous()
    dx = dA = None
    with ops.autocast_off(dy.device):
        ds, dB = factor_grads(dy2, s, B, alpha, _pairs(rows), need_x or need_A, need_B)
        if ds is not None:
            x2 = matrix(x) if x is not None and need_A else None
            dx, dA = input_grads(x2, ds, A, alpha, seed, level, need_x, need_A)
        if dx is not None and weight is not None:
            dx = dx.addmm_(dy2, weight.to(dy.dtype)).view(*dy.shape[:-1], k)
    return tuple(e if g is None else g for g, e in zip((dx, dA, dB), empty, strict=True))  # type: ignore[return-value]


@fused_backward.register_fake
def _(dy, x, weight, lora_A, lora_B, seed, s, p, scaling, rows, needs):  # type: ignore[no-untyped-def]
    shapes = ((*dy.shape[:-1], lora_A.shape[1]), lora_A.shape, lora_B.shape)
    return tuple(
        like.new_empty(shape if needed else (0,))
        for like, shape, needed in zip((dy, lora_A, lora_B), shapes, needs, strict=True)
    )


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, seed, ctx.p, ctx.scaling, rows, _ = inputs
    ctx.rows = _pairs(rows)
    ops.save(ctx, tensors, seed, output[1])


def _backward(ctx: Any, grad_y: Tensor | None, grad_s: Tensor | None) -> tuple[Any, ...]:
    none = (None,) * 5
    if grad_y is None and grad_s is None:
        return none + none
    x, weight, lora_A, lora_B, seed, s = ctx.saved_tensors
    with ops.autocast_off(ctx.device):
        if grad_y is None or grad_s is not None or torch.is_grad_enabled():
            bits, ctx.alpha = _bits(ctx, seed)
            grads = ops.gradients(ctx, (x, weight, lora_A, lora_B, bits, s), grad_y, grad_s)
            return *grads, *none  # differentiable
        rows = [edge for pair in ctx.rows for edge in pair]
        needs = [ctx.needs_input_grad[i] for i in (0, 3, 4)]
        tensors = (x if needs[1] else None, weight, lora_A, lora_B, seed, s)
        grad_x = grad_A = grad_B = None
        if any(needs):
            grads = fused_backward(grad_y, *tensors, ctx.p, ctx.scaling, rows, needs)
            grad_x, grad_A, grad_B = (g if n else None for g, n in zip(grads, needs, strict=True))
        return grad_x, *ops.frozen_gradients(ctx, x, grad_y), grad_A, grad_B, *none


def _bits(ctx: Any, seed: Tensor | None) -> tuple[Tensor | None, float]:
    """The mask as ops.py takes it, and α."""
    if seed is None:
        return None, ctx.scaling
    rows, columns = math.prod(ctx.x_shape[:-1]), ctx.x_shape[-1]
    return seeded_keep_bits(seed, rows, columns, ctx.p), ctx.scaling * keep_scale(ctx.p)


fused_forward.register_autograd(_backward, setup_context=_setup)
