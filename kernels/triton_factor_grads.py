# mypy: disable-error-code="import-untyped,no-untyped-def,untyped-decorator,no-any-return"
"""dS_j = dY[:, N_j] B_j and dB_j = α dY[:, N_j]ᵀ S_j of every part in one pass over dY.

dY (M, N), B (rows of the enabled parts, r), S and dS (M, n·r), dB like B. Bytes: the enabled columns of
dY once, and fp32 slabs that mostly stay in the L2 cache: both products reduce over an axis that is
split. In PyTorch dY is read twice for every part.

A program owns a tile of columns of one part and a chunk of rows: dB of the tile stays in registers
while it walks down the rows, and each step leaves a slab of dS, one a tile of columns. The chunks are
as long as a full device allows. The slabs are then added in order (`sum_partials`): no atomics. The
slabs of dS grow with the rank; where they would exceed a quarter of dY, dS is PyTorch's product and dY
is read twice, as it is if the rank is above the largest block. α stays out of dS.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .ops import Rows
from .tiling import (
    Config,
    Table,
    architecture,
    cdiv,
    choose,
    chunk,
    dot_precision,
    find_tile,
    on_device,
    options,
    processors,
    segments,
    sum_partials,
)

CONFIGS: Table = {
    "default": {
        16: Config(rows=32, columns=128, warps=4, stages=2),
        128: Config(rows=32, columns=64, warps=4, stages=2),
    },
    "sm_80": {
        16: Config(rows=64, columns=256, warps=8, stages=2),
        128: Config(rows=64, columns=128, warps=8, stages=2),
    },
    # A product reads its operands from the buffers, so with two stages the next tile is asked for after
    # it and waited for at once. Three need 223,232 of the 232,448 bytes that a block may have, and
    # 249,856 for 32 ranks.
    "sm_90": {
        16: Config(rows=64, columns=512, warps=8, stages=3),
        64: Config(rows=64, columns=512, warps=8, stages=2),
        128: Config(rows=64, columns=128, warps=8, stages=3),
    },
    "sm_100": {
        64: Config(rows=64, columns=256, warps=8, stages=3),
        128: Config(rows=64, columns=128, warps=8, stages=2),
    },
    "fp32": {
        16: Config(rows=64, columns=64, warps=4, stages=2),
        32: Config(rows=32, columns=32, warps=4, stages=2),
    },
    "interpreter": {32: Config(rows=32, columns=32, warps=4, stages=1)},
}
MOST_SLABS = 0.25  # of dY's bytes, written and read: with more, reading dY twice moves less


@triton.jit(do_not_specialize=["M", "m_chunk"])
def factor_grads_kernel(
    dy_ptr,
    s_ptr,
    b_ptr,
    ds_ptr,
    db_ptr,
    M,
    R,
    r,
    b_rows,
    dy_stride,
    m_chunk,
    SEGMENTS: tl.constexpr,
    NEED_DS: tl.constexpr,
    NEED_DB: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    tile, split = tl.program_id(0), tl.program_id(1)
    first, stop, part, b_row = find_tile(tile, SEGMENTS, BLOCK_N)
    columns = first + tl.arange(0, BLOCK_N)
    ranks = tl.program_id(2) * BLOCK_R + tl.arange(0, BLOCK_R)
    of_b = (b_row + tl.arange(0, BLOCK_N)).to(tl.int64)[:, None] * r + ranks[None, :]
    inside_b = (columns[:, None] < stop) & (ranks[None, :] < r)
    dtype = dy_ptr.dtype.element_ty
    if NEED_DS:
        b = tl.load(b_ptr + of_b, mask=inside_b, other=0).to(dtype)
    db = tl.zeros((BLOCK_N, BLOCK_R), tl.float32)
    for m in range(split * m_chunk, min(M, (split + 1) * m_chunk), BLOCK_M):
        rows = m + tl.arange(0, BLOCK_M)
        wide_rows = rows.to(tl.int64)[:, None]
        inside = (rows[:, None] < M) & (columns[None, :] < stop)
        dy = tl.load(dy_ptr + wide_rows * dy_stride + columns[None, :], mask=inside, other=0)
        inside = (rows[:, None] < M) & (ranks[None, :] < r)
        if NEED_DB:
            s = tl.load(s_ptr + wide_rows * R + part * r + ranks[None, :], mask=inside, other=0)
            db = tl.dot(tl.trans(dy), s, db, input_precision=PRECISION)
        if NEED_DS:
            ds = tl.dot(dy, b, input_precision=PRECISION)
            to = ds_ptr + (tile.to(tl.int64) * M + wide_rows) * r + ranks[None, :]
            tl.store(to, ds, mask=inside)
    if NEED_DB:
        tl.store(db_ptr + split.to(tl.int64) * b_rows * r + of_b, db, mask=inside_b)


def factor_grads(
    dy: Tensor,
    s: Tensor | None,
    lora_B: Tensor,
    alpha: float,
    rows: Rows,
    need_ds: bool,
    need_db: bool,
) -> tuple[Tensor | None, Tensor | None]:
    """(dS in dY's dtype, dB in B's), None for what is not needed.

    dy (M, N) with unit stride in the rows; s (M, n·r), for dB, and lora_B contiguous.
    """
    (m, _), r, arch = dy.shape, lora_B.shape[1], architecture(dy.device)
    block_r, config = choose(CONFIGS, arch, r, dy, dy.stride(0))
    parts = segments(rows)
    tiles = [cdiv(stop - start, config.columns) for start, stop, *_ in parts]
    slabs_of_ds = 4 * r / (config.columns * dy.element_size())  # over dY
    fused_ds = need_ds and slabs_of_ds <= MOST_SLABS
    ds = dy.new_empty((m, len(parts) * r)) if need_ds else None
    if ds is not None and not fused_ds:
        for start, stop, part, b_row in parts:
            factor = lora_B[b_row : b_row + stop - start].to(dy.dtype)
            torch.mm(dy[:, start:stop], factor, out=ds[:, part * r : (part + 1) * r])
    if not fused_ds and not need_db:
        return ds, None
    m_chunk = chunk(m, config.rows, max(processors(dy.device) // sum(tiles), 1))
    splits = cdiv(m, m_chunk)
    ds_slabs = dy.new_empty((sum(tiles), m, r), dtype=torch.float32) if fused_ds else None
    db_slabs = dy.new_empty((splits, *lora_B.shape), dtype=torch.float32) if need_db else None
    with on_device(dy):
        factor_grads_kernel[(sum(tiles), splits, cdiv(r, block_r))](
            dy,
            s,
            lora_B,
            ds_slabs,
            db_slabs,
            m,
            len(parts) * r,
            r,
            lora_B.shape[0],
            dy.stride(0),
            m_chunk,
            SEGMENTS=parts,
            NEED_DS=fused_ds,
            NEED_DB=need_db,
            PRECISION=dot_precision(dy.dtype),
            BLOCK_M=config.rows,
            BLOCK_N=config.columns,
            BLOCK_R=block_r,
            **options(config.warps, config.stages),
        )
    if ds is not None and ds_slabs is not None:
        sum_partials(ds_slabs, ds, parts=tiles)
    if db_slabs is None:
        return ds, None
    return ds, sum_partials(db_slabs, torch.empty_like(lora_B), alpha)
