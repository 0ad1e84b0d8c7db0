"""patch and unpatch on any model: selection as PEFT does it, refusals that leave the model alone."""

import copy

import peft
import pytest
import torch
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM
from transformers.pytorch_utils import Conv1D

import lora


def llama():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=32,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=12,
        num_attention_heads=2,
        num_key_value_heads=2,
    )
    return LlamaForCausalLM(config).eval()


def patched_names(model):
    return {n: m for n, m in model.named_modules() if isinstance(m, lora.LoRALayer)}


def snapshot(model):
    """Everything that a refused patch must leave as it was."""
    modules = {n: (id(m), type(m), m.training) for n, m in model.named_modules()}
    parameters = {
        n: (id(p), p.requires_grad, p.detach().clone()) for n, p in model.named_parameters()
    }
    return modules, parameters


def assert_untouched(model, before):
    modules, parameters = snapshot(model)
    assert modules == before[0]
    assert parameters.keys() == before[1].keys()
    for name, (key, requires_grad, value) in parameters.items():
        assert (key, requires_grad) == before[1][name][:2]
        assert value.is_meta or torch.equal(value, before[1][name][2])


SELECTIONS = [
    ({"target_modules": ["q_proj", "v_proj"]}, {}),
    ({"target_modules": ["self_attn.q_proj", "down_proj"]}, {}),
    ({"target_modules": ["model.layers.1.mlp.up_proj"]}, {}),
    ({"target_modules": r".*layers\.(1|10)\..*proj"}, {}),
    ({"target_modules": "all-linear"}, {}),
    ({"target_modules": ["q_proj", "embed_tokens", "lm_head"]}, {}),
    ({"target_modules": ["q_proj"], "layers_to_transform": 1}, {}),
    ({"target_modules": ["q_proj", "k_proj"], "layers_to_transform": [0, 10, 11]}, {}),
    ({"target_modules": ["q_proj", "k_proj"]}, {"rank_pattern": {"q_proj": 3}}),
    (
        {"target_modules": ["q_proj", "k_proj"]},
        {
            "rank_pattern": {r"layers\.1\..*": 5, "q_proj": 3},
            "alpha_pattern": {r"model.layers.(2|3).self_attn.k_proj": 7},
        },
    ),
]


@pytest.mark.parametrize(("targets", "patterns"), SELECTIONS)
def test_selection_equals_pefts(targets, patterns):
    config = peft.LoraConfig(r=2, lora_alpha=4, **targets, **patterns)
    theirs = {
        name.removeprefix("base_model.model."): (m.r["default"], m.scaling["default"])
        for name, m in peft.get_peft_model(llama(), config).named_modules()
        if isinstance(m, peft.tuners.lora.LoraLayer)
    }
    model = lora.patch(llama(), r=2, lora_alpha=4, **targets, **patterns)
    assert {n: (m.r, m.scaling) for n, m in patched_names(model).items()} == theirs


def test_output_unchanged_then_trains_only_the_factors(fill_factors):
    model, ids = llama(), torch.arange(8)[None]
    expected = model(ids).logits
    keys = set(model.state_dict())
    assert lora.patch(model, "all-linear", r=2, lora_alpha=4) is model
    assert torch.equal(model(ids).logits, expected)
    assert {k for k in model.state_dict() if "lora_" not in k} == keys
    trainable = {n for n, p in model.named_parameters() if p.requires_grad}
    assert trainable == set(lora.lora_state_dict(model))
    fill_factors(model)
    trained = model(ids).logits
    assert not torch.allclose(trained, expected)
    assert torch.equal(lora.unpatch(copy.deepcopy(model))(ids).logits, expected)
    plain = lora.unpatch(model, merge=True)
    torch.testing.assert_close(plain(ids).logits, trained, rtol=1e-4, atol=1e-5)
    assert {type(m) for m in plain.modules()} == {type(m) for m in llama().modules()}
    assert set(plain.state_dict()) == keys


def test_every_supported_type():
    model = nn.ModuleDict(
        {
            "linear": nn.Linear(4, 4),
            "embedding": nn.Embedding(4, 4),
            "conv1d": nn.Conv1d(4, 4, 1),
            "conv2d": nn.Conv2d(4, 4, 1),
            "conv3d": nn.Conv3d(4, 4, 1),
            "gpt": Conv1D(6, 4),
        }
    )
    types = {n: type(m) for n, m in model.items()}
    lora.patch(model, list(model), r=2, lora_alpha=4, lora_dropout=0.1)
    assert all(isinstance(m, lora.LoRALayer) for m in model.values())
    lora.unpatch(model)
    assert {n: type(m) for n, m in model.items()} == types


def test_gpt2_with_its_transposed_layers(fill_factors):
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(vocab_size=32, n_embd=16, n_layer=2, n_head=2)).eval()
    ids = torch.arange(8)[None]
    expected = model(ids).logits
    lora.patch(model, "all-linear", r=2, lora_alpha=4)
    assert len(patched_names(model)) == 8
    assert model.transformer.h[0].attn.c_attn.lora_B.shape == (48, 2)
    assert torch.equal(model(ids).logits, expected)
    trained = fill_factors(model)(ids).logits
    lora.unpatch(model, merge=True)
    assert type(model.transformer.h[0].attn.c_attn) is Conv1D
    torch.testing.assert_close(model(ids).logits, trained, rtol=1e-4, atol=1e-5)


def test_a_module_at_two_places_becomes_one_layer():
    shared = nn.Linear(4, 4)
    model = nn.ModuleDict({"a": shared, "b": shared})
    lora.patch(model, ["a", "b"], r=2, lora_alpha=4)
    assert model["a"] is model["b"]
    lora.unpatch(model)
    assert model["a"] is model["b"]
    assert type(model["a"]) is nn.Linear


def test_factors_are_fp32_on_a_half_base_unless_told():
    model = nn.Sequential(nn.Linear(4, 4).bfloat16())
    assert (
        lora.patch(copy.deepcopy(model), ["0"], r=2, lora_alpha=2)[0].lora_A.dtype == torch.float32
    )
    narrow = lora.patch(model, ["0"], r=2, lora_alpha=2, lora_dtype=torch.bfloat16)
    assert narrow[0].lora_A.dtype == torch.bfloat16


def test_bias_and_merge_weights_options():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    lora.patch(model, ["0"], r=2, lora_alpha=2, bias="lora_only", merge_weights=True)
    assert {n for n, p in model.named_parameters() if p.requires_grad} == {
        "0.lora_A",
        "0.lora_B",
        "0.bias",
    }
    assert model.eval()[0].merged


def test_hooks_stay():
    model = nn.Sequential(nn.Linear(4, 4))
    calls = []
    handle = model[0].register_forward_hook(lambda *_: calls.append(1))
    lora.patch(model, ["0"], r=2, lora_alpha=2)
    model(torch.zeros(1, 4))
    handle.remove()
    model(torch.zeros(1, 4))
    assert calls == [1]


class Quantised(nn.Linear):
    pass


class TensorSubclass(torch.Tensor):
    pass


def offloaded():
    import accelerate

    model = nn.Sequential(nn.Linear(4, 4))
    return accelerate.cpu_offload(model, execution_device=torch.device("cpu"))


def wrapped_by_peft():
    config = peft.LoraConfig(r=2, target_modules=["0"])
    return peft.inject_adapter_in_model(config, nn.Sequential(nn.Linear(4, 4)))


def compiled_inside():
    model = nn.Sequential(nn.Linear(4, 4))
    model[0].compile(backend="eager")
    return model


def subclass_weight():
    model = nn.Sequential(nn.Linear(4, 4, bias=False))
    model[0].weight = nn.Parameter(torch.zeros(4, 4).as_subclass(TensorSubclass))
    return model


def own_forward():
    model = nn.Sequential(nn.Linear(4, 4))
    model[0].forward = lambda x: x
    return model


REFUSED = {
    "nothing": (lambda: nn.Sequential(nn.Linear(4, 4)), ["1"], r"'1'"),
    "nearest": (llama, ["q_prj"], r"'q_prj' \(nearest: 'q_proj'\)"),
    "one of two": (llama, ["q_proj", "zz"], "'zz'"),
    "no names": (llama, None, "target_modules=None"),
    "pattern": (llama, "q_proj", r"one regular expression.*\['q_proj'\]"),
    "broken pattern": (llama, "(", "no regular expression"),
    "empty": (llama, [], "expected a list of names"),
    "container": (llama, ["self_attn"], "LlamaAttention cannot be adapted"),
    "norm": (llama, ["norm"], "LlamaRMSNorm cannot be adapted"),
    "subclass": (lambda: nn.Sequential(Quantised(4, 4)), ["0"], "Quantised"),
    "weight subclass": (subclass_weight, ["0"], "TensorSubclass"),
    "own forward": (own_forward, ["0"], "forward"),
    "mha": (lambda: nn.Sequential(nn.MultiheadAttention(4, 2)), ["out_proj"], "MultiheadAttention"),
    "fast path": (
        lambda: nn.Sequential(nn.TransformerEncoderLayer(4, 2, 8)),
        ["linear1"],
        "set_fastpath_enabled",
    ),
    "compiled": (
        lambda: torch.compile(nn.Sequential(nn.Linear(4, 4)), backend="eager"),
        ["0"],
        "comp",
    ),
    "compiled inside": (compiled_inside, ["0"], "patch the model first"),
    "offloaded": (offloaded, ["0"], "accelerate"),
    "peft": (wrapped_by_peft, ["base_layer"], "PEFT"),
    "sparse": (lambda: nn.Sequential(nn.Embedding(4, 4, sparse=True)), ["0"], "0: .*sparse"),
    "second of two": (
        lambda: nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4)),
        ["0", "1"],
        "1: .*LayerNorm cannot be adapted",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refusals_name_the_offender_and_touch_nothing(case):
    make, targets, message = REFUSED[case]
    model = make()
    before = snapshot(model)
    with pytest.raises((ValueError, TypeError), match=message):
        lora.patch(model, targets, r=2, lora_alpha=4)
    assert_untouched(model, before)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"r": 0}, "r=0 adapts nothing"),
        ({"r": -1}, "r=-1"),
        ({"lora_dropout": 1}, "lora_dropout=1"),
        ({"bias": "some"}, "bias='some'"),
        ({"layers_to_transform": 12}, r"layers_to_transform=12.*no target lies in layer \[12\]"),
        ({"layers_to_transform": []}, "layers_to_transform"),
        ({"rank_pattern": {"qq": 3}}, "rank_pattern: 'qq' matches none"),
        ({"rank_pattern": {"_proj": 3}}, "rank_pattern: '_proj' matches none"),
        ({"rank_pattern": {"layers.1": 3}}, "rank_pattern: 'layers.1' matches none"),
        ({"alpha_pattern": {"qq": 3}}, "alpha_pattern: 'qq' matches none"),
        ({"rank_pattern": {"layers.11.self_attn.q_proj": 0}}, "layers.11.*r=0"),
        ({"target_modules": ".*q_proj", "layers_to_transform": 1}, "with the regular expression"),
    ],
)
def test_bad_options_are_named_and_touch_nothing(options, message):
    model = llama()
    before = snapshot(model)
    with pytest.raises(ValueError, match=message):
        lora.patch(model, **{"target_modules": ["q_proj"], "r": 2, "lora_alpha": 4, **options})
    assert_untouched(model, before)


def test_a_second_patch_is_refused():
    model = lora.patch(llama(), ["q_proj"], r=2, lora_alpha=4)
    before = snapshot(model)
    with pytest.raises(ValueError, match=r"q_proj \(Linear\) is a LoRA layer already"):
        lora.patch(model, ["k_proj"], r=2, lora_alpha=4)
    assert_untouched(model, before)


def test_transformer_encoder_layer_is_right_once_the_fast_path_is_off(fill_factors):
    model = nn.Sequential(nn.TransformerEncoderLayer(4, 2, 8, batch_first=True, dropout=0.0))
    x = torch.randn(2, 3, 4)
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        lora.patch(model, ["linear1", "linear2"], r=2, lora_alpha=4)
        trained = fill_factors(model)(x)
        with torch.no_grad():
            torch.testing.assert_close(model.eval()(x), trained)
    finally:
        torch.backends.mha.set_fastpath_enabled(True)


def test_unpatch_refuses_what_it_cannot_merge():
    model = lora.patch(nn.Sequential(nn.Linear(4, 4)), ["0"], r=2, lora_alpha=4)
    model[0].lora_A.data[0, 0] = float("nan")
    before = snapshot(model)
    with pytest.raises(ValueError, match="0: a LoRA factor has a NaN"):
        lora.unpatch(model, merge=True)
    assert snapshot(model)[0] == before[0]
    with torch.device("meta"):
        model = lora.patch(nn.Sequential(nn.Linear(4, 4)), ["0"], r=2, lora_alpha=4)
    with pytest.raises(ValueError, match="meta"):
        lora.unpatch(model, merge=True)
    assert type(lora.unpatch(lora.Linear(4, 4, 2))) is nn.Linear


def test_unpatch_of_a_transposed_layer_gives_a_plain_linear(fill_factors):
    layer, x = fill_factors(lora.Linear(4, 6, 2, 1, 0.0, True)), torch.randn(3, 4)
    plain = lora.unpatch(layer, merge=True)
    assert plain.weight.shape == (6, 4)
    torch.testing.assert_close(plain(x), layer(x))


def test_the_layer_number_is_pefts():
    class Stage(nn.Module):
        def __init__(self):
            super().__init__()
            self.blocks = nn.ModuleList(nn.ModuleDict({"q": nn.Linear(4, 4)}) for _ in range(2))

    model = nn.Sequential(Stage(), Stage())
    lora.patch(model, ["q"], r=2, lora_alpha=2, layers_to_transform=[1])
    assert list(patched_names(model)) == ["0.blocks.1.q", "1.blocks.1.q"]


def test_all_linear_leaves_the_heads_of_classifiers():
    model = nn.ModuleDict({"fc": nn.Linear(4, 4), "score": nn.Linear(4, 2)})
    assert list(patched_names(lora.patch(model, "all-linear", r=2, lora_alpha=2))) == ["fc"]


def test_what_is_no_model_is_refused():
    with pytest.raises(TypeError, match=r"expected a torch\.nn\.Module, got 'model'"):
        lora.patch("model", ["q"], r=2, lora_alpha=2)


@pytest.mark.parametrize("targets", ["all_linear", ["all-linear"]])
def test_all_linear_in_other_words_is_told(targets):
    model = nn.Sequential(nn.Linear(4, 4))
    with pytest.raises(ValueError, match="the string 'all-linear'"):
        lora.patch(model, targets, r=2, lora_alpha=4)
