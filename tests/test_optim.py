"""parameter_groups: who learns at which rate, every parameter once, and PEFT's LoRA+ step by step."""

import copy
import itertools

import peft
import pytest
import torch
from adapter_helpers import assert_near
from peft.optimizers import create_loraplus_optimizer
from torch import nn

import lora


def make():
    """Layers of every kind, with vectors of both sorts, and a head."""
    torch.manual_seed(0)
    return nn.ModuleDict(
        {
            "table": nn.Embedding(12, 8),
            "inner": nn.Linear(8, 8),
            "fused": nn.Linear(8, 12),
            "line": nn.Conv1d(12, 8, 1),
            "norm": nn.LayerNorm(8),
            "head": nn.Linear(8, 4),
        }
    )


def rates(model, groups):
    """name of every parameter in the groups: (lr, weight_decay)."""
    names = {id(p): name for name, p in model.named_parameters()}
    return {
        names[id(p)]: (group["lr"], group["weight_decay"])
        for group in groups
        for p in group["params"]
    }


def assert_once(model, groups):
    """Every parameter that trains is in one group, once; no group is empty."""
    listed = [id(p) for group in groups for p in group["params"]]
    trains = [id(p) for p in model.parameters() if p.requires_grad]
    assert sorted(listed) == sorted(trains)
    assert len(set(listed)) == len(listed)
    assert all(group["params"] for group in groups)


def test_rates_of_all_that_can_train():
    model = lora.patch(
        make(),
        ["table", "inner", "line"],
        r=2,
        lora_alpha=4,
        bias="all",
        modules_to_save=["head"],
    )
    groups = lora.parameter_groups(model, 1e-3, 8, weight_decay=0.1, embedding_lr=1e-6)
    assert_once(model, groups)
    a, b, vector = (1e-3, 0.1), (8e-3, 0.1), (8e-3, 0.0)
    assert rates(model, groups) == {
        "table.lora_A": (1e-6, 0.1),
        "table.lora_B": (1e-6, 0.1),
        "inner.lora_A": a,
        "inner.lora_B": b,
        "line.lora_A": a,
        "line.lora_B": b,
        "inner.bias": vector,
        "fused.bias": vector,
        "line.bias": vector,
        "norm.bias": vector,
        "head.weight": a,
        "head.bias": vector,
    }


VARIANTS = {
    "LoRA": ({}, set()),
    "DoRA": ({"use_dora": True}, {"lora_magnitude"}),
    "lora_bias": ({"lora_bias": True}, {"lora_bias"}),
    "PiSSA": ({"init_lora_weights": "pissa"}, set()),
    "DoRA of PiSSA": ({"init_lora_weights": "pissa", "use_dora": True}, {"lora_magnitude"}),
}


@pytest.mark.parametrize("lorafa", [False, True])
@pytest.mark.parametrize("variant", VARIANTS)
def test_rates_of_the_variants(variant, lorafa):
    options, vectors = VARIANTS[variant]
    model = make()
    lora.patch(model, ["inner", "fused"], r=2, lora_alpha=4, use_lorafa=lorafa, **options)
    groups = lora.parameter_groups(model, 1e-3, 16, weight_decay=0.1)
    assert_once(model, groups)
    own = {"lora_B": (16e-3, 0.1), **dict.fromkeys(vectors, (16e-3, 0.0))}
    if not lorafa:
        own["lora_A"] = (1e-3, 0.1)
    assert rates(model, groups) == {
        f"{name}.{key}": rate for name in ("inner", "fused") for key, rate in own.items()
    }


def test_parts_are_in_the_groups_of_their_factors(make_phi3):
    model = lora.patch_phi3(make_phi3(), 4, use_dora=True, target_modules="all-linear")
    groups = lora.parameter_groups(model, 2e-4, 4)
    assert_once(model, groups)
    found = {(name.rpartition(".")[2], rate) for name, rate in rates(model, groups).items()}
    assert found == {
        ("lora_A", (2e-4, 0.0)),
        ("lora_B", (8e-4, 0.0)),
        ("lora_magnitude", (8e-4, 0.0)),
    }


def test_a_shared_layer_and_tied_modules_are_there_once():
    model = make()
    model["again"] = model["inner"]
    lora.patch(model, ["inner", "again"], r=2, lora_alpha=4, modules_to_save=["head"])
    assert model["inner"] is model["again"]
    assert_once(model, lora.parameter_groups(model, 1e-3))


def test_one_layer_is_a_model():
    layer = lora.Linear(8, 8, 2, bias=False)
    groups = lora.parameter_groups(layer, 1e-3, 16)
    assert_once(layer, groups)
    assert rates(layer, groups) == {"lora_A": (1e-3, 0.0), "lora_B": (16e-3, 0.0)}


def test_by_default_it_is_plain_lora():
    layer = lora.Linear(8, 8, 2, bias=False)
    groups = lora.parameter_groups(layer, 1e-3)
    assert rates(layer, groups) == {"lora_A": (1e-3, 0.0), "lora_B": (1e-3, 0.0)}


def test_groups_without_parameters_are_left_out():
    model = lora.patch(make(), ["table"], r=2, lora_alpha=4)
    (group,) = lora.parameter_groups(model, 1e-3)
    assert group["lr"] == 1e-3  # that of an embedding, if none is given
    assert len(group["params"]) == 2


@pytest.mark.parametrize("optimizer", [torch.optim.AdamW, torch.optim.SGD, torch.optim.RMSprop])
def test_an_optimizer_takes_the_groups(optimizer):
    model = lora.patch(make(), ["inner"], r=2, lora_alpha=4, use_dora=True)
    steps = optimizer(lora.parameter_groups(model, 1e-3, 4, weight_decay=0.1))
    assert sorted(group["lr"] for group in steps.param_groups) == [1e-3, 4e-3, 4e-3]
    assert sorted(group["weight_decay"] for group in steps.param_groups) == [0.0, 0.1, 0.1]
    before = copy.deepcopy(model)
    for _ in range(2):  # A has no gradient while B is zero
        model["inner"](torch.randn(3, 8)).square().sum().backward()
        steps.step()
        steps.zero_grad()
    moved = {n for n, p in model.named_parameters() if not torch.equal(p, before.get_parameter(n))}
    assert moved == {"inner.lora_A", "inner.lora_B", "inner.lora_magnitude"}


NUMBERS = [0, -1e-3, float("nan"), float("inf"), True, "1e-3", None]


@pytest.mark.parametrize(
    ("name", "value"),
    [
        (name, value)
        for name, value in itertools.product(["lr", "lr_ratio", "embedding_lr"], NUMBERS)
        if (name, value) != ("embedding_lr", None)
    ],
)
def test_a_rate_out_of_range_is_refused_by_name(name, value):
    model = lora.patch(make(), ["inner"], r=2, lora_alpha=4)
    with pytest.raises(ValueError, match=rf"^{name}={value!r}: expected a positive number"):
        lora.parameter_groups(model, **{"lr": 1e-3, name: value})


@pytest.mark.parametrize("value", [-0.1, float("nan"), float("inf"), "0.1", None])
def test_a_weight_decay_out_of_range_is_refused_by_name(value):
    model = lora.patch(make(), ["inner"], r=2, lora_alpha=4)
    with pytest.raises(ValueError, match=rf"^weight_decay={value!r}: expected a number, 0 or more"):
        lora.parameter_groups(model, 1e-3, weight_decay=value)


def test_a_model_of_which_nothing_trains_is_refused():
    model = lora.patch(make(), ["inner"], r=2, lora_alpha=4).requires_grad_(False)
    with pytest.raises(ValueError, match="nothing of this ModuleDict trains"):
        lora.parameter_groups(model, 1e-3)


# PEFT


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.one, self.two, self.head = nn.Linear(8, 12), nn.Linear(12, 8), nn.Linear(8, 4)

    def forward(self, x):
        return self.head(torch.tanh(self.two(torch.tanh(self.one(x)))))


@pytest.mark.parametrize("bias", ["none", "lora_only"])
@pytest.mark.parametrize(
    ("options", "weight_decay"),  # PEFT's of a magnitude is not 0, ours is
    [({}, 0.0), ({}, 0.05), ({"use_dora": True}, 0.0)],
    ids=["LoRA", "LoRA with weight decay", "DoRA"],
)
def test_ten_steps_are_those_of_pefts_lora_plus(options, weight_decay, bias):
    torch.manual_seed(0)
    base = Net().double()
    shared = {"target_modules": ["one", "two"], "r": 3, "lora_alpha": 6, "bias": bias, **options}
    config = peft.LoraConfig(**shared)
    theirs = peft.get_peft_model(copy.deepcopy(base), config, autocast_adapter_dtype=False)
    ours = lora.patch(copy.deepcopy(base), **shared)
    for name in ("one", "two"):
        layer = theirs.get_submodule(f"base_model.model.{name}")
        with torch.no_grad():
            getattr(ours, name).lora_A.copy_(layer.lora_A["default"].weight)
    rates = {"lr": 3e-3, "loraplus_lr_ratio": 16, "loraplus_weight_decay": weight_decay}
    their_steps = create_loraplus_optimizer(theirs, torch.optim.AdamW, **rates)
    our_steps = torch.optim.AdamW(lora.parameter_groups(ours, 3e-3, 16, weight_decay=weight_decay))
    x, target = torch.randn(16, 8).double(), torch.randn(16, 4).double()
    losses = []
    for model, optimizer in ((ours, our_steps), (theirs, their_steps)):
        losses.append([])
        for _ in range(10):
            loss = (model(x) - target).square().mean()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses[-1].append(loss.item())
    assert losses[0] == pytest.approx(losses[1], rel=1e-11)
    assert losses[0][-1] < 0.9 * losses[0][0]
    for name in ("one", "two"):
        layer, theirs_layer = getattr(ours, name), theirs.get_submodule(f"base_model.model.{name}")
        assert_near(layer.lora_A, theirs_layer.lora_A["default"].weight, 1e-10)
        assert_near(layer.lora_B, theirs_layer.lora_B["default"].weight, 1e-10)
        assert_near(layer.bias, theirs_layer.base_layer.bias, 1e-10)
        assert torch.equal(layer.bias, getattr(base, name).bias) is (bias == "none")
        if options:
            magnitude = theirs_layer.lora_magnitude_vector["default"].weight
            assert_near(layer.lora_magnitude, magnitude, 1e-10)
