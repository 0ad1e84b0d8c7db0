# mypy: disable-error-code="import-untyped,no-untyped-def,untyped-decorator,no-any-return"
"""dA = α dSᵀ (m ∘ x) and dX0 = α m ∘ (dS A) in one pass over x's shape.

x and dX0 (M, K), dS (M, R), A and dA (R, K); R counts the factors of all parts. m is made again
from the seed. The frozen product is then accumulated on dX0 by the GEMM
(`dX0.addmm_(dY, W)`). Bytes: x once, dX0 once, and fp32 slabs of dA. In PyTorch it is six passes: x̂ is
made again, dS A is written, masked, and added.

A program owns a tile of columns and a chunk of rows: dA of the tile stays in registers while it walks
down the rows. If R is above the largest block of ranks, dA and dX0 are two launches: one with a
program a block of ranks, so that x is read once a block, and one whose programs add up dX0 over all
blocks. What is not needed is skipped: without dA, x is not read.

Which of the two a program computes is known when it is compiled. A branch at run time inside the loop
over the rows would leave the pipeliner a buffer of dS short (triton #8139 is of this kind).
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .tiling import (
    Config,
    Table,
    architecture,
    cdiv,
    choose,
    chunk,
    dot_precision,
    keep_mask,
    on_device,
    options,
    processors,
    sum_partials,
)

CONFIGS: Table = {
    "default": {64: Config(rows=16, columns=64, warps=4, stages=2)},
    "sm_80": {64: Config(rows=64, columns=64, warps=8, stages=2)},
    "sm_90": {
        16: Config(rows=64, columns=128, warps=8, stages=3),
        64: Config(rows=64, columns=64, warps=4, stages=2),
        128: Config(rows=64, columns=32, warps=8, stages=2),
    },
    "sm_100": {
        64: Config(rows=64, columns=128, warps=8, stages=2),
        128: Config(rows=64, columns=64, warps=8, stages=2),
    },
    "fp32": {16: Config(rows=16, columns=64, warps=4, stages=1)},
    "interpreter": {32: Config(rows=32, columns=32, warps=4, stages=1)},
}
PROGRAMS = 2  # a processor: the tiles are small


@triton.jit(do_not_specialize=["M", "level", "m_chunk"])
def input_grads_kernel(
    x_ptr,
    ds_ptr,
    a_ptr,
    dx_ptr,
    da_ptr,
    seed_ptr,
    alpha,
    M,
    K,
    R,
    x_stride,
    level,
    m_chunk,
    DROPOUT: tl.constexpr,
    NEED_DX: tl.constexpr,
    NEED_DA: tl.constexpr,
    BLOCKS: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    first, split = tl.program_id(0) * BLOCK_K, tl.program_id(1)
    columns = first + tl.arange(0, BLOCK_K)
    ranks = tl.program_id(2) * BLOCK_R + tl.arange(0, BLOCK_R)
    of_a = ranks.to(tl.int64)[:, None] * K + columns[None, :]
    inside_a = (ranks[:, None] < R) & (columns[None, :] < K)
    dtype = ds_ptr.dtype.element_ty
    if NEED_DX:
        a = tl.load(a_ptr + of_a, mask=inside_a, other=0).to(dtype)
    da = tl.zeros((BLOCK_R, BLOCK_K), tl.float32)
    if DROPOUT:
        seed = tl.load(seed_ptr)
    for m in range(split * m_chunk, min(M, (split + 1) * m_chunk), BLOCK_M):
        rows = m + tl.arange(0, BLOCK_M)
        wide_rows = rows.to(tl.int64)[:, None]
        inside = (rows[:, None] < M) & (columns[None, :] < K)
        of_ds = ds_ptr + wide_rows * R
        ds = tl.load(
            of_ds + ranks[None, :], mask=(rows[:, None] < M) & (ranks[None, :] < R), other=0
        )
        if DROPOUT:
            keep = keep_mask(seed, rows, first, level, BLOCK_K)
        if NEED_DA:
            x = tl.load(x_ptr + wide_rows * x_stride + columns[None, :], mask=inside, other=0)
            if DROPOUT:
                x = tl.where(keep, x, 0.0)
            da = tl.dot(tl.trans(ds), x, da, input_precision=PRECISION)
        if NEED_DX:
            dx = tl.dot(ds, a, input_precision=PRECISION)
            if BLOCKS > 1:
                for k in range(BLOCK_R, R, BLOCK_R):
                    more = k + tl.arange(0, BLOCK_R)
                    in_ds = (rows[:, None] < M) & (more[None, :] < R)
                    ds_k = tl.load(of_ds + more[None, :], mask=in_ds, other=0)
                    in_a = (more[:, None] < R) & (columns[None, :] < K)
                    at = a_ptr + more.to(tl.int64)[:, None] * K + columns[None, :]
                    a_k = tl.load(at, mask=in_a, other=0).to(dtype)
                    dx = tl.dot(ds_k, a_k, dx, input_precision=PRECISION)
            dx = dx * alpha
            if DROPOUT:
                dx = tl.where(keep, dx, 0.0)
            tl.store(dx_ptr + wide_rows * K + columns[None, :], dx.to(dtype), mask=inside)
    if NEED_DA:
        tl.store(da_ptr + split.to(tl.int64) * R * K + of_a, da, mask=inside_a)


def input_grads(
    x: Tensor | None,
    ds: Tensor,
    lora_A: Tensor,
    alpha: float,
    seed: Tensor | None,
    level: int,
    need_dx: bool,
    need_da: bool,
) -> tuple[Tensor | None, Tensor | None]:
    """(dX0 (M, K) in dS's dtype, dA in A's), None for what is not needed.

    x (M, K) with unit stride in the rows, for dA alone; ds (M, R) and lora_A (R, K) contiguous.
    """
    (m, r), k = ds.shape, lora_A.shape[1]
    block_r, config = choose(CONFIGS, architecture(ds.device), r, ds if x is None else x, k)
    tiles, blocks = cdiv(k, config.columns), cdiv(r, block_r)
    if blocks > 1 and need_dx and need_da:
        dx, _ = input_grads(None, ds, lora_A, alpha, seed, level, True, False)
        _, da = input_grads(x, ds, lora_A, alpha, seed, level, False, True)
        return dx, da
    programs = tiles * (blocks if need_da else 1)
    m_chunk = chunk(m, config.rows, max(PROGRAMS * processors(ds.device) // programs, 1))
    splits = cdiv(m, m_chunk)
    dx = ds.new_empty((m, k)) if need_dx else None
    slabs = ds.new_empty((splits, r, k), dtype=torch.float32) if need_da else None
    with on_device(ds):
        input_grads_kernel[(tiles, splits, blocks if need_da else 1)](
            x,
            ds,
            lora_A,
            dx,
            slabs,
            seed,
            float(alpha),
            m,
            k,
            r,
            x.stride(0) if x is not None else 0,
            level,
            m_chunk,
            DROPOUT=seed is not None,
            NEED_DX=need_dx,
            NEED_DA=need_da,
            BLOCKS=blocks,
            PRECISION=dot_precision(ds.dtype),
            BLOCK_M=config.rows,
            BLOCK_K=config.columns,
            BLOCK_R=block_r,
            **options(config.warps, config.stages),
        )
    if slabs is None:
        return dx, None
    return dx, sum_partials(slabs, torch.empty_like(lora_A), alpha)
