"""The variants against PEFT: what they compute, how they train, and their adapters, both ways."""

import copy
import json
import warnings
from dataclasses import replace

import pytest
import torch
from adapter_helpers import (
    CONFIG,
    IDS,
    assert_near,
    edit,
    logits,
    lora_layers,
    move,
    of_file,
    refused,
    unchanged,
)
from peft import LoraConfig, PeftModel, get_peft_model
from peft.optimizers import create_lorafa_optimizer
from safetensors.torch import load_file, save_file
from torch import nn
from transformers.pytorch_utils import Conv1D

import lora
from lora.__main__ import main
from lora.adapter import AdapterError, adapter_of, fuse, read_adapter, split, write_adapter
from lora.adapter.merge import merge_checkpoint

# PEFT says so of a layer without a bias; loading and running it is right.

TARGETS = ["one", "two"]
PISSA = {"init_lora_weights": "pissa"}
VARIANTS = {  # lora's options, PEFT's options
    "LoRA": ({}, {}),
    "rsLoRA": ({"use_rslora": True}, {"use_rslora": True}),
    "DoRA": ({"use_dora": True}, {"use_dora": True}),
    "DoRA and rsLoRA": (
        {"use_dora": True, "use_rslora": True},
        {"use_dora": True, "use_rslora": True},
    ),
    "lora_bias": ({"lora_bias": True}, {"lora_bias": True}),
    "PiSSA": (PISSA, PISSA),
    "PiSSA and rsLoRA": ({**PISSA, "use_rslora": True}, {**PISSA, "use_rslora": True}),
    "DoRA of PiSSA": ({**PISSA, "use_dora": True}, {**PISSA, "use_dora": True}),
    "LoRA-FA": ({"use_lorafa": True}, {}),
    "LoRA-FA and DoRA": ({"use_lorafa": True, "use_dora": True}, {"use_dora": True}),
}
TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5}


class Net(nn.Module):
    def __init__(self, bias=True):
        super().__init__()
        self.one, self.two = nn.Linear(8, 12, bias), nn.Linear(12, 10, bias)
        self.head = nn.Linear(10, 4)

    def forward(self, x):
        return self.head(torch.tanh(self.two(torch.tanh(self.one(x)))))


def net(dtype=torch.float64, bias=True):
    torch.manual_seed(0)
    return Net(bias).to(dtype).eval()


def inputs(dtype=torch.float64):
    torch.manual_seed(1)
    return torch.randn(16, 8).to(dtype), torch.randn(16, 4).to(dtype)


def output(model, x=None):
    with torch.no_grad():
        return model(inputs()[0] if x is None else x)


def their_layer(model, name):
    return model.get_submodule(f"base_model.model.{name}")


def their_own(layer):
    """PEFT's parameters of a layer, by the names that they have in ours."""
    found = {"lora_A": layer.lora_A["default"].weight, "lora_B": layer.lora_B["default"].weight}
    if layer.lora_bias["default"]:
        found["lora_bias"] = layer.lora_B["default"].bias
    if "default" in layer.lora_magnitude_vector:
        found["lora_magnitude"] = layer.lora_magnitude_vector["default"].weight
    return found


def copied_over(ours, theirs):
    """Give our layers the values of PEFT's; PiSSA's first factors when PEFT has just made them."""
    with torch.no_grad():
        for name, layer in lora_layers(ours):
            for own, value in their_own(their_layer(theirs, name)).items():
                layer.get_parameter(own).copy_(value)
    return ours


def both(variant, dtype, bias=True):
    """Our model and PEFT's with the same first factors on the same function."""
    options, their_options = VARIANTS[variant]
    shared = {"target_modules": TARGETS, "r": 3, "lora_alpha": 6}
    base = net(torch.float32, bias)  # PEFT makes PiSSA's factors in half and single precision alone
    theirs = get_peft_model(copy.deepcopy(base), LoraConfig(**shared, **their_options)).to(dtype)
    ours = lora.patch(base.to(dtype), **shared, **options)
    copied_over(ours, theirs)
    with torch.no_grad():
        for name, layer in lora_layers(ours):
            if "init_lora_weights" in layer.variant:
                # Its base is W - scaling B₀ A₀, rounded to fp32: in float64 ours is made to fit.
                layer.lora_A0.copy_(layer.lora_A)
                layer.lora_B0.copy_(layer.lora_B)
                if dtype == torch.float64:
                    residual = their_layer(theirs, name).base_layer.weight
                    layer.weight.copy_(residual + layer.scaling * layer.lora_B @ layer.lora_A)
            if "use_lorafa" in layer.variant:
                their_own(their_layer(theirs, name))["lora_A"].requires_grad_(False)
    return ours.train(), theirs.train()


def gradients(ours, theirs):
    """(name, our gradient, PEFT's) of every parameter that trains; the same ones do."""
    for name, layer in lora_layers(ours):
        peers = their_own(their_layer(theirs, name))
        mine = {o: p for o, p in layer.update_parameters().items() if p.requires_grad}
        assert mine.keys() == {own for own, p in peers.items() if p.requires_grad}
        for own, parameter in mine.items():
            yield f"{name}.{own}", parameter.grad, peers[own].grad


def steps(model, optimizer, dtype, number=10):
    """The losses of as many steps."""
    (x, target), losses = inputs(dtype), []
    for _ in range(number):
        loss = (model(x) - target).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def adamw(model):
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.02)


@pytest.fixture(params=[True, False], ids=["bias", "no bias"])
def bias(request):
    return request.param


# Computing and training


@pytest.mark.parametrize("dtype", TOLERANCE, ids=["fp64", "fp32"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_outputs_and_gradients_are_pefts(variant, dtype, bias):
    ours, theirs = both(variant, dtype, bias)
    for name, _ in lora_layers(ours):
        move(p for p in their_own(their_layer(theirs, name)).values() if p.requires_grad)
    copied_over(ours, theirs)
    x, target = inputs(dtype)
    results = []
    for model in (ours, theirs):
        y = model(x)
        (y - target).square().mean().backward()
        results.append(y.detach())
    assert_near(*results, TOLERANCE[dtype])
    found = list(gradients(ours, theirs))
    assert len(found) >= 2
    for _, mine, wanted in found:
        assert_near(mine, wanted, TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", TOLERANCE, ids=["fp64", "fp32"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_ten_steps_from_the_beginning_are_pefts(variant, dtype, bias):
    ours, theirs = both(variant, dtype, bias)
    losses, wanted = (steps(model, adamw(model), dtype) for model in (ours, theirs))
    assert losses == pytest.approx(wanted, rel=TOLERANCE[dtype])
    assert losses[-1] < 0.9 * losses[0]
    assert_near(output(ours, inputs(dtype)[0]), output(theirs, inputs(dtype)[0]), TOLERANCE[dtype])


@pytest.mark.parametrize("init", ["pissa", "pissa_niter_32"])
def test_pissas_first_factors_are_pefts(init):
    """Up to the sign of each singular vector, which is anyone's choice."""
    shared = {"target_modules": TARGETS, "r": 3, "lora_alpha": 6, "init_lora_weights": init}
    base = net(torch.float32)
    theirs = get_peft_model(copy.deepcopy(base), LoraConfig(**shared))
    ours = lora.patch(base, **shared)
    tolerance = 1e-5 if init == "pissa" else 1e-2
    for name, layer in lora_layers(ours):
        wanted = their_own(their_layer(theirs, name))
        assert_near(layer.lora_A.abs(), wanted["lora_A"].abs(), tolerance)
        assert_near(layer.lora_B.abs(), wanted["lora_B"].abs(), tolerance)
        update = wanted["lora_B"] @ wanted["lora_A"]
        assert_near(layer.lora_B @ layer.lora_A, update, tolerance)


@pytest.mark.parametrize("rslora", [False, True])
def test_pefts_optimizer_of_lorafa_takes_our_layers(rslora):
    """In float64, since it rounds the others' gradients to bf16."""
    shared = {"target_modules": TARGETS, "r": 3, "lora_alpha": 6, "use_rslora": rslora}
    base = net()
    theirs = get_peft_model(copy.deepcopy(base), LoraConfig(**shared))
    ours = copied_over(lora.patch(base, **shared, use_lorafa=True), theirs)
    their_steps = create_lorafa_optimizer(theirs, r=3, lora_alpha=6, lr=0.02)
    own = {n: p for n, p in ours.named_parameters() if "lora_" in n}
    assert [n for n, p in own.items() if p.requires_grad] == ["one.lora_B", "two.lora_B"]
    group = {
        "params": list(own.values()),
        "names": list(own),
        "scaling_factors": [ours.get_submodule(n.rpartition(".")[0]).scaling for n in own],
    }
    our_steps = type(their_steps)([group], lr=0.02)
    losses, wanted = (
        steps(model, optimizer, torch.float64)
        for model, optimizer in ((ours, our_steps), (theirs, their_steps))
    )
    assert losses == pytest.approx(wanted, rel=1e-10)


# Adapters: models


class Fused(nn.Module):
    """A fused projection, and one that is not."""

    def __init__(self, bias=True):
        super().__init__()
        self.qkv_proj, self.o_proj = nn.Linear(8, 12, bias), nn.Linear(6, 4, bias)

    def forward(self, x):
        q, k, v = self.qkv_proj(x).split([6, 3, 3], -1)
        return self.o_proj(torch.tanh(q * torch.cat([k, v], -1)))


def fused(bias=True, dtype=torch.float64):
    torch.manual_seed(0)
    return Fused(bias).to(dtype).eval()


OURS = {
    "LoRA": {},
    "rsLoRA": {"use_rslora": True},
    "DoRA": {"use_dora": True},
    "DoRA and rsLoRA": {"use_dora": True, "use_rslora": True},
    "lora_bias": {"lora_bias": True},
    "lora_bias and rsLoRA": {"lora_bias": True, "use_rslora": True},
    "PiSSA": PISSA,
    "PiSSA and rsLoRA": {**PISSA, "use_rslora": True},
    "LoRA-FA": {"use_lorafa": True},
    "all with DoRA": {**PISSA, "use_dora": True, "use_rslora": True, "use_lorafa": True},
    "all with lora_bias": {**PISSA, "lora_bias": True, "use_rslora": True, "use_lorafa": True},
}
MASKS = {"all parts": [True, True, True], "two parts": [True, False, True]}


@pytest.fixture(params=OURS)
def options(request):
    return OURS[request.param]


@pytest.fixture(params=["linear", *MASKS])
def make(request):
    """(the plain model, it patched), in float64 by default; the parts' sizes are not equal."""

    def plain(bias=True, dtype=torch.float64):
        return net(dtype, bias) if request.param == "linear" else fused(bias, dtype)

    def patched(bias=True, dtype=torch.float64, **options):
        model = plain(bias, dtype)
        if request.param == "linear":
            return lora.patch(model, TARGETS, r=3, lora_alpha=6, lora_dropout=0.1, **options).eval()
        return with_parts(model, MASKS[request.param], **options)

    return plain, patched


def with_parts(model, mask, **options):
    parts = {"enable_lora": mask, "out_splits": [6, 3, 3]}
    model.qkv_proj = lora.MergedLinear.from_module(model.qkv_proj, 3, 6, **parts, **options)
    model.o_proj = lora.Linear.from_module(model.o_proj, 2, 5, 0.1, **options)
    lora.mark_only_lora_as_trainable(model)
    return model.eval()


def trained(model):
    """The model with other values in what trains."""
    move(p for p in model.parameters() if p.requires_grad)
    return model


def in_peft(plain, folder, **options):
    """PEFT's model with the adapter; every key of the file is one of its own, and the reverse."""
    theirs = PeftModel.from_pretrained(plain, folder, **options)
    found = theirs.load_adapter(folder, "again", **options)
    assert not found.unexpected_keys
    assert not [key for key in found.missing_keys if "again" in key]
    return theirs.eval()


def assert_same_adapter(one, other):
    """The same layers, of the same kinds, with the same tensors to the bit; the same ones train."""
    layers, others = dict(lora_layers(one)), dict(lora_layers(other))
    assert layers.keys() == others.keys()
    for name, layer in layers.items():
        there = others[name]
        assert type(layer) is type(there)
        for fact in ("r", "lora_alpha", "scaling", "variant", "out_splits", "enable_lora"):
            assert getattr(layer, fact) == getattr(there, fact), (name, fact)
        assert layer.lora_dropout.p == there.lora_dropout.p
    state, theirs = one.state_dict(), other.state_dict()
    assert list(state) == list(theirs)
    assert all(torch.equal(state[key], theirs[key]) for key in state)
    assert [t.dtype for t in state.values()] == [t.dtype for t in theirs.values()]
    trains, now = ({n: p.requires_grad for n, p in m.named_parameters()} for m in (one, other))
    assert trains == now


# Adapters: from lora to PEFT


def test_peft_computes_what_we_saved(make, options, bias, tmp_path):
    plain, patched = make
    ours = trained(patched(bias, **options))
    lora.save_adapter(ours, tmp_path)
    theirs = in_peft(plain(bias), tmp_path)
    wanted = output(ours)
    assert (wanted - output(plain(bias))).abs().max() > 0.01
    assert_near(output(theirs), wanted, 1e-12)
    ranks = {n: layer.r["default"] for n, layer in theirs.named_modules() if hasattr(layer, "r")}
    for name, layer in lora_layers(ours):
        twice = 2 if "init_lora_weights" in options else 1
        parts = sum(layer.enable_lora or [True])
        assert ranks[f"base_model.model.{name}"] == layer.r * parts * twice
    if bias or "lora_bias" not in options:
        merged = theirs.merge_and_unload()
        assert_near(output(merged), wanted, 1e-12)
        state = lora.merged_state_dict(ours)
        assert state.keys() == merged.state_dict().keys()
        for name, value in merged.state_dict().items():
            assert_near(state[name], value, 1e-12)


def test_peft_computes_what_we_saved_of_phi3(options, make_phi3, tmp_path):
    plain = make_phi3().double()
    ours = lora.patch_phi3(copy.deepcopy(plain), 4, 8, 0.1, "all-linear", **options).eval()
    lora.save_adapter(trained(ours), tmp_path)
    theirs = in_peft(copy.deepcopy(plain), tmp_path)
    with torch.no_grad():
        wanted = ours(IDS).logits
        assert (wanted - plain(IDS).logits).abs().max() > 0.01
        assert_near(theirs(IDS).logits, wanted, 1e-11)
    again = copy.deepcopy(plain)
    lora.load_adapter(again, tmp_path)
    assert_same_adapter(ours, again)
    with torch.no_grad():
        assert torch.equal(again.eval()(IDS).logits, wanted)


@pytest.mark.parametrize("variant", ["rsLoRA", "DoRA", "PiSSA", "DoRA and rsLoRA"])
def test_fp32_factors_on_a_bf16_phi3_are_as_exact_as_pefts(variant, make_phi3, tmp_path):
    plain = make_phi3().bfloat16()
    ours = lora.patch_phi3(copy.deepcopy(plain), 4, 8, 0.1, "all-linear", **OURS[variant]).eval()
    move(p for p in ours.parameters() if p.requires_grad and p.ndim == 2)
    lora.save_adapter(ours, tmp_path)
    theirs = in_peft(copy.deepcopy(plain), tmp_path)
    wanted = logits(copy.deepcopy(theirs).double())
    assert_near(logits(copy.deepcopy(ours).double()), wanted, 1e-10)
    error, their_error = ((logits(m).double() - wanted).abs().max() for m in (ours, theirs))
    assert error <= 2 * their_error


@pytest.mark.parametrize("variant", ["rsLoRA", "DoRA", "lora_bias", "PiSSA", "all with DoRA"])
def test_peft_computes_what_we_saved_of_a_transposed_layer(variant, tmp_path):
    def plain():
        torch.manual_seed(0)
        return nn.ModuleDict({"wide": Conv1D(12, 8)}).double()

    x = inputs()[0]
    ours = trained(lora.patch(plain(), ["wide"], r=3, lora_alpha=6, **OURS[variant]))
    lora.save_adapter(ours, tmp_path)
    theirs = in_peft(plain(), tmp_path)
    assert_near(output(their_layer(theirs, "wide"), x), output(ours.wide, x), 1e-12)
    again = plain()
    lora.load_adapter(again, tmp_path)
    assert_same_adapter(ours, again)
    assert torch.equal(output(again.wide, x), output(ours.wide, x))


def test_what_the_config_says(tmp_path):
    def config_of(**options):
        lora.save_adapter(
            trained(lora.patch(net(), TARGETS, r=3, lora_alpha=6, **options)), tmp_path
        )
        return json.loads((tmp_path / CONFIG).read_text())

    said = config_of(use_dora=True, use_rslora=True)
    assert (said["use_dora"], said["use_rslora"], said["lora_bias"]) == (True, True, False)
    assert (said["r"], said["lora_alpha"]) == (3, 6)
    said = config_of(lora_bias=True)
    assert (said["use_dora"], said["use_rslora"], said["lora_bias"]) == (False, False, True)
    said = config_of(init_lora_weights="pissa")
    assert (said["init_lora_weights"], said["r"], said["lora_alpha"]) == (True, 6, 12)


def test_layers_of_different_variants_are_refused_by_pefts_format(tmp_path):
    model = net()
    model.one = lora.Linear.from_module(model.one, 3, 6, use_dora=True)
    model.two = lora.Linear.from_module(model.two, 3, 6)
    lora.mark_only_lora_as_trainable(model)
    with unchanged(model), pytest.raises(lora.AdapterError, match="two has no magnitude"):
        lora.save_adapter(model, tmp_path)
    assert not list(tmp_path.iterdir())


# Adapters: from PEFT to lora

THEIRS = {name: OURS[name] for name in ("rsLoRA", "DoRA", "DoRA and rsLoRA")}
THEIRS |= {name: OURS[name] for name in ("lora_bias", "lora_bias and rsLoRA")}


@pytest.mark.parametrize("variant", THEIRS)
def test_we_compute_and_train_on_what_peft_saved(variant, bias, tmp_path):
    shared = {"target_modules": TARGETS, "r": 3, "lora_alpha": 6, "lora_dropout": 0.1}
    config = LoraConfig(**shared, rank_pattern={"two": 2}, **THEIRS[variant])
    theirs = trained(get_peft_model(net(bias=bias), config)).eval()
    theirs.save_pretrained(tmp_path / "theirs")
    ours = net(bias=bias)
    report = lora.load_adapter(ours, tmp_path / "theirs")
    assert set(report.loaded) == set(TARGETS)
    assert all(layer.variant == THEIRS[variant] for _, layer in lora_layers(ours))
    assert all(layer.lora_dropout.p == 0.1 for _, layer in lora_layers(ours))
    assert_near(output(ours.eval()), output(theirs), 1e-13)
    lora.save_adapter(ours, tmp_path / "ours")
    then, now = of_file(tmp_path / "theirs"), of_file(tmp_path / "ours")
    assert then.keys() == now.keys()
    assert all(torch.equal(then[key], now[key]) for key in then)
    again = in_peft(net(bias=bias), tmp_path / "ours")
    assert torch.equal(output(again), output(theirs))
    # in eval mode, since dropout's masks are not PEFT's
    losses, wanted = (steps(m, adamw(m), torch.float64) for m in (ours, theirs))
    assert losses == pytest.approx(wanted, rel=1e-10)
    for name, layer in lora_layers(ours):
        for own, value in their_own(their_layer(theirs, name)).items():
            assert_near(layer.get_parameter(own), value, 1e-9)


@pytest.mark.parametrize("variant", ["rsLoRA", "DoRA", "DoRA and rsLoRA"])
def test_we_compute_what_peft_saved_of_phi3(variant, make_phi3, tmp_path):
    plain = make_phi3().double()
    config = LoraConfig(target_modules="all-linear", r=4, lora_alpha=8, **THEIRS[variant])
    theirs = trained(get_peft_model(copy.deepcopy(plain), config)).eval()
    theirs.save_pretrained(tmp_path)
    lora.load_adapter(plain, tmp_path)
    assert {type(layer) for _, layer in lora_layers(plain)} == {lora.Linear}
    with torch.no_grad():
        assert_near(plain(IDS).logits, theirs(IDS).logits, 1e-11)


def test_we_compute_what_peft_saved_of_a_transposed_dora_layer(tmp_path):
    def plain():
        torch.manual_seed(0)
        return nn.ModuleDict({"wide": Conv1D(12, 8)}).double()

    shared = {"r": 3, "lora_alpha": 6, "use_dora": True, "fan_in_fan_out": True}
    theirs = trained(get_peft_model(plain(), LoraConfig(target_modules=["wide"], **shared)))
    theirs.save_pretrained(tmp_path)
    ours, x = plain(), inputs()[0]
    lora.load_adapter(ours, tmp_path)
    assert_near(output(ours.wide, x), output(their_layer(theirs, "wide"), x), 1e-12)


@pytest.mark.parametrize("init", ["pissa", "pissa_niter_4"])
def test_pefts_pissa_is_refused_by_name_since_its_base_is_another(init, tmp_path):
    shared = {"target_modules": TARGETS, "r": 3, "lora_alpha": 6, "init_lora_weights": init}
    theirs = trained(get_peft_model(net(torch.float32), LoraConfig(**shared)))
    theirs.save_pretrained(tmp_path)
    refused(net(torch.float32), tmp_path, f"init_lora_weights='{init}'")


@pytest.mark.parametrize(
    ("variant", "key", "named"),
    [
        ("DoRA", "two.lora_magnitude_vector", "missing tensor two.magnitude"),
        ("lora_bias", "two.lora_B.bias", "missing tensor two.lora_bias"),
    ],
)
def test_a_vector_that_is_missing_or_of_no_use_is_refused_by_name(variant, key, named, tmp_path):
    shared = {"target_modules": TARGETS, "r": 3, "lora_alpha": 6}
    theirs = trained(get_peft_model(net(), LoraConfig(**shared, **THEIRS[variant])))
    theirs.save_pretrained(tmp_path)
    whole = of_file(tmp_path)
    without = {k: t for k, t in whole.items() if not k.endswith(key)}
    assert len(without) == len(whole) - 1
    edit(tmp_path, tensors=lambda _: without)
    refused(net(), tmp_path, named)
    edit(tmp_path, tensors=lambda _: whole)
    for value in (whole[f"base_model.model.{key}"][:-1], whole[f"base_model.model.{key}"] / 0):
        edit(tmp_path, tensors=lambda ts, v=value: {**ts, f"base_model.model.{key}": v.clone()})
        refused(net(), tmp_path, "two")
    edit(tmp_path, tensors=lambda _: whole)
    (flag,) = THEIRS[variant]
    edit(tmp_path, config=lambda fields: {**fields, flag: False})
    refused(net(), tmp_path, "unexpected tensor one")


# Adapters: there and back


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_saved_and_loaded_is_the_same_to_the_bit(make, options, dtype, tmp_path):
    plain, patched = make
    ours = trained(patched(dtype=dtype, **options))
    lora.save_adapter(ours, tmp_path)
    again = plain(dtype=dtype)
    report = lora.load_adapter(again, tmp_path)
    assert report.verified
    assert report.base == "matches"
    assert_same_adapter(ours, again)
    x = inputs(dtype)[0]
    assert torch.equal(output(again.eval(), x), output(ours, x))
    for model in (ours, again):
        torch.manual_seed(5)
        steps(model.train(), adamw(model), dtype, 5)
    assert_same_adapter(ours, again)
    with lora.disabled(again):
        assert torch.equal(output(again, x), output(plain(dtype=dtype), x))


def test_loaded_into_a_model_that_is_patched_alike(make, options, tmp_path):
    _, patched = make
    ours, other = trained(patched(**options)), trained(trained(patched(**options)))
    lora.save_adapter(ours, tmp_path)
    assert not torch.equal(output(ours), output(other))
    lora.load_adapter(other, tmp_path)
    assert_same_adapter(ours, other)
    assert torch.equal(output(ours), output(other))


@pytest.mark.parametrize("variant", ["DoRA", "lora_bias", "PiSSA", "rsLoRA"])
def test_a_model_with_layers_of_another_variant_is_refused_and_unchanged(variant, make, tmp_path):
    _, patched = make
    lora.save_adapter(trained(patched(**OURS[variant])), tmp_path / "variant")
    lora.save_adapter(trained(patched()), tmp_path / "LoRA")
    refused(trained(patched()), tmp_path / "variant", "misfit|misshapen")
    refused(trained(patched(**OURS[variant])), tmp_path / "LoRA", "misfit|misshapen")


def test_adapters_of_several_variants_on_one_model(make, tmp_path):
    plain, patched = make
    wanted = {}
    for variant in OURS:
        ours = trained(patched(**OURS[variant]))
        lora.save_adapter(ours, tmp_path / variant)
        wanted[variant] = output(ours)
    model = plain()
    for variant in OURS:
        lora.load_adapter(model, tmp_path / variant, name=variant)
    for variant in reversed(OURS):
        lora.set_adapter(model, variant)
        assert torch.equal(output(model.eval()), wanted[variant])
        lora.save_adapter(model, tmp_path / "again")
        then, now = of_file(tmp_path / variant), of_file(tmp_path / "again")
        assert then.keys() == now.keys()
        assert all(torch.equal(then[key], now[key]) for key in then)


# Conversions


class Separate(nn.Module):
    """What `Fused` computes, with a layer for each of its parts."""

    def __init__(self, model):
        super().__init__()
        rows = zip(("q_proj", "k_proj", "v_proj"), (6, 3, 3), (0, 6, 9), strict=True)
        for name, size, start in rows:
            part = nn.Linear(8, size).double()
            with torch.no_grad():
                part.weight.copy_(model.qkv_proj.weight[start : start + size])
                part.bias.copy_(model.qkv_proj.bias[start : start + size])
            setattr(self, name, part)
        self.o_proj = copy.deepcopy(model.o_proj)

    def forward(self, x):
        q, k, v = self.q_proj(x), self.k_proj(x), self.v_proj(x)
        return self.o_proj(torch.tanh(q * torch.cat([k, v], -1)))


@pytest.mark.parametrize("mask", MASKS)
def test_split_is_the_same_on_separate_projections(mask, options, tmp_path):
    ours = trained(with_parts(fused(), MASKS[mask], **options))
    lora.save_adapter(ours, tmp_path / "fused")
    write_adapter(split(read_adapter(tmp_path / "fused").checked()), tmp_path / "separate")
    model = Separate(fused())
    report = lora.load_adapter(model, tmp_path / "separate")
    names = [n for n, on in zip(("q_proj", "k_proj", "v_proj"), MASKS[mask], strict=True) if on]
    assert set(report.loaded) == {*names, "o_proj"}
    assert_near(output(model.eval()), output(ours), 1e-13)
    theirs = in_peft(Separate(fused()), tmp_path / "separate")
    assert_near(output(theirs), output(ours), 1e-12)


@pytest.mark.parametrize("mask", MASKS)
def test_fuse_is_the_inverse_of_split(mask, options):
    ours = trained(with_parts(fused(), MASKS[mask], **options))
    adapter = adapter_of(ours)
    if mask == "two parts" and "use_dora" in options:
        with pytest.raises(lora.AdapterError, match=r"qkv_proj: DoRA's magnitudes .* are unknown"):
            fuse(split(adapter))
        return
    back = fuse(split(adapter))
    assert back.layers.keys() == adapter.layers.keys()
    for name, layer in adapter.layers.items():
        assert back.layers[name].kind == layer.kind
        for fact in ("scaling", "frozen_rank", "use_lorafa", "enable_lora", "out_splits"):
            assert getattr(back.layers[name], fact) == getattr(layer, fact), (name, fact)
        wanted, found = layer.parameters(), back.layers[name].parameters()
        assert found.keys() == wanted.keys()
        assert all(torch.equal(found[own], value) for own, value in wanted.items())


@pytest.mark.parametrize("variant", THEIRS)
def test_a_dense_update_of_pefts_is_split_too(variant, tmp_path):
    shared = {"target_modules": ["qkv_proj", "o_proj"], "r": 3, "lora_alpha": 6}
    theirs = trained(get_peft_model(fused(), LoraConfig(**shared, **THEIRS[variant]))).eval()
    theirs.save_pretrained(tmp_path / "theirs")
    adapter = split(read_adapter(tmp_path / "theirs").checked(), [6, 3, 3])
    write_adapter(adapter, tmp_path / "separate")
    model = Separate(fused())
    lora.load_adapter(model, tmp_path / "separate")
    assert_near(output(model.eval()), output(theirs), 1e-13)
    write_adapter(fuse(adapter), tmp_path / "fused")
    model = fused()
    lora.load_adapter(model, tmp_path / "fused")
    assert_near(output(model.eval()), output(theirs), 1e-13)


def test_parts_of_different_variants_are_not_fused():
    apart = split(adapter_of(with_parts(fused(), MASKS["all parts"])), [6, 3, 3])
    layers = dict(apart.layers)
    layers["q_proj"] = replace(layers["q_proj"], use_lorafa=True)
    with pytest.raises(AdapterError, match="one variant"):
        fuse(apart.replaced(layers=layers))


# What a file says


@pytest.mark.parametrize("variant", ["lora_bias", "PiSSA"])
def test_an_untrained_adapter_is_told(variant, make, tmp_path):
    plain, patched = make
    lora.save_adapter(patched(**OURS[variant]), tmp_path)
    with pytest.warns(UserWarning, match="does nothing yet"):
        lora.load_adapter(plain(), tmp_path)


def test_a_rank_is_told_with_its_own_alpha(tmp_path, capsys):
    ours = lora.patch(net(), TARGETS, r=3, lora_alpha=6, **PISSA)
    lora.save_adapter(trained(ours), tmp_path)
    assert main(["info", str(tmp_path), "--json"]) == 0
    layers = json.loads(capsys.readouterr().out)["layers"]
    assert {(x["r"], x["lora_alpha"], x["scaling"]) for x in layers} == {(3, 6, 2.0)}
    assert {tuple(x["variant"]) for x in layers} == {("pissa",)}


# Other dtypes and devices


def test_a_magnitude_narrower_than_its_weight_is_saved(tmp_path):
    """As of an adapter in bf16 that was loaded into the base in fp32."""
    ours = trained(lora.patch(net(torch.float32), TARGETS, r=3, lora_alpha=6, use_dora=True))
    lora.save_adapter(ours.bfloat16(), tmp_path / "half")
    wide = net(torch.bfloat16).float()
    lora.load_adapter(wide, tmp_path / "half")
    assert wide.one.lora_magnitude.dtype == torch.bfloat16
    lora.save_adapter(wide, tmp_path / "again")
    other = net(torch.bfloat16).float()
    lora.load_adapter(other, tmp_path / "again")
    assert_same_adapter(wide, other)


@pytest.mark.parametrize("variant", ["DoRA", "lora_bias"])
def test_a_state_dict_goes_into_a_model_on_the_meta_device(variant, tmp_path):
    ours = trained(with_parts(fused(), MASKS["two parts"], **OURS[variant]))
    torch.save(lora.lora_state_dict(ours), tmp_path / "lora.pt")
    there = copy.deepcopy(with_parts(fused(), MASKS["two parts"], **OURS[variant])).to("meta")
    lora.load_adapter(there, tmp_path / "lora.pt")
    values = lora.lora_state_dict(there)
    assert all(torch.equal(values[key], t) for key, t in lora.lora_state_dict(ours).items())


# Merging a checkpoint


@pytest.mark.parametrize("half", [False, True])
def test_what_was_not_trained_merges_to_the_bit(half, tmp_path):
    """The rows of a part without an update, and with B = 0 all of them."""
    dtype = torch.bfloat16 if half else torch.float32
    base = checkpoint(fused(dtype=dtype), tmp_path / "base")
    ours = with_parts(fused(dtype=torch.float32), MASKS["two parts"], use_dora=True).to(dtype)
    rows = slice(None) if half else slice(6, 9)
    if half:
        ours.qkv_proj._derive_from_weight()
    else:
        trained(ours)
    lora.save_adapter(ours, tmp_path / "adapter")
    merge_checkpoint(base, read_adapter(tmp_path / "adapter").checked(), tmp_path / "merged")
    found = load_file(tmp_path / "merged" / "model.safetensors")
    assert torch.equal(found["qkv_proj.weight"][rows], fused(dtype=dtype).qkv_proj.weight[rows])


def checkpoint(model, folder):
    folder.mkdir()
    save_file(model.state_dict(), folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_text('{"tie_word_embeddings": false}')
    return folder


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_a_merged_checkpoint_is_the_merged_model(make, options, dtype, tmp_path):
    plain, patched = make
    base = checkpoint(plain(dtype=dtype), tmp_path / "base")
    ours = trained(patched(dtype=dtype, **options))
    lora.save_adapter(ours, tmp_path / "adapter")
    merge_checkpoint(base, read_adapter(tmp_path / "adapter").checked(), tmp_path / "merged")
    found = load_file(tmp_path / "merged" / "model.safetensors")
    wanted = lora.unpatch(ours, merge=True).state_dict()
    assert found.keys() == wanted.keys()
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-6, torch.bfloat16: 2**-7}[dtype]
    for name, value in wanted.items():
        assert found[name].dtype == dtype
        assert_near(found[name].double(), value.double(), tolerance)
    was, merged = plain().state_dict(), {name for name, _ in lora_layers(patched())}
    assert all(
        not torch.equal(found[f"{name}.weight"].double(), was[f"{name}.weight"]) for name in merged
    )


def test_a_merged_phi3_is_the_merged_model(options, make_phi3, tmp_path):
    plain = make_phi3()
    plain.save_pretrained(tmp_path / "base")
    ours = lora.patch_phi3(copy.deepcopy(plain), 4, 8, 0.0, "all-linear", **options)
    lora.save_adapter(trained(ours), tmp_path / "adapter")
    adapter = read_adapter(tmp_path / "adapter").checked()
    if "lora_bias" in options:  # the projections have no bias
        with pytest.raises(lora.AdapterError, match="has a bias"):
            merge_checkpoint(tmp_path / "base", adapter, tmp_path / "merged")
        assert not (tmp_path / "merged").exists()
        return
    merge_checkpoint(tmp_path / "base", adapter, tmp_path / "merged")
    wanted = lora.unpatch(ours, merge=True).state_dict()
    merged = type(plain).from_pretrained(tmp_path / "merged").state_dict()
    assert merged.keys() == wanted.keys()
    for name, value in wanted.items():
        assert_near(merged[name], value, 1e-6)


@pytest.mark.parametrize("variant", THEIRS)
def test_a_checkpoint_merged_with_pefts_adapter_is_pefts(variant, tmp_path):
    shared = {"target_modules": TARGETS, "r": 3, "lora_alpha": 6}
    theirs = trained(get_peft_model(net(), LoraConfig(**shared, **THEIRS[variant])))
    theirs.save_pretrained(tmp_path / "adapter")
    base = checkpoint(net(), tmp_path / "base")
    merge_checkpoint(base, read_adapter(tmp_path / "adapter").checked(), tmp_path / "merged")
    found = load_file(tmp_path / "merged" / "model.safetensors")
    with warnings.catch_warnings():
        wanted = theirs.merge_and_unload().state_dict()
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        assert_near(found[name], value, 1e-12)
