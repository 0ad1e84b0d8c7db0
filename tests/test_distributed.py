"""Real processes, by gloo: each case of distributed_cases.py equals one process, under every engine.

One launch runs many cases, because starting takes longer than they do. A later launch, with another
number of processes, goes on from what the earlier ones saved.
"""

import functools
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

LAUNCH = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node"]
BOUND = 1e-5  # in fp32, relative
HALF = 3e-2  # in bf16, whose sums are rounded in another order
CASES = {
    2: (
        *("ddp", "fsdp2", "fsdp2_offload", "fsdp2_bf16_base", "fsdp2_mixed_precision"),
        *("tensor_parallel", "variants", "files", "save_states", "load_states", "from_meta"),
        *("refusals", "evaluates_alone"),
        *("layers_ddp", "layers_fsdp2", "layers_dtensor", "layers_tensor_parallel"),
    ),
    4: (
        *("ddp", "fsdp2", "fsdp2_bf16_base", "tensor_parallel", "files", "load_states"),
        *("save_states", "from_meta", "evaluates_alone"),
    ),
    1: ("load_states",),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("processes")


def launch(ranks: int, folder: Path, *cases: str, **environment: str) -> tuple[dict, str]:
    """What each case found, and all that was printed."""
    script = str(Path(__file__).with_name("distributed_cases.py"))
    process = subprocess.Popen(
        [*LAUNCH, str(ranks), script, str(folder), *cases],
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    try:
        output, _ = process.communicate(timeout=400)
    except subprocess.TimeoutExpired:  # the processes name a stuck one long before
        process.terminate()  # torchrun then ends what it has started
        output, _ = process.communicate()
    lines = [json.loads(line) for line in output.splitlines() if line.startswith("{")]
    return {line["case"]: line for line in lines}, output


@pytest.fixture(scope="module")
def found(folder):
    """Of a number of processes, the findings; the launches before it come first."""

    @functools.cache
    def of(ranks: int) -> tuple[dict, str]:
        before = list(CASES)[: list(CASES).index(ranks)]
        for other in before:
            of(other)
        return launch(ranks, folder, *CASES[ranks], LORA_KERNELS="torch")

    return of


@pytest.mark.parametrize(
    ("ranks", "case"), [(ranks, case) for ranks, cases in CASES.items() for case in cases]
)
def test_several_processes_are_one(ranks, case, found):
    lines, output = found(ranks)
    assert case in lines, output[-6000:]
    bound = HALF if "bf16" in case or "mixed" in case else BOUND
    for what in ("loss", "gradient", "logits"):
        assert lines[case].get(what, 0.0) < bound, lines[case]


def test_the_fused_kernels_do_so_too(folder, interpreted):
    cases = ("layers_ddp", "layers_fsdp2", "layers_tensor_parallel")
    lines, output = launch(2, folder, *cases, **{**interpreted, "LORA_KERNELS": "triton"})
    assert set(lines) == set(cases), output[-6000:]


def test_a_stuck_process_is_named(folder):
    lines, output = launch(2, folder, "one_is_stuck", STUCK_SECONDS="5")
    assert not lines
    assert "Rank 1 failed to pass monitoredBarrier" in output or "Ranks 1 failed" in output, output
