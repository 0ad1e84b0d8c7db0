"""Forward plus backward of one layer over the frozen layer, and the bytes kept for backward.

The four projections of Phi-3-mini, each as a plain layer with one adapter and, where it stands for
several, as a merged one. Every provider runs in every round, in turn; a ratio is the median over the
rounds of a provider's time over the frozen layer's in the same round.

    python benchmarks/bench_layers.py [--quick] [--device cpu] [--csv FILE]
"""

import argparse
import importlib.util
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

import lora

from harness import kept_bytes, paired_times, provenance, quantile, write_csv

# name: (in, out, parts)
SHAPES = {
    "qkv_proj": (3072, 9216, 3),
    "o_proj": (3072, 3072, 1),
    "gate_up_proj": (3072, 16384, 2),
    "down_proj": (8192, 3072, 1),
}
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


def _loralib(base: nn.Linear, r: int, p: float, parts: int) -> nn.Module:
    import loralib

    sizes = (base.in_features, base.out_features, r, 2 * r, p)
    if parts == 1:
        layer = loralib.Linear(*sizes, merge_weights=False, bias=False)
    else:
        layer = loralib.MergedLinear(*sizes, [True] * parts, merge_weights=False, bias=False)
    layer = layer.to(base.weight.dtype)
    layer.weight = base.weight
    return layer


def _peft(base: nn.Linear, r: int, p: float, parts: int) -> nn.Module:
    import peft

    config = peft.LoraConfig(r=r, lora_alpha=2 * r, lora_dropout=p, target_modules=["0"])
    model = peft.inject_adapter_in_model(config, nn.Sequential(base))
    return model[0].to(base.weight.dtype)


def _ours(base: nn.Linear, r: int, p: float, parts: int) -> nn.Module:
    if parts == 1:
        return lora.Linear.from_module(base, r, 2 * r, p)
    return lora.MergedLinear.from_module(base, r, 2 * r, p, enable_lora=[True] * parts)


def providers(merged: bool) -> dict[str, Callable[..., nn.Module]]:
    """Those that are installed; PEFT has no merged layer."""
    found: dict[str, Callable[..., nn.Module]] = {"lora": _ours}
    if importlib.util.find_spec("loralib"):
        found["loralib"] = _loralib
    if importlib.util.find_spec("peft") and not merged:
        found["peft"] = _peft
    return found


def bench(name: str, parts: int, dtype: str, p: float, args: argparse.Namespace) -> list[dict]:
    """Rows of one layer: the frozen one, then every provider."""
    in_features, out_features = (size // args.shrink for size in SHAPES[name][:2])
    options: dict[str, Any] = {"dtype": DTYPES[dtype], "device": args.device}
    base = nn.Linear(in_features, out_features, bias=False, **options).requires_grad_(False)
    layers = {"frozen": base}
    for provider, make in providers(parts > 1).items():
        layers[provider] = make(base, args.rank, p, parts).to(args.device)
        for key, parameter in layers[provider].named_parameters():
            if "lora_B" in key:
                nn.init.normal_(parameter, std=0.02)
    x = torch.randn(args.tokens, in_features, **options).requires_grad_()
    grad = torch.randn(args.tokens, out_features, **options)

    def step(layer: nn.Module) -> None:
        layer(x).backward(grad)
        x.grad = None
        for parameter in layer.parameters():
            parameter.grad = None

    steps = {provider: (lambda layer=layer: step(layer)) for provider, layer in layers.items()}
    times = paired_times(steps, args.rounds, args.device)
    rows = []
    for provider, layer in layers.items():
        ratios = [t / f for t, f in zip(times[provider], times["frozen"], strict=True)]
        kept = kept_bytes(lambda layer=layer: layer(x), list(layer.parameters()))
        rows.append(
            {
                "layer": name,
                "in": in_features,
                "out": out_features,
                "parts": parts,
                "dtype": dtype,
                "p": p,
                "provider": provider,
                "tokens": args.tokens,
                "rank": args.rank,
                "ms_p20": round(1e3 * quantile(times[provider], 0.2), 3),
                "ms_p50": round(1e3 * quantile(times[provider], 0.5), 3),
                "ms_p80": round(1e3 * quantile(times[provider], 0.8), 3),
                "over_frozen": round(quantile(ratios, 0.5), 4),
                "kept_in_x": round(kept / (x.numel() * x.element_size()), 4),
            }
        )
    return rows


def table(rows: list[dict]) -> str:
    """One line a layer; the last of each block is the sum, weighted by the frozen layers' times."""
    lines = []
    kinds = dict.fromkeys((row["dtype"], row["p"], row["parts"] > 1) for row in rows)
    for dtype, p, merged in kinds:
        block = [r for r in rows if (r["dtype"], r["p"], r["parts"] > 1) == (dtype, p, merged)]
        frozen = {r["layer"]: r["ms_p50"] for r in block if r["provider"] == "frozen"}
        names = [n for n in dict.fromkeys(r["provider"] for r in block) if n != "frozen"]
        kind = "merged layers" if merged else "one adapter"
        lines.append(f"\n{dtype}, p = {p}, {kind}: time over frozen (kept for backward, in x)")
        lines.append(f"{'':14}{'frozen ms':>10}" + "".join(f"{name:>18}" for name in names))
        for layer, ms in frozen.items():
            cells = [r for n in names for r in block if (r["layer"], r["provider"]) == (layer, n)]
            shown = "".join(f"{c['over_frozen']:>9.3f} ({c['kept_in_x']:6.3f})" for c in cells)
            lines.append(f"{layer:14}{ms:>10.1f}{shown}")
        sums = ""
        for provider in names:
            mine = {r["layer"]: r["over_frozen"] for r in block if r["provider"] == provider}
            total = sum(mine[layer] * ms for layer, ms in frozen.items())
            sums += f"{total / sum(frozen.values()):>9.3f}{'':9}"
        lines.append(f"{'sum':14}{sum(frozen.values()):>10.1f}{sums}")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="fewer rounds, under three minutes")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--shrink", type=int, default=1, help="divide all sizes, to try the script")
    parser.add_argument("--rounds", type=int, help="15, or 2 with --quick")
    parser.add_argument("--csv", type=Path, help="write the rows to this file")
    args = parser.parse_args()
    args.rounds = args.rounds or (2 if args.quick else 15)
    start, rows = time.monotonic(), []
    for dtype in DTYPES:
        for p in (0.0, 0.05):
            single = [(name, 1) for name in SHAPES]
            merged = [(name, parts) for name, (_, _, parts) in SHAPES.items() if parts > 1]
            for name, parts in single + merged:
                torch.manual_seed(0)
                rows += bench(name, parts, dtype, p, args)
    print(table(rows))
    print(
        f"\n{args.tokens} tokens, r = {args.rank}, {args.rounds} rounds, "
        f"{time.monotonic() - start:.0f} s"
    )
    if args.csv:
        origin = provenance(args.device)
        write_csv(args.csv, [{**row, **origin} for row in rows])


if __name__ == "__main__":
    main()
