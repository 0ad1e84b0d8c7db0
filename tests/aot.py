"""Compile the fused kernels ahead of time, for GPUs that are not here, and judge what comes out.

    python tests/aot.py          one launch of every kernel for sm_80, sm_90, sm_100 and gfx942
    python tests/aot.py --all    every config of every table, every flag, more targets

The launchers themselves are run, on tensors without memory, with a recorder in the place of the kernel:
so what is compiled are the real arguments, specialised as Triton does (divisible by 16, equal to 1).
A line a kernel: registers, spilled bytes, shared memory, matrix instruction. Exit status 1 if a kernel
spills, needs more shared memory than the target has, misses the matrix instruction that was meant, or
has one of the hazards of hazards.py.
"""

import argparse
import contextlib
import itertools
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from unittest import mock

import hazards
import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import KernelParam

from lora.kernels import (
    nf4,
    tiling,
    triton_expand,
    triton_factor_grads,
    triton_input_grads,
    triton_nf4,
    triton_shrink,
)
from lora.kernels.fused import FEW_TOKENS

MODULES = {
    "shrink_kernel": triton_shrink,
    "expand_kernel": triton_expand,
    "factor_grads_kernel": triton_factor_grads,
    "input_grads_kernel": triton_input_grads,
    "_sum_kernel": tiling,
    "quantize_kernel": triton_nf4,
    "dequantize_kernel": triton_nf4,
}
# Shared memory of one block, in bytes: CUDA C++ Programming Guide, table of technical specifications
# by compute capability; AMD: 64 KiB of LDS a workgroup (160 KiB from gfx950 on).
SHARED = {
    "sm_80": 166912,
    "sm_86": 101376,
    "sm_89": 101376,
    "sm_90": 232448,
    "sm_100": 232448,
    "sm_120": 101376,
    "gfx90a": 65536,
    "gfx942": 65536,
    "gfx950": 163840,
}
FEW = ("sm_80", "sm_90", "sm_100", "gfx942")
WIDE = {"sm_90": "wgmma", "sm_100": "tcgen05.mma"}  # with 64 rows and more
INSTRUCTIONS = (*WIDE.values(), "v_mfma", "mma.sync")
PROCESSORS = 132


class Recorder:
    """Stands for a kernel: keeps the arguments of its launches."""

    def __init__(self, kernel: triton.JITFunction) -> None:
        self.kernel, self.launches = kernel, []

    def __getitem__(self, grid: tuple[int, ...]):
        def launch(*args, **options):
            self.launches.append((self.kernel, args, options, grid))

        return launch


def record(arch: str, run) -> list[tuple]:
    """(kernel, positional arguments, keywords) of every launch that `run` makes on `arch`."""
    return [launch[:3] for launch in record_with_grids(arch, run)]


def record_with_grids(arch: str, run) -> list[tuple]:
    """As `record`, and the grid of each launch."""
    recorders: list[Recorder] = []

    def recorder(kernel: triton.JITFunction) -> Recorder:
        recorders.append(Recorder(kernel))
        return recorders[-1]

    with launchers_with(recorder, arch, PROCESSORS):
        run()
    return [launch for recorder in recorders for launch in recorder.launches]


@contextlib.contextmanager
def launchers_with(substitute, arch: str, processors: int):
    """Within the block every launcher has `substitute(kernel)` for its kernel, and this device."""
    with contextlib.ExitStack() as stack:
        for name, module in MODULES.items():
            changes = {name: substitute(getattr(module, name))}
            for hook, value in (("architecture", arch), ("processors", processors)):
                if hasattr(module, hook):
                    changes[hook] = lambda device, value=value: value
            stack.enter_context(mock.patch.multiple(module, **changes))
        yield


TYPES = {
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.float32: "*fp32",
    torch.int64: "*i64",
    torch.uint8: "*u8",
}


def source(kernel: triton.JITFunction, args: tuple, options: dict) -> tuple[ASTSource, dict]:
    """The kernel with these arguments, specialised as at a launch, and its compile options."""
    names, options = kernel.arg_names, dict(options)
    values = dict(zip(names, args, strict=False)) | {
        n: options.pop(n) for n in names if n in options
    }
    signature, constants, attributes = {}, {}, {}
    for place, name in enumerate(names):
        value = values[name]
        if isinstance(value, torch.Tensor):
            signature[name] = TYPES[value.dtype]
            if value.data_ptr() % 16 == 0:  # 0 without memory; torch aligns its own to 512 bytes
                attributes[(place,)] = [["tt.divisibility", 16]]
        elif isinstance(value, float):
            signature[name] = "fp32"
        elif isinstance(value, int) and not _is_constant(kernel.params[place], value):
            signature[name] = "i32" if abs(value) < 2**31 else "i64"
            if value % 16 == 0 and not kernel.params[place].do_not_specialize:
                attributes[(place,)] = [["tt.divisibility", 16]]
        else:
            signature[name], constants[(place,)] = "constexpr", value
    return ASTSource(kernel, signature, constants, attributes), options


def _is_constant(parameter: KernelParam, value: int) -> bool:
    return parameter.is_constexpr or (value == 1 and not parameter.do_not_specialize)


def target(arch: str) -> GPUTarget:
    if arch.startswith("sm_"):
        return GPUTarget("cuda", int(arch[3:]), 32)
    return GPUTarget("hip", arch, 64)


def cuobjdump(option: str, cubin: bytes) -> str:
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        Path(file.name).write_bytes(cubin)
        done = subprocess.run([tool, option, file.name], capture_output=True, text=True, check=True)
    return done.stdout


def sass(cubin: bytes) -> str:
    """The machine code of a binary for an NVIDIA GPU."""
    return cuobjdump("-sass", cubin)


def measure(compiled) -> dict[str, int | str]:
    """Registers, spilled bytes and shared memory, from the finished binary."""
    shared = compiled.metadata.shared
    if "cubin" in compiled.asm:
        cubin = compiled.asm["cubin"]
        usage = dict(re.findall(r"(\w+):(\d+)", cuobjdump("--dump-resource-usage", cubin)))
        spills = int(usage["LOCAL"]) + int(usage["STACK"])
        if spills and not re.search(r"\b(LDL|STL)\b", sass(cubin)):
            spills = 0  # reserved for the call of a division's slow path, and never touched
        return {"registers": int(usage["REG"]), "spills": spills, "shared": shared}
    usage = dict(re.findall(r"\.(\w+):\s+(\d+)", compiled.asm["amdgcn"]))
    spills = int(usage["vgpr_spill_count"])  # scalar registers spill into vector ones
    return {"registers": int(usage["vgpr_count"]), "spills": spills, "shared": shared}


def meant_instruction(arch: str, dtype: torch.dtype, options: dict) -> str:
    """The matrix instruction that a product of tiles is meant to use."""
    if arch.startswith("gfx"):
        return "v_mfma"
    if dtype == torch.float32 and options.get("PRECISION") != "tf32":
        return "none"
    wide = options.get("BLOCK_M", 0) >= 64 and options.get("NEED_DX", True)  # dA has R rows
    return WIDE.get(arch, "mma.sync") if wide else "mma.sync"


def passes(dtype, m, n, k, r, rows, p, factors=None, bias=False, needs=(True, True), tf32=False):
    """A function that launches everything of a layer's training step."""

    def meta(*shape, dtype=dtype):
        return torch.empty(shape, dtype=dtype, device="meta")

    R, enabled, few = r * len(rows), sum(stop - start for start, stop in rows), m <= FEW_TOKENS
    A, B = (meta(*shape, dtype=factors or dtype) for shape in ((R, k), (enabled, r)))
    x, dy, s = meta(m, k), meta(m, n), meta(m, R)
    seed, level = (meta(1, dtype=torch.int64), 3277) if p else (None, 0)

    def run() -> None:
        slabs = triton_shrink.shrink(x, A if few else A.to(dtype), seed, level)
        if len(slabs) > 1:
            tiling.sum_partials(slabs, meta(m, R))
        triton_expand.expand(dy, slabs, B, meta(n) if bias else None, 2.0, rows, add=few)
        triton_factor_grads.factor_grads(dy, s, B, 2.0, rows, *needs)
        triton_input_grads.input_grads(x, s, A, 2.0, seed, level, *needs)

    def run_in_tf32() -> None:
        torch.backends.cuda.matmul.fp32_precision = "tf32"
        run()
        torch.backends.cuda.matmul.fp32_precision = "ieee"

    return run_in_tf32 if tf32 else run


def quantised(dtype, n, nested=True, part=False):
    """A function that quantises a weight of n elements and dequantises it."""

    def meta(*shape, dtype=torch.float32):
        return torch.empty(shape, dtype=dtype, device="meta")

    blocks = -(-n // nf4.BLOCK)
    packed, weight = meta(-(-n // 2), dtype=torch.uint8), meta(n, dtype=dtype)
    codes = meta(blocks, dtype=torch.uint8 if nested else torch.float32)
    scales = (meta(-(-blocks // nf4.GROUP)), meta(1)) if nested else (None, None)
    first = meta(1, dtype=torch.int64) if part else None

    def run() -> None:
        triton_nf4.quantize_blocks(weight, packed, meta(blocks))
        triton_nf4.dequantize_blocks(nf4.NF4(packed, codes, *scales, first), weight)

    return run


QKV = ((0, 3072), (3072, 6144), (6144, 9216))


def cases(everything: bool):
    """(architecture, what a layer launches, label)."""
    bf16, fp16, fp32 = torch.bfloat16, torch.float16, torch.float32
    qkv, whole = (9216, 3072), ((0, 9216),)
    if not everything:
        for arch in FEW:
            yield arch, passes(bf16, 8192, *qkv, 16, QKV, 0.05), "qkv r=16"
            yield arch, quantised(bf16, 9216 * 3072), "NF4 of qkv"
        return
    ranks = ((bf16, (16, 32, 64, 128, 256)), (fp16, (16,)), (fp32, (16, 64)))
    layers = ((QKV, 0.05), (whole, 0.0))
    for arch, (dtype, rs), m, (rows, p) in itertools.product(SHARED, ranks, (16, 8192), layers):
        for r in rs:
            label = f"{str(dtype)[6:]} r={r} x {len(rows)}, M={m}, p={p}"
            yield arch, passes(dtype, m, *qkv, r, rows, p), label
    for arch, dtype in itertools.product(SHARED, (bf16, fp16, fp32)):
        yield arch, quantised(dtype, 9216 * 3072), f"NF4 of qkv, {dtype}"
        yield arch, quantised(dtype, 4097, part=True), f"NF4, odd, a part, {dtype}"
        yield arch, quantised(dtype, 4097, nested=False), f"NF4, odd, plain scales, {dtype}"
    for arch in SHARED:
        for m, r in ((16, 16), (16, 64), (8192, 16), (8192, 64)):
            label = f"fp32 factors, r={r} x 3, M={m}"
            yield arch, passes(bf16, m, *qkv, r, QKV, 0.05, factors=fp32), label
        for r in (8, 9):
            yield arch, passes(bf16, 8192, *qkv, r, QKV, 0.05), f"r={r} x 3"
        for r in (16, 64) if arch.startswith("sm_") else ():  # elsewhere TF32 is never asked for
            yield arch, passes(fp32, 8192, *qkv, r, whole, 0.05, tf32=True), f"TF32, r={r}"
        yield arch, passes(bf16, 8192, 9217, 3073, 9, ((1, 9217),), 0.05), "odd sizes, r=9"
        for needs in ((True, False), (False, True)):
            label = f"needs {needs}, bias"
            yield arch, passes(bf16, 8192, *qkv, 16, QKV[::2], 0.05, bias=True, needs=needs), label


def judge(arch: str, compiled, dtype: torch.dtype, options: dict) -> tuple[dict, list[str]]:
    """What a compiled kernel measures, and what is wrong with it."""
    found, wrong = measure(compiled), []
    if found["spills"]:
        wrong.append(f"spills {found['spills']} bytes")
    if found["shared"] > SHARED[arch]:
        wrong.append(f"shared memory {found['shared']} > {SHARED[arch]}")
    text = compiled.asm.get("ptx") or compiled.asm["amdgcn"]
    found["matrix"] = next((i for i in INSTRUCTIONS if i in text), "none")
    wrong += hazards.refilled_early(compiled.asm["ttgir"])
    if found["matrix"] == "wgmma":  # the only products whose operands stay in registers meanwhile
        wrong += hazards.written_in_flight(sass(compiled.asm["cubin"]))
    meant = meant_instruction(arch, dtype, options)
    if found["matrix"] not in (meant, WIDE.get(arch)) and "BLOCK_M" in options:
        wrong.append(f"uses {found['matrix']}, not {meant}")
    return found, wrong


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--all", action="store_true", help="every config, flag and target")
    parser.add_argument("--arch", help="this target alone")
    args = parser.parse_args()
    failures, seen = 0, set()
    for arch, run, label in cases(args.all):
        if args.arch not in (None, arch):
            continue
        for kernel, positional, options in record(arch, run):
            src, compile_options = source(kernel, positional, options)
            key = (arch, src.hash(), str(sorted(options.items(), key=str)))
            if key in seen:
                continue
            seen.add(key)
            compiled = triton.compile(src, target=target(arch), options=compile_options)
            dtype = next(t.dtype for t in positional if isinstance(t, torch.Tensor))
            found, wrong = judge(arch, compiled, dtype, options)
            failures += bool(wrong)
            shown = " ".join(f"{name} {value:>6}" for name, value in found.items())
            print(
                f"{arch:7} {kernel.__name__:20} {label:34} {shown} {'; '.join(wrong)}", flush=True
            )
    print(f"{len(seen)} kernels compiled, {failures} failed")
    sys.exit(failures > 0)


if __name__ == "__main__":
    main()
