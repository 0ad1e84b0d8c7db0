"""Two processes give one process's gradients: DDP and FSDP2 on both paths, DTensors on PyTorch's."""

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
def test_two_processes_give_the_gradients_of_one(case, impl, request):
    environment = request.getfixturevalue("interpreted") if impl == "triton" else os.environ
    done = subprocess.run(
        [*LAUNCH, str(Path(__file__).with_name("distributed_cases.py")), case],
        env={**environment, "LORA_KERNELS": impl, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
        timeout=150,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count(f"of 2: {case}, LORA_KERNELS={impl}: equal") == 2
