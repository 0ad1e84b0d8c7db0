"""The layer benchmark runs end to end on small sizes and writes rows that say where they are from."""

import csv
import importlib.util
from pathlib import Path

import pytest
import scripts
from torch import nn

import lora

ROOT = Path(__file__).resolve().parent.parent
NF4 = {"frozen-nf4", "lora-nf4"}
if importlib.util.find_spec("bitsandbytes"):
    NF4 |= {"peft-bitsandbytes-nf4"}


@pytest.fixture
def run(tmp_path):
    """The printed text and the rows of the benchmark on a 16th of every size.

    bitsandbytes, one of the peers, is right on every CPU if all columns are multiples of 64.
    """

    def run(*options):
        path = tmp_path / "rows.csv"
        common = ["--shrink", "16", "--ranks", "4", "--rounds", "1", "--csv", path]
        script = ROOT / "benchmarks" / "bench_layers.py"
        done = scripts.run(script, *common, *options, folder=tmp_path / "printed")
        assert done.returncode == 0, done.stderr
        with path.open(newline="") as file:
            return done.stdout, list(csv.DictReader(file))

    return run


def test_bench_layers_end_to_end(run):
    printed, rows = run("--tokens", "16")
    assert {row["provider"] for row in rows} == {"frozen", "lora", "loralib", "peft", *NF4}
    assert {row["layer"] for row in rows} == {"qkv_proj", "o_proj", "gate_up_proj", "down_proj"}
    assert {row["tokens"] for row in rows} == {"16"}
    assert {row["pass"] for row in rows} == {"both"}
    for row in rows:
        assert float(row["ms_p20"]) <= float(row["ms_p50"]) <= float(row["ms_p80"])
        assert len(row["source"]) == 12
        assert "bench_layers.py" in row["command"]
        if row["provider"] == "frozen":
            assert float(row["over_frozen"]) == 1
        if row["provider"] in ("frozen", "frozen-nf4"):
            assert float(row["kept_in_x"]) == 0
    kept = {
        (r["provider"], r["layer"], r["parts"], r["dtype"], r["p"]): r["kept_in_x"] for r in rows
    }
    for (provider, *setting), of_ours in kept.items():
        if provider == "lora-nf4":  # no dense weight
            assert of_ours == kept[("lora", *setting)]
    assert printed.count("sum") == 8


def test_passes_models_and_baselines(run):
    passes = ["forward", "backward", "both"]
    names = ["lora", "loralib", "unsloth-schedule", "lorafusion-schedule"]
    options = ["--passes", *passes, "--models", "phi-3-medium", "phi-4-mini", "--providers", *names]
    _, rows = run(*options, "--tokens", "16", "33", "--dtypes", "fp32")
    assert {row["pass"] for row in rows} == set(passes)
    assert {row["tokens"] for row in rows} == {"16", "33"}
    grouped = [row for row in rows if row["layer"].endswith("qkv_proj") and row["parts"] == "3"]
    assert {row["provider"] for row in grouped} == {"frozen", "lora"}  # the parts are unequal
    medium = {(row["in"], row["out"]) for row in grouped if "medium" in row["layer"]}
    assert medium == {("320", "480")}
    with_dropout = {row["provider"] for row in rows if row["p"] == "0.05"}
    assert with_dropout == {"frozen", "lora", "loralib", "lorafusion-schedule"}


@pytest.mark.parametrize("p", [0.0, 0.05])
@pytest.mark.parametrize("scaling", [2.0, 1.0, float("nan")])
def test_a_wrong_result_is_found(p, scaling, monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    import bench_layers

    import baselines

    base = nn.Linear(96, 64, bias=False).requires_grad_(False)
    layer = baselines.BaselineLinear(base, 8, scaling, p, baselines.LoRAFusionSchedule)
    nn.init.normal_(layer.lora_B, std=0.02)
    wrong = bench_layers.check(layer, base, 40, p, (64,))
    assert bool(wrong) == (scaling != bench_layers.SCALING)


def test_a_layer_on_other_codes_is_found(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    import bench_layers

    base = nn.Linear(128, 64, bias=False).requires_grad_(False)
    layer = lora.LinearNF4.from_module(base)
    dense = layer.to_dense(layer.weight.dequantize())
    assert bench_layers.check(layer, dense, 40, 0.0, (64,)) == ""
    assert "y is off" in bench_layers.check(layer, base, 40, 0.0, (64,))
