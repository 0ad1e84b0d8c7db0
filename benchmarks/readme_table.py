"""The README's table, made from benchmarks/results/layers_cpu.csv.

python benchmarks/readme_table.py           print it
python benchmarks/readme_table.py --write   put it between the markers in README.md
"""

import csv
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "layers_cpu.csv"
BEGIN, END = "<!-- table: begin -->", "<!-- table: end -->"
LABELS = {"lora": "**lora**", "loralib": "loralib", "peft": "PEFT"}


def table() -> str:
    """Sums over the projections, by kind of layer, dtype and dropout; the provenance below."""
    with RESULTS.open(newline="") as file:
        rows = list(csv.DictReader(file))
    lines = [
        "| forward + backward over the frozen layers | " + " | ".join(LABELS.values()) + " |",
        "|---|" + "---|" * len(LABELS),
    ]
    for merged in (False, True):
        for dtype in ("bf16", "fp32"):
            for p in ("0.0", "0.05"):
                block = [
                    row
                    for row in rows
                    if (row["dtype"], row["p"], int(row["parts"]) > 1) == (dtype, p, merged)
                ]
                kind = "qkv, gate_up with parts" if merged else "all four projections"
                cells = [_sum(block, provider) for provider in LABELS]
                lines.append(f"| {kind}, {dtype}, dropout {p} | {' | '.join(cells)} |")
    origin = rows[0]
    lines.append("")
    lines.append(
        f"Phi-3-mini's shapes, {origin['tokens']} tokens, r = {origin['rank']}; in brackets what is "
        f"kept for backward, in units of the input. Measured on one {origin['device']}, "
        f"{origin['versions']}, by `{origin['command']}`. Not measured on a GPU yet."
    )
    return "\n".join(lines)


def _sum(block: list[dict[str, str]], provider: str) -> str:
    """Ratio of the summed times, and the most that any of the layers keeps."""
    frozen = {row["layer"]: float(row["ms_p50"]) for row in block if row["provider"] == "frozen"}
    mine = [row for row in block if row["provider"] == provider]
    if not mine:
        return "–"
    total = sum(float(row["over_frozen"]) * frozen[row["layer"]] for row in mine)
    kept = max(float(row["kept_in_x"]) for row in mine)
    return f"{total / sum(frozen.values()):.2f} ({kept:.2f})"


def main() -> None:
    if "--write" not in sys.argv[1:]:
        print(table())
        return
    readme = ROOT / "README.md"
    text = readme.read_text()
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    readme.write_text(f"{before}{BEGIN}\n{table()}\n{END}{after}")


if __name__ == "__main__":
    main()
