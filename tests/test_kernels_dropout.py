"""Packed dropout masks: their rate, their definition, and their application."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lora.kernels.dropout import (
    draw_keep_bits,
    drop_level,
    keep,
    keep_scale,
    philox,
    seeded_keep_bits,
)

CPU = torch.device("cpu")


def unpack(bits: torch.Tensor, numel: int) -> torch.Tensor:
    return (bits[:, None] >> torch.arange(8) & 1).flatten()[:numel].bool()


@pytest.mark.parametrize("p", [0.05, 0.1, 0.25, 0.5, 0.9, 1 / 3])
def test_drawn_mask_drops_at_rate_p(p):
    numel = 1 << 20
    dropped = 1 - unpack(draw_keep_bits(numel, p, device=CPU), numel).double().mean().item()
    assert abs(dropped - p) < 6 * math.sqrt(p * (1 - p) / numel)


def test_drawn_bits_do_not_depend_on_their_neighbours():
    kept = unpack(draw_keep_bits(1 << 20, 0.3, device=CPU), 1 << 20).double() - 0.7
    for lag in (1, 2, 7, 8, 63, 64):
        correlation = (kept[lag:] * kept[:-lag]).mean() / 0.21
        assert abs(correlation) < 6 / 1024


def test_draw_follows_torch_manual_seed():
    torch.manual_seed(5)
    first, second = draw_keep_bits(1000, 0.3, device=CPU), draw_keep_bits(1000, 0.3, device=CPU)
    torch.manual_seed(5)
    assert torch.equal(first, draw_keep_bits(1000, 0.3, device=CPU))
    assert not torch.equal(first, second)


@pytest.mark.parametrize("numel", [0, 1, 63, 64, 65])
def test_draw_covers_any_size(numel):
    assert draw_keep_bits(numel, 0.5, device=CPU).numel() * 8 >= numel


def test_extreme_probabilities():
    assert unpack(draw_keep_bits(100, 1e-9, device=CPU), 100).all()
    assert keep_scale(1e-9) == 1
    assert drop_level(1 - 1e-12) == 65535
    assert keep_scale(0.5) == 2


def test_philox_known_answers():
    """The first two vectors of Random123's kat_vectors for philox4x32, 10 rounds."""
    zero, ones = torch.tensor(0), torch.tensor(0xFFFFFFFF)
    words = [int(w) for w in philox((zero,) * 4, (zero,) * 2, rounds=10)]
    assert words == [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]
    words = [int(w) for w in philox((ones,) * 4, (ones,) * 2, rounds=10)]
    assert words == [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]


def test_seeded_mask_is_a_function_of_seed_row_and_column():
    seed = torch.tensor(123456789012345)
    whole = unpack(seeded_keep_bits(seed, 40, 27, 0.3), 40 * 27).view(40, 27)
    part = unpack(seeded_keep_bits(seed, 11, 16, 0.3), 11 * 16).view(11, 16)
    assert torch.equal(whole[:11, :16], part)
    other = unpack(seeded_keep_bits(seed + 1, 40, 27, 0.3), 40 * 27).view(40, 27)
    assert not torch.equal(whole, other)
    big = unpack(seeded_keep_bits(seed, 1024, 1024, 0.05), 1 << 20).double()
    assert abs(1 - big.mean() - 0.05) < 6 * math.sqrt(0.05 * 0.95 / (1 << 20))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
@settings(max_examples=20, deadline=None)
@given(rows=st.integers(0, 9), columns=st.integers(1, 33), transposed=st.booleans())
def test_keep_multiplies_by_the_mask(dtype, rows, columns, transposed):
    x = (
        torch.randn(columns, rows).to(dtype).t()
        if transposed
        else torch.randn(rows, columns).to(dtype)
    )
    bits = draw_keep_bits(x.numel(), 0.4, device=CPU)
    mask = unpack(bits, x.numel()).view(x.shape)
    assert torch.equal(keep(x, bits), torch.where(mask, x, torch.zeros_like(x)))


def test_keep_zeroes_infinities_and_nans():
    x = torch.tensor([math.inf, math.nan] * 32)
    bits = draw_keep_bits(64, 0.5, device=CPU)
    assert (keep(x, bits)[~unpack(bits, 64)] == 0).all()


def test_custom_ops_are_well_registered():
    x = torch.randn(3, 21, requires_grad=True)
    bits = draw_keep_bits(63, 0.5, device=CPU)
    torch.library.opcheck(keep, (x, bits))
    torch.library.opcheck(
        draw_keep_bits,
        (63, 0.5),
        {"device": CPU},
        test_utils=("test_schema", "test_faketensor", "test_autograd_registration"),
    )
