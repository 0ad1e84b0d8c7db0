"""The tables in README.md and the guides, from results/*.csv; whether rows are of this source.

python benchmarks/readme_table.py           print them
python benchmarks/readme_table.py --write   put them between the markers in these files
python benchmarks/readme_table.py --check   exit status 1 if results/ has rows of other kernels
"""

import csv
import math
import statistics
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
BEGIN, END = "<!-- table: begin -->", "<!-- table: end -->"
PLAN_BEGIN, PLAN_END = "<!-- plan: begin -->", "<!-- plan: end -->"
LABELS = {
    "lora": "**lora**",
    "loralib": "loralib",
    "peft": "PEFT",
    "peft-compiled": "PEFT compiled",
    "unsloth-schedule": "Unsloth's schedule",
    "lorafusion-schedule": "LoRAFusion's schedule",
}
NF4_LABELS = {
    "frozen-nf4": "frozen NF4",
    "lora-nf4": "**lora NF4**",
    "peft-bitsandbytes-nf4": "PEFT on bitsandbytes NF4",
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
    """Sums over the projections, by kind of layer, dtype and dropout; the provenance below.

    Of those on 4-bit weights, if there are any, in a table of their own.
    """
    rows = [row for row in rows if row.get("pass", "both") == "both"]
    shown = {name: label for name, label in LABELS.items() if _of(rows, provider=name)}
    lines = [
        "| forward + backward over the frozen layers | " + " | ".join(shown.values()) + " |",
        "|---|" + "---|" * len(shown),
    ]
    for said, block in _blocks(rows):
        cells = " | ".join(_sum(block, provider) for provider in shown)
        lines.append(f"| {said} | {cells} |")
    shown = {name: label for name, label in NF4_LABELS.items() if _of(rows, provider=name)}
    if shown:
        columns = [*shown.values(), "lora NF4 over lora"]
        lines += ["", "| on 4-bit weights | " + " | ".join(columns) + " |"]
        lines.append("|---|" + "---|" * len(columns))
        for said, block in _blocks(rows):
            cells = " | ".join(_sum(block, provider) for provider in shown)
            ratio = _ratio(block, "lora-nf4") / _ratio(block, "lora")
            lines.append(f"| {said} | {cells} | {ratio:.2f} |")
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


def _blocks(rows: list[dict[str, str]]) -> Iterator[tuple[str, list[dict[str, str]]]]:
    """What a line is of, and its rows."""
    for merged in (False, True):
        of_kind = [row for row in rows if (int(row["parts"]) > 1) == merged]
        kind = "qkv, gate_up with parts" if merged else "all four projections"
        for dtype, p in dict.fromkeys((row["dtype"], row["p"]) for row in of_kind):
            yield f"{kind}, {dtype}, dropout {p}", _of(of_kind, dtype=dtype, p=p)


def _sum(block: list[dict[str, str]], provider: str) -> str:
    """Ratio of the summed times, and the most that any of the layers keeps."""
    ratio = _ratio(block, provider)
    if math.isnan(ratio):
        return "–"
    kept = max(float(row["kept_in_x"]) for row in _of(block, provider=provider))
    return f"{ratio:.2f} ({kept:.2f})"


def _ratio(block: list[dict[str, str]], provider: str) -> float:
    """Of the summed times to the frozen layers'; NaN if a layer is missing."""
    frozen = {row["layer"]: float(row["ms_p50"]) for row in _of(block, provider="frozen")}
    mine = _of(block, provider=provider)
    if len(mine) < len(frozen):
        return math.nan
    total = sum(float(row["over_frozen"]) * frozen[row["layer"]] for row in mine)
    return total / sum(frozen.values())


def nf4_table() -> str:
    """Of 4-bit layers on a CPU, which are measured apart from the rest."""
    return _table(read(RESULTS / "layers_nf4_cpu.csv"))


def training_table() -> str:
    """As `table`, of the training steps in results/step_*.csv."""
    paths = [RESULTS / f"step_{device}.csv" for device in ("cuda", "cpu")]
    tables = [_training_table(read(path)) for path in paths if path.exists()]
    return "\n\n".join(tables) or "Not measured yet."


def _training_table(rows: list[dict[str, str]]) -> str:
    """Time over the frozen step's, and peak; of optimizers and variants, over plain lora's."""
    keys = ("bench", "layer", "pass", "dtype", "tokens")
    beside = [row for row in rows if row["bench"] in ("step optimizer", "step variants")]
    lines = [
        "| step | dtype | tokens | frozen | **lora** | PEFT |",
        "|---|---|---|---|---|---|",
    ]
    nf4 = [row for row in rows if row["bench"] == "step nf4"]
    of_steps = [row for row in rows if row not in beside and row not in nf4]
    for values in dict.fromkeys(tuple(row[key] for key in keys) for row in of_steps):
        block = _of(rows, **dict(zip(keys, values, strict=True)))
        cells = " | ".join(_step(block, name) for name in ("frozen", "lora", "peft"))
        _, model, kind, dtype, tokens = values
        lines.append(f"| {model}: {kind} | {dtype} | {tokens} | {cells} |")
    if nf4:
        names = ("frozen", "lora", *NF4_LABELS)
        columns = ["frozen", "lora", *NF4_LABELS.values(), "lora NF4 over lora"]
        lines += ["", "| on 4-bit weights | " + " | ".join(columns) + " |"]
        lines.append("|---|" + "---|" * len(columns))
        for values in dict.fromkeys(tuple(row[key] for key in keys) for row in nf4):
            block = _of(nf4, **dict(zip(keys, values, strict=True)))
            cells = " | ".join(_step_and_weights(block, name) for name in names)
            times = (_median(_of(block, provider=n), "ms_p50") for n in ("lora-nf4", "lora"))
            _, model, kind, dtype, tokens = values
            said = f"{model}: {kind}, {dtype}, {tokens} tokens"
            lines.append(f"| {said} | {cells} | {next(times) / next(times):.2f} |")
        lines += ["", "After the peak, the weights as they are held."]
    if beside:
        lines += ["", "| lora with | time over lora | peak over lora |", "|---|---|---|"]
    names = ("bench", "pass", "provider")
    for bench, kind, provider in dict.fromkeys(tuple(row[n] for n in names) for row in beside):
        plain = _of(beside, bench=bench, provider="lora", **{"pass": "step"})
        mine = _of(beside, bench=bench, provider=provider, **{"pass": kind})
        if provider != "frozen" and mine != plain:
            ratios = [_median(mine, cell) / _median(plain, cell) for cell in ("ms_p50", "peak_mb")]
            said = " ".join([*kind.split(", ")[1:], provider.removeprefix("lora").strip()]).strip()
            lines.append(f"| {said} | {ratios[0]:.2f} | {ratios[1]:.2f} |")
    if beside:
        spreads = [
            _range(_of(beside, bench=b, provider="lora", **{"pass": "step"}))
            for b in dict.fromkeys(row["bench"] for row in beside)
        ]
        lines += ["", f"lora itself, in each group: {' and '.join(spreads)}."]
    origin = rows[0]
    lines.append("")
    lines.append(
        f"Time over the frozen step's, in brackets the peak memory of a step over what is held "
        f"before it; of the frozen step its time, with the range of the medians of its runs. "
        f"r = 16, dropout 0.05. Measured on one {origin['device']}, {origin['versions']}, "
        f"by `{origin['command']}`."
    )
    return "\n".join(lines)


def _range(rows: list[dict[str, str]]) -> str:
    """Median of the medians of some processes, with their range."""
    times = [float(row["ms_p50"]) for row in rows]
    spread = f", {min(times):.0f} to {max(times):.0f}" if len(times) > 1 else ""
    return f"{statistics.median(times):.0f} ms{spread}"


def _median(rows: list[dict[str, str]], cell: str) -> float:
    values = [float(row[cell]) for row in rows if row[cell]]
    return statistics.median(values) if values else float("nan")


def _step(block: list[dict[str, str]], provider: str) -> str:
    mine = _of(block, provider=provider)
    if not mine:
        return "–"
    peak = f"{_median(mine, 'peak_mb'):.0f} MB"
    if provider != "frozen":
        return f"{_median(mine, 'over_frozen'):.2f} ({peak})"
    return f"{_range(mine)} ({peak})"


def _step_and_weights(block: list[dict[str, str]], provider: str) -> str:
    mine = _of(block, provider=provider)
    held = f", {_median(mine, 'held_mb'):.0f} MB" if mine else ""
    return _step(block, provider) + held


def scaling_table() -> str:
    """As `table`, of the steps on several ranks in results/scaling_*.csv."""
    paths = [RESULTS / f"scaling_{device}.csv" for device in ("cuda", "cpu")]
    tables = [_scaling_table(read(path)) for path in paths if path.exists()]
    return "\n\n".join(tables) or "Not measured yet."


def _scaling_table(rows: list[dict[str, str]]) -> str:
    """A line each, in MB; nothing where nothing was counted."""
    engines = {"plain": "none", "ddp": "DDP", "fsdp2": "FSDP2"}
    columns = ("held_mb", "peak_mb", "reduced_mb", "gathered_mb", "wire_mb")
    lines = [
        "| engine | ranks | tokens/s | ms | held | peak | reduced | gathered | on the wire |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        sizes = " | ".join(f"{float(row[name]):.2f}" if row[name] else "–" for name in columns)
        speed = f"{float(row['tokens_per_s']):.0f} | {float(row['ms_p50']):.0f}"
        lines.append(f"| {engines[row['provider']]} | {row['ranks']} | {speed} | {sizes} |")
    origin = rows[0]
    lines.append("")
    lines.append(
        f"{origin['layer']}, {origin['dtype']}, {origin['tokens']} tokens a step of all ranks "
        f"together, r = {origin['rank']} on all four projections, dropout {origin['p']}; the factors "
        f"are {float(origin['trained_mb']):.2f} MB. In MB a rank: held between steps, the peak of a "
        "step over what is held before it, gradients reduced, weights gathered; on the wire is all "
        f"ranks together. Measured on one {origin['device']}, {origin['versions']}, by "
        f"`{origin['command']}`."
    )
    return "\n".join(lines)


def plan() -> str:
    """What scaling_plan.py computes; not measured."""
    import scaling_plan

    return scaling_plan.plan()


TABLES = {
    "README.md": table,
    "docs/training.md": training_table,
    "docs/scaling.md": scaling_table,
    "docs/qlora.md": nf4_table,
}


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
        print(*(of_file() for of_file in TABLES.values()), *stale(), sep="\n\n")
        return
    for name, of_file in TABLES.items():
        path = ROOT / name
        path.write_text(_between(path.read_text(), BEGIN, END, of_file()))
    path = ROOT / "docs" / "scaling.md"
    path.write_text(_between(path.read_text(), PLAN_BEGIN, PLAN_END, plan()))


def _between(text: str, begin: str, end: str, content: str) -> str:
    """The text with this content between two markers."""
    before, _, rest = text.partition(begin)
    _, _, after = rest.partition(end)
    return f"{before}{begin}\n{content}\n{end}{after}"


if __name__ == "__main__":
    main()
