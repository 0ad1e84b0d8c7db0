"""Put plain modules in the place of LoRA layers, with or without updates: the inverse of `patch`."""

from __future__ import annotations

from collections.abc import Collection, Mapping

import torch
from torch import Tensor, nn

from ._base import LoRALayer, lora_layers
from .adapter.fingerprint import compare, fingerprint, of_base
from .full import full_modules, original, settle
from .kernels.nf4_tensor import NF4Tensor
from .patch import set_module
from .quantize import is_finite, unmark
from .quantized import LinearNF4, adoptable, is_linear4bit, is_quantized
from .sharded import refuse_sharded
from .state import merged_bias, tied_updates
from .switch import forget_adapters, refuse_data_parallel
from .variants import begins_as

_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def unpatch(
    model: nn.Module,
    merge: bool = False,
    *,
    dtype: torch.dtype | None = None,
    base: Mapping[str, Tensor] | None = None,
) -> nn.Module:
    """Put plain torch modules in the place of all LoRA layers, in place; returns the model.

    merge=False gives the base back, on its own Parameters. merge=True folds every update into a new
    weight, rounded once; layer by layer, so that one extra layer is held at a time. Modules that
    trained in full become their originals again, or with merge=True stay as they were trained.
    `requires_grad` stays as it is. Of several adapters (`lora.set_adapter`) all are removed, and the
    active one is what is merged. If `model` is itself a LoRA layer, the plain layer is returned.

    A model with 4-bit weights is merged only with a dtype (the model's own, if it is to run), into
    dense weights of it: all its linear layers become plain ones, bitsandbytes' too. The updates are
    added to the dequantised weights, on which they were trained; or to those of `base`, the original
    weights by the names of the model's state dict (`original.state_dict()`), as the QLoRA recipe does.
    What that changed is printed: the error of rounding, and with `base` the distance between both
    bases, relative to the updates.

    Raises ValueError, before any change, if a factor has a value that is not finite or lies on the
    meta device, if a weight to be changed is tied to another module, if an update has a bias
    (`lora_bias`) and its layer none, if a merged weight is beyond float16, if the model is sharded over
    processes or in DistributedDataParallel, if it has 4-bit weights and no dtype, and if `base` lacks a
    weight, is of another model, or has a LoftQ update's (which holds what quantising lost, and would be
    added twice).
    """
    refuse_sharded(
        model,
        "its engine knows the modules that it has",
        "lora.save_adapter, and `lora merge` on the checkpoint or unpatch in one process",
    )
    refuse_data_parallel(model)
    quantized = [name for name, module in model.named_modules() if _is_quantized(module)]
    _check_dense(model, quantized, merge, dtype, base)
    report = _Report(dtype, base)
    if merge:
        _check_mergeable(model)
        _check_range(model, report)
    if isinstance(model, LoRALayer):
        return report.dense("", model) if merge and quantized else model.to_module(merge)
    for name, module in list(full_modules(model, remove_duplicate=False)):
        if merge:
            settle(module)
        else:
            set_module(model, name, original(module))
    plain: dict[nn.Module, nn.Module] = {}
    for name, layer in list(model.named_modules(remove_duplicate=False)):
        dense = merge and dtype is not None and _is_quantized(layer)
        if not isinstance(layer, LoRALayer) and not dense:
            continue
        if layer not in plain:
            if dense:
                plain[layer] = report.dense(name, layer)
            elif isinstance(layer, LoRALayer):
                plain[layer] = layer.to_module(merge)
        set_module(model, name, plain[layer])
    forget_adapters(model)
    if merge and dtype is not None:
        unmark(model)
        print(report)
    return model


def _is_quantized(module: nn.Module) -> bool:
    return is_linear4bit(module) or is_quantized(module._parameters.get("weight"))


def _check_dense(
    model: nn.Module,
    quantized: list[str],
    merge: bool,
    dtype: torch.dtype | None,
    base: Mapping[str, Tensor] | None,
) -> None:
    """ValueError for arguments that do not fit a model with these 4-bit layers."""
    if not merge or not quantized:
        why = "no weight is of 4 bits" if merge else "merge is False"
        for name, value in (("dtype", dtype), ("base", base)):
            if value is not None:
                raise ValueError(
                    f"{name} is for merging into 4-bit weights, and {why}: leave it out"
                )
        return
    ours = [n for n in quantized if not is_linear4bit(model.get_submodule(n))]
    if dtype not in _DTYPES and (ours or dtype is not None or base is not None):
        raise ValueError(
            f"{quantized[0] or type(model).__name__} has a 4-bit weight, and dtype={dtype!r}: an "
            f"update would be lost in one; for dense merged weights, pass one of {_DTYPES}"
        )
    if base is not None:
        _check_base(model, quantized, base)


def _check_base(model: nn.Module, quantized: list[str], base: Mapping[str, Tensor]) -> None:
    """ValueError unless `base` has the weights that these 4-bit layers were quantised from."""
    if not isinstance(base, Mapping):
        raise ValueError(f"base is a {type(base).__name__}: expected original.state_dict()")
    then: dict[str, str | None] = {}
    now: dict[str, Collection[str] | None] = {}
    for name in quantized:
        module, key = model.get_submodule(name), f"{name}.weight" if name else "weight"
        weight = adoptable(module)._parameters["weight"]
        assert weight is not None
        given = base.get(key)
        if given is None or given.shape != weight.shape or not given.is_floating_point():
            there = None if given is None else f"{tuple(given.shape)} of {given.dtype}"
            raise ValueError(f"base[{key!r}]: expected {tuple(weight.shape)}, dense, got {there}")
        if given.is_meta or not is_finite(given):
            what = "is on the meta device" if given.is_meta else "has a NaN or infinite value"
            raise ValueError(f"base[{key!r}] {what}: give the weights of the original model")
        if isinstance(module, LoRALayer) and begins_as(module.variant, "loftq"):
            raise ValueError(
                f"{name}: a LoftQ update holds what quantising lost, so it belongs to the 4-bit "
                "weights alone; merge without base"
            )
        then[name] = own = fingerprint(weight)
        now[name] = None if own is None else of_base(own, given)
    _, problem = compare(then, now, None)
    if problem is not None:
        raise ValueError(f"base: {problem}; give the model that this one was quantised from")


def _check_range(model: nn.Module, report: _Report) -> None:
    """ValueError for a merged weight that its dtype cannot hold.

    Of float16 alone, since finding out is to merge twice; what others cannot hold is no weight.
    """
    for name, layer in lora_layers(model):
        dtype = report.dtype if is_quantized(layer.weight) else layer.weight.dtype
        if dtype != torch.float16:
            continue
        frozen, update = report.parts(name, layer)
        largest = 0.0 if update is None else float((frozen + update).abs().max())
        if largest > torch.finfo(dtype).max:
            raise ValueError(
                f"{name or type(layer).__name__}: a merged weight is {largest:g}, beyond {dtype}'s "
                f"largest, {torch.finfo(dtype).max:g}: merge in torch.bfloat16"
            )


class _Report:
    """Makes the dense layers of a 4-bit model, and says what that changed."""

    def __init__(self, dtype: torch.dtype | None, base: Mapping[str, Tensor] | None) -> None:
        self.dtype, self.base = dtype, base
        self.rounding: dict[str, float] = {}
        self.distance: dict[str, float] = {}

    @torch.no_grad()
    def parts(self, name: str, layer: nn.Module) -> tuple[Tensor, Tensor | None]:
        """The frozen weight that is merged into, dense, and the update on it if there is one."""
        held = layer.weight
        assert isinstance(held, Tensor)
        frozen = held.detach()
        if isinstance(held, NF4Tensor):
            frozen = held.dequantize()
            if self.base is not None:
                original = self.base[f"{name}.weight" if name else "weight"].detach()
                frozen = original.to(
                    frozen.device, torch.promote_types(frozen.dtype, original.dtype)
                )
        if not isinstance(layer, LoRALayer) or layer.r == 0:
            return frozen, None
        layer.weight = nn.Parameter(frozen, requires_grad=False)  # the norms are of this one
        try:
            return frozen, layer.delta_weight()
        finally:
            layer.weight = held

    @torch.no_grad()
    def dense(self, name: str, layer: nn.Module) -> nn.Module:
        """The plain layer on a dense weight, with the update if there is one."""
        plain = layer.to_module() if isinstance(layer, LoRALayer) else adoptable(layer)
        assert isinstance(plain, LinearNF4)
        assert self.dtype is not None
        if not isinstance(layer, LoRALayer):
            layer = plain
        frozen, update = self.parts(name, layer)
        exact = frozen if update is None else frozen + update
        weight = exact.to(self.dtype)
        if isinstance(layer, LoRALayer) and update is not None:
            if "lora_bias" in layer.variant:
                plain.bias = nn.Parameter(merged_bias(name, layer), requires_grad=False)
            size = float(torch.linalg.vector_norm(update)) or 1.0
            self.rounding[name] = float(torch.linalg.vector_norm(exact - weight)) / size
            if self.base is not None:
                change = frozen - plain.weight.dequantize()
                self.distance[name] = float(torch.linalg.vector_norm(change)) / size
        return plain.to_dense(weight)

    def __str__(self) -> str:
        said = f"merged {len(self.rounding)} updates into dense weights of {self.dtype}"
        said += "" if self.base is None else ", on the base that was given"
        for what, found in (("rounding", self.rounding), ("the change of base", self.distance)):
            if any(found.values()):
                worst = max(found, key=found.__getitem__)
                mean = sum(found.values()) / len(found)
                said += (
                    f"; {what} is {mean:.2e} of an update, {found[worst]:.2e} in {worst or 'it'}"
                )
        return said


def _check_mergeable(model: nn.Module) -> None:
    for path, layer in lora_layers(model):
        name = path or type(layer).__name__
        for factor in layer.update_parameters().values():
            if factor.is_meta:
                raise ValueError(f"{name} is on the meta device: there is nothing to merge yet")
            if not torch.isfinite(factor).all():
                raise ValueError(f"{name}: a LoRA factor has a NaN or infinite value; not merged")
        if "lora_bias" in layer.variant and path:
            merged_bias(name, layer)
    for name, other in tied_updates(model):
        raise ValueError(
            f"{name}.weight is tied to {other}: merging would change or untie that one; untie it "
            "first, by giving one of them a Parameter of its own (and, for a transformers model, "
            "config.tie_word_embeddings = False)"
        )
    if getattr(getattr(model, "config", None), "tie_word_embeddings", False):
        owners = {id(p): name for name, p in model.named_parameters()}
        for name, module in full_modules(model):
            tied = [owners[id(p)] for p in original(module).parameters() if id(p) in owners]
            if tied:
                raise ValueError(
                    f"{name} was trained apart from {tied[0]}, to which it was tied: set "
                    "config.tie_word_embeddings = False first, or saving would tie them again"
                )
