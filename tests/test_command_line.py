"""Every command on real files, and with bad input: one line on stderr, an exit code, no traceback."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
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
        "it is a file",
    ),
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
