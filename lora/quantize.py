"""Which layers of a model are quantised, and doing it in place."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor, nn

from .kernels.nf4_tensor import DTYPES, NF4Tensor
from .linear import Linear
from .quantized import LinearNF4, is_linear4bit
from .targets import linear_names

SCHEMES = ("nf4",)


def to_quantize(
    model: nn.Module, scheme: str | None, kept: Collection[nn.Module] = ()
) -> dict[str, nn.Module]:
    """The linear layers of a plain `model` that `scheme` quantises, by all their names.

    All but the output head, as "all-linear" means it, and those in `kept` modules; and all that are
    bitsandbytes' already. Raises ValueError, by name, for a weight that cannot be quantised, or if
    there is none.
    """
    if scheme is None:
        return {}
    if scheme not in SCHEMES:
        raise ValueError(f"quantize={scheme!r}: expected one of {SCHEMES}, or None")
    modules = dict(model.named_modules(remove_duplicate=False))
    inside = {id(inner) for module in kept for inner in module.modules()}
    linear = set(linear_names(model, modules))
    found = {
        name: module
        for name, module in modules.items()
        if id(module) not in inside
        and (is_linear4bit(module) or (name in linear and type(module) is nn.Linear))
    }
    ours = any(isinstance(module, LinearNF4) for module in modules.values())
    if not found and not ours:
        raise ValueError(
            f"quantize={scheme!r}: {type(model).__name__} has no torch.nn.Linear beside its output "
            "head: other layers are not quantised"
        )
    owners = Counter(
        id(p) for m in model.modules() for p in m._parameters.values() if p is not None
    )
    for name, module in found.items():
        weight = module.weight
        assert isinstance(weight, Tensor)
        if owners[id(weight)] > 1:
            raise ValueError(f"{name}.weight is shared with another module: it cannot be quantised")
        if is_linear4bit(module):
            continue
        if type(weight) is not nn.Parameter or weight.dtype not in DTYPES:
            raise ValueError(
                f"{name}.weight is a {type(weight).__name__} of {weight.dtype}: expected a plain "
                f"nn.Parameter of one of {', '.join(map(str, DTYPES))}"
            )
        if not weight.is_meta and not is_finite(weight):
            raise ValueError(f"{name}.weight has a NaN or infinite value: it cannot be quantised")
    return found


def is_finite(weight: Tensor) -> bool:
    """Whether all elements are, told without memory for one of each."""
    return bool(torch.isfinite(torch.stack(torch.aminmax(weight))).all())


def quantize_in_place(model: nn.Module, names: Collection[str]) -> None:
    """Give the linear layers with these names, plain ones or LoRA layers on such, their 4-bit weights.

    Layer by layer: beside the model there is one layer's new weight and a few blocks.
    """
    ids = {name: id(model.get_submodule(name)) for name in names}  # holds none of them
    done: dict[int, nn.Module] = {}
    for name, key in ids.items():
        if key not in done:
            done[key] = _quantized(model.get_submodule(name))
        parent, _, own = name.rpartition(".")
        setattr(model.get_submodule(parent), own, done[key])
    unmark(model)


def _quantized(layer: nn.Module) -> nn.Module:
    if isinstance(layer, Linear) and not isinstance(layer.weight, NF4Tensor):
        layer.quantize_weight()
    return layer if isinstance(layer, Linear) else LinearNF4.from_module(layer)


# By what transformers knows a model that it has loaded in 4 bits: its Trainer refuses such a one unless
# it is PEFT's, it cannot be moved, and what it would write is not what our layers hold.
_MARKS = (
    *("is_quantized", "is_loaded_in_4bit", "quantization_method", "hf_quantizer"),
    "_weight_conversions",  # those of reading, which saving reverts: bitsandbytes' cannot be
)


def unmark(model: nn.Module) -> None:
    """Take these marks away, when none of the layers is bitsandbytes' any more."""
    if any(map(is_linear4bit, model.modules())):
        return
    if model.__dict__.get("is_loaded_in_4bit"):
        for mark in _MARKS:
            model.__dict__.pop(mark, None)
    config: Any = getattr(model, "config", None)
    said = getattr(config, "quantization_config", None)
    said = said if isinstance(said, dict) else vars(said) if said is not None else {}
    if said.get("load_in_4bit") or said.get("_load_in_4bit"):
        del config.quantization_config
