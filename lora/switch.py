"""Several adapters on one model, one of them active.

An adapter on a model is the modules that it puts in the place of the base's: LoRA layers on the same
frozen Parameters, and trainable copies (`modules_to_save`). Switching puts other module objects in
their places. No weight is read, and `torch.compile` guards on what a layer is, not on which one it
is, so a compiled model goes on as it is while ranks and scales stay the same.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import nn

from ._base import LoRALayer, lora_layers
from .full import bring_over, full_modules, is_full, original
from .sharded import refuse_sharded

DEFAULT = "default"
_STORE = "_lora_adapters"
BIAS_MODE = "_lora_bias"  # attribute of a model whose biases were marked as trainable

_Modules = dict[str, nn.Module]


@dataclass
class Adapters:
    """What `model` holds: the base's modules by name, every adapter's by name, and which is active."""

    base: _Modules
    modules: dict[str, _Modules] = field(default_factory=dict)
    active: str = DEFAULT


def adapters_of(model: nn.Module) -> Adapters | None:
    """The adapters of a model that has some; None for a plain one.

    Of a model with one adapter that was never switched, `base` is empty: see `with_base`.
    """
    store = model.__dict__.get(_STORE)
    if isinstance(store, Adapters):
        return store
    modules: _Modules = {n: m for n, m in lora_layers(model, remove_duplicate=False) if n}
    modules |= dict(full_modules(model, remove_duplicate=False))
    return Adapters({}, {DEFAULT: modules}) if modules else None


def with_base(store: Adapters) -> Adapters:
    """`store` with the base's modules. ValueError for a weight that no plain module can share."""
    plain: _Modules = {}
    for path, module in store.modules[store.active].items():
        if path in store.base:
            continue
        base = module.to_module() if isinstance(module, LoRALayer) else original(module)
        if isinstance(module, LoRALayer) and base.weight is not module.weight:
            raise ValueError(
                f"{path} was built with fan_in_fan_out=True: no nn.Linear can hold its weight, so it "
                "holds one adapter alone; patch a plain model to switch"
            )
        plain[path] = base
    store.base |= plain
    return store


def adapter_names(model: nn.Module) -> tuple[str, ...]:
    """Names of the model's adapters, the active one first; none of a plain model.

    >>> adapter_names(torch.nn.Sequential(Linear(4, 4, r=2)))
    ('default',)
    """
    store = adapters_of(inner_model(model))
    if store is None:
        return ()
    return (store.active, *(name for name in store.modules if name != store.active))


def inner_model(model: nn.Module) -> nn.Module:
    """The model inside what torch.compile or a data-parallel wrapper returned."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"expected a torch.nn.Module, got {model!r}")
    while True:
        if hasattr(model, "_orig_mod"):
            model = model._orig_mod  # type: ignore[assignment]
        elif isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
            model = model.module
        else:
            return model


def refuse_data_parallel(model: nn.Module) -> None:
    """ValueError for an engine that keeps a list of the Parameters that were there when it was made."""
    if isinstance(model, nn.parallel.DistributedDataParallel):
        raise ValueError(
            "the model is in DistributedDataParallel, which does not know other Parameters: change "
            "the adapters of model.module, then wrap it again"
        )
    refuse_sharded(
        inner_model(model),
        "its engine does not know the Parameters of another adapter",
        "load and choose the adapter before fully_shard or parallelize_module",
    )


def add_adapter(
    model: nn.Module, name: str, modules: Mapping[str, nn.Module], base: _Modules
) -> None:
    """Keep `modules` (by their paths) as the adapter `name`, inactive; `base`: the base's there."""
    store = adapters_of(model)
    assert store is not None
    store.base |= base
    store.modules[name] = dict(modules)
    model.__dict__[_STORE] = store


def name_adapter(model: nn.Module, name: str) -> None:
    """Give the one adapter of `model` another name than "default"."""
    store = adapters_of(model)
    if store is not None and name != store.active:
        model.__dict__[_STORE] = Adapters(store.base, {name: store.modules[store.active]}, name)


def set_adapter(model: nn.Module, name: str) -> None:
    """Make the adapter `name` the active one: its factors are `lora_A` and `lora_B` from now on.

    Exact and without a pass over any weight. What trains is what trained when it was active last,
    so make a new optimizer, or one over the Parameters of all adapters. A compiled model does not
    recompile for the same ranks and scales, and once for a new one. Raises ValueError if there is
    no such adapter, within `lora.disabled`, and for a model in DistributedDataParallel or a sharded
    one, which would not know the other Parameters. `model.to(dtype)` changes the factors of the
    active adapter alone.

    >>> set_adapter(model, "b")  # doctest: +SKIP
    """
    refuse_data_parallel(model)
    model = inner_model(model)
    store = _store_with(model, name)
    if any(layer.disabled for _, layer in lora_layers(model)):
        raise ValueError(
            f"adapter {name!r}: the model's adapter is disabled; leave lora.disabled first"
        )
    if name != store.active:
        _put(model, store, store.modules[store.active], store.modules[name])
        store.active = name


def delete_adapter(model: nn.Module, name: str) -> None:
    """Remove the adapter `name`; with the last one the model is the plain base again.

    It is so but for biases that were trained: they stay.

    Raises ValueError if there is no such adapter, or if it is active and there are others.
    """
    model = inner_model(model)
    store = _store_with(model, name)
    others = [other for other in store.modules if other != name]
    if others and name == store.active:
        raise ValueError(
            f"adapter {name!r} is active: lora.set_adapter(model, {others[0]!r}) first"
        )
    if not others:
        refuse_data_parallel(model)
        _put(model, store, store.modules[name], {})
        forget_adapters(model)
    else:
        del store.modules[name]


def forget_adapters(model: nn.Module) -> None:
    """Drop what was noted of adapters and biases, also inside a wrapper."""
    for module in model.modules():
        module.__dict__.pop(_STORE, None)
        module.__dict__.pop(BIAS_MODE, None)


def _store_with(model: nn.Module, name: str) -> Adapters:
    store = adapters_of(model)
    if store is None:
        raise ValueError(
            f"adapter {name!r}: {type(model).__name__} has no adapters; load one first"
        )
    if name not in store.modules:
        raise ValueError(f"adapter {name!r}: expected one of {', '.join(map(repr, store.modules))}")
    return with_base(store)


def _put(model: nn.Module, store: Adapters, old: _Modules, new: _Modules) -> None:
    """Put `new` modules, and the base's where there is none, in the place of `old` ones."""
    places = []
    for path in {**old, **new}:
        parent_name, _, own = path.rpartition(".")
        place = model.get_submodule(parent_name)._modules
        module, current = new.get(path, store.base[path]), place[own]
        assert current is not None
        _take_over(current, module)
        places.append((place, own, module))
    for place, own, module in places:
        place[own] = module  # setattr would look for Parameters and buffers of this name first


def _take_over(current: nn.Module, module: nn.Module) -> None:
    """Bring `module`, inactive so far, to the mode, weights and device of the one in its place."""
    if isinstance(current, LoRALayer):
        current._drop_merged()
    for part in module.modules():  # not train(), which may merge
        part.__dict__["training"] = current.training
    if is_full(current) or is_full(module):
        bring_over(module, current)
    else:
        # The frozen weight may have become another Parameter meanwhile, as by load(assign=True).
        for name, parameter in current._parameters.items():
            if name in module._parameters and not name.startswith("lora_"):
                module._parameters[name] = parameter
    if isinstance(module, LoRALayer) and module.r > 0 and not module.weight.is_meta:
        for factor in module.update_parameters().values():
            if factor.device != module.weight.device and not factor.is_meta:
                factor.data = factor.data.to(module.weight.device)
