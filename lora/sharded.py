"""Tensors that are spread over processes: all of one, this process's part, who writes.

A sharded tensor is a DTensor, which FSDP2 (`fully_shard`) and tensor parallelism make of Parameters;
its mesh names the processes. What gathers is a collective: every process of the mesh must call it, or
those that did wait until the process group's timeout. Not handled: other engines' (see `foreign`).
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

FSDP_MARK = "_is_fsdp_managed_module"  # attribute that FSDP sets on the modules that it manages
_OF_FSDP2 = "set_reshard_after_forward"  # a method of FSDPModule; to import it would take long
TENSOR_PARALLEL = "_tensor_parallel"  # attribute of modules that `lora.tensor_parallel` has sharded


def is_sharded(tensor: object) -> bool:
    """Whether it is a DTensor; told without importing torch.distributed.tensor."""
    return hasattr(tensor, "device_mesh")


def own_class(module: nn.Module) -> Any:
    """The class of a module without the one that `fully_shard` puts before it."""
    kinds = type(module).__mro__
    return next(c for c in kinds if issubclass(c, nn.Module) and not hasattr(c, _OF_FSDP2))


def reshard(model: nn.Module) -> None:
    """Let FSDP2 free what it gathered for the last forward, so that modules hold their shards."""
    for module in model.modules():
        if hasattr(module, _OF_FSDP2):
            module.reshard()  # type: ignore[operator]


def sharded_tensor(model: nn.Module) -> Any:
    """The sharded Parameter of `model` with the most dimensions in its mesh; None if there is none."""
    found: list[Any] = [p for p in model.parameters() if is_sharded(p)]
    return max(found, key=lambda p: p.device_mesh.ndim, default=None)


def foreign(tensor: object) -> str:
    """Why a Parameter holds no values that can be read here, in words; empty if it does."""
    if isinstance(tensor, Tensor) and hasattr(tensor, "ds_id") and tensor.numel() == 0:
        return (
            "DeepSpeed ZeRO-3 has partitioned it, an empty tensor stands in its place; its values are "
            "there within deepspeed.zero.GatheredParameters(list(model.parameters()))"
        )
    return ""


def refuse_sharded(model: nn.Module, what: str, advice: str) -> None:
    """ValueError by name if a Parameter of `model` is sharded or an engine manages its module."""
    for name, module in model.named_modules():
        managed = getattr(module, FSDP_MARK, False)
        if managed or any(is_sharded(p) or foreign(p) for p in module._parameters.values()):
            raise ValueError(f"{name or type(module).__name__} is sharded: {what}; {advice}")


def row_order(module: nn.Module, own: str) -> Tensor | None:
    """Of a tensor-parallel module, the row in one process that each stored row is; None: the same."""
    parallel = module.__dict__.get(TENSOR_PARALLEL)
    order: Tensor | None = None if parallel is None else parallel.row_order(module, own)
    return order


def whole_of(module: nn.Module, own: str) -> Tensor:
    """All of a Parameter of `module`, as one process has it, detached. Collective if it is sharded."""
    parameter = module._parameters[own]
    assert parameter is not None
    return whole(parameter, row_order(module, own))


def assign_to(module: nn.Module, own: str, value: Tensor) -> None:
    """The inverse of `whole_of`: every process takes its part of `value`, in place."""
    parameter = module._parameters[own]
    assert parameter is not None
    assign(parameter, value, row_order(module, own))


def gatherer(model: nn.Module) -> Callable[[Tensor], Tensor]:
    """`whole` of the tensors of `model`, in the order of rows that one process has."""
    orders = {
        id(p): row_order(module, own)
        for module in model.modules()
        for own, p in module._parameters.items()
        if p is not None and TENSOR_PARALLEL in module.__dict__
    }
    return lambda tensor: whole(tensor, orders.get(id(tensor)))


def whole(tensor: Tensor, order: Tensor | None = None) -> Tensor:
    """All of a tensor, detached; a plain one as it is. Collective if it is sharded.

    order: the row of the result that each stored row is, if they are stored in another order.
    """
    detached: Any = tensor.detach()
    if foreign(tensor):
        raise ValueError(f"a Parameter cannot be read: {foreign(tensor)}")
    if not is_sharded(detached) or detached.is_meta:
        return detached  # type: ignore[no-any-return]
    mesh = detached.device_mesh
    if detached.device.type != mesh.device_type:  # offloaded
        detached = detached.to(mesh.device_type)  # where its collectives run
    full: Tensor = detached.full_tensor()
    if order is None:
        return full
    return torch.empty_like(full).index_copy_(0, order.to(full.device), full)


def local_slices(tensor: Any) -> tuple[slice, ...]:
    """Where the part of a sharded tensor that lies in this process begins and ends."""
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    shape, offset = compute_local_shape_and_global_offset(
        tensor.shape, tensor.device_mesh, tensor.placements
    )
    return tuple(slice(o, o + n) for o, n in zip(offset, shape, strict=True))


@torch.no_grad()
def assign(tensor: Tensor, value: Tensor, order: Tensor | None = None) -> None:
    """Give `tensor` its part of `value`, which is whole and the same on all processes; in place."""
    target: Any = tensor.detach()
    if is_sharded(tensor):
        value = value if order is None else value[order.to(value.device)]
        value, target = value[local_slices(tensor)], target.to_local()
    target.copy_(value)


def sharded_like(value: Tensor, tensor: Any) -> Tensor:
    """A whole `value`, the same on all processes, as a tensor that is sharded as `tensor` is."""
    from torch.distributed.tensor import DTensor

    part = value[local_slices(tensor)].to(tensor.to_local().device).contiguous()
    mesh, placements = tensor.device_mesh, tensor.placements
    shape, stride = value.shape, value.contiguous().stride()
    made: Tensor = DTensor.from_local(
        part, mesh, placements, run_check=False, shape=shape, stride=stride
    )
    return made


@torch.no_grad()
def values_at(tensor: Any, indices: tuple[Tensor, ...]) -> Tensor:
    """Elements of a sharded tensor, of which each process has some. Collective."""
    import torch.distributed as dist

    local, mesh = tensor.detach().to_local(), tensor.device_mesh
    here = torch.ones_like(indices[0], dtype=torch.bool)
    inner = []
    for index, part in zip(indices, local_slices(tensor), strict=True):
        here &= (index >= part.start) & (index < part.stop)
        inner.append(index - part.start)
    values = torch.zeros(len(here), dtype=torch.float64)
    if here.any():
        mine = local[tuple(index[here].to(local.device) for index in inner)]
        values[here] = mine.double().cpu()
    values = values.to(mesh.device_type)
    for dim, placement in enumerate(tensor.placements):  # of replicas one counts: they are equal
        if placement.is_shard():
            dist.all_reduce(values, group=mesh.get_group(dim))
    return values.to("cpu", tensor.dtype)


def is_writer(tensor: Any) -> bool:
    """Whether this process is the first of the tensor's mesh: it writes, for all."""
    return not any(tensor.device_mesh.get_coordinate() or ())


@contextmanager
def all_or_none(tensor: Any) -> Iterator[None]:
    """If the block raises in one process of the tensor's mesh, it raises in all of them. Collective."""
    import torch.distributed as dist

    failed: BaseException | None = None
    try:
        yield
    except Exception as error:
        failed = error
    mesh = tensor.device_mesh
    flag = torch.tensor(float(failed is not None), device=mesh.device_type)
    for dim in range(mesh.ndim):
        dist.all_reduce(flag, group=mesh.get_group(dim))
    if failed is not None:
        raise failed
    if flag > 0:
        raise RuntimeError("another process of the job failed to do its part: see its error")


def take_from_first(value: Tensor, mesh: Any) -> None:
    """Give `value` that of the mesh's first process, in place. Collective."""
    import torch.distributed as dist

    for dim in range(mesh.ndim):
        dist.broadcast(value, group=mesh.get_group(dim), group_src=0)


def same_as_first(tensor: Any, digest: str) -> bool:
    """Whether the first process of the tensor's mesh has this hexadecimal digest too. Collective."""
    own = torch.tensor([int(digest[:15], 16)], device=tensor.device_mesh.device_type)
    first = own.clone()
    take_from_first(first, tensor.device_mesh)
    return bool(torch.equal(first, own))


@functools.cache
def say_once(text: str) -> None:
    """Warn, once a process."""
    warnings.warn(text, stacklevel=4)
