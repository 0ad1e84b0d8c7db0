"""modules_to_save: what trains in full is a copy; the frozen original is neither lost nor written."""

import copy
import pickle

import pytest
import torch
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
