"""Modules that train in full beside the factors: PEFT's `modules_to_save`.

Such a module is a copy on Parameters of its own. The frozen original stays reachable from it, outside
the state dict, so that it can be given back and used by `lora.disabled`.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

from torch import nn

_ORIGINAL = "_lora_original"


def trainable_copy(module: nn.Module) -> nn.Module:
    """A deep copy of `module` whose Parameters train; TypeError if one is no floating-point tensor."""
    for name, parameter in module.named_parameters():
        if type(parameter) is not nn.Parameter or not parameter.is_floating_point():
            raise TypeError(
                f"{name} is a {type(parameter).__name__} of {parameter.dtype} (quantised or "
                "sharded?), expected a plain floating-point nn.Parameter to train in full"
            )
    if not any(True for _ in module.parameters()):
        raise ValueError(f"{type(module).__name__} has no Parameter that could train")
    copied = copy.deepcopy(module).requires_grad_(True)
    copied.__dict__[_ORIGINAL] = module
    return copied


def is_full(module: nn.Module) -> bool:
    """Whether `module` itself is a trainable copy."""
    return _ORIGINAL in module.__dict__


def full_modules(
    model: nn.Module, remove_duplicate: bool = True
) -> Iterator[tuple[str, nn.Module]]:
    """(name, module) of every module of `model` that trains in full."""
    for name, module in model.named_modules(remove_duplicate=remove_duplicate):
        if is_full(module):
            yield name, module


def original(module: nn.Module) -> nn.Module:
    """The frozen module that `module` is the trainable copy of, on the copy's devices and dtypes."""
    plain: nn.Module = module.__dict__[_ORIGINAL]
    for kept, own in zip(plain.modules(), module.modules(), strict=True):
        for name, parameter in kept._parameters.items():
            now = own._parameters[name]
            if parameter is None or now is None:
                continue
            moved = parameter.detach().to(now.device, now.dtype)
            if moved.device != parameter.device or moved.dtype != parameter.dtype:
                # A new Parameter: the old one may be another module's too.
                kept._parameters[name] = nn.Parameter(moved, requires_grad=False)
    return plain


def settle(module: nn.Module) -> None:
    """Forget the original: what was trained is the module now."""
    module.__dict__.pop(_ORIGINAL, None)


def exchange(module: nn.Module) -> None:
    """Let `module` compute with the Parameters and buffers of its original, or again with its own."""
    for own, plain in zip(module.modules(), original(module).modules(), strict=True):
        for registry in ("_parameters", "_buffers"):
            mine: dict[str, Any] = own.__dict__[registry]
            own.__dict__[registry] = plain.__dict__[registry]
            plain.__dict__[registry] = mine
