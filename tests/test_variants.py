"""The variants against their papers' equations: forward, gradients, merging, state, refusals."""

import copy
import math
import pickle
from functools import partial

import pytest
import torch
from adapter_helpers import move, unchanged
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.func import functional_call
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D

import lora
from lora.kernels.dropout import draw_keep_bits, keep, keep_scale
from lora.variants import NAMES, principal_factors, row_norms

PISSA = {"init_lora_weights": "pissa"}
OPTIONS = {
    "LoRA": {},
    "rsLoRA": {"use_rslora": True},
    "DoRA": {"use_dora": True},
    "PiSSA": PISSA,
    "PiSSA by iterations": {"init_lora_weights": "pissa_niter_4"},
    "LoRA-FA": {"use_lorafa": True},
    "lora_bias": {"lora_bias": True},
    "DoRA of PiSSA": {**PISSA, "use_dora": True},
    "all with DoRA": {**PISSA, "use_dora": True, "use_rslora": True, "use_lorafa": True},
    "all with lora_bias": {**PISSA, "lora_bias": True, "use_rslora": True, "use_lorafa": True},
}
SIZES = {"r": 3, "lora_alpha": 6}
PARTS = {"enable_lora": [True, False, True], "out_splits": [6, 3, 5]}
LAYERS = {
    "linear": partial(lora.Linear, 10, 14, **SIZES),
    "linear without bias": partial(lora.Linear, 10, 14, **SIZES, bias=False),
    "transposed": partial(lora.Linear, 10, 14, **SIZES, fan_in_fan_out=True),
    "parts": partial(lora.MergedLinear, 10, 14, **SIZES, **PARTS),
    "parts transposed without bias": partial(
        lora.MergedLinear, 10, 14, **SIZES, **PARTS, fan_in_fan_out=True, bias=False
    ),
    "Conv1D": lambda dtype, **options: lora.Linear.from_module(wide(dtype), **SIZES, **options),
    "Conv1D with parts": lambda dtype, **options: lora.MergedLinear.from_module(
        wide(dtype), **SIZES, **PARTS, **options
    ),
}
P = 0.3
FLOAT64 = {"dtype": torch.float64}


def wide(dtype):
    return Conv1D(14, 10).to(dtype)


@pytest.fixture(params=LAYERS)
def make(request):
    """Makes a layer with the given options: in float64, of 10 inputs and 14 outputs."""
    return partial(LAYERS[request.param], **FLOAT64)


@pytest.fixture(params=OPTIONS)
def options(request):
    return OPTIONS[request.param]


def trained(layer):
    """The layer with other values in what its optimizer would change."""
    if layer.r > 0:
        move(p for p in layer.update_parameters().values() if p.requires_grad)
    return layer


def plain(layer):
    """The frozen layer's weight as (out, in)."""
    return layer.weight.t() if layer.fan_in_fan_out else layer.weight


def parts(layer):
    """(rows of the output, rows of A, rows of B) of every part; no rows of A without an update."""
    splits = layer.out_splits or (layer.out_features,)
    enabled = layer.enable_lora or (True,)
    out = a = b = 0
    for size, on in zip(splits, enabled, strict=True):
        rows_A, rows_B = (layer.r, size) if on else (0, 0)
        yield slice(out, out + size), slice(a, a + rows_A), slice(b, b + rows_B)
        out, a, b = out + size, a + rows_A, b + rows_B


def formula(layer, x, mask=None):
    """The papers' equations, part by part, with dense matrices; mask with its keep-scale."""
    has = layer.variant.keys()
    s = layer.lora_alpha / (math.sqrt(layer.r) if "use_rslora" in has else layer.r)
    columns = []
    for out, a, b in parts(layer):
        W = plain(layer)[out]
        if a.start == a.stop:
            columns.append(x @ W.t())
            continue
        A, B = layer.lora_A[a], layer.lora_B[b]
        taken = s * layer.lora_B0[b] @ layer.lora_A0[a] if "init_lora_weights" in has else 0 * W
        if mask is None:
            y = x @ (W - taken).t() + s * x @ A.t() @ B.t()
        else:
            y = x @ W.t() + (x * mask) @ (s * B @ A - taken).t()
        if "use_dora" in has:
            norm = torch.linalg.norm(W - taken + s * B @ A, dim=1).detach()
            y = y * (layer.lora_magnitude[b] / norm)
        if "lora_bias" in has:
            y = y + s * layer.lora_bias[b]
        columns.append(y)
    y = torch.cat(columns, -1)
    return y if layer.bias is None else y + layer.bias


def mask_of(x, p, seed):
    """The mask, with its keep-scale, that a forward draws after this seed."""
    torch.manual_seed(seed)
    bits = draw_keep_bits(x.numel(), p, device=x.device)
    return keep(torch.ones_like(x).detach(), bits) * keep_scale(p)


def results(function, layer, x, grad):
    """y and the gradients of x and of all that trains, by name."""
    trains = {n: p for n, p in layer.named_parameters() if p.requires_grad}
    y = function(x)
    found = torch.autograd.grad(y, [x, *trains.values()], grad)
    return {"y": y.detach(), **dict(zip(["x", *trains], found, strict=True))}


def assert_equal(got, wanted, tolerance=1e-12):
    assert got.keys() == wanted.keys()
    for name in wanted:
        torch.testing.assert_close(
            got[name],
            wanted[name],
            rtol=tolerance,
            atol=tolerance,
            msg=lambda m, n=name: f"{n}: {m}",
        )


def output(layer, x):
    with torch.no_grad():
        return layer(x)


def bits(tensors):
    return {name: tensor.detach().clone() for name, tensor in tensors.items()}


def assert_same_bits(now, before):
    assert now.keys() == before.keys()
    for name, tensor in before.items():
        assert torch.equal(now[name], tensor), name


# The equations


@pytest.mark.parametrize("p", [0.0, P])
def test_forward_and_gradients_are_the_papers(make, options, p):
    layer = trained(make(**options, lora_dropout=p))
    x = torch.randn(2, 5, 10, dtype=torch.float64, requires_grad=True)
    grad = torch.randn(2, 5, 14, dtype=torch.float64)
    mask = mask_of(x, p, 7) if p else None
    wanted = results(lambda x: formula(layer, x, mask), layer, x, grad)
    torch.manual_seed(7)
    assert_equal(results(layer, layer, x, grad), wanted)
    assert wanted["lora_B"].abs().max() > 0.01
    assert ("lora_A" in wanted) is ("use_lorafa" not in options)
    assert ("lora_magnitude" in wanted) is ("use_dora" in options)
    assert ("lora_bias" in wanted) is ("lora_bias" in options)
    assert not {"weight", "lora_A0", "lora_B0"} & wanted.keys()


def test_a_dora_norm_is_a_constant_in_backward():
    """With the norm's gradient, those of the factors would be others."""
    layer = trained(lora.Linear(10, 14, **SIZES, use_dora=True, **FLOAT64))
    x, grad = torch.randn(5, 10, dtype=torch.float64), torch.randn(5, 14, dtype=torch.float64)
    V = layer.weight + layer.scaling * layer.lora_B @ layer.lora_A
    through = x @ (layer.lora_magnitude[:, None] * V / V.norm(dim=1, keepdim=True)).t() + layer.bias
    torch.testing.assert_close(layer(x), through)
    (full,) = torch.autograd.grad(through, layer.lora_B, grad)
    (ours,) = torch.autograd.grad(layer(x), layer.lora_B, grad)
    assert (full - ours).abs().max() > 0.01 * full.abs().max()


@pytest.mark.parametrize("kind", ["transposed", "parts"])
def test_gradcheck_and_gradgradcheck(kind, options):
    """Of all that trains; with DoRA not of the factors, whose gradient is no derivative."""
    layer = trained(LAYERS[kind](**options, lora_dropout=P, **FLOAT64))
    names = [n for n, q in layer.named_parameters() if q.requires_grad]
    if "use_dora" in options:
        names = [n for n in names if n not in ("lora_A", "lora_B")]
    values = [layer.get_parameter(n).detach().clone().requires_grad_() for n in names]
    x = torch.randn(3, 10, dtype=torch.float64, requires_grad=True)

    def run(x, *values):
        torch.manual_seed(7)
        return functional_call(layer, dict(zip(names, values, strict=True)), x)

    assert torch.autograd.gradcheck(run, (x, *values))
    assert torch.autograd.gradgradcheck(run, (x, *values))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_error_is_at_most_twice_the_formulas(options, dtype):
    make = partial(lora.MergedLinear, 48, 40, 4, 8, enable_lora=[True, False, True])
    layer = trained(make(out_splits=[16, 8, 16], **options)).to(dtype)
    exact = copy.deepcopy(layer).double()
    x = torch.randn(3, 7, 48).to(dtype).requires_grad_()
    grad = torch.randn(3, 7, 40).to(dtype)
    twice = x.detach().double().requires_grad_()
    truth = results(lambda x: formula(exact, x), exact, twice, grad.double())
    theirs = results(lambda x: formula(layer, x), layer, x, grad)
    ours = results(layer, layer, x, grad)
    for name, want in truth.items():
        assert ours[name].dtype == dtype
        error, allowed = (ours[name] - want).abs(), (theirs[name] - want).abs()
        atol = torch.finfo(dtype).eps * want.abs().max()
        assert error.max() <= 2 * allowed.max() + atol, name


@pytest.mark.parametrize("frozen", [torch.float32, torch.bfloat16])
def test_autocast_computes_in_its_dtype_and_keeps_the_gradients(options, frozen):
    linear = nn.Linear(48, 40).to(frozen)
    layer = lora.Linear.from_module(linear, 4, 8, lora_dtype=torch.float32, **options)
    trained(layer)
    x, grad = torch.randn(6, 48, requires_grad=True), torch.randn(6, 40)
    exact = copy.deepcopy(layer).double()
    twice = x.detach().double().requires_grad_()
    truth = results(lambda x: formula(exact, x), exact, twice, grad.double())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = results(layer, layer, x, grad.bfloat16())
    assert found.pop("y").dtype == torch.bfloat16
    truth.pop("y")
    for name, want in truth.items():
        assert found[name].dtype == (frozen if name == "bias" else torch.float32)
        assert (found[name] - want).abs().max() < 0.03 * want.abs().max(), name


@pytest.mark.parametrize("kind", ["linear", "parts transposed without bias"])
def test_compiled_is_eager(kind, options):
    torch._dynamo.reset()
    layer = trained(LAYERS[kind](**options, lora_dropout=P, **FLOAT64))
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    x = torch.randn(5, 10, dtype=torch.float64, requires_grad=True)
    grad = torch.randn(5, 14, dtype=torch.float64)
    torch.manual_seed(7)
    wanted = results(layer, layer, x, grad)
    torch.manual_seed(7)
    assert_equal(results(compiled, layer, x, grad), wanted)
    layer.eval()
    torch.testing.assert_close(output(compiled, x), output(layer, x), rtol=1e-12, atol=1e-12)


def test_inductor_gives_eagers_values_and_gradients():
    torch._dynamo.reset()
    make = partial(lora.MergedLinear, 10, 14, **SIZES, **PARTS, lora_dropout=P)
    model = nn.Sequential(make(**OPTIONS["all with DoRA"]), lora.Linear(14, 14, 2, lora_bias=True))
    for layer in model:
        trained(layer)
    compiled = torch.compile(model, fullgraph=True)
    x, grad = torch.randn(5, 10, requires_grad=True), torch.randn(5, 14)
    torch.manual_seed(7)
    wanted = results(model, model, x, grad)
    torch.manual_seed(7)
    assert_equal(results(compiled, model, x, grad), wanted, 1e-4)


# Before training, and what stays


def is_pissa(options):
    return "init_lora_weights" in options


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_before_training_the_output_is_the_frozen_layers(make, options, dtype):
    layer = make(**options, dtype=dtype)
    x = torch.randn(2, 5, 10).to(dtype)
    frozen = F.linear(x, plain(layer), layer.bias)
    if is_pissa(options):
        tolerance = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 0.03}[dtype]
        torch.testing.assert_close(layer(x), frozen, rtol=tolerance, atol=tolerance)
    else:
        assert torch.equal(layer(x), frozen)
    with lora.disabled(trained(layer)):
        assert torch.equal(layer(x), frozen)
    assert not torch.equal(layer(x), frozen)


@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16])
def test_fp32_factors_on_a_half_precision_weight_begin_with_its_output(options, half):
    linear = nn.Linear(48, 40).to(half)
    x = torch.randn(6, 48).to(half)
    frozen = linear(x)
    layer = lora.MergedLinear.from_module(
        linear, 4, 8, enable_lora=(True, False), lora_dtype=torch.float32, **options
    )
    if is_pissa(options):
        torch.testing.assert_close(layer(x), frozen, rtol=0.03, atol=0.03)
    else:
        assert torch.equal(layer(x), frozen)
    assert all(p.dtype == torch.float32 for p in layer.update_parameters().values())
    assert layer(x).dtype == half


@pytest.mark.parametrize("init", ["pissa", "pissa_niter_16"])
def test_pissa_begins_with_the_principal_part(make, init):
    layer = make(init_lora_weights=init)
    with torch.no_grad():
        for out, _, _ in parts(layer):  # singular values that fall, so that iterations converge
            U, S, Vt = torch.linalg.svd(plain(layer)[out], full_matrices=False)
            plain(layer)[out] = U @ (0.3 ** torch.arange(len(S))).double().diag() @ Vt
    layer._derive_from_weight()
    assert torch.equal(layer.lora_A, layer.lora_A0)
    assert torch.equal(layer.lora_B, layer.lora_B0)
    assert not layer.lora_A0.requires_grad
    assert not layer.lora_B0.requires_grad
    for out, a, b in parts(layer):
        if a.start == a.stop:
            continue
        W, A, B = plain(layer)[out], layer.lora_A[a], layer.lora_B[b]
        S, left = (torch.linalg.svdvals(m) for m in (W, W - layer.scaling * B @ A))
        # Eckart and Young: what is left has the other singular values.
        torch.testing.assert_close(left[: len(S) - 3], S[3:], rtol=1e-6, atol=1e-9)
        wanted = (S[:3] / layer.scaling).diag()
        torch.testing.assert_close(A @ A.t(), wanted, rtol=1e-6, atol=1e-9)
        torch.testing.assert_close(B.t() @ B, wanted, rtol=1e-6, atol=1e-9)


def test_principal_factors_of_a_half_precision_weight_are_computed_in_fp32():
    weight = torch.randn(9, 7).bfloat16()
    A, B = principal_factors(weight, 7, 2.0, "pissa")
    assert A.dtype == B.dtype == torch.float32
    torch.testing.assert_close(2 * B @ A, weight.float(), rtol=1e-5, atol=1e-5)


def test_rslora_scales_by_the_root_of_the_rank(layer_case):
    name, make, _, _ = layer_case
    layer = make(use_rslora=True)
    assert layer.scaling == layer.lora_alpha / math.sqrt(layer.r), name
    assert layer.variant == {"use_rslora": True}


def train(model, x, steps=4, lr=0.05):
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=lr)
    for _ in range(steps):
        model(x).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    return model


def test_what_is_frozen_keeps_its_bits(make, options):
    model = nn.Sequential(make(**options, lora_dropout=P), nn.Tanh(), nn.Linear(14, 2).double())
    lora.mark_only_lora_as_trainable(model)
    frozen = {n: p for n, p in model.named_parameters() if not p.requires_grad}
    trains = {n: p for n, p in model.named_parameters() if p.requires_grad}
    before, then = bits(frozen), bits(trains)
    x = torch.randn(6, 10, dtype=torch.float64)
    for _ in range(2):
        train(model.train(), x)
        output(model.eval(), x)
        train(model, x)  # in eval mode too
        with lora.merged(model), lora.disabled(model):
            output(model, x)
        model[0].to_module(merge=True)
    assert_same_bits(frozen, before)
    assert {n for n, p in trains.items() if not torch.equal(p, then[n])} == set(trains)
    wanted = {"lora_A", "lora_B"} - ({"lora_A"} if "use_lorafa" in options else set())
    wanted |= {"lora_magnitude"} if "use_dora" in options else set()
    wanted |= {"lora_bias"} if "lora_bias" in options else set()
    assert set(trains) == {f"0.{own}" for own in wanted}


def test_frozen_factors_stay_so_and_are_in_the_state(make, options):
    model = nn.Sequential(make(**options))
    own = set(model[0].update_parameters())
    frozen = {n for n in own if not model[0].update_parameters()[n].requires_grad}
    assert frozen == {n for n in own if model[0].is_frozen(n)}
    assert ("lora_A" in frozen) is ("use_lorafa" in options)
    assert ({"lora_A0", "lora_B0"} <= frozen) is is_pissa(options)
    for bias in ("none", "lora_only", "all"):
        lora.mark_only_lora_as_trainable(model, bias)
        trains = {n for n, p in model[0].named_parameters() if p.requires_grad}
        assert not trains & frozen
        assert own - frozen <= trains
        assert {f"0.{n}" for n in own} <= set(lora.lora_state_dict(model, bias))
    assert set(lora.lora_state_dict(model)) == {f"0.{n}" for n in own}


# DoRA's norms


def exact_norms(layer):
    """Of the rows with an update, by the dense matrix; and ‖W‖ + ‖its update‖ of these rows."""
    W = plain(layer).detach().double()
    found, sizes = [], []
    for out, a, b in parts(layer):
        if a.start < a.stop:
            A, B = layer.lora_A[a].detach().double(), layer.lora_B[b].detach().double()
            update = layer.scaling * B @ A
            found.append(torch.linalg.norm(W[out] + update, dim=1))
            sizes.append(torch.linalg.norm(W[out], dim=1) + torch.linalg.norm(update, dim=1))
    return torch.cat(found), torch.cat(sizes)


def norms(layer):
    return row_norms(plain(layer), layer.lora_A, layer.lora_B, layer.scaling, layer.rows)


@pytest.mark.parametrize(
    ("frozen", "factors", "tolerance"),  # of the lengths of W and of its update
    [
        (torch.float64, torch.float64, 1e-14),
        (torch.float32, torch.float32, 1e-6),
        (torch.bfloat16, torch.float32, 2**-8),  # W Aᵀ is a product in bf16
        (torch.bfloat16, torch.bfloat16, 2**-8),
    ],
)
def test_row_norms_are_those_of_the_dense_matrix(make, frozen, factors, tolerance):
    layer = trained(make(use_dora=True))
    layer.weight.data = layer.weight.data.to(frozen)
    for own in ("lora_A", "lora_B"):
        layer.get_parameter(own).data = layer.get_parameter(own).data.to(factors)
    found = norms(layer)
    assert found.dtype == torch.promote_types(frozen, torch.float32)
    assert not found.requires_grad
    exact, size = exact_norms(layer)
    assert ((found.double() - exact).abs() <= tolerance * size).all()


@pytest.mark.parametrize("frozen", [torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("left", [0.0, 1e-12, 1e-6, 1e-3])
def test_rows_that_nearly_cancel_give_finite_outputs_and_gradients(frozen, left):
    """W = -scaling B A + a little, in some rows; rows of zeros, in the weight, in B, in both."""
    dtype = torch.promote_types(frozen, torch.float32)
    layer = lora.Linear(10, 14, **SIZES, use_dora=True, dtype=dtype)
    move([layer.lora_A, layer.lora_B])
    with torch.no_grad():
        update = layer.scaling * layer.lora_B @ layer.lora_A
        layer.weight[:6] = left * torch.randn(6, 10, dtype=dtype) - update[:6]
        layer.weight[6:8] = 0
        layer.lora_B[7:9] = 0
        layer.lora_magnitude.fill_(5)
    for own in ("weight", "bias"):
        layer.get_parameter(own).data = layer.get_parameter(own).data.to(frozen)
    exact, size = exact_norms(layer)
    error = (norms(layer).double() - exact).abs()
    assert (error <= 4 * math.sqrt(torch.finfo(frozen).eps) * size).all()
    x = torch.randn(5, 10, dtype=frozen, requires_grad=True)
    found = results(layer, layer, x, torch.ones(5, 14, dtype=frozen))
    for name, value in found.items():
        assert value.isfinite().all(), name
    longest = 5 * x.norm(dim=1, keepdim=True)  # magnitude · |x|: of no direction is it more
    assert ((found["y"] - layer.bias).abs() <= 10 * longest).all()
    assert (layer.merged_weight().norm(dim=1) <= 10 * 5).all()


def test_a_row_of_zeros_begins_and_trains():
    layer = lora.Linear(10, 14, **SIZES, use_dora=True, dtype=torch.float64)
    with torch.no_grad():
        layer.weight[3] = 0
    layer._derive_from_weight()
    assert layer.lora_magnitude[3] == 0
    x = torch.randn(5, 10, dtype=torch.float64)
    assert torch.equal(layer(x), F.linear(x, layer.weight, layer.bias))
    train(layer, x)
    assert all(p.isfinite().all() for p in layer.parameters())
    assert layer(x).isfinite().all()


# LoRA-FA keeps S alone


def kept(layer, x):
    """Bytes of what a forward saves for backward, the layer's Parameters apart; does it keep x?"""
    own = {p.untyped_storage().data_ptr() for p in layer.parameters()}
    storages = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            storages[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        layer(x)
    return sum(storages.values()), x.untyped_storage().data_ptr() in storages


@pytest.mark.parametrize("p", [0.0, P])
@pytest.mark.parametrize("bias", [False, True])
def test_lorafa_keeps_s_and_the_masks_bits_alone(p, bias):
    make = partial(lora.MergedLinear, 64, 96, 4, 8, p, [True, False, True], lora_bias=bias)
    layer = make(use_lorafa=True)
    trained(layer)
    x = torch.randn(32, 64, requires_grad=True)
    s, mask = 32 * 8 * 4, (32 * 64 // 8 if p else 0)
    assert kept(layer, x) == (s + mask, False)
    assert kept(make(), x) == (s + mask + x.nbytes, True)


# Merging


def test_every_merged_path_is_the_unmerged_one(make, options):
    layer = trained(make(**options))
    x = torch.randn(2, 5, 10, dtype=torch.float64)
    wanted = output(layer, x)
    near = partial(torch.testing.assert_close, rtol=1e-12, atol=1e-12)
    near(wanted, formula(layer, x))
    layer.merge_weights = True
    layer.eval()
    assert layer.merged
    near(output(layer, x), wanted)
    with torch.no_grad():
        layer.lora_B.mul_(2)
    near(output(layer, x), formula(layer, x))  # not the stale one
    with torch.no_grad():
        layer.lora_B.div_(2)
    layer.merge_weights = False
    layer.train()
    with lora.merged(layer):
        assert layer.merged
        near(output(layer, x), wanted)
    assert not layer.merged
    near(layer.delta_weight() + layer.weight, layer.merged_weight())
    model = nn.Sequential(layer)
    if "lora_bias" in options and layer.bias is None:
        return  # refused, as the next test has it
    merged = layer.to_module(merge=True)
    assert type(merged).__name__ in ("Linear", "Conv1D")
    near(merged(x), wanted)
    state = lora.merged_state_dict(model)
    assert set(state) == {"0.weight"} | ({"0.bias"} if layer.bias is not None else set())
    weight = state["0.weight"].t() if layer.fan_in_fan_out else state["0.weight"]
    near(F.linear(x, weight, state.get("0.bias")), wanted)
    near(lora.unpatch(model, merge=True)(x), wanted)
    assert not isinstance(model[0], lora.LoRALayer)


def test_vectors_that_changed_are_merged_anew(make):
    layer = trained(make(use_dora=True)).eval()
    layer.merge_weights = True
    x = torch.randn(5, 10, dtype=torch.float64)
    before = output(layer, x)
    with torch.no_grad():
        layer.lora_magnitude.mul_(2)
    assert not torch.equal(output(layer, x), before)
    torch.testing.assert_close(output(layer, x), formula(layer, x))


def test_a_merged_weight_is_rounded_once(options):
    layer = lora.Linear(48, 40, 4, 8, dtype=torch.bfloat16, **options)
    trained(layer)
    exact = copy.deepcopy(layer).double().merged_weight()
    got = layer.merged_weight()
    assert got.dtype == torch.bfloat16
    nearest = (exact.bfloat16().double() - exact).abs()
    assert ((got.double() - exact).abs() <= nearest + 1e-6 * exact.abs().max()).all()


def test_an_update_with_a_bias_merges_into_no_layer_without_one():
    model = nn.Sequential(nn.Linear(10, 10), nn.Tanh(), nn.Linear(10, 4, bias=False))
    lora.patch(model, ["0", "2"], r=2, lora_alpha=4, lora_bias=True)
    for layer in (model[0], model[2]):
        trained(layer)
    x = torch.randn(5, 10)
    with unchanged(model), pytest.raises(ValueError, match="2: its update has a bias"):
        lora.unpatch(model, merge=True)
    with unchanged(model), pytest.raises(ValueError, match="2: its update has a bias"):
        lora.merged_state_dict(model)
    wanted = output(model, x)
    with lora.merged(model):  # which needs no place for it
        assert model[2].merged
        torch.testing.assert_close(output(model, x), wanted)
    base = lora.unpatch(model)
    assert (base[0].bias is None, base[2].bias is None) == (False, True)


def test_taking_the_update_away_gives_the_base_to_the_bit(make, options):
    layer = make(**options)
    lora.mark_only_lora_as_trainable(layer)
    weight, bias = plain(layer).clone(), layer.bias
    x = torch.randn(5, 10, dtype=torch.float64)
    frozen = F.linear(x, plain(layer), bias)
    model = train(nn.Sequential(layer), x)
    assert not torch.equal(model(x), frozen)
    with lora.disabled(model):
        assert torch.equal(model(x), frozen)
        assert torch.equal(model.eval()(x), frozen)
    base = lora.unpatch(model)[0]
    assert not isinstance(base, lora.LoRALayer)
    assert base.bias is bias
    assert torch.equal(base.weight.t() if isinstance(base, Conv1D) else base.weight, weight)
    assert set(base.state_dict()) == {"weight"} | ({"bias"} if bias is not None else set())


def test_merged_biases_train_on_where_biases_trained():
    model = nn.Sequential(nn.Linear(10, 14))
    lora.patch(model, "0", r=2, lora_alpha=4, lora_bias=True, bias="all")
    plain_layer = lora.unpatch(model, merge=True)[0]
    assert (plain_layer.bias.requires_grad, plain_layer.weight.requires_grad) == (True, False)


def test_a_factor_that_is_no_parameter_is_not_merged():
    layer = lora.Linear(10, 14, **SIZES, use_dora=True).eval()
    move([layer.lora_B])
    nn.utils.parametrizations.weight_norm(layer, "lora_B")
    x = torch.randn(5, 10)
    with torch.no_grad():
        before = layer(x)
        layer.parametrizations.lora_B.original0 *= 2
        assert not torch.equal(layer(x), before)


# State


def twin(make, options):
    """Another layer with the same frozen weight and bias, its update as it begins."""
    torch.manual_seed(1)
    return make(**options)


def test_lora_state_dict_there_and_back(make, options):
    model = nn.Sequential(trained(make(**options)))
    x = torch.randn(5, 10, dtype=torch.float64)
    other = nn.Sequential(twin(make, options))
    base = {k: t for k, t in model.state_dict().items() if "lora_" not in k}
    for states in ([lora.lora_state_dict(model), base], [base, lora.lora_state_dict(model)]):
        fresh = copy.deepcopy(other)
        for state in states:
            _, unexpected = fresh.load_state_dict(state, strict=False)
            assert not unexpected
        assert_same_bits(fresh.state_dict(), bits(model.state_dict()))
        assert torch.equal(output(fresh, x), output(model, x))


def test_copies_are_the_layer(make, options):
    layer = trained(make(**options)).eval()
    x = torch.randn(5, 10, dtype=torch.float64)
    layer.merge_weights = True
    wanted = output(layer, x)
    strict = twin(make, options).eval()
    strict.merge_weights = True
    assert not any(strict.load_state_dict(layer.state_dict()))
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer)), strict):
        assert other.variant == layer.variant
        assert other.scaling == layer.scaling
        assert_same_bits(other.state_dict(), bits(layer.state_dict()))
        trains = {n: p.requires_grad for n, p in layer.named_parameters()}
        assert {n: p.requires_grad for n, p in other.named_parameters()} == trains
        assert torch.equal(output(other, x), wanted)


def test_another_dtype_converts_every_tensor(make, options):
    layer = trained(make(**options))
    x = torch.randn(5, 10, dtype=torch.float64)
    wanted = output(layer, x)
    layer.float()
    assert {p.dtype for p in layer.parameters()} == {torch.float32}
    torch.testing.assert_close(output(layer, x.float()).double(), wanted, rtol=1e-5, atol=1e-5)


DERIVED = {name: o for name, o in OPTIONS.items() if {"use_dora", "init_lora_weights"} & o.keys()}


@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("option", DERIVED)
def test_a_pretrained_weight_gives_a_fresh_layer_its_own_magnitude_and_factors(
    make, option, assign
):
    options = DERIVED[option]
    layer, wanted = twin(make, options), make(**options)
    assert not torch.equal(layer.weight, wanted.weight)
    base = {f"0.{k}": t for k, t in wanted.state_dict().items() if "lora_" not in k}
    found = nn.Sequential(layer).load_state_dict(base, strict=False, assign=assign)
    assert set(found.missing_keys) == {f"0.{own}" for own in wanted.update_parameters()}
    assert not found.unexpected_keys
    own = {n for n in wanted.update_parameters() if n != "lora_A" or is_pissa(options)}
    for name in own:  # A is drawn where it is not derived
        if "niter" in str(options.get("init_lora_weights")) and name != "lora_magnitude":
            continue
        assert torch.equal(layer.get_parameter(name), wanted.get_parameter(name)), name
    x = torch.randn(5, 10, dtype=torch.float64)
    frozen = F.linear(x, plain(wanted), wanted.bias)
    torch.testing.assert_close(layer(x), frozen, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("option", DERIVED)
def test_a_weight_that_is_loaded_changes_no_trained_layer(make, option):
    layer = make(**DERIVED[option])
    train(layer, torch.randn(5, 10, dtype=torch.float64))
    before = bits(layer.update_parameters())
    base = {k: torch.randn_like(t) for k, t in layer.state_dict().items() if "lora_" not in k}
    layer.load_state_dict(base, strict=False)
    assert torch.equal(layer.weight, base["weight"])
    assert_same_bits(layer.update_parameters(), before)


@pytest.mark.parametrize("option", DERIVED)
def test_a_whole_state_is_taken_as_it_is(make, option):
    """Also one whose update is untrained, and in a state with some of the factors."""
    layer = twin(make, DERIVED[option])
    state = {k: torch.randn_like(t) for k, t in layer.state_dict().items()}
    layer.load_state_dict(state)
    assert_same_bits(layer.state_dict(), state)
    fresh = twin(make, DERIVED[option])
    before = bits(fresh.update_parameters())
    fresh.load_state_dict({k: state[k] for k in ("weight", "lora_A")}, strict=False)
    now = bits(fresh.update_parameters())
    assert torch.equal(now.pop("lora_A"), state["lora_A"])
    del before["lora_A"]
    assert_same_bits(now, before)


def test_resetting_begins_anew(options):
    layer = trained(lora.MergedLinear(10, 14, **SIZES, **PARTS, **options, **FLOAT64))
    x = torch.randn(5, 10, dtype=torch.float64)
    assert not torch.allclose(layer(x), F.linear(x, layer.weight, layer.bias))
    layer.reset_parameters()
    frozen = F.linear(x, layer.weight, layer.bias)
    torch.testing.assert_close(layer(x), frozen, rtol=1e-12, atol=1e-12)


def test_a_model_without_values_is_patched_and_filled_later(options):
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(10, 14))
    lora.patch(model, "0", r=3, lora_alpha=6, **options)
    assert all(p.is_meta for p in model.parameters())
    model.to_empty(device="cpu")
    for parameter in model.parameters():
        nn.init.constant_(parameter, 7)  # what is left in memory
    model[0].reset_parameters()
    base, x = nn.Linear(10, 14), torch.randn(5, 10)
    model[0].load_state_dict(base.state_dict(), strict=False)
    torch.testing.assert_close(model(x), base(x), rtol=1e-5, atol=1e-6)
    trained(model[0])
    torch.testing.assert_close(model(x), formula(model[0], x), rtol=1e-5, atol=1e-5)


def test_forward_mode_takes_the_norm_for_a_constant_too():
    layer = trained(lora.Linear(10, 14, **SIZES, use_dora=True, dtype=torch.float64))
    x, B = torch.randn(5, 10, dtype=torch.float64), layer.lora_B.detach()
    tangent = torch.randn_like(B)

    def run(lora_B):
        return functional_call(layer, {"lora_B": lora_B}, (x,))

    _, forward = torch.func.jvp(run, (B,), (tangent,))
    y, pull = torch.func.vjp(run, B)
    cotangent = torch.randn_like(y)
    backward = (pull(cotangent)[0] * tangent).sum()
    torch.testing.assert_close((forward * cotangent).sum(), backward)


# Refusals

WRONG = [
    ({"use_rslora": 1}, "use_rslora=1: expected a bool"),
    ({"use_dora": "yes"}, "use_dora='yes': expected a bool"),
    ({"use_lorafa": None}, "use_lorafa=None: expected a bool"),
    ({"lora_bias": 0.0}, "lora_bias=0.0: expected a bool"),
    ({"init_lora_weights": "gaussian"}, "init_lora_weights='gaussian': expected True, 'pissa'"),
    ({"init_lora_weights": "pissa_niter_0"}, "'pissa_niter_0'"),
    ({"init_lora_weights": "pissa_niter_"}, "'pissa_niter_'"),
    ({"init_lora_weights": False}, "init_lora_weights=False"),
    ({"init_lora_weights": None}, "init_lora_weights=None"),
    ({"lora_bias": True, "use_dora": True}, "lora_bias=True with use_dora=True"),
]
MAKERS = {
    "Linear": lambda **o: lora.Linear(10, 14, 3, **o),
    "MergedLinear": lambda **o: lora.MergedLinear(10, 14, 3, **PARTS, **o),
    "from_module": lambda **o: lora.Linear.from_module(nn.Linear(10, 14), 3, **o),
    "with parts": lambda **o: lora.MergedLinear.from_module(nn.Linear(10, 14), 3, **PARTS, **o),
    "patch": lambda **o: lora.patch(nn.Sequential(nn.Linear(10, 14)), "0", r=3, lora_alpha=6, **o),
}


@pytest.mark.parametrize("maker", MAKERS)
@pytest.mark.parametrize(("options", "match"), WRONG)
def test_wrong_values_are_refused(maker, options, match):
    with pytest.raises(ValueError, match=match):
        MAKERS[maker](**options)


@pytest.mark.parametrize("maker", MAKERS)
def test_an_unknown_option_is_refused(maker):
    with pytest.raises(TypeError, match="use_qlora"):
        MAKERS[maker](use_qlora=True)


def test_another_misspelt_argument_is_told_from_a_variant():
    with pytest.raises(TypeError, match=r"'lora_alfa' \(nearest: 'lora_alpha'\)"):
        lora.patch(nn.Sequential(nn.Linear(4, 4)), "0", r=2, lora_alpha=4, lora_alfa=4)


def test_an_unknown_option_is_refused_with_the_nearest():
    with pytest.raises(TypeError, match=r"'use_dorra' \(nearest: 'use_dora'\)"):
        lora.Linear.from_module(nn.Linear(4, 4), 2, use_dorra=True)


@pytest.mark.parametrize("options", [{"r": 8}, {"r": 2, "lora_alpha": 0}, {"r": 2, "broken": True}])
def test_a_layer_that_pissa_cannot_wrap_stays_as_it_was(options):
    layer = nn.Linear(4, 4)
    if options.pop("broken", False):
        layer.weight.data[0, 0] = math.nan
    with pytest.raises(ValueError, match="init_lora_weights='pissa'"):
        lora.Linear.from_module(layer, **options, **PISSA)
    assert layer.weight.requires_grad
    assert set(layer.state_dict()) == {"weight", "bias"}


@pytest.mark.parametrize("maker", MAKERS)
def test_a_default_value_is_plain_lora(maker):
    options = {name: name == "init_lora_weights" for name in NAMES}
    made = MAKERS[maker](**options)
    layer = made[0] if maker == "patch" else made
    assert layer.variant == {}
    assert set(layer.update_parameters()) == {"lora_A", "lora_B"}


def test_rank_zero_takes_every_option(options):
    layer = lora.Linear(10, 14, **options)
    assert layer.r == 0
    assert layer.weight.requires_grad
    assert set(layer.state_dict()) == {"weight", "bias"}
    x = torch.randn(5, 10)
    assert torch.equal(layer(x), F.linear(x, layer.weight, layer.bias))
    assert torch.equal(layer.eval()(x), F.linear(x, layer.weight, layer.bias))
    model = nn.Sequential(lora.Linear(10, 14, **options, bias=False))
    assert set(lora.merged_state_dict(model)) == {"0.weight"}
    assert type(lora.unpatch(model, merge=True)[0]) is nn.Linear


@pytest.mark.parametrize("init", ["pissa", "pissa_niter_4"])
def test_pissa_needs_singular_values_and_a_positive_scale(init):
    with pytest.raises(ValueError, match=r"has no 5 singular values; expected r of at most 4"):
        lora.Linear(10, 4, 5, 2, init_lora_weights=init)
    with pytest.raises(ValueError, match=r"has no 4 singular values; expected r of at most 3"):
        lora.MergedLinear(10, 14, 4, 2, enable_lora=[True, True], out_splits=[11, 3], **PISSA)
    for alpha in (0, -2):
        with pytest.raises(ValueError, match="expected lora_alpha > 0"):
            lora.Linear(10, 14, 3, alpha, init_lora_weights=init)
    lora.Linear(10, 4, 4, 2, init_lora_weights=init)


OTHERS = {
    "Embedding": (partial(lora.Embedding, 10, 14), nn.Embedding(10, 14)),
    "Conv1d": (partial(lora.Conv1d, 10, 14, 1), nn.Conv1d(10, 14, 1)),
    "Conv2d": (partial(lora.Conv2d, 10, 14, 1), nn.Conv2d(10, 14, 1)),
    "Conv3d": (partial(lora.Conv3d, 10, 14, 1), nn.Conv3d(10, 14, 1)),
}
LINEAR_ALONE = {"use_dora": True, "lora_bias": True, "use_lorafa": True, **PISSA}


@pytest.mark.parametrize("kind", OTHERS)
@pytest.mark.parametrize("name", LINEAR_ALONE)
def test_layers_that_are_not_linear_have_rslora_alone(kind, name):
    make, plain_layer = OTHERS[kind]
    option, match = {name: LINEAR_ALONE[name]}, f"{kind}: {name}=.*only linear layers"
    with pytest.raises(ValueError, match=match):
        make(r=2, **option)
    with pytest.raises(ValueError, match=match):
        getattr(lora, kind).from_module(plain_layer, 2, **option)
    model = nn.ModuleDict({"line": nn.Linear(4, 4), "other": copy.deepcopy(plain_layer)})
    with unchanged(model), pytest.raises(ValueError, match=f"other: {match}"):
        lora.patch(model, ["line", "other"], r=2, lora_alpha=4, **option)
    assert make(r=4, lora_alpha=6, use_rslora=True).scaling == 3.0


def test_a_part_that_pissa_cannot_take_leaves_the_model_unchanged():
    model = nn.Sequential(nn.Linear(10, 14), nn.Linear(14, 2))
    with unchanged(model), pytest.raises(ValueError, match=r"1: .*no 3 singular values"):
        lora.patch(model, ["0", "1"], r=3, lora_alpha=6, **PISSA)
    with unchanged(model), pytest.raises(ValueError, match="lora_alpha > 0"):
        lora.patch(model, ["0"], r=3, lora_alpha=-6, **PISSA)


# Models

PEFT_CONFIG = {
    "r": 4,
    "lora_alpha": 8,
    "lora_dropout": 0.05,
    "bias": "none",
    "task_type": "CAUSAL_LM",
    "target_modules": "all-linear",
    "modules_to_save": None,
}
IDS = torch.arange(3, 43).view(2, 20)


def logits(model):
    with torch.no_grad():
        return model(IDS, use_cache=False).logits


def test_patch_phi3_takes_every_variant(options, make_phi3, capsys):
    model = make_phi3().double()
    before = logits(model)
    base = bits(model.state_dict())
    lora.patch_phi3(model, **PEFT_CONFIG, **options)
    if is_pissa(options):
        torch.testing.assert_close(logits(model), before, rtol=1e-10, atol=1e-10)
    else:
        assert torch.equal(logits(model), before)
    said = " ".join(n if options[n] is True else options[n] for n in NAMES if n in options)
    table = lora.summary(model)
    assert {row.variant for row in table.rows} == {said}
    assert (said in capsys.readouterr().out) is True
    trains = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert table.trainable_parameters == trains
    layers = [m for m in model.modules() if isinstance(m, lora.LoRALayer)]
    sizes = [p.numel() for layer in layers for p in layer.update_parameters().values()]
    assert sum(row.parameters for row in table.rows) == sum(sizes)
    assert len(layers) == 8
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    model.train()
    losses = []
    for _ in range(8):
        loss = model(IDS, labels=IDS, use_cache=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    assert_same_bits({k: model.state_dict()[k] for k in base}, base)
    model.eval()
    trained_logits = logits(model)
    assert (trained_logits - before).abs().max() > 0.01
    with lora.disabled(model):
        assert torch.equal(logits(model), before)
    with lora.merged(model):
        torch.testing.assert_close(logits(model), trained_logits, rtol=1e-9, atol=1e-9)
    if "lora_bias" not in options:  # the model's layers have no bias
        merged = lora.unpatch(copy.deepcopy(model), merge=True)
        torch.testing.assert_close(logits(merged), trained_logits, rtol=1e-9, atol=1e-9)
    assert torch.equal(logits(lora.unpatch(model)), before)


def test_a_bf16_phi3_begins_as_it_was(options, make_phi3):
    model = make_phi3().bfloat16()
    before = logits(model)
    lora.patch_phi3(model, **PEFT_CONFIG, **options)
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    if is_pissa(options):
        torch.testing.assert_close(logits(model), before, rtol=0.1, atol=0.03)
    else:
        assert torch.equal(logits(model), before)


def test_variants_by_pattern_have_their_own_ranks(options):
    model = nn.Sequential(nn.Linear(10, 12), nn.Linear(12, 14))
    lora.patch(model, ["0", "1"], r=2, lora_alpha=6, rank_pattern={"1": 4}, **options)
    root = math.sqrt if "use_rslora" in options else float
    assert [layer.scaling for layer in model] == [6 / root(2), 6 / root(4)]
    assert all(layer.variant == options for layer in model)
    kinds = {(row.r, row.variant) for row in lora.summary(model).rows}
    assert len(kinds) == 2


def test_rslora_reaches_layers_of_every_kind():
    model = nn.ModuleDict({kind: copy.deepcopy(layer) for kind, (_, layer) in OTHERS.items()})
    lora.patch(model, list(OTHERS), r=4, lora_alpha=6, use_rslora=True)
    assert {layer.scaling for layer in model.values()} == {3.0}


def test_summary_has_no_column_without_variants(capsys):
    model = lora.patch(nn.Sequential(nn.Linear(4, 4)), "0", r=2, lora_alpha=4)
    assert {row.variant for row in lora.summary(model).rows} == {""}
    assert "variant" not in capsys.readouterr().out


def test_repr_says_the_variant(make, options):
    text = repr(make(**options))
    for name, value in options.items():
        assert f"{name}={value}" in text


# All of it, on any shape


@settings(max_examples=120, deadline=None)
@given(
    pairs=st.lists(st.tuples(st.integers(1, 6), st.booleans()), min_size=1, max_size=4).filter(
        lambda pairs: any(on for _, on in pairs)
    ),
    k=st.integers(1, 9),
    rows=st.integers(0, 4),
    r=st.integers(1, 4),
    alpha=st.sampled_from([0.5, 2, 7]),
    bias=st.booleans(),
    transposed=st.booleans(),
    rslora=st.booleans(),
    lorafa=st.booleans(),
    vector=st.sampled_from([{}, {"use_dora": True}, {"lora_bias": True}]),
    init=st.sampled_from([True, "pissa", "pissa_niter_2"]),
    seed=st.integers(0, 2**16),
)
def test_unmerged_is_merged_is_the_formula(
    pairs, k, rows, r, alpha, bias, transposed, rslora, lorafa, vector, init, seed
):
    torch.manual_seed(seed)
    sizes, enabled = (list(column) for column in zip(*pairs, strict=True))
    if init is not True:
        r = min(r, k, *(size for size, on in pairs if on))
    layer = lora.MergedLinear(
        k,
        sum(sizes),
        r,
        alpha,
        enable_lora=enabled,
        out_splits=sizes,
        fan_in_fan_out=transposed,
        bias=bias,
        dtype=torch.float64,
        use_rslora=rslora,
        use_lorafa=lorafa,
        init_lora_weights=init,
        **vector,
    )
    x = torch.randn(rows, k, dtype=torch.float64)
    frozen = F.linear(x, plain(layer), layer.bias)
    torch.testing.assert_close(layer(x), frozen, rtol=1e-10, atol=1e-10)
    trained(layer)
    wanted = formula(layer, x).detach()
    torch.testing.assert_close(output(layer, x), wanted, rtol=1e-10, atol=1e-10)
    layer.eval()
    assert layer.merged
    torch.testing.assert_close(output(layer, x), wanted, rtol=1e-10, atol=1e-10)
