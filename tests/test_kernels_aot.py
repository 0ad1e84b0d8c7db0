"""The fused kernels without a GPU: compiled for four of them by aot.py, in its own process."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

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
