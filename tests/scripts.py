"""Run scripts in processes that begin with the heavy packages imported.

Importing torch, transformers and TRL costs seconds of CPU time a process. `start` and `run` fork
instead from a server (multiprocessing's) that has imported them once. A script sees what it would see
in a fresh interpreter but for three things: these packages are in sys.modules; what they read from
the environment while they are imported is that of the tests; warnings of these imports are past.
Tests of imports, of interpreter options and of what a user types start a fresh interpreter instead.
"""

import gc
import multiprocessing
import multiprocessing.forkserver
import os
import runpy
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace

IMPORTED = (
    "torch",
    "torch._dynamo",
    "torch.distributed.fsdp",
    "torch.distributed.tensor.parallel",
    "torch.distributed.checkpoint",
    "transformers.models.phi3.modeling_phi3",
    "transformers.models.auto.modeling_auto",
    "transformers.trainer",
    "tokenizers",
    "matplotlib.figure",
    "matplotlib.backends.backend_agg",
    "peft",
    "trl.trainer.sft_trainer",
    "lora.distributed",
    "lora.tensor_parallel",
    "lora.hf",
)
LIMIT = 900  # seconds after which a script counts as hanging, on a machine that is busy as well

_forks = "forkserver" in multiprocessing.get_all_start_methods()  # Windows has "spawn" alone
_context = multiprocessing.get_context("forkserver" if _forks else "spawn")
_context.set_forkserver_preload(list(IMPORTED))


def _child(
    path: str,
    arguments: list[str],
    environment: dict[str, str],
    directory: str,
    output: tuple[str, str],
    filters: str,
) -> None:
    gc.freeze()  # or every collection would look through what the packages hold
    for stream, file in zip((1, 2), output, strict=True):
        os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), stream)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(directory)
    import torch

    torch.set_num_threads(int(environment.get("OMP_NUM_THREADS", torch.get_num_threads())))
    sys.argv = [path, *arguments]
    sys.path.insert(0, str(Path(path).parent))
    warnings.simplefilter(filters)
    runpy.run_path(path, run_name="__main__")


class Script:
    """A running script. Its output goes to files, so that no pipe can fill.

    store: where ranks meet; it ends with the last reference to it.
    """

    store: object = None

    def __init__(self, process: "multiprocessing.Process | subprocess.Popen", folder: Path) -> None:
        self._process, self._folder = process, folder

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def stdout(self) -> str:
        return (self._folder / "stdout").read_text()

    @property
    def stderr(self) -> str:
        return (self._folder / "stderr").read_text()

    def poll(self) -> int | None:
        """The exit status, negative for a signal; None while it runs."""
        if isinstance(self._process, subprocess.Popen):
            return self._process.poll()
        return self._process.exitcode

    def kill(self) -> None:
        self._process.kill()

    def wait(self) -> int:
        return wait_for_all([self])[0]


def wait_for_all(scripts: list[Script]) -> list[int]:
    """Their exit statuses. When one fails, or has not ended within LIMIT, the others are killed."""
    end = time.monotonic() + LIMIT
    while any(script.poll() is None for script in scripts):
        if any(script.poll() for script in scripts) or time.monotonic() > end:
            for script in scripts:
                script.kill()
        time.sleep(0.02)
    return [script.poll() for script in scripts]


def start(
    path: Path,
    *arguments: object,
    folder: Path,
    environment: Mapping[str, str] | None = None,
    directory: Path | None = None,
    filters: str = "default",
    fresh: bool = False,
) -> Script:
    """`python -W filters path arguments`; what it prints goes to stdout and stderr in `folder`.

    fresh: in a new interpreter instead of a fork.
    """
    folder.mkdir(parents=True, exist_ok=True)
    output = str(folder / "stdout"), str(folder / "stderr")
    for file in output:
        Path(file).touch()
    words = [*map(str, arguments)]
    environment = {**os.environ, "PYTHONUNBUFFERED": "1", **(environment or {})}
    where = str(directory or folder)
    if fresh:
        command = [sys.executable, "-W", filters, str(path), *words]
        with open(output[0], "w") as out, open(output[1], "w") as err:
            process = subprocess.Popen(command, env=environment, cwd=where, stdout=out, stderr=err)
        return Script(process, folder)
    process = _context.Process(
        target=_child, args=(str(path), words, environment, where, output, filters)
    )
    # The server imports what lies where it starts, and the root has a folder kernels/.
    here = os.getcwd()
    os.chdir(folder)
    try:
        process.start()
    finally:
        os.chdir(here)
    return Script(process, folder)


def run(path: Path, *arguments: object, folder: Path, **options) -> SimpleNamespace:
    """As subprocess.run: returncode, stdout and stderr of a script that has ended."""
    script = start(path, *arguments, folder=folder, **options)
    status = script.wait()
    return SimpleNamespace(returncode=status, stdout=script.stdout, stderr=script.stderr)


def start_ranks(
    count: int,
    path: Path,
    *arguments: object,
    folder: Path,
    environment: Mapping[str, str] | None = None,
    **options,
) -> list[Script]:
    """A script in `count` processes with the environment that torchrun would give them.

    `folder` gets a folder with the output of each, named by its rank. As torchrun does, this process
    serves the store in which the ranks meet, on a port that the system chooses.
    """
    from torch.distributed import TCPStore

    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    told = {
        "WORLD_SIZE": str(count),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(store.port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",
        "TORCHELASTIC_RESTART_COUNT": "0",
        "OMP_NUM_THREADS": "1",
        **(environment or {}),
    }
    running = []
    for rank in map(str, range(count)):
        of_rank = {"RANK": rank, "LOCAL_RANK": rank, **told}
        options_of_rank = {"folder": folder / rank, "environment": of_rank, **options}
        running.append(start(path, *arguments, **options_of_rank))
        running[-1].store = store
    return running


def stop_server() -> None:
    """End the server and wait for it, so that its CPU time counts among the tests'."""
    if _forks:
        multiprocessing.forkserver._forkserver._stop()
