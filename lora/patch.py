"""Replace named modules of any model by LoRA layers.

`patch` finds the targets, checks every one, builds every layer, and only then touches the model.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import nn

from ._base import LoRALayer
from .conv import Conv1d, Conv2d, Conv3d
from .embedding import Embedding
from .full import trainable_copy
from .linear import Linear, is_transformers_conv1d
from .quantize import quantize_in_place, to_quantize
from .quantized import LinearNF4, adoptable, is_linear4bit
from .state import mark_only_lora_as_trainable
from .targets import by_pattern, find_modules_to_save, find_targets
from .variants import Variant, begins_as, checked

if TYPE_CHECKING:
    from typing_extensions import Unpack

_Model = TypeVar("_Model", bound=nn.Module)
_LAYERS: dict[type[nn.Module], type[LoRALayer]] = {
    nn.Linear: Linear,
    LinearNF4: Linear,
    nn.Embedding: Embedding,
    nn.Conv1d: Conv1d,
    nn.Conv2d: Conv2d,
    nn.Conv3d: Conv3d,
}


def patch(
    model: _Model,
    target_modules: str | Collection[str],
    *,
    r: int,
    lora_alpha: float,
    lora_dropout: float = 0.0,
    bias: str = "none",
    modules_to_save: Collection[str] | None = None,
    layers_to_transform: int | Collection[int] | None = None,
    rank_pattern: Mapping[str, int] | None = None,
    alpha_pattern: Mapping[str, float] | None = None,
    merge_weights: bool = False,
    lora_dtype: torch.dtype | None = None,
    quantize: str | None = None,
    **variant: Unpack[Variant],
) -> _Model:
    """Replace the target modules by LoRA layers on the same Parameters and freeze everything else.

    The selection is PEFT's (its `LoraConfig` documents it); one A for each targeted module.

    Args:
        model: changed in place and returned. Its output stays the same to the bit until B trains
            (on a GPU: see README, Limits; with PiSSA: up to rounding).
        target_modules: names or dotted suffixes of modules; or one regular expression that must
            match a whole name; or "all-linear", every linear layer but the output head.
        r, lora_alpha, lora_dropout: as in the layers; dropout does not act on embeddings.
        bias: which biases train, as in `mark_only_lora_as_trainable`.
        modules_to_save: names or dotted suffixes of modules that train in full, on copies of their
            Parameters, and are saved with the adapter: a new head, or embeddings with new tokens.
            They are left out of the targets. A tie to another module ends with the copy.
        layers_to_transform: only modules whose name's first number is this, or among these.
        rank_pattern, alpha_pattern: a name, suffix or regular expression to another r or lora_alpha;
            the first that matches counts.
        merge_weights: whether eval merges, at the cost of a second copy of the adapted weights.
        lora_dtype: of the factors; None is weight's dtype, but fp32 on a bf16 or fp16 base. DoRA's
            magnitudes are at least fp32.
        quantize: "nf4" puts 4-bit weights (QLoRA, arXiv 2305.14314; `lora.LinearNF4`) in the place of
            those of every `nn.Linear`, adapted or not, but for the output head and modules_to_save;
            one layer at a time, so memory never exceeds the model and one layer. Layers that have such
            weights already, bitsandbytes' among them, are taken over as they are.
        variant: use_rslora, use_dora, lora_bias, use_lorafa (False), init_lora_weights (True, or
            "pissa", "loftq", or either with "_niter_N"), see `lora.variants`; all but use_rslora for
            linear layers alone.

    Raises:
        ValueError, TypeError: an option out of range, a target or pattern that matches nothing, a
            module that cannot be adapted (quantised, offloaded, compiled, read without being
            called, PEFT's, adapted already), a weight to be quantised that is not finite. The model
            is then as it was.
    """
    check_patchable(model)
    checked("patch", variant)
    targets = find_targets(model, target_modules, layers_to_transform)
    full = find_modules_to_save(model, modules_to_save)

    def build(name: str, module: nn.Module, options: dict[str, Any]) -> LoRALayer:
        if layer_type(module) is Embedding:
            del options["lora_dropout"]
        return layer_type(module).from_module(module, **options)  # type: ignore[attr-defined, no-any-return]

    quantized = replace(
        model,
        targets,
        full,
        build,
        r=r,
        lora_alpha=lora_alpha,
        lora_dropout=lora_dropout,
        bias=bias,
        rank_pattern=rank_pattern,
        alpha_pattern=alpha_pattern,
        merge_weights=merge_weights,
        lora_dtype=lora_dtype,
        quantize=quantize,
        variant=variant,
    )
    del targets, full
    quantize_in_place(model, quantized)
    return model


def layer_type(module: nn.Module) -> type[LoRALayer]:
    """The class that adapts `module`; TypeError if there is none."""
    as_linear = is_transformers_conv1d(module) or is_linear4bit(module)
    kind = Linear if as_linear else _LAYERS.get(type(module))
    if kind is None:
        expected = ", ".join(t.__name__ for t in _LAYERS if t is not LinearNF4)
        raise TypeError(
            f"{type(module).__module__}.{type(module).__name__} cannot be adapted; expected "
            f"exactly one of torch.nn's {expected}, transformers' Conv1D, or bitsandbytes' Linear4bit"
        )
    return kind


def check_patchable(model: nn.Module) -> None:
    """Refuse, by the name of the first offender, a model that is compiled or adapted already."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"expected a torch.nn.Module, got {model!r}")
    for name, module in model.named_modules():
        where = f"{name or 'the model'} ({type(module).__name__})"
        if hasattr(module, "_orig_mod") or getattr(module, "_compiled_call_impl", None) is not None:
            raise ValueError(f"{where} is compiled: patch the model first, then torch.compile it")
        if isinstance(module, LoRALayer):
            raise ValueError(
                f"{where} is a LoRA layer already: one patch a model; call lora.unpatch(model) first"
            )
        if type(module).__module__.partition(".")[0] == "peft":
            raise ValueError(
                f"{where} is PEFT's: take the model out with its unload() or merge_and_unload() first"
            )


def replace(
    model: nn.Module,
    targets: Mapping[str, nn.Module],
    full: Mapping[str, nn.Module],
    build: Callable[[str, nn.Module, dict[str, Any]], LoRALayer],
    *,
    r: int,
    lora_alpha: float,
    lora_dropout: float,
    bias: str,
    rank_pattern: Mapping[str, int] | None,
    alpha_pattern: Mapping[str, float] | None,
    merge_weights: bool,
    lora_dtype: torch.dtype | None,
    quantize: str | None,
    variant: Variant,
) -> list[str]:
    """Adapt `targets`, each with its options, let `full` train in full; or leave all as it was.

    Returns the names of the layers that are to be quantised: by the caller, once nothing holds the
    plain modules, so that the dense weights are freed one by one.
    """
    if begins_as(variant, "loftq") and quantize is None:
        raise ValueError(
            f"init_lora_weights={variant['init_lora_weights']!r} begins as what quantising loses: "
            "expected quantize='nf4' with it"
        )
    if merge_weights and quantize is not None:
        raise ValueError(
            f"merge_weights=True with quantize={quantize!r}: eval would keep dense weights; expected "
            "False, and lora.unpatch(model, merge=True, dtype=...) for a merged model"
        )
    quantized = list(to_quantize(model, quantize, full.values()))
    targets = {
        name: module
        for name, module in targets.items()
        if not any(name == other or name.startswith(f"{other}.") for other in full)
    }
    if not targets:
        raise ValueError(
            f"modules_to_save={list(full)} leave no target: a module does one or the other"
        )
    ranks = by_pattern("rank_pattern", rank_pattern or {}, targets, r)
    alphas = by_pattern("alpha_pattern", alpha_pattern or {}, targets, lora_alpha)

    def build_with_options(name: str, module: nn.Module) -> LoRALayer:
        module = adoptable(module)
        if isinstance(ranks[name], int) and ranks[name] == 0:
            raise ValueError("r=0 adapts nothing: expected r of 1 or more")
        options = {
            "r": ranks[name],
            "lora_alpha": alphas[name],
            "lora_dropout": lora_dropout,
            "merge_weights": merge_weights,
            "lora_dtype": lora_dtype or _factor_dtype(module),
            **variant,
        }
        return build(name, module, options)

    with unchanged_on_error(model, [*targets, *full]):
        install(model, build_all(model, targets, full, build_with_options), bias)
    return quantized


def build_all(
    model: nn.Module,
    targets: Mapping[str, nn.Module],
    full: Mapping[str, nn.Module],
    build: Callable[[str, nn.Module], LoRALayer],
) -> dict[str, nn.Module]:
    """Every target's LoRA layer and every trainable copy, by name, once for a shared module.

    Raises TypeError or ValueError with the name of the module. Freezes the weights.
    """
    built: dict[nn.Module, nn.Module] = {}
    new: dict[str, nn.Module] = {}
    for name, module in (*targets.items(), *full.items()):
        try:
            _check_managed(model, name)
            if name in targets:
                _check_called(model, name)
            if module not in built:
                built[module] = build(name, module) if name in targets else trainable_copy(module)
        except (TypeError, ValueError) as error:
            kind = TypeError if isinstance(error, TypeError) else ValueError
            raise kind(f"{name}: {error}") from error
        new[name] = built[module]
    return new


def install(model: nn.Module, new: Mapping[str, nn.Module], bias: str) -> None:
    """Put `new` modules in their places and freeze the rest."""
    for name, module in new.items():
        set_module(model, name, module)
    mark_only_lora_as_trainable(model, bias)


@contextmanager
def unchanged_on_error(model: nn.Module, names: Collection[str]) -> Iterator[None]:
    """If the block raises, the modules with these names and what trains are as they were."""
    before = {name: model.get_submodule(name) for name in names}
    attributes = model.__dict__.copy()
    trainable = {p: p.requires_grad for p in model.parameters()}
    try:
        yield
    except BaseException:
        model.__dict__.clear()
        model.__dict__.update(attributes)
        for name, module in before.items():
            set_module(model, name, module)
        for parameter, requires_grad in trainable.items():
            parameter.requires_grad = requires_grad
        raise


def _check_called(model: nn.Module, name: str) -> None:
    """Refuse a layer whose weight is read without calling it: the update would be bypassed."""
    parent_name, _, own = name.rpartition(".")
    parent = model.get_submodule(parent_name)
    if isinstance(parent, nn.MultiheadAttention):
        raise ValueError(
            "nn.MultiheadAttention reads the weight of its out_proj without calling it, so a LoRA "
            "layer there would be bypassed; leave it out of target_modules"
        )
    if isinstance(parent, nn.TransformerEncoderLayer) and torch.backends.mha.get_fastpath_enabled():
        raise ValueError(
            f"nn.TransformerEncoderLayer reads the weight of {own} without calling it on its fast "
            "path in eval mode; call torch.backends.mha.set_fastpath_enabled(False) first"
        )


def _check_managed(model: nn.Module, name: str) -> None:
    """Refuse a module whose weights accelerate moves: they may not be here now."""
    path = [model]
    for part in name.split("."):
        path.append(path[-1].get_submodule(part))
    if any(_offloads(getattr(m, "_hf_hook", None)) for m in path) or hasattr(path[-1], "_hf_hook"):
        raise ValueError(
            "accelerate manages its weight (offload or dispatch hooks); load the model without a "
            "device_map, or on one device, and patch it there"
        )


def _offloads(hook: object) -> bool:
    return bool(getattr(hook, "offload", False)) or any(map(_offloads, getattr(hook, "hooks", ())))


def _factor_dtype(module: nn.Module) -> torch.dtype | None:
    """fp32 on a half-precision base, where steps of a usual learning rate would round to nothing."""
    weight = module._parameters.get("weight")
    half = weight is not None and weight.dtype in (torch.bfloat16, torch.float16)
    return torch.float32 if half else None


def set_module(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, own = name.rpartition(".")
    setattr(model.get_submodule(parent), own, module)
