"""Each fused kernel alone, against the bytes it has to move and the bandwidth of a large copy.

    shrink        S = (m ∘ x) Aᵀ                             reads x            M K elements
    expand        y = α S Bᵀ                                 writes y           M N
    factor_grads  dS = dY B, dB = α dYᵀ S                    reads dY           M N
    input_grads   dX = α m ∘ (dS A), dA = α dSᵀ (m ∘ x)      reads x, writes dX  2 M K

GB/s are those bytes over the time; what else a kernel moves (factors, S, slabs) is its own loss. The
provider "torch" is the same formula in PyTorch's operations, with the mask drawn beforehand. A CPU has
that alone: there Triton has an interpreter, which is never timed.

    python benchmarks/bench_kernels.py --device cuda [--csv FILE]
"""

import argparse
import itertools
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from lora.kernels.dropout import drop_level, keep, seeded_keep_bits

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


def show(rows: list[dict]) -> None:
    for row in rows:
        print(
            f"{row['layer']:26}{row['tokens']:>7}{row['rank']:>5}{row['p']:>6}  "
            f"{row['provider']:8}{row['ms_p50']:>10.4f} ms{row['gb_per_s']:>9.0f} GB/s, "
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
    settings = itertools.product(args.tokens, args.ranks, LAYERS.items(), args.p)
    for m, r, (layer, sizes), p in settings:
        torch.manual_seed(0)
        k, n = (size // args.shrink for size in sizes)
        rounds = 2 if args.quick else 10
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
