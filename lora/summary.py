"""A table of what was adapted, and what it costs."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import nn

from ._base import LoRALayer, lora_layers
from .full import full_modules
from .kernels import explain
from .linear import Linear, is_transformers_conv1d
from .merged_linear import MergedLinear
from .sharded import foreign, own_class
from .state import adapter_parameters
from .switch import adapter_names
from .table import aligned


@dataclass(frozen=True)
class Row:
    """One kind of layer: how many there are, and the LoRA parameters of all of them together.

    variant: its options that are not plain LoRA's, such as "use_dora"; empty if there are none.
    path: the code that an unmerged forward takes, and why, in one sentence (`lora.kernels.explain`).
    """

    type: str
    count: int
    shape: tuple[int, ...]
    parts: str
    r: int
    scaling: float
    variant: str
    path: str
    parameters: int


@dataclass(frozen=True)
class Summary:
    """What `summary` returns; `str()` of it is the table.

    weight_bytes: of all parameters; gradient_bytes, optimizer_bytes: of the gradients and of two
        moments, as Adam's, of those that train.
    flops_per_token: of the linear layers in one forward and backward, without attention's products:
        4 for each element of a frozen weight, whose own gradient is not computed, 6 of a trained one.
    adapters: names of the adapters that the model holds, the active one, which the rows are of, first.
    modules_to_save: modules that train in full.
    """

    rows: tuple[Row, ...]
    trainable_parameters: int
    total_parameters: int
    adapter_bytes: int
    weight_bytes: int
    gradient_bytes: int
    optimizer_bytes: int
    flops_per_token: int
    merged_layers: int
    adapters: tuple[str, ...] = ()
    modules_to_save: tuple[str, ...] = ()

    @property
    def step_bytes(self) -> int:
        """Weights, gradients and the optimizer's moments: what training holds beside activations."""
        return self.weight_bytes + self.gradient_bytes + self.optimizer_bytes

    @property
    def trainable_percentage(self) -> float:
        return 100 * self.trainable_parameters / max(self.total_parameters, 1)

    def __str__(self) -> str:
        head: tuple[str, ...]
        head = ("layer", "count", "weight", "parts", "r per part", "scaling", "LoRA parameters")
        head += ("variant",) if any(row.variant for row in self.rows) else ()
        cells = [head] + [
            (
                row.type,
                str(row.count),
                " x ".join(map(str, row.shape)),
                row.parts,
                str(row.r),
                f"{row.scaling:g}",
                f"{row.parameters:,}",
                row.variant,
            )[: len(head)]
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
                f"adapter: {self.adapter_bytes:,} bytes",
                f"a training step, beside activations: {self.step_bytes:,} bytes (weights "
                f"{self.weight_bytes:,}, gradients {self.gradient_bytes:,}, two moments as Adam's "
                f"{self.optimizer_bytes:,}); {self.flops_per_token:,} FLOP a token in linear layers",
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
    in full and of trained biases; what a training step needs beside activations, in bytes, and its
    arithmetic a token; how many layers are merged now; the adapters that the model holds.
    """
    layers = [layer for _, layer in lora_layers(model) if layer.r > 0]
    kinds: dict[_Kind, list[int]] = {}  # to the parameters of every layer of the kind
    for layer in layers:
        numel = sum(p.numel() for p in layer.update_parameters().values())
        kinds.setdefault(_kind(layer), []).append(numel)
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
        weight_bytes=sum(map(_bytes, model.parameters())),
        gradient_bytes=sum(map(_bytes, trainable)),
        optimizer_bytes=2 * sum(map(_bytes, trainable)),
        flops_per_token=sum(_flops_per_token(module) for module in model.modules()),
        merged_layers=sum(layer.merged for layer in layers),
        adapters=adapter_names(model),
        modules_to_save=tuple(name for name, _ in full_modules(model)),
    )
    print(table)
    return table


_Kind = tuple[str, tuple[int, ...], str, int, float, str, str]


def _kind(layer: LoRALayer) -> _Kind:
    parts = "1"
    if isinstance(layer, MergedLinear):
        sizes = zip(layer.out_splits, layer.enable_lora, strict=True)
        parts = " ".join(f"{size}" if enabled else f"({size})" for size, enabled in sizes)
    name, shape = own_class(layer).__name__, tuple(layer.weight.shape)
    variant = " ".join(n if value is True else str(value) for n, value in layer.variant.items())
    return name, shape, parts, layer.r, layer.scaling, variant, _path(layer)


def _path(layer: LoRALayer) -> str:
    if not isinstance(layer, Linear):
        return f"torch: there are no fused kernels for {type(layer).__name__}"
    if hasattr(layer.weight, "device_mesh"):
        return "decided at the call: the weight is sharded, FSDP gathers it then"
    if foreign(layer.weight):
        return "decided at the call: DeepSpeed gathers the weight then"
    x = layer.weight.new_empty((0, layer.in_features))
    said: str = explain(x, layer._matrix(layer.weight), layer.bias, *layer.factors())
    return said


def _flops_per_token(module: nn.Module) -> int:
    """Two a multiplication with its addition: forward, gradient of the input, of what trains."""
    if not isinstance(module, nn.Linear) and not is_transformers_conv1d(module):
        return 0
    matrices = [p for p in module.parameters(recurse=False) if p.ndim == 2]
    return sum((6 if p.requires_grad else 4) * p.numel() for p in matrices)


def _bytes(tensor: torch.Tensor) -> int:
    return tensor.nbytes
