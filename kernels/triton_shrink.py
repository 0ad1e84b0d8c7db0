# mypy: disable-error-code="import-untyped,no-untyped-def,untyped-decorator,no-any-return"
"""S = (m ∘ x) Aᵀ: dropout and the down projection of every part in one pass over x.

x (M, K), A (R, K) with the factors of all parts stacked, S (M, R). m is made on the fly from the seed,
so nothing of x's size is written. Bytes: x once (once a block of ranks if R exceeds the largest), A
once a tile of rows (from the L2 cache), S. In PyTorch x is read, a mask and a dropped-out x are
written, and that is read again.

A program owns a tile of rows and a chunk of K. Many tokens: one chunk, S is written as it is. Few: K is
split until the device is full, and the chunks' fp32 slabs are summed by `sum_partials`, or by the next
kernel where nothing else needs S. α is not applied here. Not handled: sparse or quantised x.
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
    tile_rows,
)

CONFIGS: Table = {
    "default": {
        64: Config(rows=64, columns=64, warps=8, stages=2),
        128: Config(rows=64, columns=32, warps=4, stages=2),
    },
    "sm_80": {
        64: Config(rows=64, columns=64, warps=4, stages=4),
        128: Config(rows=64, columns=64, warps=4, stages=3),
    },
    # Products of 64 rows and more take wgmma, with the masked x in registers: Triton 3.6.0 writes these
    # again while the product still reads them (triton #9433), and 3.8.0's ptxas may (triton #11781).
    "sm_90": {
        16: Config(rows=32, columns=128, warps=4, stages=3),
        128: Config(rows=32, columns=64, warps=4, stages=4),
    },
    "sm_100": {
        64: Config(rows=64, columns=128, warps=4, stages=3),
        128: Config(rows=64, columns=64, warps=4, stages=4),
    },
    "fp32": {32: Config(rows=64, columns=32, warps=8, stages=2)},
    "interpreter": {32: Config(rows=32, columns=16, warps=4, stages=1)},
}
PROGRAMS = 2  # a processor: one alone waits for its own mask
MOST_SPLITS = 16  # more slabs cost the next kernel more than they save this one


@triton.jit(do_not_specialize=["M", "level"])
def shrink_kernel(
    x_ptr,
    a_ptr,
    s_ptr,
    seed_ptr,
    M,
    K,
    R,
    x_stride,
    level,
    k_chunk,
    DROPOUT: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    rank_blocks = tl.cdiv(R, BLOCK_R)
    rows = tl.program_id(0) // rank_blocks * BLOCK_M + tl.arange(0, BLOCK_M)
    ranks = tl.program_id(0) % rank_blocks * BLOCK_R + tl.arange(0, BLOCK_R)
    split = tl.program_id(1)
    wide_rows = rows.to(tl.int64)[:, None]
    total = tl.zeros((BLOCK_M, BLOCK_R), tl.float32)
    if DROPOUT:
        seed = tl.load(seed_ptr)
    for k in range(split * k_chunk, min(K, (split + 1) * k_chunk), BLOCK_K):
        columns = k + tl.arange(0, BLOCK_K)
        inside = (rows[:, None] < M) & (columns[None, :] < K)
        x = tl.load(x_ptr + wide_rows * x_stride + columns[None, :], mask=inside, other=0)
        if DROPOUT:
            x = tl.where(keep_mask(seed, rows, k, level, BLOCK_K), x, 0.0)
        inside = (ranks[:, None] < R) & (columns[None, :] < K)
        of_a = ranks.to(tl.int64)[:, None] * K + columns[None, :]
        a = tl.load(a_ptr + of_a, mask=inside, other=0)
        total = tl.dot(x, tl.trans(a.to(x.dtype)), total, input_precision=PRECISION)
    inside = (rows[:, None] < M) & (ranks[None, :] < R)
    to = s_ptr + (split.to(tl.int64) * M + wide_rows) * R + ranks[None, :]
    tl.store(to, total.to(s_ptr.dtype.element_ty), mask=inside)


def shrink(x: Tensor, lora_A: Tensor, seed: Tensor | None, level: int) -> Tensor:
    """S of x (M, K), unit stride in the rows, and contiguous A (R, K), as slabs.

    Returns (1, M, R) in x's dtype, or (splits, M, R) in fp32 whose sum over the first axis is S.
    """
    (m, k), r = x.shape, lora_A.shape[0]
    block_r, config = choose(CONFIGS, architecture(x.device), r, x, x.stride(0), k)
    block_m = tile_rows(config, m)
    tiles = cdiv(m, block_m) * cdiv(r, block_r)
    splits = min(PROGRAMS * processors(x.device) // tiles, cdiv(k, 2 * config.columns), MOST_SPLITS)
    k_chunk = chunk(k, config.columns, max(splits, 1))
    splits = cdiv(k, k_chunk)
    slabs = x.new_empty((splits, m, r), dtype=x.dtype if splits == 1 else torch.float32)
    with on_device(x):
        shrink_kernel[(tiles, splits)](
            x,
            lora_A,
            slabs,
            seed,
            m,
            k,
            r,
            x.stride(0),
            level,
            k_chunk,
            DROPOUT=seed is not None,
            PRECISION=dot_precision(x.dtype),
            BLOCK_M=block_m,
            BLOCK_K=config.columns,
            BLOCK_R=block_r,
            **options(config.warps, config.stages),
        )
    return slabs
