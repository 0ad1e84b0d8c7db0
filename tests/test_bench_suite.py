"""The baselines are right, every benchmark runs end to end on a CPU, old rows are found."""

import csv
import importlib.util
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import scripts
import torch
from torch import nn

from lora.kernels import reference

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(autouse=True)
def _benchmarks_on_the_path(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")


def script(*command, **environment):
    return subprocess.run(
        [sys.executable, *map(str, command)],
        capture_output=True,
        text=True,
        check=False,
        cwd=ROOT,
        env={**os.environ, **environment},
    )


@pytest.mark.parametrize(
    ("name", "p"),
    [("UnslothSchedule", 0.0), ("LoRAFusionSchedule", 0.0), ("LoRAFusionSchedule", 0.3)],
)
def test_a_baseline_is_the_formula_in_float64(name, p):
    import baselines

    base = nn.Linear(10, 7, bias=False, dtype=torch.float64).requires_grad_(False)
    layer = baselines.BaselineLinear(base, 3, 1.5, p, getattr(baselines, name))
    nn.init.normal_(layer.lora_B)
    x = torch.randn(2, 5, 10, dtype=torch.float64, requires_grad=True)
    y = layer(x)
    mask = None
    if p > 0:  # the one that the schedule keeps
        kept = y.grad_fn.next_functions[0][0].saved_tensors
        mask = next(t for t in kept if t.dtype == torch.bool).view(x.shape)
        assert 0 < mask.double().mean() < 1
    factors = (layer.lora_A, layer.lora_B)
    want = reference.lora_linear(x, base.weight, None, *factors, 1.5, mask=mask, p=p)
    torch.testing.assert_close(y, want, rtol=1e-12, atol=1e-12)
    grad = torch.randn_like(y)
    wanted = torch.autograd.grad(want, (x, *factors), grad)
    torch.testing.assert_close(
        torch.autograd.grad(y, (x, *factors), grad), wanted, rtol=1e-12, atol=1e-12
    )


def test_unsloths_schedule_refuses_dropout():
    import baselines

    layer = baselines.BaselineLinear(nn.Linear(4, 4), 2, 1.0, 0.1, baselines.UnslothSchedule)
    with pytest.raises(ValueError, match=r"p=0\.1"):
        layer(torch.randn(2, 4))


def test_everything_runs_on_a_cpu_and_writes_one_schema(tmp_path, monkeypatch, capsys):
    import run_gpu

    from harness import COLUMNS, source_hash

    printed = []

    def forked(name, command, limit):
        folder = tmp_path / "printed" / name
        done = scripts.run(ROOT / command[0], *command[1:], folder=folder, directory=ROOT)
        printed.append(done.stdout + done.stderr)
        return "ok" if done.returncode == 0 else f"failed with exit status {done.returncode}"

    # bitsandbytes, one of the peers, is right on every CPU if all columns are multiples of 64.
    options = ["--device", "cpu", "--quick", "--shrink", "16", "--out", str(tmp_path)]
    monkeypatch.setattr(run_gpu, "run", forked)
    monkeypatch.setattr(sys, "argv", ["run_gpu.py", *options])
    with pytest.raises(SystemExit) as stop:
        run_gpu.main()
    assert stop.value.code == 0, "\n".join(printed)
    benches = set()
    for path in tmp_path.glob("*.csv"):
        with path.open(newline="") as file:
            rows = list(csv.DictReader(file))
        assert tuple(rows[0]) == COLUMNS
        assert {row["source"] for row in rows} == {source_hash()}
        assert all(float(row["ms_p50"]) > 0 for row in rows)
        benches |= {row["bench"] for row in rows}
    nf4 = {"kernels nf4", "step nf4"}
    assert benches == {"layers", "kernels", "step grid", "beta", "bandwidth", *nf4}
    assert any("philox: needs a GPU, nothing measured" in text for text in printed)
    plots = {path.name for path in tmp_path.glob("*.png")}
    assert plots == {"over_frozen.png", "kept.png", "kernels.png"}
    summary = capsys.readouterr().out.splitlines()[-7:]
    assert all(" ok, " in line for line in summary), summary


SMALL = {"device": "cpu", "layers": 1, "shrink": 16, "batch": 2, "length": 32, "rounds": 1}
STEPS = {
    "fp32": {"dtype": "fp32"},
    "autocast": {"dtype": "autocast"},
    "reentrant": {"checkpointing": "reentrant"},
    "non-reentrant": {"checkpointing": "non-reentrant"},
    "micro-batches": {"micro_batches": 2},
    "for-loop": {"optimizer": "for-loop"},
    "foreach": {"optimizer": "foreach"},
}


@pytest.mark.parametrize("name", STEPS)
def test_every_step_is_the_frozen_models_at_first(name):
    from bench_step import VARIANTS, Combination, measure

    floor = measure(Combination(**SMALL, **STEPS[name]))
    variants = VARIANTS if name == "fp32" else ({},)
    for variant in variants:
        ours = measure(Combination(**SMALL, **STEPS[name], provider="lora", variant=variant))
        assert ours["loss"] == pytest.approx(floor["loss"], rel=1e-2)
        assert all(seconds > 0 for seconds in ours["times"])
        assert len(ours["times"]) == SMALL["rounds"]


def test_every_step_on_4_bits_is_the_quantised_models_at_first():
    from bench_step import Combination, measure

    names = ["frozen", "frozen-nf4", "lora-nf4"]
    if importlib.util.find_spec("bitsandbytes"):
        names.append("peft-bitsandbytes-nf4")
    of = {name: measure(Combination(**SMALL, dtype="fp32", provider=name)) for name in names}
    for name in names[1:]:
        assert of[name]["loss"] == pytest.approx(of["frozen-nf4"]["loss"], rel=1e-6)
        assert of[name]["loss"] != pytest.approx(of["frozen"]["loss"], rel=1e-6)
        assert of[name]["held"] < 0.8 * of["frozen"]["held"]  # embeddings and head stay


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc/self/status")
def test_the_peak_is_that_of_the_step_alone():
    from bench_step import host_peak_mb

    held = torch.ones(40_000_000)
    peak = host_peak_mb(lambda: torch.ones(20_000_000).sum())
    assert 75 <= peak < 100  # the kernel counts pages in batches
    assert held[-1] == 1


def test_a_process_that_fails_gives_its_last_words():
    from bench_step import Combination, in_its_own_process

    c = Combination(**SMALL, provider="lora", variant={"lora_alpha": float("inf")})
    assert "lora_alpha=inf" in in_its_own_process(c)


def test_the_floor_is_the_median_of_its_runs_and_the_table_says_so(tmp_path, monkeypatch):
    import readme_table
    from bench_step import Combination, rows_of

    from harness import write_csv

    def run(seconds, peak, **changes):
        measured = {"times": [seconds], "peak": peak, "loss": 1.0, "held": 7.0}
        return Combination(**SMALL, **changes), measured

    lora, dora = {"provider": "lora"}, {"provider": "lora", "variant": {"use_dora": True}}
    grid = [run(0.1, 50), run(0.11, 60, **lora), run(0.12, 50)]
    slow = [run(0.2, 50), run(0.4, 60, **lora), run(0.6, 90, **dora), run(0.5, 60, **lora)]
    rows = rows_of(grid) + rows_of([(replace(c, part="variants"), m) for c, m in slow])
    assert [row["over_frozen"] for row in rows] == [0.9091, 1.0, 1.0909, 1.0, 2.0, 3.0, 2.5]
    write_csv(tmp_path / "step_cpu.csv", rows, "cpu")
    monkeypatch.setattr(readme_table, "RESULTS", tmp_path)
    lines = readme_table.training_table().splitlines()
    assert lines[2] == (
        "| phi-3-mini / 16, 1 layers: step | bf16 | 64 "
        "| 110 ms, 100 to 120 (50 MB) | 1.00 (60 MB) | – |"
    )
    assert "| use_dora | 1.33 | 1.50 |" in lines  # over its own group's lora, 400 and 500 ms
    assert "lora itself, in each group: 450 ms, 400 to 500." in lines


def test_rows_on_4_bits_have_tables_of_their_own(tmp_path, monkeypatch):
    import readme_table
    from bench_step import Combination, rows_of

    from harness import write_csv

    def run(seconds, held, provider):
        c = Combination(**SMALL, part="nf4", provider=provider)
        return c, {"times": [seconds], "peak": 50, "loss": 1.0, "held": held}

    steps = [run(0.1, 80, "frozen"), run(0.12, 81, "lora"), run(0.15, 21, "lora-nf4")]
    write_csv(tmp_path / "step_cpu.csv", rows_of(steps), "cpu")
    of_layer = {
        "bench": "layers",
        "layer": "o_proj",
        "in": 8,
        "out": 8,
        "parts": 1,
        "dtype": "bf16",
    }
    of_layer |= {"p": 0.0, "tokens": 4, "rank": 4, "pass": "both", "kept_in_x": 1.5}
    ratios = {"frozen": 1.0, "lora": 1.2, "frozen-nf4": 1.3, "lora-nf4": 1.5}
    layers = [
        {**of_layer, "provider": p, "ms_p50": 2 * x, "over_frozen": x} for p, x in ratios.items()
    ]
    write_csv(tmp_path / "layers_cpu.csv", layers, "cpu")
    monkeypatch.setattr(readme_table, "RESULTS", tmp_path)
    lines = readme_table.training_table().splitlines()
    assert (
        "| phi-3-mini / 16, 1 layers: step, bf16, 64 tokens | 100 ms (50 MB), 80 MB "
        "| 1.20 (50 MB), 81 MB | – | 1.50 (50 MB), 21 MB | – | 1.25 |"
    ) in lines
    lines = readme_table.table().splitlines()
    assert "| all four projections, bf16, dropout 0.0 | 1.20 (1.50) |" in lines
    quantised = "| all four projections, bf16, dropout 0.0 | 1.30 (1.50) | 1.50 (1.50) | 1.25 |"
    assert quantised in lines


def test_a_part_that_fails_or_has_no_time_is_told(monkeypatch, capsys):
    import run_gpu

    assert run_gpu.run("bad", ["-c", "raise SystemExit(3)"], 60) == "failed with exit status 3"
    assert run_gpu.run("slow", ["-c", "import time; time.sleep(60)"], 5) == "stopped at its limit"
    assert run_gpu.run("late", ["-c", ""], 1) == "skipped, no time left"
    monkeypatch.setattr(sys, "argv", ["run_gpu.py", "--device", "cpu"])
    monkeypatch.setattr(run_gpu, "parts", lambda args: [("bad", 9, ["-c", "raise SystemExit(3)"])])
    with pytest.raises(SystemExit) as stop:
        run_gpu.main()
    assert stop.value.code == 1
    assert "bad          failed with exit status 3" in capsys.readouterr().out


def test_rows_of_other_kernels_are_stale(tmp_path):
    import readme_table

    import harness

    shutil.copy(ROOT / "benchmarks" / "results" / "layers_cpu.csv", tmp_path / "old.csv")
    rows = readme_table.read(tmp_path / "old.csv")
    harness.write_csv(tmp_path / "new.csv", rows, "cpu")
    assert readme_table.stale(tmp_path / "nothing") == []
    altered = (tmp_path / "new.csv").read_text().replace(harness.source_hash(), "0123456789ab", 1)
    (tmp_path / "old.csv").write_text(altered)
    [line] = readme_table.stale(tmp_path)
    assert line.startswith("stale: old.csv is of 0123456789ab")


def test_the_experiments_kernels_in_the_interpreter(interpreted):
    code = """
import sys
from dataclasses import replace
sys.path.insert(0, "benchmarks")
import torch
import experiments
ones = torch.ones(64, 256)
for mask in experiments.MASKS:
    share = float(experiments.row_sums(ones, 0.05, mask).mean()) / 256
    assert abs(share - (1 if mask == "no mask" else 0.95)) < 0.01, (mask, share)
x, s, w, b = (torch.randn(size) for size in ((64, 96), (64, 16), (96, 96), (96, 16)))
for tma in (False, True):
    y = experiments.extend(x, s, w, b, tma, (32, 32, 32, 4, 2), 3)
    torch.testing.assert_close(y, x @ w.t() + s @ b.t(), rtol=1e-4, atol=1e-4)
"""
    done = script("-c", code, **interpreted)
    assert done.returncode == 0, done.stderr
