"""What test_kernels_distributed.py runs on every rank; started by torchrun, which sets the environment.

torchrun --standalone --nproc-per-node 2 tests/distributed_cases.py ddp|fsdp2|dtensor
"""

import faulthandler
import gc
import os
import sys
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

import lora


def make() -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(
        lora.MergedLinear(16, 24, 4, 8, 0.0, [True, False, True], merge_weights=False),
        nn.Tanh(),
        lora.Linear(24, 8, 4, 8, merge_weights=False),
    )
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter)
    lora.mark_only_lora_as_trainable(model)
    return model


def whole(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def shard(layer: nn.Module, mesh: DeviceMesh, placements: dict[str, Placement]) -> None:
    """Make every parameter of a layer a DTensor, replicated if it is not named."""
    for name, parameter in list(layer.named_parameters()):
        tensor = distribute_tensor(parameter.data, mesh, [placements.get(name, Replicate())])
        setattr(layer, name, nn.Parameter(tensor, requires_grad=parameter.requires_grad))


def step(model: nn.Module, x: torch.Tensor) -> dict[str, torch.Tensor]:
    model(x).square().mean().backward()
    named = ((n.removeprefix("module."), p) for n, p in model.named_parameters())
    return {name: whole(p.grad) for name, p in named if p.grad is not None}


def check(case: str) -> None:
    """The gradients of a half of the batch on each rank, reduced, are those of the whole batch."""
    rank, world = dist.get_rank(), dist.get_world_size()
    mesh = init_device_mesh("cpu", (world,))
    x = torch.randn(70 * world, 16, generator=torch.Generator().manual_seed(1))
    want = step(make(), x)
    model = make()
    if case == "dtensor":
        shard(model[0], mesh, {"weight": Shard(0), "bias": Shard(0), "lora_B": Replicate()})
        shard(model[2], mesh, {"weight": Shard(1), "lora_A": Shard(1)})
        got = step(model, distribute_tensor(x, mesh, [Replicate()]))
        model[2].lora_dropout.p = 0.5
        assert model[2](distribute_tensor(torch.ones(4, 24), mesh, [Replicate()])).shape == (4, 8)
    else:
        if case == "ddp":
            model = DistributedDataParallel(model)
        else:
            for layer in (model[0], model[2], model):
                fully_shard(layer, mesh=mesh)
        got = step(model, x.chunk(world)[rank])
    assert got.keys() == want.keys()
    for name in want:
        torch.testing.assert_close(got[name], want[name], rtol=1e-5, atol=1e-6)
    print(f"rank {rank} of {world}: {case}, LORA_KERNELS={os.environ.get('LORA_KERNELS')}: equal")


def main(case: str) -> None:
    faulthandler.dump_traceback_later(100, exit=True)  # a rank that is stuck says where
    dist.init_process_group("gloo", timeout=timedelta(seconds=60))
    check(case)
    gc.collect()  # a DDP module that outlives its process group can hang while it is freed
    dist.barrier()
    dist.destroy_process_group()
    # Threads that outlive the group can abort the interpreter while it shuts down ("terminate called
    # without an active exception", once in some hundred runs): what was to be said is said.
    sys.stdout.flush()
    os._exit(0)


if __name__ == "__main__":
    main(sys.argv[1])
