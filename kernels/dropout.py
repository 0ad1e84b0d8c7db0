"""Dropout for the low-rank branch: one bit an element, drawn, packed and applied.

    keep(x, bits) = m ∘ x,   m in {0, 1},   P(m = 0) = p' = round(p · 2^16) / 2^16

The keep-scale 1 / (1 - p') is not applied here: the caller folds it into `scaling`, so no pass over
x is spent on it and the expectation is exact for the p' that was drawn. Bit i of the mask (bit i % 8
of byte i // 8) belongs to element i of the contiguous x.

Two ways to make the bits:

* `draw_keep_bits`: from torch's generator of the device, as `torch.nn.Dropout` does, so
  `torch.manual_seed` and activation checkpointing act on it as usual. Bits are drawn 64 at a time:
  with t = p' · 2^16, the event "a 16-bit uniform number is below t" is folded from the lowest set
  bit of t up, `drop = (word | drop) if t_i else (word & drop)`, over one random word a bit. That is
  16 random bits an element at most, 1 for p = 0.5, and no compare, no pack: on two CPU cores 1.4 ms
  for 512 x 3072 where `F.dropout` takes 8.4 ms.
* `seeded_keep_bits`: a function of (seed, row, column) alone, by the counter-based Philox4x32
  generator (Salmon et al., SC'11, section 3.3) with 7 rounds. Any tiling of the matrix gives the
  same mask and nothing needs to be stored but the seed. In PyTorch's integer arithmetic it is slower
  than the draw; it is the definition that a fused kernel has to meet.

Not handled: a mask shared between calls of different shapes.
"""

import functools

import torch
from torch import Tensor
from torch.nn import functional as F

_LANE_BITS = 16
_LEVELS = 1 << _LANE_BITS
_LANE_DTYPE = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def drop_level(p: float) -> int:
    """t such that an element is dropped when a 16-bit uniform number is below t: p' = t / 2^16."""
    return min(round(p * _LEVELS), _LEVELS - 1)


def keep_scale(p: float) -> float:
    """1 / (1 - p') for the p' that is really drawn."""
    return _LEVELS / (_LEVELS - drop_level(p))


@torch.library.custom_op(
    "lora::draw_keep_bits", mutates_args=(), tags=(torch.Tag.nondeterministic_seeded,)
)
def draw_keep_bits(
    numel: int, p: float, call: Tensor | None = None, *, device: torch.device
) -> Tensor:
    """Packed mask of `numel` bits from torch's generator: uint8 (8 · ceil(numel / 64),).

    `call`, unused, is a tensor of this call's own, such as `torch.empty(0)`: torch.compile takes two
    calls with the same arguments for one, seeded or not, and all layers would share one mask.

    `device` is a keyword because compiled activation checkpointing looks for it there, to restore
    that device's generator when it draws again.
    """
    words = (numel + 63) // 64
    level, planes = drop_level(p), _LANE_BITS
    if level == 0:
        return torch.full((8 * words,), 255, dtype=torch.uint8, device=device)
    while level % 2 == 0:
        level, planes = level // 2, planes - 1
    random = torch.empty((planes, words), dtype=torch.int64, device=device).random_(-(2**63), None)
    drop = random[0]
    for bit in range(1, planes):
        drop = drop | random[bit] if level >> bit & 1 else drop & random[bit]
    return (~drop).view(torch.uint8)


@draw_keep_bits.register_fake
def _(numel: int, p: float, call: Tensor | None = None, *, device: torch.device) -> Tensor:
    return torch.empty((8 * ((numel + 63) // 64),), dtype=torch.uint8, device=device)


@torch.library.custom_op(
    "lora::draw_seed", mutates_args=(), tags=(torch.Tag.nondeterministic_seeded,)
)
def draw_seed(call: Tensor | None = None, *, device: torch.device) -> Tensor:
    """A seed for `seeded_keep_bits` from torch's generator: int64 (1,), on the device itself.

    `call` as in `draw_keep_bits`.
    """
    return torch.empty(1, dtype=torch.int64, device=device).random_(-(2**63), None)


@draw_seed.register_fake
def _(call: Tensor | None = None, *, device: torch.device) -> Tensor:
    return torch.empty(1, dtype=torch.int64, device=device)


_MASK32 = 0xFFFFFFFF


def philox(
    counter: tuple[Tensor, Tensor, Tensor, Tensor], key: tuple[Tensor, Tensor], rounds: int = 7
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Philox4x32: four random 32-bit words, held in int64, for a 128-bit counter and a 64-bit key."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(rounds):
        product0, product1 = c0 * 0xD2511F53, c2 * 0xCD9E8D57  # wraps mod 2^64: the bits are right
        c0, c1, c2, c3 = (
            (product1 >> 32 & _MASK32) ^ c1 ^ k0,
            product1 & _MASK32,
            (product0 >> 32 & _MASK32) ^ c3 ^ k1,
            product0 & _MASK32,
        )
        k0, k1 = (k0 + 0x9E3779B9) & _MASK32, (k1 + 0xBB67AE85) & _MASK32
    return c0, c1, c2, c3


def seeded_keep_bits(seed: Tensor, rows: int, columns: int, p: float) -> Tensor:
    """Packed mask of a (rows, columns) matrix from a one-element int64 seed on any device.

    The Philox call with counter (column // 8, row, 0, 0) and the seed as key gives eight 16-bit
    lanes, low half of a word first; element (row, column) is kept if lane column % 8 >= level.
    """
    seed = seed.reshape(())
    row = torch.arange(rows, device=seed.device)[:, None]
    block = torch.arange((columns + 7) // 8, device=seed.device)[None, :]
    zero = torch.zeros_like(seed)
    words = philox((block, row, zero, zero), (seed & _MASK32, seed >> 32 & _MASK32))
    lanes = torch.stack([lane for w in words for lane in (w & 0xFFFF, w >> 16)], dim=-1)
    kept = lanes.flatten(1)[:, :columns].reshape(-1) >= drop_level(p)
    kept = F.pad(kept, (0, -kept.numel() % 64)).view(-1, 8)
    powers = torch.tensor([1, 2, 4, 8, 16, 32, 64, 128], device=seed.device)
    return (kept * powers).sum(1).to(torch.uint8)


@functools.lru_cache(maxsize=32)
def _lanes_of_byte(itemsize: int, device: torch.device) -> Tensor:
    """Row b: the eight lanes of `itemsize` bytes, all ones or all zeros, of the bits of b, as int64."""
    bits = torch.arange(256, device=device)[:, None] >> torch.arange(8, device=device) & 1
    return (-bits).to(_LANE_DTYPE[itemsize]).view(torch.int64)


@torch.library.custom_op("lora::keep", mutates_args=())
def keep(x: Tensor, bits: Tensor) -> Tensor:
    """m ∘ x by an integer AND on the bytes of x (a quarter of a multiplication's time in bf16).

    x: any shape and floating dtype; bits: uint8, one bit an element. Returns a new contiguous
    tensor. Linear in x and its own adjoint, so it can be differentiated any number of times.
    """
    lane = _LANE_DTYPE[x.element_size()]
    table = _lanes_of_byte(x.element_size(), x.device)
    mask = F.embedding(bits.to(torch.int32), table).view(lane).view(-1)[: x.numel()].view(x.shape)
    return mask.bitwise_and_(x.contiguous().view(lane)).view(x.dtype)


@keep.register_fake
def _(x: Tensor, bits: Tensor) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _keep_setup(ctx, inputs, output):  # type: ignore[no-untyped-def]
    ctx.save_for_backward(inputs[1])


def _keep_backward(ctx, grad):  # type: ignore[no-untyped-def]
    return keep(grad, *ctx.saved_tensors), None


keep.register_autograd(_keep_backward, setup_context=_keep_setup)
