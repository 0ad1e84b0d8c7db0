"""4-bit weights on disk: what transformers and bitsandbytes saved, adapters for them, and merging."""

import json
import math
import os
import subprocess
import sys

import nf4_oracle
import pytest
import torch
from adapter_helpers import FOUR, lora_layers, refused
from safetensors.torch import load_file, save_file
from torch import nn

import lora
from lora.adapter import checkpoint, convert, fingerprint, read_adapter, write_adapter
from lora.adapter.checkpoint import Checkpoint
from lora.adapter.contents import AdapterError
from lora.adapter.merge import merge_checkpoint
from lora.kernels.nf4_tensor import NF4Tensor

BF16 = torch.bfloat16
WEIGHT = "model.layers.0.self_attn.o_proj.weight"
INDEX = "model.safetensors.index.json"


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A bf16 Phi-3 ("dense"), and what a user saves who loads it in 4 bits ("nested", "plain")."""
    pytest.importorskip("bitsandbytes")
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig, Phi3Config, Phi3ForCausalLM

    folder = tmp_path_factory.mktemp("bases")
    torch.manual_seed(0)
    sizes = {"vocab_size": 96, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128}
    tokens = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    model = Phi3ForCausalLM(Phi3Config(**sizes, **heads, **tokens)).to(BF16)
    model.save_pretrained(folder / "dense")
    for name in ("nested", "plain"):
        options = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=name == "nested",
            bnb_4bit_compute_dtype=BF16,
        )
        quantized = AutoModelForCausalLM.from_pretrained(
            folder / "dense", quantization_config=options, dtype=BF16, device_map="cpu"
        )
        quantized.save_pretrained(folder / name, max_shard_size="20KB")
    return folder


def dense_model(folder, dtype=BF16):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder / "dense", dtype=dtype).eval()


def meta_model(folder, dtype=BF16):
    from transformers import AutoConfig, AutoModelForCausalLM

    with torch.device("meta"):
        config = AutoConfig.from_pretrained(folder / "dense")
        return AutoModelForCausalLM.from_config(config, dtype=dtype).eval()


def patched(model, seed=1, **options):
    options = {"r": 4, "lora_alpha": 8, "target_modules": FOUR, "quantize": "nf4", **options}
    torch.manual_seed(seed)
    return lora.patch_phi3(model, lora_dropout=0.0, **options)


def assert_same_state(model, other):
    got, want = model.state_dict(), other.state_dict()
    assert got.keys() == want.keys()
    assert [name for name in want if not torch.equal(got[name], want[name])] == []


def no_longer_on_meta(model):
    tensors = [*model.named_parameters(), *model.named_buffers()]
    return not [name for name, tensor in tensors if tensor.is_meta]


def tensors_of(folder):
    return {k: v for path in folder.glob("*.safetensors") for k, v in load_file(path).items()}


def by_bitsandbytes(folder, weight):
    """The weight of the folder as bitsandbytes dequantises it."""
    from bitsandbytes.functional import QuantState

    stored = tensors_of(folder)
    parts = {k: v for k, v in stored.items() if k.startswith(f"{weight}.")}
    state = QuantState.from_dict(parts, torch.device("cpu"))
    return nf4_oracle.dequantized(stored[weight], state)


# Reading


@pytest.mark.parametrize("name", ["nested", "plain"])
def test_a_checkpoint_has_the_weights_that_bitsandbytes_has(folders, name):
    base, plain = Checkpoint(folders / name), Checkpoint(folders / "dense")
    assert len(base.shards) > 2
    assert sorted(base.names) == sorted(plain.names)
    assert len(base.quantized) == 8
    for key in base.names:
        assert base.shape(key) == plain.shape(key)
        assert base.dtype(key) == BF16
        assert base.is_quantized(key) == key.endswith("_proj.weight")
    for key in base.quantized:
        weight = base.nf4(key)
        assert torch.equal(weight.dequantize(), by_bitsandbytes(folders / name, key))
        where = fingerprint.positions(weight.numel())
        scales = lora.kernels.nf4.scales(weight.parts)[torch.tensor(where) // 64]
        elements = (base.levels(key, where) * scales).to(BF16)
        assert torch.equal(elements, weight.dequantize().flatten()[where])
        for read in (lambda key=key: base.rows(key, 0, 1), lambda key=key: base.take(key, [0])):
            with pytest.raises(AdapterError, match=f"{key}.*is a 4-bit weight: expected one"):
                read()


CONFIG = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}


@pytest.mark.parametrize(
    ("change", "found"),
    [
        ({"bnb_4bit_quant_type": "fp4"}, "bnb_4bit_quant_type='fp4'"),
        ({"load_in_4bit": False, "load_in_8bit": True}, "load_in_4bit=False"),
        ({"quant_method": "gptq", "bits": 4}, "quant_method='gptq'"),
        ({"quant_method": "awq"}, "quant_method='awq'"),
        ({"bnb_4bit_quant_type": None}, "bnb_4bit_quant_type=None"),
    ],
    ids=["fp4", "int8", "gptq", "awq", "unsaid"],
)
def test_other_quantisations_are_refused_by_name(tmp_path, change, found):
    save_file({"a.weight": torch.ones(2, 2)}, tmp_path / "model.safetensors")
    config = {"quantization_config": CONFIG | change}
    (tmp_path / "config.json").write_text(json.dumps(config))
    match = rf"quantised with {found}: expected .*not quantised, or .*'nf4'; give the base"
    with pytest.raises(AdapterError, match=match):
        Checkpoint(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"quantization_config": CONFIG}))
    assert Checkpoint(tmp_path).names == ["a.weight"]


def stored_parts(**changes):
    """A stored 4-bit weight of a layer `a`; None takes a part away."""
    layer = lora.LinearNF4.from_module(nn.Linear(64, 8, bias=False))
    state = {f"a.{key}": value.clone() for key, value in layer.state_dict().items()}
    for own, value in changes.items():
        (key,) = [key for key in state if key.endswith(own)]
        state.pop(key)
        if value is not None:
            state[key] = value
    return state


def text(**changes):
    said = {"quant_type": "nf4", "blocksize": 64, "dtype": "float32", "shape": [8, 64]}
    said |= {"nested_blocksize": 256, "nested_dtype": "float32", "nested_offset": 0.1, **changes}
    said = {key: value for key, value in said.items() if value is not None}
    return torch.frombuffer(bytearray(json.dumps(said).encode()), dtype=torch.uint8)


PLAIN = text(nested_blocksize=None, nested_dtype=None, nested_offset=None)


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"weight.nested_absmax": None}, "nested_absmax is missing"),
        (
            {"weight.nested_absmax": None, "weight.absmax": torch.ones(9), "__nf4": PLAIN},
            "absmax has 9 elements",
        ),
        ({"weight.absmax": None}, "the scales, absmax, are missing"),
        ({"a.weight": None}, "the codes, `weight`, are missing"),
        ({"__nf4": text(blocksize=128)}, "blocksize=128: expected 64"),
        ({"__nf4": text(shape=[9, 64])}, "packed has 256 elements: a weight .9, 64. has 288"),
        ({"__nf4": text(dtype="float33")}, "float33"),
        ({"__nf4": torch.zeros(3, dtype=torch.uint8)}, "Expecting value"),
    ],
)
def test_damaged_parts_are_refused_when_a_checkpoint_is_opened(tmp_path, changes, match):
    save_file(stored_parts(**changes), tmp_path / "model.safetensors")
    with pytest.raises(AdapterError, match=rf"the 4-bit weight 'a\.weight' of .*{match}"):
        Checkpoint(tmp_path)


def test_parts_of_another_type_and_changed_tables_are_refused(tmp_path):
    state = stored_parts()
    fp4 = {key.replace("__nf4", "__fp4"): value for key, value in state.items()}
    save_file(fp4, tmp_path / "model.safetensors")
    with pytest.raises(AdapterError, match=r"'a\.weight' of .*quantised as fp4: expected nf4"):
        Checkpoint(tmp_path)
    state = stored_parts(**{"weight.quant_map": torch.zeros(16)})
    save_file(state, tmp_path / "model.safetensors")
    with pytest.raises(AdapterError, match=r"'a\.weight' of .*quant_map is not the one of NF4"):
        Checkpoint(tmp_path).nf4("a.weight")


WITHOUT = """
import sys
sys.modules["bitsandbytes"] = None  # importing it fails
import torch, lora
from transformers import AutoConfig, AutoModelForCausalLM
from lora.adapter import read_adapter
from lora.adapter.merge import merge_checkpoint
folder, adapter, out = sys.argv[1:]
with torch.device("meta"):
    config = AutoConfig.from_pretrained(folder + "/dense")
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
lora.patch(model, "all-linear", r=2, lora_alpha=4, quantize="nf4")
lora.load_pretrained(model, folder + "/nested")
weights = [p for p in model.parameters() if not p.requires_grad]
merge_checkpoint(folder + "/nested", read_adapter(adapter).checked(), out, dequantize=torch.bfloat16)
print(sum(type(w).__name__ == "NF4Tensor" for w in weights), "bitsandbytes" in sys.modules)
"""


def test_reading_needs_no_bitsandbytes(folders, tmp_path, fill_factors):
    lora.save_adapter(fill_factors(patched(dense_model(folders))), tmp_path / "adapter")
    command = [sys.executable, "-c", WITHOUT, folders, tmp_path / "adapter", tmp_path / "out"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["8", "True"]  # an entry that says it may not be imported


# load_pretrained


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"use_dora": True, "target_modules": ["qkv_proj", "down_proj"]},
        {"init_lora_weights": "pissa"},
        {"init_lora_weights": "loftq"},
        {"lora_bias": True, "use_rslora": True},
    ],
    ids=str,
)
@pytest.mark.parametrize("dtype", [BF16, torch.float32], ids=str)
def test_a_dense_checkpoint_fills_a_model_as_patching_a_loaded_one_does(folders, options, dtype):
    want = patched(dense_model(folders, dtype), **options)
    model = patched(meta_model(folders, dtype), **options)
    torch.manual_seed(1)
    lora.load_pretrained(model, folders / "dense")
    assert no_longer_on_meta(model)
    assert_same_state(model, want)
    trains = [name for name, p in model.named_parameters() if p.requires_grad]
    assert trains == [name for name, p in want.named_parameters() if p.requires_grad]
    buffers = dict(want.named_buffers())
    assert {"model.rotary_emb.inv_freq", "model.rotary_emb.original_inv_freq"} <= buffers.keys()
    for name, buffer in model.named_buffers():
        assert torch.equal(buffer, buffers[name])
    ids = torch.arange(12)[None]
    assert torch.equal(model(ids).logits, want(ids).logits)


@pytest.mark.parametrize("name", ["nested", "plain"])
@pytest.mark.parametrize("options", [{}, {"use_dora": True}, {"init_lora_weights": "pissa"}])
def test_a_4_bit_checkpoint_fills_a_model_to_the_bit(folders, name, options):
    model = patched(meta_model(folders), **options)
    torch.manual_seed(1)
    lora.load_pretrained(model, folders / name)
    assert no_longer_on_meta(model)
    layers = dict(lora_layers(model))
    assert len(layers) == 8
    for path, layer in layers.items():
        want = by_bitsandbytes(folders / name, f"{path}.weight")
        assert torch.equal(layer.weight.dequantize(), want)
        if options.get("use_dora"):
            assert torch.equal(layer.lora_magnitude, layer._row_norms())
        if "init_lora_weights" in options:
            assert torch.equal(layer.lora_A, layer.lora_A0)
            assert layer.lora_B.any()
    stored = tensors_of(folders / "dense")
    assert torch.equal(model.lm_head.weight, stored["lm_head.weight"])
    model(input_ids=torch.arange(12)[None], labels=torch.arange(12)[None]).loss.backward()
    assert all(layer.lora_B.grad is not None for layer in layers.values())


def test_a_model_without_adapters_and_an_adapter_that_was_loaded_first(folders, tmp_path):
    model = meta_model(folders)
    lora.load_pretrained(model, folders / "dense")
    assert_same_state(model, dense_model(folders))
    trained = patched(dense_model(folders), quantize=None, modules_to_save=["lm_head"])
    with torch.no_grad():
        for parameter in trained.parameters():
            if parameter.requires_grad:
                parameter.normal_()
    lora.save_adapter(trained, tmp_path)
    model = meta_model(folders)
    lora.load_adapter(model, tmp_path)
    lora.load_adapter(model, tmp_path, name="second")
    lora.load_pretrained(model, folders / "dense")
    assert no_longer_on_meta(model)
    got, want = lora.lora_state_dict(model), lora.lora_state_dict(trained)
    assert all(torch.equal(got[name], want[name]) for name in want if "lora_" in name)
    lora.set_adapter(model, "second")
    assert no_longer_on_meta(model)
    assert no_longer_on_meta(lora.unpatch(model))
    assert_same_state(model, dense_model(folders))


def test_an_adapter_without_a_weight_for_it_is_refused_by_shape(folders, tmp_path, trained):
    """The names and shapes of a 4-bit base are those of the dense weights."""
    adapter = read_adapter(trained[0]).checked()
    name, layer = next(iter(adapter.layers.items()))
    wrong = layer.with_factors(layer.lora_A[:, :-2], layer.lora_B)
    adapter = adapter.replaced(layers={name: wrong})
    with pytest.raises(AdapterError, match=rf"'{name}\.weight' is \(.*, 64\).*expected \(.*, 62\)"):
        merge_checkpoint(folders / "nested", adapter, tmp_path / "out", dequantize=BF16)


def tied(device="cpu"):
    with torch.device(device):
        model = nn.ModuleDict({"embed": nn.Embedding(16, 64), "inner": nn.Linear(64, 64)})
        model["lm_head"] = nn.Linear(64, 16, bias=False)
    model["lm_head"].weight = model["embed"].weight
    model.register_buffer("steps", torch.tensor(3, device=device))
    return model


def test_tied_weights_stay_tied_and_stored_buffers_are_read(tmp_path):
    base = tied()
    state = base.state_dict()
    del state["lm_head.weight"]
    save_file(state, tmp_path / "model.safetensors")
    model = lora.patch(tied("meta"), ["inner"], r=2, lora_alpha=4, quantize="nf4")
    lora.load_pretrained(model, tmp_path)
    assert model["embed"].weight is model["lm_head"].weight
    assert torch.equal(model["embed"].weight, base["embed"].weight)
    assert model.steps == 3
    want = NF4Tensor.quantize(base["inner"].weight).dequantize()
    assert torch.equal(model["inner"].weight.dequantize(), want)


def assert_refused(model, folder, *words):
    before = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    with pytest.raises(AdapterError) as caught:
        lora.load_pretrained(model, folder)
    assert all(word in str(caught.value) for word in words), caught.value
    now = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    assert now.keys() == before.keys()
    assert all(now[name] is tensor for name, tensor in before.items())


def test_what_does_not_fit_is_refused_by_name(folders, tmp_path):
    nothing = "nothing was read"
    quantized = f"8 problems: {WEIGHT} is of 4 bits, in the model it is dense", "quantize='nf4'"
    assert_refused(meta_model(folders), folders / "nested", *quantized, nothing)
    model = patched(meta_model(folders), init_lora_weights="loftq")
    assert_refused(model, folders / "nested", WEIGHT, "'loftq'", "the original checkpoint", nothing)
    assert_refused(dense_model(folders), folders / "dense", "is not on the meta device", nothing)
    state = tensors_of(folders / "dense")
    state[WEIGHT] = state[WEIGHT][:32].clone()
    state["model.norm.weight"] = torch.ones(64, dtype=torch.int8)
    del state["lm_head.weight"]
    save_file(state, tmp_path / "model.safetensors")
    wrong = f"{WEIGHT} is (32, 64), in the model (64, 64)", "missing tensor lm_head.weight"
    integers = "model.norm.weight is torch.int8, in the model torch.bfloat16"
    assert_refused(patched(meta_model(folders)), tmp_path, *wrong, integers, nothing)
    state = tensors_of(folders / "dense")
    state[WEIGHT][3, 5] = math.inf
    save_file(state, tmp_path / "model.safetensors")
    assert_refused(patched(meta_model(folders)), tmp_path, WEIGHT, "infinite or NaN")


class Buffers(nn.Module):
    """A module with a buffer that no checkpoint has."""

    def __init__(self, dtype):
        super().__init__()
        self.inner = nn.Linear(4, 4)
        self.register_buffer("table", torch.ones(3).to(dtype), persistent=False)


@pytest.mark.parametrize("dtype", [torch.float32, torch.int64, torch.bool])
@pytest.mark.parametrize("initialised", [False, True])
def test_a_buffer_that_nothing_fills_is_refused(tmp_path, dtype, initialised):
    save_file(Buffers(dtype).state_dict(), tmp_path / "model.safetensors")
    with torch.device("meta"):
        model = Buffers(dtype)
    if initialised:
        model._init_weights = lambda module: None
    message = "the buffer table is on the meta device", "a Buffers, outside of torch.device('meta')"
    assert_refused(model, tmp_path, *message, "nothing was read")
    model.table = torch.ones(3).to(dtype)
    lora.load_pretrained(model, tmp_path)
    assert model.table.all()


LOAD = """
import sys, torch, lora
from little_memory import at_most
from torch import nn

torch.set_num_threads(1)
side, count = 2048, 16
lora.LinearNF4.from_module(nn.Linear(side, side, bias=False))  # tables, and what torch loads
with torch.device("meta"):
    model = nn.Sequential(*(nn.Linear(side, side, bias=False) for _ in range(count)))
    model = model.to(torch.bfloat16)
lora.patch(model, "all-linear", r=4, lora_alpha=8, quantize="nf4")
size = sum(p.nbytes for p in model.parameters())
with at_most(size + 3 * 2 * side * side):
    lora.load_pretrained(model, sys.argv[1])
print(size)
"""


def test_loading_holds_the_4_bit_model_and_a_few_layers(tmp_path, in_a_new_process):
    """Of 16 bf16 layers, 134 MB, no more is in memory than 4 bits of them, and three layers."""
    weights = {f"{i}.weight": torch.randn(2048, 2048).to(BF16) for i in range(16)}
    save_file(weights, tmp_path / "model.safetensors")
    (size,) = in_a_new_process(LOAD, tmp_path)
    assert size < 0.3 * sum(weight.nbytes for weight in weights.values())


# Fingerprints


def fingerprints(folder):
    return {name: layer.fingerprint for name, layer in read_adapter(folder).adapter.layers.items()}


@pytest.fixture
def trained(folders, tmp_path, fill_factors):
    """An adapter that was trained on 4 bits, its folder, and its model."""
    model = fill_factors(patched(dense_model(folders)))
    lora.save_adapter(model, tmp_path / "adapter")
    return tmp_path / "adapter", model


def load_4bit(folders, name="nested"):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folders / name, device_map="cpu")


def test_an_adapter_of_4_bits_knows_its_base_in_every_form(folders, trained, tmp_path):
    folder, _ = trained
    assert all(found.endswith(":nf4") for found in fingerprints(folder).values())
    on_dense, on_fp32 = dense_model(folders), dense_model(folders, torch.float32)
    for model in (on_dense, on_fp32, load_4bit(folders), load_4bit(folders, "plain")):
        assert lora.load_adapter(model, folder).base == "matches"
    model = patched(dense_model(folders), seed=5)
    assert lora.load_adapter(model, folder).base == "matches"
    for name, base in (("original", "dense"), ("four", "nested"), ("five", "plain")):
        dequantize = None if base == "dense" else BF16
        report = merge_checkpoint(
            folders / base, read_adapter(folder).checked(), tmp_path / name, dequantize=dequantize
        )
        assert report.base == "matches"
    lora.save_adapter(model, tmp_path / "again")
    assert fingerprints(tmp_path / "again") == fingerprints(folder)


def test_another_base_is_refused_in_every_form(folders, trained, tmp_path):
    folder, _ = trained
    other = dense_model(folders)
    with torch.no_grad():
        other.model.layers[1].mlp.down_proj.weight.neg_()
    match = r"another base model: .* of 1 of 8 layers .* the first is model\.layers\.1\.mlp\.down"
    refused(other, folder, match)
    other.save_pretrained(tmp_path / "other")
    with pytest.raises(AdapterError, match=match):
        merge_checkpoint(tmp_path / "other", read_adapter(folder).checked(), tmp_path / "out")
    refused(patched(other), folder, match)


def test_an_adapter_of_a_dense_base_cannot_be_told_on_4_bits(folders, tmp_path, fill_factors):
    model = fill_factors(patched(dense_model(folders), quantize=None))
    lora.save_adapter(model, tmp_path / "adapter")
    report = lora.load_adapter(load_4bit(folders), tmp_path / "adapter")
    assert report.base.startswith("not checked: quantised")


def test_a_weight_that_was_rounded_before_it_was_quantised_is_known():
    weight = torch.randn(96, 130)
    for dtype in (torch.float32, BF16, torch.float16):
        then = fingerprint.fingerprint(NF4Tensor.quantize(weight.to(dtype)))
        assert then in fingerprint.of_base(then, weight)
    odd = torch.randn(7, 9)  # whose last block is shorter
    then = fingerprint.fingerprint(NF4Tensor.quantize(odd))
    assert then in fingerprint.of_base(then, odd)
    assert then not in fingerprint.of_base(then, -odd)
    assert fingerprint.of_base(then, odd.to("meta")) is None


def test_the_original_is_known_by_the_blocks_that_are_sampled(folders, trained, monkeypatch):
    read = []
    original = Checkpoint._read_many

    def counted(self, name, starts, size):
        read.append(len(starts) * size)
        return original(self, name, starts, size)

    monkeypatch.setattr(Checkpoint, "_read_many", counted)
    base, adapter = Checkpoint(folders / "dense"), read_adapter(trained[0]).checked()
    assert checkpoint.Checkpoint is Checkpoint
    assert lora.adapter.check.compare_base(base, adapter) == "matches"
    assert max(read) <= 64 * 64 * 2
    assert sum(read) <= 8 * 64 * 64 * 2


# LoftQ


@pytest.fixture
def loftq(folders, tmp_path):
    model = patched(dense_model(folders), init_lora_weights="loftq")
    lora.save_adapter(model, tmp_path / "loftq")
    return tmp_path / "loftq", model


def test_a_loftq_adapter_fits_the_4_bit_weights_alone(folders, loftq, tmp_path):
    folder, _ = loftq
    assert all(found.endswith(":nf4:loftq") for found in fingerprints(folder).values())
    reason = r"o_proj began as what quantising lost \(LoftQ\), and the weight here is dense"
    refused(dense_model(folders), folder, f"{reason}.*quantise the base first")
    adapter = read_adapter(folder).checked()
    with pytest.raises(AdapterError, match=f"{reason}.*--dequantize bfloat16"):
        merge_checkpoint(folders / "dense", adapter, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    for write in (convert.split, lambda a: convert.fuse(convert.split(a))):
        write_adapter(write(adapter), tmp_path / "other")
        marks = {found for found in fingerprints(tmp_path / "other").values()}
        assert all(found.endswith(":nf4:loftq") for found in marks)


def test_the_mark_of_loftq_stays_and_goes_with_the_adapter(folders, loftq, trained, tmp_path):
    for number, model in enumerate((load_4bit(folders), patched(dense_model(folders)))):
        lora.load_adapter(model, loftq[0])
        lora.save_adapter(model, tmp_path / str(number))
        assert fingerprints(tmp_path / str(number)) == fingerprints(loftq[0])
    lora.load_adapter(model, trained[0])  # into the same layers
    lora.save_adapter(model, tmp_path / "plain")
    assert fingerprints(tmp_path / "plain") == fingerprints(trained[0])
    assert not any("init_lora_weights" in layer.variant for _, layer in lora_layers(model))


# Merging


def assert_near_merged(folder, want, steps=1):
    """Every tensor is that of the model, up to a rounding of the update in fp32 before the last one."""
    got, want = tensors_of(folder), want.state_dict()
    assert got.keys() == want.keys()
    for name, tensor in want.items():
        assert got[name].dtype == tensor.dtype, name
        eps = torch.finfo(tensor.dtype).eps
        error = (got[name].double() - tensor.double()).abs()
        assert (error <= steps * eps * tensor.double().abs() + 1e-7).all(), name
        if tensor.dtype != torch.float32:  # else the sum itself was rounded so
            assert (error == 0).double().mean() > 0.9


@pytest.mark.parametrize("options", [{}, {"use_dora": True}], ids=["plain", "dora"])
def test_merging_into_the_original_is_merging_in_memory(folders, tmp_path, fill_factors, options):
    model = fill_factors(patched(dense_model(folders), **options), std=0.05)
    lora.save_adapter(model, tmp_path / "adapter")
    adapter = read_adapter(tmp_path / "adapter").checked()
    report = merge_checkpoint(folders / "dense", adapter, tmp_path / "out")
    original = dense_model(folders)
    distances = {}
    for name, layer in lora_layers(model):
        dense = original.get_submodule(name).weight.detach()
        update = torch.linalg.vector_norm((layer.weight.dequantize() - dense).double())
        distances[name] = float(update)
    if not options:
        for name, layer in report.layers.items():
            assert layer.distance == pytest.approx(distances[name], rel=1e-6)
            assert layer.relative_distance == pytest.approx(layer.distance / layer.update_norm)
        assert "change of base: from the 4-bit weights of the training" in str(report)
    lora.unpatch(model, merge=True, dtype=BF16, base=original.state_dict())
    assert_near_merged(tmp_path / "out", model)


@pytest.mark.parametrize("dtype", [BF16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("name", ["nested", "plain"])
def test_a_dequantising_merge_is_merging_in_memory(folders, tmp_path, fill_factors, name, dtype):
    model = meta_model(folders)
    patched(model, target_modules=["qkv_proj", "down_proj"])
    lora.load_pretrained(model, folders / name)
    fill_factors(model, std=0.05)
    lora.save_adapter(model, tmp_path / "adapter")
    adapter, out = read_adapter(tmp_path / "adapter").checked(), tmp_path / "out"
    report = merge_checkpoint(folders / name, adapter, out, dequantize=dtype)
    assert report.base == "matches"
    assert "change of base" not in str(report)
    lora.unpatch(model, merge=True, dtype=dtype)
    assert_near_merged(out, model)
    config = json.loads((out / "config.json").read_text())
    assert "quantization_config" not in config
    assert config["dtype"] == str(dtype)[6:]
    index, tensors = json.loads((out / INDEX).read_text()), tensors_of(out)
    assert index["weight_map"].keys() == tensors.keys()
    for key, shard in index["weight_map"].items():
        assert key in load_file(out / shard)
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in tensors.values())
    assert index["metadata"]["total_size"] == report.bytes
    assert index["metadata"].get("total_parameters") in (
        None,
        sum(t.numel() for t in tensors.values()),
    )
    assert len(tensors) == report.tensors
    from transformers import AutoModelForCausalLM

    loaded = AutoModelForCausalLM.from_pretrained(out, dtype="auto")
    assert loaded.dtype == dtype
    untouched = "model.layers.0.self_attn.o_proj"
    want = model.get_submodule(untouched).weight
    assert torch.equal(loaded.get_submodule(untouched).weight, want)


def test_a_loftq_adapter_merges_into_what_it_was_trained_on(folders, loftq, tmp_path):
    folder, model = loftq
    adapter = read_adapter(folder).checked()
    lora.unpatch(model, merge=True, dtype=BF16)
    for name in ("dense", "nested"):
        merge_checkpoint(folders / name, adapter, tmp_path / name, dequantize=BF16)
        assert_near_merged(tmp_path / name, model)
    original, merged = (tensors_of(folders / "dense"), tensors_of(tmp_path / "dense"))
    quantized = NF4Tensor.quantize(original[WEIGHT]).dequantize().float()
    lost = torch.linalg.vector_norm(quantized - original[WEIGHT])
    assert torch.linalg.vector_norm(merged[WEIGHT].float() - original[WEIGHT]) < 0.95 * lost


def test_what_cannot_be_merged_is_refused(folders, trained, tmp_path, fill_factors):
    adapter, out = read_adapter(trained[0]).checked(), tmp_path / "out"
    with pytest.raises(
        AdapterError, match=r"8 weights of 4 bits.*dequantize=torch\.bfloat16.*orig"
    ):
        merge_checkpoint(folders / "nested", adapter, out)
    with pytest.raises(
        AdapterError, match=r"dequantize=torch\.int8: expected one of torch\.float32"
    ):
        merge_checkpoint(folders / "nested", adapter, out, dequantize=torch.int8)
    dense = fill_factors(patched(dense_model(folders), quantize=None))
    lora.save_adapter(dense, tmp_path / "dense")
    adapter = read_adapter(tmp_path / "dense").checked()
    with pytest.raises(AdapterError, match=r"dequantize=torch\.bfloat16: .* leave it out"):
        merge_checkpoint(folders / "dense", adapter, out, dequantize=BF16)
    assert not out.exists()
    assert merge_checkpoint(folders / "nested", adapter, out, dequantize=BF16).base.startswith(
        "not checked: quantised"
    )


def command_line(*arguments):
    environment = {**os.environ, "PYTHONWARNINGS": "error"}
    command = [sys.executable, "-m", "lora", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False, env=environment)


def test_the_command_line(folders, trained, loftq, tmp_path):
    adapter, out = trained[0], tmp_path / "out"
    done = command_line("merge", folders / "nested", adapter, out)
    assert done.returncode == 2
    assert "--dequantize bfloat16" in done.stderr
    done = command_line("merge", folders / "nested", adapter, out, "--dequantize", "float32")
    assert done.returncode == 0, done.stderr
    assert "frozen weights: matches" in done.stdout
    assert tensors_of(out)[WEIGHT].dtype == torch.float32
    done = command_line("check", adapter, "--base", folders / "plain")
    assert done.returncode == 0, done.stdout
    assert "8 layers; 15 tensors" in done.stdout
    assert "frozen weights: matches" in done.stdout
    done = command_line("check", loftq[0], "--base", folders / "dense")
    assert done.returncode == 1
    assert "problem: the update of" in done.stdout
    assert "--dequantize" in command_line("merge", "--help").stdout


MERGE = """
import sys, torch
from little_memory import at_most
from lora.adapter.contents import Adapter, Layer
from lora.adapter.merge import merge_checkpoint

torch.set_num_threads(1)
side, count = 4096, 6
A, B = torch.full((4, side), 0.5), torch.ones(side, 4)
layers = {f"{i}": Layer("Linear", A, B, 4, 1.0, fingerprint=":nf4") for i in range(0, count, 2)}
dtype = torch.bfloat16 if sys.argv[3] == "dequantize" else None
merge_checkpoint(sys.argv[1], Adapter(layers), f"{sys.argv[2]}-0", dequantize=dtype)  # tables too
with at_most(4 * 2 * side * side):
    merge_checkpoint(sys.argv[1], Adapter(layers), f"{sys.argv[2]}-1", dequantize=dtype)
"""


@pytest.mark.parametrize("form", ["nf4", "dense"])
def test_merging_holds_a_few_layers(tmp_path, form, in_a_new_process):
    """Of 6 layers that are 201 MB in bf16, four at a time, from 4 bits and into the original."""
    weights = {}
    for i in range(6):
        dense = nn.Linear(4096, 4096, bias=False, dtype=BF16)
        layer = lora.LinearNF4.from_module(dense) if form == "nf4" else dense
        weights |= {f"{i}.{key}": value.clone() for key, value in layer.state_dict().items()}
    base, out = tmp_path / "base", tmp_path / "merged"
    base.mkdir()
    save_file(weights, base / "model.safetensors")
    (base / "config.json").write_text('{"tie_word_embeddings": false}')
    in_a_new_process(MERGE, base, out, "dequantize" if form == "nf4" else "original")


# A model that transformers read in 4 bits, as it is saved again


def of_4_bits(layer):
    return type(layer).__name__ in ("Linear4bit", "LinearNF4")


@pytest.mark.parametrize("name", ["nested", "plain"])
def test_a_4_bit_base_that_was_read_is_saved_again(folders, tmp_path, name):
    from transformers import AutoModelForCausalLM

    model = load_4bit(folders, name)
    options = model.config.quantization_config
    ids = torch.arange(3, 15)[None]
    want = model.eval()(ids).logits
    lora.unpatch(patched(model))
    assert not hasattr(model.config, "quantization_config")
    model.config.quantization_config = options
    model.save_pretrained(tmp_path / "again")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "again", device_map="cpu").eval()
    assert torch.equal(again(ids).logits, want)


@pytest.mark.parametrize("read", [load_4bit, meta_model], ids=["transformers", "load_pretrained"])
def test_it_is_merged_and_saved(folders, tmp_path, fill_factors, read):
    from transformers import AutoConfig, AutoModelForCausalLM

    model = read(folders)
    if read is meta_model:
        model.config = AutoConfig.from_pretrained(folders / "nested")
    patched(model)
    if read is meta_model:
        lora.load_pretrained(model, folders / "nested")
    ids = torch.arange(3, 15)[None]
    want = fill_factors(model, std=0.05).eval()(ids).logits
    lora.unpatch(model, merge=True, dtype=BF16).save_pretrained(tmp_path / "merged")
    assert "quantization_config" not in json.loads((tmp_path / "merged/config.json").read_text())
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    assert torch.equal(merged(ids).logits, model(ids).logits)
    assert (merged(ids).logits - want).norm() < 0.02 * want.norm()


def test_layers_that_stay_bitsandbytes_are_merged_to_dense_ones_too(folders, fill_factors):
    model = load_4bit(folders)
    lora.patch(model, ["qkv_proj"], r=4, lora_alpha=8)
    down = model.model.layers[0].mlp.down_proj
    want = lora.LinearNF4.from_module(down).weight.dequantize()
    lora.unpatch(fill_factors(model), merge=True, dtype=BF16)
    assert not any(map(of_4_bits, model.modules()))
    assert torch.equal(model.model.layers[0].mlp.down_proj.weight, want)
    assert not hasattr(model.config, "quantization_config")


def test_a_4_bit_output_head_is_taken_over(folders, fill_factors):
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    options = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_compute_dtype=BF16,
        llm_int8_skip_modules=["nothing"],
    )
    model = AutoModelForCausalLM.from_pretrained(
        folders / "dense", quantization_config=options, dtype=BF16, device_map="cpu"
    )
    ids = torch.arange(3, 15)[None]
    want = model.eval()(ids).logits
    patched(model)
    assert type(model.lm_head) is lora.LinearNF4
    assert torch.equal(model(ids).logits, want)
    assert not hasattr(model, "is_loaded_in_4bit")
    lora.unpatch(model, merge=True, dtype=BF16)
    assert not any(map(of_4_bits, model.modules()))


def test_dense_layers_of_a_4_bit_model_merge_without_a_dtype(folders, fill_factors):
    model = load_4bit(folders)
    model.model.layers[0].mlp.down_proj = torch.nn.Linear(128, 64, bias=False, dtype=BF16)
    lora.patch(model, ["layers.0.mlp.down_proj"], r=4, lora_alpha=8)
    lora.unpatch(fill_factors(model), merge=True)
    assert type(model.model.layers[0].mlp.down_proj) is torch.nn.Linear
    assert type(model.model.layers[1].mlp.down_proj).__name__ == "Linear4bit"


@pytest.mark.parametrize("part", ["nested_absmax", "absmax"])
def test_a_part_that_is_missing_is_found(folders, tmp_path, part):
    state = tensors_of(folders / "nested")
    del state[f"{WEIGHT}.{part}"]
    model = patched(dense_model(folders))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(RuntimeError, match=rf"{part}.* (is missing|are missing)"):
        model.load_state_dict(state, strict=False)
    save_file(state, tmp_path / "model.safetensors")
    with pytest.raises(AdapterError, match=rf"{part}.* (is missing|are missing)"):
        Checkpoint(tmp_path)
    assert before[WEIGHT].shape == model.state_dict()[WEIGHT].shape
    assert torch.equal(before[WEIGHT], model.state_dict()[WEIGHT])
