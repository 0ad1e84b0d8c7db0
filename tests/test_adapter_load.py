"""What load_adapter refuses, and leaves as it was; strict=False; models that are patched already."""

import json
import os
import shutil
import subprocess
import sys
import warnings

import peft
import pytest
import torch
from adapter_helpers import (
    CONFIG,
    FOUR,
    QKV_A,
    QKV_B,
    TENSORS,
    assert_same_logits,
    assert_same_model,
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
    unchanged,
)
from peft import get_peft_model
from safetensors.torch import save_file
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

import lora

# What is refused


def save_quietly(model, folder):
    """save_pretrained with features that PEFT itself warns about."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.save_pretrained(folder)


REFUSED_FEATURES = {
    "use_qalora": {"target_modules": FOUR, "use_qalora": True},
    "target_parameters": {"target_parameters": ["down_proj.weight"], "target_modules": ["o_proj"]},
    "trainable_token_indices": {
        "target_modules": FOUR,
        "trainable_token_indices": {"embed_tokens": [3, 5]},
    },
    "init_lora_weights": {"target_modules": FOUR, "init_lora_weights": "pissa"},
}


@pytest.mark.parametrize("strict", [True, False], ids=["strict", "lenient"])
@pytest.mark.parametrize("feature", REFUSED_FEATURES)
def test_features_of_peft_that_compute_something_else_are_refused(
    feature, strict, make_phi3, tmp_path
):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = in_peft(make_phi3(), r=4, lora_alpha=8, **REFUSED_FEATURES[feature])
    save_quietly(theirs, tmp_path)
    refused(make_phi3(), tmp_path, feature, strict=strict)


def test_target_parameters_alone_are_refused_by_name(make_phi3, tmp_path):
    theirs = in_peft(make_phi3(), target_parameters=["down_proj.weight"], r=4, lora_alpha=8)
    save_quietly(theirs, tmp_path)
    refused(make_phi3(), tmp_path, "target_parameters")


def test_layer_replication_is_refused(tmp_path):
    def make_llama():
        torch.manual_seed(0)
        return LlamaForCausalLM(
            LlamaConfig(
                vocab_size=96,
                hidden_size=16,
                intermediate_size=16,
                num_hidden_layers=2,
                num_attention_heads=2,
            )
        )

    options = {"target_modules": ["q_proj"], "r": 4, "lora_alpha": 8}
    theirs = in_peft(make_llama(), layer_replication=[(0, 2), (1, 2)], **options)
    save_quietly(theirs, tmp_path)
    refused(make_llama(), tmp_path, "layer_replication")


def test_another_type_of_adapter_is_refused(make_phi3, tmp_path):
    config = peft.IA3Config(target_modules=["qkv_proj", "down_proj"], feedforward_modules=[])
    save_quietly(get_peft_model(make_phi3(), config), tmp_path)
    refused(make_phi3(), tmp_path, "IA3")


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"lora_alpha": None}, "lora_alpha"),
        ({"r": None}, "has no r"),
        ({"peft_type": None}, "peft_type"),
        ({"frobnicate": 3}, "frobnicate"),
        ({"alora_invocation_tokens": [1, 2]}, "alora_invocation_tokens"),
        ({"loftq_config": {"loftq_bits": 4}}, "loftq_config"),
        ({"lora_alpha": "16"}, "'16'"),
        ({"lora_alpha": float("nan")}, "lora_alpha"),
        ({"r": 4.0}, "4.0"),
        ({"r": True}, "True"),
        ({"rank_pattern": {"qkv_proj": 0}}, "qkv_proj"),
        ({"bias": "some"}, "some"),
        ({"lora_dropout": 1.5}, "1.5"),
    ],
    ids=lambda value: json.dumps(value) if isinstance(value, dict) else "",
)
@pytest.mark.parametrize("strict", [True, False], ids=["strict", "lenient"])
def test_configs_that_do_not_say_what_to_compute_are_refused(
    change, match, strict, make_phi3, fill_factors, tmp_path
):
    plain_file(make_phi3(), tmp_path, fill_factors)
    edit(tmp_path, lambda c: {k: v for k, v in {**c, **change}.items() if v is not None})
    refused(make_phi3(), tmp_path, match, strict=strict)


def test_a_pattern_that_is_no_regular_expression_is_refused(make_phi3, fill_factors, tmp_path):
    plain_file(make_phi3(), tmp_path, fill_factors)
    edit(tmp_path, lambda c: {**c, "rank_pattern": {"qkv_proj(": 4}})
    refused(make_phi3(), tmp_path, r"qkv_proj\(")


def renamed(old, new):
    return lambda tensors: {key.replace(old, new): t for key, t in tensors.items()}


# change of the tensors; what the error names; how many of the eight layers still fit
MISFITS = {
    "typo": (renamed("0.self_attn.qkv_proj", "0.self_attn.qkv_porj"), "qkv_porj", 7),
    "without prefix": (renamed("base_model.model.", ""), "'base_model.model.'", 0),
    "layer 7": (renamed("layers.0.", "layers.7."), r"layers\.7", 4),
    "rank": (changed(QKV_A, lambda t: t[:3].contiguous()), "layers.0.self_attn.qkv_proj", 7),
    "columns": (changed(QKV_A, lambda t: t[:, 1:].contiguous()), "layers.0.self_attn.qkv_proj", 7),
    "rows": (changed(QKV_B, lambda t: t[1:].contiguous()), "layers.0.self_attn.qkv_proj", 7),
    "NaN": (changed(QKV_A, set_first(float("nan"))), "NaN", 7),
    "inf": (changed(QKV_B, set_first(-float("inf"))), QKV_B, 7),
    "whole numbers": (changed(QKV_A, lambda t: t.to(torch.int32)), "int32", 7),
    "one factor": (lambda ts: {k: t for k, t in ts.items() if QKV_B not in k}, "qkv_proj", 7),
    "no layer 1": (lambda ts: {k: t for k, t in ts.items() if "layers.1" not in k}, "layers.1", 4),
    "a stray": (
        lambda ts: {**ts, "base_model.model.model.norm.stray": torch.ones(2)},
        "norm.stray",
        8,
    ),
    "another norm": (
        lambda ts: {**ts, "base_model.model.model.norm.weight": torch.zeros(64)},
        "norm.weight",
        8,
    ),
}


@pytest.mark.parametrize("case", MISFITS)
def test_tensors_that_do_not_fit_are_refused_by_name(case, make_phi3, fill_factors, tmp_path):
    change, match, _ = MISFITS[case]
    plain_file(make_phi3(), tmp_path, fill_factors)
    edit(tmp_path, tensors=change)
    refused(make_phi3(), tmp_path, match)


@pytest.mark.parametrize("case", MISFITS)
def test_strict_false_loads_what_fits_and_reports_the_rest(case, make_phi3, fill_factors, tmp_path):
    change, match, fitting = MISFITS[case]
    plain_file(make_phi3(), tmp_path, fill_factors)
    whole = of_file(tmp_path)
    edit(tmp_path, tensors=change)
    with pytest.raises(lora.AdapterError) as strict:
        lora.load_adapter(make_phi3(), tmp_path)
    model = make_phi3()
    report = lora.load_adapter(model, tmp_path, strict=False)
    assert any(part in str(strict.value) for part in report.problems)
    with pytest.raises(AssertionError, match=match):
        raise AssertionError("; ".join(report.problems))
    assert len(report.loaded) == fitting == len(lora_layers(model))
    for name, layer in lora_layers(model):
        key = f"base_model.model.{name}.lora_"
        assert torch.equal(layer.lora_A, whole[f"{key}A.weight"])
        assert torch.equal(layer.lora_B, whole[f"{key}B.weight"])


def test_a_tensor_of_a_saved_module_that_the_model_lacks_is_refused(
    make_phi3, fill_factors, tmp_path
):
    plain_file(make_phi3(), tmp_path, fill_factors, modules_to_save=["lm_head"])
    stray = {"base_model.model.lm_head.bias": torch.ones(96)}
    edit(tmp_path, tensors=lambda ts: {**ts, **stray})
    refused(make_phi3(), tmp_path, "lm_head.bias")


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda t: t[:-1].contiguous(), "lm_head.weight"),
        (set_first(float("nan")), "lm_head.weight"),
        (lambda t: None, "lm_head.weight"),
    ],
    ids=["rows", "NaN", "missing"],
)
def test_a_saved_module_that_does_not_fit_is_refused(
    change, match, make_phi3, fill_factors, tmp_path
):
    plain_file(make_phi3(), tmp_path, fill_factors, modules_to_save=["lm_head"])
    edit(
        tmp_path,
        tensors=lambda ts: {
            k: t for k, t in changed("lm_head", change)(ts).items() if t is not None
        },
    )
    refused(make_phi3(), tmp_path, match)


@pytest.mark.parametrize("native", [True, False], ids=["ours", "peft's"])
def test_a_base_of_other_shapes_is_refused(native, make_phi3, fill_factors, tmp_path):
    if native:
        ours = lora.patch_phi3(make_phi3(), r=4, lora_alpha=8)
        lora.save_adapter(fill_factors(ours), tmp_path)
    else:
        plain_file(make_phi3(), tmp_path, fill_factors)
    refused(make_phi3(hidden_size=32), tmp_path, "qkv_proj")
    refused(make_phi3(num_key_value_heads=4), tmp_path, "qkv_proj")
    refused(make_phi3(num_hidden_layers=1), tmp_path, r"layers\.1")


def test_another_base_of_the_same_shapes_is_refused(make_phi3, fill_factors, tmp_path):
    ours = lora.patch_phi3(make_phi3(), r=4, lora_alpha=8)
    lora.save_adapter(fill_factors(ours), tmp_path)
    other = make_phi3()
    with torch.no_grad():
        other.model.layers[1].mlp.down_proj.weight.mul_(1.5)
    refused(other, tmp_path, "layers.1.mlp.down_proj")
    report = lora.load_adapter(other, tmp_path, strict=False)
    assert report.base == "differs"
    assert len(report.loaded) == len(lora_layers(ours))
    assert lora.load_adapter(make_phi3(), tmp_path).base == "matches"


def test_a_changed_byte_of_our_file_is_refused(make_phi3, fill_factors, tmp_path):
    ours = lora.patch_phi3(make_phi3(), r=4, lora_alpha=8)
    lora.save_adapter(fill_factors(ours), tmp_path)
    data = bytearray((tmp_path / TENSORS).read_bytes())
    data[-3] ^= 1
    (tmp_path / TENSORS).write_bytes(data)
    refused(make_phi3(), tmp_path, "SHA-256")


def test_weights_that_peft_keeps_tied_are_refused_by_name(make_phi3, fill_factors, tmp_path):
    plain_file(make_phi3(), tmp_path, fill_factors)
    edit(tmp_path, lambda c: {**c, "ensure_weight_tying": True})
    refused(make_phi3(), tmp_path, "ensure_weight_tying=True: lora does not have this feature")


def test_metadata_that_is_not_ours_is_no_digest(make_phi3, fill_factors, tmp_path):
    plain_file(make_phi3(), tmp_path, fill_factors)
    save_file(of_file(tmp_path), tmp_path / TENSORS, {"format": "pt", "trainer": "x"})
    report = lora.load_adapter(make_phi3(), tmp_path)
    assert len(report.loaded) == 8
    assert not report.verified


# Zero updates; models that are patched already


@pytest.mark.parametrize("native", [True, False], ids=["ours", "peft's"])
def test_an_adapter_with_zero_b_warns_that_it_does_nothing(native, make_phi3, tmp_path):
    if native:
        lora.save_adapter(lora.patch_phi3(make_phi3()), tmp_path)
    else:
        in_peft(make_phi3(), target_modules=FOUR).save_pretrained(tmp_path)
    with pytest.warns(UserWarning, match="does nothing yet"):
        lora.load_adapter(make_phi3(), tmp_path)


def test_a_patched_model_takes_the_values_into_the_same_parameters(
    make_phi3, fill_factors, tmp_path
):
    options = {"target_modules": FOUR, "r": 4, "lora_alpha": 8}
    theirs = in_peft(make_phi3(), fill_factors, **options)
    theirs.save_pretrained(tmp_path)
    ours = lora.patch(make_phi3(), **options).eval()
    before = {n: (m, m.lora_A, m.lora_B, m.weight) for n, m in lora_layers(ours)}
    lora.load_adapter(ours, tmp_path)
    for name, (module, A, B, weight) in before.items():
        now = ours.get_submodule(name)
        assert now is module
        assert now.lora_A is A
        assert now.lora_B is B
        assert now.weight is weight
    assert_same_model(ours, theirs)


def test_a_merged_model_computes_with_the_values_that_were_loaded(
    make_phi3, fill_factors, tmp_path
):
    options = {"target_modules": FOUR, "r": 4, "lora_alpha": 8}
    theirs = in_peft(make_phi3(), fill_factors, **options)
    theirs.save_pretrained(tmp_path)
    ours = fill_factors(lora.patch(make_phi3(), **options, merge_weights=True)).eval()
    logits(ours)
    lora.load_adapter(ours, tmp_path)
    assert_same_logits(ours, theirs)


PATCHED_MISFITS = {
    "rank": ({"target_modules": FOUR, "r": 7, "lora_alpha": 14}, "_proj: lora_A"),
    "scale": ({"target_modules": FOUR, "r": 4, "lora_alpha": 4}, "scaling"),
    "fewer layers": ({"target_modules": FOUR[:3], "r": 4, "lora_alpha": 8}, "down_proj"),
    "more layers": ({"target_modules": [*FOUR, "lm_head"], "r": 4, "lora_alpha": 8}, "lm_head"),
    "a saved module": (
        {"target_modules": FOUR, "r": 4, "lora_alpha": 8, "modules_to_save": ["lm_head"]},
        "lm_head",
    ),
}


@pytest.mark.parametrize("case", PATCHED_MISFITS)
def test_an_adapter_that_does_not_fit_a_patched_model_changes_nothing(
    case, make_phi3, fill_factors, tmp_path
):
    options, match = PATCHED_MISFITS[case]
    ours = fill_factors(lora.patch(make_phi3(), **options))
    plain_file(make_phi3(), tmp_path, fill_factors)
    refused(ours, tmp_path, match)


def test_a_dense_adapter_does_not_go_into_parts(make_phi3, fill_factors, tmp_path):
    ours = fill_factors(lora.patch_phi3(make_phi3(), 4, 8, 0.0, FOUR))
    plain_file(make_phi3(), tmp_path, fill_factors)
    refused(ours, tmp_path, "kind is 'Linear', in the model 'MergedLinear'")


def test_bf16_factors_refuse_values_that_they_would_round(make_phi3, fill_factors, tmp_path):
    plain_file(make_phi3(), tmp_path, fill_factors)
    options = {"target_modules": FOUR, "r": 4, "lora_alpha": 8, "lora_dtype": torch.bfloat16}
    ours = fill_factors(lora.patch(make_phi3().bfloat16(), **options))
    refused(ours, tmp_path, "would round")
    rounded = {k: t.bfloat16().float() for k, t in of_file(tmp_path).items()}
    edit(tmp_path, tensors=lambda _: rounded)
    lora.load_adapter(ours, tmp_path)
    for name, layer in lora_layers(ours):
        key = f"base_model.model.{name}.lora_A.weight"
        assert torch.equal(layer.lora_A.float(), rounded[key])


def test_a_state_dict_of_loralib_goes_into_a_patched_model(make_phi3, fill_factors, tmp_path):
    options = {"target_modules": FOUR, "r": 4, "lora_alpha": 8}
    trained = fill_factors(lora.patch_phi3(make_phi3(), **options)).eval()
    torch.save(lora.lora_state_dict(trained), tmp_path / "lora.pt")
    refused(make_phi3(), tmp_path / "lora.pt", "patch the")
    ours = lora.patch_phi3(make_phi3(), **options).eval()
    factors = {n: p for n, p in ours.named_parameters() if "lora_" in n}
    lora.load_adapter(ours, tmp_path / "lora.pt")
    assert all(p is factors[n] for n, p in ours.named_parameters() if "lora_" in n)
    assert torch.equal(logits(ours), logits(trained))


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (
            changed("0.self_attn.qkv_proj.lora_A", lambda t: t[1:]),
            r"layers\.0\.self_attn\.qkv_proj",
        ),
        (changed("0.self_attn.qkv_proj.lora_A", set_first(float("inf"))), "qkv_proj.lora_A"),
        (renamed("layers.1.", "layers.7."), r"layers\.[17]"),
        (lambda ts: {**ts, "stray": torch.ones(1)}, "stray"),
    ],
    ids=["rank", "inf", "layer 7", "a stray"],
)
def test_a_state_dict_that_does_not_fit_changes_nothing(
    change, match, make_phi3, fill_factors, tmp_path
):
    options = {"target_modules": FOUR, "r": 4, "lora_alpha": 8}
    ours = fill_factors(lora.patch_phi3(make_phi3(), **options))
    torch.save(change(lora.lora_state_dict(ours)), tmp_path / "lora.pt")
    refused(ours, tmp_path / "lora.pt", match)


# Trained biases


def test_biases_of_a_model_that_was_frozen_for_inference_are_saved(tmp_path):
    ours = lora.patch(make_biased(), ["inner"], r=2, lora_alpha=4, bias="all")
    move(p for p in ours.parameters() if p.requires_grad)
    lora.save_adapter(ours.requires_grad_(False), tmp_path)
    again = make_biased()
    lora.load_adapter(again, tmp_path)
    assert torch.equal(logits(again), logits(ours))
    assert torch.equal(again.norm.bias, ours.norm.bias)


def test_a_second_patch_without_biases_saves_none(tmp_path):
    ours = lora.patch(make_biased(), ["inner"], r=2, lora_alpha=4, bias="all")
    lora.patch(lora.unpatch(ours), ["inner"], r=2, lora_alpha=4)
    move(p for p in ours.parameters() if p.requires_grad)
    lora.save_adapter(ours, tmp_path)
    assert json.loads((tmp_path / CONFIG).read_text())["bias"] == "none"
    assert not [key for key in of_file(tmp_path) if "bias" in key]


# What fails late; models without values


def cannot_be_written(parameter):
    """A Parameter of this shape whose elements share one place in memory."""
    return nn.Parameter(torch.zeros(1).expand(parameter.shape))


@pytest.mark.parametrize("own", ["lora_B", "bias"])
def test_a_patched_model_is_as_it_was_if_a_value_cannot_be_written(own, tmp_path):
    options = {"r": 2, "lora_alpha": 4, "bias": "all"}
    model = lora.patch(make_biased(), ["inner", "outer"], **options)
    move(p for p in model.parameters() if p.requires_grad)
    lora.save_adapter(model, tmp_path)
    move(p for p in model.parameters() if p.requires_grad)
    setattr(model.outer, own, cannot_be_written(getattr(model.outer, own)))
    with unchanged(model), pytest.raises(RuntimeError, match="single memory location"):
        lora.load_adapter(model, tmp_path)
    assert lora.summary(model).adapters == ("default",)


def test_a_plain_model_is_as_it_was_if_a_value_cannot_be_written(tmp_path):
    options = {"r": 2, "lora_alpha": 4, "bias": "all", "modules_to_save": ["norm"]}
    ours = lora.patch(make_biased(), ["inner"], **options)
    move(p for p in ours.parameters() if p.requires_grad)
    lora.save_adapter(ours, tmp_path)
    model = make_biased()
    model.outer.bias = cannot_be_written(model.outer.bias)
    with unchanged(model), pytest.raises(RuntimeError, match="single memory location"):
        lora.load_adapter(model, tmp_path, name="a")
    assert lora.summary(model).adapters == ()
    model.outer.bias = make_biased().outer.bias
    lora.load_adapter(model, tmp_path, name="a")
    assert torch.equal(logits(model), logits(ours))


def test_a_model_on_the_meta_device_gets_real_values(tmp_path):
    options = {"r": 2, "lora_alpha": 4, "modules_to_save": ["norm"]}
    ours = lora.patch(make_biased(), ["inner"], **options)
    move(p for p in ours.parameters() if p.requires_grad)
    lora.save_adapter(ours, tmp_path)
    with torch.device("meta"):
        model = make_biased()
    report = lora.load_adapter(model, tmp_path)
    assert report.base.startswith("not checked")
    assert set(report.loaded) == {"inner", "norm"}
    state = lora.lora_state_dict(ours)
    assert len(state) == 4
    for name, tensor in lora.lora_state_dict(model).items():
        assert torch.equal(tensor, state[name])
    assert model.inner.weight.is_meta
    model.load_state_dict(make_biased().state_dict(), strict=False, assign=True)


# Every process


MESSAGES = """
import sys
import lora
from torch import nn

def make(size):
    names = ["k", "q", "v", "o", "up"]
    heads = nn.ModuleDict({name: nn.Linear(size, size) for name in names})
    return nn.ModuleDict({"heads": heads, **{name: nn.Linear(size, size) for name in names}})

def patch(model):
    return lora.patch(model, ["k", "q", "v"], r=2, lora_alpha=4, bias="all", modules_to_save=["heads"])

for folder in sys.argv[1:]:
    if not sys.argv[2:]:
        lora.save_adapter(patch(make(8)), folder)
    for model in (make(8), make(3), patch(make(3)), lora.patch(make(8), ["o"], r=2, lora_alpha=4)):
        report = lora.load_adapter(model, folder, strict=False)
        print(report.loaded, report.problems)
        print([name for name, p in model.named_parameters() if p.requires_grad])
"""


def test_order_and_messages_are_the_same_in_every_process(tmp_path):
    ours, theirs = tmp_path / "ours", tmp_path / "peft's"

    def said(seed, *folders):
        command = [sys.executable, "-W", "ignore", "-c", MESSAGES, *map(str, folders)]
        environment = {**os.environ, "PYTHONHASHSEED": str(seed)}
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        return done.stdout

    said(0, ours)
    shutil.copytree(ours, theirs)
    save_file(of_file(ours), theirs / TENSORS, {"format": "pt"})
    assert said(0, ours, theirs) == said(1, ours, theirs)


def test_factors_on_the_meta_device_become_real(make_phi3, fill_factors, tmp_path):
    plain_file(make_phi3(), tmp_path / "peft", fill_factors)
    trained = make_phi3()
    lora.load_adapter(trained, tmp_path / "peft")
    lora.save_adapter(trained, tmp_path / "ours")
    with torch.device("meta"):
        model = make_phi3()
    lora.patch(model, ["qkv_proj", "o_proj", "gate_up_proj", "down_proj"], r=4, lora_alpha=8)
    with pytest.raises(lora.AdapterError, match="on the meta device: there is nothing to save"):
        lora.save_adapter(model, tmp_path / "nothing")
    report = lora.load_adapter(model, tmp_path / "ours")
    assert report.base.startswith("not checked")
    want = lora.lora_state_dict(trained)
    got = lora.lora_state_dict(model)
    assert got.keys() == want.keys()
    assert all(torch.equal(got[name], want[name]) for name in want)


# Biases, halves, and what is said


def mlp():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8), nn.LayerNorm(8))


def trained(bias="none", **options):
    """A patched and trained model of `mlp`."""
    model = lora.patch(mlp(), ["0", "2"], r=2, lora_alpha=4, bias=bias, **options)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(torch.randn_like(p) * 0.1)
    return model


def test_biases_that_are_refused_are_not_loaded(tmp_path):
    lora.save_adapter(trained("all"), tmp_path / "biases")
    lora.save_adapter(trained(), tmp_path / "plain")
    model, x = trained(), torch.randn(3, 8)
    before = model(x)
    report = lora.load_adapter(model, tmp_path / "biases", "b", strict=False)
    assert any(problem.startswith("biases") for problem in report.problems)
    assert torch.equal(model(x), before)
    lora.delete_adapter(model, "b")
    lora.load_adapter(model, tmp_path / "plain", "c")
    biases = [p.clone() for n, p in model.named_parameters() if n.endswith("bias")]
    lora.load_adapter(model, tmp_path / "biases", strict=False)
    now = [p for n, p in model.named_parameters() if n.endswith("bias")]
    assert all(map(torch.equal, biases, now))


@pytest.mark.parametrize("kind", ["folder", "state dict"])
def test_missing_biases_are_refused(kind, tmp_path):
    plain, model = trained(), trained("all")
    path = tmp_path / "a"
    if kind == "folder":
        lora.save_adapter(plain, path)
    else:
        path = tmp_path / "a.pt"
        torch.save(lora.lora_state_dict(plain), path)
    refused(model, path, r"missing tensor 0\.bias")


def test_a_bias_that_the_config_means_is_missing(tmp_path):
    model = in_peft(mlp(), target_modules=["0", "2"], r=2, lora_alpha=4, bias="all")
    model.save_pretrained(tmp_path)
    edit(tmp_path, tensors=lambda ts: {k: v for k, v in ts.items() if not k.endswith("3.bias")})
    refused(mlp(), tmp_path, r"missing tensor 3\.bias")


def test_trained_biases_do_not_go_where_biases_are_frozen(tmp_path):
    lora.save_adapter(trained("all"), tmp_path)
    refused(
        trained(), tmp_path, "misfit: the file has 3 trained biases, in the model they are frozen"
    )


def test_half_a_layer_is_not_loaded(tmp_path):
    source = trained()
    with torch.no_grad():
        source[0].lora_B.fill_(1.0)  # which bf16 can hold, as it cannot lora_A
    lora.save_adapter(source, tmp_path)
    model = trained(lora_dtype=torch.bfloat16)
    before = {name: p.clone() for name, p in model.named_parameters()}
    report = lora.load_adapter(model, tmp_path, strict=False)
    assert not report.loaded
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


def test_biases_are_remembered_at_their_widest_and_forgotten_with_the_adapter(tmp_path):
    model = trained("all")
    lora.mark_only_lora_as_trainable(model, "lora_only")
    lora.save_adapter(model, tmp_path / "wide")
    fresh, x = mlp(), torch.randn(3, 8)
    lora.load_adapter(fresh, tmp_path / "wide")
    assert torch.equal(fresh(x), model(x))
    lora.delete_adapter(model, "default")
    lora.patch(model, ["0"], r=2, lora_alpha=4)
    lora.save_adapter(model, tmp_path / "none")
    said = json.loads((tmp_path / "none" / CONFIG).read_text())
    assert said["bias"] == "none"


def test_a_layer_that_is_not_adapted_is_told_from_one_that_is_not_there(tmp_path):
    lora.save_adapter(trained(), tmp_path)
    model = lora.patch(mlp(), ["0"], r=2, lora_alpha=4)
    refused(model, tmp_path, r"misfit: 2 is not adapted in this model.*lora\.unpatch")


def test_biases_of_one_of_several_adapters_are_not_saved(tmp_path):
    lora.save_adapter(trained(), tmp_path / "a")
    model = trained()
    lora.load_adapter(model, tmp_path / "a", "b")
    for name in ("default", "b"):
        with pytest.raises(lora.AdapterError, match="adapters share its biases"):
            lora.save_adapter(model, tmp_path / "c", name, bias="all")


def test_the_config_stands_for_its_folder_and_a_state_dict_may_lie_beside_it(tmp_path):
    model, x = trained(), torch.randn(3, 8)
    lora.save_adapter(model, tmp_path)
    torch.save(lora.lora_state_dict(model), tmp_path / "lora.pt")
    fresh = mlp()
    lora.load_adapter(fresh, tmp_path / "adapter_config.json")
    assert torch.equal(fresh(x), model(x))
    other = lora.patch(mlp(), ["0", "2"], r=2, lora_alpha=4)
    lora.load_adapter(other, tmp_path / "lora.pt")
    assert torch.equal(other(x), model(x))


def test_wrong_arguments_are_named(tmp_path):
    lora.save_adapter(trained(), tmp_path)
    with pytest.raises(TypeError, match=r"expected a torch\.nn\.Module, got 'a'"):
        lora.save_adapter("a", trained())
    with pytest.raises(TypeError, match=r"expected a torch\.nn\.Module, got 'b'"):
        lora.set_adapter("b", trained())
    with pytest.raises(ValueError, match=r"lora_dtype=torch\.int8: expected a floating-point"):
        lora.load_adapter(mlp(), tmp_path, lora_dtype=torch.int8)
    with pytest.raises(lora.AdapterError, match="expected the name of a folder"):
        lora.save_adapter(trained(), "")
    with pytest.raises(FileNotFoundError, match="snapshot_download"):
        lora.load_adapter(mlp(), "someone/adapter")
    compiled = torch.compile(mlp(), backend="eager")
    with pytest.raises(ValueError, match="compiled"):
        lora.load_adapter(compiled, tmp_path)
