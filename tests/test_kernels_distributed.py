"""Two processes give one process's gradients: DDP and FSDP2 on both paths, DTensors on PyTorch's."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

LAUNCH = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]


@pytest.mark.parametrize(
    ("case", "impl"),
    [
        ("ddp", "torch"),
        ("ddp", "triton"),
        ("fsdp2", "torch"),
        ("fsdp2", "triton"),
        ("dtensor", "auto"),
    ],
)
def test_two_processes_give_the_gradients_of_one(case, impl):
    if impl == "triton" and not importlib.util.find_spec("triton"):
        pytest.skip("Triton is for Linux alone")
    interpreted = {"TRITON_INTERPRET": "1"} if impl == "triton" else {}
    done = subprocess.run(
        [*LAUNCH, str(Path(__file__).with_name("distributed_cases.py")), case],
        env={**os.environ, "LORA_KERNELS": impl, "OMP_NUM_THREADS": "1", **interpreted},
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count(f"of 2: {case}, LORA_KERNELS={impl}: equal") == 2
