"""modules_to_save: what trains in full is a copy; the frozen original is neither lost nor written."""

import copy
import pickle

import pytest
import torch
from adapter_helpers import move
from peft import PeftModel
from torch import nn

import lora


@pytest.fixture
def model(make_phi3):
    """A patched Phi-3 whose head and embeddings train in full, after a training step."""
    model = make_phi3()
    lora.patch_phi3(model, r=2, lora_dropout=0.0, modules_to_save=["lm_head", "embed_tokens"])
    step(model)
    return model


def step(model):
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(trained, lr=1.0)
    ids = torch.arange(3, 13)[None]
    model(ids, labels=ids).loss.backward()
    optimizer.step()
    optimizer.zero_grad()


def logits(model):
    with torch.no_grad():
        return model(torch.arange(3, 13)[None]).logits


def test_it_trains_and_the_base_stays(model, make_phi3):
    base = make_phi3()
    for name in ("lm_head", "model.embed_tokens"):
        copied = model.get_submodule(name)
        assert not torch.equal(copied.weight, base.get_submodule(name).weight)
        assert torch.equal(
            copied.__dict__["_lora_original"].weight, base.get_submodule(name).weight
        )
    assert model.state_dict().keys() - base.state_dict().keys() == {
        name for name in model.state_dict() if ".lora_" in name
    }
    with lora.disabled(model):
        assert torch.equal(logits(model), logits(base))
        with lora.disabled(model):
            assert torch.equal(logits(model), logits(base))
        assert torch.equal(logits(model), logits(base))
    assert not torch.equal(logits(model), logits(base))


def test_what_trains_is_what_is_saved(model, make_phi3):
    saved = lora.lora_state_dict(model)
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert saved.keys() == trained
    assert {"lm_head.weight", "model.embed_tokens.weight"} < trained
    lora.mark_only_lora_as_trainable(model)
    assert {name for name, p in model.named_parameters() if p.requires_grad} == trained
    fresh = make_phi3()
    lora.patch_phi3(fresh, r=2, modules_to_save=["lm_head", "embed_tokens"])
    _, unexpected = fresh.load_state_dict(saved, strict=False)
    assert not unexpected
    assert torch.equal(logits(fresh), logits(model))


def test_unpatch_gives_the_base_or_what_was_trained(model, make_phi3):
    expected, base = logits(model), make_phi3()
    merged = lora.unpatch(copy.deepcopy(model), merge=True)
    torch.testing.assert_close(logits(merged), expected, rtol=1e-5, atol=1e-5)
    head = model.lm_head.weight
    assert torch.equal(merged.lm_head.weight, head)
    assert not list(lora.full.full_modules(merged))
    plain = lora.unpatch(model)
    assert torch.equal(logits(plain), logits(base))
    assert plain.state_dict().keys() == base.state_dict().keys()


def test_merged_state_dict_has_what_was_trained(model, make_phi3):
    fresh = make_phi3()
    fresh.load_state_dict(lora.merged_state_dict(model))
    torch.testing.assert_close(logits(fresh), logits(model), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("copier", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copies_keep_the_original(model, make_phi3, copier):
    twin = copier(model)
    assert torch.equal(logits(twin), logits(model))
    step(twin)
    with lora.disabled(twin):
        assert torch.equal(logits(twin), logits(make_phi3()))


def test_the_original_follows_to_another_dtype(model, make_phi3):
    model.double()
    with lora.disabled(model):
        assert torch.equal(logits(model), logits(make_phi3().double()))
    assert lora.unpatch(model).lm_head.weight.dtype == torch.float64


def test_a_tie_ends_with_the_copy_and_merging_says_so(make_phi3):
    model = make_phi3(tie_word_embeddings=True)
    before = logits(model)
    lora.patch_phi3(model, r=2, modules_to_save=["lm_head"])
    assert torch.equal(logits(model), before)
    step(model)
    assert not torch.equal(model.lm_head.weight, model.model.embed_tokens.weight)
    with pytest.raises(
        ValueError, match=r"lm_head was trained apart from model\.embed_tokens\.weight"
    ):
        lora.unpatch(model, merge=True)
    plain = lora.unpatch(model)
    assert plain.lm_head.weight is plain.model.embed_tokens.weight
    assert torch.equal(logits(plain), before)


def test_targets_inside_are_left_out():
    model = nn.ModuleDict(
        {"body": nn.Linear(4, 4), "head": nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))}
    )
    lora.patch(model, "all-linear", r=2, lora_alpha=2, modules_to_save=["head"])
    assert [type(m) for m in model["head"]] == [nn.Linear, nn.Linear]
    assert type(model["body"]) is lora.Linear
    assert "head" in str(lora.summary(model)).partition("trained in full:")[2]
    assert lora.summary(model).modules_to_save == ("head",)


BAD = {
    "no such module": (
        ["heat"],
        ValueError,
        "modules_to_save match no module: 'heat' .nearest: 'head'",
    ),
    "a string": ("head", ValueError, "expected a list of names"),
    "nothing to train": (["relu"], ValueError, "relu: ReLU has no Parameter"),
    "not floating-point": (["table"], TypeError, "table: weight is a Parameter of torch.int8"),
    "no target is left": (["body", "head"], ValueError, "leave no target"),
}


@pytest.mark.parametrize("case", BAD)
def test_refusals_change_nothing(case):
    names, kind, message = BAD[case]
    model = nn.ModuleDict({"body": nn.Linear(4, 4), "head": nn.Linear(4, 2), "relu": nn.ReLU()})
    model["table"] = nn.Embedding(3, 2)
    model["table"].weight = nn.Parameter(torch.zeros(3, 2, dtype=torch.int8), requires_grad=False)
    modules = dict(model.named_modules())
    with pytest.raises(kind, match=message):
        lora.patch(model, ["body", "head"], r=2, lora_alpha=2, modules_to_save=names)
    assert dict(model.named_modules()) == modules
    assert model["body"].weight.requires_grad


# Within lora.disabled


def pair(**options):
    """A plain model and one whose head trains in full, with other values in all that trains."""
    torch.manual_seed(0)
    plain = nn.ModuleDict({"body": nn.Linear(8, 8), "head": nn.Linear(8, 4)})
    model = lora.patch(
        copy.deepcopy(plain), ["body"], r=2, lora_alpha=4, modules_to_save=["head"], **options
    )
    move(p for p in model.parameters() if p.requires_grad)
    return plain, model


def run(model):
    with torch.no_grad():
        return model["head"](model["body"](torch.ones(3, 8)))


def state_of(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def same_state(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


def test_what_is_read_within_disabled_is_what_was_trained(tmp_path):
    plain, model = pair()
    wanted = [f(model) for f in (state_of, lora.merged_state_dict, lora.lora_state_dict)]
    trained = run(model)
    with lora.disabled(model):
        got = [f(model) for f in (state_of, lora.merged_state_dict, lora.lora_state_dict)]
        lora.save_adapter(model, tmp_path)
        assert torch.equal(run(model), run(plain))
    assert all(map(same_state, got, wanted))
    fresh = copy.deepcopy(plain)
    lora.load_adapter(fresh, tmp_path)
    assert torch.equal(run(fresh), trained)
    assert torch.equal(run(model), trained)


@pytest.mark.parametrize("how", ["load_adapter", "load_state_dict"])
def test_what_is_loaded_within_disabled_counts_after_it(how, tmp_path):
    plain, model = pair()
    other = copy.deepcopy(model)
    move(p for p in other.parameters() if p.requires_grad)
    lora.save_adapter(other, tmp_path)
    with lora.disabled(model):
        with lora.disabled(model):
            if how == "load_adapter":
                lora.load_adapter(model, tmp_path)
            else:
                model.load_state_dict(other.state_dict())
            assert torch.equal(run(model), run(plain))
        assert torch.equal(run(model), run(plain))
    assert torch.equal(run(model), run(other))
    assert torch.equal(run(lora.unpatch(model)), run(plain))


def test_the_original_is_frozen():
    _, model = pair()
    assert not any(p.requires_grad for p in lora.full.original(model["head"]).parameters())


def test_marking_within_disabled_leaves_a_frozen_original_frozen():
    plain, model = pair()
    original = lora.full.original(model["head"]).requires_grad_(False)
    trains = {name for name, p in model.named_parameters() if p.requires_grad}
    with lora.disabled(model):
        lora.mark_only_lora_as_trainable(model)
        assert {name for name, p in model.named_parameters() if p.requires_grad} == trains
        assert not any(p.requires_grad for p in original.parameters())
    lora.mark_only_lora_as_trainable(model)
    assert lora.full.original(model["head"]) is original
    assert not any(p.requires_grad for p in original.parameters())
    assert same_state(original.state_dict(), plain["head"].state_dict())


@pytest.mark.parametrize("merge", [True, False], ids=["merged", "base"])
def test_unpatching_within_disabled_gives_what_it_gives_outside(merge):
    plain, model = pair()
    wanted = lora.unpatch(copy.deepcopy(model), merge)
    with lora.disabled(model):
        lora.unpatch(model, merge)
    assert same_state(model.state_dict(), wanted.state_dict())
    assert torch.equal(run(model), run(wanted))
    assert merge or torch.equal(run(model), run(plain))


def test_buffers_of_a_module_trained_in_full_are_saved_to_the_bit(tmp_path):
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8))
    model = lora.patch(copy.deepcopy(plain), ["0"], r=2, lora_alpha=4, modules_to_save=["1"])
    move(p for p in model.parameters() if p.requires_grad)
    model(torch.randn(5, 8))
    lora.save_adapter(model, tmp_path)
    lora.load_adapter(plain, tmp_path)
    assert plain[1].num_batches_tracked.item() == 1
    assert plain[1].num_batches_tracked.dtype == torch.int64
    assert same_state(plain.state_dict(), model.state_dict())


def test_tokens_that_were_added_are_trained_and_saved(make_phi3, tmp_path):
    def resized():
        model = make_phi3()
        torch.manual_seed(1)
        model.resize_token_embeddings(100, mean_resizing=False)
        return model

    model = resized()
    lora.patch_phi3(model, r=2, lora_dropout=0.0, modules_to_save=["lm_head", "embed_tokens"])
    step(model)
    lora.save_adapter(model, tmp_path)
    fresh = resized()
    lora.load_adapter(fresh, tmp_path)
    assert torch.equal(logits(fresh), logits(model))
    plain = make_phi3()
    with pytest.raises(lora.AdapterError, match=r"resize_token_embeddings\(100\) first"):
        lora.load_adapter(plain, tmp_path)
    assert torch.equal(logits(plain), logits(make_phi3()))
    theirs = PeftModel.from_pretrained(resized(), tmp_path)
    torch.testing.assert_close(logits(theirs), logits(model), rtol=1e-5, atol=1e-5)
