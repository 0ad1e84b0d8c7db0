"""The scaling benchmark runs on real processes; its counts and the plan are arithmetic from shapes."""

import csv
import dataclasses
import json
import sys
from pathlib import Path

import pytest
import scripts
import torch

import lora

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(autouse=True)
def _benchmarks_on_the_path(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")


def test_ranks_reduce_the_factors_and_no_more(tmp_path, monkeypatch):
    """DDP's ranks by torchrun, as for a user; the others forked, which takes less time."""
    import bench_scaling
    import readme_table
    from scaling_plan import Shapes, collectives

    by_torchrun = bench_scaling.in_its_own_torchrun

    def launched(c, engine, ranks):
        if engine == "ddp":
            return by_torchrun(c, engine, ranks)
        running = scripts.start_ranks(
            *(ranks, Path(bench_scaling.__file__)),
            *("--rank-of", json.dumps([dataclasses.asdict(c), engine])),
            folder=tmp_path / engine,
            environment={"GLOO_SOCKET_IFNAME": "lo"} if sys.platform == "linux" else {},
            filters="ignore",
        )
        assert scripts.wait_for_all(running) == [0] * ranks, running[0].stderr
        return json.loads(running[0].stdout.splitlines()[-1])

    path = tmp_path / "scaling_cpu.csv"
    options = ["--quick", "--ranks", "2", "--layers", "1", "--shrink", "32", "--batch", "2"]
    options += ["--length", "16", "--csv", str(path)]
    monkeypatch.setattr(bench_scaling, "in_its_own_torchrun", launched)
    monkeypatch.setattr(sys, "argv", ["bench_scaling.py", *options])
    bench_scaling.main()
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(row["provider"], row["ranks"]) for row in rows] == [
        ("plain", "1"),
        ("ddp", "2"),
        ("fsdp2", "2"),
    ]
    assert {row["tokens"] for row in rows} == {"32"}  # of all ranks together
    plain, ddp, fsdp2 = (
        {name: float(row[f"{name}_mb"]) for name in ("held", "trained", "reduced", "gathered")}
        for row in rows
    )
    shapes = Shapes("phi-3-mini / 32", 1, 96, 288, 256, 1002, 1)
    factors = pytest.approx(4e-6 * shapes.factors(), abs=1e-4)
    assert plain["trained"] == ddp["trained"] == fsdp2["trained"] == factors
    assert (plain["reduced"], plain["gathered"], ddp["gathered"]) == (0, 0, 0)
    [all_reduced] = collectives(shapes, "ddp", 2)
    gathered, reduced = collectives(shapes, "fsdp2", 2)
    assert ddp["reduced"] == pytest.approx(all_reduced.payload / 1e6, abs=1e-4) == factors
    assert fsdp2["reduced"] == pytest.approx(reduced.payload / 1e6, abs=1e-4) == factors
    # the last norm has 96 rows, and all other sizes are even: nothing is padded
    assert fsdp2["gathered"] == pytest.approx(gathered.payload / 1e6, abs=1e-4)
    assert plain["held"] == ddp["held"] == pytest.approx(2 * fsdp2["held"], abs=1e-3)
    if rows[0]["wire_mb"]:  # others may use the interface too, so there is no upper bound
        for row, sent in zip(rows[1:], ([all_reduced], [gathered, reduced]), strict=True):
            assert float(row["wire_mb"]) >= sum(sum(2 * s for s in c.sent()) for c in sent) / 1e6
    monkeypatch.setattr(readme_table, "RESULTS", tmp_path)
    lines = readme_table.scaling_table().splitlines()
    assert [line.split(" | ")[:2] for line in lines[2:5]] == [
        ["| none", "1"],
        ["| DDP", "2"],
        ["| FSDP2", "2"],
    ]
    assert "32 tokens a step of all ranks together, r = 16" in lines[-1]


def test_a_wrong_step_is_found():
    from bench_scaling import fault, of_all, padded_bytes

    one = {"loss": 2.0, "times": [1.0, 2.0], "trained": 80, "padded": 96, "reduced": 80, "wire": 5}
    both = of_all([one, {**one, "loss": 4.0, "times": [3.0, 1.0], "reduced": 88, "wire": 7}])
    assert both == {**one, "loss": 3.0, "times": [3.0, 2.0], "reduced": 88}
    assert fault(both, 3.0, 2) == ""
    assert "loss 3.0 where one process has 2.0" in fault(both, 2.0, 2)
    assert fault({**both, "loss": float("nan")}, 3.0, 2)
    assert fault({**both, "reduced": 97}, 3.0, 2).startswith("97 bytes of gradients")
    assert fault({**both, "reduced": 79}, 3.0, 2)  # a factor that is not reduced
    assert fault({**both, "reduced": 0}, 3.0, 1) == ""
    assert padded_bytes(torch.Size([5, 3]), 4, 2) == 6 * 3 * 4
    assert padded_bytes(torch.Size([1]), 4, 4) == 16


def test_a_batch_that_ranks_cannot_share_is_refused(monkeypatch, capsys):
    import bench_scaling

    monkeypatch.setattr(sys, "argv", ["bench_scaling.py", "--ranks", "1", "3"])
    with pytest.raises(SystemExit):
        bench_scaling.main()
    assert "--batch 4 on 3 ranks" in capsys.readouterr().err


def test_the_plans_shapes_are_the_models(make_phi3):
    from scaling_plan import MODELS, Shapes

    assert [m.total for m in MODELS] == [3_821_079_552, 13_960_238_080, 14_659_507_200]
    assert [m.factors() for m in MODELS] == [29_884_416, 65_536_000, 65_536_000]
    assert [m.group for m in MODELS] == [8, 2, 2]
    model = make_phi3()
    small = Shapes("small", 2, 64, 128, 112, 96, 2)
    assert small.total == sum(p.numel() for p in model.parameters())
    lora.patch_phi3(model, 4, 8, 0.0, "all-linear")
    assert small.factors(4) == sum(p.numel() for p in model.parameters() if p.requires_grad)


def test_the_plans_arithmetic():
    from scaling_plan import MODELS, collectives, memory, milliseconds

    mini, medium, phi4 = MODELS
    held = memory(mini, "ddp", 8)
    assert held["base"] == 2 * 3_821_079_552
    assert held["factors"] == 4 * 29_884_416
    assert held["gradients"] == held["moments"] == 8 * 29_884_416
    assert held["inputs"] == 32 * 8192 * 3072 * 2
    assert held["working set"] == 10 * 8192 * 32064  # the logits'
    assert memory(medium, "ddp", 8)["working set"] == 2 * 8192 * (8 * 5120 + 2 * 7680 + 7 * 17920)
    assert memory(mini, "ddp", 64) == held
    held = memory(medium, "fsdp2", 64)
    assert held["base"] == 13_960_238_080 * 2 // 64
    assert held["gathered"] == 2 * (2 * 340_797_440 + 328_340_480)
    assert held["factors"] == held["gradients"] == 65_536_000 * 4 // 64
    held = memory(phi4, "tp", 8)
    assert held["base"] == 13_631_897_600 + 2 * (2 * 100352 * 5120 + 5120)
    assert held["factors"] == 4 * 40 * 16 * (7 * 5120 + (5120 + 7680 + 3 * 17920) // 2)

    def sent(m, engine, gpus):
        return [each.sent() for each in collectives(m, engine, gpus)]

    assert sent(mini, "ddp", 8) == [(209_190_912, 0)]  # 2 * 7/8 * 4 * 29,884,416
    assert sent(medium, "fsdp2", 8) == [(48_744_989_440, 0), (229_376_000, 0)]
    [(_, gathered), (_, reduced)] = sent(medium, "fsdp2", 64)
    assert gathered == 55_708_559_360 * 63 / 64 / 8
    assert milliseconds(sent(medium, "fsdp2", 64)) == pytest.approx(
        (gathered + reduced) / 50e9 * 1e3
    )
    # 8 micro-batches, 2 * 7/8 of 32 layers' activations five times and seven factors' gradients
    inside = 8 * 1.75 * 32 * (5 * 8192 * 3072 * 2 + 7 * 16 * 3072 * 4)
    assert sent(mini, "tp", 8) == [(inside, 0), (0, 0)]
    assert sent(mini, "tp", 64) == [(inside, 0), (0, 1.75 * 4 * 13_369_344)]
    # groups of two: four of the 32 that hold the same part are in a node, one hop of four leaves it
    total = 2 * 31 / 32 * memory(medium, "tp", 64)["factors"]
    assert sent(medium, "tp", 64)[1] == (0.75 * total, 0.25 * total)


def test_the_guide_shows_the_plan():
    import readme_table
    from scaling_plan import plan

    guide = (ROOT / "docs" / "scaling.md").read_text()
    shown = guide.partition(readme_table.PLAN_BEGIN)[2].partition(readme_table.PLAN_END)[0]
    assert shown.strip() == plan()
    assert "**A model, not measured.**" in plan()
