"""Several adapters on one model, one of them active; what cannot be beside another is refused."""

import copy

import pytest
import torch
from adapter_helpers import (
    FOUR,
    QKV_A,
    changed,
    edit,
    in_peft,
    logits,
    lora_layers,
    make_biased,
    move,
    of_file,
    plain_file,
    refused,
    set_first,
    train,
    unchanged,
)
from torch import nn
from torch._dynamo.testing import CompileCounter

import lora


def three_adapters(make, fill_factors, folder):
    """Folders of adapters of different targets, kinds and ranks, the last with a head."""
    parts = lora.patch_phi3(make(), 4, 8, 0.0, FOUR)
    lora.save_adapter(fill_factors(parts), folder / "parts")
    plain_file(make(), folder / "dense", fill_factors, target_modules=["qkv_proj"], r=7)
    options = {"target_modules": ["o_proj"], "r": 2, "modules_to_save": ["lm_head"]}
    theirs = in_peft(make(), fill_factors, lora_alpha=8, **options)
    move(p for n, p in theirs.named_parameters() if "modules_to_save" in n)
    theirs.save_pretrained(folder / "head")
    return ["parts", "dense", "head"]


def alone(make, folder, **options):
    """The model with that adapter alone."""
    model = make()
    lora.load_adapter(model, folder, **options)
    return model.eval()


@pytest.mark.parametrize("merge", [False, True], ids=["unmerged", "merged"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_switching_gives_the_model_with_that_adapter_alone(
    dtype, merge, make_phi3, fill_factors, tmp_path
):
    def make():
        return make_phi3().to(dtype)

    names = three_adapters(make, fill_factors, tmp_path)
    options = {"merge_weights": merge}
    wanted = {name: logits(alone(make, tmp_path / name, **options)) for name in names}
    assert len({tuple(y.flatten().tolist()) for y in wanted.values()}) == 3
    model, base = make(), dict(make().state_dict())
    for name in names:
        lora.load_adapter(model, tmp_path / name, name, **options)
    model.eval()
    assert torch.equal(logits(model), wanted["parts"])  # the further ones are inactive
    for name in ("dense", "head", "parts", "head", "dense", "parts"):
        lora.set_adapter(model, name)
        assert lora.summary(model).adapters[0] == name
        assert set(lora.summary(model).adapters) == set(names)
        assert torch.equal(logits(model), wanted[name])
        with lora.disabled(model):
            assert torch.equal(logits(model), logits(make()))
    lora.delete_adapter(model, "dense")
    assert lora.summary(model).adapters == ("parts", "head")
    lora.set_adapter(model, "head")
    lora.delete_adapter(model, "parts")
    assert torch.equal(logits(model), wanted["head"])
    lora.delete_adapter(model, "head")
    assert not lora_layers(model)
    state = model.state_dict()
    assert state.keys() == base.keys()
    assert all(torch.equal(state[key], base[key]) for key in base)


def test_the_summary_of_a_model_without_adapters_has_none(make_phi3):
    assert lora.summary(make_phi3()).adapters == ()


@pytest.mark.parametrize("name", ["default", "mine"])
def test_deleting_the_only_adapter_gives_the_plain_model_back(
    name, make_phi3, fill_factors, tmp_path
):
    three_adapters(make_phi3, fill_factors, tmp_path)
    model = make_phi3()
    lora.load_adapter(model, tmp_path / "head", name)
    assert lora.summary(model).adapters == (name,)
    lora.delete_adapter(model, name)
    lora.patch_phi3(model)  # refuses what is adapted
    assert torch.equal(logits(model), logits(make_phi3()))


def test_the_base_stays_to_the_bit_while_adapters_come_train_and_go(
    make_phi3, fill_factors, tmp_path
):
    names = three_adapters(make_phi3, fill_factors, tmp_path)
    model, plain = make_phi3(), make_phi3()
    frozen = {id(p): (p, p.clone()) for p in model.parameters()}
    for name in names:
        lora.load_adapter(model, tmp_path / name, name)
    for name in names:
        lora.set_adapter(model, name)
        train(model, lambda p: torch.optim.SGD(p, lr=0.1), steps=3)
        assert all(torch.equal(p, before) for p, before in frozen.values())
    lora.unpatch(model.eval())
    assert [id(p) for p in model.parameters()] == list(frozen)
    assert torch.equal(logits(model), logits(plain))


@pytest.mark.parametrize(
    ("first", "second"), [("parts", "dense"), ("parts", "head"), ("head", "dense")]
)
def test_switching_after_the_model_moved_to_float64(
    first, second, make_phi3, fill_factors, tmp_path
):
    three_adapters(make_phi3, fill_factors, tmp_path)
    model = make_phi3()
    for name in (first, second):
        lora.load_adapter(model, tmp_path / name, name)
    model.to(torch.float64).eval()
    for name in (second, first):
        lora.set_adapter(model, name)
        wanted = alone(make_phi3, tmp_path / name).to(torch.float64)
        torch.testing.assert_close(logits(model), logits(wanted), rtol=1e-12, atol=1e-12)


def test_a_copy_switches_by_itself(make_phi3, fill_factors, tmp_path):
    names = three_adapters(make_phi3, fill_factors, tmp_path)
    model = make_phi3()
    for name in names:
        lora.load_adapter(model, tmp_path / name, name)
    model.eval()
    wanted = {name: logits(alone(make_phi3, tmp_path / name)) for name in names}
    twin = copy.deepcopy(model)
    shared = {id(p) for p in model.parameters()}
    for name in (*names[1:], names[0]):
        lora.set_adapter(twin, name)
        assert torch.equal(logits(twin), wanted[name])
        assert torch.equal(logits(model), wanted["parts"])
        assert not shared & {id(p) for p in twin.parameters()}


def test_every_adapter_is_saved_as_it_was_loaded(make_phi3, fill_factors, tmp_path):
    names = three_adapters(make_phi3, fill_factors, tmp_path)
    model = make_phi3()
    for name in names:
        lora.load_adapter(model, tmp_path / name, name)
    for name in names:
        lora.save_adapter(model, tmp_path / "again" / name, name)
        then, now = of_file(tmp_path / name), of_file(tmp_path / "again" / name)
        assert then.keys() == now.keys()
        assert all(torch.equal(then[key], now[key]) for key in then)


def test_what_cannot_be_beside_another_adapter_is_refused(make_phi3, fill_factors, tmp_path):
    three_adapters(make_phi3, fill_factors, tmp_path)
    model = make_phi3()
    lora.load_adapter(model, tmp_path / "parts", "a")
    lora.load_adapter(model, tmp_path / "dense", "b")
    refused(model, tmp_path / "dense", "lora.delete_adapter", name="b")
    edit(tmp_path / "dense", tensors=changed(QKV_A, set_first(float("nan"))))
    refused(model, tmp_path / "dense", "NaN", name="c")
    with unchanged(model), pytest.raises(ValueError, match="'a', 'b'"):
        lora.set_adapter(model, "c")
    with unchanged(model), pytest.raises(ValueError, match="active"):
        lora.delete_adapter(model, "a")


@pytest.mark.parametrize("first", ["biases", "none"])
def test_trained_biases_cannot_be_beside_another_adapter(first, tmp_path):
    for name, bias in (("biases", "all"), ("none", "none")):
        ours = lora.patch(make_biased(), ["inner"], r=4, lora_alpha=8, bias=bias)
        move(p for p in ours.parameters() if p.requires_grad)
        lora.save_adapter(ours, tmp_path / name)
    second = {"biases": "none", "none": "biases"}[first]
    model = make_biased()
    lora.load_adapter(model, tmp_path / first, "a")
    refused(model, tmp_path / second, "bias", name="b")


def test_a_further_adapter_trains_when_it_is_active(make_phi3, fill_factors, tmp_path):
    three_adapters(make_phi3, fill_factors, tmp_path)
    model = make_phi3()
    lora.load_adapter(model, tmp_path / "parts", "a")
    lora.load_adapter(model, tmp_path / "head", "b")
    trains = {}
    for name in ("a", "b"):
        lora.set_adapter(model, name)
        trains[name] = {n for n, p in model.named_parameters() if p.requires_grad}
    assert all("lora_" in n for n in trains["a"])
    heads = {f"model.layers.{i}.self_attn.o_proj.lora_{x}" for i in (0, 1) for x in "AB"}
    assert trains["b"] == heads | {"lm_head.weight"}


def test_a_compiled_model_recompiles_for_a_new_rank_alone(fill_factors, tmp_path):
    def make():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 6)).eval()

    for name, r in (("a", 4), ("b", 4), ("c", 7)):
        model = lora.patch(make(), ["0", "2"], r=r, lora_alpha=2 * r)
        lora.save_adapter(fill_factors(model), tmp_path / name)
    x = torch.randn(5, 8)
    with torch.no_grad():
        wanted = {n: alone(make, tmp_path / n)(x) for n in "abc"}
        torch._dynamo.reset()
        counter = CompileCounter()
        model = make()
        for name in "abc":
            lora.load_adapter(model, tmp_path / name, name)
        compiled = torch.compile(model, backend=counter, fullgraph=True, dynamic=False)
        frames = {}
        for name in "abacab":
            lora.set_adapter(compiled, name)
            torch.testing.assert_close(compiled(x), wanted[name])
            frames.setdefault(name, counter.frame_count)
    assert frames == {"a": 1, "b": 1, "c": 2}
    assert counter.frame_count == 2


# What the adapters of one model share


def small():
    """A body and a head of two layers."""
    torch.manual_seed(0)
    head = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 4))
    return nn.ModuleDict({"body": nn.Linear(8, 8), "head": head})


def saved(folder, targets, make=small, **options):
    """A folder with an adapter whose every trained tensor is moved."""
    model = lora.patch(make(), targets, r=2, lora_alpha=4, **options)
    move(p for p in model.parameters() if p.requires_grad)
    lora.save_adapter(model, folder)
    return folder


@pytest.mark.parametrize("order", [("whole", "inner"), ("inner", "whole")], ids="-".join)
def test_a_module_in_full_and_a_layer_inside_it_are_no_two_adapters(order, tmp_path):
    saved(tmp_path / "whole", ["body"], modules_to_save=["head"])
    saved(tmp_path / "inner", ["body", "head.0"])
    model = small()
    first, second = order
    lora.load_adapter(model, tmp_path / first, "a")
    there, new = ("head", r"head\.0") if second == "inner" else (r"head\.0", "head")
    refused(model, tmp_path / second, f"{new} .*{there} of another adapter", name="b")
    assert lora.summary(model).adapters == ("a",)


@pytest.mark.parametrize("out", [8, 6], ids=["square", "oblong"])
def test_a_layer_built_with_fan_in_fan_out_holds_one_adapter_and_keeps_it(out, tmp_path):
    def make():
        torch.manual_seed(0)
        return nn.Sequential(lora.Linear(8, out, 2, 4, fan_in_fan_out=True))

    model, x = make(), torch.randn(3, 8)
    move(lora.lora_state_dict(model).values())
    lora.save_adapter(model, tmp_path)
    with pytest.raises(ValueError, match=r"0 was built with fan_in_fan_out=True"), unchanged(model):
        lora.load_adapter(model, tmp_path, name="b")
    assert lora.summary(model).adapters == ("default",)
    again = make()
    lora.load_adapter(again, tmp_path)
    assert torch.equal(again(x), model(x))


@pytest.mark.parametrize("first", ["biases", "none"])
def test_a_model_that_was_frozen_since_still_has_its_biases(first, tmp_path):
    saved(tmp_path / "biases", ["inner"], make_biased, bias="all")
    saved(tmp_path / "none", ["inner"], make_biased)
    model = make_biased()
    lora.load_adapter(model, tmp_path / first, "a")
    lora.mark_only_lora_as_trainable(model)
    second = {"biases": "none", "none": "biases"}[first]
    refused(model, tmp_path / second, "biases", name="b")


def test_of_two_adapters_the_active_one_takes_no_biases(tmp_path):
    saved(tmp_path / "biases", ["inner"], make_biased, bias="lora_only")
    saved(tmp_path / "none", ["inner"], make_biased)
    model = make_biased()
    for name in "ab":
        lora.load_adapter(model, tmp_path / "none", name)
    refused(model, tmp_path / "biases", "biases")
    with unchanged(model), pytest.raises(ValueError, match="lora_only"):
        lora.mark_only_lora_as_trainable(model, "lora_only")


@pytest.mark.parametrize("name", ["", 3], ids=repr)
def test_a_name_is_a_string_with_characters(name, tmp_path):
    saved(tmp_path, ["body"])
    for model in (small(), lora.patch(small(), ["body"], r=2, lora_alpha=4)):
        refused(model, tmp_path, f"name={name!r}: expected a string", name=name)


def test_unpatching_a_compiled_model_forgets_its_adapters(tmp_path):
    saved(tmp_path, ["body"])
    model = small()
    for name in "ab":
        lora.load_adapter(model, tmp_path, name)
    lora.unpatch(torch.compile(model, backend="eager"))
    assert lora.summary(model).adapters == ()
    lora.load_adapter(model, tmp_path)
    assert lora.summary(model).adapters == ("default",)


@pytest.mark.parametrize("merge", [True, False], ids=["merge_weights", "unmerged"])
def test_switching_within_merged_leaves_no_merged_weight_behind(merge, tmp_path):
    model = small()
    for name in "ab":
        lora.load_adapter(model, saved(tmp_path / name, ["body"]), name, merge_weights=merge)
    first, x = model.eval()["body"], torch.randn(3, 8)
    with lora.merged(model):
        lora.set_adapter(model, "b")
        assert not first.merged
    assert not first.merged
    assert first._merged is None
    assert first.merge_weights is model["body"].merge_weights is merge
    wanted = alone(small, tmp_path / "b", merge_weights=merge)["body"]
    with torch.no_grad():
        assert torch.equal(model["body"](x), wanted(x))


def test_switching_on_a_meta_model_is_whole_or_not_at_all(tmp_path):
    def net():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8))

    for name, seed in (("a", 1), ("b", 2)):
        source = lora.patch(net(), ["0", "2"], r=2, lora_alpha=4)
        torch.manual_seed(seed)
        for p in lora.lora_state_dict(source).values():
            p.normal_()
        lora.save_adapter(source, tmp_path / name)
    model = net()
    model[2].to("meta")
    for name in ("a", "b"):
        lora.load_adapter(model, tmp_path / name, name)
    lora.set_adapter(model, "b")
    model.load_state_dict(net().state_dict(), strict=False, assign=True)
    x = torch.randn(3, 8)
    for name in ("b", "a", "b"):
        lora.set_adapter(model, name)
        alone = net()
        lora.load_adapter(alone, tmp_path / name)
        assert torch.equal(model(x), alone(x))


def test_a_copy_that_a_file_repeats_is_compared_with_the_base(make_phi3, fill_factors, tmp_path):
    theirs = in_peft(make_phi3(), fill_factors, target_modules=["o_proj"], r=2, lora_alpha=4)
    theirs.save_pretrained(tmp_path, save_embedding_layers=True)
    model = make_phi3()
    lora.patch_phi3(model, r=2, modules_to_save=["lm_head"])
    with torch.no_grad():
        model.lm_head.weight.add_(1)
    lora.load_adapter(model, tmp_path, "b")
    assert lora.adapter_names(model) == ("default", "b")


def test_a_data_parallel_wrapper_is_refused(tmp_path):
    model = nn.Sequential(lora.Linear(4, 4, 2))
    nn.init.normal_(model[0].lora_B)
    lora.save_adapter(model, tmp_path)
    wrapper = nn.parallel.DistributedDataParallel.__new__(nn.parallel.DistributedDataParallel)
    nn.Module.__init__(wrapper)
    wrapper.module = model
    for change in (
        lambda: lora.load_adapter(wrapper, tmp_path, "b"),
        lambda: lora.set_adapter(wrapper, "default"),
    ):
        with pytest.raises(ValueError, match=r"change the adapters of model\.module"):
            change()
    lora.load_adapter(wrapper, tmp_path)  # values into the Parameters that are there
