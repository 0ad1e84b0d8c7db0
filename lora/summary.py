"""A table of what was adapted, and what it costs."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import nn

from ._base import LoRALayer, lora_layers
from .full import full_modules
from .kernels import explain
from .linear import Linear
from .merged_linear import MergedLinear
from .state import adapter_parameters
from .switch import adapter_names
from .table import aligned


@dataclass(frozen=True)
class Row:
    """One kind of layer: how many there are, and the LoRA parameters of all of them together.

    path: the code that an unmerged forward takes, and why, in one sentence (`lora.kernels.explain`).
    """

    type: str
    count: int
    shape: tuple[int, ...]
    parts: str
    r: int
    scaling: float
    path: str
    parameters: int


@dataclass(frozen=True)
class Summary:
    """What `summary` returns; `str()` of it is the table.

    adapters: names of the adapters that the model holds, the active one, which the rows are of, first.
    modules_to_save: modules that train in full.
    """

    rows: tuple[Row, ...]
    trainable_parameters: int
    total_parameters: int
    adapter_bytes: int
    optimizer_bytes: int
    merged_layers: int
    adapters: tuple[str, ...] = ()
    modules_to_save: tuple[str, ...] = ()

    @property
    def trainable_percentage(self) -> float:
        return 100 * self.trainable_parameters / max(self.total_parameters, 1)

    def __str__(self) -> str:
        head = ("layer", "count", "weight", "parts", "r per part", "scaling", "LoRA parameters")
        cells = [head] + [
            (
                row.type,
                str(row.count),
                " x ".join(map(str, row.shape)),
                row.parts,
                str(row.r),
                f"{row.scaling:g}",
                f"{row.parameters:,}",
            )
            for row in self.rows
        ]
        layers = sum(row.count for row in self.rows)
        paths: dict[str, list[str]] = {}
        for row in self.rows:
            paths.setdefault(row.path, []).append(row.type)
        return "\n".join(
            [
                *aligned(cells),
                *(f"{', '.join(dict.fromkeys(kinds))}: {path}" for path, kinds in paths.items()),
                f"trainable parameters: {self.trainable_parameters:,} of "
                f"{self.total_parameters:,} ({self.trainable_percentage:.4f} %)",
                f"adapter: {self.adapter_bytes:,} bytes; optimizer (two moments a trainable "
                f"parameter, as Adam): {self.optimizer_bytes:,} bytes",
                f"merged: {self.merged_layers} of {layers} layers",
                *self._extras(),
            ]
        )

    def _extras(self) -> Iterator[str]:
        if self.modules_to_save:
            yield f"trained in full: {', '.join(self.modules_to_save)}"
        if len(self.adapters) > 1:
            yield f"adapters: {', '.join([f'{self.adapters[0]} (active)', *self.adapters[1:]])}"


def summary(model: nn.Module) -> Summary:
    """Print and return a table of the LoRA layers of `model` and of its parameters.

    Layers with r > 0, grouped by type, shape of the weight, parts (rows of each; in
    brackets without an update), rank per part and scaling; which code they run (`Row.path`);
    trainable and total parameters (shared ones once); bytes of the factors, of modules that train
    in full and of trained biases; bytes of two optimizer moments for every trainable parameter;
    how many layers are merged now; the adapters that the model holds.
    """
    layers = [layer for _, layer in lora_layers(model) if layer.r > 0]
    kinds: dict[_Kind, list[int]] = {}  # to the parameters of every layer of the kind
    for layer in layers:
        kinds.setdefault(_kind(layer), []).append(layer.lora_A.numel() + layer.lora_B.numel())
    trainable = [p for p in model.parameters() if p.requires_grad]
    factors = {id(p): p for p in adapter_parameters(model, "none")}
    biases = {id(p): p for p in adapter_parameters(model, "all") if p.requires_grad}
    table = Summary(
        rows=tuple(
            Row(kind[0], len(sizes), *kind[1:], parameters=sum(sizes))
            for kind, sizes in kinds.items()
        ),
        trainable_parameters=sum(p.numel() for p in trainable),
        total_parameters=sum(p.numel() for p in model.parameters()),
        adapter_bytes=sum(map(_bytes, (factors | biases).values())),
        optimizer_bytes=2 * sum(map(_bytes, trainable)),
        merged_layers=sum(layer.merged for layer in layers),
        adapters=adapter_names(model),
        modules_to_save=tuple(name for name, _ in full_modules(model)),
    )
    print(table)
    return table


_Kind = tuple[str, tuple[int, ...], str, int, float, str]


def _kind(layer: LoRALayer) -> _Kind:
    parts = "1"
    if isinstance(layer, MergedLinear):
        sizes = zip(layer.out_splits, layer.enable_lora, strict=True)
        parts = " ".join(f"{size}" if enabled else f"({size})" for size, enabled in sizes)
    name, shape = type(layer).__name__, tuple(layer.weight.shape)
    return name, shape, parts, layer.r, layer.scaling, _path(layer)


def _path(layer: LoRALayer) -> str:
    if not isinstance(layer, Linear):
        return f"torch: there are no fused kernels for {type(layer).__name__}"
    if hasattr(layer.weight, "device_mesh"):
        return "decided at the call: the weight is sharded now, and FSDP gathers it for the forward"
    x = layer.weight.new_empty((0, layer.in_features))
    factors = layer.lora_A, layer.lora_B
    said: str = explain(x, layer._matrix(layer.weight), layer.bias, *factors)
    return said


def _bytes(tensor: torch.Tensor) -> int:
    return tensor.numel() * tensor.element_size()
