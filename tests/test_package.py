"""What is installed, what importing it costs, who imports whom, and the name `kernels`."""

import ast
import doctest
import importlib.util
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch

import lora

ROOT = Path(__file__).resolve().parent.parent


def run(*command, **options):
    done = subprocess.run(
        [str(c) for c in command], capture_output=True, text=True, check=False, **options
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def python(script, **options):
    return run(sys.executable, "-c", script, **options)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    # As git would give it: the tracked folders alone, without leftovers of an earlier build.
    source.mkdir()
    for name in ("lora", "kernels", "pyproject.toml", "README.md", "LICENSE"):
        run("cp", "-r", ROOT / name, source / name)
    build = (sys.executable, "-m", "build", "--no-isolation", "--wheel", "--outdir", folder)
    run(*build, source)
    return next(folder.glob("*.whl"))


def test_the_wheel_has_lora_kernels_and_no_top_level_kernels(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    inside = {n for n in names if not n.split("/")[0].endswith(".dist-info")}
    expected = {f"lora/{p.name}" for p in (ROOT / "lora").glob("*.py")} | {"lora/py.typed"}
    expected |= {f"lora/adapter/{p.name}" for p in (ROOT / "lora" / "adapter").glob("*.py")}
    expected |= {f"lora/kernels/{p.name}" for p in (ROOT / "kernels").glob("*.py")}
    assert inside == expected


def test_the_installed_wheel_works_away_from_the_checkout(wheel, tmp_path):
    zipfile.ZipFile(wheel).extractall(tmp_path)
    script = (
        "import importlib.util, torch, lora, lora.kernels\n"
        "assert lora.__file__.startswith(SITE) and lora.kernels.__file__.startswith(SITE)\n"
        "found = importlib.util.find_spec('kernels')\n"
        "assert found is None or not found.origin.startswith(SITE)\n"
        "print(lora.Linear(4, 3, 2)(torch.zeros(1, 4)).shape[1])"
    )
    script = f"import sys; SITE = {str(tmp_path)!r}; sys.path.insert(0, SITE)\n{script}"
    assert python(script, cwd=tmp_path).strip() == "3"


def test_mypy_strict_on_the_package_as_installed(wheel, tmp_path):
    """That is, with lora.kernels, which lies elsewhere in the checkout."""
    zipfile.ZipFile(wheel).extractall(tmp_path / "site")
    mypy = (sys.executable, "-m", "mypy", "--strict", "--python-version", "3.10")
    run(*mypy, "--cache-dir", tmp_path / "cache", "-p", "lora", cwd=tmp_path / "site")


def test_ruff():
    run(sys.executable, "-m", "ruff", "check", "--no-cache", ".", cwd=ROOT)
    run(sys.executable, "-m", "ruff", "format", "--no-cache", "--check", ".", cwd=ROOT)


OTHER = "lora/__init__.py,sha256=0,27586\nlora/util.py,sha256=0,357\n"


@pytest.mark.parametrize(
    ("record", "refused"),
    [(OTHER, True), ("__editable___lora_0_1_0_finder.py,sha256=0,1\n", False)],
    ids=["another project", "this project's checkout, by its earlier name"],
)
def test_a_distribution_that_installs_lora_too_is_refused(record, refused, wheel, tmp_path):
    """`lora` on PyPI is another project; whichever is installed later overwrites the other's files."""
    site = tmp_path / "site"
    zipfile.ZipFile(wheel).extractall(site)
    info = site / "lora-0.3.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.0\nName: lora\nVersion: 0.3.0\n")
    (info / "RECORD").write_text(record)
    script = f"import sys; sys.path.insert(0, {str(site)!r})\nimport lora; print(lora.__file__)"
    command = (sys.executable, "-c", script)
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path)
    if not refused:
        assert done.stdout.startswith(str(site)), done.stderr
        return
    assert done.returncode == 1
    assert "the distribution lora 0.3.0 is installed beside lora-layers" in done.stderr
    assert "pip uninstall -y lora lora-layers && pip install lora-layers" in done.stderr


WITHOUT = """
import sys
for name in ("triton", "fcntl", "resource"):
    sys.modules[name] = None  # an import fails, as on macOS and Windows
from importlib import util
find = util.find_spec
util.find_spec = lambda name, *package: None if name == "triton" else find(name, *package)
import torch, lora
model = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.Linear(64, 64))
lora.patch(model, ["0", "1"], r=4, lora_alpha=8, lora_dropout=0.5, quantize="nf4")
model(torch.randn(3, 64)).square().sum().backward()
assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
torch.nn.init.ones_(model[0].lora_B), torch.nn.init.ones_(model[1].lora_B)
lora.save_adapter(model, sys.argv[1])
lora.save_adapter(model, sys.argv[1])  # over an earlier one, which takes a lock where there are any
lora.load_adapter(model, sys.argv[1])
assert lora.kernels.explain(torch.ones(80, 64), torch.ones(64, 64), None, model[0].lora_A,
                            model[0].lora_B, 1.0).startswith("torch: ")
from lora.__main__ import main
sys.exit(main(["info", sys.argv[1]]))
"""


@pytest.mark.parametrize("platform", ["darwin", "win32", "linux"])
def test_it_works_without_triton_file_locks_and_resource_limits(platform, tmp_path):
    """Simulated: these modules cannot be imported, and what the package asks for the platform."""
    script = f"import torch._dynamo, sys; sys.platform = {platform!r}\n{WITHOUT}"  # torch is real
    command = (sys.executable, "-c", script, tmp_path / "adapter")
    assert "Linear" in run(*command, cwd=tmp_path)


def test_import_brings_no_triton_transformers_or_peft():
    script = (
        "import sys, torch; before = set(sys.modules); import lora\n"
        "print([sorted(sys.modules), sorted(set(sys.modules) - before)])"
    )
    loaded, new = ast.literal_eval(python(script))
    assert not {"triton", "transformers", "peft", "safetensors", "accelerate"} & set(loaded)
    assert {name.partition(".")[0] for name in new} - set(sys.stdlib_module_names) == {"lora"}


LIBRARY = sorted(p.relative_to(ROOT) for p in (ROOT / "lora").rglob("*.py"))


def dotted(path):
    """The module's name, of a file in lora/."""
    return ".".join(path.with_suffix("").parts).removesuffix(".__init__")


@pytest.mark.parametrize("name", [dotted(path) for path in LIBRARY])
def test_docstring_examples(name):
    module = importlib.import_module(name)
    names = {"torch": torch, "lora": lora, "Linear": lora.Linear}
    assert doctest.testmod(module, extraglobs=names).failed == 0


LAYERS = {  # who may import whom inside lora/: only what stands in an earlier row
    "_version": 0,
    "_distribution": 0,
    "table": 0,
    "variants": -1,
    "sharded": -1,
    "quantized": 0,
    "_base": 0,
    "linear": 1,
    "embedding": 1,
    "full": 1,
    "conv": 1,
    "merged_linear": 2,
    "switch": 2,
    "optim": 2,
    "modes": 2,
    "state": 3,
    "targets": 2,
    "summary": 4,
    "quantize": 3,
    "patch": 4,
    "unpatch": 7,
    "phi3": 5,
    "adapter.contents": 5,
    "adapter.fingerprint": 6,
    "adapter.files": 7,
    "adapter.peft_config": 6,
    "adapter.peft_format": 7,
    "adapter.selection": 7,
    "adapter.checkpoint": 8,
    "adapter.convert": 7,
    "adapter.storage": 8,
    "adapter.check": 9,
    "adapter.describe": 9,
    "adapter.merge_report": 5,
    "adapter.merged_folder": 9,
    "adapter.merge": 10,
    "adapter.save": 9,
    "adapter.fit": 10,
    "adapter.plan": 11,
    "adapter.load": 12,
    "adapter": 13,
    "": 14,
    "tensor_parallel": 6,
    "pretrained": 10,
    "distributed": 11,
    "hf": 15,
    "__main__": 15,
}


def imports(path):
    """(level, module) of every import in a file; `from . import a` imports the module a."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from ((0, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.level, node.module
        elif isinstance(node, ast.ImportFrom):
            yield from ((node.level, alias.name) for alias in node.names)


@pytest.mark.parametrize("path", LIBRARY, ids=dotted)
def test_arrows_in_lora_run_one_way(path):
    own = dotted(path).partition(".")[2]
    package = path.parent.parts  # what a relative import starts from
    for level, module in imports(ROOT / path):
        if level == 0:
            top = module.partition(".")[0]
            forbidden = {"triton", "transformers", "peft", "lora", "kernels"}
            assert top not in forbidden - ({"transformers"} if own == "hf" else set())
            continue
        absolute = ".".join((*package[: len(package) - level + 1], *filter(None, [module])))
        target = absolute.partition(".")[2]
        if target.partition(".")[0] != "kernels":
            assert LAYERS[target] < LAYERS[own], f"{own} imports {target}"


@pytest.mark.parametrize("path", sorted((ROOT / "kernels").glob("*.py")), ids=lambda p: p.stem)
def test_kernels_import_torch_and_their_own_alone(path):
    fused = path.stem == "tiling" or path.stem.startswith("triton_")
    allowed = {*sys.stdlib_module_names, "torch", *({"triton"} if fused else ())}
    for level, module in imports(path):
        if level == 0:
            assert module.partition(".")[0] in allowed
        else:
            assert level == 1
        if path.stem.startswith("triton_"):
            assert not module.startswith("triton_")


FAKE_KERNELS = '''
"""Stands for the distribution of this name that transformers imports from, unguarded."""

class _Anything:
    def __init__(self, *args, **kwargs): pass
    def __call__(self, decorated=None, *args, **kwargs): return decorated

def __getattr__(name):
    if name.startswith("__"):
        raise AttributeError(name)
    return _Anything
'''


def test_the_name_kernels_is_never_ours():
    from transformers.utils import is_kernels_available

    spec = importlib.util.find_spec("kernels")
    origin = spec.origin if spec else ""
    assert not origin.startswith(str(ROOT))
    expected = os.environ.get("EXPECTED_KERNELS")
    if expected:
        assert origin == expected
        assert is_kernels_available()


def test_the_folder_is_empty_by_its_own_name():
    """At the root transformers imports it: a second copy would free the operators of the first one."""
    script = (
        "import sys, torch, lora\n"
        "import kernels, transformers.integrations.hub_kernels\n"
        "print([name for name in sys.modules if name.split('.')[0] == 'kernels'])\n"
        "print([name for name in vars(kernels) if not name.startswith('__')])\n"
        "print(lora.Linear(8, 3, 2, 4, 0.5)(torch.zeros(1, 8)).shape[1])"
    )
    assert python(script, cwd=ROOT).splitlines() == ["['kernels']", "[]", "3"]


@pytest.mark.parametrize(
    ("installed", "runner"),
    [(True, ["python", "-m", "pytest"]), (False, ["pytest"])],
    ids=["with", "without"],
)
def test_a_patched_phi3_with_and_without_a_distribution_named_kernels(installed, runner, tmp_path):
    """Started at the root, where `python -m pytest` has the folder kernels/ first on sys.path."""
    from transformers.utils.import_utils import KERNELS_MIN_VERSION

    module, environment = tmp_path / "kernels" / "__init__.py", dict(os.environ)
    if installed:
        module.parent.mkdir()
        module.write_text(FAKE_KERNELS)
        info = tmp_path / f"kernels-{KERNELS_MIN_VERSION}.dist-info"
        info.mkdir()
        meta = f"Metadata-Version: 2.1\nName: kernels\nVersion: {KERNELS_MIN_VERSION}\n"
        (info / "METADATA").write_text(meta)
        environment |= {"PYTHONPATH": str(tmp_path), "EXPECTED_KERNELS": str(module)}
    command = [Path(sys.executable).parent / runner[0], *runner[1:], "-q", "-p", "no:cacheprovider"]
    chosen = [
        "tests/test_package.py::test_the_name_kernels_is_never_ours",
        "tests/test_phi3.py::test_a_published_peft_config_passes_whole",
        "tests/test_phi3.py::test_training_through_from_pretrained",
    ]
    assert "4 passed" in run(*command, *chosen, cwd=ROOT, env=environment)
