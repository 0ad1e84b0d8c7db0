"""Run the compiled kernels without a GPU: the launchers' own PTX, in the emulator of tests/ptx.

    python tests/emulate.py          every config once in bf16, copies early and late (some minutes)
    python tests/emulate.py --all    every config in bf16, fp16, fp32 and with fp32 factors, and NF4

A case is a training step through `lora_linear`, forward and backward, judged as in the interpreter and
on a GPU (kernel_oracle.py); NF4 must equal PyTorch bit for bit. Every tensor that a launcher makes is
filled with NaN first. A broken rule of PTX is a failure too, whatever the result. Triton 3.6.0 and
3.7.0 leave out the proxy fence between cp.async and wgmma, in a plain `tl.dot` as here (triton #9610):
there it is expected, counted, and no failure.

Exit status 1 if a case fails, or if a config of the tables was not run.
"""

import argparse
import itertools
import sys
import time
from collections.abc import Iterator
from typing import NamedTuple

import aot
import torch
import triton
from kernel_oracle import Case, error_over_allowed, problem, step
from ptx.launch import Run, emulated

from lora.kernels import nf4, triton_nf4

LACK_PROXY_FENCE = ("3.6.0", "3.7.0")
ARCHITECTURES = ("sm_80", "sm_90")
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
EVERY_DTYPE = ((BF16, BF16), (FP16, FP16), (FP32, FP32), (BF16, FP32))

# Long enough that a program passes its loop more often than it has stages, in tiles of every size that
# the ranks bring; strides that are multiples of 16, unless "odd" forbids wide loads.
CASES = {
    "rank 16": Case((392,), 512, (640,), (True,), 16, 0.05, True),
    "rank 16 of each of three": Case(
        (392,), 512, (256, 64, 128), (True, True, True), 16, 0.05, False
    ),
    "rank 32": Case((328,), 512, (512,), (True,), 32, 0.0, False),
    "rank 64": Case((328,), 512, (512,), (True,), 64, 0.1, False),
    "rank 128": Case((264,), 256, (256,), (True,), 128, 0.1, False),
    "rank over two blocks": Case((136,), 256, (96, 96), (True, True), 100, 0.1, False),
    "one token": Case((1,), 256, (256,), (True,), 16, 0.2, True),
    "few tokens": Case((2, 9), 528, (128, 64), (True, True), 8, 0.3, True),
    "odd": Case((67,), 41, (19, 7, 30), (True, False, True), 3, 0.3, True),
    "odd, rank 100": Case((67,), 41, (33,), (True,), 100, 0.3, False),
}
IN_FP32 = dict.fromkeys(("odd", "rank 32"), ((FP32, FP32),))  # whose configs have no other dtype
NF4_SIZES = (1, 63, 64, 65, 2049, 4096 * 3, 20_001)


class Outcome(NamedTuple):
    label: str
    verdict: str  # empty: it passes
    detail: str
    run: Run


def training_step(arch: str, copies: str, name: str, dtype, factors) -> Outcome:
    torch.manual_seed(0)
    case = CASES[name]
    tensors, options = problem(case, dtype, factors)
    grad = torch.randn(*case.tokens, sum(case.splits)).to(dtype)
    torch.use_deterministic_algorithms(True)  # fills new tensors with NaN
    try:
        with emulated(arch, copies) as run:
            got = step(tensors, grad, options, "triton")
    finally:
        torch.use_deterministic_algorithms(False)
    ratio = error_over_allowed(tensors, grad, options, got)
    label = f"{name}, {str(dtype)[6:]}" + (", fp32 factors" if factors != dtype else "")
    wrong = [f"error {ratio:.1f} times what is allowed"] if not ratio <= 1 else []
    return Outcome(label, "; ".join(wrong + broken(run)), f"error / allowed {ratio:.3f}", run)


def quantisation(arch: str, copies: str, n: int, dtype) -> Outcome:
    """Codes, scales and elements of n weights, nested, as a part of a larger weight, and plain."""
    torch.manual_seed(n)
    weight = torch.randn(n) * 0.02
    weight[: n // 3 // 64 * 64] = 0
    weight = weight.to(dtype)
    codes, absmax = nf4.quantize_blocks(weight.float())
    whole, wrong = n // nf4.BLOCK, []
    got_codes = torch.full_like(codes, 77)
    got_absmax = torch.full_like(absmax, torch.nan)
    parts = nf4.quantize(weight)
    half = parts.absmax.numel() // 2
    first = torch.tensor([half])
    later = parts._replace(
        packed=parts.packed[half * 32 :], absmax=parts.absmax[half:], first=first
    )
    plain = nf4.NF4(parts.packed, nf4.scales(parts), None, None)
    with emulated(arch, copies) as run:
        triton_nf4.quantize_blocks(weight, got_codes, got_absmax)
        if not torch.equal(got_codes[: 32 * whole], codes[: 32 * whole]):
            wrong.append("codes differ")
        if not torch.equal(got_absmax[:whole], absmax[:whole]):
            wrong.append("absmax differs")
        if not bool((got_codes[32 * whole :] == 77).all()):
            wrong.append("more than the whole blocks is written")
        for kind, of, size in (
            ("nested", parts, n),
            ("part", later, n - 64 * half),
            ("plain", plain, n),
        ):
            got = torch.full((size,), torch.nan, dtype=dtype)
            triton_nf4.dequantize_blocks(of, got)
            if not torch.equal(got, nf4.dequantize(of, torch.empty_like(got))):
                wrong.append(f"{kind}: elements differ")
    return Outcome(
        f"NF4 of {n}, {str(dtype)[6:]}", "; ".join(wrong + broken(run)), "bit-equal", run
    )


def broken(run: Run) -> list[str]:
    """The rules of PTX that were broken, beside the one that a version of Triton is known to break."""
    expected = {"proxy fence"} if triton.__version__ in LACK_PROXY_FENCE else set()
    return [
        f"{kernel}: {rule}, {what} ({count} times, {where})"
        for (kernel, rule, what, where), count in run.found.items()
        if rule not in expected
    ]


def outcomes(architectures, everything: bool, only: str) -> Iterator[tuple[str, str, Outcome]]:
    for arch, copies in itertools.product(architectures, ("early", "late")):
        for name in CASES:
            dtypes = EVERY_DTYPE if everything else ((BF16, BF16), *IN_FP32.get(name, ()))
            for dtype, factors in dtypes if only in name else ():
                yield arch, copies, training_step(arch, copies, name, dtype, factors)
        if copies == "late":
            continue  # the NF4 kernels copy nothing asynchronously
        for n in NF4_SIZES if everything else NF4_SIZES[-3:]:
            for dtype in (BF16, FP16, FP32) if everything else (BF16,):
                if only in "NF4":
                    yield arch, copies, quantisation(arch, copies, n, dtype)


def shipped(architectures) -> set[tuple[str, str, int]]:
    """(kernel, table, rank) of every config that one of the architectures can take."""
    tables = (*architectures, "default", "fp32")
    return {
        (kernel, table, rank)
        for kernel, module in aot.MODULES.items()
        for table in tables
        for rank in getattr(module, "CONFIGS", {}).get(table, ())
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--all", action="store_true", help="every dtype and size")
    parser.add_argument("--arch", choices=ARCHITECTURES, help="this one alone")
    parser.add_argument("--case", default="", help="only cases whose names contain this")
    args = parser.parse_args()
    torch.set_num_threads(1)
    architectures = (args.arch,) if args.arch else ARCHITECTURES
    total, failures, expected, begun = 0, 0, 0, time.monotonic()
    run_configs: set[tuple[str, str, int]] = set()
    blocks = 0
    for arch, copies, outcome in outcomes(architectures, args.all, args.case):
        total += 1
        failures += bool(outcome.verdict)
        run_configs |= outcome.run.configs
        blocks += sum(outcome.run.programs.values())
        expected += sum(
            n for (_, rule, *_), n in outcome.run.found.items() if rule == "proxy fence"
        )
        print(
            f"{arch} {copies:5} {outcome.label:45} {outcome.verdict or outcome.detail}", flush=True
        )
    missing = shipped(architectures) - run_configs
    print(
        f"Triton {triton.__version__}: {total} cases, {blocks} thread blocks, {failures} failed; "
        f"{len(run_configs)} of {len(run_configs | missing)} configs; {time.monotonic() - begun:.0f} s"
    )
    if triton.__version__ in LACK_PROXY_FENCE:
        print(f"{expected} reads by wgmma without a proxy fence, as expected of this version")
    if missing and not args.case:
        print("not run: " + ", ".join(f"{k} {t} {r}" for k, t, r in sorted(missing)))
    return 1 if failures or (missing and not args.case) else 0


if __name__ == "__main__":
    sys.exit(main())
