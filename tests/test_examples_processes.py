"""The main job in several processes is that of one: losses, files, output; and when a process dies."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parent.parent / "examples" / "finetune_phi3.py"
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
STEPS = 12
# Five rows a batch for two or four processes, and a last batch of an epoch with fewer rows than these.
SETTINGS = [
    f"--steps={STEPS}",
    "--set=lora_dropout=0.0",
    "--set=per_device_train_batch_size=5",
    "--set=logging_steps=1",
    "--set=save_steps=2",
    "--set=eval_steps=6",
    "--set=save_total_limit=2",
]
DIES_WITHIN = 90  # seconds in which the job ends after one of its processes has died


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    folder = tmp_path_factory.mktemp("processes")
    rows = []
    for number in range(34):
        user = {"role": "user", "content": f"What is {number} + 1?"}
        assistant = {
            "role": "assistant",
            "content": f"It is {number + 1}." + " Yes." * (number % 4),
        }
        rows.append(json.dumps({"messages": [user, assistant]}))
    (folder / "chats.jsonl").write_text("\n".join(rows))
    return folder


def arguments(home, output, *more):
    data = ["--data", home / "chats.jsonl", "--base-steps=5", "--output", output]
    return [str(a) for a in (SCRIPT, *data, *SETTINGS, *more)]


def environment(home):
    return {**os.environ, "XDG_CACHE_HOME": str(home / "cache"), "OMP_NUM_THREADS": "1"}


def torchrun(home, output, ranks, *more):
    logs = home / f"logs-{output.name}-{ranks}"
    options = ["--nproc-per-node", str(ranks), "--log-dir", str(logs), "--redirects", "3"]
    command = [*TORCHRUN, *options, *arguments(home, output, *more)]
    process = subprocess.Popen(
        command, env=environment(home), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )
    return process, logs


def printed(logs, rank, stream):
    (path,) = logs.glob(f"*/attempt_0/{rank}/{stream}.log")
    return path.read_text()


def finished(home, output, ranks, *more):
    """The last line of the first process; the others have printed nothing."""
    process, logs = torchrun(home, output, ranks, *more)
    try:
        _, errors = process.communicate(timeout=400)
    finally:
        process.kill()
    assert process.returncode == 0, errors + printed(logs, 0, "stderr")
    for rank in range(1, ranks):
        assert printed(logs, rank, "stdout") == ""
        assert printed(logs, rank, "stderr") == ""
    return json.loads(printed(logs, 0, "stdout").splitlines()[-1]), logs


def losses(output):
    events = [json.loads(line) for line in (output / "log.jsonl").read_text().splitlines()]
    return {(e["event"], e["step"], e.get("when")): e["loss"] for e in events if "loss" in e}


@pytest.fixture(scope="module")
def one(home):
    done = subprocess.run(
        [sys.executable, *arguments(home, home / "one")],
        env=environment(home),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def same_as_one(home, output, report, one):
    want, got = losses(home / "one"), losses(output)
    assert got.keys() == want.keys()
    assert got == pytest.approx(want, rel=1e-5)
    assert report["trainable_parameters"] == one["trainable_parameters"]
    assert report["eval_loss_after"] == pytest.approx(one["eval_loss_after"], rel=1e-5)
    assert report["reload_difference"] < 1e-4
    assert report["merged_difference"] < 1e-4
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        assert (output / "adapter" / name).is_file()
    assert (output / "merged" / "config.json").is_file()
    assert (output / "loss.png").is_file()


def test_two_processes_by_ddp_do_the_job_of_one(home, one):
    report, logs = finished(home, home / "ddp", 2)
    same_as_one(home, home / "ddp", report, one)
    assert (report["processes"], report["parallel"]) == (2, "ddp")
    assert report["peak_mb"] > 0
    assert "2 processes by ddp: at most" in printed(logs, 0, "stderr")


def test_a_killed_process_ends_the_job_and_four_go_on_where_two_were(home, one):
    output = home / "killed"
    process, logs = torchrun(home, output, 2, "--parallel", "fsdp2")
    try:
        checkpoints = output / "checkpoints"
        while not list(checkpoints.glob("checkpoint-*.pt")):
            assert process.poll() is None, printed(logs, 0, "stderr")
            time.sleep(0.05)
        os.kill(pid_of(process.pid, rank=1), signal.SIGKILL)
        _, errors = process.communicate(timeout=DIES_WITHIN)
    finally:
        process.kill()
        process.communicate()
    assert process.returncode != 0
    assert re.search(r"rank\s*: 1 .*\n.*exitcode\s*: -9", errors)
    at = max(int(path.stem.split("-")[1]) for path in checkpoints.iterdir())
    assert at < STEPS
    assert not [p for p in checkpoints.iterdir() if not p.name.startswith("checkpoint-")]
    report, _ = finished(home, output, 4, "--parallel", "fsdp2", "--resume")
    same_as_one(home, output, report, one)
    assert (report["processes"], report["parallel"]) == (4, "fsdp2")


def test_ctrl_c_saves_the_step_that_all_have_done(home, one):
    output = home / "interrupted"
    process, logs = torchrun(home, output, 2)
    try:
        while not list((output / "checkpoints").glob("checkpoint-*.pt")):
            assert process.poll() is None, printed(logs, 0, "stderr")
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)  # which torchrun passes on
        process.communicate(timeout=DIES_WITHIN)
    finally:
        process.kill()
        process.communicate()
    stopped = re.search(r"stopped after step (\d+)", printed(logs, 0, "stderr"))
    assert stopped, printed(logs, 0, "stderr")
    assert (output / "checkpoints" / f"checkpoint-{stopped[1]}.pt").is_file()
    assert printed(logs, 1, "stderr") == ""


def pid_of(parent, rank):
    """The process that torchrun has started with this rank."""
    children = Path(f"/proc/{parent}/task/{parent}/children").read_text().split()
    for pid in children:
        if f"RANK={rank}\0".encode() in Path(f"/proc/{pid}/environ").read_bytes():
            return int(pid)
    raise AssertionError(f"no process of rank {rank} among {children}")


def test_an_engine_without_processes_is_refused(home):
    done = subprocess.run(
        [sys.executable, *arguments(home, home / "none", "--parallel", "fsdp2")],
        env=environment(home),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2
    assert "torchrun --nproc-per-node N" in done.stderr
    assert not (home / "none").exists()
