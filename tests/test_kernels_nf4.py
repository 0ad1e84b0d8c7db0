"""NF4 in PyTorch: to the bit what bitsandbytes makes, and by its definition in float64."""

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from lora.kernels import nf4

CPU = torch.device("cpu")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# Sizes: less than a byte, a block, a group of blocks, and what is left over of each.
SHAPES = ((1,), (2,), (3, 21), (64,), (65,), (8, 8, 3), (5, 77), (128, 128), (130, 129), (300, 257))


def weight(kind, shape, dtype):
    w = torch.randn(shape) * 0.02
    if kind == "zeros":
        w.zero_()
    elif kind == "constant":
        w.fill_(-0.37)
    elif kind == "zero blocks":
        w.view(-1)[: w.numel() // 2] = 0
    elif kind == "tiny":  # below what is divided by
        w *= 1e-39 if dtype != torch.float16 else 1e-5
    elif kind == "outliers":
        w.view(-1)[::97] *= 1000
    elif kind == "levels":  # on the levels and their midpoints, where rounding is decided
        table = torch.cat([nf4.levels(CPU), nf4.bounds(CPU)])
        w = table[torch.arange(w.numel()) % 31].reshape(shape)
    return w.to(dtype)


KINDS = ("normal", "zeros", "constant", "zero blocks", "tiny", "outliers", "levels")


@pytest.fixture(scope="module")
def bitsandbytes():
    """Its functions; of odd sizes it would otherwise compile its own code."""
    functional = pytest.importorskip("bitsandbytes").functional
    with torch.compiler.set_stance("force_eager"):
        yield functional


class TestBitsandbytes:
    @pytest.mark.parametrize("kind", KINDS)
    @pytest.mark.parametrize("dtype", DTYPES)
    def test_the_same_bits(self, kind, dtype, bitsandbytes):
        for shape in SHAPES:
            w = weight(kind, shape, dtype)
            codes, state = bitsandbytes.quantize_4bit(w, compress_statistics=True, quant_type="nf4")
            parts = nf4.quantize(w)
            assert torch.equal(parts.packed, codes.view(-1)), shape
            assert torch.equal(parts.absmax, state.absmax), shape
            assert torch.equal(parts.nested_absmax, state.state2.absmax), shape
            assert torch.equal(parts.offset, state.offset.view(1)), shape
            theirs = bitsandbytes.dequantize_4bit(codes, state)
            ours = nf4.dequantize(parts, torch.empty_like(w))
            assert torch.equal(ours, theirs.view(shape)), shape

    @pytest.mark.parametrize("dtype", DTYPES)
    def test_the_same_values_of_scales_that_are_not_nested(self, dtype, bitsandbytes):
        w = weight("normal", (130, 129), dtype)
        codes, state = bitsandbytes.quantize_4bit(w, quant_type="nf4")
        parts = nf4.NF4(codes.view(-1), state.absmax, None, None)
        ours = nf4.dequantize(parts, torch.empty_like(w))
        assert torch.equal(ours, bitsandbytes.dequantize_4bit(codes, state).view_as(w))

    def test_a_million_scales_take_the_same_neighbour(self, bitsandbytes):
        absmax = torch.rand(4096, 256) * torch.logspace(-4, 2, 4096)[:, None]
        absmax[:, ::2].neg_()
        codes, state = bitsandbytes.quantize_blockwise(absmax.view(-1), blocksize=256)
        ours, nested = nf4._nest(absmax.view(-1))
        assert torch.equal(ours, codes)
        assert torch.equal(nested, state.absmax)

    def test_the_same_tables(self, bitsandbytes):
        assert torch.equal(nf4.levels(CPU), bitsandbytes.get_4bit_type("nf4", device="cpu"))
        assert torch.equal(nf4.dynamic(CPU), bitsandbytes.create_dynamic_map())


class TestDefinition:
    @settings(deadline=None, max_examples=50)
    @given(n=st.integers(1, 700), dtype=st.sampled_from(DTYPES), seed=st.integers(0, 2**31))
    @example(n=649, dtype=torch.float32, seed=605)
    def test_codes_are_the_nearest_levels(self, n, dtype, seed):
        w = torch.randn(n, generator=torch.Generator().manual_seed(seed)).to(dtype)
        parts = nf4.quantize(w)
        codes = torch.stack([parts.packed >> 4, parts.packed & 15], 1).view(-1)[:n].long()
        blocks = torch.arange(n) // nf4.BLOCK
        absmax = torch.zeros(len(parts.absmax), dtype=torch.float64)
        absmax = absmax.scatter_reduce(0, blocks, w.double().abs(), "amax")
        scaled = w.double() / absmax[blocks]
        distance = (scaled[:, None] - nf4.levels(CPU).double()).abs()
        assert (distance.gather(1, codes[:, None]).view(-1) <= distance.amin(1) + 1e-6).all()
        scales = nf4.scales(parts).double()
        largest = (absmax - absmax.mean()).abs().max()
        gap = nf4.dynamic(CPU).diff().max() / 2 + 2 / 65535  # the nearest of a grid's point
        assert ((scales - absmax).abs() <= largest * gap + 1e-6 * absmax.max()).all()

    def test_a_weight_has_4_13_bits(self):
        parts = nf4.quantize(torch.randn(1024, 1024))
        held = sum(part.nbytes for part in parts if part is not None)
        assert held <= 0.5161 * 1024 * 1024

    @pytest.mark.parametrize("shape", SHAPES)
    def test_single_elements_are_those_of_all(self, shape):
        parts = nf4.quantize(torch.randn(shape))
        dense = nf4.dequantize(parts, torch.empty(shape)).view(-1)
        assert torch.equal(nf4.at(parts, torch.arange(dense.numel())), dense)

    def test_a_part_knows_its_place(self):
        parts = nf4.quantize(torch.randn(700 * nf4.BLOCK))
        dense = nf4.dequantize(parts, torch.empty(700 * nf4.BLOCK))
        first = 300
        part = parts._replace(
            packed=parts.packed[first * nf4.BLOCK // 2 :],
            absmax=parts.absmax[first:],
            first=torch.tensor([first]),
        )
        rest = dense[first * nf4.BLOCK :]
        assert torch.equal(nf4.dequantize(part, torch.empty_like(rest)), rest)

    def test_nothing_is_quantised_to_nothing(self):
        parts = nf4.quantize(torch.empty(0, 5))
        assert nf4.dequantize(parts, torch.empty(0, 5)).numel() == 0
