"""The TRL example as a user runs it, with few steps: both recipes, resuming, and what it refuses."""

import json
import os
import runpy
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
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


def run(home, *arguments):
    """The summary that the script, in a process of its own, ends with."""
    changes = {
        "HOME": str(home / "home"),
        "XDG_CACHE_HOME": str(home / "cache"),
        "HF_HOME": str(home / "cache" / "huggingface"),
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
        "PYTHONDONTWRITEBYTECODE": "1",
    }
    done = subprocess.run(
        [sys.executable, SCRIPT, *SHORT, *arguments],
        cwd=home,
        env={**os.environ, **changes},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def first(tmp_path_factory):
    """The default run in a fresh home."""
    home = tmp_path_factory.mktemp("home")
    report = run(home, "--output", home / "first", "--set=save_total_limit=2")
    base = next((home / "cache" / "lora").glob("phi3-standin-*"))
    return SimpleNamespace(home=home, output=home / "first", report=report, base=base)


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


def test_a_resumed_run_in_another_process_ends_with_the_same_bits(first):
    output = first.home / "resumed"
    shutil.copytree(first.output / "checkpoint-2", output / "checkpoint-2")
    report = run(first.home, "--output", output, "--resume")
    for name in ("eval_loss_before", "eval_loss_after", "eval_loss_merged"):
        assert report[name] == first.report[name]
    whole, resumed = first.output / "checkpoint-4", output / "checkpoint-4"
    assert logged(whole, "loss") == logged(resumed, "loss")
    one, other = (load_file(p / "adapter_model.safetensors") for p in (whole, resumed))
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_the_notebook_on_the_words_of_the_assistant(first):
    output = first.home / "notebook"
    options = ("--recipe=notebook", "--assistant-only-loss", "--set=learning_rate=0.01")
    report = run(first.home, "--output", output, *options)
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


def test_the_results_of_an_earlier_run_are_moved_aside(first):
    kept = (first.output / "adapter" / "adapter_model.safetensors").read_bytes()
    run(first.home, "--output", first.output)
    moved = first.output / "previous-1"
    assert {"adapter", "best", "checkpoint-4", "merged"} <= {path.name for path in moved.iterdir()}
    assert (moved / "adapter" / "adapter_model.safetensors").read_bytes() == kept
    assert (first.output / "adapter" / "adapter_model.safetensors").exists()
