"""merge_checkpoint against float64 and against lora in memory; what it carries over and refuses."""

import errno
import json
import math
import os
import shutil
import struct
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

import lora
from lora._base import lora_layers
from lora.adapter import check, files, merged_folder, read_adapter
from lora.adapter import merge as merging
from lora.adapter.checkpoint import Checkpoint
from lora.adapter.contents import DTYPES, Adapter, AdapterError, Layer
from lora.adapter.merge import merge_checkpoint

INDEX = "model.safetensors.index.json"
ALL_FOUR = ("qkv_proj", "o_proj", "gate_up_proj", "down_proj")


def layer_of(module):
    """The Layer that one of lora's modules computes."""
    parts = {}
    if isinstance(module, lora.MergedLinear):
        parts = {"enable_lora": tuple(module.enable_lora), "out_splits": tuple(module.out_splits)}
    return Layer(
        type(module).__name__,
        module.lora_A.detach().clone(),
        module.lora_B.detach().clone(),
        module.lora_alpha,
        module.scaling,
        transposed=getattr(module, "fan_in_fan_out", False),
        magnitude=getattr(module, "lora_magnitude", None),
        **parts,
    )


def adapter_of(model, **more):
    return Adapter({name: layer_of(layer) for name, layer in lora_layers(model)}, **more)


def tensors_of(folder):
    return {k: v for path in Path(folder).glob("*.safetensors") for k, v in load_file(path).items()}


def exact_weight(module):
    """weight + update in float64, part by part, by no code of the library."""
    A, B = module.lora_A.detach().double(), module.lora_B.detach().double()
    if not isinstance(module, lora.MergedLinear):
        delta = B @ A
    else:
        delta = A.new_zeros(module.out_features, module.in_features)
        row = first = 0
        a_blocks = iter(A.split(module.r))
        for size, on in zip(module.out_splits, module.enable_lora, strict=True):
            if on:
                delta[row : row + size] = B[first : first + size] @ next(a_blocks)
                first += size
            row += size
    if isinstance(module, lora.Embedding) or getattr(module, "fan_in_fan_out", False):
        delta = delta.t()
    weight = module.weight.detach().double()
    return weight + module.scaling * delta.reshape(weight.shape)


def assert_nearest(rounded, exact):
    """It is near, and no neighbour in its dtype is nearer: what rounding once means.

    Stated so, it holds whatever order the exact sum was taken in; 1e-12 is for that order.
    """
    numbers = torch.finfo(rounded.dtype)
    bits = rounded.view({2: torch.int16, 4: torch.int32, 8: torch.int64}[rounded.dtype.itemsize])
    error = (rounded.double() - exact).abs()
    near = max(numbers.eps, 1e-12) * exact.abs() + numbers.smallest_normal * numbers.eps
    assert (error <= near).all()
    for neighbour in (bits + 1, bits - 1):
        other = (neighbour.view(rounded.dtype).double() - exact).abs()
        assert ((error <= other + 1e-12 * exact.abs()) | other.isnan()).all()


@pytest.fixture
def make_case(tmp_path, make_phi3, fill_factors):
    """A patched Phi-3 with random factors, its base saved in a folder, and its adapter."""

    def make(dtype=torch.float32, max_shard_size="50KB", **changes):
        model = make_phi3(**changes).to(dtype)
        folder = tmp_path / f"base-{max_shard_size}"
        model.save_pretrained(folder, max_shard_size=max_shard_size)
        lora.patch_phi3(model, r=4, lora_alpha=8, target_modules=ALL_FOUR)
        fill_factors(model)
        return model.eval(), folder, adapter_of(model)

    return make


@pytest.fixture
def tiny(tmp_path):
    """A base of one fp32 Linear 'a' (6, 4) with bias and a config, and a factory of adapters."""
    folder = tmp_path / "tiny"
    folder.mkdir()
    save_file(
        {"a.weight": torch.randn(6, 4), "a.bias": torch.randn(6)}, folder / "model.safetensors"
    )
    (folder / "config.json").write_text('{"tie_word_embeddings": false}')
    return folder, Adapter({"a": linear(6, 4)})


def linear(out, size, **changes):
    return Layer("Linear", torch.randn(2, size), torch.randn(out, 2), 4, 2.0, **changes)


def assert_nothing_left(out):
    assert not out.exists()
    assert not list(out.parent.glob(f".{out.name}*"))


# What it computes


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_tensor_is_the_float64_result_rounded_once_or_the_bases_bytes(
    make_case, tmp_path, dtype
):
    model, base, adapter = make_case(dtype)
    assert len(list(base.glob("*.safetensors"))) > 2
    merge_checkpoint(base, adapter, tmp_path / "out")
    merged, plain = tensors_of(tmp_path / "out"), tensors_of(base)
    assert merged.keys() == plain.keys()
    layers = dict(lora_layers(model))
    for name, tensor in merged.items():
        assert tensor.dtype == plain[name].dtype == dtype
        module = name.removesuffix(".weight")
        if module in layers:
            assert_nearest(tensor, exact_weight(layers[module]))
        else:
            assert torch.equal(tensor, plain[name])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_it_agrees_with_merging_in_memory(make_case, tmp_path, dtype):
    """`merged_weight` sums in fp32, this in fp64.

    So in fp32 they may differ by the rounding errors of r = 4 products, their sum, its scale and the
    addition to the weight, each at most eps of the sum of magnitudes; in bf16, where both have far
    more bits than the result, only where the two sums lie on either side of a midpoint.
    """
    model, base, adapter = make_case(dtype)
    merge_checkpoint(base, adapter, tmp_path / "out")
    merged = tensors_of(tmp_path / "out")
    for name, layer in lora_layers(model):
        here, there = merged[f"{name}.weight"], layer.merged_weight()
        if dtype == torch.bfloat16:
            assert (here == there).float().mean() > 0.999
            continue
        a, b = (factor.double().abs() for factor in adapter.layers[name].dense())
        magnitude = layer.weight.double().abs() + layer.scaling * (b @ a)
        bound = (layer.r + 3) * torch.finfo(dtype).eps * magnitude
        assert ((here.double() - there.double()).abs() <= bound).all()


def test_transformers_loads_it_and_gives_the_adapted_logits(make_case, tmp_path):
    from transformers import AutoModelForCausalLM

    model, base, adapter = make_case()
    report = merge_checkpoint(base, adapter, tmp_path / "out")
    assert set(report.layers) == set(adapter.layers)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    tokens = torch.randint(0, 96, (2, 9))
    with torch.no_grad():
        expected, got = model(tokens).logits, loaded(tokens).logits
        with lora.disabled(model):
            assert not torch.allclose(model(tokens).logits, expected, atol=1e-2)
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


def every_kind():
    return {
        "transposed": lora.Linear(12, 18, 3, 6, 0.0, True),
        "parts": lora.MergedLinear(
            12, 18, 3, 6, enable_lora=[True, False, True], out_splits=[10, 4, 4]
        ),
        "parts_transposed": lora.MergedLinear(
            12, 18, 3, 6, enable_lora=[False, True], fan_in_fan_out=True
        ),
        "table": lora.Embedding(11, 6, 3, 6),
        "conv1": lora.Conv1d(4, 6, 1, 2, 6),
        "conv2": lora.Conv2d(4, 6, 1, 2, 6),
        "conv3": lora.Conv3d(4, 6, 1, 2, 6),
    }


@pytest.mark.parametrize("block", [1, 40, 1 << 20])
def test_every_kind_of_layer_in_blocks_of_any_size(tmp_path, fill_factors, monkeypatch, block):
    monkeypatch.setattr(check, "_ELEMENTS", block)
    monkeypatch.setattr(merging, "_CHUNK", 3 * block)
    model = fill_factors(nn.ModuleDict(every_kind())).half()
    base = tmp_path / "base"
    base.mkdir()
    state = {k: v for k, v in model.state_dict().items() if "lora_" not in k}
    state |= {"number": torch.tensor(7), "none": torch.empty(0, 3)}
    save_file(state, base / "model.safetensors")
    report = merge_checkpoint(base, adapter_of(model), tmp_path / "out")
    merged = load_file(tmp_path / "out/model.safetensors")
    for name, layer in lora_layers(model):
        assert merged[f"{name}.weight"].shape == layer.weight.shape
        assert_nearest(merged[f"{name}.weight"], exact_weight(layer))
    for name in state.keys() - {f"{name}.weight" for name in model}:
        assert torch.equal(merged[name], state[name])
    assert report.tensors == len(state)
    assert report.bytes == sum(t.numel() * t.element_size() for t in state.values())


@pytest.mark.parametrize("transposed", [False, True])
def test_dora_has_the_norms_of_the_rows_of_out_in(tmp_path, fill_factors, transposed):
    layer = lora.Linear(7, 12, 3, 6, 0.0, transposed, bias=False, use_dora=True)
    model = fill_factors(nn.ModuleDict({"layer": layer}))
    with torch.no_grad():
        layer.lora_magnitude.mul_(torch.linspace(0.5, 2, 12))
    base = tmp_path / "base"
    base.mkdir()
    save_file({"layer.weight": layer.weight.detach()}, base / "model.safetensors")
    merge_checkpoint(base, adapter_of(model), tmp_path / "out")
    merged = load_file(tmp_path / "out/model.safetensors")["layer.weight"]
    expected = layer(torch.eye(7)).detach()  # (in, out)
    torch.testing.assert_close(merged if transposed else merged.t(), expected)


def test_the_number_of_shards_changes_nothing(make_case, tmp_path):
    _, many, adapter = make_case()
    _, one, _ = make_case(max_shard_size="1GB")
    assert (one / "model.safetensors").is_file()
    merge_checkpoint(many, adapter, tmp_path / "many")
    merge_checkpoint(one, adapter, tmp_path / "one")
    a, b = tensors_of(tmp_path / "many"), tensors_of(tmp_path / "one")
    assert a.keys() == b.keys()
    assert all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_rounding_happens_once_where_torch_rounds_twice(dtype):
    bits = 8 if dtype == torch.bfloat16 else 11
    step = 2.0 ** (1 - bits)
    tiny, large = torch.finfo(dtype).smallest_normal * step, torch.finfo(dtype).max
    halves = [1 + step / 2, 1 + 3 * step / 2, tiny / 2, 3 * tiny / 2, large * (1 + step / 4)]
    exact = torch.tensor(
        [h * (1 + s * 2.0**-40) for h in halves for s in (-1, 0, 1)], dtype=torch.float64
    )
    exact = torch.cat([exact, -exact])
    assert_nearest(merging._rounded(exact, dtype)[:12], exact[:12])
    wide = torch.randn(4000, dtype=torch.float64).exp().mul_(0.01)
    assert_nearest(merging._rounded(wide, dtype), wide)
    assert merging._rounded(exact[:3], dtype).tolist() == [1.0, 1.0, 1 + step]
    assert exact[2].to(dtype) == 1.0  # the first rounding has lost what the second must know


def test_overflow_is_kept_and_nan_stays():
    exact = torch.tensor([1e39, -1e39, 7e4, math.inf, math.nan, -0.0], dtype=torch.float64)
    half = merging._rounded(exact, torch.float16)
    assert half[:4].tolist() == [math.inf, -math.inf, math.inf, math.inf]
    assert half[4].isnan()
    assert half[5].signbit()


def test_biases_and_saved_modules_take_the_bases_place_in_its_dtype(tmp_path):
    base = tmp_path / "base"
    base.mkdir()
    state = {
        "a.weight": torch.randn(4, 3).bfloat16(),
        "a.bias": torch.randn(4).bfloat16(),
        "head.weight": torch.randn(5, 3).bfloat16(),
        "norm.count": torch.tensor(3),
    }
    save_file(state, base / "model.safetensors")
    bias, head = torch.randn(4), torch.randn(5, 3, dtype=torch.float64)
    adapter = Adapter(
        {"a": linear(4, 3)},
        bias="all",
        biases={"a.bias": bias},
        modules_to_save=("head", "norm"),
        saved={"head.weight": head, "norm.count": torch.tensor(9)},
        copies={"a.weight": state["a.weight"].float()},  # as a base that was loaded in fp32
    )
    merge_checkpoint(base, adapter, tmp_path / "out")
    merged = load_file(tmp_path / "out/model.safetensors")
    assert torch.equal(merged["a.bias"], bias.bfloat16())
    assert_nearest(merged["head.weight"], head)
    assert torch.equal(merged["norm.count"], torch.tensor(9))


def test_the_report(tiny, tmp_path):
    base, adapter = tiny
    weight = load_file(base / "model.safetensors")["a.weight"]
    still = Layer("Linear", torch.randn(2, 4), torch.zeros(6, 2), 4, 2.0)
    save_file(
        {"a.weight": weight, "still.weight": weight.clone(), "a.bias": torch.ones(6)},
        base / "model.safetensors",
    )
    layers = {"still": still, **adapter.layers}
    report = merge_checkpoint(base, Adapter(layers), tmp_path / "out")
    A, B = layers["a"].dense()
    update = layers["a"].scaling * B.double() @ A.double()
    merged = load_file(tmp_path / "out/model.safetensors")["a.weight"]
    error = merged.double() - (weight.double() + update)
    got = report.layers["a"]
    assert got.update_norm == pytest.approx(float(update.norm()), rel=1e-12)
    assert got.error_norm == pytest.approx(float(error.norm()), rel=1e-6)
    assert got.max_error == pytest.approx(float(error.abs().max()), rel=1e-6)
    assert got.changed == 1.0
    assert got.relative == got.error_norm / got.update_norm
    assert report.layers["still"] == merging.LayerError(0.0, 0.0, 0.0, 0.0)
    lines = str(report).splitlines()
    assert [line.split()[0] for line in lines] == ["layer", "a", "still", "2", "frozen"]
    assert lines[-2] == "2 layers; 3 tensors, 216 bytes; 1 other files"
    assert lines[-1] == "frozen weights: not checked: the adapter has no fingerprint of them"


# What it carries over


def test_order_index_and_metadata_are_the_bases(make_case, tmp_path):
    _, base, adapter = make_case()
    out, steps = tmp_path / "out", []
    merge_checkpoint(base, adapter, out, progress=lambda done, total: steps.append((done, total)))
    assert (out / INDEX).read_bytes() == (base / INDEX).read_bytes()
    old, new = Checkpoint(base), Checkpoint(out)
    assert old.shards == new.shards
    assert steps == [(i + 1, len(old.names)) for i in range(len(old.names))]
    for shard in new.shards:
        with safe_open(out / shard, "pt") as file:
            assert file.metadata() == {"format": "pt"}
        (header,) = struct.unpack("<Q", (out / shard).read_bytes()[:8])
        assert header % 8 == 0


def test_everything_else_goes_along_but_weights_and_hidden_files(tiny, tmp_path):
    base, adapter = tiny
    kept = ["README.md", "tokenizer.json", "code.py", "additional_chat_templates/tool.jinja"]
    weights = ["pytorch_model.bin", "x.GGUF", "a.onnx", "onnx/b.onnx", "flax_model.msgpack"]
    weights += ["pytorch_model.bin.index.json", "other.safetensors", "model.fp16.safetensors"]
    left = [*weights, ".hidden", ".git/config", "adapter_config.json"]
    for name in kept + left:
        (base / name).parent.mkdir(exist_ok=True)
        (base / name).write_text(name)
    blob = tmp_path / "blob"
    blob.write_text("a blob")
    (base / "vocab.txt").symlink_to(blob)
    (base / "gone.txt").symlink_to(tmp_path / "nowhere")
    (base / "linked").symlink_to(tmp_path)
    os.mkfifo(base / "pipe")
    report = merge_checkpoint(base, adapter, tmp_path / "out")
    assert sorted(report.copied_files) == sorted([*kept, "config.json", "vocab.txt"])
    found = {p.relative_to(tmp_path / "out").as_posix() for p in (tmp_path / "out").rglob("*")}
    assert found == {*report.copied_files, "model.safetensors", "additional_chat_templates"}
    assert (tmp_path / "out/vocab.txt").read_text() == "a blob"
    assert not (tmp_path / "out/vocab.txt").is_symlink()


def test_a_cache_of_links_is_a_base_too(tiny, tmp_path):
    base, adapter = tiny
    (base / "model.safetensors").rename(tmp_path / "blob")
    (base / "model.safetensors").symlink_to("../blob")
    (tmp_path / "out").mkdir()
    merge_checkpoint(base, adapter, tmp_path / "out")
    assert not (tmp_path / "out/model.safetensors").is_symlink()


# What it leaves when it fails


class Stop(Exception):
    pass


@pytest.mark.skipif(sys.platform == "win32", reason="which cannot sync a folder")
def test_a_merged_checkpoint_is_on_the_disk_when_it_gets_its_name(
    make_case, tmp_path, assert_durable
):
    _, folder, adapter = make_case()
    merge_checkpoint(folder, adapter, tmp_path / "out")
    assert_durable(1)


def test_an_interrupted_merge_leaves_nothing(tiny, tmp_path):
    base, adapter = tiny

    def stop(done, total):
        assert list(tmp_path.glob(".out.lora-tmp-*/model.safetensors"))
        raise Stop

    with pytest.raises(Stop):
        merge_checkpoint(base, adapter, tmp_path / "out", progress=stop)
    assert_nothing_left(tmp_path / "out")


def test_a_full_disk_is_named_and_leaves_nothing(tiny, tmp_path, monkeypatch):
    base, adapter = tiny

    def full(file):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(merged_folder, "_to_disk", full)
    with pytest.raises(OSError, match=r"checkpoint .*out: No space left .*; nothing was left"):
        merge_checkpoint(base, adapter, tmp_path / "out")
    assert_nothing_left(tmp_path / "out")


def test_a_running_merge_is_left_alone_and_a_dead_one_is_cleaned_up(tiny, tmp_path):
    base, adapter = tiny
    dead = tmp_path / ".out.lora-tmp-dead"
    dead.mkdir()
    with files.new_folder(tmp_path / "out") as running:
        merge_checkpoint(base, adapter, tmp_path / "out")
        assert running.exists()
        assert not dead.exists()
        shutil.rmtree(tmp_path / "out")


# What it refuses


def refuse(base, adapter, out, match):
    with pytest.raises(AdapterError, match=match):
        merge_checkpoint(base, adapter, out)
    if base != out:
        assert not list(out.parent.glob(".out*"))


def test_refused_targets(tiny, tmp_path):
    base, adapter = tiny
    refuse(base, adapter, base, "is the base's folder")
    refuse(base, adapter, base / "merged", "lies in it")
    taken = tmp_path / "taken"
    taken.write_text("")
    refuse(base, adapter, taken, "is a file: expected a new folder")
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "file").write_text("kept")
    refuse(base, adapter, folder, "folder with files in it")
    assert (folder / "file").read_text() == "kept"


def test_refused_names_and_shapes(tiny, tmp_path):
    base, adapter = tiny
    out = tmp_path / "out"
    wrong = Adapter({"b": linear(6, 4), "c": linear(6, 4), "a": linear(6, 4)})
    refuse(base, wrong, out, r"2 of the adapter's 3 .*'b.weight', 'c.weight'; .* 'a.weight'")
    refuse(base, Adapter({"a": linear(6, 5)}), out, r"'a.weight' is \(6, 4\) there, .*\(6, 5\)")
    refuse(base, Adapter({"a": linear(4, 6)}), out, "have other shapes")
    refuse(base, Adapter({"a": linear(8, 4)}), out, r"resize_token_embeddings\(8\)\) and save it")
    refuse(base, Adapter({}, biases={"a.bias": torch.ones(7)}), out, r"expected \(7,\)")
    refuse(base, Adapter({}, saved={"x.weight": torch.ones(7)}), out, r"'x.weight'; expected")
    both = adapter.replaced(saved={"a.weight": torch.ones(6, 4)})
    refuse(base, both, out, "'a.weight' has a low-rank update and was trained in full")
    refuse(base, adapter.replaced(copies={"a.bias": torch.ones(6)}), out, "repeats 'a.bias'")
    refuse(base, adapter.replaced(copies={"b.bias": torch.ones(6)}), out, "'b.bias'; expected")


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.float8_e4m3fn], ids=str)
def test_refused_dtypes(tiny, tmp_path, dtype):
    base, adapter = tiny
    save_file({"a.weight": torch.ones(6, 4).to(dtype)}, base / "model.safetensors")
    refuse(base, adapter, tmp_path / "out", f"'a.weight' .* stored as {dtype}: expected one of")


def test_refused_values(tiny, tmp_path):
    base, _ = tiny
    state = load_file(base / "model.safetensors")
    save_file({k: v.half() for k, v in state.items()}, base / "model.safetensors")
    huge = Layer("Linear", torch.full((1, 4), 300.0), torch.full((6, 1), 300.0), 1, 1.0)
    out = tmp_path / "out"
    refuse(base, Adapter({"a": huge}), out, r"'a.weight' .* beyond torch.float16's .*bfloat16")
    saved = Adapter({}, biases={"a.bias": torch.full((6,), 1e6)})
    refuse(base, saved, out, r"'a.bias' .* 1e\+06 is beyond")
    state["a.weight"][1, 1] = math.nan
    save_file(state, base / "model.safetensors")
    refuse(base, Adapter({"a": linear(6, 4)}), out, "the base or the adapter holds inf or nan")


HEAD, TABLE = "lm_head", "model.embed_tokens"


@pytest.mark.parametrize(
    ("config", "stored", "trained"),
    [
        ({"tie_word_embeddings": True}, [TABLE], TABLE),
        ({"tie_word_embeddings": True}, [TABLE], HEAD),
        ({"tie_word_embeddings": True}, [TABLE, HEAD], HEAD),
        ({"text_config": {"tie_word_embeddings": True}}, [TABLE], TABLE),
        ({}, [TABLE], TABLE),  # as Gemma, whose class says it
        ({}, ["transformer.wte"], "transformer.wte"),
    ],
)
@pytest.mark.parametrize("how", ["layer", "saved"])
def test_refused_ties(tmp_path, config, stored, trained, how):
    base = tmp_path / "base"
    base.mkdir()
    save_file({f"{n}.weight": torch.ones(6, 4) for n in stored}, base / "model.safetensors")
    (base / "config.json").write_text(json.dumps(config))
    adapter = Adapter({trained: linear(6, 4)})
    if how == "saved":
        adapter = Adapter({}, saved={f"{trained}.weight": torch.ones(6, 4)})
    refuse(base, adapter, tmp_path / "out", f"'{trained}.weight' was trained.*tie_word_embeddings")


@pytest.mark.parametrize("config", [{"tie_word_embeddings": False}, {}])
def test_an_untied_head_is_merged(tmp_path, config):
    base = tmp_path / "base"
    base.mkdir()
    save_file({f"{n}.weight": torch.ones(6, 4) for n in (HEAD, TABLE)}, base / "model.safetensors")
    (base / "config.json").write_text(json.dumps(config))
    merge_checkpoint(base, Adapter({HEAD: linear(6, 4)}), tmp_path / "out")
    merged = load_file(tmp_path / "out/model.safetensors")
    assert torch.equal(merged[f"{TABLE}.weight"], torch.ones(6, 4))
    assert not torch.equal(merged[f"{HEAD}.weight"], torch.ones(6, 4))


def test_the_embedding_of_a_classifier_is_tied_to_no_head(tmp_path):
    from transformers import BertConfig, BertForSequenceClassification

    config = BertConfig(vocab_size=96, hidden_size=16, num_hidden_layers=1, num_attention_heads=2)
    model, base = BertForSequenceClassification(config).eval(), tmp_path / "base"
    model.save_pretrained(base)
    lora.patch(model, ["word_embeddings"], r=2, lora_alpha=4)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            nn.init.normal_(parameter)
    lora.save_adapter(model, tmp_path / "adapter")
    adapter = read_adapter(tmp_path / "adapter").checked()
    merge_checkpoint(base, adapter, tmp_path / "out")
    merged = BertForSequenceClassification.from_pretrained(tmp_path / "out").state_dict()
    for key, wanted in lora.merged_state_dict(model).items():
        torch.testing.assert_close(merged[key], wanted)


def test_a_copy_of_a_tied_head_is_compared_with_the_embedding(tmp_path):
    base = tmp_path / "base"
    base.mkdir()
    state = {"a.weight": torch.ones(3, 4), f"{TABLE}.weight": torch.ones(6, 4)}
    save_file(state, base / "model.safetensors")
    (base / "config.json").write_text('{"tie_word_embeddings": true}')
    both = {"lm_head.weight": torch.ones(6, 4), f"{TABLE}.weight": torch.ones(6, 4)}
    adapter = Adapter({"a": linear(3, 4)}, copies=both)
    merge_checkpoint(base, adapter, tmp_path / "merged")
    for name in both:
        other = adapter.replaced(copies={**both, name: torch.zeros(6, 4)})
        refuse(base, other, tmp_path / "out", "repeats 'model.embed_tokens.weight'")


# The checkpoint


def test_rows_take_and_facts(tmp_path):
    state = {"b": torch.randn(5, 3).bfloat16(), "n": torch.tensor(3), "e": torch.empty(2, 0)}
    save_file(state, tmp_path / "model.safetensors")
    checkpoint = Checkpoint(tmp_path)
    assert checkpoint.config == {}
    assert checkpoint.names == ["n", "e", "b"]  # save_file puts the widest first
    assert "b" in checkpoint
    assert "c" not in checkpoint
    assert (checkpoint.shape("b"), checkpoint.dtype("b")) == ((5, 3), torch.bfloat16)
    assert torch.equal(checkpoint.rows("b", 1, 4), state["b"][1:4])
    assert checkpoint.rows("b", 2, 2).shape == (0, 3)
    assert checkpoint.rows("e", 0, 2).shape == (2, 0)
    assert torch.equal(checkpoint.rows("n", 0, 1), state["n"])
    assert torch.equal(checkpoint.take("b", [14, 0, 7]), state["b"].view(-1)[[14, 0, 7]])
    assert checkpoint.take("b", []).shape == (0,)
    for call in (
        lambda: checkpoint.rows("b", 3, 6),
        lambda: checkpoint.rows("b", -1, 2),
        lambda: checkpoint.take("b", [15]),
        lambda: checkpoint.read("b", 0, 31),
    ):
        with pytest.raises(IndexError, match=r"'b': "):
            call()


def test_a_file_that_shrinks_while_it_is_read(tmp_path):
    save_file({"a": torch.randn(5, 3)}, tmp_path / "model.safetensors")
    checkpoint = Checkpoint(tmp_path)
    os.truncate(tmp_path / "model.safetensors", 100)
    with pytest.raises(AdapterError, match="ends inside the tensor 'a'"):
        checkpoint.rows("a", 0, 5)


def test_folders_that_are_no_base(tmp_path):
    with pytest.raises(AdapterError, match=r"expected the folder of a base.*snapshot_download"):
        Checkpoint(tmp_path / "microsoft/phi")
    with pytest.raises(AdapterError, match="found no weights"):
        Checkpoint(tmp_path)
    (tmp_path / "x.safetensors").write_text("")
    with pytest.raises(AdapterError, match=r"it has x\.safetensors"):
        Checkpoint(tmp_path)
    (tmp_path / "pytorch_model-00001-of-00002.bin").write_text("")
    with pytest.raises(AdapterError, match=r"pytorch_model-00001-.*safe_serialization=True"):
        Checkpoint(tmp_path)
    (tmp_path / "adapter_config.json").write_text("")
    with pytest.raises(AdapterError, match="so it is an adapter"):
        Checkpoint(tmp_path)


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("{", "config.json is not JSON"),
        ("[]", "expected a JSON object, got list"),
        (
            '{"quantization_config": {"bits": 4}}',
            r"quantised with \{'bits': 4\}.*not quantised",
        ),
    ],
)
def test_refused_configs(tiny, text, match):
    (tiny[0] / "config.json").write_text(text)
    with pytest.raises(AdapterError, match=match):
        Checkpoint(tiny[0])


@pytest.fixture
def sharded(tmp_path):
    """A folder with two shards, and a function that writes its index."""
    for name in "ab":
        save_file({name: torch.ones(2)}, tmp_path / f"{name}.safetensors")

    def write(weight_map, **more):
        (tmp_path / INDEX).write_text(json.dumps({"weight_map": weight_map, **more}))
        return tmp_path

    return write


@pytest.mark.parametrize(
    "shard",
    [
        *("/etc/a.safetensors", "../a.safetensors", "x/a.safetensors", "..\\a.safetensors"),
        *("C:a.safetensors", "a\0.safetensors", "..", ".", "", 3, None),
    ],
)
def test_hostile_shards(sharded, shard):
    with pytest.raises(AdapterError, match=r"(?s)'a' is said to be in .*: expected"):
        Checkpoint(sharded({"b": "b.safetensors", "a": shard}))


def test_refused_indices(sharded, tmp_path):
    names = {"a": "a.safetensors", "b": "b.safetensors"}
    assert Checkpoint(sharded(names)).shards == {"a.safetensors": ["a"], "b.safetensors": ["b"]}
    for weight_map, match in (
        ({**names, "c": "c.safetensors"}, r"c\.safetensors is missing"),
        ({**names, "c": "a.safetensors"}, r"'c' should be in a\.safetensors, which lacks it"),
        ({**names, "a": "b.safetensors"}, r"'a' should be in b\.safetensors, which lacks it"),
        ({**names, "a": "config.json"}, r"config\.json'.*expected a \*\.safetensors file"),
        ({}, r"weight_map=\{\}: expected"),
        ([], r"weight_map=\[\]: expected"),
    ):
        with pytest.raises(AdapterError, match=match):
            Checkpoint(sharded(weight_map))
    save_file({"b": torch.ones(2), "a": torch.ones(2)}, tmp_path / "b.safetensors")
    with pytest.raises(AdapterError, match=r"'a' is in a\.safetensors and in b\.safetensors"):
        Checkpoint(sharded(names))
    for text, match in (("{", "is not JSON"), ("3", "expected a JSON object, got int")):
        (tmp_path / INDEX).write_text(text)
        with pytest.raises(AdapterError, match=match):
            Checkpoint(tmp_path)


def test_damaged_files(tiny, tmp_path):
    path = tiny[0] / "model.safetensors"
    whole = path.read_bytes()
    for data in (b"", b"short", whole[:-1], whole + b"x", b"\xff" * 8 + whole[8:]):
        path.write_bytes(data)
        with pytest.raises(AdapterError, match=r"model\.safetensors is damaged"):
            Checkpoint(tiny[0])
    path.unlink()
    os.mkfifo(path)
    with pytest.raises(AdapterError, match="is no regular file"):
        Checkpoint(tiny[0])
    path.unlink()
    path.symlink_to(tmp_path / "nowhere")
    with pytest.raises(AdapterError, match="is no regular file"):
        Checkpoint(tiny[0])


# Memory

LARGE = """
import sys, torch
from lora.adapter.contents import Adapter, Layer
from lora.adapter.merge import merge_checkpoint

ones = torch.full((4, 8192), 0.5), torch.ones(8192, 4)
layers = {f"{i}.adapted": Layer("Linear", *ones, 4, 1.0) for i in range(2)}
report = merge_checkpoint(sys.argv[1], Adapter(layers), sys.argv[2])
with open("/proc/self/status") as file:
    peak = next(int(line.split()[1]) for line in file if line.startswith("VmHWM"))
print(peak * 1024, report.bytes, report.layers["0.adapted"].changed)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads the peak from /proc")
def test_a_checkpoint_larger_than_memory(tmp_path):
    """Peak resident memory, torch included, below a third of the checkpoint.

    VmHWM of the process is what ru_maxrss reports, but that one begins, in a process started by
    another, with the memory of its parent.
    """
    base, weight_map = tmp_path / "base", {}
    base.mkdir()
    adapted, plain, end = [8192, 8192], [57344, 8192], 2**30
    middle = 8192 * 8192 * 2
    try:
        for shard in range(2):
            entries = {
                f"{shard}.adapted.weight": (adapted, [0, middle]),
                f"{shard}.plain.weight": (plain, [middle, end]),
            }
            weight_map |= dict.fromkeys(entries, f"{shard}.safetensors")
            header = json.dumps(
                {
                    name: {"dtype": "BF16", "shape": shape, "data_offsets": offsets}
                    for name, (shape, offsets) in entries.items()
                }
            ).encode()
            with (base / f"{shard}.safetensors").open("wb") as file:
                file.write(struct.pack("<Q", len(header)) + header)
                file.truncate(8 + len(header) + end)  # a hole: no disk is used
        (base / INDEX).write_text(json.dumps({"weight_map": weight_map}))
        command = [sys.executable, "-c", LARGE, base, tmp_path / "out"]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        peak, size, changed = map(float, done.stdout.split())
        print(f"peak {peak / 2**20:.0f} MiB, checkpoint {size / 2**20:.0f} MiB")
        assert size == 2 * end
        assert changed == 1.0
        assert peak < size / 3
        out = Checkpoint(tmp_path / "out")
        assert (out.rows("1.adapted.weight", 8191, 8192) == 2.0).all()
        assert not out.rows("1.plain.weight", 0, 1).any()
    finally:
        shutil.rmtree(base, ignore_errors=True)
        shutil.rmtree(tmp_path / "out", ignore_errors=True)
