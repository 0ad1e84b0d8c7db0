# mypy: disable-error-code="import-untyped,no-untyped-def,untyped-decorator,no-any-return"
"""What the fused kernels share: the mask of a tile, the part of a tile, sums of partial results, sizes.

Imported by the `triton_*` files alone, because it imports triton.

A product whose reduction is split over programs is written as partial results in fp32, one slab a
program, and `sum_partials` adds the slabs in their order: no atomics, so two runs are equal to the bit.
"""

import functools
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .ops import Rows


@triton.jit
def keep_mask(seed, rows, first_column, level, BLOCK: tl.constexpr):
    """m of a tile, (rows, BLOCK) bool; first_column is a multiple of 8, level is p' · 2^16.

    One Philox call gives the 16-bit lanes of eight neighbours in a row (see dropout.py); joined in the
    order (word / 2, word % 2, half), they lie as the row does.
    """
    block = first_column // 8 + tl.arange(0, BLOCK // 8)
    columns = block[None, :] + tl.zeros_like(rows)[:, None]
    lines = rows[:, None] + tl.zeros_like(block)[None, :]
    zero = tl.zeros_like(columns)
    w0, w1, w2, w3 = tl.philox(seed, columns, lines, zero, zero, n_rounds=7)
    words = tl.join(tl.join(w0, w2), tl.join(w1, w3))
    threshold = (level << 16).to(tl.uint32, bitcast=True)
    kept = tl.join((words << 16) >= threshold, words >= threshold)  # whole words: 16 bits cost more
    return tl.reshape(kept, (rows.shape[0], BLOCK))


@triton.jit
def find_tile(tile, SEGMENTS: tl.constexpr, BLOCK: tl.constexpr):
    """(first column, end, part or -1, row in B of the first column) of a tile, segment by segment."""
    before = 0
    first = 0
    stop = 0
    part = -1
    b_row = 0
    for j in tl.static_range(len(SEGMENTS)):
        tiles = (SEGMENTS[j][1] - SEGMENTS[j][0] + BLOCK - 1) // BLOCK
        if (tile >= before) & (tile < before + tiles):
            first = SEGMENTS[j][0] + (tile - before) * BLOCK
            stop = SEGMENTS[j][1]
            part = SEGMENTS[j][2]
            b_row = SEGMENTS[j][3] + (tile - before) * BLOCK
        before += tiles
    return first, stop, part, b_row


@triton.jit(do_not_specialize=["slabs", "size"])
def _sum_kernel(
    slabs_ptr,
    out_ptr,
    scale,
    slabs,
    size,
    columns,
    out_stride,
    FIRSTS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """out[i, j · columns + c] = scale · Σ slabs[p, i, c] over the slabs p of part j."""
    part = tl.program_id(1)
    index = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = index < size
    first = 0
    stop = slabs
    for j in tl.static_range(len(FIRSTS)):
        if part == j:
            first = FIRSTS[j]
        if part == j - 1:
            stop = FIRSTS[j]
    total = tl.zeros((BLOCK,), tl.float32)
    at = slabs_ptr + (index - index + first) * size + index  # in 64 bits
    for _ in range(first, stop):
        total += tl.load(at, mask=inside, other=0)
        at += size
    to = index // columns * out_stride + part * columns + index % columns
    tl.store(out_ptr + to, (total * scale).to(out_ptr.dtype.element_ty), mask=inside)


def sum_partials(
    slabs: Tensor, out: Tensor, scale: float = 1.0, parts: list[int] | None = None
) -> Tensor:
    """Fill out (rows, parts · columns) with the scaled sums of slabs (all slabs, rows, columns), fp32.

    parts: how many slabs each part has, in their order; None is one part.
    """
    counts = parts or [slabs.shape[0]]
    firsts = tuple(sum(counts[:j]) for j in range(len(counts)))
    size, block = slabs.shape[1] * slabs.shape[2], 256
    with on_device(out):
        _sum_kernel[(cdiv(size, block), len(counts))](
            slabs,
            out,
            float(scale),
            slabs.shape[0],
            size,
            slabs.shape[2],
            out.stride(0),
            FIRSTS=firsts,
            BLOCK=block,
            **options(4, 1),
        )
    return out


def on_device(tensor: Tensor) -> AbstractContextManager[object]:
    """Launches go to the tensor's device, whatever the current one is."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else nullcontext()


def matrix(tensor: Tensor) -> Tensor:
    """(..., K) as (M, K) with unit stride in the rows; a copy only where strides force it."""
    flat = tensor.reshape(-1, tensor.shape[-1])
    return flat if flat.stride(1) == 1 else flat.contiguous()


@functools.cache
def segments(rows: Rows, columns: int | None = None) -> tuple[tuple[int, int, int, int], ...]:
    """(start, stop, part, first row in B) of every enabled part; with columns the gaps too (-1)."""
    found, b_row, at = [], 0, 0
    for part, (start, stop) in enumerate(rows):
        if columns is not None and start > at:
            found.append((at, start, -1, 0))
        found.append((start, stop, part, b_row))
        b_row, at = b_row + stop - start, stop
    if columns is not None and columns > at:
        found.append((at, columns, -1, 0))
    return tuple(found)


def dot_precision(dtype: torch.dtype) -> str:
    """fp32 products run in TF32 only if the user's setting lets PyTorch's do so."""
    if dtype != torch.float32 or torch.version.hip is not None:
        return "ieee"
    return "tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "ieee"


class Config(NamedTuple):
    """Rows and columns of a tile, warps, pipeline stages."""

    rows: int
    columns: int
    warps: int
    stages: int


Table = Mapping[str, Mapping[int, Config]]


@functools.cache
def architecture(device: torch.device) -> str:
    """ "sm_90", "gfx942", ...; "interpreter" without a GPU. All of Blackwell's 10.x is "sm_100"."""
    if device.type != "cuda":
        return "interpreter"
    if torch.version.hip is not None:
        return torch.cuda.get_device_properties(device).gcnArchName.partition(":")[0]
    major, minor = torch.cuda.get_device_capability(device)
    return "sm_100" if major == 10 else f"sm_{major}{minor}"


def choose(table: Table, arch: str, rank: int, like: Tensor, *strides: int) -> tuple[int, Config]:
    """(padded rank of a tile, its config) for an architecture, or else the default.

    An architecture's configs stand by the largest padded rank they serve, in rising order; a rank above
    all of them is walked in blocks. Four-byte elements have configs of their own, for every GPU: their
    products without TF32 run on the plain units, whose operands fill the registers. An address of
    `like` or a stride that is not a multiple of 16 forbids wide loads, and a pointer for each element
    takes registers: such tensors get the small tiles of the default.
    """
    if arch != "interpreter":
        if like.element_size() == 4:
            arch = "fp32"
        elif arch not in table or like.data_ptr() % 16 or any(stride % 16 for stride in strides):
            arch = "default"
    configs = table[arch]
    padded = min(max(16, _power_of_two(rank)), max(configs))  # tl.dot takes 16 and more
    return padded, next(config for size, config in configs.items() if size >= padded)


def tile_rows(config: Config, m: int) -> int:
    """Rows of a tile: fewer for few tokens, but no fewer than the 16 that `tl.dot` takes."""
    return min(config.rows, max(16, _power_of_two(m)))


def cdiv(a: int, b: int) -> int:
    """Triton's own costs 2 µs a call."""
    return -(-a // b)


def _power_of_two(n: int) -> int:
    """The least that is not below n."""
    return 1 << (n - 1).bit_length()


@functools.cache
def processors(device: torch.device) -> int:
    """How many programs fill the device."""
    if device.type != "cuda":
        return 4
    return torch.cuda.get_device_properties(device).multi_processor_count


def chunk(length: int, block: int, splits: int) -> int:
    """The least multiple of block with which `splits` chunks cover length."""
    return block * cdiv(cdiv(length, block), splits)


def options(warps: int, stages: int) -> dict[str, Any]:
    """Launch options; fusing a·b + c is stated, because its default differs between versions."""
    return {"num_warps": warps, "num_stages": stages, "enable_fp_fusion": True}
