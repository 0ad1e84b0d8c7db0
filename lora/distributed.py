"""Training in several processes: its state as one process has it; a checkpoint straight into shards.

The engines are PyTorch's: DistributedDataParallel, `fully_shard`, `parallelize_module` (with plans of
`lora.tensor_parallel`). `TrainingState` is what `torch.distributed.checkpoint` saves and loads of any
of them, in any number of processes; `load_sharded` fills a model that was built on the meta device.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)

from ._base import LoRALayer, lora_layers
from .adapter.check import row_blocks
from .adapter.checkpoint import Checkpoint
from .adapter.contents import AdapterError, listed
from .sharded import (
    assign,
    assign_to,
    gatherer,
    is_sharded,
    local_slices,
    reshard,
    row_order,
    sharded_tensor,
)
from .state import adapter_parameters, bias_mode
from .switch import inner_model

__all__ = ["TrainingState", "load_sharded"]


class TrainingState:
    """What trains and the optimizer's state, whole, in the names and the order of one process.

        state = {"train": TrainingState(model, optimizer)}
        torch.distributed.checkpoint.save(state, checkpoint_id="step-100")     # and to go on:
        torch.distributed.checkpoint.load(state, checkpoint_id="step-100")

    So a run of two processes goes on in four, or in one, or under another engine. The adapter is
    small: every process gathers all of it, and torch.distributed.checkpoint writes each tensor once.
    Both calls are collectives. `state_dict()` holds what `torch.load` reads with weights_only=True.

    Args:
        model: patched; plain, in DistributedDataParallel, or sharded by FSDP2 or tensor parallelism.
        optimizer: of the model's Parameters.

    `load_state_dict` raises ValueError, before any change, for names or shapes of another adapter.
    """

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        self.model, self.optimizer = inner_model(model), optimizer

    def _parameters(self) -> dict[str, nn.Parameter]:
        """The adapter's and all else that trains, each once."""
        chosen = {id(p) for p in adapter_parameters(self.model, bias_mode(self.model))}
        named = self.model.named_parameters()
        return {name: p for name, p in named if p.requires_grad or id(p) in chosen}

    def state_dict(self) -> dict[str, Any]:
        reshard(self.model)
        gathered, options = gatherer(self.model), StateDictOptions(full_state_dict=True)
        found = get_optimizer_state_dict(self.model, self.optimizer, options=options)
        return {
            "parameters": {name: gathered(p) for name, p in self._parameters().items()},
            "optimizer": self._ordered(found, inverse=False),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        reshard(self.model)
        parameters, values = self._parameters(), state["parameters"]
        problems = [f"{name} is missing" for name in parameters.keys() - values.keys()]
        problems += [f"{name} does not train here" for name in values.keys() - parameters.keys()]
        for name in parameters.keys() & values.keys():
            there, here = tuple(values[name].shape), tuple(parameters[name].shape)
            problems += [f"{name} is {there}, in the model {here}"] if there != here else []
        if problems:
            raise ValueError(
                f"a state of another adapter: {listed(sorted(problems))}; patch the model as it was "
                "patched for that run"
            )
        orders = self._orders()
        for name, parameter in parameters.items():
            assign(parameter, values[name], orders.get(name))
        set_optimizer_state_dict(
            self.model,
            self.optimizer,
            self._ordered(state["optimizer"], inverse=True),
            options=StateDictOptions(full_state_dict=True),
        )

    def _orders(self) -> dict[str, Tensor]:
        """Of the Parameters whose rows tensor parallelism stores in another order, that order."""
        found = {
            f"{path}.{own}" if path else own: row_order(module, own)
            for path, module in self.model.named_modules()
            for own in module._parameters
        }
        return {name: order for name, order in found.items() if order is not None}

    def _ordered(self, state: dict[str, Any], inverse: bool) -> dict[str, Any]:
        """The optimizer's state with moments in the order of one process; or, inverse, as stored."""
        orders, moments = self._orders(), {}
        for name, values in state["state"].items():
            order = orders.get(name)
            if order is not None:
                order = order if inverse else order.argsort()
                rows = len(order)
                values = {
                    key: v[order.to(v.device)]
                    if torch.is_tensor(v) and v.shape[:1] == (rows,)
                    else v
                    for key, v in values.items()
                }
            moments[name] = values
        return {**state, "state": moments}


def load_sharded(
    model: nn.Module, folder: str | Path, device: torch.device | str | None = None
) -> None:
    """Fill a sharded model on the meta device from a checkpoint, each process reading its own part.

        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)
        lora.patch_phi3(model, ...)
        for layer in model.model.layers:
            fully_shard(layer)
        load_sharded(fully_shard(model), "Phi-3-mini-4k-instruct")

    The whole model is never in one process: memory grows by its shards, and by 16 MiB of a weight at a
    time. What is sharded by rows is read once by all processes together; what every process has, or
    shares by columns, once by each. Factors begin as `lora.patch` draws them, with the generator of the
    first process; a variant that begins from the weights (DoRA, PiSSA) gathers one weight at a time.

    Args:
        model: on the meta device, patched or not, sharded by FSDP2 or by tensor parallelism, not by
            both at once.
        folder: with `model.safetensors` or its shards and index, in the model's own names.
        device: where the parts go; None is the mesh's. "cpu" with FSDP2's CPU offload.

    Raises AdapterError before anything is read: a folder that is no checkpoint, a tensor that is
    missing or of another shape, buffers on the meta device, which no checkpoint holds (build their
    modules outside of it). Call it in every process.
    """
    checkpoint = Checkpoint(folder)
    places = _places(model)
    sources = _sources(model, places, checkpoint)
    if device is None:
        sharded = sharded_tensor(model)
        device = "cpu" if sharded is None else sharded.device_mesh.device_type
        device = torch.device(device, torch.cuda.current_device()) if device == "cuda" else device
    buffers = {id(b): b for b in model.buffers() if not b.is_meta}
    kept = [
        (m, own, b) for m in model.modules() for own, b in m._buffers.items() if id(b) in buffers
    ]
    model.to_empty(device=device)
    for module, own, buffer in kept:  # to_empty would lose their values
        assert buffer is not None
        module._buffers[own] = buffer.to(device)
    for (module, own), *ties in places.values():
        for other, name in ties:
            other._parameters[name] = module._parameters[own]
    for key, (module, own) in sources.items():
        _read_part(checkpoint, key, module, own)
    for _, layer in lora_layers(model):
        if layer.r > 0:
            _begin(layer)


_Place = tuple[nn.Module, str]


def _places(model: nn.Module) -> dict[str, list[_Place]]:
    """Every Parameter's first name, and the modules that have it."""
    found: dict[int, tuple[str, list[_Place]]] = {}
    for path, module in model.named_modules():
        for own, parameter in module._parameters.items():
            if parameter is not None:
                name = f"{path}.{own}" if path else own
                found.setdefault(id(parameter), (name, []))[1].append((module, own))
    return dict(found.values())


def _sources(
    model: nn.Module, places: dict[str, list[_Place]], checkpoint: Checkpoint
) -> dict[str, _Place]:
    """The checkpoint's tensor of every Parameter but the factors; AdapterError if one does not fit."""
    names: dict[int, list[str]] = {}
    for path, module in model.named_modules():
        for own, parameter in module._parameters.items():
            if parameter is not None:
                names.setdefault(id(parameter), []).append(f"{path}.{own}" if path else own)
    sources, problems = {}, []
    for name, ((module, own), *_) in places.items():
        parameter = module._parameters[own]
        assert parameter is not None
        if isinstance(module, LoRALayer) and own.startswith("lora_"):
            continue
        key = next((n for n in names[id(parameter)] if n in checkpoint), None)
        if not parameter.is_meta:
            problems.append(f"{name} is not on the meta device")
        elif key is None:
            problems.append(f"missing tensor {name}")
        elif checkpoint.shape(key) != tuple(parameter.shape):
            there, here = checkpoint.shape(key), tuple(parameter.shape)
            problems.append(f"{key} is {there}, in the model {here}")
        elif is_sharded(parameter) and any("Strided" in str(p) for p in parameter.placements):  # type: ignore[attr-defined]
            problems.append(f"{name} is sharded by two engines at once")
        else:
            sources[key] = (module, own)
    for name, buffer in model.named_buffers():
        if buffer.is_meta:
            problems.append(f"the buffer {name} is on the meta device, and no checkpoint holds it")
    if problems:
        raise AdapterError(f"{checkpoint.folder}: {listed(problems)}; nothing was read")
    return sources


@torch.no_grad()
def _read_part(checkpoint: Checkpoint, key: str, module: nn.Module, own: str) -> None:
    """This process's part of a tensor, in blocks of rows that lie together in the file."""
    parameter: Any = module._parameters[own]
    local = parameter.detach()
    slices = tuple(slice(0, n) for n in parameter.shape)
    if is_sharded(parameter):
        local, slices = local.to_local(), local_slices(parameter)
    order = row_order(module, own)
    rows = torch.arange(parameter.shape[0]) if order is None else order
    columns = (slice(None), *slices[1:])
    done = 0
    for first, last in _runs(rows[slices[0]]):
        for block in row_blocks((last - first, *parameter.shape[1:])):
            values = checkpoint.rows(key, first + block.start, first + block.stop)
            local[done : done + len(values)].copy_(values[columns])
            done += len(values)


def _runs(rows: Tensor) -> Iterator[tuple[int, int]]:
    """First and last + 1 of every run of consecutive numbers."""
    if len(rows) == 0:
        return
    breaks = (rows.diff() != 1).nonzero().flatten().tolist()
    for start, stop in zip([0, *(b + 1 for b in breaks)], [*breaks, len(rows) - 1], strict=True):
        yield int(rows[start]), int(rows[stop]) + 1


@torch.no_grad()
def _begin(layer: LoRALayer) -> None:
    """Give the factors the values with which a fresh layer begins, drawn by the first process."""
    one = layer.in_one_process(weight=layer.depends_on_weight)
    one._reset_factors()
    for own, parameter in one.update_parameters().items():
        like: Any = layer._parameters[own]
        if is_sharded(like):
            value = parameter.detach().to(like.device_mesh.device_type)
            for dim in range(like.device_mesh.ndim):
                dist.broadcast(value, group=like.device_mesh.get_group(dim), group_src=0)
            assign_to(layer, own, value)
        else:
            like.copy_(parameter)
