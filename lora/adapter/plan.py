"""What loading an adapter is going to do to a model, and everything that speaks against it.

`into_layers` gives values to LoRA layers that are there, `into_modules` adapts modules of the base.
Neither changes anything.
"""

from __future__ import annotations

import itertools
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ..full import is_full
from ..quantized import is_quantized
from ..sharded import row_order, whole
from ..state import bias_mode, is_bias
from ..switch import BIAS_MODE, adapter_names, adapters_of, with_base
from ..targets import linear_names
from . import fingerprint
from .contents import Adapter, AdapterError
from .fit import misfit, stranger, unfit, unholdable
from .peft_config import CONFIG_NAME
from .peft_format import outer_names
from .save import active_modules, biases_of, described, matrix, plain_name
from .selection import selected
from .storage import File

_SHARED = "biases: an adapter with trained biases cannot be beside another, which would share them"


@dataclass
class Plan:
    """What is going to be done, and what speaks against it.

    problems: by the name of what they concern. values: (module, parameter or buffer, value), by
    their paths, to be set. targets, full: paths where new modules go, and the adapter's names of them.
    """

    problems: dict[str, str]
    base: str = ""
    loaded: list[str] = field(default_factory=list)
    values: list[tuple[str, str, Tensor]] = field(default_factory=list)
    targets: dict[str, str] = field(default_factory=dict)
    full: dict[str, str] = field(default_factory=dict)


def into_layers(model: nn.Module, file: File) -> Plan:
    """Give the values to the active layers of the model."""
    plan, adapter, modules = Plan(dict(file.problems)), file.adapter, active_modules(model)
    paths = _paths(model)
    layers, saved = described(modules)
    for name in sorted(layers.keys() - adapter.layers.keys() - plan.problems.keys()):
        plan.problems[name] = f"missing: the file has nothing for {name}"
    for name, layer in adapter.layers.items():
        if name in layers:
            problem = misfit(name, layer, layers[name])
        elif name in paths:
            problem = f"misfit: {name} is not adapted in this model"
        else:
            problem = stranger(name, layers)
        if problem is not None:
            plan.problems[name] = problem
        elif _plan_values(
            plan, model, paths, {f"{name}.{own}": t for own, t in layer.parameters().items()}
        ):
            plan.loaded.append(name)
    for name in (n for n, module in modules.items() if is_full(module)):
        keys = [key for key in saved if key.startswith(f"{name}.")]
        missing = [key for key in keys if key not in adapter.saved]
        plan.problems |= {key: f"missing tensor {key}" for key in missing}
        there = {key: adapter.saved[key] for key in keys if key not in missing}
        if not missing and _plan_values(plan, model, paths, there):
            plan.loaded.append(name)
    for key in sorted(adapter.saved.keys() - saved.keys()):
        plan.problems[key] = (
            f"unexpected: {key} was trained in full, here it is frozen: patch the model with "
            f"modules_to_save={list(adapter.modules_to_save)}"
        )
    marked = biases_of(model, model.__dict__.get(BIAS_MODE, "none"))
    if adapter.biases and bias_mode(model) == "none":
        plan.problems["bias"] = (
            f"misfit: the file has {len(adapter.biases)} trained biases, in the model they are frozen"
        )
    elif adapter.biases and len(adapter_names(model)) > 1:
        plan.problems["bias"] = _SHARED
    _plan_biases(plan, model, adapter, marked.keys() - saved.keys())
    _check_copies(plan, model, adapter)
    _compare_bases(plan, adapter, modules)
    return plan


def into_modules(model: nn.Module, file: File) -> Plan:
    """Adapt the base's modules: of a plain model, or for a further adapter."""
    plan, adapter, store = Plan(dict(file.problems)), file.adapter, adapters_of(model)
    try:
        base = dict(base_modules(model))
    except ValueError as error:
        raise AdapterError(str(error)) from error
    by_name = {plain_name(path): module for path, module in reversed(base.items())}
    for name, layer in adapter.layers.items():
        problem = unfit(name, layer, by_name)
        if problem is not None:
            plan.problems[name] = problem
        else:
            plan.targets |= {path: name for path, m in base.items() if m is by_name[name]}
            plan.loaded.append(name)
    if not file.native:
        linear = {plain_name(path) for path in linear_names(model, base)}
        _compare_selection(plan, file, by_name, linear)
    others = with_base(store).base if store is not None else {}
    new = adapter.layers.keys() | set(adapter.modules_to_save)
    for path, other in itertools.product(base, others):
        nested = path.startswith(f"{other}.") or other.startswith(f"{path}.")
        if nested and plain_name(path) in new:
            plan.problems[path] = f"{path} lies in {other} of another adapter, or that in it"
    _plan_full(plan, file, base)
    if others and (adapter.biases or bias_mode(model) != "none"):
        plan.problems["bias"] = _SHARED
    _plan_biases(plan, model, adapter, _biases_meant(adapter, base))
    _check_copies(plan, model, adapter)
    _compare_bases(plan, adapter, by_name)
    return plan


def base_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Paths and modules of the model without any adapter."""
    store = adapters_of(model)
    replaced = with_base(store).base if store is not None else {}
    for path, module in model.named_modules(remove_duplicate=False):
        if path in replaced:
            for inner, part in replaced[path].named_modules(remove_duplicate=False):
                yield f"{path}.{inner}" if inner else path, part
        elif path and not any(outer in replaced for outer in outer_names(path)):
            yield path, module


def _compare_selection(
    plan: Plan, file: File, base: Mapping[str, nn.Module], linear: Collection[str]
) -> None:
    """PEFT adapts what the config selects: no more and no less may be in the file."""
    chosen = selected(file.config, base.keys(), linear)
    leaves = {name for name in chosen if not any(True for _ in base[name].children())}
    for name in sorted(leaves - file.adapter.layers.keys() - plan.problems.keys()):
        plan.problems[name] = f"missing: the file has nothing for {name}, which its config selects"
    for name in sorted(file.adapter.layers.keys() & base.keys() - chosen):
        plan.problems[name] = f"unexpected: {name} is not selected by the config's target_modules"


def _plan_full(plan: Plan, file: File, base: dict[str, nn.Module]) -> None:
    """Plan the modules that were trained in full; every tensor of theirs must find its place."""
    saved, config = file.adapter.saved, file.config
    if file.native:
        wrapped = file.adapter.modules_to_save
    else:  # entries of modules_to_save are ends of names; PEFT adds some that a model need not have
        ends = tuple(config.get("modules_to_save") or ())
        wrapped = tuple(n for n in map(plain_name, base) if ends and n.endswith(ends))
    claimed: set[str] = set()
    first_names = {module: plain_name(path) for path, module in reversed(base.items())}
    for path, module in base.items():
        name = first_names[module]
        if name not in wrapped or any(name.startswith(f"{outer}.") for outer in wrapped):
            continue
        state = module.state_dict(prefix=f"{name}.")
        problems = {}
        for key, now in state.items():
            there = key in saved
            problem = unholdable(key, saved[key], now) if there else f"missing tensor {key}"
            if problem is not None:
                problems[key] = problem
        plan.problems |= problems
        claimed |= state.keys()
        if state and not problems:
            plan.full[path] = name
            plan.loaded.append(name)
    for key in sorted(saved.keys() - claimed):
        # With bias="all" PEFT repeats the copy's bias, and the frozen one, under names of its own.
        if not key.endswith((".original_module.bias", ".modules_to_save.bias")):
            problem = f"unexpected tensor {key}: the model has none of this name"
            plan.problems.setdefault(key, problem)


def _plan_biases(plan: Plan, model: nn.Module, adapter: Adapter, expected: Collection[str]) -> None:
    """Plan the trained biases, if the model may have them: all that are expected."""
    if "bias" in plan.problems:
        return
    for key in sorted(expected - adapter.biases.keys()):
        plan.problems.setdefault(key, f"missing tensor {key}")
    paths = _paths(model)
    for key, value in adapter.biases.items():
        _plan_values(plan, model, paths, {key: value})


def _biases_meant(adapter: Adapter, base: Mapping[str, nn.Module]) -> set[str]:
    """Names of the base's biases that the adapter's mode means."""
    names: dict[int, str] = {}
    for path, module in base.items():
        for own, parameter in module._parameters.items():
            key = f"{plain_name(path)}.{own}"
            adapted = plain_name(path) in adapter.layers and own == "bias"
            if parameter is None or key in adapter.saved:
                continue
            if (adapter.bias == "all" and is_bias(own)) or (
                adapter.bias == "lora_only" and adapted
            ):
                names.setdefault(id(parameter), key)
    return set(names.values())


def _paths(model: nn.Module) -> dict[str, str]:
    """Plain name to path of every module."""
    return {plain_name(path): path for path, _ in model.named_modules()}


def _plan_values(
    plan: Plan, model: nn.Module, paths: Mapping[str, str], values: Mapping[str, Tensor]
) -> bool:
    """Plan these values, by name in the state dict: all of them, or none if one has no place."""
    steps, problems = [], {}
    for key, value in values.items():
        name, _, own = key.rpartition(".")
        now = tensor_of(model.get_submodule(paths[name]), own) if name in paths else None
        if now is None:
            problems[key] = f"unexpected tensor {key}: the model has none of this name"
        elif (problem := unholdable(key, value, now)) is not None:
            problems[key] = problem
        else:
            steps.append((paths[name], own, value))
    plan.problems |= problems
    plan.values += steps if not problems else []
    return not problems


def registry_of(module: nn.Module, own: str) -> dict[str, Any]:
    """Where the module keeps the tensor: its Parameters, or its buffers."""
    return module._buffers if own in module._buffers else module._parameters


def tensor_of(module: nn.Module, own: str) -> Tensor | None:
    tensor: Tensor | None = registry_of(module, own).get(own)
    return tensor


def _check_copies(plan: Plan, model: nn.Module, adapter: Adapter) -> None:
    """Tensors of the frozen base that the file repeats must be this base's."""
    if not adapter.copies:
        return
    base = {
        f"{plain_name(path)}.{own}": tensor
        for path, module in base_modules(model)
        for own, tensor in (*module._parameters.items(), *module._buffers.items())
    }
    for key, value in adapter.copies.items():
        now = base.get(key)
        if now is None:
            plan.problems[key] = f"unexpected tensor {key}: the model has none of this name"
        elif now.shape != value.shape or not torch.equal(whole(now).cpu(), value.to(now.dtype)):
            plan.problems[key] = (
                f"unexpected tensor {key}: it differs from the model's; if it was trained, list its "
                f"module in modules_to_save of {CONFIG_NAME}"
            )


def _compare_bases(plan: Plan, adapter: Adapter, modules: Mapping[str, nn.Module]) -> None:
    """Whether the frozen weights of `modules` are those of the training."""
    there = modules.keys() - plan.problems.keys()
    then = {n: x.fingerprint for n, x in adapter.layers.items() if n in there}
    weights = {n: matrix(modules[n]) for n, known in then.items() if known}
    now = {
        n: fingerprint.of_base(then[n] or "", weight, row_order(modules[n], "weight"))
        for n, weight in weights.items()
    }
    dense = [n for n in weights if fingerprint.is_loftq(then[n]) and not is_quantized(weights[n])]
    plan.base, problem = fingerprint.compare(then, now, adapter.base)
    if problem is None and dense:
        problem = (
            f"{fingerprint.loftq_alone(dense[0])}: quantise the base first (lora.patch with "
            "quantize='nf4'), or load it in 4 bits"
        )
    if problem is not None:
        plan.problems["base"] = problem
