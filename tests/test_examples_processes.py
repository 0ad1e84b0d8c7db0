"""The main job in several processes is that of one: losses, files, output; and when a process dies.

What torchrun does for a user, who starts it, kills one of its processes or stops it by Ctrl-C, is
tested with torchrun; the runs that resume from there are forked (see scripts.py).
"""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import scripts

SCRIPT = Path(__file__).resolve().parent.parent / "examples" / "finetune_phi3.py"
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
STEPS = 12
# Five rows a batch for two or four processes, and a last batch of an epoch with fewer rows than these.
SETTINGS = [
    f"--steps={STEPS}",
    "--lr=0.005",
    "--set=lora_dropout=0.0",
    "--set=bf16=false",
    "--set=do_eval=true",
    "--set=gradient_checkpointing=false",
    "--set=gradient_accumulation_steps=2",
    "--set=per_device_train_batch_size=5",
    "--set=logging_steps=1",
    "--set=save_steps=2",
    "--set=eval_steps=6",
    "--set=save_total_limit=2",
]
NOISE = ("Failed to load CPU gemm_4bit_forward",)  # bitsandbytes 0.50, of a package that is missing


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


@pytest.fixture(scope="module")
def arguments(home, default_run):
    data = ["--model", default_run.base, "--data", home / "chats.jsonl"]
    return lambda output, *more: [*map(str, data), *SETTINGS, "--output", str(output), *more]


def told(lines):
    """What a process printed to stderr, without what other packages print there."""
    return "".join(line for line in lines.splitlines(keepends=True) if not line.startswith(NOISE))


@pytest.fixture
def torchrun(home, arguments):
    """Start the job by torchrun, in two processes: (torchrun, a function of a rank's stderr)."""
    started = []

    def start(output, *more):
        logs = home / f"logs-{output.name}"
        options = ["--nproc-per-node", "2", "--log-dir", str(logs), "--redirects", "3"]
        command = [*TORCHRUN, *options, str(SCRIPT), *arguments(output, *more)]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        pipes = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, "text": True}
        started.append(subprocess.Popen(command, env=environment, **pipes))

        def stderr(rank):
            return "".join(p.read_text() for p in logs.glob(f"*/attempt_0/{rank}/stderr.log"))

        while not list((output / "checkpoints").glob("checkpoint-*.pt")):
            assert started[-1].poll() is None, stderr(0)
            time.sleep(0.05)
        return started[-1], stderr

    yield start
    for process in started:
        process.kill()
        process.communicate()


def finished(home, arguments, output, ranks, *more):
    """The report of the first of so many processes; the others have printed nothing."""
    running = scripts.start_ranks(
        *(ranks, SCRIPT, *arguments(output, *more)),
        folder=home / f"printed-{output.name}-{ranks}",
    )
    assert scripts.wait_for_all(running) == [0] * ranks, "".join(s.stderr for s in running)
    assert all(s.stdout + told(s.stderr) == "" for s in running[1:])
    return json.loads(running[0].stdout.splitlines()[-1]), running[0].stderr


def losses(output):
    events = [json.loads(line) for line in (output / "log.jsonl").read_text().splitlines()]
    return {(e["event"], e["step"], e.get("when")): e["loss"] for e in events if "loss" in e}


@pytest.fixture(scope="module")
def one(home, arguments):
    done = scripts.run(*(SCRIPT, *arguments(home / "one")), folder=home / "printed-one")
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


def last_checkpoint(output):
    names = [path.name for path in (output / "checkpoints").iterdir()]
    assert all(name.startswith("checkpoint-") for name in names)
    return max(int(name.removesuffix(".pt").split("-")[1]) for name in names)


def test_ctrl_c_saves_the_step_that_all_have_done_and_two_by_ddp_are_one(
    home, arguments, one, torchrun
):
    output = home / "ddp"
    process, stderr = torchrun(output)
    process.send_signal(signal.SIGINT)  # which torchrun passes on
    process.communicate(timeout=scripts.LIMIT)
    stopped = re.search(r"stopped after step (\d+)", stderr(0))
    assert stopped, stderr(0)
    assert "2 processes by ddp: at most" in stderr(0)
    assert int(stopped[1]) == last_checkpoint(output) < STEPS
    assert told(stderr(1)) == ""
    report, _ = finished(home, arguments, output, 2, "--resume")
    same_as_one(home, output, report, one)
    assert (report["processes"], report["parallel"]) == (2, "ddp")
    assert report["peak_mb"] > 0


def test_a_killed_process_ends_the_job_and_four_go_on_where_two_were(
    home, arguments, one, torchrun
):
    output = home / "killed"
    process, _ = torchrun(output, "--parallel", "fsdp2")
    os.kill(pid_of(process.pid, rank=1), signal.SIGKILL)
    _, errors = process.communicate(timeout=scripts.LIMIT)
    assert process.returncode not in (0, None)
    assert re.search(r"rank\s*: 1 .*\n.*exitcode\s*: -9", errors)
    assert last_checkpoint(output) < STEPS
    report, _ = finished(home, arguments, output, 4, "--parallel", "fsdp2", "--resume")
    same_as_one(home, output, report, one)
    assert (report["processes"], report["parallel"]) == (4, "fsdp2")


def pid_of(parent, rank):
    """The process that torchrun has started with this rank."""
    children = Path(f"/proc/{parent}/task/{parent}/children").read_text().split()
    for pid in children:
        if f"RANK={rank}\0".encode() in Path(f"/proc/{pid}/environ").read_bytes():
            return int(pid)
    raise AssertionError(f"no process of rank {rank} among {children}")


def test_an_engine_without_processes_is_refused(home, arguments):
    output = home / "none"
    done = scripts.run(
        *(SCRIPT, *arguments(output, "--parallel", "fsdp2")), folder=home / "printed-none"
    )
    assert done.returncode == 2
    assert "torchrun --nproc-per-node N" in done.stderr
    assert not output.exists()
