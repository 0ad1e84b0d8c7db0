"""Each fused kernel alone, against the bytes it has to move and the bandwidth of a large copy.

    shrink        S = (m ∘ x) Aᵀ                             reads x            M K elements
    expand        y = α S Bᵀ                                 writes y           M N
    factor_grads  dS = dY B, dB = α dYᵀ S                    reads dY           M N
    input_grads   dX = α m ∘ (dS A), dA = α dSᵀ (m ∘ x)      reads x, writes dX  2 M K
    quantize      codes and absmax of W in blocks of 64      reads W, writes 4.5 bits a weight
    dequantize    W of codes and nested absmax               reads 4.127 bits a weight, writes W

GB/s are those bytes over the time; what else a kernel moves (factors, S, slabs) is its own loss. The
provider "torch" is the same formula in PyTorch's operations, with the mask drawn beforehand. A CPU has
that alone: there Triton has an interpreter, which is never timed. bitsandbytes' functions for the last
two run beside them where it is installed.

    python benchmarks/bench_kernels.py --device cuda [--csv FILE]
"""

import argparse
import importlib.util
import itertools
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

import lora
from lora.kernels import nf4
from lora.kernels.dropout import drop_level, keep, seeded_keep_bits

import baselines
from harness import (
    DTYPES,
    LAYERS,
    off_by,
    paired_times,
    rate_cells,
    roofline,
    time_cells,
    write_csv,
)

SEED, ALPHA = 7, 2.0
SETTING = {"tokens": 7, "rank": 5, "p": 6}  # columns, and how wide they are printed
Run = Callable[[], tuple[Tensor, ...]]


def make_inputs(
    m: int, k: int, n: int, r: int, p: float, dtype: torch.dtype, device: str
) -> tuple[dict[str, Tensor], Tensor | None]:
    """(x, dy, s, ds and the factors; the mask of a seed or None)."""
    sizes = {"x": (m, k), "dy": (m, n), "s": (m, r), "ds": (m, r), "A": (r, k), "B": (n, r)}
    tensors = {name: torch.randn(size, dtype=dtype, device=device) for name, size in sizes.items()}
    if p == 0:
        return tensors, None
    seed = torch.tensor([SEED], device=device)
    bits = seeded_keep_bits(seed, m, k, p)
    return tensors, keep(torch.ones_like(tensors["x"]), bits)


def in_torch(x: Tensor, dy: Tensor, s: Tensor, ds: Tensor, A: Tensor, B: Tensor, mask) -> dict:
    """The four formulas; in fp32 they are what the kernels are checked against."""

    def masked(t: Tensor) -> Tensor:
        return t if mask is None else t * mask

    return {
        "shrink": lambda: (masked(x) @ A.t(),),
        "expand": lambda: ((ALPHA * s) @ B.t(),),
        "factor_grads": lambda: (dy @ B, ALPHA * (dy.t() @ s)),
        "input_grads": lambda: (masked((ALPHA * ds) @ A), (ALPHA * ds).t() @ masked(x)),
    }


def in_triton(
    x: Tensor, dy: Tensor, s: Tensor, ds: Tensor, A: Tensor, B: Tensor, p: float
) -> dict[str, Run]:
    from lora.kernels.triton_expand import expand
    from lora.kernels.triton_factor_grads import factor_grads
    from lora.kernels.triton_input_grads import input_grads
    from lora.kernels.triton_shrink import shrink

    y, level, rows = torch.empty_like(dy), drop_level(p), ((0, dy.shape[1]),)
    seed = torch.tensor([SEED], device=x.device) if p > 0 else None

    def expanded() -> tuple[Tensor]:
        expand(y, s[None], B, None, ALPHA, rows, add=False)
        return (y,)

    return {
        "shrink": lambda: (shrink(x, A, seed, level),),
        "expand": expanded,
        "factor_grads": lambda: factor_grads(dy, s, B, ALPHA, rows, True, True),
        "input_grads": lambda: input_grads(x, ds, A, ALPHA, seed, level, True, True),
    }


def check(got: tuple[Tensor, ...], want: tuple[Tensor, ...], dtype: torch.dtype) -> str:
    """What is off; slabs, which the next kernel sums, are summed here."""
    whole = (g.sum(0).to(dtype) if g.dim() == 3 else g for g in got)
    found = [off_by(g, w) for g, w in zip(whole, want, strict=True)]
    return "; ".join(off for off in found if off)


def bench(
    layer: str, m: int, k: int, n: int, r: int, p: float, dtype: str, device: str, rounds: int
) -> tuple[list[dict], list[str]]:
    """(rows of the four kernels; what was wrong and is left out)."""
    tensors, mask = make_inputs(m, k, n, r, p, DTYPES[dtype], device)
    wide = in_torch(*(t.float() for t in tensors.values()), mask)
    providers = {"torch": in_torch(*tensors.values(), mask)}
    if device == "cuda":
        providers["triton"] = in_triton(*tensors.values(), p)
    elements = {"shrink": m * k, "expand": m * n, "factor_grads": m * n, "input_grads": 2 * m * k}
    cells = {"bench": "kernels", "in": k, "out": n, "parts": 1, "dtype": dtype, "p": p}
    cells |= {"tokens": m, "rank": r}
    rows, wrong = [], []
    for kernel in elements:
        if p > 0 and kernel in ("expand", "factor_grads"):
            continue  # dropout is no part of them
        want, steps = wide[kernel](), {}
        for provider, runs in providers.items():
            off = check(runs[kernel](), want, DTYPES[dtype])
            if off:
                wrong.append(f"{layer}, p = {p}, {m} tokens, r = {r}: {provider} {kernel}: {off}")
            else:
                steps[provider] = runs[kernel]
        del want
        size = elements[kernel] * DTYPES[dtype].itemsize
        roof = roofline(device, DTYPES[dtype])[0]
        for provider, times in paired_times(steps, rounds, device).items():
            rates = rate_cells(times, size, "gb_per_s", roof)
            named = {"layer": f"{layer} {kernel}", "provider": provider}
            named["pass"] = "forward" if kernel in ("shrink", "expand") else "backward"
            rows.append({**cells, **named, **time_cells(times), **rates})
    return rows, wrong


def dequantized_in_torch(parts: nf4.NF4, dtype: torch.dtype) -> Tensor:
    codes = torch.stack([parts.packed >> 4, parts.packed & 15], 1).int()
    values = nf4.levels(codes.device)[codes].view(-1, nf4.BLOCK) * nf4.scales(parts)[:, None]
    return values.view(-1).to(dtype)


def nf4_runs(weight: Tensor, device: str) -> dict[str, dict[str, Run]]:
    """{"quantize": {provider: run}, "dequantize": ...}, of the same codes."""
    layer = torch.nn.Linear(*weight.shape[::-1], bias=False, device="meta")
    layer.weight = torch.nn.Parameter(weight, requires_grad=False)
    quantized = lora.LinearNF4.from_module(layer)
    parts, flat = quantized.weight.parts, weight.view(-1)
    runs: dict[str, dict[str, Run]] = {
        "quantize": {"torch": lambda: nf4.quantize_blocks(flat.float())},
        "dequantize": {"torch": lambda: (dequantized_in_torch(parts, weight.dtype),)},
    }
    if device == "cuda":
        from lora.kernels.triton_nf4 import dequantize_blocks, quantize_blocks

        packed, out = torch.empty_like(parts.packed), torch.empty_like(flat)
        absmax = torch.empty(len(parts.absmax), device=device)

        def quantize() -> tuple[Tensor, Tensor]:
            quantize_blocks(flat, packed, absmax)
            return packed, absmax

        def dequantize() -> tuple[Tensor]:
            dequantize_blocks(parts, out)
            return (out,)

        runs["quantize"]["triton"], runs["dequantize"]["triton"] = quantize, dequantize
    if importlib.util.find_spec("bitsandbytes"):
        from bitsandbytes import functional

        held = baselines.linear4bit(quantized).weight

        def theirs() -> tuple[Tensor, Tensor]:
            codes, state = functional.quantize_4bit(weight, quant_type="nf4", blocksize=nf4.BLOCK)
            return codes.view(-1), state.absmax

        runs["quantize"]["bitsandbytes"] = theirs
        runs["dequantize"]["bitsandbytes"] = lambda: (
            functional.dequantize_4bit(held.data, held.quant_state).view(-1),
        )
    return runs


def bench_nf4(
    layer: str, k: int, n: int, dtype: str, device: str, rounds: int
) -> tuple[list[dict], list[str]]:
    """As `bench`, of a frozen weight (n, k)."""
    weight = torch.randn(n, k, dtype=DTYPES[dtype], device=device)
    dense, codes, blocks = weight.nbytes, n * k // 2, n * k // nf4.BLOCK
    sizes = {"quantize": dense + codes + 4 * blocks, "dequantize": dense + codes + blocks}
    roof = roofline(device, DTYPES[dtype])[0]
    cells = {"bench": "kernels nf4", "in": k, "out": n, "parts": 1, "dtype": dtype}
    rows, wrong = [], []
    for kernel, runs in nf4_runs(weight, device).items():
        wanted, steps = runs["torch"](), {}
        for provider, run in runs.items():
            off = "; ".join(filter(None, map(different, run(), wanted)))
            if off:
                wrong.append(f"{layer}: {provider} {kernel}: {off}")
            else:
                steps[provider] = run
        del wanted
        for provider, times in paired_times(steps, rounds, device).items():
            rates = rate_cells(times, sizes[kernel], "gb_per_s", roof)
            named = {"layer": f"{layer} {kernel}", "provider": provider, "pass": "forward"}
            rows.append({**cells, **named, **time_cells(times), **rates})
    return rows, wrong


def different(got: Tensor, want: Tensor) -> str:
    """Empty if all bits are the same."""
    count = int((got != want).sum())
    return f"{count} of {want.numel()} elements differ" if count else ""


def show(rows: list[dict]) -> None:
    for row in rows:
        setting = "".join(f"{row.get(name, ''):>{width}}" for name, width in SETTING.items())
        print(
            f"{row['layer']:26}{setting}  "
            f"{row['provider']:13}{row['ms_p50']:>10.4f} ms{row['gb_per_s']:>9.1f} GB/s, "
            f"{row['of_roofline']:.2f} of a copy"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--quick", action="store_true", help="two rounds, two ranks, 512 tokens")
    parser.add_argument("--tokens", nargs="+", type=int, help="512 to 65536")
    parser.add_argument("--ranks", nargs="+", type=int, help="8 to 128")
    parser.add_argument("--p", nargs="+", type=float, default=[0.0, 0.05])
    parser.add_argument("--dtype", choices=DTYPES, default="bf16")
    parser.add_argument("--shrink", type=int, default=1, help="divide all sizes, to try the script")
    parser.add_argument("--csv", type=Path, help="write the rows to this file")
    args = parser.parse_args()
    args.tokens = args.tokens or ([512] if args.quick else [8192, 512, 2048, 16384, 65536])
    args.ranks = args.ranks or ([16, 64] if args.quick else [16, 64, 8, 32, 128])
    rows, wrong = [], []
    rounds = 2 if args.quick else 10
    for layer, sizes in LAYERS.items():
        torch.manual_seed(0)
        k, n = (size // args.shrink for size in sizes)
        more, off = bench_nf4(layer, k, n, args.dtype, args.device, rounds)
        show(more)
        rows += more
        wrong += off
    settings = itertools.product(args.tokens, args.ranks, LAYERS.items(), args.p)
    for m, r, (layer, sizes), p in settings:
        torch.manual_seed(0)
        k, n = (size // args.shrink for size in sizes)
        more, off = bench(layer, m, k, n, r, p, args.dtype, args.device, rounds)
        show(more)
        rows += more
        wrong += off
        if args.csv:
            write_csv(args.csv, rows, args.device)
    if wrong:
        sys.exit("wrong, so not timed:\n" + "\n".join(wrong))


if __name__ == "__main__":
    main()
