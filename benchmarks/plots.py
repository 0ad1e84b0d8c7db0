"""Three plots of measured rows: time over the frozen layer, memory kept, kernels against a copy.

Reads the CSVs in a folder, a GPU's alone if there are any, and writes over_frozen.png, kept.png and
kernels.png there, each only if there are rows for it. The rank is 16, or else the least.

    python benchmarks/plots.py [FOLDER]
"""

import argparse
import csv
from pathlib import Path

import matplotlib
from matplotlib import pyplot

Rows = list[dict[str, str]]
Points = dict[str, dict[str, list[tuple[int, float]]]]


def read(folder: Path) -> Rows:
    rows = []
    for path in sorted(folder.glob("*_cuda.csv")) or sorted(folder.glob("*.csv")):
        with path.open(newline="") as file:
            rows += csv.DictReader(file)
    ranks = {row["rank"] for row in rows if row["rank"]}
    rank = "16" if "16" in ranks else min(ranks, key=int, default="")
    return [row for row in rows if row["rank"] == rank]


def points(rows: Rows, panel: str, cell: str) -> Points:
    """{panel: {line: [(tokens, value)]}}; of rows for the same point the last counts."""
    found: dict[str, dict[str, dict[int, float]]] = {}
    for row in rows:
        line = f"{row['provider']}, p = {row['p']}" if row["p"] else row["provider"]
        of_panel = found.setdefault(row[panel], {})
        of_panel.setdefault(line, {})[int(row["tokens"])] = float(row[cell])
    return {
        name: {line: sorted(values.items()) for line, values in lines.items()}
        for name, lines in found.items()
    }


def draw(panels: Points, ylabel: str, floor: float, path: Path) -> None:
    if not panels:
        return
    width = min(len(panels), 4)
    height = -(-len(panels) // width)
    figure, axes = pyplot.subplots(
        height, width, figsize=(4.2 * width, 3.4 * height), squeeze=False, layout="constrained"
    )
    for axis in axes.flat[len(panels) :]:
        axis.remove()
    for axis, (name, lines) in zip(axes.flat, panels.items(), strict=False):
        for line, values in lines.items():
            axis.plot(*zip(*values, strict=True), marker="o", markersize=3, label=line)
        axis.axhline(floor, color="grey", linewidth=0.8)
        axis.set(title=name, xlabel="tokens", ylabel=ylabel, xscale="log")
        axis.legend(fontsize=6)
    figure.savefig(path, dpi=130)
    pyplot.close(figure)
    print(f"wrote {path}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    results = Path(__file__).resolve().parent / "results"
    parser.add_argument("folder", nargs="?", type=Path, default=results)
    folder = parser.parse_args().folder
    matplotlib.use("Agg")
    rows = read(folder)
    dtype = "bf16" if any(row["dtype"] == "bf16" for row in rows) else "fp32"
    layers = [
        row
        for row in rows
        if row.get("bench", "layers") == "layers"  # a file without the column is of the layers
        and row["provider"] != "frozen"
        and row["dtype"] == dtype
        and row["parts"] == "1"
        and row.get("pass", "both") == "both"
    ]
    kernels = [row for row in rows if row.get("bench") == "kernels"]
    draw(points(layers, "layer", "over_frozen"), "over frozen", 1, folder / "over_frozen.png")
    draw(points(layers, "layer", "kept_in_x"), "kept, in x", 0, folder / "kept.png")
    draw(points(kernels, "layer", "of_roofline"), "of a copy", 1, folder / "kernels.png")


if __name__ == "__main__":
    main()
