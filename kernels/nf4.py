"""NF4: weights of 4 bits, to the bit those of bitsandbytes (QLoRA, arXiv 2305.14314, section 3).

With w the elements of a weight in their order, in blocks of 64, and 16 levels, quantiles of a normal
distribution:

    absmax_b = max |w| in block b          code = the level nearest to w / absmax_b
    scale_b = dynamic[nested code_b] · nested absmax_g + offset  ≈  absmax_b
    dequantised w = levels[code] · scale_b, rounded to the weight's dtype

offset is the mean of all absmax, g a group of 256 blocks. Two codes share a byte, the first in its
high half. All is fp32, each product and sum rounded by itself. That is 4 + 8/64 + 32/(64 · 256) = 4.127
bits a weight. The last block and the last group may be shorter. A block of zeros gives zeros.

dynamic is an 8-bit float with a decade of its own for every count of leading zeros (arXiv 1511.04561).
The value that is nearest in it is looked up on a grid of 65,536 points, as bitsandbytes (0.50) does on
a CPU; its CUDA code compares the value itself, and takes the other of two neighbours for about 0.2 % of
the blocks. Here every device takes the CPU's.

This file is PyTorch, some blocks at a time, so that temporaries stay small; triton_nf4.py does the same
on a GPU. Read but not written: scales that are plain fp32 (no offset). Not handled: other 4-bit types.
"""

import functools
import importlib.util
import os
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils._python_dispatch import _disable_current_modes

BLOCK, GROUP = 64, 256  # weights with one absmax, blocks with one nested absmax
LEVELS = (
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453),
    *(-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0),
    *(0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
    *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
)
SMALLEST = 1e-38  # a smaller absmax counts as this where something is divided by it
_GRID = 65535
_CHUNK = 1 << 12  # blocks at a time


class NF4(NamedTuple):
    """The parts of n quantised elements.

    packed: uint8 (⌈n / 2⌉,). absmax: nested codes, uint8 (blocks,); or fp32, the scales themselves.
    nested_absmax: fp32 (groups,), and offset: fp32 (1,), both None where absmax is fp32.
    first: int64 (1,), the number of the first block if these are a part of more elements; None is 0.
    """

    packed: Tensor
    absmax: Tensor
    nested_absmax: Tensor | None
    offset: Tensor | None
    first: Tensor | None = None


def _table(build: Callable[[], Tensor]) -> Callable[[torch.device], Tensor]:
    """What `build` makes on the CPU, once for each device, whatever modes are on at the first time."""

    @functools.cache
    def on(device: torch.device) -> Tensor:
        with _disable_current_modes(), torch.inference_mode(False):
            return build().to(device)

    return functools.update_wrapper(on, build)


def _values(values: Sequence[float]) -> Tensor:
    return torch.tensor(values, dtype=torch.float32, device="cpu")


def _midpoints(values: Tensor) -> Tensor:
    return (values[:-1] + values[1:]) / 2


@_table
def levels() -> Tensor:
    """The sixteen values of a code, fp32, ascending."""
    return _values(LEVELS)


@_table
def bounds() -> Tensor:
    """The fifteen midpoints between levels, fp32; what lies on one counts as below it."""
    return _midpoints(_values(LEVELS))


@_table
def dynamic() -> Tensor:
    """The 256 values of a nested code, fp32, ascending."""
    values = [0.0, 1.0]
    for decade in range(7):
        edges = torch.linspace(0.1, 1, 2**decade + 1, dtype=torch.float32, device="cpu")
        fractions = _midpoints(edges)
        for sign in (1, -1):
            values += (sign * 10.0 ** (decade - 6) * fractions).tolist()
    return _values(sorted(values))


@_table
def _pairs() -> Tensor:
    """The two levels of every byte, fp32, as one int64."""
    table = _values(LEVELS)
    return torch.stack([table.repeat_interleave(16), table.repeat(16)], 1).view(torch.int64)


@_table
def _nearest() -> Tensor:
    """The nested code of every point of the grid over [-1, 1], uint8."""
    grid = torch.arange(_GRID + 1, dtype=torch.float64, device="cpu") / _GRID * 2 - 1
    midpoints = _midpoints(dynamic(grid.device)).double()
    return torch.bucketize(grid, midpoints).to(torch.uint8)


def _fused(tensor: Tensor) -> bool:
    """Whether triton_nf4.py does it: on a GPU, unless LORA_KERNELS=torch, or Triton is not there."""
    return tensor.is_cuda and os.environ.get("LORA_KERNELS") != "torch" and _has_triton()


@functools.cache
def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


def quantize(weight: Tensor) -> NF4:
    """The parts of `weight`, of any shape, fp32, bf16 or fp16, all of them finite."""
    w = weight.detach().reshape(-1)
    blocks = -(-w.numel() // BLOCK)
    packed = w.new_empty(-(-w.numel() // 2), dtype=torch.uint8)
    absmax = w.new_empty(blocks, dtype=torch.float32)
    done = 0
    if _fused(w):
        from . import triton_nf4

        triton_nf4.quantize_blocks(w, packed, absmax)
        done = w.numel() // BLOCK  # all but a shorter last one
    for start in range(done, blocks, _CHUNK):
        chunk = w[start * BLOCK : (start + _CHUNK) * BLOCK]
        bytes_ = slice(start * BLOCK // 2, (start + _CHUNK) * BLOCK // 2)
        packed[bytes_], absmax[start : start + _CHUNK] = quantize_blocks(chunk.float())
    offset = absmax.mean() if blocks else absmax.new_zeros(())
    nested, nested_absmax = _nest(absmax - offset)
    return NF4(packed, nested, nested_absmax, offset.reshape(1))


def quantize_blocks(w: Tensor) -> tuple[Tensor, Tensor]:
    """(packed codes, absmax) of fp32 (n,), all blocks at once."""
    full = w.numel() // BLOCK * BLOCK
    whole, rest = w[:full].view(-1, BLOCK), w[full:]
    absmax = whole.abs().amax(1)
    scaled = (whole * (1 / absmax.clamp(min=SMALLEST))[:, None]).view(-1)
    if rest.numel():
        largest = rest.abs().amax().clamp(min=SMALLEST)
        absmax = torch.cat([absmax, largest[None]])
        scaled = torch.cat([scaled, rest / largest])
    scaled = F.pad(scaled.clamp_(-1, 1), (0, w.numel() % 2))
    codes = torch.bucketize(scaled, bounds(w.device), out_int32=True).to(torch.uint8)
    return codes[::2] << 4 | codes[1::2], absmax


def _nest(absmax: Tensor) -> tuple[Tensor, Tensor]:
    """(nested codes, nested absmax) of scales without their offset."""
    groups = F.pad(absmax, (0, -absmax.numel() % GROUP)).view(-1, GROUP)
    nested_absmax = groups.abs().amax(1)
    scaled = (groups * (1 / nested_absmax)[:, None]).clamp_(-1, 1)
    position = (scaled + 1) * 0.5
    index = (position.double() * _GRID + 0.5).float()  # as a fused multiply-add rounds: once
    codes = _nearest(absmax.device)[index.nan_to_num(0).long()]
    codes = codes.masked_fill((nested_absmax == 0)[:, None], 0)
    return codes.view(-1)[: absmax.numel()].clone(), nested_absmax


def scales(parts: NF4, start: int = 0, stop: int | None = None) -> Tensor:
    """The scales of blocks start to stop, fp32."""
    absmax = parts.absmax[start:stop]
    if parts.nested_absmax is None or parts.offset is None:
        return absmax.float()
    block = torch.arange(start, start + absmax.numel(), device=absmax.device)
    group = (block if parts.first is None else block + parts.first) // GROUP
    nested = dynamic(absmax.device)[absmax.int()]
    return nested.mul_(parts.nested_absmax[group]).add_(parts.offset)


def dequantize(parts: NF4, out: Tensor) -> Tensor:
    """The elements, rounded to out's dtype, in the contiguous `out`, which is returned."""
    flat = out.view(-1)
    if _fused(out):
        from .triton_nf4 import dequantize_blocks

        dequantize_blocks(parts, flat)
        return out
    table = _pairs(out.device)
    for start in range(0, parts.absmax.numel(), _CHUNK):
        packed = parts.packed[start * BLOCK // 2 : (start + _CHUNK) * BLOCK // 2]
        values = table.take(packed.long()).view(torch.float32)
        values = F.pad(values, (0, -values.numel() % BLOCK)).view(-1, BLOCK)
        values.mul_(scales(parts, start, start + _CHUNK)[:, None])
        chunk = flat[start * BLOCK : (start + _CHUNK) * BLOCK]
        chunk.copy_(values.view(-1)[: chunk.numel()])
    return out


@torch.library.custom_op("lora::nf4_dequantize", mutates_args=())
def dequantize_op(
    packed: Tensor,
    absmax: Tensor,
    nested_absmax: Tensor | None,
    offset: Tensor | None,
    first: Tensor | None,
    numel: int,
    dtype: torch.dtype,
    call: Tensor,
) -> Tensor:
    """`dequantize` into a new flat tensor.

    `call`, unused, is a tensor of this call's own, such as `torch.empty(0)`: torch.compile takes two
    calls with the same arguments for one, and would keep the dense weight of forward for backward.
    """
    out = torch.empty(numel, dtype=dtype, device=packed.device)
    return dequantize(NF4(packed, absmax, nested_absmax, offset, first), out)


@dequantize_op.register_fake
def _(packed, absmax, nested_absmax, offset, first, numel, dtype, call):  # type: ignore[no-untyped-def]
    return packed.new_empty(numel, dtype=dtype)


def at(parts: NF4, index: Tensor) -> Tensor:
    """The elements at these flat indices, fp32."""
    byte = parts.packed[index // 2].int()
    code = torch.where(index % 2 == 0, byte >> 4, byte & 15)
    return levels(index.device)[code] * scales(parts)[index // BLOCK]
