"""From a model to an adapter: `save_adapter`."""

from __future__ import annotations

import re
import warnings
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .._base import LoRALayer, lora_layers
from ..conv import Conv1d, Conv2d, Conv3d
from ..embedding import Embedding
from ..full import full_modules
from ..linear import Linear, is_transformers_conv1d
from ..merged_linear import MergedLinear
from ..quantized import adoptable
from ..sharded import (
    all_or_none,
    foreign,
    gatherer,
    is_writer,
    own_class,
    reshard,
    row_order,
    sharded_tensor,
    whole,
    whole_of,
)
from ..state import adapter_parameters, bias_mode
from ..switch import adapter_names, adapters_of, inner_model
from ..variants import begins_as
from .contents import Adapter, AdapterError, Layer
from .fingerprint import fingerprint, marked_loftq
from .storage import write_adapter

CLASSES: dict[str, type[LoRALayer]] = {
    "Linear": Linear,
    "MergedLinear": MergedLinear,
    "Embedding": Embedding,
    "Conv1d": Conv1d,
    "Conv2d": Conv2d,
    "Conv3d": Conv3d,
}
_KIND_OF = {kind: name for name, kind in CLASSES.items()}
# What wrappers put into the names of the modules inside them.
_WRAPPERS = ("_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module")


def save_adapter(
    model: nn.Module,
    directory: str | Path,
    name: str | None = None,
    *,
    bias: str | None = None,
    base_model_name_or_path: str | None = None,
    task_type: str | None = None,
) -> None:
    """Save the LoRA factors, and what else `lora` trains, in PEFT's format into `directory`.

    PEFT, transformers and this library read it; a MergedLinear becomes one update with a
    block-diagonal B there, the very numbers. The safetensors file holds everything and is replaced
    in one step: after a process that died at any moment `load_adapter` finds the old adapter or the
    new one (and mends PEFT's JSON, should that be the old one still).

    Args:
        model: with LoRA layers of any class of this library; convolutions with kernel size 1 and one
            group. It may be compiled or in a data-parallel wrapper. Of a model that is sharded over
            processes (FSDP2, tensor parallelism) call it in every process: all gather the adapter,
            the first writes it, and all return when it is written.
        directory: made if it is not there.
        name: which adapter of several; None is the active one.
        bias: biases to save, as in `mark_only_lora_as_trainable`; None: those that were marked so, or
            else that train now.
        base_model_name_or_path, task_type: for the config; None: as the model's own config says.

    Raises:
        AdapterError: a layer that PEFT's format cannot hold exactly, factors with NaN or infinite
            values, meta factors or such of another engine, a model without LoRA layers.
        OSError: no space, no permission, a directory that is a file. What was there is intact.
        RuntimeError: in the other processes of a sharded model, where the first one could not write.

    Warns if something trains that an adapter does not hold.
    """
    if not str(directory):
        raise AdapterError(f"directory={directory!r}: expected the name of a folder")
    adapter = adapter_of(model, name, bias)
    if base_model_name_or_path is not None:
        adapter = adapter.replaced(base=base_model_name_or_path)
    if task_type is not None:
        adapter = adapter.replaced(task_type=task_type)
    sharded = sharded_tensor(inner_model(model))
    if sharded is None:
        write_adapter(adapter, directory)
    else:
        with all_or_none(sharded):
            if is_writer(sharded):
                write_adapter(adapter, directory)


def adapter_of(model: nn.Module, name: str | None = None, bias: str | None = None) -> Adapter:
    """The adapter of `model` (the active one, or `name`), on the model's own tensors.

    Of a sharded model it is on copies, gathered: call it in every process.
    """
    model = inner_model(model)
    reshard(model)
    modules = _modules_of(model, name)
    layers, saved = described(modules)
    if not layers and not saved:
        raise AdapterError(f"{type(model).__name__} has no LoRA layers with r > 0: nothing to save")
    for name in (n for n, layer in layers.items() if layer.lora_A.is_meta):
        raise AdapterError(f"{name} is on the meta device: there is nothing to save yet")
    mode = bias or bias_mode(model)
    if bias not in (None, "none") and len(adapter_names(model)) > 1:
        raise AdapterError(f"bias={bias!r}: the model's adapters share its biases; expected 'none'")
    biases = biases_of(model, mode)
    if modules == active_modules(model):
        _warn_of_the_rest(model, mode)
    names = [plain_name(path) for path, _ in model.named_modules()]
    full = tuple(name for name, m in modules.items() if not isinstance(m, LoRALayer))
    return Adapter(
        layers=layers,
        bias=mode,
        biases={key: value for key, value in biases.items() if key not in saved},
        modules_to_save=full,
        saved=saved,
        copies=_also_wrapped(model, full) if full else {},
        base=getattr(getattr(model, "config", None), "_name_or_path", None) or None,
        task_type=_task_type(model, names, full),
        target_modules=_targets(layers, names),
    )


def _modules_of(model: nn.Module, name: str | None) -> dict[str, nn.Module]:
    """What the adapter `name` (None: the active one) puts into the model, by plain name."""
    store = adapters_of(model)
    if name is None or store is None or name == store.active:
        return active_modules(model)
    if name not in store.modules:
        known = ", ".join(map(repr, store.modules))
        raise AdapterError(f"adapter {name!r}: expected one of {known}")
    first_names = {module: path for path, module in reversed(store.modules[name].items())}
    return {plain_name(path): module for module, path in reversed(first_names.items())}


def active_modules(model: nn.Module) -> dict[str, nn.Module]:
    """LoRA layers with r > 0 and modules that train in full, by plain name."""
    found = [*((n, m) for n, m in lora_layers(model) if m.r > 0), *full_modules(model)]
    return {plain_name(path): module for path, module in found}


def described(modules: Mapping[str, nn.Module]) -> tuple[dict[str, Layer], dict[str, Tensor]]:
    """The updates of the LoRA layers, and the tensors of the modules that train in full."""
    layers, saved = {}, {}
    for name, module in modules.items():
        if isinstance(module, LoRALayer):
            layers[name] = _described(name, module)
        else:
            saved.update({f"{name}.{k}": whole(v) for k, v in module.state_dict().items()})
    return layers, saved


def plain_name(path: str) -> str:
    """The module's name without wrappers such as torch.compile's."""
    return ".".join(part for part in path.split(".") if part not in _WRAPPERS)


def _described(name: str, layer: LoRALayer) -> Layer:
    kind = _KIND_OF.get(own_class(layer))
    if not name:
        raise AdapterError("the model is itself a LoRA layer, without a name: put it into a module")
    if kind is None:
        raise AdapterError(
            f"{name} is a {type(layer).__name__}: expected one of lora's own classes"
        )
    for own, parameter in layer._parameters.items():
        if foreign(parameter):
            raise AdapterError(f"{name}.{own} cannot be read: {foreign(parameter)}")
    if isinstance(layer, (Conv1d, Conv2d, Conv3d)) and not is_pointwise(layer):
        raise AdapterError(
            f"{name} is a {kind} with kernel size {layer.kernel_size} and {layer.groups} groups: "
            "PEFT's factors of it have other shapes, and only kernel size 1 with one group is exact; "
            "save lora.lora_state_dict(model) instead"
        )
    parts: dict[str, Any] = {}
    if isinstance(layer, MergedLinear):
        parts = {"enable_lora": tuple(layer.enable_lora), "out_splits": tuple(layer.out_splits)}
    one = layer.in_one_process(weight=False) if layer.is_sharded else layer
    A, B = (factor.detach() for factor in one.factors())
    base = fingerprint(matrix(layer), row_order(layer, "weight"))
    return Layer(
        kind=kind,
        lora_A=A,
        lora_B=B,
        lora_alpha=layer.lora_alpha,
        scaling=layer.scaling,
        lora_dropout=float(getattr(layer.lora_dropout, "p", 0.0)),
        transposed=_stands_for_conv1d(layer),
        fingerprint=marked_loftq(base) if begins_as(layer.variant, "loftq") else base,
        frozen_rank=B.shape[1] - layer.r,
        use_lorafa="use_lorafa" in layer.variant,
        **_vectors(layer),
        **parts,
    )


def _vectors(layer: LoRALayer) -> dict[str, Any]:
    """DoRA's magnitude and the update's bias, for every row of the output."""
    found: dict[str, Any] = {}
    if isinstance(layer, Linear) and "use_dora" in layer.variant:
        magnitude = whole_of(layer, "lora_magnitude")
        if (
            len(magnitude) < layer.out_features
        ):  # the weight is read for rows without an update alone
            weight = layer._matrix(whole_of(layer, "weight"))
            norms = torch.linalg.vector_norm(weight, dim=1).to(magnitude.dtype)
            updated = layer.all_rows(torch.ones_like(magnitude), 0.0).bool()
            magnitude = torch.where(updated, layer.all_rows(magnitude, 0.0), norms)
        found["magnitude"] = magnitude
    if isinstance(layer, Linear) and "lora_bias" in layer.variant:
        found["lora_bias"] = layer.all_rows(whole_of(layer, "lora_bias"), 0.0)
    return found


def _stands_for_conv1d(layer: LoRALayer) -> bool:
    """Whether `layer` stands for GPT-2's Conv1D, whose weight is (in, out)."""
    plain = layer.__dict__.get("_plain_type")
    return plain is not None and plain.__name__ == "Conv1D"


def is_pointwise(layer: nn.Module) -> bool:
    """Whether a convolution is a linear layer at every position."""
    assert isinstance(layer, (nn.Conv1d, nn.Conv2d, nn.Conv3d))
    return all(size == 1 for size in layer.kernel_size) and layer.groups == 1


def matrix(module: nn.Module) -> Tensor:
    """The module's weight as (out, in), as stored if it has other dimensions.

    bitsandbytes' 4-bit weight as ours; ValueError if it is of another kind.
    """
    weight = adoptable(module).weight
    assert isinstance(weight, Tensor)
    transposed = is_transformers_conv1d(module) or getattr(module, "fan_in_fan_out", False)
    return weight.t() if transposed else weight


# transformers names a class for its task; PEFT trains these heads of it in full, unasked.
_TASKS = {
    "ForCausalLM": ("CAUSAL_LM", ()),
    "ForConditionalGeneration": ("SEQ_2_SEQ_LM", ()),
    "ForSequenceClassification": ("SEQ_CLS", ("classifier", "score")),
    "ForTokenClassification": ("TOKEN_CLS", ("classifier", "score")),
    "ForQuestionAnswering": ("QUESTION_ANS", ("qa_outputs",)),
}


def _task_type(model: nn.Module, names: Collection[str], full: Collection[str]) -> str | None:
    """PEFT's word for what the model's class does, unless PEFT would miss the head in our file."""
    for ending, (task, heads) in _TASKS.items():
        if type(model).__name__.endswith(ending):
            there = [name for name in names if name.endswith(heads)] if heads else []
            return task if set(there) <= set(full) else None
    return None


def _targets(layers: Mapping[str, Layer], names: Collection[str]) -> tuple[str, ...] | str:
    """What PEFT is to adapt, which matches ends of names: short ones if they select these layers alone.

    A whole name that is the end of another one can be told from it by a regular expression alone.
    """
    own = tuple(dict.fromkeys(name.rpartition(".")[2] for name in layers))
    if {name for name in names if name.rpartition(".")[2] in own} == set(layers):
        return own
    ends = {name[i + 1 :] for name in names for i, c in enumerate(name) if c == "."}
    return "|".join(map(re.escape, layers)) if ends & set(layers) else tuple(layers)


def _also_wrapped(model: nn.Module, full: Collection[str]) -> dict[str, Tensor]:
    """Frozen tensors of modules whose names end like one in `full`: PEFT expects them in the file."""
    found = {}
    for path, module in model.named_modules():
        name = plain_name(path)
        if name in full or not name.endswith(tuple(full)):
            continue
        if any(True for _ in lora_layers(module)):
            raise AdapterError(
                f"{name} has a low-rank update and a name that ends like one of {list(full)}: PEFT "
                "would train it in full too; rename one of them"
            )
        found.update({f"{name}.{key}": whole(t) for key, t in module.state_dict().items()})
    return found


def biases_of(model: nn.Module, mode: str) -> dict[str, Tensor]:
    """The biases that the mode means, by their name in the plain model's state dict."""
    chosen = {id(p) for p in adapter_parameters(model, mode)}
    chosen -= {id(p) for p in adapter_parameters(model, "none")}
    named, gathered = model.named_parameters(), gatherer(model)
    return {plain_name(name): gathered(p) for name, p in named if id(p) in chosen}


def _warn_of_the_rest(model: nn.Module, mode: str) -> None:
    saved = {id(p) for p in adapter_parameters(model, mode)}
    rest = [n for n, p in model.named_parameters() if p.requires_grad and id(p) not in saved]
    if rest:
        warnings.warn(
            f"{len(rest)} parameters train that are not part of the adapter, such as {rest[0]!r}: name "
            "their modules in modules_to_save when patching, or freeze them by "
            "lora.mark_only_lora_as_trainable(model)",
            stacklevel=4,
        )
