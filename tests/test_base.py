"""What all layers share: merging that never writes to the weight, wrapping, copying, checks."""

import copy
import io
import json
import pickle
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

import lora

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


def close(a, b):
    torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def no_grad_output(layer, x):
    with torch.no_grad():
        return layer(x)


def as_input(x, dtype):
    return x.to(dtype) if x.is_floating_point() else x


def test_merged_output_equals_unmerged(layer_case, fill_factors):
    _, make, _, x = layer_case
    layer = fill_factors(make())
    unmerged = no_grad_output(layer, x)
    base = no_grad_output(make(merge_weights=False), x)
    assert not torch.allclose(unmerged, base, atol=1e-2)
    layer.eval()
    assert layer.merged
    close(no_grad_output(layer, x), unmerged)
    layer.train()
    assert not layer.merged
    assert torch.equal(no_grad_output(layer, x), unmerged)


@pytest.mark.parametrize("dtype", DTYPES)
def test_merged_weight_is_rounded_once_from_at_least_fp32(layer_case, fill_factors, dtype):
    _, make, _, _ = layer_case
    layer = fill_factors(make()).to(dtype)
    exact = layer.weight.double() + copy.deepcopy(layer).double().delta_weight()
    got = layer.merged_weight()
    assert got.dtype == dtype
    assert got.shape == layer.weight.shape
    nearest = exact.to(dtype).double()
    assert (
        (got.double() - exact).abs() <= (nearest - exact).abs() + 1e-6 * exact.abs() + 1e-7
    ).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_thousand_cycles_change_no_bit(fill_factors, dtype):
    layer = fill_factors(lora.Linear(12, 18, 3)).to(dtype)
    before = {k: v.clone() for k, v in layer.state_dict().items()}
    for _ in range(1000):
        layer.eval()
        layer.train()
    assert all(torch.equal(v, before[k]) for k, v in layer.state_dict().items())


def test_state_dict_is_the_same_in_both_modes(layer_case, fill_factors):
    _, make, plain, _ = layer_case
    layer = fill_factors(make())
    training = {k: v.clone() for k, v in layer.state_dict().items()}
    evaluating = layer.eval().state_dict()
    assert list(training) == list(evaluating)
    assert all(torch.equal(training[k], evaluating[k]) for k in training)
    if plain:
        assert set(training) == set(plain().state_dict()) | {"lora_A", "lora_B"}


CHANGES = {
    "copy_": lambda layer: layer.lora_B.copy_(torch.randn_like(layer.lora_B)),
    "copy_to_A": lambda layer: layer.lora_A.copy_(torch.randn_like(layer.lora_A)),
    "weight_new_data": lambda layer: setattr(layer.weight, "data", layer.weight.data * 2),
    "weight_then_eval": lambda layer: (layer.weight.data.mul_(2.0), layer.eval()),
    "data": lambda layer: layer.lora_B.data.mul_(2.0),
    "new_data": lambda layer: setattr(layer.lora_B, "data", layer.lora_B.data * 2),
    "new_parameter": lambda layer: setattr(
        layer, "lora_B", nn.Parameter(torch.randn_like(layer.lora_B))
    ),
    "weight": lambda layer: layer.weight.mul_(2.0),
    "scaling": lambda layer: setattr(layer, "scaling", layer.scaling * 2),
    "load": lambda layer: layer.load_state_dict(
        {k: torch.randn_like(v) for k, v in layer.state_dict().items()}
    ),
    "assign": lambda layer: layer.load_state_dict(
        {k: torch.randn_like(v) for k, v in layer.state_dict().items()}, assign=True
    ),
    "vector": lambda layer: nn.utils.vector_to_parameters(
        torch.randn(sum(p.numel() for p in layer.parameters())), layer.parameters()
    ),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_stale_merge_is_never_used(layer_case, fill_factors, change):
    _, make, _, x = layer_case
    layer = fill_factors(make()).eval()
    before = no_grad_output(layer, x)
    with torch.no_grad():
        CHANGES[change](layer)
    after = no_grad_output(layer, x)
    assert not torch.allclose(after, before)
    fresh = make()
    fresh.scaling = layer.scaling
    fresh.load_state_dict(layer.state_dict())
    close(after, no_grad_output(fresh, x))


@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.AdamW])
@pytest.mark.parametrize("options", [{}, {"foreach": True}, {"fused": True}])
def test_training_in_eval_mode(layer_case, fill_factors, optimizer, options):
    _, make, _, x = layer_case
    layer = fill_factors(make())
    twin = copy.deepcopy(layer)
    layer.eval()
    outputs = []
    for trained in (layer, twin):
        steps = optimizer([trained.lora_A, trained.lora_B], lr=0.1, **options)
        for _ in range(3):
            trained(x).square().mean().backward()
            steps.step()
            steps.zero_grad()
        outputs.append(no_grad_output(trained, x))
    close(*outputs)
    close(layer.lora_A, twin.lora_A)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_to_in_eval_equals_to_in_train(layer_case, fill_factors, dtype):
    _, make, _, x = layer_case
    layer = fill_factors(make())
    twin = copy.deepcopy(layer)
    in_eval, in_train = layer.eval().to(dtype), twin.train().to(dtype).eval()
    x = as_input(x, dtype)
    assert torch.equal(no_grad_output(in_eval, x), no_grad_output(in_train, x))
    assert in_eval.merged
    assert in_train.merged


def test_copies_and_pickles_drop_the_merge(layer_case, fill_factors):
    _, make, _, x = layer_case
    layer = fill_factors(make()).eval()
    expected = no_grad_output(layer, x)
    buffer = io.BytesIO()
    torch.save(layer, buffer)
    buffer.seek(0)
    twins = [copy.deepcopy(layer), copy.copy(layer), pickle.loads(pickle.dumps(layer))]
    for twin in [*twins, torch.load(buffer, weights_only=False)]:
        assert not twin.merged
        assert twin._merged is None
        assert torch.equal(no_grad_output(twin, x), expected)
    assert layer.merged


def test_spawned_process_gets_the_layer(fill_factors):
    layer = fill_factors(lora.Linear(4, 3, 2)).eval()
    x = torch.randn(2, 4)
    script = (
        "import pickle, sys, torch\n"
        "layer, x = pickle.load(sys.stdin.buffer)\n"
        "with torch.no_grad(): print(layer(x).tolist())"
    )
    run = subprocess.run(
        [sys.executable, "-c", script],
        input=pickle.dumps((layer, x)),
        capture_output=True,
        check=True,
    )
    close(torch.tensor(json.loads(run.stdout)), no_grad_output(layer, x))


def test_shared_memory_and_half_conversions_keep_the_layer_right(layer_case, fill_factors):
    _, make, _, x = layer_case
    layer = fill_factors(make()).eval()
    expected = no_grad_output(layer, x)
    layer.share_memory()
    close(no_grad_output(layer, x), expected)


def test_inference_mode_and_inference_parameters(layer_case, fill_factors):
    _, make, _, x = layer_case
    layer = fill_factors(make())
    expected = no_grad_output(layer, x)
    with torch.inference_mode():
        close(layer.eval()(x), expected)
        born_there = fill_factors(make())
        close(born_there.eval()(x), born_there.train()(x))
    close(no_grad_output(layer, x), expected)


def test_merge_weights_false_never_merges(layer_case):
    _, make, _, x = layer_case
    layer = make(merge_weights=False).eval()
    no_grad_output(layer, x)
    assert not layer.merged
    assert layer._merged is None


def test_gradients_in_eval_mode_reach_the_factors(layer_case, fill_factors):
    _, make, _, x = layer_case
    layer = fill_factors(make()).eval()
    layer(x).sum().backward()
    assert layer.lora_A.grad.abs().sum() > 0
    assert layer.lora_B.grad.abs().sum() > 0
    layer.requires_grad_(False)
    assert not layer(x).requires_grad


ACTIONS = ["train", "eval", "step", "load", "save_load", "merge_dict", "half_way", "disable"]


@settings(max_examples=40, deadline=None)
@given(
    actions=st.lists(st.sampled_from(ACTIONS), max_size=12),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    kind=st.sampled_from(["linear", "merged", "embedding", "conv"]),
)
def test_any_sequence_of_calls_leaves_the_base_and_the_function_right(actions, dtype, kind):
    layer = {
        "linear": lambda: lora.Linear(6, 4, 2),
        "merged": lambda: lora.MergedLinear(6, 4, 2, enable_lora=[True, False]),
        "embedding": lambda: lora.Embedding(6, 4, 2),
        "conv": lambda: lora.Conv2d(6, 4, 1, 2),
    }[kind]().to(dtype)
    x = {"embedding": torch.arange(6), "conv": torch.randn(2, 6, 3, 3)}.get(kind, torch.randn(5, 6))
    x = as_input(x, dtype)
    base = layer.weight.detach().clone()
    for action in actions:
        if action in ("train", "eval"):
            assert getattr(layer, action)() is layer
        elif action == "step":
            with torch.no_grad():
                layer.lora_A.add_(torch.randn_like(layer.lora_A) / 4)
                layer.lora_B.add_(torch.randn_like(layer.lora_B) / 4)
        elif action == "load":
            state = {k: v.clone() for k, v in layer.state_dict().items()}
            layer.load_state_dict({**state, "lora_B": torch.randn_like(state["lora_B"])})
        elif action == "save_load":
            layer.load_state_dict(copy.deepcopy(layer).state_dict())
        elif action == "merge_dict":
            lora.merged_state_dict(layer)
        elif action == "half_way":
            no_grad_output(layer, x)
        elif action == "disable":
            with lora.disabled(layer):
                no_grad_output(layer, x)
    assert torch.equal(layer.weight, base)
    exact = copy.deepcopy(layer).double().train()
    tolerance = {torch.float32: 1e-4, torch.bfloat16: 0.1}[dtype]
    torch.testing.assert_close(
        no_grad_output(layer, x).double(),
        no_grad_output(exact, as_input(x, torch.float64)),
        rtol=tolerance,
        atol=tolerance,
    )


def wrap(name, plain, **options):
    if name.startswith("merged_linear"):
        options["enable_lora"] = [True, False, True]
    if name.endswith("unequal"):
        options["out_splits"] = [10, 4, 4]
    classes = {"linear": "Linear", "merged": "MergedLinear", "embedding": "Embedding"}
    kind = classes.get(name.split("_")[0], name.split("_")[0].capitalize())
    return getattr(lora, kind).from_module(plain, 3, **options)


def test_from_module_keeps_parameters_and_output(layer_case):
    name, make, plain, x = layer_case
    if plain is None:
        return
    base = plain().eval()
    calls = []
    base.register_forward_hook(lambda *_: calls.append(1))
    expected = base(x)
    layer = wrap(name, base)
    assert layer.weight is base.weight
    assert getattr(layer, "bias", None) is getattr(base, "bias", None)
    assert not layer.weight.requires_grad
    assert not layer.training
    assert torch.equal(layer(x), expected)
    assert len(calls) == 2  # the hook came along
    assert not layer.merge_weights
    assert type(layer.to_module()) is type(base)
    assert layer.to_module().weight is base.weight
    assert set(vars(layer.to_module())) == set(vars(base))
    reference = make()
    if reference.r == 3:
        assert layer.lora_A.shape == reference.lora_A.shape
        assert layer.lora_B.shape == reference.lora_B.shape


def test_from_module_of_a_half_layer_and_with_fp32_factors(layer_case):
    name, _, plain, x = layer_case
    if plain is None:
        return
    base = plain().bfloat16()
    x = as_input(x, torch.bfloat16)
    expected = base(x)
    assert wrap(name, base).lora_A.dtype == torch.bfloat16
    mixed = wrap(name, base, lora_dtype=torch.float32)
    assert mixed.lora_A.dtype == torch.float32
    assert torch.equal(mixed(x), expected)
    mixed.lora_B.data.normal_()
    mixed.lora_A.data.normal_()
    mixed(x).sum().backward()
    assert mixed.lora_A.grad.dtype == mixed.lora_B.grad.dtype == torch.float32
    with torch.no_grad():
        torch.testing.assert_close(mixed(x), mixed.train()(x))


def test_from_module_on_meta_then_to_empty_and_reset(layer_case):
    name, _, plain, x = layer_case
    if plain is None:
        return
    with torch.device("meta"):
        layer = wrap(name, plain())
    assert all(p.is_meta for p in layer.parameters())
    layer.eval()
    layer.to_empty(device="cpu").reset_parameters()
    zero = layer.lora_A if name == "embedding" else layer.lora_B
    other = layer.lora_B if name == "embedding" else layer.lora_A
    assert not zero.any()
    assert other.abs().sum() > 0
    assert torch.isfinite(no_grad_output(layer, x)).all()


def test_to_module_folds_the_update(layer_case, fill_factors):
    _, make, _, x = layer_case
    layer = fill_factors(make())
    plain = layer.to_module(merge=True)
    assert type(plain).__module__.startswith("torch.nn")
    close(plain(x), layer(x))
    assert not layer.weight.is_set_to(plain.weight)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"r": -1}, "r=-1: expected a whole number"),
        ({"r": 2.5}, "r=2.5: expected a whole number"),
        ({"r": True}, "r=True"),
        ({"r": "4"}, "r='4'"),
        ({"r": 2, "lora_alpha": float("nan")}, "lora_alpha=nan: expected a finite number"),
        ({"r": 2, "lora_alpha": "16"}, "lora_alpha='16'"),
        ({"r": 2, "lora_dropout": 1.0}, r"lora_dropout=1.0: expected a number in \[0, 1\)"),
        ({"r": 2, "lora_dropout": -0.1}, "lora_dropout=-0.1"),
    ],
)
@pytest.mark.parametrize("wrap_layer", [False, True])
def test_bad_hyperparameters_are_named(options, message, wrap_layer):
    base = nn.Linear(4, 4)
    with pytest.raises(ValueError, match=f"Linear: {message}"):
        lora.Linear.from_module(base, **options) if wrap_layer else lora.Linear(4, 4, **options)
    assert base.weight.requires_grad


def test_from_module_refuses_what_is_not_exactly_the_torch_layer():
    class Scaled(nn.Linear):
        pass

    with pytest.raises(TypeError, match=r"Scaled, expected exactly torch\.nn.*Linear"):
        lora.Linear.from_module(Scaled(3, 3), 2)
    quantised = nn.Linear(3, 3)
    quantised.weight = nn.Parameter(torch.zeros(3, 3, dtype=torch.int8), requires_grad=False)
    with pytest.raises(TypeError, match="floating-point"):
        lora.Linear.from_module(quantised, 2)


def test_extra_repr_names_everything():
    text = repr(lora.MergedLinear(4, 6, 2, 8, 0.1, enable_lora=[True, False], out_splits=[4, 2]))
    for part in (
        "in_features=4, out_features=6",
        "r=2, lora_alpha=8, scaling=4, lora_dropout=0.1, merged=False",
        "enable_lora=[True, False], out_splits=[4, 2]",
    ):
        assert part in text
    assert "r=0" in repr(lora.Linear(4, 4))
    assert "merged=True" in repr(lora.Linear(4, 4, 2).eval())


def test_functional_call_and_func_grad(layer_case, fill_factors):
    _, make, _, x = layer_case
    layer = fill_factors(make())
    for mode in (True, False):
        layer.train(mode)
        doubled = {k: v.detach() * 2 for k, v in layer.named_parameters()}
        with torch.no_grad():
            got = torch.func.functional_call(layer, doubled, (x,))
        twin = make()
        twin.load_state_dict(doubled)
        close(got, no_grad_output(twin, x))

        def loss(factor):
            return torch.func.functional_call(layer, {"lora_A": factor}, (x,)).square().sum()

        got = torch.func.grad(loss)(layer.lora_A.detach())
        layer.zero_grad()
        layer(x).square().sum().backward()
        torch.testing.assert_close(got, layer.lora_A.grad, rtol=1e-4, atol=1e-4)


def test_autocast(layer_case, fill_factors):
    _, make, _, x = layer_case
    layer = fill_factors(make(merge_weights=False))
    expected = layer(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = layer(x)
    torch.testing.assert_close(y.float(), expected, rtol=0.1, atol=0.1)
    y.float().sum().backward()
    assert layer.lora_A.grad.dtype == torch.float32


def test_empty_batches(layer_case):
    _, make, _, x = layer_case
    empty = x[:0]
    for layer in (make(), make().eval()):
        assert layer(empty).shape[0] == 0
        layer(empty).sum().backward()


def test_double_backward(layer_case, fill_factors):
    _, make, _, x = layer_case
    layer = fill_factors(make()).double()
    x = as_input(x, torch.float64) if x.is_floating_point() else x[1:]  # no padding index
    names = ("lora_A", "lora_B")
    start = [getattr(layer, name).detach().requires_grad_() for name in names]

    def f(*factors):
        return torch.func.functional_call(layer, dict(zip(names, factors, strict=True)), (x,))

    assert torch.autograd.gradcheck(f, start)
    assert torch.autograd.gradgradcheck(f, start)


def test_merging_is_not_subject_to_autocast(layer_case, fill_factors):
    _, make, _, x = layer_case
    layer = fill_factors(make())
    expected = layer.merged_weight()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert layer.delta_weight().dtype == torch.float32
        assert torch.equal(layer.merged_weight(), expected)
        with torch.no_grad():
            layer.eval()(x)
    close(no_grad_output(layer, x), no_grad_output(layer.train(), x))


def test_training_the_weight_in_eval_mode_with_a_fused_optimizer(fill_factors):
    layer, x = fill_factors(lora.Linear(6, 4, 2)), torch.randn(3, 6)
    layer.weight.requires_grad_()
    optimizer = torch.optim.SGD([layer.weight], lr=0.5, fused=True)
    no_grad_output(layer.eval(), x)
    layer(x).sum().backward()
    optimizer.step()
    close(no_grad_output(layer, x), no_grad_output(copy.deepcopy(layer).train(), x))


def test_a_weight_whose_memory_is_reused_is_merged_anew(fill_factors):
    x = torch.randn(3, 6)
    for _ in range(20):
        layer = fill_factors(lora.Linear(6, 4, 2)).eval()
        for _ in range(2):
            no_grad_output(layer, x)
            layer.weight.data = layer.weight.data * 2
        close(no_grad_output(layer, x), no_grad_output(copy.deepcopy(layer).train(), x))


def test_a_merge_made_in_inference_mode_serves_autograd(layer_case):
    _, make, _, x = layer_case
    layer = make().requires_grad_(False)
    with torch.inference_mode():
        layer.eval()(x)
    if x.is_floating_point():
        layer(x.clone().requires_grad_()).sum().backward()


def test_backward_under_autocast_of_an_fp32_forward(layer_case, fill_factors):
    _, make, _, x = layer_case
    layer = fill_factors(make(merge_weights=False))
    layer(x).sum().backward()
    expected = layer.lora_A.grad.clone()
    layer.zero_grad()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        with torch.autocast("cpu", enabled=False):
            y = layer(x)
        y.sum().backward()
    torch.testing.assert_close(layer.lora_A.grad, expected, rtol=0.05, atol=0.05)


def test_forward_on_meta_and_with_fake_tensors(layer_case):
    _, make, _, x = layer_case
    for mode in (True, False):
        with torch.device("meta"):
            y = make().train(mode)(x.to("meta"))
        assert y.is_meta
        with FakeTensorMode():
            fake = torch.empty(x.shape, dtype=x.dtype)
            assert make().train(mode)(fake).shape == y.shape


def test_a_compiled_layer_can_be_copied(layer_case):
    _, make, _, x = layer_case
    layer = make()
    layer.compile(backend="eager")
    torch.testing.assert_close(copy.deepcopy(layer)(x), layer(x))


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")  # a trace takes shapes for constants
@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize("mode", [True, False])
def test_jit_trace(fill_factors, p, mode):
    layer = fill_factors(lora.MergedLinear(6, 4, 2, 2, p, [True, False])).train(mode)
    x = torch.randn(3, 6)
    traced = torch.jit.trace(layer, torch.randn(2, 6), check_trace=False)
    if p == 0 or not mode:
        close(traced(x), layer(x))
    else:
        assert not torch.equal(traced(x), traced(x))


def test_forward_mode_and_batched_gradients(layer_case, fill_factors):
    _, make, _, x = layer_case
    layer = fill_factors(make()).double()
    if not x.is_floating_point():
        return
    x = x.double().requires_grad_()
    tangent = torch.randn_like(x)
    _, got = torch.func.jvp(layer, (x.detach(),), (tangent,))
    close(got, layer(x + tangent) - layer(x))  # the layer is affine
    if isinstance(layer, lora.Linear):
        y = layer(x)
        grads = torch.randn(3, *y.shape, dtype=y.dtype)
        batched = torch.autograd.grad(y, x, grads, is_grads_batched=True, retain_graph=True)[0]
        singly = [torch.autograd.grad(y, x, grad, retain_graph=True)[0] for grad in grads]
        close(batched, torch.stack(singly))


def test_dropout_may_be_replaced():
    layer = lora.Linear(4, 4, 2, lora_dropout=0.5)
    layer.lora_dropout = nn.Identity()
    assert "lora_dropout=0.0" in repr(layer)
    x = torch.randn(3, 4)
    assert torch.equal(layer(x), layer(x))
