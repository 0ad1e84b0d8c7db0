"""What trains, and what is saved: one list of names serves both."""

from __future__ import annotations

import warnings
from collections.abc import Iterator

from torch import Tensor, nn

from ._base import LoRALayer, lora_layers

_BIAS_MODES = ("none", "all", "lora_only")


def mark_only_lora_as_trainable(model: nn.Module, bias: str = "none") -> None:
    """Freeze every parameter of `model` except the LoRA factors and the biases chosen by `bias`.

    bias: "none"; "all", every parameter of the model that is a bias (`bias`, or a name such as
    `in_proj_bias`); "lora_only", the biases of the LoRA layers with r > 0. Parameters are told by
    the type of their module and their own name, so `lora_head.weight` of some other module is
    frozen. A factor that is frozen already becomes trainable. Raises ValueError for another `bias`;
    warns if the model has no LoRA layer, since then nothing but biases would train.
    """
    names = set(_adapter_names(model, bias))
    if not any(layer.r > 0 for _, layer in lora_layers(model)):
        warnings.warn(
            f"{type(model).__name__} has no LoRA layer with r > 0: nothing of it would train; "
            "call lora.patch first or build it from lora's layers",
            stacklevel=2,
        )
    chosen = {id(p) for name, p in model.named_parameters(remove_duplicate=False) if name in names}
    for parameter in model.parameters():
        parameter.requires_grad = id(parameter) in chosen


def lora_state_dict(model: nn.Module, bias: str = "none") -> dict[str, Tensor]:
    """The entries of `model.state_dict()` that `mark_only_lora_as_trainable` with this `bias` trains.

    Load it with `model.load_state_dict(..., strict=False)` after the pretrained weights. Raises
    ValueError for a `bias` other than "none", "all" and "lora_only".
    """
    names = set(_adapter_names(model, bias))
    return {name: tensor for name, tensor in model.state_dict().items() if name in names}


def merged_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """The state dict of the plain model, with every update folded into its weight.

    Computed in at least fp32 and rounded once to the weight's dtype; `model` is not changed. This is
    what loralib users had from `model.eval(); torch.save(model.state_dict())`. Warns if a weight
    with an update is tied to another module: then the two entries differ, and only a model with
    untied weights can hold them.
    """
    state: dict[str, Tensor] = dict(model.state_dict())
    for name, layer in lora_layers(model, remove_duplicate=False):
        if layer.r == 0:
            continue
        prefix = f"{name}." if name else ""
        for own in _factor_names(layer):
            state.pop(f"{prefix}{own}", None)
        state[f"{prefix}weight"] = layer.merged_weight()
    for name, other in tied_updates(model):
        warnings.warn(
            f"{name}.weight has an update and is tied to {other}: the merged entries differ, load "
            "them into a model whose weights are not tied",
            stacklevel=2,
        )
    return state


def tied_updates(model: nn.Module) -> Iterator[tuple[str, str]]:
    """(LoRA layer, parameter of another module) wherever a weight with an update is shared."""
    owners: dict[int, dict[int, str]] = {}
    for path, module in model.named_modules():
        for own, parameter in module.named_parameters(path, recurse=False, remove_duplicate=False):
            owners.setdefault(id(parameter), {})[id(module)] = own
    for name, layer in lora_layers(model):
        others = [path for key, path in owners[id(layer.weight)].items() if key != id(layer)]
        if layer.r > 0 and others:
            yield name, others[0]


def _factor_names(layer: LoRALayer) -> list[str]:
    return [name for name in layer._parameters if name.startswith("lora_")]


def _adapter_names(model: nn.Module, bias: str) -> Iterator[str]:
    if bias not in _BIAS_MODES:
        raise ValueError(f"bias={bias!r}: expected one of {_BIAS_MODES}")
    for path, module in model.named_modules(remove_duplicate=False):
        adapted = isinstance(module, LoRALayer) and module.r > 0
        for own in module._parameters:
            if (
                (adapted and own.startswith("lora_"))
                or (adapted and bias == "lora_only" and own == "bias")
                or (bias == "all" and "bias" in own.split("_"))
            ):
                yield f"{path}.{own}" if path else own
