"""What the compiled kernels should take on an H100 or H200. **A model of the binaries, not measured.**

    python benchmarks/kernel_model.py [--layer qkv_proj] [--tokens 8192] [--rank 16] [--dropout 0.05]

Every launch of a layer's forward and backward is compiled for sm_90 from its launcher's arguments. Read
off the binary: registers and shared memory, hence the programs that a processor holds, and the cycles
of the main loop: those of the busiest of a scheduler's units, or of issuing, one instruction a cycle.

    memory = bytes of the algebra / copy bandwidth      issue = programs · cycles / (processors · clock)
    time = 2 µs + waves · (max(memory, issue) if the next tile loads meanwhile, else their sum)

where waves is the number of rounds, rounded up, over the exact one. The next tile loads meanwhile if a
processor has several programs, or the loop waits for all copies but the latest. What a GPU does beside
(caches, bank conflicts, the order of instructions) is left out: take it for ± 25 %, to compare configs.
"""

import argparse
import math
import re
import sys
from pathlib import Path
from typing import NamedTuple

import torch
import triton

sys.path.append(str(Path(__file__).resolve().parent.parent / "tests"))
import aot
import hazards

from harness import PHI_3_MINI

PROCESSORS, CLOCK, LAUNCH = 132, 1.755e9, 2e-6
# bytes/s of a large copy, bytes read and written, and dense bf16 FLOP/s of a large GEMM
GPUS = {"H100": (3.0e12, 700e12), "H200": (4.3e12, 790e12)}
REGISTERS, SHARED, WARPS, PROGRAMS = 65536, 228 * 1024, 64, 32  # of a processor
# A scheduler's units, the instructions they run, and the cycles of one for a warp.
UNITS = {
    "integers": (
        (re.compile(r"(LOP3|IADD3|SHF|PRMT|ISETP|SEL|FSEL|LEA|VIADD|I2F|F2F|POPC|PLOP3)"), 2),
    ),
    "products": (
        (re.compile(r"IMAD\.(WIDE|HI)"), 4),
        (re.compile(r"IMAD"), 2),
        (re.compile(r"F"), 1),
    ),
    "memory": ((re.compile(r"(LD|ST)S.*\.128|LDSM"), 4), (re.compile(r"(LD|ST|RED)"), 2)),
    "tensors": ((re.compile(r"HMMA"), 6), (re.compile(r"HGMMA"), 16)),
}


class Launch(NamedTuple):
    kernel: str
    grid: tuple[int, ...]
    arguments: dict
    options: dict
    compiled: object


class Prediction(NamedTuple):
    kernel: str
    programs: int
    a_processor: int  # programs that it holds at once
    registers: int
    barriers: int  # in the main loop
    instructions: float  # a thread and element of the tensor that the kernel streams
    waves: float
    seconds: float
    of_copy: float


def launches(
    layer: str, tokens: int, rank: int, dropout: float, dtype: torch.dtype
) -> list[Launch]:
    k, sizes = PHI_3_MINI[layer]
    stops = [sum(sizes[: i + 1]) for i in range(len(sizes))]
    rows = tuple((stop - size, stop) for size, stop in zip(sizes, stops, strict=True))
    step = aot.passes(dtype, tokens, sum(sizes), k, rank, rows, dropout)
    found = []
    for kernel, given, options, grid in aot.record_with_grids("sm_90", step):
        source, compile_options = aot.source(kernel, given, options)
        compiled = triton.compile(source, target=aot.target("sm_90"), options=compile_options)
        arguments = dict(zip(kernel.arg_names, given, strict=False)) | options
        found.append(Launch(kernel.__name__, grid, arguments, options, compiled))
    return found


def main_loop(sass: str) -> tuple[list[str], list[str]]:
    """(instructions of the longest loop, all others)"""
    code = hazards.instructions(sass)
    ends = ((start, branch + 1) for branch, start in hazards.loops(code) if start < branch)
    start, stop = max(ends, key=lambda loop: loop[1] - loop[0], default=(0, 0))
    code = [re.sub(r"^@!?\w+\s+", "", text) for text in code]
    return code[start:stop], code[:start] + code[stop:]


def cycles(code: list[str]) -> int:
    """Of one warp's instructions, on the busiest unit."""
    busy = dict.fromkeys(UNITS, 0)
    for text in code:
        for unit, instructions in UNITS.items():
            busy[unit] += next((n for what, n in instructions if what.match(text)), 0)
    return max(len(code), *busy.values())


def streamed(launch: Launch) -> tuple[int, int, int]:
    """(bytes of the algebra, elements of the streamed tensor, passes of a program's main loop)"""
    a, kernel = launch.arguments, launch.kernel
    m, size = a.get("M", 0), 2
    if kernel == "shrink_kernel":
        return m * a["K"] * size, m * a["K"], math.ceil(a["k_chunk"] / a["BLOCK_K"])
    if kernel == "expand_kernel":
        return m * a["N"] * size, m * a["N"], 1
    passes = math.ceil(a["m_chunk"] / a["BLOCK_M"]) if "m_chunk" in a else 1
    if kernel == "factor_grads_kernel":
        columns = sum(stop - start for start, stop, *_ in a["SEGMENTS"])
        return m * columns * size, m * columns, passes
    if kernel == "input_grads_kernel":
        return (a["NEED_DA"] + a["NEED_DX"]) * m * a["K"] * size, m * a["K"], passes
    slabs = a["slabs_ptr"]
    return slabs.numel() * 4, slabs.numel(), max(slabs.shape[0] // len(a["FIRSTS"]), 1)


def predict(launch: Launch, bandwidth: float) -> Prediction:
    found, options = aot.measure(launch.compiled), launch.options
    warps = options["num_warps"]
    body, rest = main_loop(aot.sass(launch.compiled.asm["cubin"]))
    moved, elements, passes = streamed(launch)
    a_processor = min(
        REGISTERS // (math.ceil(found["registers"] / 8) * 8 * 32 * warps),
        SHARED // (found["shared"] + 1024),
        WARPS // warps,
        PROGRAMS,
    )
    programs = math.prod(launch.grid)
    exact = programs / (PROCESSORS * a_processor)
    waves = math.ceil(exact) / exact if exact > 1 else 1.0
    busy = min(programs, PROCESSORS * a_processor) / PROCESSORS  # a processor with less waits more
    issue = programs * warps / 4 * (passes * cycles(body) + cycles(rest)) / (PROCESSORS * CLOCK)
    issue *= max(1.0, 1 / busy)
    memory = moved / bandwidth
    waits = [int(n, 16) for n in re.findall(r"DEPBAR\.LE SB0, 0x(\w+)", "\n".join(body))]
    ahead = a_processor > 1 or (bool(waits) and min(waits) > 0)
    seconds = LAUNCH + waves * (max(memory, issue) if ahead else memory + issue)
    threads = programs * warps * 32
    return Prediction(
        launch.kernel.removesuffix("_kernel").strip("_"),
        programs,
        a_processor,
        found["registers"],
        sum(text.startswith("BAR") for text in body),
        passes * len(body) * threads / elements,
        waves,
        seconds,
        memory / seconds,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--layer", choices=PHI_3_MINI, help="this one alone")
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--dropout", type=float, default=0.05)
    parser.add_argument("--gpu", choices=GPUS, default="H200")
    args = parser.parse_args()
    bandwidth, flops = GPUS[args.gpu]
    print(
        f"modelled for an {args.gpu}: Triton {triton.__version__}, {args.tokens} tokens, "
        f"r = {args.rank}, p = {args.dropout}, bf16\n\n"
        "| layer | kernel | programs | a processor | registers | barriers | instructions an element "
        "| waves | µs | of a copy |\n|---|---|---|---|---|---|---|---|---|---|"
    )
    spent = frozen = 0.0
    for layer in [args.layer] if args.layer else PHI_3_MINI:
        k, sizes = PHI_3_MINI[layer]
        own = 0.0
        for launch in launches(layer, args.tokens, args.rank, args.dropout, torch.bfloat16):
            p = predict(launch, bandwidth)
            own += p.seconds
            print(
                f"| {layer} | {p.kernel} | {p.programs} | {p.a_processor} | {p.registers} | "
                f"{p.barriers} | {p.instructions:.1f} | {p.waves:.2f} | {1e6 * p.seconds:.0f} | "
                f"{p.of_copy:.0%} |",
                flush=True,
            )
        gemms = 4 * args.tokens * k * sum(sizes) / flops
        print(f"| {layer} | all, over the frozen |||||||{1e6 * own:.0f} | {1 + own / gemms:.2f} |")
        spent, frozen = spent + own, frozen + gemms
    print(f"\nForward and backward over the frozen layers' GEMMs: {1 + spent / frozen:.3f}")


if __name__ == "__main__":
    main()
