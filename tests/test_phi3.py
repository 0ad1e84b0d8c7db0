"""patch_phi3 on the whole family, through training, generation, checkpointing and merging."""

import copy

import peft
import pytest
import torch
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
)

import lora

PEFT_CONFIG = {
    "r": 16,
    "lora_alpha": 32,
    "lora_dropout": 0.05,
    "bias": "none",
    "task_type": "CAUSAL_LM",
    "target_modules": "all-linear",
    "modules_to_save": None,
}
IDS = torch.arange(3, 43).view(2, 20)


def loss_of(model, ids=IDS):
    return model(ids, labels=ids, use_cache=False).loss


def test_a_published_peft_config_passes_whole(make_phi3):
    model = make_phi3()
    expected, keys = model(IDS).logits, list(model.state_dict())
    assert lora.patch_phi3(model, **PEFT_CONFIG) is model
    assert torch.equal(model(IDS).logits, expected)
    assert [k for k in model.state_dict() if "lora_" not in k] == keys
    layer = model.model.layers[0]
    assert type(layer.self_attn.qkv_proj) is lora.MergedLinear
    assert layer.self_attn.qkv_proj.out_splits == (64, 32, 32)
    assert layer.mlp.gate_up_proj.out_splits == (112, 112)
    assert type(layer.self_attn.o_proj) is type(layer.mlp.down_proj) is lora.Linear
    assert not layer.self_attn.qkv_proj.merge_weights
    trainable = {n for n, p in model.named_parameters() if p.requires_grad}
    assert trainable == set(lora.lora_state_dict(model))


def test_defaults_leave_o_proj_alone(make_phi3):
    model = lora.patch_phi3(make_phi3())
    layer = model.model.layers[0]
    assert type(layer.self_attn.o_proj) is nn.Linear
    assert (layer.mlp.down_proj.r, layer.mlp.down_proj.scaling) == (16, 2.0)
    assert layer.mlp.down_proj.lora_dropout.p == 0.05


FAMILY = {  # hidden, intermediate, layers, heads, kv heads, vocabulary, tied: splits, parameters
    "Phi-3-mini": ((3072, 8192, 32, 32, 32, 32064, False), (3072, 3072, 3072), 3_821_079_552),
    "Phi-3-medium": ((5120, 17920, 40, 40, 10, 32064, False), (5120, 1280, 1280), 13_960_238_080),
    "Phi-4-mini": ((3072, 8192, 32, 24, 8, 200064, True), (3072, 1024, 1024), 3_836_021_760),
    "Phi-4": ((5120, 17920, 40, 40, 10, 100352, False), (5120, 1280, 1280), 14_659_507_200),
}


@pytest.mark.parametrize("name", FAMILY)
def test_the_family_on_meta(name):
    (hidden, inner, layers, heads, kv_heads, vocab, tied), splits, total = FAMILY[name]
    config = Phi3Config(
        hidden_size=hidden,
        intermediate_size=inner,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        vocab_size=vocab,
        tie_word_embeddings=tied,
    )
    with torch.device("meta"):
        model = Phi3ForCausalLM(config)
    assert sum(p.numel() for p in model.parameters()) == total
    lora.patch_phi3(model, **PEFT_CONFIG)
    assert all(p.is_meta for p in model.parameters())
    assert {m.out_splits for n, m in model.named_modules() if n.endswith("qkv_proj")} == {splits}
    each = 16 * (
        3 * hidden + sum(splits) + 2 * hidden + 2 * inner + 2 * hidden + inner + hidden
    )  # qkv, gate_up, o, down: A and B
    table = lora.summary(model)
    assert table.trainable_parameters == layers * each
    assert sum(row.count for row in table.rows) == 4 * layers
    assert {row.r for row in table.rows} == {16}


@pytest.mark.parametrize("mask", [(True, False, False), (False, True, False), (False, True, True)])
def test_enable_qkv_updates_those_parts_alone(make_phi3, fill_factors, mask):
    model = make_phi3()
    hidden = torch.randn(2, 5, 64)
    projection = lora.patch_phi3(model, 4, enable_qkv=mask).model.layers[0].self_attn.qkv_proj
    before = projection(hidden)
    fill_factors(model)
    changed = projection(hidden) != before
    parts = changed.split((64, 32, 32), dim=-1)
    assert [bool(part.any()) for part in parts] == list(mask)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_training_through_from_pretrained(make_phi3, tmp_path, dtype):
    make_phi3().save_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(
        tmp_path, dtype=dtype, attn_implementation="sdpa", cache_dir=tmp_path / "cache"
    )
    lora.patch_phi3(model, **PEFT_CONFIG)
    lora.mark_only_lora_as_trainable(model)
    base = {k: v.clone() for k, v in model.state_dict().items() if "lora_" not in k}
    model.train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(12):
        loss = loss_of(model)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]
    assert all(torch.equal(v, model.state_dict()[k]) for k, v in base.items())
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    fresh = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=dtype)
    lora.patch_phi3(fresh, **PEFT_CONFIG)
    missing, unexpected = fresh.load_state_dict(lora.lora_state_dict(model), strict=False)
    assert not unexpected
    assert not any("lora_" in name for name in missing)
    with torch.no_grad():
        assert torch.equal(loss_of(fresh.eval()), loss_of(model.eval()))


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("use_reentrant", [True, False])
def test_gradient_checkpointing(make_phi3, fill_factors, when, use_reentrant):
    def gradients(checkpointing):
        model = make_phi3()
        enable = {"gradient_checkpointing_kwargs": {"use_reentrant": use_reentrant}}
        if checkpointing and when == "before":
            model.gradient_checkpointing_enable(**enable)
        lora.patch_phi3(model, lora_dropout=0.2, target_modules="all-linear")
        torch.manual_seed(1)
        fill_factors(model, 0.05).train()
        if checkpointing and when == "after":
            model.gradient_checkpointing_enable(**enable)
        torch.manual_seed(2)
        loss_of(model).backward()
        return {n: p.grad for n, p in model.named_parameters() if p.requires_grad}

    plain, checkpointed = gradients(False), gradients(True)
    assert all(g is not None and g.abs().sum() > 0 for g in checkpointed.values())
    for name, grad in plain.items():
        torch.testing.assert_close(checkpointed[name], grad)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_generation_with_its_cache(make_phi3, fill_factors, attention):
    model = make_phi3(attn_implementation=attention)
    fill_factors(lora.patch_phi3(model, target_modules="all-linear"), 0.1)
    options = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0}
    with_cache = model.generate(IDS[:1, :6], **options)
    assert torch.equal(model.generate(IDS[:1, :6], use_cache=False, **options), with_cache)
    with lora.merged(model):
        assert torch.equal(model.generate(IDS[:1, :6], **options), with_cache)
    plain = lora.unpatch(model, merge=True)
    assert not any(isinstance(m, lora.LoRALayer) for m in plain.modules())
    assert torch.equal(plain.generate(IDS[:1, :6], **options), with_cache)


def test_merged_checkpoint_loads_as_a_plain_one(make_phi3, fill_factors, tmp_path):
    model = fill_factors(lora.patch_phi3(make_phi3()), 0.1)
    expected = model(IDS).logits
    lora.unpatch(model, merge=True).save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    torch.testing.assert_close(loaded(IDS).logits, expected, rtol=1e-4, atol=1e-5)


def test_tied_embeddings_are_safe(make_phi3, fill_factors):
    model = make_phi3(tie_word_embeddings=True)
    table = model.model.embed_tokens.weight
    assert model.lm_head.weight is table
    before = table.detach().clone()
    fill_factors(lora.patch_phi3(model, merge_weights=True), 0.1)
    expected = model(IDS).logits.detach()
    with torch.no_grad():
        torch.testing.assert_close(model.eval()(IDS).logits, expected, rtol=1e-4, atol=1e-5)
    assert torch.equal(table, before)
    lora.unpatch(model, merge=True)
    assert model.lm_head.weight is model.model.embed_tokens.weight is table
    torch.testing.assert_close(model(IDS).logits, expected, rtol=1e-4, atol=1e-5)


def test_o_and_down_train_as_pefts(make_phi3):
    options = {"r": 4, "lora_alpha": 8, "target_modules": ["o_proj", "down_proj"]}
    ours = lora.patch_phi3(make_phi3(), lora_dropout=0.0, **options).train()
    theirs = peft.inject_adapter_in_model(peft.LoraConfig(**options), make_phi3()).train()
    mine = dict(ours.named_parameters())
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if "lora_" in name:
                parameter.copy_(mine[name.replace(".default.weight", "")])
    losses = []
    for model in (ours, theirs):
        trainable = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(trainable, lr=1e-2)
        losses.append([])
        for _ in range(10):
            loss = loss_of(model)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses[-1].append(loss.item())
    assert losses[0][-1] < losses[0][0]
    torch.testing.assert_close(torch.tensor(losses[0]), torch.tensor(losses[1]))


def test_patterns_and_layers(make_phi3):
    model = lora.patch_phi3(
        make_phi3(num_hidden_layers=3),
        target_modules=["qkv_proj", "mlp.down_proj"],
        layers_to_transform=[0, 2],
        rank_pattern={"qkv_proj": 2},
        alpha_pattern={r"layers\.2\.mlp\.down_proj": 64},
    )
    found = {
        n: (m.r, m.lora_alpha) for n, m in model.named_modules() if isinstance(m, lora.LoRALayer)
    }
    assert found == {
        "model.layers.0.self_attn.qkv_proj": (2, 32),
        "model.layers.0.mlp.down_proj": (16, 32),
        "model.layers.2.self_attn.qkv_proj": (2, 32),
        "model.layers.2.mlp.down_proj": (16, 64),
    }


def test_a_model_of_other_code_with_the_same_structure(make_phi3, fill_factors):
    """A class of remote code is not transformers' class, and may keep its config at the top alone."""

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.self_attn, self.mlp = nn.Module(), nn.Module()
            self.self_attn.qkv_proj = nn.Linear(16, 24, bias=False)
            self.self_attn.o_proj = nn.Linear(16, 16, bias=False)
            self.mlp.gate_up_proj = nn.Linear(16, 40, bias=False)
            self.mlp.down_proj = nn.Linear(20, 16, bias=False)

    class Phi3ForCausalLM(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.config = Phi3Config(hidden_size=16, num_attention_heads=4, num_key_value_heads=1)
            self.layers = nn.ModuleList([Block(), Block()])
            self.audio = nn.Module()
            self.audio.gate_up_proj = nn.Linear(16, 8)

    model = Phi3ForCausalLM()
    with pytest.raises(ValueError, match=r"reaches 'audio\.gate_up_proj'"):
        lora.patch_phi3(model, target_modules=["gate_up_proj"])
    lora.patch_phi3(model, target_modules=["qkv_proj", "mlp.gate_up_proj"])
    assert model.layers[1].self_attn.qkv_proj.out_splits == (16, 4, 4)
    assert model.layers[1].mlp.gate_up_proj.out_splits == (20, 20)
    assert type(model.audio.gate_up_proj) is nn.Linear


def test_one_device_device_map_is_fine(make_phi3):
    import accelerate

    model = accelerate.dispatch_model(make_phi3(), {"": "cpu"})
    expected = model(IDS).logits
    assert torch.equal(lora.patch_phi3(model)(IDS).logits, expected)


def llama():
    sizes = {"vocab_size": 32, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1}
    return LlamaForCausalLM(LlamaConfig(num_attention_heads=2, **sizes))


def offloaded(make):
    import accelerate

    return accelerate.cpu_offload(make(), execution_device=torch.device("cpu"))


class Packed(nn.Linear):
    """Stands for a quantised linear layer: a subclass with a weight of another layout."""


def quantised(make):
    model = make()
    model.model.layers[1].mlp.down_proj = Packed(112, 64, bias=False)
    return model


class QuantLinear(nn.Module):
    """Stands for a quantised layer that keeps its weight under another name."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("qweight", torch.zeros(4, dtype=torch.int32))


def packed_elsewhere(make):
    model = make()
    model.model.layers[0].mlp.gate_up_proj = QuantLinear()
    return model


def peft_wrapped(make):
    return peft.inject_adapter_in_model(peft.LoraConfig(r=2, target_modules=["o_proj"]), make())


REFUSED = {
    "not a Phi-3": (lambda make: llama(), {}, r"LlamaForCausalLM is no Phi-3.*llama.*q_proj"),
    "no model at all": (lambda make: nn.Sequential(nn.Linear(2, 2)), {}, "Sequential is no Phi-3"),
    "unfused names": (
        lambda make: make(),
        {"target_modules": ["k_proj", "q_proj", "o_proj", "gate_proj", "down_proj", "up_proj"]},
        r"'k_proj' \(part of 'qkv_proj'\).*'up_proj' \(part of 'gate_up_proj'\).*"
        r"target_modules=\['o_proj', 'down_proj', 'qkv_proj', 'gate_up_proj'\]",
    ),
    "unfused and unknown": (
        lambda make: make(),
        {"target_modules": ["q_proj", "foo"]},
        r"'q_proj' \(part of 'qkv_proj'\), 'foo'; .*target_modules=\['qkv_proj'\]",
    ),
    "unfused pattern": (
        lambda make: make(),
        {"target_modules": ".*q_proj"},
        r"part of 'qkv_proj'.*target_modules=\['qkv_proj'\]",
    ),
    "no weight": (packed_elsewhere, {}, r"mlp\.gate_up_proj: .*QuantLinear.*quantised"),
    "misspelt": (
        lambda make: make(),
        {"target_modules": ["qkv_prj", "zzz"]},
        r"'qkv_prj' \(nearest: 'qkv_proj'\), 'zzz'",
    ),
    "the head": (lambda make: make(), {"target_modules": ["lm_head"]}, "reaches 'lm_head'"),
    "twice": (lambda make: lora.patch_phi3(make()), {}, "is a LoRA layer already"),
    "peft": (peft_wrapped, {}, "PEFT"),
    "quantised": (quantised, {}, r"layers\.1\.mlp\.down_proj: .*Packed"),
    "offloaded": (offloaded, {}, "accelerate"),
    "compiled": (lambda make: torch.compile(make(), backend="eager"), {}, "patch the model first"),
    "modules_to_save": (
        lambda make: make(),
        {"modules_to_save": ["lm_heat"]},
        "nearest: .lm_head.",
    ),
    "task_type": (lambda make: make(), {"task_type": "SEQ2SEQ"}, "task_type='SEQ2SEQ'"),
    "enable_qkv": (lambda make: make(), {"enable_qkv": (True, True)}, "three bools"),
    "nothing enabled": (lambda make: make(), {"enable_qkv": (False,) * 3}, "enables no part"),
    "r": (lambda make: make(), {"r": 1.5}, "r=1.5"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refusals_name_the_offender_and_touch_nothing(case, make_phi3):
    make, options, message = REFUSED[case]
    model = make(make_phi3)
    modules = {n: id(m) for n, m in model.named_modules()}
    trainable = {n: p.requires_grad for n, p in model.named_parameters()}
    with pytest.raises((ValueError, TypeError), match=message):
        lora.patch_phi3(model, **options)
    assert {n: id(m) for n, m in model.named_modules()} == modules
    assert {n: p.requires_grad for n, p in model.named_parameters()} == trainable


def test_evaluations_leave_the_base_alone(make_phi3, fill_factors):
    model = fill_factors(lora.patch_phi3(make_phi3(), merge_weights=True)).bfloat16()
    before = copy.deepcopy(model.state_dict())
    for _ in range(5):
        with torch.no_grad():
            model.eval()(IDS)
        model.train()(IDS)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
