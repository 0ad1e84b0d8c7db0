"""Adapters against PEFT and transformers, in both directions: what they compute and how they train."""

import contextlib
import copy
import json
import math
import warnings

import pytest
import torch
from adapter_helpers import (
    CLOSE,
    CONFIG,
    FOUR,
    IDS,
    assert_near,
    assert_same_logits,
    assert_same_model,
    edit,
    in_peft,
    logits,
    lora_layers,
    make_biased,
    move,
    of_file,
    plain_file,
    plain_key,
    refused,
    train,
    unchanged,
)
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForSequenceClassification,
)
from transformers.pytorch_utils import Conv1D

import lora


class Net(nn.Module):
    """One of every kind that is no nn.Linear."""

    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(96, 8, padding_idx=0)
        self.wide = Conv1D(12, 8)
        self.line = nn.Conv1d(12, 6, 1)
        self.plane = nn.Conv2d(6, 5, 1, stride=2)
        self.space = nn.Conv3d(5, 4, 1, bias=False)

    def forward(self, ids):
        h = torch.tanh(self.wide(self.table(ids)))
        h = torch.tanh(self.line(h.transpose(1, 2)))
        return self.space(self.plane(h.unsqueeze(-1)).unsqueeze(-1))


def make_net():
    torch.manual_seed(0)
    return Net().eval()


def make_gpt2():
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=96, n_positions=32, n_embd=16, n_layer=2, n_head=2)
    return GPT2LMHeadModel(config).eval()


# From lora to PEFT

PHI3_OPTIONS = {
    "qkv r1": {"target_modules": ["qkv_proj"], "r": 1, "lora_alpha": 2},
    "o r4 alpha 5.5": {"target_modules": ["o_proj"], "r": 4, "lora_alpha": 5.5},
    "gate_up r7 alpha 5.5": {"target_modules": ["gate_up_proj"], "r": 7, "lora_alpha": 5.5},
    "down r16": {"target_modules": ["down_proj"], "r": 16, "lora_alpha": 32},
    "qkv and down r7": {"target_modules": ["qkv_proj", "down_proj"], "r": 7, "lora_alpha": 14},
    "all-linear r16 alpha 5.5": {"target_modules": "all-linear", "r": 16, "lora_alpha": 5.5},
    "regex r4": {"target_modules": r".*\.(qkv|o)_proj", "r": 4, "lora_alpha": 8},
    "layer 1 r7": {"target_modules": FOUR, "r": 7, "lora_alpha": 3, "layers_to_transform": 1},
    "q and v": {"target_modules": FOUR, "r": 4, "lora_alpha": 8, "enable_qkv": (1, 0, 1)},
    "k r7": {"target_modules": ["qkv_proj"], "r": 7, "lora_alpha": 5.5, "enable_qkv": (0, 1, 0)},
    "ranks by kind": {
        "target_modules": FOUR,
        "r": 4,
        "lora_alpha": 8,
        "rank_pattern": {"qkv_proj": 7, "down_proj": 1},
        "alpha_pattern": {"o_proj": 5.5},
    },
    "ranks by layer": {
        "target_modules": FOUR,
        "r": 4,
        "lora_alpha": 8,
        "rank_pattern": {"layers.0.self_attn.qkv_proj": 16, r"layers\.1\.mlp\..*": 1},
        "alpha_pattern": {r"layers\.1\..*": 5.5},
    },
}
BASES = {
    "2 kv heads fp32": (2, torch.float32),
    "4 kv heads fp32": (4, torch.float32),
    "2 kv heads bf16": (2, torch.bfloat16),
}
# In bf16 such that the update is not much larger than the weight: its products are bf16 here, and
# fp32 in PEFT.
# Small enough for a well-conditioned model: in one that is not, fp32 errors are a matter of luck.
STD = {torch.float32: 0.1, torch.bfloat16: 0.05}


def pairs(options, bases):
    """Every option on the first base and on one of the others."""
    first, *rest = bases
    chosen = [(o, b) for n, o in enumerate(options) for b in (first, rest[n % len(rest)])]
    return [pytest.param(option, base, id=f"{option}, {base}") for option, base in chosen]


@pytest.mark.parametrize(("option", "base"), pairs(PHI3_OPTIONS, BASES))
def test_peft_and_transformers_compute_what_we_saved(
    option, base, make_phi3, fill_factors, tmp_path
):
    heads, dtype = BASES[base]
    plain = make_phi3(num_key_value_heads=heads).to(dtype)
    ours = lora.patch_phi3(copy.deepcopy(plain), **PHI3_OPTIONS[option], lora_dropout=0.1).eval()
    fill_factors(ours, STD[dtype])
    with torch.no_grad():
        for _, layer in lora_layers(ours):  # transformers rounds factors to the base's dtype
            layer.lora_A.copy_(layer.lora_A.to(dtype))
            layer.lora_B.copy_(layer.lora_B.to(dtype))
    lora.save_adapter(ours, tmp_path)
    theirs = copy.deepcopy(plain)
    info = theirs.load_adapter(tmp_path)
    assert not info.missing_keys | info.unexpected_keys | info.mismatched_keys
    assert_same_logits(ours, theirs)
    theirs = PeftModel.from_pretrained(copy.deepcopy(plain), tmp_path)
    assert set(theirs.targeted_module_names) == {name for name, _ in lora_layers(ours)}
    assert_same_model(ours, theirs)


@pytest.mark.parametrize(
    "scaling",
    [
        lambda layer: layer.lora_alpha / math.sqrt(layer.r),
        lambda layer: layer.lora_alpha * 0.37 / layer.r,
    ],
    ids=["rsLoRA", "any"],
)
@pytest.mark.parametrize("patch", [lora.patch, lora.patch_phi3], ids=["dense", "parts"])
def test_a_scaling_set_by_hand_reaches_peft(patch, scaling, make_phi3, fill_factors, tmp_path):
    ours = patch(make_phi3(), target_modules=FOUR, r=7, lora_alpha=5.5, lora_dropout=0.0)
    for _, layer in lora_layers(ours):
        layer.scaling = scaling(layer)
    lora.save_adapter(fill_factors(ours), tmp_path)
    again = make_phi3()
    lora.load_adapter(again, tmp_path)
    assert [x.scaling for _, x in lora_layers(again)] == [x.scaling for _, x in lora_layers(ours)]
    assert_same_model(ours, PeftModel.from_pretrained(make_phi3(), tmp_path))


NET_TARGETS = {
    "table r1": (["table"], 1, 2),
    "wide r4": (["wide"], 4, 5.5),
    "convolutions r3": (["line", "plane"], 3, 6),
    "all but Conv3d r2": (["table", "wide", "line", "plane"], 2, 5.5),
    "Conv3d r3": (["space"], 3, 5.5),
}


@pytest.mark.parametrize("case", NET_TARGETS)
def test_peft_computes_what_we_saved_of_other_kinds(case, fill_factors, tmp_path):
    targets, r, alpha = NET_TARGETS[case]
    ours = lora.patch(make_net(), targets, r=r, lora_alpha=alpha)
    lora.save_adapter(fill_factors(ours), tmp_path)
    theirs = PeftModel.from_pretrained(make_net(), tmp_path)
    assert_same_logits(ours, theirs)
    if "space" not in targets:  # PEFT 0.21 merges such a Conv3d as a Conv2d, and fails
        assert_same_model(ours, theirs)


@pytest.mark.parametrize("case", NET_TARGETS)
def test_we_compute_what_peft_saved_of_other_kinds(case, fill_factors, tmp_path):
    targets, r, alpha = NET_TARGETS[case]
    options = {"target_modules": targets, "r": r, "lora_alpha": alpha}
    theirs = in_peft(make_net(), fill_factors, **options, fan_in_fan_out="wide" in targets)
    with warnings.catch_warnings():  # embeddings of a model that is not transformers'
        warnings.filterwarnings("ignore", "Could not identify embedding")
        theirs.save_pretrained(tmp_path)
    ours = make_net()
    report = lora.load_adapter(ours, tmp_path)
    assert set(report.loaded) == set(targets)
    assert_same_logits(ours, theirs)
    if "space" not in targets:
        assert_same_model(ours, theirs)


def test_gpt2_with_parts_in_c_attn_reaches_peft(fill_factors, tmp_path):
    ours = make_gpt2()
    lora.patch(ours, ["c_fc"], r=4, lora_alpha=8)
    for block in ours.transformer.h:
        block.attn.c_attn = lora.MergedLinear.from_module(
            block.attn.c_attn, 3, 5.5, enable_lora=[True, False, True]
        )
    lora.save_adapter(fill_factors(ours), tmp_path)
    again = make_gpt2()
    lora.load_adapter(again, tmp_path)
    assert torch.equal(logits(again), logits(ours))
    theirs = PeftModel.from_pretrained(make_gpt2(), tmp_path)
    ours.config.tie_word_embeddings = theirs.config.tie_word_embeddings = False
    assert_same_model(ours, theirs)


def test_gpt2_adapter_of_peft_reaches_us(fill_factors, tmp_path):
    options = {"target_modules": ["c_attn", "c_proj"], "r": 7, "lora_alpha": 5.5}
    theirs = in_peft(make_gpt2(), fill_factors, **options, fan_in_fan_out=True)
    theirs.save_pretrained(tmp_path)
    ours = make_gpt2()
    lora.load_adapter(ours, tmp_path)
    assert_same_model(ours, theirs)


# From PEFT to lora

PEFT_OPTIONS = {
    "qkv r1": {"target_modules": ["qkv_proj"], "r": 1, "lora_alpha": 2},
    "o r4 alpha 5.5": {"target_modules": ["o_proj"], "r": 4, "lora_alpha": 5.5},
    "gate_up r7 rsLoRA": {
        "target_modules": ["gate_up_proj"],
        "r": 7,
        "lora_alpha": 14,
        "use_rslora": True,
    },
    "down r16 alpha 5.5": {"target_modules": ["down_proj"], "r": 16, "lora_alpha": 5.5},
    "all four r16": {"target_modules": FOUR, "r": 16, "lora_alpha": 32},
    "all-linear r4": {"target_modules": "all-linear", "r": 4, "lora_alpha": 5.5},
    "regex r7": {"target_modules": r".*layers\.1\..*(qkv|down)_proj", "r": 7, "lora_alpha": 5.5},
    "layer 1 r4": {
        "target_modules": FOUR,
        "r": 4,
        "lora_alpha": 8,
        "layers_to_transform": 1,
        "layers_pattern": "layers",
    },
    "layers 0 and 1 r1": {
        "target_modules": FOUR,
        "r": 1,
        "lora_alpha": 5.5,
        "layers_to_transform": [0, 1],
    },
    "without down_proj": {
        "target_modules": FOUR,
        "r": 4,
        "lora_alpha": 8,
        "exclude_modules": ["down_proj"],
    },
    "without layer 0": {
        "target_modules": "all-linear",
        "r": 7,
        "lora_alpha": 8,
        "exclude_modules": r".*layers\.0\..*",
    },
    "patterns": {
        "target_modules": FOUR,
        "r": 4,
        "lora_alpha": 8,
        "rank_pattern": {"qkv_proj": 7, r"^model\.layers\.0\.mlp\.down_proj": 16},
        "alpha_pattern": {"layers.1.self_attn.o_proj": 5.5, "qkv_proj": 1},
    },
    "patterns rsLoRA": {
        "target_modules": FOUR,
        "r": 4,
        "lora_alpha": 5.5,
        "use_rslora": True,
        "rank_pattern": {r"layers\.0\..*": 1},
        "alpha_pattern": {"gate_up_proj": 3},
    },
}


@pytest.mark.parametrize(("option", "base"), pairs(PEFT_OPTIONS, BASES))
def test_we_compute_what_peft_saved(option, base, make_phi3, fill_factors, tmp_path):
    heads, dtype = BASES[base]
    plain = make_phi3(num_key_value_heads=heads).to(dtype)
    theirs = in_peft(copy.deepcopy(plain), **PEFT_OPTIONS[option], lora_dropout=0.1)
    fill_factors(theirs, STD[dtype])
    theirs.save_pretrained(tmp_path / "theirs")
    ours = copy.deepcopy(plain)
    report = lora.load_adapter(ours, tmp_path / "theirs")
    assert set(report.loaded) == set(theirs.targeted_module_names)
    assert not report.problems
    assert not report.verified
    trains = {n for n, p in ours.named_parameters() if p.requires_grad}
    assert trains == {f"{n}.lora_{x}" for n in report.loaded for x in "AB"}
    assert all(layer.lora_dropout.p == 0.1 for _, layer in lora_layers(ours))
    lora.save_adapter(ours, tmp_path / "ours")
    then, now = of_file(tmp_path / "theirs"), of_file(tmp_path / "ours")
    assert then.keys() == now.keys()
    assert all(torch.equal(then[key], now[key]) for key in then)
    again = PeftModel.from_pretrained(copy.deepcopy(plain), tmp_path / "ours")
    assert torch.equal(logits(again), logits(theirs))  # PEFT's own bits come back through us
    assert_same_model(ours, theirs)


def test_factors_that_peft_saved_in_bf16_are_fp32_here_as_in_peft(
    make_phi3, fill_factors, tmp_path
):
    plain = make_phi3().to(torch.bfloat16)
    theirs = get_peft_model(
        copy.deepcopy(plain),
        LoraConfig(target_modules=FOUR, r=4, lora_alpha=8),
        autocast_adapter_dtype=False,
    ).eval()
    fill_factors(theirs).save_pretrained(tmp_path)
    assert {t.dtype for t in of_file(tmp_path).values()} == {torch.bfloat16}
    ours = copy.deepcopy(plain)
    lora.load_adapter(ours, tmp_path)
    assert {layer.lora_A.dtype for _, layer in lora_layers(ours)} == {torch.float32}
    assert_same_model(ours, PeftModel.from_pretrained(copy.deepcopy(plain), tmp_path))


@pytest.mark.parametrize(
    "option",
    ["all-linear r4", "layer 1 r4", "without down_proj", "without layer 0", "regex r7"],
)
def test_a_layer_fewer_or_more_than_the_config_selects_is_refused(
    option, make_phi3, fill_factors, tmp_path
):
    plain_file(make_phi3(), tmp_path, fill_factors, **PEFT_OPTIONS[option])
    whole = of_file(tmp_path)
    one = min(key.partition(".lora_")[0] for key in whole)
    edit(tmp_path, tensors=lambda ts: {k: t for k, t in ts.items() if one not in k})
    refused(make_phi3(), tmp_path, one.removeprefix("base_model.model.").replace(".", r"\."))
    edit(tmp_path, tensors=lambda ts: {**whole, **head_factors(whole)})
    refused(make_phi3(), tmp_path, "lm_head")


def head_factors(tensors):
    r = next(t.shape[0] for k, t in tensors.items() if "lora_A" in k)
    key = "base_model.model.lm_head.lora_"
    return {f"{key}A.weight": torch.ones(r, 64), f"{key}B.weight": torch.ones(96, r)}


# What trains beside the factors


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize(
    "saved", [["lm_head"], ["embed_tokens"], ["lm_head", "embed_tokens"]], ids="-".join
)
def test_modules_trained_in_full_reach_peft(saved, tied, make_phi3, fill_factors, tmp_path):
    plain = make_phi3(tie_word_embeddings=tied)
    options = {"target_modules": FOUR, "r": 4, "lora_alpha": 8, "modules_to_save": saved}
    ours = lora.patch_phi3(copy.deepcopy(plain), **options).eval()
    move(p for n, p in ours.named_parameters() if p.requires_grad)
    fill_factors(ours)
    lora.save_adapter(ours, tmp_path)
    with quiet_about_tied_weights():
        theirs = PeftModel.from_pretrained(copy.deepcopy(plain), tmp_path)
    assert_same_logits(ours, theirs)
    again = copy.deepcopy(plain)
    lora.load_adapter(again, tmp_path)
    assert torch.equal(logits(again), logits(ours))
    assert torch.equal(logits(lora.unpatch(again)), logits(plain))
    if not tied:
        assert_same_model(ours, theirs)


@contextlib.contextmanager
def quiet_about_tied_weights():
    """PEFT warns whenever weights are tied."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*tie")
        yield


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize(
    "saved", [["lm_head"], ["embed_tokens"], ["lm_head", "embed_tokens"]], ids="-".join
)
def test_modules_that_peft_trained_in_full_reach_us(saved, tied, make_phi3, fill_factors, tmp_path):
    plain = make_phi3(tie_word_embeddings=tied)
    with quiet_about_tied_weights():
        theirs = in_peft(
            copy.deepcopy(plain),
            fill_factors,
            target_modules=FOUR,
            r=4,
            lora_alpha=8,
            modules_to_save=saved,
        )
        move(p for n, p in theirs.named_parameters() if "modules_to_save" in n)
        theirs.save_pretrained(tmp_path)
    ours = copy.deepcopy(plain)
    report = lora.load_adapter(ours, tmp_path)
    assert set(saved) <= {name.rpartition(".")[2] for name in report.loaded}
    assert_same_logits(ours, theirs)
    assert torch.equal(logits(lora.unpatch(ours)), logits(plain))


@pytest.mark.parametrize("bias", ["all", "lora_only"])
def test_trained_biases_reach_peft(bias, tmp_path):
    ours = lora.patch(make_biased(), ["inner"], r=4, lora_alpha=8, bias=bias).eval()
    move(p for p in ours.parameters() if p.requires_grad)
    lora.save_adapter(ours, tmp_path)
    assert json.loads((tmp_path / CONFIG).read_text())["bias"] == bias
    with quiet_about_biases():
        theirs = PeftModel.from_pretrained(make_biased(), tmp_path)
    again = make_biased()
    lora.load_adapter(again, tmp_path)
    assert torch.equal(logits(again), logits(ours))
    assert_same_model(ours, theirs)


@contextlib.contextmanager
def quiet_about_biases():
    """PEFT warns whenever biases train."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Careful, disabling adapter layers")
        yield


@pytest.mark.parametrize("bias", ["all", "lora_only"])
def test_biases_that_peft_trained_reach_us(bias, tmp_path):
    options = {"target_modules": ["inner"], "r": 4, "lora_alpha": 8, "bias": bias}
    with quiet_about_biases():
        theirs = in_peft(make_biased(), **options)
    move(p for p in theirs.parameters() if p.requires_grad)
    theirs.save_pretrained(tmp_path)
    ours = make_biased()
    lora.load_adapter(ours, tmp_path)
    trains = {n for n, p in ours.named_parameters() if p.requires_grad and "bias" in n}
    assert trains == ({"inner.bias"} if bias == "lora_only" else BIASES)
    assert_same_model(ours, theirs)


BIASES = {"inner.bias", "norm.bias", "outer.bias"}


def test_all_biases_and_a_head_trained_in_full_by_peft_reach_us(tmp_path):
    options = {"target_modules": ["inner"], "r": 4, "lora_alpha": 8, "bias": "all"}
    with quiet_about_biases():
        theirs = in_peft(make_biased(), **options, modules_to_save=["outer"])
    move(p for p in theirs.parameters() if p.requires_grad)
    theirs.save_pretrained(tmp_path)
    ours = make_biased()
    lora.load_adapter(ours, tmp_path)
    assert_same_logits(ours, theirs)


def embedding_file(plain, folder, fill_factors):
    """PEFT's adapter on the embedding, whose file repeats the whole table."""
    with quiet_about_tied_weights():
        theirs = in_peft(
            copy.deepcopy(plain),
            fill_factors,
            target_modules=["embed_tokens", "o_proj"],
            r=4,
            lora_alpha=5.5,
        )
    with pytest.warns(UserWarning, match="Setting `save_embedding_layers` to `True`"):
        theirs.save_pretrained(folder)
    assert any(key.endswith("embed_tokens.base_layer.weight") for key in of_file(folder))
    return theirs


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_an_embedding_adapter_that_repeats_the_table_reaches_us(
    tied, make_phi3, fill_factors, tmp_path
):
    plain = make_phi3(tie_word_embeddings=tied)
    theirs = embedding_file(plain, tmp_path, fill_factors)
    ours = copy.deepcopy(plain)
    lora.load_adapter(ours, tmp_path)
    assert_same_logits(ours, theirs)
    if not tied:
        assert_same_model(ours, theirs)


def test_an_adapter_of_the_head_that_repeats_it_reaches_us(make_phi3, fill_factors, tmp_path):
    theirs = in_peft(make_phi3(), fill_factors, target_modules=["lm_head"], r=7, lora_alpha=5.5)
    with pytest.warns(UserWarning, match="Setting `save_embedding_layers` to `True`"):
        theirs.save_pretrained(tmp_path)
    ours = make_phi3()
    assert lora.load_adapter(ours, tmp_path).loaded == ("lm_head",)
    assert_same_model(ours, theirs)


def test_a_repeated_table_that_is_not_the_base_s_is_refused(make_phi3, fill_factors, tmp_path):
    model = make_phi3()
    embedding_file(model, tmp_path, fill_factors)
    with torch.no_grad():
        model.model.embed_tokens.weight[3, 3] += 1
    with unchanged(model), pytest.raises(lora.AdapterError, match=r"embed_tokens\.weight"):
        lora.load_adapter(model, tmp_path)


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_an_embedding_adapter_of_ours_reaches_peft(tied, make_phi3, fill_factors, tmp_path):
    plain = make_phi3(tie_word_embeddings=tied)
    ours = lora.patch(copy.deepcopy(plain), ["embed_tokens", "o_proj"], r=4, lora_alpha=5.5).eval()
    lora.save_adapter(fill_factors(ours), tmp_path)
    with quiet_about_tied_weights():
        theirs = PeftModel.from_pretrained(copy.deepcopy(plain), tmp_path)
    assert_same_logits(ours, theirs)


# Classifiers, and names that are ends of others


def classifier(kind):
    torch.manual_seed(0)
    sizes = {"vocab_size": 96, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    sizes |= {"num_attention_heads": 2, "num_labels": 3, "pad_token_id": 0}
    if kind == "Bert":
        return BertForSequenceClassification(BertConfig(**sizes)).eval()
    return LlamaForSequenceClassification(LlamaConfig(**sizes)).eval()


HEADS = {"Bert": ("classifier", ["query", "value"]), "Llama": ("score", ["q_proj", "v_proj"])}


@pytest.mark.parametrize("kind", HEADS)
def test_classifiers_of_peft_reach_us(kind, fill_factors, tmp_path):
    head, targets = HEADS[kind]
    options = {"target_modules": targets, "r": 2, "lora_alpha": 4, "task_type": "SEQ_CLS"}
    theirs = in_peft(classifier(kind), fill_factors, **options)
    move(p for n, p in theirs.named_parameters() if "modules_to_save" in n)
    theirs.save_pretrained(tmp_path)
    fields = json.loads((tmp_path / CONFIG).read_text())
    assert set(fields["modules_to_save"]) == {"classifier", "score"}
    ours = classifier(kind)
    assert head in lora.load_adapter(ours, tmp_path).loaded
    assert_same_logits(ours, theirs)


@pytest.mark.parametrize("full", [False, True], ids=["factors alone", "with the head"])
@pytest.mark.parametrize("kind", HEADS)
def test_classifiers_of_ours_reach_peft(kind, full, fill_factors, tmp_path):
    head, targets = HEADS[kind]
    options = {"r": 2, "lora_alpha": 4, "modules_to_save": [head] if full else None}
    ours = fill_factors(lora.patch(classifier(kind), targets, **options)).eval()
    move(p for n, p in ours.named_parameters() if n.startswith(head) and full)
    lora.save_adapter(ours, tmp_path)
    task = json.loads((tmp_path / CONFIG).read_text())["task_type"]
    assert (task == "SEQ_CLS") is full  # else PEFT would look for the head in our file
    assert_same_logits(ours, PeftModel.from_pretrained(classifier(kind), tmp_path))
    again = classifier(kind)
    lora.load_adapter(again, tmp_path)
    assert torch.equal(logits(again), logits(ours))


def test_a_norm_means_every_module_whose_name_ends_so_as_in_peft(fill_factors, tmp_path):
    options = {"target_modules": ["q_proj"], "r": 2, "lora_alpha": 4, "modules_to_save": ["norm"]}
    theirs = in_peft(classifier("Llama"), fill_factors, **options)
    move(p for n, p in theirs.named_parameters() if "modules_to_save" in n)
    theirs.save_pretrained(tmp_path)
    ours = classifier("Llama")
    loaded = lora.load_adapter(ours, tmp_path).loaded
    assert {"model.norm", "model.layers.0.input_layernorm"} < set(loaded)
    assert_same_logits(ours, theirs)


class TwoHeads(nn.Module):
    """A head, and another whose name ends as the first one's."""

    def __init__(self):
        super().__init__()
        self.body, self.head, self.aux_head = nn.Linear(8, 8), nn.Linear(8, 4), nn.Linear(8, 4)

    def forward(self, ids):
        h = torch.tanh(self.body(torch.sin(ids.unsqueeze(-1) * self.body.weight[0])))
        return self.head(h) + self.aux_head(h)


def two_heads():
    torch.manual_seed(0)
    return TwoHeads().eval()


def test_a_head_beside_one_whose_name_ends_alike_reaches_peft_and_us(fill_factors, tmp_path):
    ours = lora.patch(two_heads(), ["body"], r=2, lora_alpha=4, modules_to_save=["head"]).eval()
    move(ours.head.parameters())
    lora.save_adapter(fill_factors(ours), tmp_path)
    assert_same_logits(ours, PeftModel.from_pretrained(two_heads(), tmp_path))
    again = two_heads()
    assert set(lora.load_adapter(again, tmp_path).loaded) == {"body", "head"}
    assert torch.equal(logits(again), logits(ours))
    assert torch.equal(again.head.weight, ours.head.weight)
    assert {n for n, p in again.named_parameters() if p.requires_grad} == {
        n for n, p in ours.named_parameters() if p.requires_grad
    }


def test_a_name_that_is_the_end_of_another_is_told_from_it_in_peft(fill_factors, tmp_path):
    def make():
        torch.manual_seed(0)
        inner = nn.Sequential(nn.Tanh(), nn.Linear(8, 8))
        inner = nn.Sequential(nn.Linear(8, 8), inner)
        return nn.Sequential(nn.Linear(8, 8), inner).eval()

    ours, x = lora.patch(make(), "0", r=2, lora_alpha=4), torch.randn(3, 8)
    lora.save_adapter(fill_factors(ours), tmp_path)
    with warnings.catch_warnings():
        theirs = PeftModel.from_pretrained(make(), tmp_path)
    assert theirs.targeted_module_names == ["0"]
    torch.testing.assert_close(theirs(x), ours(x))
    again = make()
    assert lora.load_adapter(again, tmp_path).loaded == ("0",)
    assert torch.equal(again(x), ours(x))


def test_names_with_characters_of_regular_expressions_reach_peft_and_us(fill_factors, tmp_path):
    def make():
        torch.manual_seed(0)
        layers = {name: nn.Linear(8, 8) for name in ("a+b", "aab", "c|d", "e")}
        return nn.ModuleDict({"net": nn.ModuleDict(layers)})

    names = ["a+b", "c|d", "e"]
    patterns = {"rank_pattern": {r"a\+b": 3, r"c\|d": 5}, "alpha_pattern": {r"c\|d": 7}}
    ours = fill_factors(lora.patch(make(), names, r=2, lora_alpha=4, **patterns))
    lora.save_adapter(ours, tmp_path)
    again = make()
    lora.load_adapter(again, tmp_path)
    theirs = PeftModel.from_pretrained(make(), tmp_path)
    wanted = lora.merged_state_dict(ours)
    assert all(torch.equal(t, wanted[key]) for key, t in lora.merged_state_dict(again).items())
    assert sorted(theirs.targeted_module_names) == [f"net.{name}" for name in names]
    got = theirs.merge_and_unload().state_dict()
    for key in wanted:
        assert_near(got[key], wanted[key], CLOSE)


# Training


@pytest.mark.parametrize(
    "optimizer",
    [lambda p: torch.optim.SGD(p, lr=0.5), lambda p: torch.optim.AdamW(p, lr=0.01)],
    ids=["SGD", "AdamW"],
)
def test_a_dense_adapter_trains_on_as_in_peft(optimizer, make_phi3, fill_factors, tmp_path):
    options = {"target_modules": ["qkv_proj", "down_proj"], "r": 4, "lora_alpha": 5.5}
    theirs = in_peft(make_phi3(), fill_factors, **options)
    theirs.save_pretrained(tmp_path)
    ours = make_phi3()
    lora.load_adapter(ours, tmp_path)
    assert type(ours.model.layers[0].self_attn.qkv_proj) is lora.Linear
    losses, gradients = train(ours, optimizer)
    their_losses, their_gradients = train(theirs, optimizer)
    assert gradients.keys() == their_gradients.keys()
    for name, wanted in their_gradients.items():
        assert_near(gradients[name], wanted, CLOSE)
    assert losses == pytest.approx(their_losses, rel=1e-5)


def test_fp32_factors_on_a_bf16_base_train_on_as_in_peft(make_phi3, fill_factors, tmp_path):
    options = {"target_modules": ["qkv_proj", "down_proj"], "r": 4, "lora_alpha": 5.5}
    theirs = in_peft(make_phi3().bfloat16(), fill_factors, **options)
    theirs.save_pretrained(tmp_path)
    ours = make_phi3().bfloat16()
    lora.load_adapter(ours, tmp_path)
    assert ours.model.layers[0].self_attn.qkv_proj.lora_A.dtype == torch.float32
    losses, their_losses = (
        train(model, lambda p: torch.optim.SGD(p, lr=0.5))[0] for model in (ours, theirs)
    )
    rounding = 2**-8
    assert their_losses[-1] < their_losses[0] * (1 - 5 * rounding)
    assert losses == pytest.approx(their_losses, rel=rounding)


@pytest.mark.parametrize("mask", [(1, 1, 1), (1, 0, 1)], ids=["qkv", "qv"])
def test_peft_has_our_gradients_at_the_first_step(mask, make_phi3, fill_factors, tmp_path):
    ours = lora.patch_phi3(
        make_phi3(), 4, 5.5, 0.0, ["qkv_proj", "gate_up_proj"], tuple(map(bool, mask))
    )
    lora.save_adapter(fill_factors(ours), tmp_path)
    theirs = PeftModel.from_pretrained(make_phi3(), tmp_path, is_trainable=True)
    for model in (ours, theirs):
        model(input_ids=IDS, labels=IDS).loss.backward()
    gradients = {plain_key(n): p.grad for n, p in theirs.named_parameters() if p.requires_grad}
    for name, layer in lora_layers(ours):
        assert_near(layer.lora_A.grad, gradients[f"{name}.lora_A"], CLOSE)
        B, found, part, start = gradients[f"{name}.lora_B"], [], 0, 0
        for rows, enabled in zip(layer.out_splits, layer.enable_lora, strict=True):
            if enabled:
                found.append(B[start : start + rows, part * 4 : part * 4 + 4])
                part += 1
            start += rows
        assert_near(layer.lora_B.grad, torch.cat(found), CLOSE)
