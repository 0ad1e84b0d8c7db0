# mypy: disable-error-code="import-untyped,no-untyped-def,untyped-decorator,no-any-return"
"""y = α S_j B_jᵀ + bias in the columns N_j of every enabled part j, in one launch.

S (M, n·r), B (rows of the enabled parts, r), y (M, N). Two uses:

* prefill: y is written for the first time, with the update and the bias (in the columns of a disabled
  part: the bias or zero), and the frozen product is then accumulated on it by the GEMM itself
  (`y.addmm_(x, Wᵀ)`). Bytes: y once. Adding the update to the GEMM's output instead reads and writes y.
* add: y += α S_j B_jᵀ in the enabled columns, for few tokens, where y is small and the frozen product
  is limited by reading W: it runs as it does without LoRA.

S may come as fp32 slabs (see triton_shrink), which are added here and rounded to y's dtype, as S is
when it is stored. A program owns one tile of y. Not handled: y with other strides than a row-major one.
"""

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
    dot_precision,
    find_tile,
    on_device,
    options,
    segments,
    tile_rows,
)

CONFIGS: Table = {
    "default": {
        32: Config(rows=64, columns=128, warps=4, stages=1),
        128: Config(rows=64, columns=256, warps=8, stages=1),
    },
    "sm_90": {128: Config(rows=128, columns=128, warps=8, stages=1)},
    "sm_100": {128: Config(rows=128, columns=128, warps=8, stages=1)},
    "fp32": {16: Config(rows=64, columns=64, warps=4, stages=1)},
    "interpreter": {32: Config(rows=32, columns=32, warps=4, stages=1)},
}


@triton.jit(do_not_specialize=["M", "slabs", "tiles"])
def expand_kernel(
    y_ptr,
    s_ptr,
    b_ptr,
    bias_ptr,
    alpha,
    M,
    N,
    R,
    r,
    slabs,
    tiles,
    SEGMENTS: tl.constexpr,
    ADD: tl.constexpr,
    BIAS: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    first, stop, part, b_row = find_tile(tl.program_id(0) % tiles, SEGMENTS, BLOCK_N)
    rows = tl.program_id(0) // tiles * BLOCK_M + tl.arange(0, BLOCK_M)
    columns = first + tl.arange(0, BLOCK_N)
    wide_rows = rows.to(tl.int64)[:, None]
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    if part >= 0:
        b_rows = b_row + tl.arange(0, BLOCK_N)
        for k in range(0, r, BLOCK_R):
            ranks = k + tl.arange(0, BLOCK_R)
            inside = (rows[:, None] < M) & (ranks[None, :] < r)
            s = tl.zeros((BLOCK_M, BLOCK_R), tl.float32)
            at = s_ptr + wide_rows * R + part * r + ranks[None, :]
            for _ in range(slabs):
                s += tl.load(at, mask=inside, other=0).to(tl.float32)
                at += M.to(tl.int64) * R
            inside = (columns[:, None] < stop) & (ranks[None, :] < r)
            b = tl.load(b_ptr + b_rows[:, None] * r + ranks[None, :], mask=inside, other=0)
            dtype = y_ptr.dtype.element_ty
            total = tl.dot(s.to(dtype), tl.trans(b.to(dtype)), total, input_precision=PRECISION)
    total = total * alpha
    inside = (rows[:, None] < M) & (columns[None, :] < stop)
    at = y_ptr + wide_rows * N + columns[None, :]
    if ADD:
        total += tl.load(at, mask=inside, other=0).to(tl.float32)
    if BIAS:
        bias = tl.load(bias_ptr + columns, mask=columns < stop, other=0).to(tl.float32)
        total += bias[None, :]
    tl.store(at, total.to(y_ptr.dtype.element_ty), mask=inside)


def expand(
    y: Tensor,
    slabs: Tensor,
    lora_B: Tensor,
    bias: Tensor | None,
    alpha: float,
    rows: Rows,
    add: bool,
) -> None:
    """Fill contiguous y (M, N) with the update and the bias, or add the update to it.

    slabs (any, M, n·r) and lora_B (rows of the enabled parts, r) contiguous; bias only if not `add`.
    """
    (m, n), r = y.shape, lora_B.shape[1]
    block_r, config = choose(CONFIGS, architecture(y.device), r, y, n)
    block_m = tile_rows(config, m)
    parts = segments(rows, None if add else n)
    tiles = sum(cdiv(stop - start, config.columns) for start, stop, *_ in parts)
    with on_device(y):
        expand_kernel[(cdiv(m, block_m) * tiles,)](
            y,
            slabs,
            lora_B,
            bias,
            float(alpha),
            m,
            n,
            slabs.shape[2],
            r,
            slabs.shape[0],
            tiles,
            SEGMENTS=parts,
            ADD=add,
            BIAS=bias is not None,
            PRECISION=dot_precision(y.dtype),
            BLOCK_M=block_m,
            BLOCK_N=config.columns,
            BLOCK_R=block_r,
            **options(config.warps, config.stages),
        )
