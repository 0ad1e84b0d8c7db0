"""The fused kernels without a GPU: compiled for four of them by aot.py, in its own process."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import hazards
import pytest

KERNELS = {"shrink_kernel", "expand_kernel", "factor_grads_kernel", "input_grads_kernel"}
KERNELS |= {"quantize_kernel", "dequantize_kernel"}


@pytest.mark.skipif(not importlib.util.find_spec("triton"), reason="Triton is for Linux alone")
def test_every_kernel_compiles_for_every_kind_of_gpu_within_its_limits(tmp_path):
    done = subprocess.run(
        [sys.executable, Path(__file__).with_name("aot.py")],
        env={**os.environ, "TRITON_CACHE_DIR": str(tmp_path), "TRITON_INTERPRET": "0"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    lines = [line.split() for line in done.stdout.splitlines()[:-1]]
    targets = {"sm_80", "sm_90", "sm_100", "gfx942"}
    assert {(arch, kernel) for arch, kernel, *_ in lines} >= {
        (arch, kernel) for arch in targets for kernel in KERNELS
    }


# Two buffers, filled two iterations ahead. The copy into the buffer of this iteration must come after
# the last read of it.
LOOP = """
    %c1_i32 = arith.constant 1 : i32
    %c0_i32 = arith.constant 0 : i32
    %c2_i32 = arith.constant 2 : i32
    %c-1_i32 = arith.constant -1 : i32
    %buffer = ttg.local_alloc : () -> !ttg.memdesc<2x64x16xbf16, #shared, #smem, mutable>
    %sum = scf.for %i = %first to %last step %step iter_args(%at = %c-1_i32) -> (i32) : i32 {
      %more = arith.addi %at, %c1_i32 : i32
      %round = arith.cmpi sge, %more, %c2_i32 : i32
      %next = arith.select %round, %c0_i32, %more : i32
      %view = ttg.memdesc_index %buffer[%next] : !ttg.memdesc<2x64x16xbf16> -> !ttg.memdesc<64x16xbf16>
      %x = ttg.local_load %view : !ttg.memdesc<64x16xbf16, #shared, #smem, mutable> -> tensor
COPY
      %y = ttng.warp_group_dot %view, %a, %zero : !ttg.memdesc<64x16xbf16> -> tensor<64x128xf32>
LATE COPY
      scf.yield %next : i32
    }
"""
COPY = "      %t = ttg.async_copy_global_to_local %p, %view mask %m : tensor -> <64x16xbf16>"


@pytest.mark.parametrize(
    ("ir", "problems"),
    [
        (LOOP.replace("LATE COPY", COPY).replace("COPY", ""), 0),
        (LOOP.replace("LATE COPY", "").replace("COPY", COPY), 1),
        (
            LOOP.replace("LATE COPY", COPY)
            .replace("COPY", "")
            .replace("%zero :", "%zero {isAsync = true} :"),
            1,
        ),
    ],
    ids=["after the last read", "before it", "while a product runs"],
)
def test_a_buffer_that_is_refilled_early_is_found(ir, problems):
    assert len(hazards.refilled_early(ir)) == problems


PRODUCT = "/*0010*/  HGMMA.64x16x16.F32.BF16 R24, R32, gdesc[UR20], R24, gsb0 ;"
WAIT = "/*0020*/  WARPGROUP.DEPBAR.LE gsb0, 0x0 ;"


@pytest.mark.parametrize(
    ("instructions", "problems"),
    [
        ((PRODUCT, WAIT, "/*0030*/  LOP3.LUT R33, R15, R48, RZ, 0x3c, !PT ;"), 0),
        ((PRODUCT, "/*0020*/  LOP3.LUT R33, R15, R48, RZ, 0x3c, !PT ;", WAIT), 1),
        ((PRODUCT, "/*0020*/  LOP3.LUT R40, R33, R24, RZ, 0x3c, !PT ;", WAIT), 0),
        ((PRODUCT, "/*0020*/  LDS.64 R22, [R2] ;", "/*0030*/  LDS.64 R23, [R2] ;", WAIT), 1),
        (("/*0000*/  IADD3 R33, R1, R2, RZ ;", PRODUCT, "/*0030*/  @P0 BRA 0x0 ;", WAIT), 1),
    ],
    ids=["waited for", "an operand", "others", "the second of two", "in the next iteration"],
)
def test_a_register_that_is_written_in_flight_is_found(instructions, problems):
    assert len(hazards.written_in_flight("\n".join(instructions))) == problems
