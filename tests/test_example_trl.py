"""The TRL example as a user runs it, with few steps: both recipes, resuming, and what it refuses."""

import json
import runpy
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import scripts
import torch

pytest.importorskip("trl")
pytest.importorskip("datasets")

from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import lora

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"
SCRIPT = EXAMPLES / "finetune_phi3_trl.py"
SHORT = ("--base-steps=20", "--steps=4", "--set=save_steps=2", "--set=logging_steps=1")
sys.path.append(str(EXAMPLES))


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    return tmp_path_factory.mktemp("home")


@pytest.fixture(scope="module")
def run(home, default_run):
    """Run the script, with the stand-in that the default run of the other example has trained."""

    def call(output, *arguments):
        environment = {
            "HOME": str(home / "home"),
            "XDG_CACHE_HOME": str(default_run.home / "cache"),
            "OMP_NUM_THREADS": "1",
            "CUDA_VISIBLE_DEVICES": "",
        }
        done = scripts.run(
            *(SCRIPT, *SHORT, "--output", output, *arguments),
            folder=home / f"printed-{output.name}",
            environment=environment,
        )
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout.splitlines()[-1])

    return call


@pytest.fixture(scope="module")
def first(home, run, default_run):
    """The default run."""
    report = run(home / "first", "--set=save_total_limit=2")
    return SimpleNamespace(home=home, output=home / "first", report=report, base=default_run.base)


@pytest.fixture(scope="module")
def chats(home):
    """Fewer chats than the default has, which take half a minute to become tokens."""
    rows = []
    for number in range(160):
        turns = [("user", f"What is {number} + 1?"), ("assistant", f"It is {number + 1}.")]
        messages = [{"role": role, "content": content} for role, content in turns]
        rows.append(json.dumps({"messages": messages}))
    (home / "chats.jsonl").write_text("\n".join(rows))
    return "--data", home / "chats.jsonl"


def logged(folder, key):
    state = json.loads((folder / "trainer_state.json").read_text())
    return {e["step"]: e[key] for e in state["log_history"] if key in e}


def test_the_default_run(first):
    report = first.report
    assert report.keys() == {
        "recipe",
        "steps",
        "eval_loss_before",
        "eval_loss_after",
        "eval_loss_merged",
        "trainable_parameters",
        "seconds",
    }
    assert (report["recipe"], report["steps"]) == ("sample", 4)
    assert report["eval_loss_after"] < report["eval_loss_before"] - 0.1
    assert report["eval_loss_merged"] == pytest.approx(report["eval_loss_after"], abs=1e-4)
    assert report["trainable_parameters"] == 131_072
    kept = {path.name for path in first.output.iterdir()}
    assert {"adapter", "best", "merged", "checkpoint-2", "checkpoint-4"} <= kept


def test_the_adapter_and_the_merged_model_are_one(first):
    ids = torch.arange(5, 25)[None]
    adapted = AutoModelForCausalLM.from_pretrained(first.base)
    lora.load_adapter(adapted, first.output / "adapter")
    merged = AutoModelForCausalLM.from_pretrained(first.output / "merged")
    with torch.no_grad():
        expected = adapted.eval()(ids).logits
        torch.testing.assert_close(merged.eval()(ids).logits, expected, rtol=1e-4, atol=1e-4)


def test_a_resumed_run_in_another_process_ends_with_the_same_bits(home, run, chats):
    output, whole = home / "resumed", home / "whole"
    expected = run(whole, *chats, "--set=save_total_limit=2")
    shutil.copytree(whole / "checkpoint-2", output / "checkpoint-2")
    report = run(output, *chats, "--resume")
    for name in ("eval_loss_before", "eval_loss_after", "eval_loss_merged"):
        assert report[name] == expected[name]
    whole, resumed = whole / "checkpoint-4", output / "checkpoint-4"
    assert logged(whole, "loss") == logged(resumed, "loss")
    one, other = (load_file(p / "adapter_model.safetensors") for p in (whole, resumed))
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_the_notebook_on_the_words_of_the_assistant(first, run, chats):
    output = first.home / "notebook"
    options = ("--recipe=notebook", "--assistant-only-loss", "--set=learning_rate=0.01")
    report = run(output, *chats, *options)
    assert report["recipe"] == "notebook"
    assert report["eval_loss_after"] < report["eval_loss_before"] - 0.1
    model = AutoModelForCausalLM.from_pretrained(first.base)
    lora.load_adapter(model, output / "adapter")
    layers = [m for m in model.modules() if isinstance(m, lora.LoRALayer)]
    assert {(layer.r, layer.scaling) for layer in layers} == {(16, 1.0)}
    assert len(layers) == 4 * model.config.num_hidden_layers


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--resume"], "there is no checkpoint in"),
        (["--set", "overwrite_output_dir=false"], "has the results of an earlier run"),
        (["--set", "rank=4"], "expected NAME=VALUE, with NAME one of"),
        (["--model", "no/such/model", "--data", "no.jsonl"], "cannot load no/such/model"),
    ],
)
def test_what_cannot_be_used_is_said(monkeypatch, tmp_path, capsys, arguments, message):
    monkeypatch.setenv("OMP_WAIT_POLICY", "PASSIVE")  # or the script sets it for the tests to come
    if "--set" in arguments:
        (tmp_path / "checkpoint-2").mkdir()
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), "--output", str(tmp_path), *arguments])
    with pytest.raises(SystemExit) as exit_:
        runpy.run_path(str(SCRIPT), run_name="__main__")
    assert exit_.value.code == 2
    assert message in capsys.readouterr().err


def test_the_results_of_an_earlier_run_are_moved_aside(tmp_path, monkeypatch):
    """Before anything else: what a run would write is in the way no more when it loads its model."""
    written = ("adapter", "best", "checkpoint-4", "merged")
    for name in (*written, "mine"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "content").write_text(name)
    script = runpy.run_path(str(SCRIPT), run_name="finetune_phi3_trl")
    options = ["--model", str(tmp_path / "nowhere"), "--data", str(tmp_path / "none.jsonl")]
    monkeypatch.setenv("OMP_WAIT_POLICY", "PASSIVE")
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), "--output", str(tmp_path), *options])
    assert script["main"]() == 2
    moved = tmp_path / "previous-1"
    assert {path.name for path in moved.iterdir()} == set(written)
    assert all((moved / name / "content").read_text() == name for name in written)
    assert {path.name for path in tmp_path.iterdir()} == {"mine", "previous-1"}
