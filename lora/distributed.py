"""Training in several processes: its state as one process has it; a checkpoint straight into shards.

The engines are PyTorch's: DistributedDataParallel, `fully_shard`, `parallelize_module` (with plans of
`lora.tensor_parallel`). `TrainingState` is what `torch.distributed.checkpoint` saves and loads of any
of them, in any number of processes; `load_sharded` fills a model that was built on the meta device.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)

from ._base import LoRALayer, lora_layers
from .adapter.check import row_blocks
from .adapter.checkpoint import Checkpoint
from .adapter.contents import listed
from .full import originals
from .pretrained import Named, Source, sources
from .quantized import is_quantized
from .sharded import (
    all_or_none,
    assign,
    assign_to,
    gatherer,
    is_sharded,
    local_slices,
    reshard,
    row_order,
    sharded_tensor,
    take_from_first,
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
    Neither changes the training: of an optimizer that has made no step, zeros are saved.

    Args:
        model: patched; plain, in DistributedDataParallel, or sharded by FSDP2 or tensor parallelism.
        optimizer: of the model's Parameters, in the same groups in every run that goes on.

    `load_state_dict` raises ValueError, before any change, for names or shapes of another adapter, and
    for another optimizer's state or groups.
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
        gathered = gatherer(self.model)
        return {
            "parameters": {name: gathered(p) for name, p in self._parameters().items()},
            "optimizer": self._ordered(self._of_optimizer(), inverse=False),
        }

    def _of_optimizer(self) -> dict[str, Any]:
        """Its state by the names of Parameters; with zeros, if it has made no step yet."""
        options, begun = StateDictOptions(full_state_dict=True), bool(self.optimizer.state)
        with _no_gradients(self.optimizer):  # torch makes such a state by a step with lr and dY = 0
            found: Any = get_optimizer_state_dict(self.model, self.optimizer, options=options)
        if not begun:
            self.optimizer.state.clear()
            for values in found["state"].values():
                if torch.is_tensor(values.get("step")):
                    values["step"].zero_()
        state: dict[str, Any] = found
        return state

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
        problems = _unlike(state["optimizer"], self._of_optimizer())
        if problems:
            raise ValueError(
                f"a state of another optimizer: {listed(sorted(problems))}; make the one of that run, "
                "with the same groups"
            )
        orders = self._orders()
        for name, parameter in parameters.items():
            assign(parameter, values[name], orders.get(name))
        with _no_gradients(self.optimizer):
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


@contextmanager
def _no_gradients(optimizer: torch.optim.Optimizer) -> Iterator[None]:
    """Set gradients aside: torch makes no state where there are some."""
    kept = [(p, p.grad) for group in optimizer.param_groups for p in group["params"]]
    for parameter, _ in kept:
        parameter.grad = None
    try:
        yield
    finally:
        for parameter, gradient in kept:
            parameter.grad = gradient


def _unlike(there: dict[str, Any], here: dict[str, Any]) -> list[str]:
    """How two optimizers' states differ in what they are of."""
    groups = [[sorted(g["params"]) for g in state["param_groups"]] for state in (there, here)]
    problems = []
    if len(groups[0]) != len(groups[1]):
        problems.append(f"{len(groups[0])} groups of Parameters, here {len(groups[1])}")
    elif groups[0] != groups[1]:
        problems.append("its groups have other Parameters")
    for name in there["state"].keys() & here["state"].keys():
        kept, wanted = (sorted(state["state"][name]) for state in (there, here))
        if kept != wanted:
            problems.append(f"of {name} it has {kept}, here {wanted}")
    return problems


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
    missing, of another shape or of 4 bits, a model with 4-bit weights (`lora.load_pretrained` it, then
    shard it), buffers on the meta device, which no checkpoint holds (build their modules outside of
    it). Call it in every process; if it raises in one then, it raises in all. The originals of
    `modules_to_save` are whole in every process.
    """
    sharded = sharded_tensor(model)
    modules = [*model.named_modules(), *originals(model)]
    with nullcontext() if sharded is None else all_or_none(sharded):
        checkpoint = Checkpoint(folder)
        found = sources(modules, checkpoint, _problems(modules), tied=_tied(model))
    if device is None:
        device = "cpu" if sharded is None else sharded.device_mesh.device_type
        device = torch.device(device, torch.cuda.current_device()) if device == "cuda" else device
    kept = [(m, own, b) for _, m in modules for own, b in m._buffers.items() if b is not None]
    model.to_empty(device=device)
    for _, module in originals(model):
        module.to_empty(device=device, recurse=False)
    for module, own, buffer in kept:  # to_empty would lose their values
        module._buffers[own] = buffer.to(device)
    for source in found:
        for module, own in source.places[1:]:  # to_empty unties them
            module._parameters[own] = source.parameter
        _read_part(checkpoint, source)
    for _, layer in lora_layers(model):
        if layer.r > 0:
            _begin(layer)


def _tied(model: nn.Module) -> Mapping[str, str]:
    """Names of tied Parameters of a transformers model (5.0 or newer), and those that are stored.

    `fully_shard` leaves no other trace: it makes a weight of the tree anew, and not that of a frozen
    original (`modules_to_save`), to which it was tied.
    """
    config, names = getattr(model, "config", None), getattr(model, "_tied_weights_keys", None)
    if isinstance(names, Mapping) and getattr(config, "tie_word_embeddings", False):
        return names
    return {}


def _problems(modules: Named) -> Iterator[str]:
    for path, module in modules:
        prefix = f"{path}." if path else ""
        for own, buffer in module._buffers.items():
            if buffer is not None and buffer.is_meta:
                yield (
                    f"the buffer {prefix}{own} is on the meta device, and no checkpoint holds it"
                )
        for own, parameter in module._parameters.items():
            if is_quantized(parameter):
                yield (
                    f"{prefix}{own} is of 4 bits: fill the model by lora.load_pretrained in every "
                    "process, and shard it then"
                )


@torch.no_grad()
def _read_part(checkpoint: Checkpoint, source: Source) -> None:
    """This process's part of a tensor, in blocks of rows that lie together in the file."""
    parameter: Any = source.parameter
    local = parameter.detach()
    slices = tuple(slice(0, n) for n in parameter.shape)
    if is_sharded(parameter):
        local, slices = local.to_local(), local_slices(parameter)
    order = row_order(*source.places[0])
    rows = torch.arange(parameter.shape[0]) if order is None else order
    columns = (slice(None), *slices[1:])
    done = 0
    for first, last in _runs(rows[slices[0]]):
        for block in row_blocks((last - first, *parameter.shape[1:])):
            values = checkpoint.rows(source.key, first + block.start, first + block.stop)
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
            take_from_first(value, like.device_mesh)
            assign_to(layer, own, value)
        else:
            like.copy_(parameter)
