"""NF4Tensor as an argument: what is refused, what is a copy, and which modes may be on."""

import io
import subprocess
import sys

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F

from lora.kernels import nf4
from lora.kernels.nf4_tensor import NF4Tensor


def quantized(rows=128, columns=64, scale=1.0):
    return NF4Tensor.quantize(scale * torch.randn(rows, columns))


def with_plain_scales(weight):
    parts = nf4.NF4(weight.packed, nf4.scales(weight.parts), None, None)
    return NF4Tensor(parts, weight.shape, weight.dtype)


FIRST_USE = """
import torch
import lora
from lora.kernels import nf4
from lora.kernels.nf4_tensor import NF4Tensor

w, x = torch.randn(64, 128), torch.randn(3, 128)
{}
    q = NF4Tensor.quantize(w)
    nf4.dequantize(q.parts, torch.empty(64 * 128))
torch.set_default_dtype(torch.float32)
for table in (nf4.levels, nf4.bounds, nf4.dynamic, nf4._pairs, nf4._nearest):
    kept = table(torch.device("cpu"))
    table.cache_clear()
    assert type(kept) is torch.Tensor and torch.equal(kept, table(torch.device("cpu"))), table
    assert kept.dtype == table(torch.device("cpu")).dtype, table
again = NF4Tensor.quantize(w)
assert torch.equal(q.packed, again.packed) and torch.equal(q.dequantize(), again.dequantize())
assert torch.nn.functional.linear(x, q).abs().max() < 1e3
"""


@pytest.mark.parametrize(
    "mode",
    [
        "torch.set_default_dtype(torch.float64)\nif True:",
        "torch.set_default_dtype(torch.bfloat16)\nif True:",
        "with torch.device('meta'):",
        "with torch.inference_mode():",
    ],
)
def test_tables_depend_on_no_mode_of_their_first_use(mode):
    script = FIRST_USE.format(mode)
    if "meta" in mode:  # the memory that the call wants is made in it
        script = script.replace("torch.empty(64 * 128)", "torch.empty(64 * 128, device='cpu')")
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_a_product_under_fake_tensors_leaves_nothing_fake_behind():
    q, x = quantized(), torch.randn(3, 64)
    expected = F.linear(x, q)
    with FakeTensorMode(allow_non_fake_inputs=True):
        F.linear(x, q)
    assert type(F.linear(x, q)) is torch.Tensor
    assert torch.equal(F.linear(x, q), expected)


class TestInferenceMode:
    @pytest.mark.parametrize(
        "alias",
        [
            torch.Tensor.t,
            torch.Tensor.detach,
            lambda w: w[:64],
            lambda w: w.split(64)[1],
            lambda w: w.view(64, 128),
            lambda w: w.clone(),
        ],
    )
    def test_aliases(self, alias):
        q = quantized()
        expected = alias(q.dequantize())
        with torch.inference_mode():
            got = alias(q)
            assert type(got) is NF4Tensor
            assert torch.equal(got.dequantize(), expected)
            assert torch.equal(alias(quantized()).dequantize().isfinite().all(), torch.tensor(True))

    def test_a_state_dict(self):
        import lora

        layer = lora.LinearNF4.from_module(nn.Linear(64, 64))
        with torch.inference_mode():
            assert "weight.absmax" in layer.state_dict()


class TestWrites:
    @pytest.mark.parametrize(
        "write",
        [
            lambda w: w.__setitem__(0, 5.0),
            lambda w: w.__setitem__((slice(None), 3), 0.0),
            lambda w: w.__setitem__(slice(0, 64), torch.randn(64, 64)),
            lambda w: w.mul_(2),
            lambda w: setattr(w, "data", torch.zeros(128, 64)),
            lambda w: setattr(w, "data", w.data + 100),
            lambda w: w[:64].copy_(10 * torch.randn(64, 64)),
            lambda w: w[:64].copy_(quantized(64)),
            lambda w: w.narrow(0, 64, 64).copy_(torch.randn(64, 64)),
            lambda w: w[64:].detach().copy_(torch.randn(64, 64)),
        ],
    )
    def test_what_could_not_be_held_is_refused_and_changes_nothing(self, write):
        q = quantized()
        before = q.dequantize()
        with pytest.raises(TypeError, match="frozen"):
            write(q)
        assert torch.equal(q.dequantize(), before)

    def test_a_collective_is_refused(self):
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        try:
            with pytest.raises(TypeError, match="broadcast_ would write to an NF4 weight"):
                dist.broadcast(quantized(), 0)
        finally:
            dist.destroy_process_group()

    def test_rows_with_equal_scales_are_written(self):
        q = quantized()
        values = q.clone()
        values.packed[:100] = 0
        q[:64].copy_(values[:64])
        assert torch.equal(q.dequantize(), values.dequantize())

    def test_data_becomes_another_weight(self):
        q, other = nn.Parameter(quantized(), False), quantized(64, 32)
        q.data = other
        assert q.shape == (64, 32)
        assert torch.equal(q.dequantize(), other.dequantize())
        q.data = q.data.t()
        assert torch.equal(q.dequantize(), other.dequantize().t())

    @pytest.mark.parametrize("alias", [lambda w: w, lambda w: w.data, lambda w: w[:]])
    def test_plain_scales_stay_plain_through_any_alias(self, alias):
        q, dense = with_plain_scales(quantized()), 3 * torch.randn(128, 64)
        alias(q).copy_(dense)
        assert q.nested_absmax is None
        assert torch.equal(q.dequantize(), NF4Tensor.quantize(dense).dequantize())

    def test_a_copy_is_one_and_another_dtype_shares_the_codes(self):
        q = quantized()
        same, half = q.to(torch.float32, copy=True), q.half()
        before = same.dequantize()
        assert half.packed.data_ptr() == q.packed.data_ptr()
        q.copy_(torch.randn(128, 64))
        assert torch.equal(same.dequantize(), before)
        assert torch.equal(half.dequantize(), NF4Tensor(q.parts, q.shape, torch.half).dequantize())


class TestShapes:
    def test_a_transposed_weight_made_contiguous_is_dense_and_flattens(self):
        q = quantized()
        dense = q.dequantize().t().contiguous()
        got = q.t().contiguous()
        assert got.is_contiguous()
        assert torch.equal(got, dense)
        assert torch.equal(q.t().reshape(-1), dense.reshape(-1))
        assert torch.equal(q.t().flatten(), dense.flatten())

    def test_no_rows(self):
        assert [len(part) for part in quantized(0, 64).split(2)] == [0]

    def test_new_zeros_of_no_dimension(self):
        assert quantized().new_zeros(()).shape == ()
        assert NF4Tensor.quantize(torch.randn(64)).new_zeros(()) == 0

    @pytest.mark.parametrize("rows", [lambda w: w[64:], lambda w: w.split(64)[1]])
    def test_compiled_products_take_rows(self, rows):
        q, x = quantized(), torch.randn(3, 64)
        product = torch.compile(lambda x, w: F.linear(x, w), fullgraph=True, backend="aot_eager")
        assert torch.equal(product(x, rows(q)), F.linear(x, rows(q)))


class TestFiles:
    @pytest.mark.parametrize(
        "change", [lambda w: w, lambda w: w[64:], lambda w: w.t(), nn.Parameter]
    )
    def test_torch_load_needs_no_trust(self, change):
        q = change(quantized()) if change is not nn.Parameter else nn.Parameter(quantized(), False)
        file = io.BytesIO()
        torch.save(q, file)
        file.seek(0)
        loaded = torch.load(file, weights_only=True)
        assert type(loaded) is type(q)
        assert torch.equal(loaded.dequantize(), q.dequantize())

    def test_memory_is_shared(self):
        module = nn.Linear(64, 128)
        module.weight = nn.Parameter(quantized(), False)
        expected = module.weight.dequantize()
        module.share_memory()
        assert module.weight.packed.is_shared()
        assert torch.equal(module.weight.dequantize(), expected)
