"""bitsandbytes' dequantisation as an oracle, checked against the definition of NF4 first.

bitsandbytes 0.50.2 dequantises wrongly on CPUs with AVX-512 if the columns are not a multiple of 64.
"""

import torch
from torch import Tensor


def by_definition(codes: Tensor, state) -> Tensor:
    """level[code] · absmax in fp32, rounded once (QLoRA, arXiv 2305.14314, section 3).

    codes: two in a byte, the first one in the high half. state: bitsandbytes' QuantState, whose absmax
    may be quantised itself: map[code] · absmax of its 256 neighbours, plus an offset.
    """
    absmax = state.absmax
    if state.nested:
        groups = torch.arange(absmax.numel()) // state.state2.blocksize
        absmax = state.state2.code[absmax.long()] * state.state2.absmax[groups] + state.offset
    halves = torch.stack([codes.view(-1) >> 4, codes.view(-1) & 15], 1).view(-1).long()
    values = state.code[halves][: state.shape.numel()]
    blocks = torch.arange(values.numel()) // state.blocksize
    return (values * absmax.float()[blocks]).to(state.dtype).view(state.shape)


def dequantized(codes: Tensor, state) -> Tensor:
    """What the definition says, and bitsandbytes too unless it is wrong on this machine."""
    from bitsandbytes.functional import dequantize_4bit

    expected = by_definition(codes, state)
    if state.shape[-1] % 64 == 0:
        assert torch.equal(dequantize_4bit(codes, state), expected)
    return expected
