"""What the convolutions do beyond loralib: factor shapes, memory formats, small updates, dropout."""

import pytest
import torch
from torch import nn

import lora


@pytest.mark.parametrize(
    ("kind", "kernel", "groups", "shape_A", "shape_B"),
    [
        ("Conv2d", 3, 1, (6, 12), (18, 6)),  # loralib's
        ("Conv2d", (3, 3), 2, (6, 12), (9, 6)),
        ("Conv1d", 1, 2, (2, 4), (3, 2)),
        ("Conv3d", 1, 1, (2, 4), (6, 2)),
        ("Conv1d", 3, 2, (2, 6), (6, 2)),  # where loralib fails
        ("Conv3d", 2, 1, (2, 32), (6, 2)),
        ("Conv2d", (3, 1), 2, (2, 6), (6, 2)),
    ],
)
def test_factor_shapes(kind, kernel, groups, shape_A, shape_B):
    layer = getattr(lora, kind)(4, 6, kernel, 2, groups=groups)
    assert layer.lora_A.shape == shape_A
    assert layer.lora_B.shape == shape_B
    assert layer.delta_weight().shape == layer.weight.shape


def test_the_update_is_the_product_reshaped():
    layer = lora.Conv1d(4, 6, 3, 2, 6, groups=2)
    nn.init.normal_(layer.lora_B)
    x = torch.randn(2, 4, 9)
    delta = (layer.lora_B @ layer.lora_A).view(6, 2, 3) * 3
    expected = nn.functional.conv1d(x, layer.weight + delta, layer.bias, groups=2)
    torch.testing.assert_close(layer(x), expected)


@pytest.mark.parametrize("p", [0.0, 0.3])
def test_channels_last(p):
    layer = lora.Conv2d(4, 6, 3, 2, 2, p).to(memory_format=torch.channels_last)
    nn.init.normal_(layer.lora_B)
    x = torch.randn(2, 4, 7, 7)
    wide = x.to(memory_format=torch.channels_last)
    with torch.no_grad():
        for mode in (True, False):
            layer.train(mode)
            torch.manual_seed(1)
            y = layer(wide)
            assert y.is_contiguous(memory_format=torch.channels_last)
            if p == 0 or not mode:
                torch.testing.assert_close(y, layer(x), rtol=1e-4, atol=1e-5)
    assert layer._merged.weight.is_contiguous(memory_format=torch.channels_last)


def test_small_updates_are_not_rounded_away_in_half_precision():
    layer = lora.Conv2d(4, 4, 1, 2, bias=False).bfloat16()
    layer.weight.data.fill_(1.0)
    layer.lora_A.data.copy_(torch.tensor([1.0, -1.0, 0.0, 0.0]))
    layer.lora_B.data.fill_(2**-12)  # far below the spacing of bf16 at 1, which is 2^-7
    x = torch.tensor([1.0, -1.0, 0.0, 0.0], dtype=torch.bfloat16).view(1, 4, 1, 1)
    # The products with the weight cancel, and those with the update add up to 2 · 2^-12.
    assert (layer(x) == 2**-11).all()


def test_unknown_padding_mode_and_string_padding_pass_through():
    layer = lora.Conv2d(4, 6, 3, 2, padding="same", dilation=2)
    assert layer(torch.randn(1, 4, 8, 8)).shape == (1, 6, 8, 8)
    with pytest.raises(ValueError, match="padding_mode"):
        lora.Conv2d(4, 6, 3, 2, padding_mode="mirror")
