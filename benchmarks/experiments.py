"""Four questions on which the design of the fused layer rests, each answered by its own rows.

    beta        Is the read of C in C += A B hidden behind the product? mm into y against addmm_ on y,
                y = x Wᵀ (forward) and dX = dY W (backward); over_frozen is the ratio to mm.
    bandwidth   What share of a copy's bandwidth does each fused kernel reach? (bench_kernels)
    philox      What does a mask cost beside reading x? From no mask to 16 elements a Philox call.
    extended    Does y = [x|S] [W|αB]ᵀ as one Triton GEMM beat writing α S Bᵀ and then addmm_(x, Wᵀ)?
                The provider "prefill" is the latter: an extended GEMM pays where it is below it.

The last two are Triton kernels; without a GPU they say so and write nothing.

    python benchmarks/experiments.py --device cuda [--only beta philox] [--out DIR]
"""

import argparse
import functools
import itertools
import sys
from pathlib import Path

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from bench_kernels import bench
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

ROUNDS = 10


def dtype_on(device: str) -> str:
    """bf16, but on a CPU, where many have no fast products of it and nothing is learnt from them."""
    return "bf16" if device == "cuda" else "fp32"


def beta(device: str, shrink: int) -> list[dict]:
    name, rows = dtype_on(device), []
    dtype = DTYPES[name]
    for m, (layer, sizes) in itertools.product((2048, 8192, 16384), LAYERS.items()):
        m, k, n = (size // shrink for size in (m, *sizes))
        x, dy, w = (
            torch.randn(size, dtype=dtype, device=device) for size in ((m, k), (m, n), (n, k))
        )
        for kind, (a, b) in {"forward": (x, w.t()), "backward": (dy, w)}.items():
            zero, one = (a.new_zeros(m, b.shape[1]) for _ in range(2))
            steps = {
                "beta=0": functools.partial(torch.mm, a, b, out=zero),
                "beta=1": functools.partial(one.addmm_, a, b),
            }
            want = a.float() @ b.float()
            wrong = [off for step in steps.values() if (off := off_by(step(), want))]
            if wrong:
                sys.exit(f"{layer}, {kind}, {m} tokens: {wrong}")
            times = paired_times(steps, ROUNDS, device)
            for provider in steps:
                row = {"bench": "beta", "layer": layer, "in": k, "out": n, "dtype": name}
                row |= {"tokens": m, "pass": kind, "provider": provider}
                row |= time_cells(times[provider], times["beta=0"])
                roof = roofline(device, dtype)[1]
                rows.append(row | rate_cells(times[provider], 2 * m * k * n, "tflop_per_s", roof))
    return rows


def bandwidth(device: str, shrink: int) -> list[dict]:
    rows = []
    for (layer, sizes), p in itertools.product(LAYERS.items(), (0.0, 0.05)):
        k, n = (size // shrink for size in sizes)
        more, wrong = bench(layer, 8192 // shrink, k, n, 16, p, dtype_on(device), device, ROUNDS)
        if wrong:
            sys.exit("\n".join(wrong))
        rows += [{**row, "bench": "bandwidth"} for row in more]
    return rows


@triton.jit
def _keep(
    seed,
    level,
    rows,
    column,
    K,
    PER_CALL: tl.constexpr,
    BITS: tl.constexpr,
    ROUNDS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """The mask of a tile from PER_CALL numbers of BITS bits a Philox call; 1 is `tl.rand`'s call."""
    calls = column // PER_CALL + tl.arange(0, BLOCK_K // PER_CALL)
    offsets = rows[:, None] * (K // PER_CALL) + calls[None, :]
    if PER_CALL == 1:
        lanes = tl.randint(seed, offsets, n_rounds=ROUNDS)
    else:
        w0, w1, w2, w3 = tl.randint4x(seed, offsets, n_rounds=ROUNDS)
        lanes = tl.join(tl.join(w0, w2), tl.join(w1, w3))
        if PER_CALL >= 8:
            lanes = tl.join(lanes, lanes >> 16)
        if PER_CALL == 16:
            lanes = tl.join(lanes, lanes >> 8)
        lanes = tl.reshape(lanes, (BLOCK_M, BLOCK_K))
    return (lanes & ((1 << BITS) - 1)).to(tl.int32) >= level


@triton.jit
def masked_row_sums(
    x_ptr,
    sums_ptr,
    seed,
    level,
    K,
    PER_CALL: tl.constexpr,
    BITS: tl.constexpr,
    ROUNDS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Σ m ∘ x along the rows: a pass over x whose arithmetic is the mask's. Whole tiles alone."""
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    total = tl.zeros((BLOCK_M,), tl.float32)
    for k in range(0, K, BLOCK_K):
        x = tl.load(x_ptr + rows.to(tl.int64)[:, None] * K + k + tl.arange(0, BLOCK_K)[None, :])
        if PER_CALL > 0:
            kept = _keep(seed, level, rows, k, K, PER_CALL, BITS, ROUNDS, BLOCK_M, BLOCK_K)
            x = tl.where(kept, x, 0.0)
        total += tl.sum(x.to(tl.float32), 1)
    tl.store(sums_ptr + rows, total)


MASKS = {  # name: (elements a Philox call, bits of each, rounds)
    "no mask": (0, 0, 0),
    "rand, 1 a call, 10 rounds": (1, 31, 10),
    "randint4x, 4 a call, 10 rounds": (4, 31, 10),
    "randint4x, 4 a call, 7 rounds": (4, 31, 7),
    "16-bit lanes, 8 a call, 7 rounds": (8, 16, 7),
    "8-bit lanes, 16 a call, 7 rounds": (16, 8, 7),
}


def row_sums(x: Tensor, p: float, mask: str) -> Tensor:
    (m, k), sums = x.shape, x.new_empty(x.shape[0], dtype=torch.float32)
    per_call, bits, rounds = MASKS[mask]
    options = {"PER_CALL": per_call, "BITS": bits, "ROUNDS": rounds, "BLOCK_M": 16, "BLOCK_K": 128}
    masked_row_sums[(m // 16,)](
        x, sums, 7, round(p * 2**bits), k, **options, num_warps=4, enable_fp_fusion=True
    )
    return sums


def philox(device: str, shrink: int) -> list[dict]:
    m, k, p, rows = 8192 // shrink, 3072 // shrink, 0.05, []
    x = torch.ones(m, k, dtype=torch.bfloat16, device=device)
    for mask in MASKS:  # of ones the sums count what is kept
        share = float(row_sums(x, p, mask).mean()) / k
        if abs(share - (1 if mask == "no mask" else 1 - p)) > 5e-3:  # 8 bits resolve p to 4e-3
            sys.exit(f"{mask}: keeps {share}")
    steps = {mask: functools.partial(row_sums, x, p, mask) for mask in MASKS}
    for mask, times in paired_times(steps, ROUNDS, device).items():
        row = {"bench": "philox", "layer": "row sums", "in": k, "dtype": "bf16", "tokens": m}
        row |= {"p": 0.0 if mask == "no mask" else p, "provider": mask, **time_cells(times)}
        roof = roofline(device, x.dtype)[0]
        rows.append(row | rate_cells(times, x.numel() * x.element_size(), "gb_per_s", roof))
    return rows


@triton.jit
def _load(source, row, column, width, TMA: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    if TMA:
        tile = source.load([row, column])
    else:
        rows = (row + tl.arange(0, ROWS)).to(tl.int64)[:, None]
        tile = tl.load(source + rows * width + column + tl.arange(0, COLUMNS)[None, :])
    return tile


@triton.jit
def extended_gemm(
    x,
    s,
    w,
    b,
    y,
    M,
    N,
    K,
    R: tl.constexpr,
    TMA: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr,
    PROGRAMS: tl.constexpr,
):
    """y = S bᵀ + x Wᵀ, persistent; x, s, w, b, y are pointers or tensor descriptors. Whole tiles
    alone. GROUP rows of tiles are walked together, so that their x stays in the L2 cache."""
    across = tl.cdiv(N, BLOCK_N)
    tiles = tl.cdiv(M, BLOCK_M) * across
    for tile in tl.range(tl.program_id(0), tiles, PROGRAMS, flatten=TMA):
        first = tile // (GROUP * across) * GROUP
        height = min(tl.cdiv(M, BLOCK_M) - first, GROUP)
        row = (first + tile % (GROUP * across) % height) * BLOCK_M
        column = tile % (GROUP * across) // height * BLOCK_N
        s_tile = _load(s, row, 0, R, TMA, BLOCK_M, R)
        total = tl.dot(s_tile, _load(b, column, 0, R, TMA, BLOCK_N, R).T)
        for k in range(0, K, BLOCK_K):
            x_tile = _load(x, row, k, K, TMA, BLOCK_M, BLOCK_K)
            total = tl.dot(x_tile, _load(w, column, k, K, TMA, BLOCK_N, BLOCK_K).T, total)
        if TMA:
            y.store([row, column], total.to(y.dtype))
        else:
            rows = (row + tl.arange(0, BLOCK_M)).to(tl.int64)[:, None]
            to = y + rows * N + column + tl.arange(0, BLOCK_N)[None, :]
            tl.store(to, total.to(y.dtype.element_ty))


TILES = (  # (BLOCK_M, BLOCK_N, BLOCK_K, warps, stages)
    (128, 256, 64, 8, 3),
    (128, 256, 64, 8, 4),
    (128, 128, 64, 8, 4),
    (256, 128, 64, 8, 3),
)


def extend(
    x: Tensor, s: Tensor, w: Tensor, b: Tensor, tma: bool, tile: tuple[int, ...], programs: int
) -> Tensor:
    (m, k), n, r = x.shape, w.shape[0], s.shape[1]
    bm, bn, bk, warps, stages = tile
    y = x.new_empty(m, n)
    operands = (x, s, w, b, y)
    if tma:
        blocks = ([bm, bk], [bm, r], [bn, bk], [bn, r], [bm, bn])
        operands = [
            TensorDescriptor.from_tensor(t, block)
            for t, block in zip(operands, blocks, strict=True)
        ]
    blocks = {"BLOCK_M": bm, "BLOCK_N": bn, "BLOCK_K": bk, "GROUP": 8, "PROGRAMS": programs}
    launch = {"num_warps": warps, "num_stages": stages, "enable_fp_fusion": True}
    extended_gemm[(programs,)](*operands, m, n, k, R=r, TMA=tma, **blocks, **launch)
    return y


def extended_steps(x: Tensor, s: Tensor, w: Tensor, b: Tensor) -> dict:
    """cuBLAS without the update, prefill and addmm_, and every extended GEMM that fits the GPU."""
    from lora.kernels.triton_expand import expand

    y, want = x.new_empty(x.shape[0], w.shape[0]), x.float() @ w.float().t()

    def prefill() -> Tensor:
        expand(y, s[None], b, None, 1.0, ((0, w.shape[0]),), add=False)
        return y.addmm_(x, w.t())

    steps = {"cublas, no update": functools.partial(torch.mm, x, w.t()), "prefill": prefill}
    programs = torch.cuda.get_device_properties(x.device).multi_processor_count
    for tma, tile in itertools.product((False, True), TILES):
        name = (
            f"{'tma' if tma else 'pointers'} {'x'.join(map(str, tile[:3]))} {tile[3]}w {tile[4]}s"
        )
        steps[name] = functools.partial(extend, x, s, w, b, tma, tile, programs)
    for name, step in list(steps.items()):
        try:
            off = off_by(
                step(), want if name.startswith("cublas") else want + s.float() @ b.float().t()
            )
        except triton.runtime.errors.OutOfResources as error:
            print(f"{name}: {error}")
            del steps[name]
            continue
        if off:
            sys.exit(f"{name}: {off}")
    return steps


def extended(device: str, shrink: int) -> list[dict]:
    m, r, rows = 8192 // shrink, 16, []
    for layer, (k, n) in LAYERS.items():
        sizes = ((m, k), (m, r), (n, k), (n, r))
        tensors = [torch.randn(size, dtype=DTYPES["bf16"], device=device) for size in sizes]
        times = paired_times(extended_steps(*tensors), ROUNDS, device)
        for provider, mine in times.items():
            row = {"bench": "extended", "layer": layer, "in": k, "out": n, "dtype": "bf16"}
            row |= {"tokens": m, "rank": r, "pass": "forward", "provider": provider}
            row |= time_cells(mine, times["cublas, no update"])
            roof = roofline(device, DTYPES["bf16"])[1]
            rows.append(row | rate_cells(mine, 2 * m * k * n, "tflop_per_s", roof))
    return rows


EXPERIMENTS = {"beta": beta, "bandwidth": bandwidth, "philox": philox, "extended": extended}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", choices=EXPERIMENTS, default=list(EXPERIMENTS))
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--shrink", type=int, default=1, help="divide all sizes, to try the script")
    parser.add_argument("--out", type=Path, help="folder for the rows, one file an experiment")
    args = parser.parse_args()
    for name in args.only:
        if args.device == "cpu" and name in ("philox", "extended"):
            print(f"{name}: needs a GPU, nothing measured")
            continue
        rows = EXPERIMENTS[name](args.device, args.shrink)
        for row in rows:
            ratio = f"{row['over_frozen']:.3f}" if "over_frozen" in row else ""
            print(
                f"{name:10}{row['layer']:26}{row['tokens']:>7}  {row.get('pass', ''):9}"
                f"{row['provider']:34}{row['ms_p50']:>10.4f} ms {ratio:>7}"
                f"  {row['of_roofline']:.2f} of the roofline"
            )
        if args.out:
            write_csv(args.out / f"{name}_{args.device}.csv", rows, args.device)


if __name__ == "__main__":
    main()
