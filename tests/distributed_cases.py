"""What test_distributed.py runs on every process; torchrun can start it as well.

    torchrun --standalone --nproc-per-node 2 tests/distributed_cases.py FOLDER case [case ...]

Process 0 prints a line of JSON for every case that holds: the worst difference of losses and gradients
from one process on the same global batch. A process that is stuck is named by the barrier after its
case, and says where it is.
"""

import contextlib
import faulthandler
import functools
import gc
import json
import os
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from little_memory import at_most, held
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import parallelize_module
from torch.nn.parallel import DistributedDataParallel

import lora
import lora.distributed
import lora.tensor_parallel as tp
from lora._base import lora_layers
from lora.adapter.checkpoint import Checkpoint
from lora.kernels.nf4_tensor import NF4Tensor
from lora.sharded import reshard

HANGS = timedelta(seconds=600)  # also on a machine that does much else
# After which a process that did not arrive at the barrier behind a case is named.
STUCK = timedelta(seconds=int(os.environ.get("STUCK_SECONDS", HANGS.total_seconds())))
STEPS, ROWS, LENGTH, VOCABULARY = 3, 8, 12, 96
FOLDER = Path(sys.argv[1]) if len(sys.argv) > 1 else Path()
CASES: dict[str, Callable[[], dict[str, float]]] = {}
Found = dict[str, float]


def case(function: Callable[[], Found]) -> Callable[[], Found]:
    CASES[function.__name__] = function
    return function


def phi3(dtype: torch.dtype = torch.float32, device: str = "cpu", tied: bool = False) -> nn.Module:
    """A small Phi-3 with grouped heads, which 4 processes can share; random, the same everywhere."""
    from transformers import Phi3Config, Phi3ForCausalLM  # the layers' own cases do without

    torch.manual_seed(0)
    with torch.device(device):
        model = Phi3ForCausalLM(
            Phi3Config(
                vocab_size=VOCABULARY,
                hidden_size=64,
                intermediate_size=112,
                num_hidden_layers=2,
                num_attention_heads=8,
                num_key_value_heads=4,
                max_position_embeddings=128,
                pad_token_id=0,
                bos_token_id=1,
                eos_token_id=2,
                tie_word_embeddings=tied,
            )
        )
    return model.to(dtype)


def patched(
    dtype: torch.dtype = torch.float32, p: float = 0.0, fill: bool = True, **options: object
) -> nn.Module:
    options = {"target_modules": "all-linear", "r": 4, "lora_alpha": 8, **options}
    model = lora.patch_phi3(phi3(dtype), lora_dropout=p, **options)
    if fill:
        torch.manual_seed(1)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "lora_B" in name or "lora_bias" in name:
                    parameter.normal_(std=0.1)
    return model.train()


def mesh() -> DeviceMesh:
    return init_device_mesh("cpu", (dist.get_world_size(),))


def by_fsdp2(model: nn.Module, **options: object) -> nn.Module:
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh(), **options)
    return fully_shard(model, mesh=mesh(), **options)


def by_ddp(model: nn.Module) -> nn.Module:
    return DistributedDataParallel(model)


def by_tp(model: nn.Module) -> nn.Module:
    return parallelize_module(model, mesh(), tp.phi3_plan(model))


def batch(step: int) -> Tensor:
    generator = torch.Generator().manual_seed(100 + step)
    return torch.randint(3, VOCABULARY, (ROWS, LENGTH), generator=generator)


def my_rows(ids: Tensor) -> Tensor:
    return ids.chunk(dist.get_world_size())[dist.get_rank()]


def all_rows(ids: Tensor) -> Tensor:
    return ids


def whole(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def optimizer_of(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(lora.parameter_groups(model, 1e-2))


def gradients(model: nn.Module) -> dict[str, Tensor]:
    """Of the factors, as one process has them: through lora_state_dict, which knows their order."""
    held, found = {}, {}
    for _, layer in lora_layers(model):
        for parameter in layer.update_parameters().values():
            if parameter.grad is not None:
                held[parameter] = parameter.detach().clone()
    for parameter in held:
        parameter.detach().copy_(parameter.grad)
    found = {
        name.removeprefix("module."): value.clone()
        for name, value in lora.lora_state_dict(model).items()
    }
    for parameter, value in held.items():
        parameter.detach().copy_(value)
    return found


def loss_of(model: nn.Module, ids: Tensor) -> Tensor:
    return model(input_ids=ids, labels=ids, use_cache=False).loss


def train(
    model: nn.Module,
    rows: Callable[[Tensor], Tensor] = all_rows,
    optimizer: torch.optim.Optimizer | None = None,
    steps: range = range(STEPS),
) -> tuple[list[float], dict[str, Tensor]]:
    """Losses of the global batches, and the gradients of the first one."""
    optimizer = optimizer or optimizer_of(model)
    losses, first = [], {}
    for step in steps:
        loss = loss_of(model, rows(batch(step)))
        loss.backward()
        if step == steps[0]:
            first = gradients(model)
        optimizer.step()
        optimizer.zero_grad()
        mean = loss.detach().clone()
        if rows is my_rows:
            dist.all_reduce(mean)
            mean /= dist.get_world_size()
        losses.append(mean.item())
    return losses, first


def differences(got: tuple, want: tuple) -> Found:
    """The worst, relative to the largest of each tensor."""
    assert got[1].keys() == want[1].keys() != set()
    assert any(gradient.abs().max() > 1e-4 for gradient in want[1].values())
    return {
        "loss": max(abs(a - b) / abs(b) for a, b in zip(got[0], want[0], strict=True)),
        "gradient": max(
            ((got[1][name] - value).abs().max() / value.abs().max().clamp(min=1e-8)).item()
            for name, value in want[1].items()
        ),
    }


def equal(engine: Callable[[nn.Module], nn.Module], **options: object) -> Found:
    """The engine against one process on the same batches, and against itself with dropout."""
    rows = all_rows if engine is by_tp else my_rows
    found = differences(train(engine(patched(**options)), rows), train(patched(**options)))
    runs = []
    for _ in range(2):
        model = engine(patched(p=0.2, **options))
        torch.manual_seed(5 + dist.get_rank())
        runs.append(train(model, rows))
    (losses, first), (again, first_again) = runs
    assert losses == again
    assert all(torch.equal(first[name], first_again[name]) for name in first)
    reached = [None] * dist.get_world_size()
    dist.all_gather_object(reached, losses)
    assert all(other == losses for other in reached)
    assert losses != train(engine(patched(**options)), rows)[0], "dropout does nothing"
    return found


@case
def ddp() -> Found:
    return equal(by_ddp)


@case
def fsdp2() -> Found:
    return equal(by_fsdp2)


@case
def fsdp2_offload() -> Found:
    return equal(lambda m: by_fsdp2(m, offload_policy=CPUOffloadPolicy(pin_memory=False)))


@case
def fsdp2_bf16_base() -> Found:
    return equal(by_fsdp2, dtype=torch.bfloat16)


@case
def fsdp2_mixed_precision() -> Found:
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    return equal(lambda m: by_fsdp2(m, mp_policy=policy))


@case
def ddp_nf4() -> Found:
    return equal(by_ddp, quantize="nf4")


@case
def fsdp2_nf4() -> Found:
    """A 4-bit base in parts: each process has its rows' codes, and state dicts are one process's."""
    found = equal(by_fsdp2, quantize="nf4")
    one, model = patched(quantize="nf4"), by_fsdp2(patched(quantize="nf4"))
    weights = [(m.weight, model.get_submodule(n).weight) for n, m in lora_layers(one)]
    for weight, part in weights:
        assert isinstance(part.to_local(), NF4Tensor)
        assert part.to_local().packed.numel() * dist.get_world_size() == weight.packed.numel()
    want, got = one.state_dict(), model.state_dict()
    assert got.keys() == want.keys()
    assert all(torch.equal(whole(got[name]), value) for name, value in want.items())
    loss = loss_of(model, batch(0)).item()
    state = {name: value.clone() for name, value in got.items()}
    for _, part in weights:
        part.to_local().packed.zero_()
    assert loss_of(model, batch(0)).item() != loss
    for values in (state, {n: v for n, v in want.items() if "_proj.weight" in n}):
        reshard(model)
        model.load_state_dict(values, strict=values is state)
        assert loss_of(model, batch(0)).item() == loss
        reshard(model)
        for _, part in weights:
            part.to_local().absmax.zero_()
    offload = CPUOffloadPolicy(pin_memory=False)
    assert (
        loss_of(by_fsdp2(patched(quantize="nf4"), offload_policy=offload), batch(0)).item() == loss
    )
    narrow = nn.Sequential(lora.LinearNF4.from_module(nn.Linear(8, 4 * dist.get_world_size())))
    with pytest.raises(ValueError, match=r"4 rows of an NF4 weight .* are 32 elements: .*of 64"):
        fully_shard(narrow, mesh=mesh())
    with pytest.raises(ValueError, match=r"4-bit weight, whose .*fully_shard"):
        by_tp(patched(quantize="nf4"))
    return found


@case
def tensor_parallel() -> Found:
    return equal(by_tp)


@case
def checkpointed() -> Found:
    """Activation checkpointing draws the masks again: the gradients are those without it."""
    worst: Found = {"loss": 0.0, "gradient": 0.0}
    for name, engine in ENGINES.items():
        runs = []
        for on in (False, True):
            model = patched(p=0.2)
            if on:
                model.gradient_checkpointing_enable({"use_reentrant": False})
            model = engine(model)
            torch.manual_seed(5 + dist.get_rank())
            runs.append(train(model, rows_of(name)))
        found = differences(runs[1], runs[0])
        worst = {key: max(value, found[key]) for key, value in worst.items()}
    return worst


ENGINES = {"ddp": by_ddp, "fsdp2": by_fsdp2, "tensor_parallel": by_tp}


def rows_of(name: str) -> Callable[[Tensor], Tensor]:
    return all_rows if name == "tensor_parallel" else my_rows


@case
def files() -> Found:
    """Adapters and state dicts of every engine are one process's, to the bit, both ways."""
    one = patched()
    want = lora.lora_state_dict(one)
    if dist.get_rank() == 0:
        lora.save_adapter(one, FOLDER / "one")
    dist.barrier()
    for name, engine in ENGINES.items():
        model = engine(patched())
        folder = FOLDER / name
        lora.save_adapter(model, folder)
        dist.barrier()
        there, here = (lora.adapter.read_adapter(f).checked() for f in (FOLDER / "one", folder))
        assert there.layers.keys() == here.layers.keys()
        for key, tensor in there.tensors().items():
            assert torch.equal(tensor, here.tensors()[key]), (name, key)
        for key, layer in there.layers.items():
            assert layer.fingerprint == here.layers[key].fingerprint is not None, (name, key)
        inner = model.module if name == "ddp" else model
        with torch.no_grad():
            for own in lora.lora_state_dict(inner):
                inner.get_parameter(own).zero_()
        report = lora.load_adapter(model, FOLDER / "one")
        assert (report.base, report.problems) == ("matches", ()), (name, str(report))
        got = lora.lora_state_dict(inner)
        assert got.keys() == want.keys()
        assert all(torch.equal(got[key], want[key]) for key in want), name
        # A plain state dict goes in as well; a whole one of a tensor-parallel model is in order.
        inner.load_state_dict({key: 2 * value for key, value in want.items()}, strict=False)
        got = lora.lora_state_dict(inner)
        assert all(torch.equal(got[key], 2 * want[key]) for key in want), name
        state = {key: whole(value) for key, value in inner.state_dict().items()}
        plain = one.state_dict()
        assert all(torch.equal(state[key], plain[key]) for key in plain if "lora_" not in key), name
        inner.load_state_dict(inner.state_dict())
        got = lora.lora_state_dict(inner)
        assert all(torch.equal(got[key], 2 * want[key]) for key in want), name
    return {}


@case
def save_states() -> Found:
    """Two steps in every engine, a checkpoint by torch.distributed.checkpoint, a third step."""
    for name, engine in ENGINES.items():
        model = engine(patched())
        optimizer = optimizer_of(model)
        train(model, rows_of(name), optimizer, range(2))
        state = {"train": lora.distributed.TrainingState(model, optimizer)}
        saved = FOLDER / f"state-{name}-of-{dist.get_world_size()}"
        dcp.save(state, checkpoint_id=saved)
        losses, _ = train(model, rows_of(name), optimizer, range(2, 5))
        if dist.get_rank() == 0:
            saved.with_suffix(".json").write_text(json.dumps(losses))
    return {}


@case
def load_states() -> Found:
    """Resume from each with the same losses: in every engine, or in another number of processes."""
    worst = 0.0
    found = sorted(FOLDER.glob("state-*.json"))
    assert found
    engines = list(ENGINES)
    for number, saved in enumerate(found):
        want = json.loads(saved.read_text())
        same = f"of-{dist.get_world_size()}" in saved.stem
        for name in engines if same else [engines[(number + 1) % len(engines)]]:
            engine = ENGINES[name]
            model = engine(patched(fill=False))
            optimizer = optimizer_of(model)
            state = {"train": lora.distributed.TrainingState(model, optimizer)}
            dcp.load(state, checkpoint_id=saved.with_suffix(""))
            losses, _ = train(model, rows_of(name), optimizer, range(2, 5))
            gap = max(abs(a - b) / abs(b) for a, b in zip(losses, want, strict=True))
            assert gap < 1e-5, (saved, name, losses, want)
            worst = max(worst, gap)
    return {"loss": worst}


def base_folder(model: nn.Module) -> Path:
    folder = FOLDER / ("tied" if model.config.tie_word_embeddings else "base")
    if dist.get_rank() == 0:
        model.save_pretrained(folder, max_shard_size="60KB")
    dist.barrier()
    return folder


@case
def from_meta() -> Found:
    """A model from the meta device, filled in shards, is the one that was loaded and patched."""
    folder = base_folder(phi3())
    worst = 0.0
    variants: tuple[dict[str, object], ...] = (
        {},
        {"use_dora": True, "target_modules": ("qkv_proj", "gate_up_proj")},
        {"init_lora_weights": "pissa"},
    )
    for options in variants:
        options = {"target_modules": "all-linear", "r": 4, "lora_alpha": 8, **options}
        one = phi3()
        torch.manual_seed(1)
        lora.patch_phi3(one, lora_dropout=0.0, **options)
        want = {key: value.clone() for key, value in one.state_dict().items()}
        losses, _ = train(one)
        for name in ("fsdp2", "tensor_parallel"):
            model = phi3(device="meta")
            model.model.rotary_emb = type(model.model.rotary_emb)(config=model.config)
            lora.patch_phi3(model, lora_dropout=0.0, **options)
            model = ENGINES[name](model)
            torch.manual_seed(1 if dist.get_rank() == 0 else 77)  # the first process draws
            lora.distributed.load_sharded(model, folder)
            got = {key: whole(value) for key, value in model.state_dict().items()}
            assert got.keys() == want.keys()
            for key, value in got.items():
                torch.testing.assert_close(value, want[key], rtol=1e-6, atol=1e-7, msg=key)
            mine, _ = train(model, rows_of(name))
            worst = max(worst, *(abs(a - b) / b for a, b in zip(mine, losses, strict=True)))
    return {"loss": worst}


@case
def originals() -> Found:
    """What trains in full has its frozen original filled too, though others are tied to that."""
    ids, worst = batch(0), 0.0
    for tied, full in ((False, "lm_head"), (True, "embed_tokens")):
        folder = base_folder(phi3(tied=tied))
        with torch.no_grad():
            want = phi3(tied=tied)(input_ids=ids, use_cache=False).logits
        for name in ("fsdp2", "tensor_parallel"):
            model = phi3(device="meta", tied=tied)
            model.model.rotary_emb = type(model.model.rotary_emb)(config=model.config)
            lora.patch_phi3(model, lora_dropout=0.0, modules_to_save=[full])
            model = ENGINES[name](model)
            lora.distributed.load_sharded(model, folder)
            for of_which in (contextlib.nullcontext(), lora.disabled(model)):
                with torch.no_grad(), of_which:
                    got = model(input_ids=ids, use_cache=False).logits
                worst = max(worst, ((got - want).abs().max() / want.abs().max()).item())
    return {"logits": worst}


@case
def variants() -> Found:
    """The variants under every engine; what cannot be dealt is refused by name."""
    worst: Found = {"loss": 0.0, "gradient": 0.0}
    not_rows = ("qkv_proj", "gate_up_proj")
    for options in (
        {"use_dora": True, "target_modules": not_rows},
        {"init_lora_weights": "pissa"},
        {"lora_bias": True, "use_rslora": True},
        {"use_lorafa": True, "enable_qkv": (True, False, True)},
    ):
        want = train(patched(**options))
        for name, engine in ENGINES.items():
            got = train(engine(patched(**options)), rows_of(name))
            found = differences(got, want)
            worst = {key: max(value, found[key]) for key, value in worst.items()}
            if name != "ddp":
                with torch.no_grad():
                    file = FOLDER / f"{next(iter(options))}-{name}"
                    lora.save_adapter(engine(patched(**options)), file)
                dist.barrier()
                fresh = phi3()
                lora.load_adapter(fresh, file)
                there, here = lora.lora_state_dict(fresh), lora.lora_state_dict(patched(**options))
                assert there.keys() == here.keys()
                for key, value in here.items():
                    torch.testing.assert_close(there[key], value, rtol=1e-6, atol=1e-6, msg=key)
    return worst


@case
def memory() -> Found:
    """From a checkpoint into shards: a process grows by its shards, and every byte is read once."""
    folder, side, count = FOLDER / "large", 2048, 12
    weights = {f"{i}.weight": torch.randn(side, side) for i in range(count)}
    size = sum(tensor.nbytes for tensor in weights.values())
    if dist.get_rank() == 0:
        folder.mkdir(exist_ok=True)
        save_file(weights, folder / "model.safetensors")
    del weights
    dist.barrier()
    with torch.device("meta"):
        model = nn.Sequential(*(nn.Linear(side, side, bias=False) for _ in range(count)))
    lora.patch(model, "all-linear", r=4, lora_alpha=8)
    for layer in model:
        fully_shard(layer, mesh=mesh())
    fully_shard(model, mesh=mesh())
    read, original = [0], Checkpoint.rows

    def counted(self: Checkpoint, name: str, start: int, stop: int) -> Tensor:
        rows = original(self, name, start, stop)
        read[0] += rows.nbytes
        return rows

    Checkpoint.rows = counted
    share = size // dist.get_world_size()
    with at_most(share + 8 * side * side) as before:  # its shards and two layers
        lora.distributed.load_sharded(model, folder)
    assert held() - before > 0.9 * share
    Checkpoint.rows = original
    total = torch.tensor(read)
    dist.all_reduce(total)
    assert total.item() == size
    lora.save_adapter(model, FOLDER / "of-large")  # of layers that are sharded each by itself
    if dist.get_rank() == 0:
        found = lora.adapter.read_adapter(FOLDER / "of-large").checked().layers
        assert [layer.kind for layer in found.values()] == ["Linear"] * count
    lora.summary(model)
    return {}


@contextlib.contextmanager
def refused(kind: type[Exception], *words: str) -> Iterator[None]:
    with pytest.raises(kind) as caught:
        yield
    assert all(word in str(caught.value) for word in words), caught.value


@case
def refusals() -> Found:
    with refused(ValueError, "fully_shard on a merged Linear", "model.train()"):
        fully_shard(lora.Linear(8, 8, 2).eval(), mesh=mesh())
    with refused(ValueError, "merged Linear", "model.train()"):
        parallelize_module(lora.Linear(8, 8, 2).eval(), mesh(), tp.ColumnParallel())
    dora, uneven = patched(use_dora=True), phi3()
    uneven.model.layers[1].mlp.down_proj = nn.Linear(mesh().size() + 1, 32)
    with refused(ValueError, "layers.0.self_attn.o_proj", "use_dora", "row-parallel"):
        by_tp(dora)
    with refused(ValueError, "model.layers.1.mlp.down_proj: in_features", "nothing was dealt"):
        by_tp(uneven)
    assert not any(isinstance(p, DTensor) for m in (dora, uneven) for p in m.parameters())
    assert uneven.model.layers[0].self_attn.config is uneven.config
    with refused(TypeError, "Conv2d", "lora.Linear"):
        parallelize_module(lora.Conv2d(4, 4, 1, 2), mesh(), tp.RowParallel())
    odd = mesh().size() + 1
    with refused(ValueError, f"a part of {odd} rows"):
        parallelize_module(lora.Linear(8, odd, 2), mesh(), tp.ColumnParallel())
    with refused(ValueError, f"in_features={odd}"):
        parallelize_module(lora.Linear(odd, 8, 2), mesh(), tp.RowParallel())
    with refused(ValueError, "splits=[4, 4]", "expected the same parts"):
        layer = lora.MergedLinear(8, 12, 2, enable_lora=[True, True, True])
        parallelize_module(layer, mesh(), tp.ColumnParallel([4, 4]))
    heads = phi3()
    heads.model.layers[0].self_attn.config.num_key_value_heads = odd
    with refused(ValueError, f"num_key_value_heads={odd}"):
        parallelize_module(heads, mesh(), {"model.layers.0.self_attn": tp.LocalHeads()})
    for name in ("fsdp2", "tensor_parallel"):
        model = ENGINES[name](patched())
        for change in (
            lambda model=model: lora.unpatch(model),
            lambda model=model: lora.unpatch(model, merge=True),
            lambda model=model: lora.merged_state_dict(model),
            lambda model=model: lora.set_adapter(model, "default"),
            lambda model=model: lora.load_adapter(model, FOLDER / "one", name="another"),
        ):
            with refused(ValueError, "is sharded"):
                change()
        with refused(ValueError, "another adapter", "lora_A is missing"):
            state = lora.distributed.TrainingState(model, optimizer_of(model))
            state.load_state_dict({"parameters": {"other": torch.ones(1)}, "optimizer": {}})
        plain = ENGINES[name](phi3())
        with refused(TypeError, "proj", "sharded over processes"):
            lora.patch_phi3(plain)
    model = by_fsdp2(patched())
    blocked = FOLDER / "a-file"
    blocked.touch()
    first = dist.get_rank() == 0
    with refused(
        OSError if first else RuntimeError, "it is a file" if first else "another process"
    ):
        lora.save_adapter(model, blocked)
    with refused(FileNotFoundError if not first else RuntimeError):
        lora.load_adapter(model, FOLDER / ("one" if first else "nowhere"))
    two = patched()
    with torch.no_grad():
        two.model.layers[0].mlp.down_proj.lora_B.mul_(2)
    if first:
        lora.save_adapter(two, FOLDER / "two")
    dist.barrier()
    before = lora.lora_state_dict(model)
    with refused(
        RuntimeError if first else ValueError,
        "another process" if first else "not the adapter that the first process has",
    ):
        lora.load_adapter(model, FOLDER / ("one" if first else "two"))
    assert all(torch.equal(v, before[k]) for k, v in lora.lora_state_dict(model).items())
    folder = base_folder(phi3())
    whole_buffers = phi3(device="meta")
    whole_buffers.model.rotary_emb = type(model.model.rotary_emb)(config=model.config)
    whole_buffers = by_fsdp2(whole_buffers)
    with refused(RuntimeError if first else ValueError, "another" if first else "nowhere"):
        lora.distributed.load_sharded(whole_buffers, folder if first else FOLDER / "nowhere")
    with refused(ValueError, "nothing was read", "not on the meta device"):
        lora.distributed.load_sharded(model, folder)
    meta = phi3(device="meta")
    with refused(ValueError, "the buffer model.rotary_emb.inv_freq", "nothing was read"):
        lora.distributed.load_sharded(by_fsdp2(meta), folder)
    return {}


@case
def evaluates_alone() -> Found:
    """In eval mode a sharded layer does not merge, says so once, and computes the same."""
    ids = batch(0)
    one = patched(merge_weights=True).eval()
    with torch.no_grad():
        want = one(input_ids=ids, use_cache=False).logits
    worst = 0.0
    for name in ("fsdp2", "tensor_parallel"):
        model = ENGINES[name](patched(merge_weights=True))
        lora.sharded.say_once.cache_clear()
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            if dist.get_rank() == 0:  # alone: nothing to wait for
                model.eval()
            dist.barrier()
            model.eval()
            with torch.no_grad():
                for _ in range(2):
                    logits = model(input_ids=ids, use_cache=False).logits
        said = [w for w in caught if "not merged in eval mode" in str(w.message)]
        assert len(said) == 1, [str(w.message) for w in caught]
        assert not any(layer.merged for _, layer in lora_layers(model))
        with lora.merged(model), torch.no_grad():
            again = model(input_ids=ids, use_cache=False).logits
        assert torch.equal(again, logits)
        with lora.disabled(model), torch.no_grad():
            base = model(input_ids=ids, use_cache=False).logits
        with lora.disabled(one), torch.no_grad():
            torch.testing.assert_close(base, one(input_ids=ids, use_cache=False).logits)
        worst = max(worst, ((logits - want).abs().max() / want.abs().max()).item())
        tokens = model.generate(ids[:1], max_new_tokens=4, do_sample=False)
        assert torch.equal(tokens, one.generate(ids[:1], max_new_tokens=4, do_sample=False))
    return {"logits": worst}


@case
def one_is_stuck() -> Found:
    """For the test of the time-out: the barrier after this case must name process 1."""
    if dist.get_rank() == 1:
        time.sleep(600)
    return {}


# The layers themselves, on the kernels that LORA_KERNELS names.


def two_layers(parts: bool = True) -> nn.Module:
    torch.manual_seed(0)
    enabled = [True, False, True] if parts else [True]
    model = nn.Sequential(
        lora.MergedLinear(16, 24, 4, 8, 0.0, enabled, merge_weights=False),
        nn.Tanh(),
        lora.Linear(24, 8, 4, 8, merge_weights=False),
    )
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter)
    lora.mark_only_lora_as_trainable(model)
    return model


def shard(layer: nn.Module, placements: dict[str, Placement]) -> None:
    """Make every parameter of a layer a DTensor, replicated if it is not named."""
    for name, parameter in list(layer.named_parameters()):
        tensor = distribute_tensor(parameter.data, mesh(), [placements.get(name, Replicate())])
        setattr(layer, name, nn.Parameter(tensor, requires_grad=parameter.requires_grad))


def step(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    model(x).square().mean().backward()
    named = ((n.removeprefix("module."), p) for n, p in model.named_parameters())
    return {name: whole(p.grad) for name, p in named if p.grad is not None}


def layers_under(engine: str) -> Found:
    x = torch.randn(70 * mesh().size(), 16, generator=torch.Generator().manual_seed(1))
    parts = engine != "tensor_parallel"  # which deals each part: the next layer would not fit
    want, model = step(two_layers(parts), x), two_layers(parts)
    if engine == "dtensor":
        shard(model[0], {"weight": Shard(0), "bias": Shard(0), "lora_B": Replicate()})
        shard(model[2], {"weight": Shard(1), "lora_A": Shard(1)})
        got = step(model, distribute_tensor(x, mesh(), [Replicate()]))
        model[2].lora_dropout.p = 0.5
        ones = distribute_tensor(torch.ones(4, 24), mesh(), [Replicate()])
        assert model[2](ones).shape == (4, 8)
    elif engine == "tensor_parallel":
        parallelize_module(model, mesh(), {"0": tp.ColumnParallel(), "2": tp.RowParallel()})
        got = step(model, x)
        masks_of_a_row_parallel_layer_differ()
    else:
        if engine == "ddp":
            model = DistributedDataParallel(model)
        else:
            for layer in (model[0], model[2], model):
                fully_shard(layer, mesh=mesh())
        got = step(model, my_rows(x))
    assert got.keys() == want.keys()
    for name in want:
        torch.testing.assert_close(got[name], want[name], rtol=1e-5, atol=1e-6)
    return {}


def masks_of_a_row_parallel_layer_differ() -> None:
    """From one process to the next, from one step to the next; all processes see the same output."""
    n = mesh().size()
    layer = lora.Linear(32 * n, 32 * n, r=32 * n, lora_alpha=32 * n, lora_dropout=0.5, bias=False)
    with torch.no_grad():
        layer.weight.zero_()
        layer.lora_A.copy_(torch.eye(32 * n))
        layer.lora_B.copy_(torch.eye(32 * n))
    parallelize_module(layer, mesh(), tp.RowParallel())
    outputs = [layer(torch.ones(1, 32)).detach() for _ in range(2)]  # this process's part of x
    masks = [part for y in outputs for part in y.view(n, 32)]
    assert all(set(mask.tolist()) == {0.0, 2.0} for mask in masks)
    for i, mask in enumerate(masks):
        assert not any(torch.equal(mask, other) for other in masks[:i])
    seen = [None] * n
    dist.all_gather_object(seen, outputs[0].tolist())
    assert all(other == seen[0] for other in seen)


for _engine in ("ddp", "fsdp2", "dtensor", "tensor_parallel"):
    CASES[f"layers_{_engine}"] = functools.partial(layers_under, _engine)


def main(names: list[str]) -> None:
    rank = int(os.environ["RANK"])
    torch.set_num_threads(1)
    dist.init_process_group("gloo", timeout=HANGS)
    for name in names:
        faulthandler.dump_traceback_later(HANGS.total_seconds() * 0.9)  # says where it is stuck
        found = CASES[name]()
        faulthandler.cancel_dump_traceback_later()
        gc.collect()  # a DDP module that outlives its process group can hang while it is freed
        dist.monitored_barrier(timeout=STUCK, wait_all_ranks=True)
        if rank == 0:
            print(json.dumps({"case": name, "ranks": dist.get_world_size(), **found}), flush=True)
    dist.destroy_process_group()
    # Threads that outlive the group can abort the interpreter while it shuts down ("terminate called
    # without an active exception", once in some hundred runs): what was to be said is said.
    sys.stdout.flush()
    os._exit(0)


if __name__ == "__main__":
    main(sys.argv[2:])
