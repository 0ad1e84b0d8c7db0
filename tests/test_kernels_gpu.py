"""What only a GPU can show of the fused kernels: sizes, memory, graphs, statistics, devices."""

import pytest
import torch
from torch import nn

import lora
from lora.kernels import explain, lora_linear, nf4
from lora.kernels.dropout import keep_scale

pytestmark = pytest.mark.gpu
BF16 = torch.bfloat16


def tensors(m, k, n, r, dtype=BF16, device="cuda"):
    x = torch.randn(m, k, device=device, dtype=dtype)
    weight = torch.randn(n, k, device=device, dtype=dtype) / k**0.5
    A = torch.randn(r, k, device=device, dtype=dtype) / k**0.5
    B = torch.randn(n, r, device=device, dtype=dtype)
    return [x.requires_grad_(), weight, None, A.requires_grad_(), B.requires_grad_()]


def test_layers_on_a_gpu_take_the_fused_kernels():
    layer = lora.Linear(64, 64, 8, device="cuda")
    assert lora.summary(layer).rows[0].path.startswith("triton: ")
    assert explain(*tensors(3, 16, 16, 4)).startswith("triton: ")


@pytest.mark.parametrize(("m", "k", "n"), [(300_000, 8192, 64), (300_000, 64, 8192)])
def test_more_than_two_to_the_31_elements(m, k, n):
    """x or y is that large; its last rows are compared with the same rows alone."""
    assert max(m * k, m * n) > 2**31
    x, weight, bias, A, B = tensors(m, k, n, 16)
    y = lora_linear(x, weight, bias, A, B, 2.0, impl="triton")
    grad = torch.zeros_like(y)
    grad[-100:] = torch.randn(100, n, device="cuda", dtype=BF16)
    dx, dA, dB = torch.autograd.grad(y, (x, A, B), grad)
    tail = x.detach()[-100:].double().requires_grad_()
    A64, B64 = (t.detach().double().requires_grad_() for t in (A, B))
    exact = lora_linear(tail, weight.double(), bias, A64, B64, 2.0, impl="torch")
    want = torch.autograd.grad(exact, (tail, A64, B64), grad[-100:].double())
    assert not dx[:-100].any()
    for got, expected in ((y[-100:], exact), (dx[-100:], want[0]), (dA, want[1]), (dB, want[2])):
        error = (got.double() - expected).norm() / expected.norm()
        assert error < 0.02


@pytest.mark.parametrize("p", [0.05, 0.5, 0.9])
def test_dropout_statistics(p):
    """With W = 0 and A, B the identity, y is the masked and scaled x."""
    m, k = 4096, 64
    x = torch.ones(m, k, device="cuda")
    eye, zero = torch.eye(k, device="cuda"), torch.zeros(k, k, device="cuda")
    y = lora_linear(x, zero, None, eye, eye, 1.0, dropout_p=p, impl="triton")
    scale = torch.tensor(keep_scale(p), device="cuda")
    assert ((y == 0) | torch.isclose(y, scale)).all()
    dropped = (y == 0).double()
    spread = (p * (1 - p)) ** 0.5
    assert abs(dropped.mean() - p) < 6 * spread / (m * k) ** 0.5
    assert (dropped.mean(0) - p).abs().max() < 6 * spread / m**0.5
    assert (dropped.mean(1) - p).abs().max() < 6 * spread / k**0.5


def test_peak_memory_is_what_is_promised():
    """Forward keeps x, S and a seed, and its peak is y beside small slabs."""
    m, k, n, r = 8192, 3072, 9216, 16
    x, weight, bias, A, B = tensors(m, k, n, r)
    options = {"dropout_p": 0.05, "impl": "triton"}
    lora_linear(x, weight, bias, A, B, 2.0, **options).backward(torch.randn_like(x @ weight.t()))
    x.grad = A.grad = B.grad = None
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    y = lora_linear(x, weight, bias, A, B, 2.0, **options)
    kept = torch.cuda.memory_allocated() - before - y.numel() * 2
    assert kept <= m * r * 2 + 4096
    assert torch.cuda.max_memory_allocated() - before <= (m * n + 4 * m * r) * 2 + 2**21
    grad = torch.randn_like(y)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    y.backward(grad)
    slabs = 0.4 * m * n * 2  # partial sums of dS, dB and dA in fp32
    assert torch.cuda.max_memory_allocated() - before <= m * k * 2 + slabs


def test_a_cuda_graph_draws_a_new_mask_at_every_replay():
    x, weight, bias, A, B = (
        None if t is None else t.detach() for t in tensors(256, 128, 128, 16, torch.float32)
    )

    def run():
        return lora_linear(x, weight, bias, A, B, 2.0, dropout_p=0.3, impl="triton")

    run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = run()
    replays = []
    for _ in range(3):
        graph.replay()
        replays.append(y.clone())
    assert not torch.equal(replays[0], replays[1])
    assert not torch.equal(replays[1], replays[2])


@pytest.mark.parametrize("tokens", [1, 16, 512])
def test_a_captured_training_step_is_the_eager_one(tokens):
    x, weight, bias, A, B = tensors(tokens, 128, 256, 16)
    grad = torch.randn(tokens, 256, device="cuda", dtype=BF16)

    def run():
        y = lora_linear(x, weight, bias, A, B, 2.0, impl="triton")
        return y, *torch.autograd.grad(y, (x, A, B), grad)

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        want = [t.detach().clone() for t in run()]
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = run()
    graph.replay()
    assert all(map(torch.equal, [t.detach() for t in got], want))


def test_reduce_overhead_mode():
    layer = lora.Linear(64, 64, 8, 16, 0.1, device="cuda")
    lora.mark_only_lora_as_trainable(layer)
    model = nn.Sequential(layer, nn.Tanh())
    compiled = torch.compile(model, mode="reduce-overhead", fullgraph=True)
    for _ in range(4):
        model.zero_grad()  # which are outputs of the last replay, and would be added to
        torch.compiler.cudagraph_mark_step_begin()
        compiled(torch.randn(100, 64, device="cuda")).square().sum().backward()
    assert layer.lora_A.grad.isfinite().all()


def test_tf32_only_where_the_user_allows_it():
    x, weight, bias, A, B = tensors(512, 1024, 512, 64, torch.float32)
    exact = lora_linear(*(t if t is None else t.double() for t in (x, weight, bias, A, B)), 2.0)
    before = torch.backends.cuda.matmul.fp32_precision
    errors = []
    try:
        for precision in ("ieee", "tf32"):
            torch.backends.cuda.matmul.fp32_precision = precision
            y = lora_linear(x, weight, bias, A, B, 2.0, impl="triton")
            errors.append(float((y - exact).norm() / exact.norm()))
    finally:
        torch.backends.cuda.matmul.fp32_precision = before
    assert errors[0] < 3e-6 < errors[1] < 3e-3


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_launches_go_to_the_tensors_device():
    x, weight, bias, A, B = tensors(100, 64, 64, 8, device="cuda:1")
    assert torch.cuda.current_device() == 0
    y = lora_linear(x, weight, bias, A, B, 2.0, dropout_p=0.1, impl="triton")
    y.sum().backward()
    assert x.grad.device == torch.device("cuda:1")
    torch.cuda.synchronize("cuda:1")


@pytest.mark.parametrize("dtype", [torch.float32, BF16, torch.float16])
def test_a_weight_is_quantised_on_a_gpu_as_on_a_cpu(dtype):
    w = (torch.randn(3072, 1024) * 0.02).to(dtype)
    here, there = nf4.quantize(w), nf4.quantize(w.cuda())
    assert torch.equal(there.packed.cpu(), here.packed)
    # The mean of all absmax may be added up in another order.
    assert (nf4.scales(there).cpu() - nf4.scales(here)).abs().max() < 1e-2 * w.abs().max()


def test_a_quantised_layer_runs_the_fused_kernels_and_keeps_nothing_dense():
    layer = lora.LinearNF4.from_module(nn.Linear(3072, 9216, bias=False, device="cuda", dtype=BF16))
    dense = layer.weight.dequantize()
    splits = {"enable_lora": [True] * 3, "lora_dtype": torch.float32}
    adapted = lora.MergedLinear.from_module(layer, 16, 32, 0.05, **splits)
    assert lora.summary(adapted).rows[0].path.startswith("triton: ")
    nn.init.normal_(adapted.lora_B)
    x = torch.randn(2048, 3072, device="cuda", dtype=BF16, requires_grad=True)
    adapted(x).sum().backward()  # warms up the buffers
    before = torch.cuda.memory_allocated()
    y = adapted(x)
    kept = torch.cuda.memory_allocated() - before
    assert kept < y.nbytes + 3 * 2048 * 48 * 4
    factors = adapted.lora_A, adapted.lora_B
    adapted.dropout_seed = torch.tensor([3], device="cuda")
    got = adapted(x)
    want = lora_linear(
        x, dense, None, *factors, 2.0, splits=(3072,) * 3, dropout_p=0.05, seed=3, impl="triton"
    )
    assert torch.equal(got, want)
    grad = torch.randn_like(got)
    for one, other in zip(
        torch.autograd.grad(got, (x, *factors), grad),
        torch.autograd.grad(want, (x, *factors), grad),
        strict=True,
    ):
        assert torch.equal(one, other)
