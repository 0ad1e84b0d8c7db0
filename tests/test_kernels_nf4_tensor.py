"""NF4Tensor: what stays quantised, what sees the elements, and what is kept for backward."""

import copy
import io
import pickle

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from lora.kernels import explain, lora_linear
from lora.kernels.nf4_ops import _buffers
from lora.kernels.nf4_tensor import NF4Tensor

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def quantized(rows=192, columns=128, dtype=torch.float32):
    return NF4Tensor.quantize((torch.randn(rows, columns) / columns**0.5).to(dtype))


def saved_by(run):
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        out = run()
    return out, kept


class TestStaysQuantised:
    @pytest.mark.parametrize("dtype", DTYPES)
    def test_shape_dtype_and_size(self, dtype):
        q = quantized(dtype=dtype)
        assert (q.shape, q.dtype, q.stride()) == ((192, 128), dtype, (128, 1))
        assert q.nbytes == sum(p.nbytes for p in q.parts if p is not None) <= 0.53 * q.numel()
        assert type(q.dequantize()) is torch.Tensor
        assert q.dequantize().dtype == dtype

    @pytest.mark.parametrize("change", [torch.clone, torch.detach, copy.deepcopy, torch.Tensor.t])
    def test_copies_and_transposes(self, change):
        q = quantized()
        made = change(q)
        assert type(made) is NF4Tensor
        assert torch.equal(made.dequantize(), change(q.dequantize()))
        shared = made.packed.data_ptr() == q.packed.data_ptr()
        assert shared == (change in (torch.detach, torch.Tensor.t))

    @pytest.mark.parametrize("dtype", [*DTYPES, torch.float64])
    def test_another_dtype_is_another_rounding(self, dtype):
        q = quantized()
        assert type(q.to(dtype)) is NF4Tensor
        assert torch.equal(q.to(dtype).dequantize(), q.dequantize().to(dtype))

    def test_rows_between_blocks_are_a_view_others_are_dense(self):
        q = quantized(190, 32)
        dense = q.dequantize()
        assert type(q[4:10]) is NF4Tensor
        assert q[4:10].packed.data_ptr() == q.packed.data_ptr() + 4 * 32 // 2
        for rows in (slice(4, 10), slice(3, 10), slice(188, None), slice(5, 5), slice(None)):
            assert torch.equal(torch.as_tensor(q[rows]).dequantize(), dense[rows])
        for part, expected in zip(q.split(50), dense.split(50), strict=True):
            assert torch.equal(part.dequantize(), expected)
        assert torch.equal(q[4:10][2:4].dequantize(), dense[6:8])

    def test_a_parameter_is_copied_pickled_and_moved_as_one(self):
        layer = nn.Linear(128, 192)
        layer.weight = nn.Parameter(quantized(), requires_grad=False)
        dense = layer.weight.dequantize()
        for made in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
            assert isinstance(made.weight, nn.Parameter)
            assert isinstance(made.weight, NF4Tensor)
            assert not made.weight.requires_grad
            assert torch.equal(made.weight.dequantize(), dense)
        file = io.BytesIO()
        torch.save(layer, file)
        file.seek(0)
        assert torch.equal(torch.load(file, weights_only=False).weight.dequantize(), dense)
        layer.to(torch.bfloat16)
        assert isinstance(layer.weight, NF4Tensor)
        assert torch.equal(layer.weight.dequantize(), dense.bfloat16())
        layer.to("meta")
        assert layer.weight.packed.is_meta
        layer.to_empty(device="cpu")
        assert layer.weight.packed.shape == (192 * 64,)
        assert isinstance(layer.weight, NF4Tensor)

    def test_copying_in_takes_parts_or_quantises(self):
        q, other = quantized(), quantized()
        place = q.packed.data_ptr()
        q.copy_(other)
        assert torch.equal(q.dequantize(), other.dequantize())
        dense = torch.randn(192, 128)
        q.copy_(dense)
        assert torch.equal(q.dequantize(), NF4Tensor.quantize(dense).dequantize())
        assert q.packed.data_ptr() == place
        parts = [part.clone() for part in q.parts if part is not None]
        q.copy_(q.dequantize())  # its own values, which would be quantised to other ones
        assert all(map(torch.equal, parts, [part for part in q.parts if part is not None]))
        turned = other.t()
        turned.copy_(dense.t())
        assert torch.equal(turned.dequantize(), q.t().dequantize())

    @pytest.mark.parametrize("value", [float("inf"), float("-inf"), float("nan")])
    def test_elements_that_are_not_finite_are_refused(self, value):
        w = torch.randn(70, 3)
        w[69, 2] = value
        with pytest.raises(ValueError, match="infinite or NaN elements: expected finite"):
            NF4Tensor.quantize(w)

    def test_other_dtypes_are_refused(self):
        with pytest.raises(
            ValueError, match=r"NF4 of torch.float64: expected one of torch.float32"
        ):
            NF4Tensor.quantize(torch.randn(4, 4, dtype=torch.float64))

    @pytest.mark.parametrize(
        "write", [lambda q: q.add_(1), lambda q: q.zero_(), lambda q: torch.mul(q, 2, out=q)]
    )
    def test_nothing_else_writes(self, write):
        with pytest.raises(TypeError, match=r"would write to an NF4 weight, which is frozen"):
            write(quantized())


class TestElements:
    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("shape", [(128,), (7, 128), (2, 3, 128), (0, 128)])
    def test_a_product_is_that_of_the_dense_weight_to_the_bit(self, shape, dtype):
        q, x, bias = (
            quantized(dtype=dtype),
            torch.randn(shape).to(dtype),
            torch.randn(192).to(dtype),
        )
        x.requires_grad_()
        y, kept = saved_by(lambda: F.linear(x, q, bias))
        want = F.linear(x, q.dequantize(), bias)
        assert torch.equal(y, want)
        grad = torch.randn(want.shape).to(dtype)
        (got,) = torch.autograd.grad(y, x, grad)
        assert torch.equal(got, torch.autograd.grad(want, x, grad)[0])
        assert all(type(t) is NF4Tensor for t in kept if t.numel() >= 192 * 128)

    def test_any_operation_sees_the_elements(self):
        q = quantized()
        dense = q.dequantize()
        assert torch.equal(q + 1, dense + 1)
        assert torch.equal(q.sum(1), dense.sum(1))
        assert torch.equal(torch.stack([q, q]), torch.stack([dense, dense]))
        assert torch.isfinite(q).all()
        into = torch.zeros(192, 128)
        into.copy_(q)
        assert torch.equal(into, dense)
        rows, columns = torch.randint(192, (50,)), torch.randint(128, (50,))
        assert torch.equal(q[rows, columns], dense[rows, columns])
        assert torch.equal(q.t()[columns, rows], dense[rows, columns])

    @pytest.mark.parametrize("product", [torch.mm, F.linear, lambda a, b: torch.addmm(a, a, b)])
    def test_a_product_of_two_has_each_in_memory_of_its_own(self, product):
        a, b = quantized(64, 64), quantized(64, 64)
        assert torch.equal(product(a, b), product(a.dequantize(), b.dequantize()))

    def test_products_share_one_buffer(self):
        small, large = quantized(64, 64), quantized(256, 128)
        _buffers.by_place.clear()
        F.linear(torch.randn(2, 128), large)
        (buffer,) = _buffers.by_place.values()
        F.linear(torch.randn(2, 64), small)
        F.linear(torch.randn(2, 128), large)
        assert [b.data_ptr() for b in _buffers.by_place.values()] == [buffer.data_ptr()]
        assert buffer.numel() == large.numel() * 4
        with torch.inference_mode():
            _buffers.by_place.clear()
            y = F.linear(torch.randn(2, 128), large)
        F.linear(torch.randn(2, 64), small)  # writes to it outside
        assert y.shape == (2, 256)


class TestLoRALinear:
    @pytest.mark.parametrize("p", [0.0, 0.25])
    @pytest.mark.parametrize("autocast", [False, True])
    def test_equals_the_dense_weight_to_the_bit_and_keeps_none(self, p, autocast):
        q, x = quantized(), torch.randn(3, 5, 128, requires_grad=True)
        A, B = (torch.randn(s).requires_grad_() for s in ((8, 128), (128, 4)))
        bias = torch.randn(192)
        keywords = {"splits": (64, 64, 64), "enabled": (True, False, True), "dropout_p": p}

        def run(weight):
            with torch.autocast("cpu", enabled=autocast):
                return lora_linear(x, weight, bias, A, B, 2.0, seed=3, **keywords)

        y, kept = saved_by(lambda: run(q))
        want = run(q.dequantize())
        assert torch.equal(y, want)
        grad = torch.randn_like(y)
        for got, expected in zip(
            torch.autograd.grad(y, (x, A, B), grad),
            torch.autograd.grad(want, (x, A, B), grad),
            strict=True,
        ):
            assert torch.equal(got, expected)
        assert all(type(t) is NF4Tensor for t in kept if t.numel() >= 192 * 128)

    def test_gradients_are_those_of_float64_on_the_dequantised_weight(self):
        q, x = quantized().double(), torch.randn(3, 128, dtype=torch.float64, requires_grad=True)
        A, B = (torch.randn(s, dtype=torch.float64).requires_grad_() for s in ((2, 128), (192, 2)))

        def run(x, A, B):
            return lora_linear(x, q, None, A, B, 2.0, dropout_p=0.2, seed=1).tanh()[:, ::40]

        assert torch.autograd.gradcheck(run, (x, A, B), fast_mode=True)
        assert torch.autograd.gradgradcheck(run, (x, A, B), fast_mode=True)

    def test_the_few_rows_of_a_transposed_weight(self):
        q, x = quantized(128, 192).t(), torch.randn(5, 128)
        A, B = torch.randn(4, 128), torch.randn(192, 4)
        y = lora_linear(x, q, None, A, B, 1.0)
        assert torch.equal(y, lora_linear(x, q.dequantize(), None, A, B, 1.0))

    def test_the_choice_says_that_the_weight_is_quantised(self):
        arguments = torch.randn(2, 128), quantized(), None, torch.randn(4, 128), torch.randn(192, 4)
        assert explain(*arguments).endswith("on an NF4 weight that is dequantised before")


class TestCompile:
    @pytest.mark.parametrize("p", [0.0, 0.25])
    def test_a_compiled_step_is_whole_and_keeps_nothing_dense(self, p):
        from functorch.compile import make_boxed_func, min_cut_rematerialization_partition
        from torch._dynamo.backends.common import aot_autograd

        torch._dynamo.reset()
        graphs = []

        def keep(graph, _):
            graphs.append(graph)
            return make_boxed_func(graph.forward)

        backend = aot_autograd(
            fw_compiler=keep, bw_compiler=keep, partition_fn=min_cut_rematerialization_partition
        )
        plain = nn.Linear(128, 192)
        plain.weight = nn.Parameter(quantized(), requires_grad=False)
        weight = nn.Parameter(quantized(128, 192), requires_grad=False)
        A, B = (nn.Parameter(torch.randn(s)) for s in ((4, 192), (128, 4)))

        def step(x):
            return lora_linear(plain(x), weight, None, A, B, 2.0, dropout_p=p, seed=5).relu()

        x = torch.randn(3, 128, requires_grad=True)
        y = torch.compile(step, backend=backend, fullgraph=True)(x)
        got = y, *torch.autograd.grad(y.sum(), (x, A, B))
        want = step(x)
        want = want, *torch.autograd.grad(want.sum(), (x, A, B))
        for one, other in zip(got, want, strict=True):  # sums of 128 products and more, that cancel
            atol = 1e-6 * other.abs().max().item()
            torch.testing.assert_close(one, other, rtol=1e-6, atol=atol)
        forward, backward = graphs
        kept = [node.meta["val"].numel() for node in forward.graph.output_node().args[0]]
        assert max(kept) < 128 * 192
        for graph in (forward, backward):  # each weight once in either
            names = [str(node.target) for node in graph.graph.nodes]
            assert names.count("lora.nf4_dequantize.default") == 2
