"""The repository root leaves sys.path: its folder kernels/ must never answer to that name."""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:] = [p for p in sys.path if Path(p or ".").resolve() != ROOT]
sys.path.append(str(ROOT / "tests"))  # of what several files of tests share

import importlib.metadata  # noqa: E402
import os  # noqa: E402
import subprocess  # noqa: E402

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


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    if not torch.cuda.is_available():
        skip = pytest.mark.skip(reason="needs a CUDA device")
        for item in items:
            if "gpu" in item.keywords and not (interpreted and "fused" in item.keywords):
                item.add_marker(skip)


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


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
