"""Adapters against PEFT itself, in both directions; what is refused; several adapters on a model."""

import contextlib
import copy
import json
import math
import warnings

import peft
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn
from torch._dynamo.testing import CompileCounter
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM
from transformers.pytorch_utils import Conv1D

import lora

# PEFT 0.21 asks transformers 5.23 for an attribute by its old name.
OF_TRANSFORMERS = "ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"
pytestmark = pytest.mark.filterwarnings(OF_TRANSFORMERS)

FOUR = ["qkv_proj", "o_proj", "gate_up_proj", "down_proj"]
TENSORS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
IDS = torch.arange(18).reshape(2, 9) * 5 % 96
EXACT, CLOSE = 1e-13, 1e-5  # in float64, in float32; of the largest value


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


def logits(model, ids=IDS):
    with torch.no_grad():
        y = model(ids)
    return y if torch.is_tensor(y) else y.logits


def assert_near(got, wanted, tolerance):
    atol = tolerance * wanted.abs().max().item()
    torch.testing.assert_close(got, wanted, rtol=0, atol=atol)


def assert_same_logits(ours, theirs):
    """In float64 the same; in the model's own dtype an error at most twice PEFT's."""
    got, wanted = (logits(copy.deepcopy(model).double()) for model in (ours, theirs))
    assert_near(got, wanted, EXACT)
    error, their_error = ((logits(m).double() - wanted).abs().max() for m in (ours, theirs))
    assert error <= max(2 * their_error, CLOSE * wanted.abs().max())


def assert_same_model(ours, theirs):
    """The same logits, and the same merged weights by the names of the plain model."""
    assert_same_logits(ours, theirs)
    got, wanted = (copy.deepcopy(model).double() for model in (ours, theirs))
    got, wanted = merged_state(got), merged_state(wanted)
    assert got.keys() == wanted.keys()
    for name in wanted:
        assert_near(got[name], wanted[name], EXACT)
    rounded, theirs_rounded = merged_state(copy.deepcopy(ours)), merged_state(copy.deepcopy(theirs))
    for name, exact in wanted.items():
        error = (rounded[name].double() - exact).abs().max()
        their_error = (theirs_rounded[name].double() - exact).abs().max()
        # We round to the weight's dtype once; an fp32 update has roundings of its own.
        assert error <= max(1.01 * their_error, 2**-23 * exact.abs().max())


def merged_state(model):
    if isinstance(model, peft.PeftModel):
        return model.merge_and_unload().state_dict()
    return lora.unpatch(model, merge=True).state_dict()


def in_peft(model, fill_factors=None, **options):
    """A PEFT model, its LoRA weights filled."""
    wrapped = get_peft_model(model, LoraConfig(**options)).eval()
    return fill_factors(wrapped) if fill_factors else wrapped


def of_file(folder):
    return load_file(folder / TENSORS)


def edit(folder, config=None, tensors=None):
    """Change the two files of an adapter by functions of their contents."""
    if config is not None:
        fields = json.loads((folder / CONFIG).read_text())
        (folder / CONFIG).write_text(json.dumps(config(fields)))
    if tensors is not None:
        save_file(tensors(of_file(folder)), folder / TENSORS, {"format": "pt"})


@contextlib.contextmanager
def unchanged(model):
    """Every module is the same object, every tensor the same to the bit, and the same ones train."""
    modules = dict(model.named_modules())
    parameters = dict(model.named_parameters())
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    trains = {name: p.requires_grad for name, p in parameters.items()}
    yield
    assert dict(model.named_modules()) == modules
    assert {name: id(p) for name, p in model.named_parameters()} == {
        name: id(p) for name, p in parameters.items()
    }
    assert {name: p.requires_grad for name, p in model.named_parameters()} == trains
    now = model.state_dict()
    assert now.keys() == state.keys()
    assert all(torch.equal(now[name], tensor) for name, tensor in state.items())


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
STD = {torch.float32: 0.2, torch.bfloat16: 0.05}


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


def lora_layers(model):
    return [(n, m) for n, m in model.named_modules() if isinstance(m, lora.LoRALayer)]


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


# What trains beside the factors


def move(parameters):
    """Other values for every Parameter."""
    with torch.no_grad():
        for parameter in parameters:
            parameter.add_(torch.randn_like(parameter), alpha=0.1)


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


class Biased(nn.Module):
    """Layers with biases, some adapted, one not, and a norm."""

    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(8, 12)
        self.norm = nn.LayerNorm(12)
        self.outer = nn.Linear(12, 5)

    def forward(self, ids):
        x = torch.sin(ids.unsqueeze(-1) * torch.arange(1.0, 9.0)).to(self.norm.weight.dtype)
        return self.outer(self.norm(torch.tanh(self.inner(x))))


def make_biased():
    torch.manual_seed(0)
    return Biased().eval()


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


# Training


def train(model, optimizer, steps=10):
    """The loss of every step, and the gradients of the first by shape-independent order."""
    optimizer = optimizer([p for p in model.parameters() if p.requires_grad])
    losses, first = [], {}
    model.train()
    for step in range(steps):
        loss = model(input_ids=IDS, labels=IDS).loss
        loss.backward()
        if step == 0:
            first = {n: p.grad.clone() for n, p in model.named_parameters() if p.requires_grad}
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]  # it does train
    return losses, {plain_key(name): grad for name, grad in first.items()}


def plain_key(name):
    name = name.removeprefix("base_model.model.")
    return name.removesuffix(".default.weight")


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


# What is refused


def save_quietly(model, folder):
    """save_pretrained with features that PEFT itself warns about."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.save_pretrained(folder)


REFUSED_FEATURES = {
    "use_dora": {"target_modules": FOUR, "use_dora": True},
    "lora_bias": {"target_modules": FOUR, "lora_bias": True},
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


def refused(model, path, match, **options):
    with unchanged(model), pytest.raises(lora.AdapterError, match=match):
        lora.load_adapter(model, path, **options)


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


def plain_file(model, folder, fill_factors, **options):
    options = {"target_modules": FOUR, "r": 4, "lora_alpha": 8, **options}
    in_peft(model, fill_factors, **options).save_pretrained(folder)


def test_a_pattern_that_is_no_regular_expression_is_refused(make_phi3, fill_factors, tmp_path):
    plain_file(make_phi3(), tmp_path, fill_factors)
    edit(tmp_path, lambda c: {**c, "rank_pattern": {"qkv_proj(": 4}})
    refused(make_phi3(), tmp_path, r"qkv_proj\(")


def renamed(old, new):
    return lambda tensors: {key.replace(old, new): t for key, t in tensors.items()}


def changed(part, change):
    """Change the one tensor whose key has `part`."""

    def of(tensors):
        (key,) = [key for key in tensors if part in key]
        return {**tensors, key: change(tensors[key].clone())}

    return of


def set_first(value):
    def of(tensor):
        tensor.view(-1)[0] = value
        return tensor

    return of


QKV_A, QKV_B = "0.self_attn.qkv_proj.lora_A", "0.self_attn.qkv_proj.lora_B"
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


# Several adapters


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


# What torch itself warns about while it imports its compiler or traces.
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", OF_TRANSFORMERS)
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
