"""The NF4 kernels against PyTorch, to the bit: on a GPU, or in Triton's interpreter.

Without a GPU, test_kernels_interpreter.py runs this file in a process of its own with
TRITON_INTERPRET=1, with bf16 as interpreter_bf16.py has it.
"""

import os

import pytest
import torch

from lora.kernels import nf4

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED else "cuda"
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
if INTERPRETED:
    import interpreter_bf16  # noqa: F401
SIZES = (1, 2, 63, 64, 65, 1000, 2048, 2049, 40_000)
SIZES += () if INTERPRETED else (3072 * 9216, 16_384 * 3072 + 33)
pytestmark = [pytest.mark.gpu, pytest.mark.fused]


def weight(n, dtype):
    w = torch.randn(n) * 0.02
    w[: n // 3 // nf4.BLOCK * nf4.BLOCK] = 0
    return w.to(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n", SIZES)
def test_codes_and_absmax(n, dtype):
    from lora.kernels.triton_nf4 import quantize_blocks

    w = weight(n, dtype)
    packed, absmax = nf4.quantize_blocks(w.float())
    whole = n // nf4.BLOCK  # the rest is PyTorch's
    got = torch.full((-(-n // 2),), 77, dtype=torch.uint8, device=DEVICE)
    got_absmax = torch.full((-(-n // nf4.BLOCK),), float("nan"), device=DEVICE)
    quantize_blocks(w.to(DEVICE), got, got_absmax)
    half = whole * nf4.BLOCK // 2
    assert torch.equal(got[:half].cpu(), packed[:half])
    assert torch.equal(got_absmax[:whole].cpu(), absmax[:whole])
    assert (got[half:] == 77).all()
    assert got_absmax[whole:].isnan().all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", ["nested", "part", "plain scales"])
@pytest.mark.parametrize("n", SIZES)
def test_dequantised(n, kind, dtype):
    from lora.kernels.triton_nf4 import dequantize_blocks

    parts = nf4.quantize(weight(n, dtype))
    if kind == "part":
        block = parts.absmax.numel() // 2
        packed, absmax = parts.packed[block * nf4.BLOCK // 2 :], parts.absmax[block:]
        parts = parts._replace(packed=packed, absmax=absmax, first=torch.tensor([block]))
        n -= block * nf4.BLOCK
    elif kind == "plain scales":
        parts = nf4.NF4(parts.packed, nf4.scales(parts), None, None)
    want = nf4.dequantize(parts, torch.empty(n, dtype=dtype))
    got = torch.full((n,), float("nan"), dtype=dtype, device=DEVICE)
    there = nf4.NF4(*(None if part is None else part.to(DEVICE) for part in parts))
    dequantize_blocks(there, got)
    assert torch.equal(got.cpu(), want)
