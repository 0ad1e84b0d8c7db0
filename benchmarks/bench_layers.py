"""Forward and backward of one layer over the frozen layer, and the bytes kept for backward.

The four projections of a Phi model, each as a plain layer with one adapter and, where it stands for
several, as a merged one. Every provider is checked against the formula in fp32 first and then runs in
every round, in turn; a ratio is the median over the rounds of a provider's time over the frozen
layer's in the same round. TFLOP/s count the frozen products alone, whatever the provider adds.

The providers that end in -nf4 have a weight of 4 bits, all the same codes, and the formula's weight is
theirs: frozen-nf4 is that layer without an adapter, the floor of the others.

    python benchmarks/bench_layers.py [--quick] [--device cpu] [--csv FILE]
"""

import argparse
import functools
import importlib.util
import itertools
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import lora
from lora.kernels import reference

import baselines
from harness import (
    DTYPES,
    PHI_3_MINI,
    kept_bytes,
    off_by,
    paired_times,
    peak_mb,
    rate_cells,
    roofline,
    time_cells,
    write_csv,
)

Splits = tuple[int, ...]
# name: (in, rows of every part)
MODELS: dict[str, dict[str, tuple[int, Splits]]] = {
    "phi-3-mini": PHI_3_MINI,
    "phi-3-medium": {
        "qkv_proj": (5120, (5120, 1280, 1280)),
        "o_proj": (5120, (5120,)),
        "gate_up_proj": (5120, (17920, 17920)),
        "down_proj": (17920, (5120,)),
    },
    "phi-4-mini": {**PHI_3_MINI, "qkv_proj": (3072, (3072, 1024, 1024))},
}
SCALING = 2.0
CHECKED_TOKENS = {"cpu": 32, "cuda": 8192}  # at most; the check is not what takes the time
ON_NF4 = ("frozen-nf4", "lora-nf4", "peft-bitsandbytes-nf4")
ON_CPU = ("lora", "loralib", "peft", *ON_NF4)


def _ours(base: nn.Linear, r: int, p: float, splits: Splits) -> nn.Module:
    if len(splits) == 1:
        return lora.Linear.from_module(base, r, SCALING * r, p)
    parts = {"enable_lora": [True] * len(splits), "out_splits": splits}
    return lora.MergedLinear.from_module(base, r, SCALING * r, p, **parts)


def _loralib(base: nn.Linear, r: int, p: float, splits: Splits) -> nn.Module:
    import loralib

    sizes = (base.in_features, base.out_features, r, SCALING * r, p)
    if len(splits) == 1:
        layer = loralib.Linear(*sizes, merge_weights=False, bias=False)
    else:
        layer = loralib.MergedLinear(*sizes, [True] * len(splits), merge_weights=False, bias=False)
    layer = layer.to(base.weight.dtype)
    layer.weight = base.weight
    return layer


def _peft(base: nn.Linear, r: int, p: float, splits: Splits) -> nn.Module:
    import peft

    config = peft.LoraConfig(r=r, lora_alpha=SCALING * r, lora_dropout=p, target_modules=["0"])
    model = nn.Sequential(base)
    if isinstance(base, lora.LinearNF4):
        model = nn.Sequential(baselines.linear4bit(base))
        model.is_loaded_in_4bit = True  # which PEFT asks of a model before it looks at the layer
    return peft.inject_adapter_in_model(config, model)[0].to(base.weight.dtype)


def _peft_compiled(*arguments: Any) -> nn.Module:
    torch._dynamo.reset()  # or the layers before this one count as recompilations
    return torch.compile(_peft(*arguments), dynamic=False)


def _schedule(name: str, base: nn.Linear, r: int, p: float, splits: Splits) -> nn.Module:
    return baselines.BaselineLinear(base, r, SCALING, p, getattr(baselines, name))


def _frozen(base: nn.Linear, *options: Any) -> nn.Module:
    return base


PROVIDERS: dict[str, Callable[..., nn.Module]] = {
    "lora": _ours,
    "loralib": _loralib,
    "peft": _peft,
    "peft-compiled": _peft_compiled,
    "unsloth-schedule": functools.partial(_schedule, "UnslothSchedule"),
    "lorafusion-schedule": functools.partial(_schedule, "LoRAFusionSchedule"),
    "frozen-nf4": _frozen,
    "lora-nf4": _ours,
    "peft-bitsandbytes-nf4": _peft,
}


def can_run(provider: str, p: float, splits: Splits) -> bool:
    """Ours runs everything; loralib has parts of one size, the others have none."""
    if provider in ("lora", "lora-nf4", "frozen-nf4"):
        return True
    packages = {"loralib", "peft", "bitsandbytes"}.intersection(provider.split("-"))
    if not all(map(importlib.util.find_spec, packages)):
        return False
    if provider == "unsloth-schedule" and p > 0:
        return False
    return len(splits) == 1 or (provider == "loralib" and len(set(splits)) == 1)


def check(layer: nn.Module, base: nn.Linear, tokens: int, p: float, splits: Splits) -> str:
    """What is off from the formula in fp32 on the layer's own factors; empty if nothing is.

    Masks differ between providers, so with dropout the formula is without it, and the bound is wider
    by the noise that dropout makes, sqrt(p / (1 - p)) of the update: 1.5 times, more if S is small.
    """
    options: dict[str, Any] = {"dtype": base.weight.dtype, "device": base.weight.device}
    tokens = min(max(tokens, 32), CHECKED_TOKENS[base.weight.device.type])  # fewer: too much noise
    x = torch.randn(tokens, base.in_features, **options).requires_grad_()
    grad, weight = torch.randn(tokens, base.out_features, **options), base.weight.float()
    named = list(layer.named_parameters())
    factors = [q for factor in ("lora_A", "lora_B") for name, q in named if factor in name]
    y = layer(x)
    got = (y, *torch.autograd.grad(y, (x, *factors), grad))
    frozen = (F.linear(x.detach().float(), weight), grad.float() @ weight, 0, 0)
    want, scatter = frozen[:2], 0.0
    if factors:
        scatter = 1.5 * (1 + 4 / (tokens * len(factors[0])) ** 0.5) * (p / (1 - p)) ** 0.5
        wide = [t.detach().float().requires_grad_() for t in (x, *factors)]
        y = reference.lora_linear(wide[0], weight, None, *wide[1:], SCALING, splits=splits)
        want = (y, *torch.autograd.grad(y, wide, grad.float()))
    found = []
    for name, mine, right, without in zip(("y", "dX", "dA", "dB"), got, want, frozen, strict=False):
        right = right.detach()
        off = off_by(mine, right, scatter * float((right - without).norm() / right.norm()))
        found += [f"{name} is {off}"] if off else []
    return ", ".join(found)


def timed(
    kind: str, layers: dict[str, nn.Module], x: Tensor, grad: Tensor, rounds: int
) -> tuple[dict[str, list[float]], dict[str, float | str]]:
    """Times, and the peak memory of one step, of every layer in a pass."""

    def backward(layer: nn.Module, y: Tensor) -> None:
        y.backward(grad)
        x.grad = None
        for parameter in layer.parameters():
            parameter.grad = None

    setups, steps = {}, {}
    for name, layer in layers.items():
        forward = functools.partial(layer, x)
        steps[name] = {
            "forward": forward,
            "backward": functools.partial(backward, layer),
            "both": lambda layer=layer, forward=forward: backward(layer, forward()),
        }[kind]
        if kind == "backward":
            setups[name] = forward
    times = paired_times(steps, rounds, x.device.type, setups)
    peaks = {name: peak_mb(steps[name], x.device.type, setups.get(name)) for name in layers}
    return times, peaks


def build(
    base: nn.Linear, tokens: int, r: int, p: float, splits: Splits, names: Sequence[str]
) -> tuple[dict[str, nn.Module], list[str]]:
    """(the frozen layer and every provider that can run and is right; what is wrong)."""
    layers, wrong = {"frozen": base}, []
    quantized = dense = base
    if set(ON_NF4) & set(names):
        quantized = lora.LinearNF4.from_module(base)
        dense = quantized.to_dense(quantized.weight.dequantize())
    for name in names:
        if not can_run(name, p, splits):
            continue
        on, right = (quantized, dense) if name in ON_NF4 else (base, base)
        with torch.device(base.weight.device):
            made = PROVIDERS[name](on, r, p, splits)
        for key, parameter in made.named_parameters():
            if "lora_B" in key:
                nn.init.normal_(parameter, std=0.02)
        off = check(made, right, tokens, p, splits)
        if off:
            wrong.append(f"{name}: {off}")
        else:
            layers[name] = made
    return layers, wrong


def bench(
    layer: str, sizes: tuple[int, Splits], dtype: str, p: float, tokens: int, r: int, args: Any
) -> tuple[list[dict], list[str]]:
    """(rows of one layer: the frozen one, then every provider; what was wrong and is left out)."""
    in_features, splits = sizes
    options: dict[str, Any] = {"dtype": DTYPES[dtype], "device": args.device}
    base = nn.Linear(in_features, sum(splits), bias=False, **options).requires_grad_(False)
    x = torch.randn(tokens, in_features, **options).requires_grad_()
    grad = torch.randn(tokens, sum(splits), **options)
    layers, found = build(base, tokens, r, p, splits, args.providers)
    wrong = [f"{layer}, {dtype}, p = {p}, {tokens} tokens, r = {r}: {off}" for off in found]
    of_layer = {"bench": "layers", "layer": layer, "in": in_features, "out": sum(splits)}
    of_layer |= {"parts": len(splits), "dtype": dtype, "p": p, "tokens": tokens, "rank": r}
    kept = {
        name: kept_bytes(functools.partial(made, x), list(made.parameters()))
        for name, made in layers.items()
    }
    rows = []
    for kind in args.passes:
        times, peaks = timed(kind, layers, x, grad, args.rounds)
        work = 2 * tokens * in_features * sum(splits) * (2 if kind == "both" else 1)
        for provider in layers:
            cells = {
                "pass": kind,
                "provider": provider,
                "kept_in_x": round(kept[provider] / (x.numel() * x.element_size()), 4),
                "peak_mb": peaks[provider],
            }
            roof = roofline(args.device, x.dtype)[1]
            cells |= time_cells(times[provider], times["frozen"])
            cells |= rate_cells(times[provider], work, "tflop_per_s", roof)
            rows.append({**of_layer, **cells})
    return rows, wrong


def table(rows: list[dict]) -> str:
    """One line a layer; the last of each block is the sum, weighted by the frozen layers' times."""

    def kind_of(row: dict) -> tuple:
        model = row["layer"].rpartition("/")[0] or "phi-3-mini"
        kind = "merged layers" if row["parts"] > 1 else "one adapter"
        return model, row["dtype"], row["p"], kind, row["tokens"], row["rank"], row["pass"]

    lines = []
    for block_kind in dict.fromkeys(map(kind_of, rows)):
        model, dtype, p, kind, tokens, r, of_pass = block_kind
        block = [row for row in rows if kind_of(row) == block_kind]
        frozen = {row["layer"]: row["ms_p50"] for row in block if row["provider"] == "frozen"}
        names = [n for n in dict.fromkeys(row["provider"] for row in block) if n != "frozen"]
        cells = {(row["layer"], row["provider"]): row for row in block}
        lines.append(f"\n{model} {dtype}, p = {p}, {kind}, {tokens} tokens, r = {r}, {of_pass}:")
        lines.append("time over frozen (kept for backward, in x)")
        lines.append(f"{'':26}{'frozen ms':>10}" + "".join(f"{name:>22}" for name in names))
        for layer, ms in frozen.items():
            mine = [cells.get((layer, name)) for name in names]
            shown = (f"{c['over_frozen']:.3f} ({c['kept_in_x']:6.3f})" if c else "" for c in mine)
            lines.append(f"{layer:26}{ms:>10.3f}" + "".join(f"{text:>22}" for text in shown))
        sums = ""
        for name in names:
            mine = [cells.get((layer, name)) for layer in frozen]
            total = sum(c["over_frozen"] * frozen[c["layer"]] for c in mine if c)
            sums += f"{total / sum(frozen.values()):>13.3f}{'':9}" if all(mine) else f"{'':22}"
        lines.append(f"{'sum':26}{sum(frozen.values()):>10.3f}{sums}")
    return "\n".join(lines)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="fewer rounds, under three minutes")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--models", nargs="+", choices=MODELS, default=["phi-3-mini"])
    parser.add_argument("--tokens", nargs="+", type=int, default=[512])
    parser.add_argument("--ranks", nargs="+", type=int, default=[16])
    parser.add_argument("--p", nargs="+", type=float, default=[0.0, 0.05])
    parser.add_argument("--dtypes", nargs="+", choices=("bf16", "fp32"), default=["bf16", "fp32"])
    parser.add_argument(
        "--passes", nargs="+", choices=("forward", "backward", "both"), default=["both"]
    )
    parser.add_argument(
        "--providers", nargs="+", choices=PROVIDERS, help=f"all; on a CPU {', '.join(ON_CPU)}"
    )
    parser.add_argument("--shrink", type=int, default=1, help="divide all sizes, to try the script")
    parser.add_argument("--rounds", type=int, help="15, or 2 with --quick")
    parser.add_argument("--csv", type=Path, help="write the rows to this file")
    args = parser.parse_args()
    args.rounds = args.rounds or (2 if args.quick else 15)
    args.providers = args.providers or (ON_CPU if args.device == "cpu" else list(PROVIDERS))
    return args


def layers_of(models: Sequence[str], shrink: int) -> dict[str, list[tuple[str, int, Splits]]]:
    """Of every model (layer, in, rows of every part): each as one part, then the merged ones."""
    found = {}
    for model in models:
        prefix = "" if model == "phi-3-mini" else f"{model}/"
        sizes = [
            (f"{prefix}{name}", size // shrink, tuple(part // shrink for part in splits))
            for name, (size, splits) in MODELS[model].items()
        ]
        single = [(name, size, (sum(splits),)) for name, size, splits in sizes]
        found[model] = single + [layer for layer in sizes if len(layer[2]) > 1]
    return found


def main() -> None:
    args = arguments()
    start, rows, wrong = time.monotonic(), [], []
    models = layers_of(args.models, args.shrink)
    settings = itertools.product(models, args.tokens, args.ranks, args.dtypes, args.p)
    for model, tokens, r, dtype, p in settings:
        for layer, *sizes in models[model]:
            torch.manual_seed(0)
            more, off = bench(layer, sizes, dtype, p, tokens, r, args)
            rows += more
            wrong += off
            if args.csv:
                write_csv(args.csv, rows, args.device)
    print(table(rows))
    print(f"\n{args.rounds} rounds, {time.monotonic() - start:.0f} s")
    if wrong:
        sys.exit("wrong, so not timed:\n" + "\n".join(wrong))


if __name__ == "__main__":
    main()
