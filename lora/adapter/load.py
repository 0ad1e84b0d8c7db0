"""From an adapter to a model: `load_adapter`.

Everything that does not fit is found first; then what is new is built beside the model; only then
the model is touched.
"""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .._base import LoRALayer
from ..full import is_full
from ..patch import build_all, check_patchable, install, unchanged_on_error
from ..state import bias_mode
from ..switch import (
    BIAS_MODE,
    DEFAULT,
    adapter_names,
    adapters_of,
    add_adapter,
    inner_model,
    name_adapter,
    refuse_data_parallel,
    with_base,
)
from ..targets import linear_names
from . import files, fingerprint, peft_format
from .contents import Adapter, AdapterError, Layer, listed
from .fit import misfit, misshapen, stranger, unfit, unholdable
from .save import (
    CLASSES,
    active_modules,
    biases_of,
    described,
    matrix,
    plain_name,
)
from .storage import File, heal, read_adapter

_FACTORS = ("lora_A", "lora_B")
_SHARED = "biases: an adapter with trained biases cannot be beside another, which would share them"


@dataclass(frozen=True)
class Report:
    """What `load_adapter` found; `str()` of it says it in words.

    Attributes:
        path: the file that was read.
        loaded: names of the modules that have their values from it now.
        problems: everything that does not fit; empty after a strict load.
        verified: True if the file has a digest and it matches; a file of another library has none.
        base: whether the frozen weights are those that the adapter was trained on: "matches",
            "differs", or "not checked: ..." with the reason.
    """

    path: Path
    loaded: tuple[str, ...]
    problems: tuple[str, ...]
    verified: bool
    base: str

    def __str__(self) -> str:
        digest = "verified" if self.verified else "not verified (no digest of ours)"
        return "\n".join(
            [
                f"{self.path}: {digest}; {len(self.loaded)} modules loaded",
                f"frozen weights: {self.base}",
                *(f"problem: {problem}" for problem in self.problems),
            ]
        )


def load_adapter(
    model: nn.Module,
    path: str | Path,
    name: str | None = None,
    *,
    strict: bool = True,
    merge_weights: bool = False,
    lora_dtype: torch.dtype | None = None,
) -> Report:
    """Load an adapter of this library, of PEFT, or a loralib state dict into `model`.

    A plain model is patched as the adapter says, and its factors train. A model with LoRA layers
    keeps them: they must fit, scales included, and get the values (dropout stays the model's). A new
    `name` on such a model adds a further adapter, inactive until `lora.set_adapter`.

    Args:
        model: changed in place.
        path: a folder, or a file in it. A `.pt` file (`torch.save(lora_state_dict(model), ...)`)
            needs a model that is patched already, since it does not say rank and alpha.
        name: of the adapter on the model; None is the active one ("default" on a plain model).
        strict: False loads what fits and returns the problems, where True raises.
        merge_weights, lora_dtype: of new layers, as in `lora.patch`. With lora_dtype None, factors
            have the dtype of a file of ours, and of other files fp32 instead of bf16 and fp16, as
            PEFT loads them; another dtype may round them.

    Raises:
        AdapterError (a ValueError): missing, unexpected or misshapen tensors, NaN or infinite values,
            a digest that does not match, a missing alpha, another base model, features of PEFT that
            are not here. The model is then as it was, to the bit.
        TypeError: a module that cannot be adapted, see `lora.patch`.
        FileNotFoundError: no adapter at `path`.

    Warns if every update is zero: such an adapter does nothing yet.
    """
    wrapper, model = model, inner_model(model)
    names = adapter_names(model)
    if lora_dtype is not None and not lora_dtype.is_floating_point:
        raise ValueError(f"lora_dtype={lora_dtype}: expected a floating-point dtype")
    if name is not None and (not isinstance(name, str) or not name):
        raise AdapterError(f"name={name!r}: expected a string, or None for the active adapter")
    file = _read(model, Path(path))
    if names and (name is None or name == names[0]):
        plan = _plan_values(model, file)
    elif name in names:
        raise AdapterError(
            f"name={name!r}: the model has such an adapter; lora.delete_adapter it first"
        )
    else:
        refuse_data_parallel(wrapper)
        if not names:
            check_patchable(wrapper)
        plan = _plan_modules(model, file)
    if strict and plan.problems:
        advice = "the model is unchanged"
        if any(problem.startswith("misfit") for problem in plan.problems.values()):
            advice += "; load it into the plain model (lora.unpatch) or under another name"
        raise AdapterError(f"{file.path}: {listed(plan.problems.values())}; {advice}")
    _carry_out(model, plan, file, name or DEFAULT, merge_weights, lora_dtype)
    heal(Path(path), file)
    if file.adapter.does_nothing():
        warnings.warn(f"{file.path}: this adapter does nothing yet: B is zero", stacklevel=2)
    problems = tuple(plan.problems.values())
    return Report(file.path, tuple(plan.loaded), problems, file.verified, plan.base)


@dataclass
class _Plan:
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


def _carry_out(
    model: nn.Module,
    plan: _Plan,
    file: File,
    name: str,
    merge_weights: bool,
    lora_dtype: torch.dtype | None,
) -> None:
    """Build what is new, then change the model; if anything fails, it is as it was."""
    adapter, further = file.adapter, adapters_of(model) is not None
    base = dict(_base_modules(model)) if plan.targets or plan.full else {}

    def build(path: str, module: nn.Module) -> LoRALayer:
        layer = adapter.layers[plan.targets[path]]
        dtype = lora_dtype or layer.lora_A.dtype
        if lora_dtype is None and not file.native and dtype.itemsize < 4:
            dtype = torch.float32
        return _built(layer, module, merge_weights, dtype)

    paths = [*plan.targets, *plan.full]
    with unchanged_on_error(model, paths), _restoring(model, plan.values):
        targets, full = {p: base[p] for p in plan.targets}, {p: base[p] for p in plan.full}
        new = build_all(model, targets, full, build)
        for path, own in plan.full.items():
            _fill(new[path], own, adapter)
        if new and not further:
            install(model, new, adapter.bias)
        for path, own, value in plan.values:
            _set_value(model.get_submodule(path), own, value)
        if new and further:
            add_adapter(model, name, new, targets | full)
        elif new:
            name_adapter(model, name)


@contextmanager
def _restoring(model: nn.Module, values: Iterable[tuple[str, str, Tensor]]) -> Iterator[None]:
    """If the block raises, the tensors that `values` name are those that they were, to the bit."""
    before = []
    for path, own, _ in values:
        module = model.get_submodule(path)
        tensor = _tensor(module, own)
        kept = None if tensor is None or tensor.is_meta else tensor.detach().clone()
        before.append((_registry(module, own), own, tensor, kept))
    try:
        yield
    except BaseException:
        for registry, own, tensor, kept in before:
            registry[own] = tensor
            if tensor is not None and kept is not None and not _same_bits(tensor.detach(), kept):
                tensor.detach().copy_(kept)
        raise


def _same_bits(one: Tensor, other: Tensor) -> bool:
    return torch.equal(*(t.contiguous().flatten().view(torch.uint8) for t in (one, other)))


# The file


def _read(model: nn.Module, path: Path) -> File:
    """The file; of a state dict, the adapter that its tensors are for `model`."""
    if not path.is_file() or path.suffix in (".safetensors", ".json"):
        return read_adapter(path)
    state = files.read_state_dict(path)
    if any(key.startswith(peft_format.PREFIX) for key in state):
        return read_adapter(path)
    return _read_state_dict(model, path, state)


def _read_state_dict(model: nn.Module, path: Path, state: dict[str, Tensor]) -> File:
    """What loralib's users save: bare tensors, whose meaning is in the model's layers."""
    layers, saved = described(active_modules(model))
    if not layers and not saved:
        raise AdapterError(
            f"{path} is a state dict, which does not say rank, alpha and kinds of layers: patch the "
            "model as it was patched for training, then load it"
        )
    problems, found = {}, {}
    for name, layer in layers.items():
        A, B = (state.pop(f"{name}.{own}", None) for own in ("lora_A", "lora_B"))
        if A is None or B is None:
            problems[name] = f"missing tensor {name}.lora_{'A' if A is None else 'B'}"
        elif (problem := misshapen(name, [A, B], layer)) is not None:
            problems[name] = problem
        else:
            found[name] = layer.with_factors(A, B, fingerprint=None)
    parameters = {plain_name(n) for n, _ in model.named_parameters()}
    biases = {k: state.pop(k) for k in list(state) if k in parameters and k.endswith("bias")}
    adapter = Adapter(
        layers=found,
        bias="all" if biases else "none",
        biases=biases,
        saved={key: state.pop(key) for key in saved if key in state},
    )
    problems |= {key: f"unexpected tensor {key}" for key in state}
    adapter, bad = adapter.sound()
    return File(path, adapter, {}, problems | bad, False, False, path.stat().st_size)


# Into layers that are there


def _plan_values(model: nn.Module, file: File) -> _Plan:
    """Give the values to the active layers of the model."""
    plan, adapter, modules = _Plan(dict(file.problems)), file.adapter, active_modules(model)
    paths = {plain_name(path): path for path, _ in model.named_modules()}
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
        elif _plan_values_of(plan, model, {f"{name}.{o}": getattr(layer, o) for o in _FACTORS}):
            plan.loaded.append(name)
    for name in (n for n, module in modules.items() if is_full(module)):
        keys = [key for key in saved if key.startswith(f"{name}.")]
        missing = [key for key in keys if key not in adapter.saved]
        plan.problems |= {key: f"missing tensor {key}" for key in missing}
        there = {key: adapter.saved[key] for key in keys if key not in missing}
        if not missing and _plan_values_of(plan, model, there):
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


def _plan_values_of(plan: _Plan, model: nn.Module, values: Mapping[str, Tensor]) -> bool:
    """Plan these values, by name in the state dict: all of them, or none if one has no place."""
    paths = {plain_name(path): path for path, _ in model.named_modules()}
    steps, problems = [], {}
    for key, value in values.items():
        name, _, own = key.rpartition(".")
        now = _tensor(model.get_submodule(paths[name]), own) if name in paths else None
        if now is None:
            problems[key] = f"unexpected tensor {key}: the model has none of this name"
        elif (problem := unholdable(key, value, now)) is not None:
            problems[key] = problem
        else:
            steps.append((paths[name], own, value))
    plan.problems |= problems
    plan.values += steps if not problems else []
    return not problems


def _registry(module: nn.Module, own: str) -> dict[str, Any]:
    """Where the module keeps the tensor: its Parameters, or its buffers."""
    return module._buffers if own in module._buffers else module._parameters


def _tensor(module: nn.Module, own: str) -> Tensor | None:
    tensor: Tensor | None = _registry(module, own).get(own)
    return tensor


def _set_value(module: nn.Module, own: str, value: Tensor) -> None:
    registry, now = _registry(module, own), _tensor(module, own)
    assert now is not None
    if not now.is_meta:
        with torch.no_grad():
            now.copy_(value)
    elif isinstance(now, nn.Parameter):  # there is nothing to copy into
        registry[own] = nn.Parameter(value.to(now.dtype), now.requires_grad)
    else:
        registry[own] = value.to(now.dtype)


def _plan_biases(
    plan: _Plan, model: nn.Module, adapter: Adapter, expected: Collection[str]
) -> None:
    """Plan the trained biases, if the model may have them: all that are expected."""
    if "bias" in plan.problems:
        return
    for key in sorted(expected - adapter.biases.keys()):
        plan.problems.setdefault(key, f"missing tensor {key}")
    for key, value in adapter.biases.items():
        _plan_values_of(plan, model, {key: value})


def _check_copies(plan: _Plan, model: nn.Module, adapter: Adapter) -> None:
    """Tensors of the frozen base that the file repeats must be this base's."""
    if not adapter.copies:
        return
    base = {
        f"{plain_name(path)}.{own}": tensor
        for path, module in _base_modules(model)
        for own, tensor in (*module._parameters.items(), *module._buffers.items())
    }
    for key, value in adapter.copies.items():
        now = base.get(key)
        if now is None:
            plan.problems[key] = f"unexpected tensor {key}: the model has none of this name"
        elif now.shape != value.shape or not torch.equal(now.detach().cpu(), value.to(now.dtype)):
            plan.problems[key] = (
                f"unexpected tensor {key}: it differs from the model's; if it was trained, list its "
                f"module in modules_to_save of {peft_format.CONFIG_NAME}"
            )


def _compare_bases(plan: _Plan, adapter: Adapter, modules: Mapping[str, nn.Module]) -> None:
    """Whether the frozen weights of `modules` are those of the training."""
    then = {n: x.fingerprint for n, x in adapter.layers.items() if n in modules}
    now = {n: fingerprint.fingerprint(matrix(modules[n])) for n, known in then.items() if known}
    plan.base, problem = fingerprint.compare(then, now, adapter.base)
    if problem is not None:
        plan.problems["base"] = problem


# Into modules that are not LoRA layers


def _plan_modules(model: nn.Module, file: File) -> _Plan:
    """Adapt the base's modules: of a plain model, or for a further adapter."""
    plan, adapter, store = _Plan(dict(file.problems)), file.adapter, adapters_of(model)
    try:
        base = dict(_base_modules(model))
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
        _compare_selection(plan, model, file, by_name)
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


def _biases_meant(adapter: Adapter, base: Mapping[str, nn.Module]) -> set[str]:
    """Names of the base's biases that the adapter's mode means."""
    names: dict[int, str] = {}
    for path, module in base.items():
        for own, parameter in module._parameters.items():
            key, is_bias = f"{plain_name(path)}.{own}", "bias" in own.split("_")
            adapted = plain_name(path) in adapter.layers and own == "bias"
            if parameter is None or key in adapter.saved:
                continue
            if (adapter.bias == "all" and is_bias) or (adapter.bias == "lora_only" and adapted):
                names.setdefault(id(parameter), key)
    return set(names.values())


def _base_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Paths and modules of the model without any adapter."""
    store = adapters_of(model)
    replaced = with_base(store).base if store is not None else {}
    for path, module in model.named_modules(remove_duplicate=False):
        if path in replaced:
            for inner, part in replaced[path].named_modules(remove_duplicate=False):
                yield f"{path}.{inner}" if inner else path, part
        elif path and not any(path.startswith(f"{outer}.") for outer in replaced):
            yield path, module


def _compare_selection(
    plan: _Plan, model: nn.Module, file: File, base: Mapping[str, nn.Module]
) -> None:
    """PEFT adapts what the config selects: no more and no less may be in the file."""
    linear = {plain_name(name) for name in linear_names(model, dict(_base_modules(model)))}
    chosen = peft_format.selected(file.config, base.keys(), linear)
    leaves = {name for name in chosen if not any(True for _ in base[name].children())}
    for name in sorted(leaves - file.adapter.layers.keys() - plan.problems.keys()):
        plan.problems[name] = f"missing: the file has nothing for {name}, which its config selects"
    for name in sorted(file.adapter.layers.keys() & base.keys() - chosen):
        plan.problems[name] = f"unexpected: {name} is not selected by the config's target_modules"


def _plan_full(plan: _Plan, file: File, base: dict[str, nn.Module]) -> None:
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


def _built(layer: Layer, module: nn.Module, merge_weights: bool, dtype: torch.dtype) -> LoRALayer:
    """The LoRA layer on `module` that `layer` describes."""
    options: dict[str, Any] = {}
    if layer.kind != "Embedding":
        options["lora_dropout"] = layer.lora_dropout
    if layer.kind == "MergedLinear":
        options |= {"enable_lora": layer.enable_lora, "out_splits": layer.out_splits}
    kind = CLASSES[layer.kind]
    new: LoRALayer = kind.from_module(  # type: ignore[attr-defined]
        module, layer.r, layer.lora_alpha, merge_weights=merge_weights, lora_dtype=dtype, **options
    )
    new.scaling = layer.scaling
    for own in ("lora_A", "lora_B"):
        factor = getattr(new, own)
        place = torch.device("cpu") if factor.is_meta else factor.device
        new._parameters[own] = nn.Parameter(getattr(layer, own).to(place, dtype, copy=True))
    return new


def _fill(module: nn.Module, name: str, adapter: Adapter) -> None:
    """Give a trainable copy its values."""
    for key in module.state_dict():
        inner, _, own = key.rpartition(".")
        _set_value(module.get_submodule(inner), own, adapter.saved[f"{name}.{key}"])
