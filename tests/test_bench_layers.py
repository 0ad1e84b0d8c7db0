"""The layer benchmark runs end to end on small sizes and writes rows that say where they are from."""

import csv
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def test_bench_layers_end_to_end(tmp_path):
    path = tmp_path / "rows.csv"
    options = ["--shrink", "32", "--tokens", "2", "--rank", "4", "--rounds", "1", "--csv", path]
    run = subprocess.run(
        [sys.executable, ROOT / "benchmarks" / "bench_layers.py", *map(str, options)],
        capture_output=True,
        text=True,
        check=True,
    )
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert {row["provider"] for row in rows} == {"frozen", "lora", "loralib", "peft"}
    assert {row["layer"] for row in rows} == {"qkv_proj", "o_proj", "gate_up_proj", "down_proj"}
    assert {row["tokens"] for row in rows} == {"2"}
    for row in rows:
        assert float(row["ms_p20"]) <= float(row["ms_p50"]) <= float(row["ms_p80"])
        assert len(row["source"]) == 12
        assert "bench_layers.py" in row["command"]
        if row["provider"] == "frozen":
            assert float(row["over_frozen"]) == 1
            assert float(row["kept_in_x"]) == 0
    assert run.stdout.count("sum") == 8
