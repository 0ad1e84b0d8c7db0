"""Real processes, by gloo: each case of distributed_cases.py equals one process, under every engine.

One launch runs many cases, because starting takes longer than they do. A later launch, with another
number of processes, goes on from what the earlier ones saved.
"""

import copy
import functools
import json
import tempfile
from pathlib import Path

import pytest
import scripts
import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch import nn

import lora
import lora.distributed
import lora.tensor_parallel

BOUND = 1e-5  # in fp32, relative
HALF = 3e-2  # in bf16, whose sums are rounded in another order
CASES = {
    2: (
        *("ddp_nf4", "fsdp2_nf4"),
        *("ddp", "fsdp2", "fsdp2_offload", "fsdp2_bf16_base", "fsdp2_mixed_precision"),
        *(
            "tensor_parallel",
            "checkpointed",
            "variants",
            "files",
            "save_states",
            "load_states",
            "from_meta",
            "originals",
        ),
        *("memory", "refusals", "evaluates_alone"),
        *("layers_ddp", "layers_fsdp2", "layers_dtensor", "layers_tensor_parallel"),
    ),
    # Where two prove less: other shards, one key-value head each, another number of processes.
    4: ("fsdp2", "tensor_parallel", "files", "load_states", "save_states", "fsdp2_nf4"),
    1: ("load_states",),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("processes")


def launch(ranks: int, folder: Path, *cases: str, **environment: str) -> tuple[dict, str]:
    """What each case found, and all that was printed. A process that fails takes the others along."""
    running = scripts.start_ranks(
        ranks,
        Path(__file__).with_name("distributed_cases.py"),
        *(folder, *cases),
        folder=Path(tempfile.mkdtemp(dir=folder)),
        environment=environment,
        fresh="TRITON_INTERPRET" in environment,  # which triton reads when it is imported
    )
    status = scripts.wait_for_all(running)
    output = "".join(script.stdout + script.stderr for script in running)
    lines = [json.loads(line) for line in output.splitlines() if line.startswith("{")]
    return {line["case"]: line for line in lines}, f"{output}exit status: {status}"


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


# In this very process


def small(dtype=torch.float32, device="cpu"):
    torch.manual_seed(0)
    with torch.device(device):
        return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 4, bias=False)).to(dtype)


def steps(model, optimizer, count):
    losses = []
    for number in range(count):
        x = torch.randn(5, 6, generator=torch.Generator().manual_seed(number))
        loss = model(x).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def test_the_state_of_one_process_goes_through_torch_save(tmp_path):
    def begin(seed):
        torch.manual_seed(seed)
        model = lora.patch(small(), ["0", "2"], r=2, lora_alpha=4, bias="all")
        return model, torch.optim.AdamW(lora.parameter_groups(model, 1e-2))

    model, optimizer = begin(1)
    steps(model, optimizer, 3)
    torch.save(lora.distributed.TrainingState(model, optimizer).state_dict(), tmp_path / "state.pt")
    want = steps(model, optimizer, 3)
    model, optimizer = begin(2)
    state = torch.load(tmp_path / "state.pt", weights_only=True)
    assert set(state["parameters"]) == {
        *("0.lora_A", "0.lora_B", "0.bias", "2.lora_A", "2.lora_B"),
    }
    lora.distributed.TrainingState(model, optimizer).load_state_dict(state)
    assert steps(model, optimizer, 3) == want


def adapted(seed=1, **options):
    torch.manual_seed(seed)
    return lora.patch(small(), ["0", "2"], r=2, lora_alpha=4, **options)


def test_saving_a_state_before_the_first_step_changes_nothing():
    model, same = adapted(), adapted()
    optimizers = [torch.optim.AdamW(m.parameters(), 1e-2) for m in (model, same)]
    state = copy.deepcopy(lora.distributed.TrainingState(model, optimizers[0]).state_dict())
    assert not optimizers[0].state
    want = steps(same, optimizers[1], 3)
    assert steps(model, optimizers[0], 3) == want
    model = adapted(seed=2)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
    lora.distributed.TrainingState(model, optimizer).load_state_dict(state)
    assert steps(model, optimizer, 3) == want


@pytest.mark.parametrize("stepped", [False, True])
def test_a_state_is_saved_and_loaded_between_backward_and_step(stepped):
    model = adapted()
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
    steps(model, optimizer, 2)
    state = copy.deepcopy(lora.distributed.TrainingState(model, optimizer).state_dict())
    want = steps(model, optimizer, 3)
    model = adapted(seed=2)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
    if stepped:
        steps(model, optimizer, 1)
    model(torch.ones(5, 6)).sum().backward()
    gradients = [p.grad for p in model.parameters()]
    training = lora.distributed.TrainingState(model, optimizer)
    training.state_dict()
    training.load_state_dict(state)
    assert all(p.grad is g for p, g in zip(model.parameters(), gradients, strict=True))
    optimizer.zero_grad()
    assert steps(model, optimizer, 3) == want


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda m: torch.optim.SGD(m.parameters(), 1e-2, momentum=0.9), r"momentum_buffer"),
        (lambda m: torch.optim.AdamW(m.parameters(), 1e-2, amsgrad=True), r"max_exp_avg_sq"),
        (
            lambda m: torch.optim.AdamW(lora.parameter_groups(m, 1e-2, lr_ratio=4)),
            r"1 groups of Parameters, here 2",
        ),
        (
            lambda m: torch.optim.AdamW([m[0].lora_A, m[0].lora_B, m[2].lora_A], 1e-2),
            r"its groups have other Parameters",
        ),
    ],
)
def test_a_state_of_another_optimizer_changes_nothing(make, words):
    model, other = adapted(), adapted(seed=2)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
    steps(model, optimizer, 1)
    state = lora.distributed.TrainingState(model, optimizer).state_dict()
    before = {name: value.clone() for name, value in other.state_dict().items()}
    wrong = make(other)
    with pytest.raises(ValueError, match=rf"a state of another optimizer: .*{words}"):
        lora.distributed.TrainingState(other, wrong).load_state_dict(state)
    assert all(torch.equal(other.state_dict()[name], value) for name, value in before.items())
    assert not wrong.state


def test_a_state_of_another_adapter_changes_nothing():
    model = lora.patch(small(), ["0"], r=2, lora_alpha=4)
    other = lora.patch(small(), ["0"], r=3, lora_alpha=4)
    before = {name: value.clone() for name, value in other.state_dict().items()}
    state = lora.distributed.TrainingState(model, torch.optim.AdamW(model.parameters()))
    with pytest.raises(ValueError, match=r"0\.lora_A is \(2, 6\), in the model \(3, 6\)"):
        lora.distributed.TrainingState(
            other, torch.optim.AdamW(other.parameters())
        ).load_state_dict(state.state_dict())
    assert all(torch.equal(other.state_dict()[name], value) for name, value in before.items())


def test_a_checkpoint_fills_a_model_from_the_meta_device(tmp_path):
    base = small()
    save_file(base.state_dict(), tmp_path / "model.safetensors")
    torch.manual_seed(3)
    want = lora.patch(base, ["0"], r=2, lora_alpha=4).state_dict()
    model = lora.patch(small(device="meta"), ["0"], r=2, lora_alpha=4)
    torch.manual_seed(3)
    lora.distributed.load_sharded(model, tmp_path)
    got = model.state_dict()
    assert got.keys() == want.keys()
    assert all(torch.equal(got[name], want[name]) for name in want)
    assert [n for n, p in model.named_parameters() if p.requires_grad] == ["0.lora_A", "0.lora_B"]


def test_what_trains_in_full_has_its_original_filled(tmp_path):
    base = small()
    save_file(base.state_dict(), tmp_path / "model.safetensors")
    model = small(device="meta")
    lora.patch(model, ["0"], r=2, lora_alpha=4, modules_to_save=["2"])
    lora.distributed.load_sharded(model, tmp_path)
    x = torch.randn(5, 6)
    with lora.disabled(model):
        assert torch.equal(model(x), base(x))


def test_a_model_in_data_parallel_is_not_unpatched(tmp_path):
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        model = nn.parallel.DistributedDataParallel(adapted())
        with pytest.raises(ValueError, match=r"DistributedDataParallel.* model\.module"):
            lora.unpatch(model)
    finally:
        dist.destroy_process_group()


def test_a_checkpoint_that_does_not_fit_is_refused_before_it_is_read(tmp_path):
    state = small().state_dict()
    state["2.weight"] = torch.ones(5, 8)
    del state["0.bias"]
    save_file(state, tmp_path / "model.safetensors")
    model = small(device="meta")
    model.register_buffer("table", torch.empty(2, device="meta"))
    with pytest.raises(lora.AdapterError) as caught:
        lora.distributed.load_sharded(model, tmp_path)
    for words in (
        "missing tensor 0.bias",
        "2.weight is (5, 8), in the model (4, 8)",
        "the buffer table is on the meta device",
        "nothing was read",
    ):
        assert words in str(caught.value)
    assert all(p.is_meta for p in model.parameters())


def test_parameters_that_deepspeed_has_partitioned_are_refused_by_name():
    def partition(parameter):  # as ZeRO stage 3 does outside of a module's forward
        parameter.ds_id, parameter.data = 7, torch.empty(0)

    model = small()
    partition(model[0].weight)
    with pytest.raises(TypeError, match=r"0: .*\(DeepSpeed ZeRO-3\).*before an engine"):
        lora.patch(model, ["0"], r=2, lora_alpha=4)
    model = lora.patch(small(), ["0"], r=2, lora_alpha=4)
    partition(model[0].lora_B)
    with pytest.raises(lora.AdapterError, match=r"0\.lora_B cannot be read: .*GatheredParameters"):
        lora.save_adapter(model, "nowhere")
    for what in (lora.lora_state_dict, lora.merged_state_dict, lora.unpatch):
        with pytest.raises(ValueError, match=r"GatheredParameters|0 is sharded"):
            what(model)


def test_the_rows_of_parts_are_dealt_to_each_process():
    dealing = lora.tensor_parallel._dealing((4, 2, 2), 2)
    assert dealing.tolist() == [0, 1, 4, 6, 2, 3, 5, 7]
