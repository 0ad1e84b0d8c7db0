"""From an adapter to a model: `load_adapter`.

`plan` finds everything that does not fit; then what is new is built beside the model; only then the
model is touched.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .._base import LoRALayer
from ..patch import build_all, check_patchable, install, unchanged_on_error
from ..quantized import is_quantized
from ..sharded import (
    all_or_none,
    assign,
    is_sharded,
    reshard,
    row_order,
    same_as_first,
    sharded_tensor,
)
from ..switch import (
    DEFAULT,
    adapter_names,
    adapters_of,
    add_adapter,
    inner_model,
    name_adapter,
    refuse_data_parallel,
)
from ..variants import begins_as
from . import files, fingerprint, peft_format
from .contents import Adapter, AdapterError, Layer, listed
from .fit import misshapen
from .plan import Plan, base_modules, into_layers, into_modules, registry_of, tensor_of
from .save import (
    CLASSES,
    active_modules,
    described,
    plain_name,
)
from .storage import File, digest, heal, read_adapter


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
        model: changed in place. If it is sharded over processes, call this in every process; each
            reads the file and takes its part. A plain model is patched first and sharded then.
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

    Of a sharded model call it in every process, where it raises in all or in none.

    Warns if every update is zero: such an adapter does nothing yet.
    """
    wrapper, model = model, inner_model(model)
    reshard(model)
    names = adapter_names(model)
    if lora_dtype is not None and not lora_dtype.is_floating_point:
        raise ValueError(f"lora_dtype={lora_dtype}: expected a floating-point dtype")
    if name is not None and (not isinstance(name, str) or not name):
        raise AdapterError(f"name={name!r}: expected a string, or None for the active adapter")
    file = _read_alike(model, Path(path))
    if names and (name is None or name == names[0]):
        plan = into_layers(model, file)
    elif name in names:
        raise AdapterError(
            f"name={name!r}: the model has such an adapter; lora.delete_adapter it first"
        )
    else:
        refuse_data_parallel(wrapper)
        if not names:
            check_patchable(wrapper)
        plan = into_modules(model, file)
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


def _read_alike(model: nn.Module, path: Path) -> File:
    """Read it; in the processes of a sharded model all of them, and the same one."""
    sharded = sharded_tensor(model)
    if sharded is None:
        return _read(model, path)
    with all_or_none(sharded):
        file = _read(model, path)
        found = digest(str(file.config), file.adapter.tensors())
    with all_or_none(sharded):
        if not same_as_first(sharded, found):
            raise AdapterError(f"{file.path}: not the adapter that the first process has there")
    return file


def _carry_out(
    model: nn.Module,
    plan: Plan,
    file: File,
    name: str,
    merge_weights: bool,
    lora_dtype: torch.dtype | None,
) -> None:
    """Build what is new, then change the model; if anything fails, it is as it was."""
    adapter, further = file.adapter, adapters_of(model) is not None
    base = dict(base_modules(model)) if plan.targets or plan.full else {}

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
        for name, module in active_modules(model).items() if not new else ():
            if name in plan.loaded and isinstance(module, LoRALayer):
                _say_loftq(module, adapter.layers[name])
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
        tensor = tensor_of(module, own)
        kept = None if tensor is None or tensor.is_meta else _local(tensor).clone()
        before.append((registry_of(module, own), own, tensor, kept))
    try:
        yield
    except BaseException:
        for registry, own, tensor, kept in before:
            registry[own] = tensor
            if tensor is not None and kept is not None and not _same_bits(_local(tensor), kept):
                _local(tensor).copy_(kept)
        raise


def _local(tensor: Any) -> Tensor:
    """The values that lie in this process, detached."""
    tensor = tensor.detach()
    return tensor.to_local() if is_sharded(tensor) else tensor  # type: ignore[no-any-return]


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
        now = layer.parameters()
        there = {own: state.pop(key) for own in now if (key := f"{name}.{own}") in state}
        if missing := [own for own in now if own not in there]:
            problems[name] = f"missing tensor {name}.{missing[0]}"
        elif (problem := misshapen(name, there, now)) is not None:
            problems[name] = problem
        else:
            found[name] = replace(layer, fingerprint=None).with_parameters(there)
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


# The changes


def _set_value(module: nn.Module, own: str, value: Tensor) -> None:
    registry, now = registry_of(module, own), tensor_of(module, own)
    assert now is not None
    if not now.is_meta:
        assign(now, value, row_order(module, own))
    elif isinstance(now, nn.Parameter):  # there is nothing to copy into
        registry[own] = nn.Parameter(value.to(now.dtype), now.requires_grad)
    else:
        registry[own] = value.to(now.dtype)


def _built(layer: Layer, module: nn.Module, merge_weights: bool, dtype: torch.dtype) -> LoRALayer:
    """The LoRA layer on `module` that `layer` describes."""
    options = _variant(layer)
    if layer.kind != "Embedding":
        options["lora_dropout"] = layer.lora_dropout
    if layer.kind == "MergedLinear":
        options |= {"enable_lora": layer.enable_lora, "out_splits": layer.out_splits}
    kind, r = CLASSES[layer.kind], layer.r - layer.frozen_rank
    new: LoRALayer = kind.from_module(  # type: ignore[attr-defined]
        module, r, layer.lora_alpha, merge_weights=merge_weights, lora_dtype=dtype, **options
    )
    new.scaling = layer.scaling
    if layer.frozen_rank:  # said afterwards: its singular values would be computed for nothing
        new.variant = {**new.variant, "init_lora_weights": "pissa"}
    _say_loftq(new, layer)
    place = torch.device("cpu") if new.lora_A.is_meta else new.lora_A.device
    for own, value in layer.parameters().items():
        trained = not new.is_frozen(own)
        new._parameters.pop(own, None)  # so that the order is that of the layer that was saved
        kept = torch.promote_types(dtype, value.dtype) if own == "lora_magnitude" else dtype
        new._parameters[own] = nn.Parameter(value.to(place, kept, copy=True), trained)
    return new


def _say_loftq(module: LoRALayer, layer: Layer) -> None:
    """Let `module` know whether its update began as what quantising lost, if the file says so."""
    if layer.fingerprint is None or not is_quantized(module.weight):
        return
    variant = module.variant.copy()
    if begins_as(variant, "loftq"):
        del variant["init_lora_weights"]
    if fingerprint.is_loftq(layer.fingerprint):
        variant["init_lora_weights"] = "loftq"
    module.variant = variant


def _variant(layer: Layer) -> dict[str, Any]:
    """The options that a LoRA layer with this update was made with, but for PiSSA."""
    r = layer.r - layer.frozen_rank
    found = {
        "use_rslora": layer.scaling == layer.lora_alpha / math.sqrt(r) != layer.lora_alpha / r,
        "use_dora": layer.magnitude is not None,
        "lora_bias": layer.lora_bias is not None,
        "use_lorafa": layer.use_lorafa,
    }
    return {name: True for name, on in found.items() if on}


def _fill(module: nn.Module, name: str, adapter: Adapter) -> None:
    """Give a trainable copy its values."""
    for key in module.state_dict():
        inner, _, own = key.rpartition(".")
        _set_value(module.get_submodule(inner), own, adapter.saved[f"{name}.{key}"])
