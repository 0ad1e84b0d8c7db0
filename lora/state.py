"""What trains, and what is saved: one list of names serves both."""

from __future__ import annotations

import warnings
from collections.abc import Iterator

from torch import Tensor, nn

from ._base import LoRALayer, lora_layers
from .full import full_modules
from .kernels.nf4_tensor import NF4Tensor
from .sharded import gatherer, refuse_sharded, reshard
from .switch import BIAS_MODE, adapter_names, inner_model

_BIAS_MODES = ("none", "all", "lora_only")


def mark_only_lora_as_trainable(model: nn.Module, bias: str = "none") -> None:
    """Freeze every parameter of `model` except the LoRA factors and the biases chosen by `bias`.

    Modules that `lora.patch` was told to train in full (`modules_to_save`) train on.

    bias: "none"; "all", every parameter of the model that is a bias (`bias`, or a name such as
    `in_proj_bias`); "lora_only", the biases of the LoRA layers with r > 0. Parameters are told by
    the type of their module and their own name, so `lora_head.weight` of some other module is
    frozen. A factor that is frozen already becomes trainable, unless it is frozen in its variant
    (LoRA-FA's A, PiSSA's first factors). Raises ValueError for another `bias`,
    and for biases on a model with several adapters, which share them; warns if the model has no LoRA
    layer, since then nothing but biases would train.
    """
    chosen = {id(p) for p in adapter_parameters(model, bias)}
    chosen -= {
        id(p)
        for _, layer in lora_layers(model)
        for own, p in layer.update_parameters().items()
        if layer.is_frozen(own)
    }
    if bias != "none" and len(adapter_names(model)) > 1:
        raise ValueError(f"bias={bias!r}: the model's adapters share its biases; expected 'none'")
    if not any(layer.r > 0 for _, layer in lora_layers(model)):
        warnings.warn(
            f"{type(model).__name__} has no LoRA layer with r > 0: nothing of it would train; "
            "call lora.patch first or build it from lora's layers",
            stacklevel=2,
        )
    for parameter in model.parameters():
        parameter.requires_grad = id(parameter) in chosen
    known = inner_model(model).__dict__
    if bias != "none" and known.get(BIAS_MODE) != "all":  # what trained once is the adapter's
        known[BIAS_MODE] = bias


def bias_mode(model: nn.Module) -> str:
    """Which biases belong to the adapter: those marked as trainable, or else those that train now."""
    marked: str | None = inner_model(model).__dict__.get(BIAS_MODE)
    if marked is not None:
        return marked
    ids = {mode: {id(p) for p in adapter_parameters(model, mode)} for mode in _BIAS_MODES}
    trained = {id(p) for p in model.parameters() if p.requires_grad} & (ids["all"] - ids["none"])
    if not trained:
        return "none"
    return "lora_only" if trained <= ids["lora_only"] else "all"


def lora_state_dict(model: nn.Module, bias: str = "none") -> dict[str, Tensor]:
    """The entries of `model.state_dict()` that `mark_only_lora_as_trainable` with this `bias` trains.

    And the factors that are frozen in their variant, without which the others mean nothing.

    Load it with `model.load_state_dict(..., strict=False)` after the pretrained weights. Of a model
    that `torch.compile` returned, the keys are those of the model inside. Raises ValueError for a
    `bias` other than "none", "all" and "lora_only".

    Of a model that is sharded over processes (FSDP2, tensor parallelism) the entries are whole, as one
    process would have them: copies, gathered, so call it in every process. Loaded into a sharded model,
    each process takes its part.
    """
    reshard(model)
    chosen = {id(p) for p in adapter_parameters(model, bias)}
    gathered = gatherer(model)
    return {name: gathered(p) for name, p in _state(model).items() if id(p) in chosen}


def merged_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """The state dict of the plain model, with every update folded into its weight.

    Computed in at least fp32 and rounded once to the weight's dtype; `model` is not changed. This is
    what loralib users had from `model.eval(); torch.save(model.state_dict())`. Warns if a weight
    with an update is tied to another module: then the two entries differ, and only a model with
    untied weights can hold them. Raises ValueError for an update with a bias (`lora_bias`) on a layer
    without one, for 4-bit weights, and for a model that is sharded over processes.
    """
    refuse_sharded(
        model,
        "merging would gather every weight in every process",
        "lora.save_adapter, then `lora merge` on the checkpoint",
    )
    for name, layer in lora_layers(model):
        if isinstance(layer.weight, NF4Tensor):
            raise ValueError(
                f"{name or type(layer).__name__} has a 4-bit weight, in which an update would be lost: "
                "lora.unpatch(model, merge=True, dtype=...) merges into dense weights"
            )
    state = _state(model)
    # The entry of a weight comes beside that of its lora_A, whatever wrappers did to the names.
    keys: dict[int, list[str]] = {id(tensor): [] for tensor in state.values()}
    for key, tensor in state.items():
        keys[id(tensor)].append(key)
    for name, layer in lora_layers(model):
        if layer.r > 0:
            merged, prefixes = {"weight": layer.merged_weight()}, keys[id(layer.lora_A)]
            if "lora_bias" in layer.variant:
                merged["bias"] = merged_bias(name, layer)
            for prefix in (key.removesuffix("lora_A") for key in prefixes):
                state |= {f"{prefix}{own}": tensor for own, tensor in merged.items()}
    factors = {id(p) for _, layer in lora_layers(model) for p in layer.update_parameters().values()}
    for name, other in tied_updates(model):
        warnings.warn(
            f"{name}.weight has an update and is tied to {other}: the merged entries differ, load "
            "them into a model whose weights are not tied",
            stacklevel=2,
        )
    return {key: tensor.detach() for key, tensor in state.items() if id(tensor) not in factors}


def merged_bias(name: str, layer: LoRALayer) -> Tensor:
    """The bias with the update's added; ValueError if the plain layer has none to hold it."""
    bias = layer.total_bias()
    if layer.bias is None or bias is None:
        raise ValueError(
            f"{name or type(layer).__name__}: its update has a bias, the layer has none to merge it "
            "into, and the model's class would not load one: use the model unmerged, or give the "
            "layer a bias of zeros (and the class that is to load it)"
        )
    return bias.detach()


def _state(model: nn.Module) -> dict[str, Tensor]:
    """`state_dict()` with the Parameters themselves, of the model inside a compiled one."""
    inner = getattr(model, "_orig_mod", model)
    return dict(inner.state_dict(keep_vars=True))


def tied_updates(model: nn.Module) -> Iterator[tuple[str, str]]:
    """(LoRA layer, parameter of another module) wherever a weight with an update is shared."""
    owners: dict[int, dict[int, str]] = {}
    for path, module in model.named_modules():
        for own, parameter in module.named_parameters(path, recurse=False, remove_duplicate=False):
            owners.setdefault(id(parameter), {})[id(module)] = own
    for name, layer in lora_layers(model):
        if layer.r > 0:
            holders = owners.get(id(layer.weight), {})
            others = [path for key, path in holders.items() if key != id(layer)]
            if others:
                yield name, others[0]


def is_bias(own: str) -> bool:
    """Whether a parameter of this own name is a bias: `bias`, or a name such as `in_proj_bias`."""
    return "bias" in own.split("_")


def adapter_parameters(model: nn.Module, bias: str) -> Iterator[Tensor]:
    """The factors, what trains in full, and the biases that the mode chooses."""
    if bias not in _BIAS_MODES:
        raise ValueError(f"bias={bias!r}: expected one of {_BIAS_MODES}")
    for _, module in full_modules(model):
        yield from module.parameters()
    for module in model.modules():
        adapted = isinstance(module, LoRALayer) and module.r > 0
        for own, parameter in module._parameters.items():
            if parameter is not None and (
                (adapted and own.startswith("lora_"))
                or (adapted and bias == "lora_only" and own == "bias")
                or (bias == "all" and is_bias(own))
            ):
                yield parameter
