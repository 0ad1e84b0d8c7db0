"""A patched model in transformers' Trainer under FSDP2, in two processes, trains as in one.

accelerate shards on GPUs alone; `ShardingTrainer` in hf_fsdp_cases.py says what that takes on CPUs.
"""

from pathlib import Path
from types import SimpleNamespace

import pytest
import scripts
import torch

pytest.importorskip("transformers")
pytest.importorskip("accelerate", minversion="1.10")  # of ParallelismConfig

import hf_fsdp_cases as cases

import lora
import lora.hf


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """The folder in which two processes have left the results of all cases."""
    folder = tmp_path_factory.mktemp("two")
    running = scripts.start_ranks(
        *(2, Path(cases.__file__), folder),
        folder=folder / "printed",
        environment={"CUDA_VISIBLE_DEVICES": ""},
    )
    codes = scripts.wait_for_all(running)
    out = "".join(script.stdout + script.stderr for script in running)
    silent = [rank for rank in range(2) if f"rank {rank} of 2: done" not in out]
    assert (codes, silent) == ([0, 0], []), f"exit codes {codes}, not done: ranks {silent}\n{out}"
    return folder


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    """The results of all cases in this process, by case."""
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("one")
    return {case: cases.run(case, folder)[1] for case in cases.CASES}


@pytest.mark.parametrize("case", cases.CASES)
def test_two_processes_train_as_one(case, one, two):
    """Losses, gradient norms, evaluations in between and the factors at the end."""
    tolerance = {"rtol": 1e-5, "atol": 1e-5}
    steps = cases.STEPS - (cases.SAVED if case == "resumed" else 0)
    for rank in range(2):
        got = torch.load(two / f"{case}-{rank}.pt")
        for key in ("loss", "eval_loss", "grad_norm"):
            assert len(got[key]) >= steps
            torch.testing.assert_close(got[key], one[case][key], **tolerance)
        assert got["factors"].keys() == one[case]["factors"].keys()
        for name, factor in one[case]["factors"].items():
            torch.testing.assert_close(got["factors"][name], factor, **tolerance)


def test_a_resumed_run_repeats_the_losses(two):
    """The Trainer's own checkpoints, whole models, do under FSDP2 what they do without."""
    whole, resumed = (torch.load(two / f"{case}-0.pt") for case in ("fp32", "resumed"))
    for key in ("loss", "eval_loss", "grad_norm"):
        assert resumed[key][-2:] == whole[key][-2:]
    assert all(torch.equal(whole["factors"][k], v) for k, v in resumed["factors"].items())


@pytest.mark.parametrize("case", cases.CASES)
def test_all_ranks_save_one_adapter_that_loads_in_one_process(case, two):
    trained = torch.load(two / f"{case}-0.pt")["factors"]
    assert {t.dtype for t in trained.values()} == {torch.float32}
    for folder in ("adapter", f"adapter-{cases.STEPS}"):  # at the end, and by the user's callback
        model = cases.make(case)
        lora.load_adapter(model, two / case / folder)
        loaded = cases.factors(model)
        assert loaded.keys() == trained.keys()
        assert all(torch.equal(loaded[name], trained[name]) for name in trained)


def test_a_sharded_model_is_refused_by_the_callback(two):
    """Told by its Parameters, since who sharded it need not be the Trainer."""
    for rank in range(2):
        assert "is sharded" in Path(two, f"refusal-{rank}.txt").read_text()


@pytest.mark.parametrize(
    ("version", "advice"),
    [(1, r"'version': 2"), (2, r"lora\.save_adapter\(trainer\.model, folder\) in every process")],
)
@pytest.mark.parametrize("by", ["arguments", "launcher"])
def test_the_callback_says_what_to_do_instead(version, advice, by, monkeypatch):
    args = SimpleNamespace()
    if by == "arguments":
        args = SimpleNamespace(fsdp=True, fsdp_plugin_args={"fsdp_version": version})
    else:
        monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
        monkeypatch.setenv("FSDP_VERSION", str(version))
    model = lora.patch_phi3(cases.make("fp32"))
    with pytest.raises(ValueError, match=advice) as error:
        lora.hf.AdapterCallback().on_init_end(args, None, None, model=model)
    assert ("version 1" in str(error.value)) == (version == 1)
    assert "save_pretrained" not in model.__dict__
