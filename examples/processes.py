"""One process, or several under torchrun: which one this is, what all agree on, how a model is shared.

    python finetune_phi3.py                                              one
    torchrun --nproc-per-node 4 finetune_phi3.py [--parallel fsdp2]      four

The batch sizes of the configuration are those of all processes together: every batch is dealt row by
row, so a run computes the same in any number of them. The first process alone prints and writes. A
process that dies takes the others with it, within seconds; one that is stuck, after PATIENCE.
"""

from __future__ import annotations

import contextlib
import gc
import os
import sys
from collections.abc import Iterator, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from chat_data import InputError
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.nn.parallel import DistributedDataParallel

PATIENCE = timedelta(minutes=5)  # with a process that does not take part in what all do together
LONG_WORK = timedelta(hours=2)  # with the first one, while it does alone what the others wait for

_T = TypeVar("_T")
_waiting: list[Any] = []  # the group in which the others wait for the first


def start() -> None:
    """Join the other processes, if torchrun has started this one."""
    if "RANK" not in os.environ or dist.is_initialized():
        return
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    dist.init_process_group(backend, timeout=PATIENCE)
    _waiting.append(dist.new_group(backend="gloo", timeout=LONG_WORK))


def stop(status: int) -> int:
    """Leave the others, in good order if all is done; the exit status."""
    if dist.is_initialized():
        if status == 0:
            gc.collect()  # a DDP module that outlives its process group can hang while it is freed
            dist.barrier()
            dist.destroy_process_group()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)  # threads that outlive the group can abort the interpreter's shutdown
    return status


def count() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def is_first() -> bool:
    return rank() == 0


def share(rows: Sequence[_T]) -> Sequence[_T]:
    """This process's rows of a batch; a batch of few rows may have none for it."""
    return rows[rank() :: count()]


def total(*values: float) -> list[float]:
    """Sums over all processes."""
    if count() == 1:
        return list(values)
    sums = torch.tensor(values, dtype=torch.float64)
    dist.all_reduce(sums)
    return sums.tolist()


def most(value: float) -> float:
    """The largest of all processes."""
    return max(every(value))


def every(value: _T) -> list[_T]:
    """The value of each process, by rank."""
    if count() == 1:
        return [value]
    values: list[Any] = [None] * count()
    dist.all_gather_object(values, value)
    return values


@contextlib.contextmanager
def first_alone() -> Iterator[bool]:
    """True in the first process; the others get False and leave the block when it has.

    If it raises there, torchrun ends the others.
    """
    yield is_first()
    if _waiting:
        dist.barrier(_waiting[0])


def data_parallel(model: nn.Module, kind: str) -> nn.Module:
    """What the training calls in the place of the model."""
    if count() == 1 or kind != "ddp":
        return model
    devices = [torch.cuda.current_device()] if torch.cuda.is_available() else None
    return DistributedDataParallel(model, device_ids=devices)


def sharded(model: nn.Module) -> nn.Module:
    """The model by FSDP2, every decoder layer a group of its own."""
    kind = "cuda" if torch.cuda.is_available() else "cpu"
    mesh = init_device_mesh(kind, (count(),))
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh)
    return fully_shard(model, mesh=mesh)


@contextlib.contextmanager
def reducing(model: nn.Module, now: bool) -> Iterator[None]:
    """Within it a backward sums gradients over processes only if `now`: once a step suffices."""
    if isinstance(model, FSDPModule):
        model.set_requires_gradient_sync(now)
        yield
    elif isinstance(model, DistributedDataParallel) and not now:
        with model.no_sync():
            yield
    else:
        yield


def whole(value: Tensor) -> Tensor:
    return value.full_tensor() if hasattr(value, "full_tensor") else value


def peak_mb() -> float:
    """The most memory that this process has held: on the GPU, or of the machine; 0 if not known."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 1e6
    try:
        import resource
    except ImportError:  # as on Windows
        return 0.0
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e6


def check(parallel: str | None) -> str:
    """The engine: "ddp", "fsdp2", or "none" for one process; InputError for one that cannot be."""
    if count() == 1 and parallel is None:
        return "none"
    if not dist.is_initialized():
        raise InputError(
            f"--parallel {parallel} is for several processes: "
            f"torchrun --nproc-per-node N {Path(sys.argv[0]).name} --parallel {parallel} ..."
        )
    return parallel or "ddp"
