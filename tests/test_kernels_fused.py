"""The fused kernels against float64 and PyTorch: on a GPU, or in Triton's interpreter.

Without a GPU, test_kernels_interpreter.py runs this file in a process of its own with
TRITON_INTERPRET=1: small sizes, with bf16 as interpreter_bf16.py has it.
"""

import itertools
import os

import kernel_oracle
import pytest
import torch
from kernel_oracle import SEED, Case, error_over_allowed, step
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.checkpoint import checkpoint

import lora
from lora.kernels import explain, lora_linear
from lora.kernels.dropout import keep, seeded_keep_bits
from lora.kernels.fused import fused_backward, fused_forward

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED else "cuda"
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
if INTERPRETED:
    import interpreter_bf16  # noqa: F401
pytestmark = [pytest.mark.gpu, pytest.mark.fused]

CASES = {
    "plain": Case((70,), 48, (32,), (True,), 16, 0.0, False),
    "one token": Case((1,), 40, (35,), (True,), 4, 0.2, True),
    "few tokens": Case((2, 9), 33, (20, 24), (True, True), 5, 0.3, True),
    "odd sizes": Case((67,), 41, (19, 7, 30), (True, False, True), 3, 0.3, True),
    "first and last part off": Case((3, 25), 32, (8, 40, 9), (False, True, False), 8, 0.1, False),
    "rank over several blocks": Case((65,), 24, (33, 18), (True, True), 50, 0.25, True),
    "rank 1": Case((80,), 50, (37,), (True,), 1, 0.5, True),
    "in smaller than a tile": Case((66,), 3, (5,), (True,), 2, 0.3, True),
}
if not INTERPRETED:
    CASES |= {
        "qkv": Case((2, 1024), 3072, (3072, 3072, 3072), (True, True, True), 16, 0.05, False),
        "gate_up": Case((1024,), 3072, (8192, 8192), (True, True), 64, 0.05, False),
        "down": Case((1000,), 8192, (3072,), (True,), 128, 0.05, True),
        "rank 256": Case((513,), 1024, (1024, 256), (True, True), 256, 0.1, True),
        "one token of qkv": Case(
            (1,), 3072, (3072, 1024, 1024), (True, False, True), 16, 0.05, False
        ),
        "64 tokens": Case((64,), 3072, (3072,), (True,), 8, 0.0, True),
        "odd and large": Case((1237,), 1111, (777, 333), (True, True), 24, 0.1, True),
    }


def problem(name, dtype, factors=None):
    return kernel_oracle.problem(CASES[name], dtype, factors, DEVICE)


TYPES = [(FP32, FP32), (BF16, BF16), (BF16, FP32), (FP16, FP16)]


@pytest.mark.parametrize(
    ("case", "dtype", "factors"),
    [
        pytest.param(case, *types, id="-".join([case, *(str(t)[6:] for t in types)]))
        for case, types in itertools.product(CASES, TYPES)
        # The interpreter has fp16 as numpy does: one case of it.
        if not (INTERPRETED and FP16 in types and case != "odd sizes")
    ],
)
def test_error_is_at_most_twice_pytorchs(case, dtype, factors):
    tensors, options = problem(case, dtype, factors)
    grad = torch.randn(*tensors[0].shape[:-1], sum(options["splits"])).to(DEVICE, dtype)
    fused = step(tensors, grad, options, "triton")
    assert error_over_allowed(tensors, grad, options, fused) <= 1


@pytest.mark.parametrize("case", ["odd sizes"] if INTERPRETED else CASES)  # which runs in order
def test_two_runs_are_equal_to_the_bit(case):
    tensors, options = problem(case, BF16)
    grad = torch.randn(*tensors[0].shape[:-1], sum(options["splits"])).to(DEVICE, BF16)
    first, second = (step(tensors, grad, options, "triton") for _ in range(2))
    assert all(map(torch.equal, first, second))


@pytest.mark.parametrize("case", ["few tokens", "odd sizes", "rank over several blocks"])
def test_every_element_is_written(case):
    """With every new tensor filled with NaN before use."""
    tensors, options = problem(case, torch.float32)
    grad = torch.randn(*tensors[0].shape[:-1], sum(options["splits"])).to(DEVICE)
    want = step(tensors, grad, options, "triton")
    torch.use_deterministic_algorithms(True)
    try:
        got = step(tensors, grad, options, "triton")
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(map(torch.equal, got, want))


def mask(rows, columns, p):
    """The reference's, as booleans."""
    bits = seeded_keep_bits(torch.tensor(SEED), rows, columns, p)
    return keep(torch.ones(rows, columns), bits).bool()


@pytest.mark.parametrize(
    ("rows", "columns", "p"),
    [
        *((5, 16, p) for p in (0.05, 0.5, 0.97)),
        *[(70, 41, 0.05), (19, 104, 0.5), (130, 8, 0.97)],
    ],
)
def test_the_masks_are_the_references_bit_by_bit(rows, columns, p):
    want = mask(rows, columns, p)
    x = torch.ones(rows, columns, device=DEVICE)
    A = torch.eye(columns, device=DEVICE)
    from lora.kernels.dropout import drop_level
    from lora.kernels.triton_input_grads import input_grads
    from lora.kernels.triton_shrink import shrink

    seed, level = torch.tensor([SEED], device=DEVICE), drop_level(p)
    assert torch.equal(shrink(x, A, seed, level).sum(0).cpu().bool(), want)
    dx, dA = input_grads(x, torch.ones_like(x), A, 1.0, seed, level, True, True)
    assert torch.equal(dx.cpu().bool(), want)
    counted = want.float().sum(0).expand(columns, columns)
    assert torch.equal(dA.cpu(), counted)


@pytest.fixture(scope="module")
def whole_step():
    """Of "odd sizes": the tensors, the options, the output's gradient, y and all gradients."""
    torch.manual_seed(0)
    tensors, options = problem("odd sizes", torch.float32)
    grad = torch.randn(67, 56).to(DEVICE)
    return tensors, options, grad, step(tensors, grad, options, "triton")


@pytest.mark.parametrize("asked", range(1, 32))
def test_what_is_not_asked_for_is_skipped_and_the_rest_is_the_same(asked, whole_step):
    tensors, options, grad, everything = whole_step
    names = [bool(asked >> i & 1) for i in range(5)]
    tensors = [t.detach().requires_grad_(on) for t, on in zip(tensors, names, strict=True)]
    got = step(tensors, grad, options, "triton")
    chosen = [g for g, on in zip(everything[1:], names, strict=True) if on]
    assert len(got) == 1 + sum(names)
    assert all(map(torch.equal, got, [everything[0], *chosen]))


@pytest.mark.parametrize(
    ("frozen", "expected"),
    [("", "S, seed, x"), ("A", "S, seed"), ("A, B", "seed")],
)
def test_kept_for_backward(frozen, expected):
    (x, weight, bias, A, B), options = problem("odd sizes", BF16)
    weight.requires_grad_(False)
    for tensor, name in ((A, "A"), (B, "B")):
        tensor.requires_grad_(name not in frozen)
    shapes = {(67, 41): "x", (67, 6): "S", (): "seed"}
    own = {t.data_ptr() for t in (weight, A, B)}
    kept = []

    def pack(tensor):
        if tensor.data_ptr() not in own:
            kept.append(shapes[tuple(tensor.shape)])
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        lora_linear(x, weight, bias, A, B, 0.7, impl="triton", **options)
    assert ", ".join(sorted(kept)) == expected


@pytest.mark.parametrize("tokens", [6, 80])
@pytest.mark.parametrize("layout", ["transposed", "sliced", "expanded", "row of three dimensions"])
def test_strides(tokens, layout):
    k, n = 24, 20
    x = {
        "transposed": lambda: torch.randn(k, tokens).t(),
        "sliced": lambda: torch.randn(tokens, 2 * k)[:, 5 : 5 + k],
        "expanded": lambda: torch.randn(1, k).expand(tokens, k),
        "row of three dimensions": lambda: torch.randn(tokens, 2, 3, k)[:, 1],
    }[layout]().to(DEVICE)
    A, B = torch.randn(4, k).to(DEVICE), torch.randn(n, 4).to(DEVICE)
    tensors = [x, torch.randn(k, n).to(DEVICE).t(), None, A.t().contiguous().t(), B]
    for t in tensors:
        if t is not None:
            t.requires_grad_()
    grad = torch.randn(1, device=DEVICE).expand(*x.shape[:-1], n)
    options = {"dropout_p": 0.2, "seed": SEED}
    results = []
    for impl in ("torch", "triton"):
        y = lora_linear(*tensors, 0.7, impl=impl, **options)
        wanted = [t for t in tensors if t is not None]
        results.append([y, *torch.autograd.grad(y, wanted, grad)])
    for theirs, ours in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("shape", [(0, 12), (2, 0, 12), (12,), (2, 3, 4, 12)])
def test_any_number_of_tokens_and_dimensions(shape):
    x = torch.randn(shape, device=DEVICE, requires_grad=True)
    W = torch.randn(10, 12, device=DEVICE)
    A = torch.randn(3, 12, device=DEVICE, requires_grad=True)
    B = torch.randn(10, 3, device=DEVICE, requires_grad=True)
    results = []
    for impl in ("torch", "triton"):
        y = lora_linear(x, W, None, A, B, 2.0, dropout_p=0.3, seed=SEED, impl=impl)
        results.append([y, *torch.autograd.grad(y.sum(), (x, A, B))])
    for theirs, ours in zip(*results, strict=True):
        assert ours.shape == theirs.shape
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("tokens", [5, 70])
def test_parts_without_rows(tokens):
    x = torch.randn(tokens, 12, device=DEVICE, requires_grad=True)
    W = torch.randn(6, 12, device=DEVICE)
    A = torch.randn(3, 12, device=DEVICE, requires_grad=True)
    B = torch.randn(0, 3, device=DEVICE, requires_grad=True)
    results = []
    for impl in ("torch", "triton"):
        y = lora_linear(x, W, None, A, B, 2.0, splits=(0, 6), enabled=(True, False), impl=impl)
        results.append([y, *torch.autograd.grad(y.sum(), (x, A, B))])
    for theirs, ours in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize(
    "x",
    [torch.randn(1, 40), torch.randn(64, 40), torch.randn(3, 5, 40).transpose(0, 1)],
    ids=["1", "64", "transposed"],
)
def test_few_tokens_with_zero_b_give_the_frozen_output_to_the_bit(x):
    x = x.to(DEVICE, BF16)
    layer = nn.Linear(40, 30, device=DEVICE, dtype=BF16)
    A, B = torch.randn(4, 40, device=DEVICE), torch.zeros(30, 4, device=DEVICE)
    y = lora_linear(x, layer.weight, layer.bias, A, B, 2.0, impl="triton")
    assert torch.equal(y, layer(x))


def test_the_mask_follows_torchs_generator_and_changes_every_time():
    (x, *rest), options = problem("plain", torch.float32)
    options |= {"dropout_p": 0.4, "seed": None}

    def draw():
        return lora_linear(x, *rest, 0.7, impl="triton", **options)

    torch.manual_seed(3)
    first, second = draw(), draw()
    torch.manual_seed(3)
    assert torch.equal(first, draw())
    assert not torch.equal(first, second)


@pytest.mark.parametrize("tokens", [3, 70])
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_without_gradients_the_output_is_the_same_to_the_bit(tokens, mode):
    (_, *rest), options = problem("few tokens", BF16)
    x = torch.randn(tokens, 33).to(DEVICE, BF16)
    want = lora_linear(x, *rest, 0.7, impl="triton", **options)
    with mode():
        assert torch.equal(lora_linear(x, *rest, 0.7, impl="triton", **options), want)


def gradients_of(layer):
    return [p.grad.clone() for p in layer.parameters() if p.grad is not None]


@pytest.fixture
def layer(monkeypatch, fill_factors):
    """A MergedLinear with dropout that takes the fused kernels."""
    monkeypatch.setenv("LORA_KERNELS", "triton")
    made = lora.MergedLinear(24, 40, 4, 8, 0.3, [True, False, True], out_splits=[16, 8, 16])
    fill_factors(made.to(DEVICE))
    lora.mark_only_lora_as_trainable(made)
    return made


@pytest.mark.parametrize("tokens", [5, 70])
@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_redraws_the_same_mask(layer, tokens, reentrant):
    x = torch.randn(tokens, 24, device=DEVICE, requires_grad=True)
    torch.manual_seed(1)
    layer(x).square().sum().backward()
    want = [x.grad.clone(), *gradients_of(layer)]
    x.grad = None
    layer.zero_grad()
    torch.manual_seed(1)
    checkpoint(layer, x, use_reentrant=reentrant).square().sum().backward()
    assert all(map(torch.equal, [x.grad, *gradients_of(layer)], want))


def test_functional_call(layer):
    x = torch.randn(70, 24, device=DEVICE)
    state = {name: p.detach() * 2 for name, p in layer.named_parameters()}
    torch.manual_seed(1)
    y = torch.func.functional_call(layer, state, (x,))
    layer.load_state_dict(state)
    torch.manual_seed(1)
    assert torch.equal(y, layer(x))


@pytest.mark.parametrize("tokens", [5, 70])
def test_autocast(layer, tokens):
    """fp32 parameters, products in half precision, gradients in fp32: as the layer without LoRA."""
    x = torch.randn(tokens, 24, device=DEVICE, requires_grad=True)
    with torch.autocast(DEVICE, dtype=BF16):
        y = layer(x)
    assert y.dtype == BF16
    y.float().square().sum().backward()
    assert {g.dtype for g in [x.grad, *gradients_of(layer)]} == {torch.float32}
    ours = [x.grad.clone(), *gradients_of(layer)]
    x.grad = None
    layer.zero_grad()
    layer.lora_dropout.p = 0.0
    with torch.autocast(DEVICE, dtype=BF16):
        layer(x).float().square().sum().backward()
    assert not torch.equal(ours[0], x.grad)  # the mask was there


def test_gradients_of_gradients_equal_pytorchs():
    tensors, options = problem("few tokens", torch.float32)
    results = []
    for impl in ("torch", "triton"):
        y = lora_linear(*tensors, 0.7, impl=impl, **options)
        first = torch.autograd.grad(y.square().sum(), tensors, create_graph=True)
        second = torch.autograd.grad(sum(g.square().sum() for g in first), tensors)
        results.append([*first, *second])
    for theirs, ours in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("case", ["few tokens", "odd sizes"])
def test_the_operators_are_well_registered(case):
    (x, weight, bias, A, B), options = problem(case, torch.float32)
    seed = torch.tensor([SEED], device=DEVICE)
    rows = {"few tokens": [0, 20, 20, 44], "odd sizes": [0, 19, 26, 56]}[case]
    torch.library.opcheck(fused_forward, (x, weight, bias, A, B, seed, 0.3, 0.7, rows, True))
    x, weight, A, B = (t.detach() for t in (x, weight, A, B))
    y, s = fused_forward(x, weight, None, A, B, seed, 0.3, 0.7, rows, True)
    every = [[True] * 3, [True, False, False], [False, True, True]]
    for needs in every if case == "odd sizes" else every[:1]:  # the backward knows no few tokens
        arguments = (y, x, weight, A, B, seed, s, 0.3, 0.7, rows, needs)
        torch.library.opcheck(fused_backward, arguments)
    assert options["splits"][0] == rows[1]


@pytest.mark.parametrize("backend", ["aot_eager"] + ([] if INTERPRETED else ["inductor"]))
@pytest.mark.parametrize("tokens", [5, 70])
def test_a_training_step_compiles_whole(layer, backend, tokens):
    torch._dynamo.reset()
    model = nn.Sequential(layer, nn.Tanh())
    x = torch.randn(tokens, 24, device=DEVICE)
    compiled = torch.compile(model, backend=backend, fullgraph=True)
    results = []
    for f in (model, compiled):
        torch.manual_seed(7)
        y = f(x)
        y.square().sum().backward()
        results.append([y.detach(), *gradients_of(layer)])
        model.zero_grad()
    for want, got in zip(*results, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


def test_one_dynamic_graph_serves_few_and_many_tokens(layer):
    torch._dynamo.reset()
    layer.lora_dropout.p = 0.0
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(layer, backend=counter, fullgraph=True)
    for tokens in (5, 70, 33, 90, 64, 65):
        x = torch.randn(tokens, 24, device=DEVICE)
        y = compiled(x)
        torch.testing.assert_close(y, layer(x), rtol=1e-4, atol=1e-5)
        y.square().sum().backward()
    assert counter.frame_count <= 2  # a static graph first, then one for all sizes


def test_checkpointing_inside_a_compiled_step_keeps_the_mask(layer):
    torch._dynamo.reset()
    x = torch.randn(70, 24, device=DEVICE)

    def run(x):
        return checkpoint(layer, x, use_reentrant=False)

    torch.manual_seed(7)
    layer(x).square().sum().backward()
    want = gradients_of(layer)
    layer.zero_grad()
    torch.manual_seed(7)
    torch.compile(run, backend="aot_eager")(x).square().sum().backward()
    for got, expected in zip(gradients_of(layer), want, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)


def test_auto_takes_the_fused_kernels_on_a_gpu_alone():
    tensors, _ = problem("plain", BF16)
    said = explain(*tensors, 1.0)
    assert said.startswith("torch: " if INTERPRETED else "triton: "), said
    assert explain(*tensors, 1.0, impl="triton").startswith("triton: ")


def test_a_patched_phi3_trains_like_pytorchs_path(make_phi3, fill_factors, monkeypatch):
    ids = torch.randint(3, 90, (2, 40), generator=torch.Generator().manual_seed(0)).to(DEVICE)
    results = []
    for impl in ("torch", "triton"):
        monkeypatch.setenv("LORA_KERNELS", impl)
        model = make_phi3(attention_dropout=0.0, num_hidden_layers=1).to(DEVICE)
        lora.patch_phi3(model, r=4, lora_alpha=8, lora_dropout=0.0, target_modules="all-linear")
        fill_factors(model)
        model.train()
        loss = model(ids, labels=ids).loss
        loss.backward()
        results.append([loss.detach(), *gradients_of(model)])
    for theirs, ours in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-5)
