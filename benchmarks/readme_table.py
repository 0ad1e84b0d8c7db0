"""The README's table, from benchmarks/results/layers_*.csv, and whether rows are of this source.

python benchmarks/readme_table.py           print it
python benchmarks/readme_table.py --write   put it between the markers in README.md
python benchmarks/readme_table.py --check   exit status 1 if results/ has rows of other kernels
"""

import csv
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
BEGIN, END = "<!-- table: begin -->", "<!-- table: end -->"
LABELS = {
    "lora": "**lora**",
    "loralib": "loralib",
    "peft": "PEFT",
    "peft-compiled": "PEFT compiled",
    "unsloth-schedule": "Unsloth's schedule",
    "lorafusion-schedule": "LoRAFusion's schedule",
}


def read(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def table() -> str:
    """One table a device that was measured, a GPU's first."""
    paths = [RESULTS / f"layers_{device}.csv" for device in ("cuda", "cpu")]
    tables = [_table(read(path)) for path in paths if path.exists()]
    missing = "" if paths[0].exists() else " Not measured on a GPU yet."
    return "\n\n".join(tables) + missing


def _table(rows: list[dict[str, str]]) -> str:
    """Sums over the projections, by kind of layer, dtype and dropout; the provenance below."""
    rows = [row for row in rows if row.get("pass", "both") == "both"]
    shown = {name: label for name, label in LABELS.items() if _of(rows, provider=name)}
    lines = [
        "| forward + backward over the frozen layers | " + " | ".join(shown.values()) + " |",
        "|---|" + "---|" * len(shown),
    ]
    for merged in (False, True):
        of_kind = [row for row in rows if (int(row["parts"]) > 1) == merged]
        kind = "qkv, gate_up with parts" if merged else "all four projections"
        for dtype, p in dict.fromkeys((row["dtype"], row["p"]) for row in of_kind):
            block = _of(of_kind, dtype=dtype, p=p)
            cells = " | ".join(_sum(block, provider) for provider in shown)
            lines.append(f"| {kind}, {dtype}, dropout {p} | {cells} |")
    origin = rows[0]
    lines.append("")
    lines.append(
        f"Phi-3-mini's shapes, {origin['tokens']} tokens, r = {origin['rank']}; in brackets what is "
        f"kept for backward, in units of the input. Measured on one {origin['device']}, "
        f"{origin['versions']}, by `{origin['command']}`."
    )
    return "\n".join(lines)


def _of(rows: list[dict[str, str]], **cells: str) -> list[dict[str, str]]:
    return [row for row in rows if all(row[key] == value for key, value in cells.items())]


def _sum(block: list[dict[str, str]], provider: str) -> str:
    """Ratio of the summed times, and the most that any of the layers keeps."""
    frozen = {row["layer"]: float(row["ms_p50"]) for row in _of(block, provider="frozen")}
    mine = _of(block, provider=provider)
    if len(mine) < len(frozen):
        return "–"
    total = sum(float(row["over_frozen"]) * frozen[row["layer"]] for row in mine)
    kept = max(float(row["kept_in_x"]) for row in mine)
    return f"{total / sum(frozen.values()):.2f} ({kept:.2f})"


def stale(folder: Path = RESULTS) -> list[str]:
    """A line for every file of rows that were measured on other kernel sources than these."""
    from harness import source_hash

    lines, now = [], source_hash()
    for path in sorted(folder.glob("*.csv")):
        old = sorted({row["source"] for row in read(path)} - {now})
        if old:
            lines.append(f"stale: {path.name} is of {', '.join(old)}, the kernels are {now}")
    return lines


def main() -> None:
    if "--check" in sys.argv[1:]:
        lines = stale()
        print("\n".join(lines) or "all rows are of these kernels")
        sys.exit(1 if lines else 0)
    if "--write" not in sys.argv[1:]:
        print(table(), *stale(), sep="\n")
        return
    readme = ROOT / "README.md"
    text = readme.read_text()
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    readme.write_text(f"{before}{BEGIN}\n{table()}\n{END}{after}")


if __name__ == "__main__":
    main()
