"""Modules that train in full beside the factors: PEFT's `modules_to_save`.

Such a module is a copy on Parameters of its own. The frozen original stays reachable from it, outside
the state dict, so that it can be given back and used by `lora.disabled`.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator

from torch import Tensor, nn

_ORIGINAL = "_lora_original"


def trainable_copy(module: nn.Module) -> nn.Module:
    """A deep copy of `module` whose Parameters train; `module` itself is frozen from then on.

    TypeError if a Parameter is no floating-point tensor, ValueError if there is none.
    """
    for name, parameter in module.named_parameters():
        if type(parameter) is not nn.Parameter or not parameter.is_floating_point():
            raise TypeError(
                f"{name} is a {type(parameter).__name__} of {parameter.dtype} (quantised or "
                "sharded?), expected a plain floating-point nn.Parameter to train in full"
            )
    if "forward" in module.__dict__:
        raise TypeError(
            f"its forward was replaced on this very object ({module.forward}); restore it"
        )
    if not any(True for _ in module.parameters()):
        raise ValueError(f"{type(module).__name__} has no Parameter that could train")
    copied = copy.deepcopy(module).requires_grad_(True)
    copied.__dict__[_ORIGINAL] = module.requires_grad_(False)
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
    bring_over(plain, module)
    return plain


def originals(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """(name, module) of all that is in the frozen originals, which are no part of the module tree."""
    for name, module in full_modules(model):
        yield from original(module).named_modules(prefix=name)


def bring_over(module: nn.Module, reference: nn.Module) -> None:
    """Give the Parameters and buffers of `module` the devices and dtypes of those of `reference`.

    As new Parameters, where they differ: the old ones may be another module's too.
    """
    wanted = {**dict(reference.named_parameters()), **dict(reference.named_buffers())}
    for prefix, part in module.named_modules():
        for registry in (part._parameters, part._buffers):
            for own, tensor in registry.items():
                like = wanted.get(f"{prefix}.{own}" if prefix else own)
                if tensor is None or like is None or tensor.is_meta or like.is_meta:
                    continue
                if not own.startswith("lora_") and (
                    tensor.device != like.device or tensor.dtype != like.dtype
                ):
                    moved: Tensor = tensor.detach().to(like.device, like.dtype)
                    if isinstance(tensor, nn.Parameter):
                        moved = nn.Parameter(moved, tensor.requires_grad)
                    registry[own] = moved


def settle(module: nn.Module) -> None:
    """Forget the original: what was trained is the module now."""
    module.__dict__.pop(_ORIGINAL, None)


def use_original(module: nn.Module) -> None:
    """Let calls of `module` compute what its original would; its own tensors stay where they are."""
    plain = original(module)
    for own, other in zip(module.modules(), plain.modules(), strict=True):
        other.training = own.training
    module.__dict__["forward"] = plain.forward


def use_own(module: nn.Module) -> None:
    """The inverse of `use_original`."""
    module.__dict__.pop("forward", None)
