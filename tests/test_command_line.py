"""Every command on real files, and with bad input: one line on stderr, an exit code, no traceback."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from transformers import AutoModelForCausalLM

import lora
from lora.__main__ import main
from lora.adapter import read_adapter


@pytest.fixture
def files(make_phi3, fill_factors, tmp_path, monkeypatch, capsys):
    """A base in shards, an adapter of it, and the model with the adapter."""
    monkeypatch.chdir(tmp_path)
    make_phi3(num_hidden_layers=11).save_pretrained("base", max_shard_size="100KB")
    Path("base/tokenizer.json").write_text("{}")
    model = AutoModelForCausalLM.from_pretrained("base")
    lora.patch_phi3(model, r=4, lora_alpha=8, target_modules="all-linear")
    fill_factors(model, 0.05)
    lora.save_adapter(model, "adapter")
    capsys.readouterr()
    return model.eval()


@pytest.fixture
def run(capsys):
    """Run a command: (exit code, stdout); a failure must be one line on stderr."""

    def run(*arguments):
        code = main([str(a) for a in arguments])
        out, err = capsys.readouterr()
        if code == 2:
            assert err.startswith("lora: error: ")
            assert err.count("\n") == 1
        return code, out + err

    return run


def logits(model):
    with torch.no_grad():
        return model(torch.arange(3, 13)[None]).logits


def test_info(files, run):
    code, out = run("info", "adapter")
    assert code == 0
    assert "written by lora, verified" in out
    assert "base: base; task: CAUSAL_LM" in out
    assert "qkv_proj (MergedLinear)      11     128 x 64  64 32 32  4           8      2" in out
    assert "44 layers, 42,944 parameters" in out


def test_info_as_json(files, run):
    code, out = run("info", "adapter/adapter_model.safetensors", "--json")
    facts = json.loads(out)
    assert code == 0
    assert facts["verified"]
    assert facts["bytes"] == Path("adapter/adapter_model.safetensors").stat().st_size
    names = [layer["name"] for layer in facts["layers"]]
    assert names == sorted(names, key=lambda n: int(n.split(".")[2]))  # 2 before 10
    layer = files.model.layers[10].mlp.gate_up_proj
    shown = next(x for x in facts["layers"] if x["name"] == "model.layers.10.mlp.gate_up_proj")
    assert shown["norm"] == pytest.approx(float(layer.delta_weight().detach().norm()), rel=1e-5)
    assert shown["parts"] == [112, 112]


def test_check(files, run):
    assert run("check", "adapter") == (
        0,
        "adapter/adapter_model.safetensors: 44 layers, SHA-256 verified\n",
    )
    code, out = run("check", "adapter", "--base", "base")
    assert code == 0
    assert "frozen weights: matches" in out
    assert "model.layers.0.self_attn.qkv_proj" in out


def test_check_finds_damage(files, run):
    path = Path("adapter/adapter_model.safetensors")
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    code, out = run("check", "adapter")
    assert code == 1
    assert "problem: its SHA-256 does not match" in out
    path.write_bytes(data[:-1])
    code, out = run("check", "adapter")
    assert code == 1
    assert "damaged" in out


def test_check_finds_another_base(files, run, make_phi3):
    other = make_phi3(num_hidden_layers=11)
    nn.init.normal_(other.model.layers[3].mlp.down_proj.weight)
    other.save_pretrained("other")
    code, out = run("check", "adapter", "--base", "other")
    assert code == 1
    assert "the frozen weights of 1 of 44 layers are not those of the training" in out
    assert "layers.3.mlp.down_proj" in out
    code, out = run("merge", "other", "adapter", "out")
    assert code == 2
    assert not Path("out").exists()


def test_check_says_that_an_adapter_does_nothing_yet(run, tmp_path):
    model = nn.Sequential(lora.Linear(3, 3, 2))
    lora.save_adapter(model, tmp_path)
    assert "does nothing yet" in run("check", tmp_path)[1]


def test_merge(files, run):
    code, out = run("merge", "base", "adapter", "merged")
    assert code == 0
    assert "peak memory" in out
    assert Path("merged/tokenizer.json").read_text() == "{}"
    shards = sorted(p.name for p in Path("base").glob("*.safetensors"))
    assert len(shards) > 2
    assert sorted(p.name for p in Path("merged").glob("*.safetensors")) == shards
    merged = AutoModelForCausalLM.from_pretrained("merged")
    torch.testing.assert_close(logits(merged), logits(files), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("to", ["peft", "portable", "split", "fused"])
def test_convert(files, run, to):
    source = "adapter"
    if to == "fused":
        assert run("convert", "adapter", "split", "--to", "split")[0] == 0
        source = "split"
    code, out = run("convert", source, "out", "--to", to)
    assert code == 0, out
    adapter = read_adapter("out").checked()
    assert len(adapter.layers) == {"split": 77}.get(to, 44)
    if to == "portable":
        config = json.loads(Path("out/adapter_config.json").read_text())
        assert (config["r"], config["lora_alpha"]) == (12, 12)
        assert not config["rank_pattern"] and not config["alpha_pattern"]  # noqa: PT018
        assert "exact" in out
    if to != "split":
        model = AutoModelForCausalLM.from_pretrained("base")
        lora.load_adapter(model, "out")
        torch.testing.assert_close(logits(model), logits(files), rtol=1e-5, atol=1e-5)


def test_convert_to_loralib_and_back(run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model = nn.ModuleDict(
        {
            "a": lora.Linear(6, 8, 2, 5),
            "b": lora.MergedLinear(6, 9, 2, 5, enable_lora=[True, False, True]),
            "c": lora.Embedding(11, 4, 2, 5),
        }
    )
    for p in lora.lora_state_dict(model).values():
        nn.init.normal_(p)
    lora.mark_only_lora_as_trainable(model)
    lora.save_adapter(model, "adapter")
    torch.save(model.state_dict(), "base.pt")
    code, out = run("convert", "adapter", "lora.pt", "--to", "loralib")
    assert code == 0
    assert "1 x MergedLinear(..., r=2, lora_alpha=5, enable_lora=[True, False, True])" in out
    state = torch.load("lora.pt", weights_only=True)
    own = lora.lora_state_dict(model)
    assert state.keys() == own.keys()
    assert all(torch.equal(state[k], own[k]) for k in own)
    options = ["--base", "base.pt", "--lora-alpha", 5, "--enable-lora", "1,0,1", "--embedding", "c"]
    code, out = run("convert", "lora.pt", "back", "--to", "peft", *options)
    assert code == 0, out
    tensors = read_adapter("back").checked().tensors()
    assert all(torch.equal(tensors[k], own[k]) for k in own)


BAD = {
    "no adapter": (["info", "nothing"], "nothing: there is no such adapter"),
    "a folder without one": (["info", "base"], "base has no adapter_model.safetensors"),
    "no base": (
        ["merge", "nothing", "adapter", "out"],
        "nothing: expected the folder of a base model",
    ),
    "the base is an adapter": (["merge", "adapter", "adapter", "out"], "give its base model"),
    "out is taken": (["merge", "base", "adapter", "base2"], "folder with files in it"),
    "out inside the base": (
        ["merge", "base", "adapter", "base/out"],
        "expected a folder elsewhere",
    ),
    "a file as output": (
        ["convert", "adapter", "base/config.json", "--to", "peft"],
        "is there already",
    ),
    "onto itself": (["convert", "adapter", "adapter", "--to", "split"], "adapter is there already"),
    "unequal parts": (
        ["convert", "adapter", "x.pt", "--to", "loralib"],
        "parts of [64, 32, 32] rows",
    ),
    "no alpha": (["convert", "x.pt", "y", "--to", "peft"], "--lora-alpha is missing"),
    "no file": (["convert", "x.pt", "y", "--to", "peft", "--lora-alpha=1", "--base=base"], "x.pt"),
    "dtype": (
        ["convert", "adapter", "y", "--to", "split", "--dtype=float16"],
        "only --to portable",
    ),
    "a base without use": (
        ["convert", "adapter", "y", "--to", "peft", "--base=base"],
        "--base is for loralib's files and for --to split",
    ),
    "a base that is not there": (["check", "adapter", "--base=nothing"], "nothing: expected the"),
    "no loralib file": (
        ["convert", "adapter", "y", "--to", "peft", "--lora-alpha=1"],
        "loralib's files",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input(files, run, case):
    arguments, message = BAD[case]
    Path("base2").mkdir()
    Path("base2/x").touch()
    before = sorted(Path().rglob("*"))
    code, out = run(*arguments)
    assert code == 2
    assert message in out
    assert sorted(Path().rglob("*")) == before


def peft_file(folder, tensors=("q.lora_A", "q.lora_B"), **fields):
    """A folder with a small file of PEFT's, and with these fields in its config."""
    folder.mkdir()
    tensors = {f"base_model.model.{name}.weight": torch.ones(2, 2) for name in tensors}
    save_file(tensors, folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q"], **fields}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


HOSTILE = [
    {"target_modules": "*.q"},
    {"exclude_modules": "*"},
    {"rank_pattern": {"*": 2}},
    {"alpha_pattern": {"(": 2}},
    {"modules_to_save": ["*"]},
    {"layers_pattern": "*", "layers_to_transform": 1},
    {"lora_alpha": 10**400},
    {"r": True},
    {"lora_dropout": "x"},
    {"modules_to_save": "lm_head"},
    {"lora_dropout": 2},
    {"layers_to_transform": "a"},
]


@pytest.mark.parametrize("fields", HOSTILE, ids=lambda fields: json.dumps(fields)[:30])
def test_hostile_configs_are_refused_in_one_line(fields, run, tmp_path):
    folder = peft_file(tmp_path / "adapter", **fields)
    model = nn.ModuleDict({"q": nn.Linear(2, 2)})
    with pytest.raises(lora.AdapterError):
        lora.load_adapter(model, folder)
    assert type(model["q"]) is nn.Linear
    assert run("info", folder)[0] == 2
    code, out = run("check", folder)
    assert code == 1
    assert out.startswith("problem: ")
    assert out.count("\n") == 1


@pytest.mark.parametrize("to", ["portable", "split", "fused", "loralib", "peft"])
def test_a_file_without_lora_layers_is_no_adapter(to, run, tmp_path):
    folder = peft_file(tmp_path / "adapter", ["head"], modules_to_save=["head"])
    code, out = run("convert", folder, tmp_path / "out", "--to", to)
    assert code == 2
    assert "it has no LoRA layers" in out
    assert not (tmp_path / "out").exists()
    assert run("check", folder)[0] == 1


@pytest.mark.parametrize("json_there", [True, False], ids=["whole", "without its JSON"])
def test_looking_writes_nothing_and_loading_heals(json_there, files, run):
    config = Path("adapter/adapter_config.json")
    before = config.read_bytes()
    if not json_there:
        config.unlink()
    Path("adapter/.adapter_config.json.lora-tmp-0").touch()

    def contents():
        return {p: (p.stat().st_mtime_ns, p.read_bytes()) for p in Path("adapter").iterdir()}

    there, folder = contents(), Path("adapter").stat().st_mtime_ns
    assert run("info", "adapter")[0] == 0
    assert run("check", "adapter", "--base", "base")[0] == 0
    assert contents() == there
    assert Path("adapter").stat().st_mtime_ns == folder
    lora.load_adapter(AutoModelForCausalLM.from_pretrained("base"), "adapter")
    assert config.read_bytes() == before
    assert len(list(Path("adapter").iterdir())) == 2


@pytest.mark.parametrize("mask", ["101", "1,01", ",", "", "1,", "2,1"])
def test_a_mask_is_zeros_and_ones_with_commas(mask, capsys):
    with pytest.raises(SystemExit) as stop:
        main(["convert", "lora.pt", "out", "--to", "peft", "--enable-lora", mask])
    assert stop.value.code == 2
    assert "expected 0 and 1, such as 1,0,1" in capsys.readouterr().err


@pytest.mark.parametrize("heads", [0, "4", None])
def test_a_base_whose_config_says_no_heads_is_refused(heads, files, run):
    config = json.loads(Path("base/config.json").read_text())
    changed = {**config, "num_attention_heads": heads, "num_key_value_heads": heads}
    Path("base/config.json").write_text(json.dumps(changed))
    code, _ = run("convert", "adapter", "out", "--to", "split", "--base", "base")
    assert code == 2
    assert not Path("out").exists()


@pytest.mark.parametrize("command", [[], ["info"], ["check"], ["convert"], ["merge"]], ids=str)
def test_help_has_an_example(command, capsys):
    with pytest.raises(SystemExit) as stop:
        main([*command, "--help"])
    assert stop.value.code == 0
    assert "example: lora" in capsys.readouterr().out


@pytest.mark.parametrize(
    "arguments", [[], ["info"], ["convert", "a", "b", "--to", "x"], ["melt"]], ids=str
)
def test_wrong_usage(arguments, capsys):
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert stop.value.code == 2
    assert "Traceback" not in capsys.readouterr().err


def test_progress_where_somebody_watches(files, run, monkeypatch):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    out = run("merge", "base", "adapter", "merged")[1]
    tensors = len(AutoModelForCausalLM.from_pretrained("base").state_dict())
    assert f"] {tensors}/{tensors}\n" in out


def test_as_a_module_and_as_a_script(files):
    script = Path(sys.executable).parent / "lora"
    commands = [[sys.executable, "-m", "lora"], [str(script)]]
    said = []
    for command in commands:
        done = subprocess.run(
            [*command, "check", "adapter"], capture_output=True, text=True, check=False
        )
        said.append((done.returncode, done.stdout, done.stderr))
    assert (
        said[0]
        == said[1]
        == (0, "adapter/adapter_model.safetensors: 44 layers, SHA-256 verified\n", "")
    )
    enough = subprocess.run(
        f"{sys.executable} -m lora info adapter --json | head -n 1",
        shell=True,
        capture_output=True,
        text=True,
        check=False,
    )
    assert (enough.stdout, enough.stderr) == ("{\n", "")
