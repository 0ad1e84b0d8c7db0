"""The repository root leaves sys.path: its folder kernels/ must never answer to that name."""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:] = [p for p in sys.path if Path(p or ".").resolve() != ROOT]
sys.path.append(str(ROOT / "tests"))  # of what several files of tests share

import importlib.metadata  # noqa: E402
import json  # noqa: E402
import os  # noqa: E402
import subprocess  # noqa: E402
from types import SimpleNamespace  # noqa: E402

os.environ["HF_HUB_OFFLINE"] = "1"
if "PYTEST_XDIST_WORKER" in os.environ:  # the workers share the cores; what they start does so too
    os.environ["OMP_NUM_THREADS"] = "1"

import pytest  # noqa: E402
import torch  # noqa: E402

pytest.register_assert_rewrite("adapter_helpers")


@pytest.hookimpl(tryfirst=True)
def pytest_cmdline_main(config: pytest.Config) -> None:
    """The whole suite runs in two processes, a file in one of them, unless -n says otherwise."""
    if "PYTEST_XDIST_WORKER" in os.environ or hasattr(config, "workerinput"):
        return  # in one of the two already: it must never start further ones
    whole = config.args_source is pytest.Config.ArgsSource.TESTPATHS
    if whole and config.getoption("numprocesses", 0) is None and not config.option.usepdb:
        config.option.numprocesses, config.option.dist = 2, "loadfile"
        config.option.loadscopereorder = False  # not by the number of tests: see LONGEST


def pytest_sessionfinish() -> None:
    if "scripts" in sys.modules:
        sys.modules["scripts"].stop_server()


# The files that take longest, which begin first, so that neither process ends up alone with one.
LONGEST = (
    "test_examples_processes",
    "test_training_step",
    "test_distributed",
    "test_kernels_interpreter",
    "test_bench_suite",
    "test_examples",
    "test_package",
    "test_variants",
    "test_quantized_disk",
    "test_compile",
    "test_example_trl",
    "test_hf",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    place = {name: number for number, name in enumerate(LONGEST)}
    items.sort(key=lambda item: place.get(item.path.stem, len(place)))
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    if not torch.cuda.is_available():
        skip = pytest.mark.skip(reason="needs a CUDA device")
        for item in items:
            if "gpu" in item.keywords and not (interpreted and "fused" in item.keywords):
                item.add_marker(skip)


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def strict_warnings(pytestconfig):
    """Options of an interpreter that treats warnings as the tests do (see pyproject.toml)."""
    return [option for text in pytestconfig.getini("filterwarnings") for option in ("-W", text)]


@pytest.fixture(scope="session")
def default_run(tmp_path_factory, strict_warnings):
    """`finetune_phi3.py` without --model and --data, shortened, in a fresh home: once for all workers.

    (home, work, output, arguments, report, base): base is the stand-in for Phi-3 that it has trained.
    """
    filelock = pytest.importorskip("filelock")
    shared = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        shared = shared.parent  # which all workers have
    home = shared / "default-run"
    work, output, done = home / "work", home / "output", home / "report.json"
    quick = ("logging_steps=1", "save_steps=10", "eval_steps=10", "eval_samples=64")
    arguments = [
        "--output",
        output,
        "--base-steps=20",
        "--steps=20",
        *(f"--set={q}" for q in quick),
    ]
    with filelock.FileLock(shared / "default-run.lock"):
        if not done.exists():
            for folder in (work, home / "home"):
                folder.mkdir(parents=True, exist_ok=True)
            script = ROOT / "examples" / "finetune_phi3.py"
            command = [sys.executable, *strict_warnings, str(script), *map(str, arguments)]
            told = {k: v for k, v in os.environ.items() if k not in ("HF_HOME", "MPLCONFIGDIR")}
            told |= {"HOME": str(home / "home"), "XDG_CACHE_HOME": str(home / "cache")}
            told |= {"OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"}
            run = subprocess.run(command, cwd=work, env=told, capture_output=True, text=True)
            assert run.returncode == 0, run.stderr
            (home / "stderr").write_text(run.stderr)
            done.write_text(run.stdout.splitlines()[-1])
    base = next((home / "cache" / "lora").glob("phi3-standin-*"))
    return SimpleNamespace(
        home=home,
        work=work,
        output=output,
        arguments=arguments,
        report=json.loads(done.read_text()),
        stderr=(home / "stderr").read_text(),
        base=base,
    )


@pytest.fixture
def interpreted():
    """The environment of a process in which Triton interprets its kernels."""
    pytest.importorskip("triton")
    version = importlib.metadata.version("triton")
    if tuple(map(int, version.split(".")[:2])) < (3, 7):
        pytest.skip(f"the interpreter of Triton {version} does not run on today's numpy")
    return {**os.environ, "TRITON_INTERPRET": "1"}


@pytest.fixture
def in_a_new_process():
    """Run code that measures memory (`little_memory`); returns the integers that it prints."""
    if sys.platform != "linux":
        pytest.skip("needs RLIMIT_DATA and /proc")

    def run(code: str, *arguments: object) -> list[int]:
        command = [sys.executable, "-c", code, *map(str, arguments)]
        environment = {**os.environ, "PYTHONPATH": str(ROOT / "tests")}
        done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
        assert done.returncode == 0, done.stderr
        return list(map(int, done.stdout.split()))

    return run


@pytest.fixture
def assert_durable(monkeypatch):
    """A function that fails unless all that was renamed so far was on the disk before and after.

    Before: the contents of the file, or of the folder and its files. After: the folder that has the
    new name. Otherwise a power failure leaves an empty file under the right name, or none.
    """
    events = []
    fsync = os.fsync

    def record_sync(descriptor):
        events.append(("sync", {os.fstat(descriptor).st_ino}))
        fsync(descriptor)

    def recorded(rename):
        def call(source, target):
            inside = Path(source).rglob("*")
            events.append(("rename", {p.stat().st_ino for p in (Path(source), *inside)}))
            rename(source, target)
            events.append(("renamed", {os.stat(Path(target).parent).st_ino}))

        return call

    monkeypatch.setattr(os, "fsync", record_sync)
    monkeypatch.setattr(os, "rename", recorded(os.rename))
    monkeypatch.setattr(os, "replace", recorded(os.replace))

    def check(renames: int) -> None:
        assert [kind for kind, _ in events].count("renamed") == renames
        for number, (kind, inodes) in enumerate(events):
            nearby = {"rename": events[:number], "renamed": events[number:]}.get(kind, ())
            synced = set().union(*(i for k, i in nearby if k == "sync"))
            assert kind == "sync" or inodes <= synced, events
        events.clear()

    return check


@pytest.fixture
def make_phi3():
    """A factory of small Phi-3 models: 4 heads, 2 key-value heads, 2 layers, in eval mode."""
    from transformers import Phi3Config, Phi3ForCausalLM

    def make(**changes: object) -> torch.nn.Module:
        options = {
            "vocab_size": 96,
            "hidden_size": 64,
            "intermediate_size": 112,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 128,
            "pad_token_id": 0,
            "bos_token_id": 1,
            "eos_token_id": 2,
        }
        torch.manual_seed(0)
        return Phi3ForCausalLM(Phi3Config(**{**options, **changes})).eval()

    return make


@pytest.fixture
def fill_factors():
    """Give every factor of a model random values, so that the update is not zero."""

    def fill(model: torch.nn.Module, std: float = 0.2) -> torch.nn.Module:
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "lora_" in name:
                    parameter.normal_(std=std)
        return model

    return fill


def _layer_cases() -> dict[str, tuple]:
    """name: (constructor, its plain torch layer, an input) for one of every kind of layer."""
    import lora

    nn, randn = torch.nn, torch.randn
    parts = {"enable_lora": [True, False, True]}
    return {
        "linear": (
            lambda **k: lora.Linear(12, 18, 3, 6, **k),
            lambda: nn.Linear(12, 18),
            randn(5, 12),
        ),
        "linear_transposed": (
            lambda **k: lora.Linear(12, 18, 3, 6, 0.0, True, **k),
            None,
            randn(2, 5, 12),
        ),
        "merged_linear": (
            lambda **k: lora.MergedLinear(12, 18, 3, 6, **parts, **k),
            lambda: nn.Linear(12, 18),
            randn(5, 12),
        ),
        "merged_linear_unequal": (
            lambda **k: lora.MergedLinear(12, 18, 3, 6, **parts, out_splits=[10, 4, 4], **k),
            lambda: nn.Linear(12, 18),
            randn(5, 12),
        ),
        "embedding": (
            lambda **k: lora.Embedding(11, 6, 3, 6, padding_idx=0, **k),
            lambda: nn.Embedding(11, 6, padding_idx=0),
            torch.tensor([[1, 5, 0], [10, 1, 2]]),
        ),
        "conv1d": (
            lambda **k: lora.Conv1d(4, 6, 3, 2, 6, padding=1, **k),
            lambda: nn.Conv1d(4, 6, 3, padding=1),
            randn(2, 4, 9),
        ),
        "conv2d": (
            lambda **k: lora.Conv2d(4, 6, 3, 2, 6, groups=2, **k),
            lambda: nn.Conv2d(4, 6, 3, groups=2),
            randn(2, 4, 7, 7),
        ),
        "conv2d_oblong": (
            lambda **k: lora.Conv2d(4, 6, (3, 1), 2, 6, padding_mode="circular", padding=1, **k),
            lambda: nn.Conv2d(4, 6, (3, 1), padding_mode="circular", padding=1),
            randn(2, 4, 7, 7),
        ),
        "conv3d": (
            lambda **k: lora.Conv3d(4, 6, 2, 2, 6, stride=2, **k),
            lambda: nn.Conv3d(4, 6, 2, stride=2),
            randn(2, 4, 5, 5, 5),
        ),
    }


@pytest.fixture(params=list(_layer_cases()))
def layer_case(request):
    """(name, constructor taking keywords, constructor of the plain layer or None, input)."""
    torch.manual_seed(0)
    return request.param, *_layer_cases()[request.param]
