# mypy: disable-error-code="import-untyped,no-untyped-def,untyped-decorator,no-any-return"
"""NF4 on a GPU: codes and absmax in one kernel, and back in one kernel, nested scales included.

The formulas are those of nf4.py, and so are the bits: divisions are rounded correctly, products and
sums are not fused (`enable_fp_fusion=False`).

    quantise     reads w once, writes half a byte a weight and an absmax a block
    dequantise   reads half a byte a weight, a byte and (from cache) a group's scale a block, writes w

0.516 + 2 bytes a weight in bf16. A program owns some blocks: their codes are the two halves of the
bytes of a tile, so loads and stores are of neighbours. Levels are read from a table of 64 bytes, which
stays in the first cache. Not handled: blocks of another size.
"""

import triton
import triton.language as tl
from torch import Tensor

from .nf4 import BLOCK, GROUP, NF4, SMALLEST, bounds, dynamic, levels
from .tiling import cdiv, on_device

BLOCKS = 32  # a program


@triton.jit(do_not_specialize=["n_blocks"])
def quantize_kernel(
    w_ptr,
    packed_ptr,
    absmax_ptr,
    bounds_ptr,
    smallest,
    n_blocks,
    BLOCK: tl.constexpr,
    BLOCKS: tl.constexpr,
):
    blocks = tl.program_id(0).to(tl.int64) * BLOCKS + tl.arange(0, BLOCKS)
    there = blocks < n_blocks
    bytes_ = blocks[:, None] * (BLOCK // 2) + tl.arange(0, BLOCK // 2)[None, :]
    high = tl.load(w_ptr + 2 * bytes_, mask=there[:, None], other=0).to(tl.float32)
    low = tl.load(w_ptr + 2 * bytes_ + 1, mask=there[:, None], other=0).to(tl.float32)
    absmax = tl.maximum(tl.max(tl.abs(high), 1), tl.max(tl.abs(low), 1))
    # It is below the least normal number, so that Triton 3.8 would take it for fp64.
    floor = tl.full((BLOCKS,), smallest, tl.float32)
    inverse = tl.div_rn(tl.full((BLOCKS,), 1.0, tl.float32), tl.maximum(absmax, floor))
    high = high * inverse[:, None]
    low = low * inverse[:, None]
    high_codes = tl.zeros(high.shape, tl.int32)
    low_codes = tl.zeros(low.shape, tl.int32)
    for i in tl.static_range(15):
        bound = tl.load(bounds_ptr + i)
        high_codes += (high > bound).to(tl.int32)
        low_codes += (low > bound).to(tl.int32)
    packed = (high_codes << 4 | low_codes).to(tl.uint8)
    tl.store(packed_ptr + bytes_, packed, mask=there[:, None])
    tl.store(absmax_ptr + blocks, absmax, mask=there)


@triton.jit(do_not_specialize=["n"])
def dequantize_kernel(
    packed_ptr,
    absmax_ptr,
    nested_ptr,
    offset_ptr,
    first_ptr,
    levels_ptr,
    dynamic_ptr,
    out_ptr,
    n,
    NESTED: tl.constexpr,
    PART: tl.constexpr,
    WHOLE: tl.constexpr,
    BLOCK: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCKS: tl.constexpr,
):
    blocks = tl.program_id(0).to(tl.int64) * BLOCKS + tl.arange(0, BLOCKS)
    there = blocks * BLOCK < n
    if NESTED:
        numbers = blocks
        if PART:
            numbers += tl.load(first_ptr)
        code = tl.load(absmax_ptr + blocks, mask=there, other=0).to(tl.int32)
        nested = tl.load(nested_ptr + numbers // GROUP, mask=there, other=0)
        scale = tl.load(dynamic_ptr + code) * nested + tl.load(offset_ptr)
    else:
        scale = tl.load(absmax_ptr + blocks, mask=there, other=0)
    bytes_ = blocks[:, None] * (BLOCK // 2) + tl.arange(0, BLOCK // 2)[None, :]
    index = blocks[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
    if WHOLE:  # a mask that is the same all along a block lets neighbours go together
        coded = there[:, None]
        inside = there[:, None]
    else:
        coded = 2 * bytes_ < n
        inside = index < n
    packed = tl.load(packed_ptr + bytes_, mask=coded, other=0).to(tl.int32)
    high = tl.load(levels_ptr + (packed >> 4)) * scale[:, None]
    low = tl.load(levels_ptr + (packed & 15)) * scale[:, None]
    values = tl.interleave(high, low)
    tl.store(out_ptr + index, values.to(out_ptr.dtype.element_ty), mask=inside)


def quantize_blocks(w: Tensor, packed: Tensor, absmax: Tensor) -> None:
    """Codes and absmax of the whole blocks of contiguous w (n,), into packed and absmax."""
    n_blocks = w.numel() // BLOCK
    if n_blocks == 0:
        return
    with on_device(w):
        quantize_kernel[(cdiv(n_blocks, BLOCKS),)](
            w,
            packed,
            absmax,
            bounds(w.device),
            SMALLEST,
            n_blocks,
            BLOCK=BLOCK,
            BLOCKS=BLOCKS,
            num_warps=4,
            enable_fp_fusion=False,
        )


def dequantize_blocks(parts: NF4, out: Tensor) -> None:
    """The elements into contiguous out (n,)."""
    with on_device(out):
        dequantize_kernel[(cdiv(parts.absmax.numel(), BLOCKS),)](
            parts.packed,
            parts.absmax,
            parts.nested_absmax,
            parts.offset,
            parts.first,
            levels(out.device),
            dynamic(out.device),
            out,
            out.numel(),
            NESTED=parts.nested_absmax is not None,
            PART=parts.first is not None,
            WHOLE=out.numel() % BLOCK == 0,
            BLOCK=BLOCK,
            GROUP=GROUP,
            BLOCKS=BLOCKS,
            num_warps=4,
            enable_fp_fusion=False,
        )
