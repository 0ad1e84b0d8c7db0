"""Replace named modules of any model by LoRA layers, and undo it.

`patch` finds the targets, checks every one, builds every layer, and only then touches the model.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any, TypeVar

import torch
from torch import nn

from ._base import LoRALayer, lora_layers
from .conv import Conv1d, Conv2d, Conv3d
from .embedding import Embedding
from .linear import Linear, is_transformers_conv1d
from .state import mark_only_lora_as_trainable, tied_updates

_Model = TypeVar("_Model", bound=nn.Module)
_LAYERS: dict[type[nn.Module], type[LoRALayer]] = {
    nn.Linear: Linear,
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
    layers_to_transform: int | Collection[int] | None = None,
    rank_pattern: Mapping[str, int] | None = None,
    alpha_pattern: Mapping[str, float] | None = None,
    merge_weights: bool = False,
    lora_dtype: torch.dtype | None = None,
) -> _Model:
    """Replace the target modules by LoRA layers on the same Parameters and freeze everything else.

    The selection is PEFT's (its `LoraConfig` documents it); one A for each targeted module.

    Args:
        model: changed in place and returned. Its output stays the same to the bit until B trains
            (on a GPU: see README, Limits).
        target_modules: names or dotted suffixes of modules; or one regular expression that must
            match a whole name; or "all-linear", every linear layer but the output head.
        r, lora_alpha, lora_dropout: as in the layers; dropout does not act on embeddings.
        bias: which biases train, as in `mark_only_lora_as_trainable`.
        layers_to_transform: only modules whose name's first number is this, or among these.
        rank_pattern, alpha_pattern: a name, suffix or regular expression to another r or lora_alpha;
            the first that matches counts.
        merge_weights: whether eval merges, at the cost of a second copy of the adapted weights.
        lora_dtype: of the factors; None is weight's dtype, but fp32 on a bf16 or fp16 base.

    Raises:
        ValueError, TypeError: an option out of range, a target or pattern that matches nothing, a
            module that cannot be adapted (quantised, offloaded, compiled, read without being
            called, PEFT's, adapted already). The model is then as it was.
    """
    check_patchable(model)
    targets = find_targets(model, target_modules, layers_to_transform)

    def build(name: str, module: nn.Module, options: dict[str, Any]) -> LoRALayer:
        kind = Linear if is_transformers_conv1d(module) else _LAYERS.get(type(module))
        if kind is None:
            expected = ", ".join(t.__name__ for t in _LAYERS)
            raise TypeError(
                f"{type(module).__module__}.{type(module).__name__} cannot be adapted; expected "
                f"exactly one of torch.nn's {expected}, or transformers' Conv1D"
            )
        if kind is Embedding:
            del options["lora_dropout"]
        return kind.from_module(module, **options)  # type: ignore[attr-defined, no-any-return]

    replace(
        model,
        targets,
        build,
        r=r,
        lora_alpha=lora_alpha,
        lora_dropout=lora_dropout,
        bias=bias,
        rank_pattern=rank_pattern,
        alpha_pattern=alpha_pattern,
        merge_weights=merge_weights,
        lora_dtype=lora_dtype,
    )
    return model


def unpatch(model: nn.Module, merge: bool = False) -> nn.Module:
    """Put plain torch modules in the place of all LoRA layers, in place; returns the model.

    merge=False gives the base back, on its own Parameters. merge=True folds every update into a new
    weight, rounded once; layer by layer, so that one extra layer is held at a time. `requires_grad`
    stays as it is. If `model` is itself a LoRA layer, the plain layer is returned. Raises ValueError,
    before any change, if a factor has a value that is not finite or lies on the meta device, or if
    a weight to be changed is tied to another module.
    """
    if merge:
        _check_mergeable(model)
    if isinstance(model, LoRALayer):
        return model.to_module(merge)
    plain: dict[LoRALayer, nn.Module] = {}
    for name, layer in list(lora_layers(model, remove_duplicate=False)):
        if layer not in plain:
            plain[layer] = layer.to_module(merge)
        _set_module(model, name, plain[layer])
    return model


def _check_mergeable(model: nn.Module) -> None:
    for path, layer in lora_layers(model):
        name = path or type(layer).__name__
        for factor in (layer.lora_A, layer.lora_B) if layer.r > 0 else ():
            if factor.is_meta:
                raise ValueError(f"{name} is on the meta device: there is nothing to merge yet")
            if not torch.isfinite(factor).all():
                raise ValueError(f"{name}: a LoRA factor has a NaN or infinite value; not merged")
    for name, other in tied_updates(model):
        raise ValueError(
            f"{name}.weight is tied to {other}: merging would change or untie that one; untie it "
            "first, by giving one of them a Parameter of its own (and, for a transformers model, "
            "config.tie_word_embeddings = False)"
        )


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


def find_targets(
    model: nn.Module,
    target_modules: str | Collection[str],
    layers_to_transform: int | Collection[int] | None = None,
    held_by: Mapping[str, str] | None = None,
) -> dict[str, nn.Module]:
    """Name and module of every target; ValueError if one of `target_modules` matches nothing.

    held_by: names that a user may expect, and the module of this model that holds each, for errors.
    """
    if not isinstance(target_modules, (str, list, tuple, set, frozenset)) or not target_modules:
        raise ValueError(
            f"target_modules={target_modules!r}: expected a list of names (one or more), a regular "
            "expression, or 'all-linear'"
        )
    modules = {name: m for name, m in model.named_modules(remove_duplicate=False) if name}
    if isinstance(target_modules, str) and target_modules.lower() == "all-linear":
        chosen = {"all-linear": set(_linear_names(model, modules))}
    elif isinstance(target_modules, str):
        if layers_to_transform is not None:
            raise ValueError(
                f"layers_to_transform={layers_to_transform!r} with the regular expression "
                f"{target_modules!r}: put the layers into the expression, or list the names"
            )
        pattern = _compiled(target_modules)
        chosen = {target_modules: {name for name in modules if pattern.fullmatch(name)}}
    else:
        chosen = {t: {name for name in modules if _is_suffix(t, name)} for t in target_modules}
    _check_all_match(chosen, modules, isinstance(target_modules, str), held_by or {})
    names = set().union(*chosen.values())
    if layers_to_transform is not None:
        names = _in_layers(names, layers_to_transform)
    return {name: module for name, module in modules.items() if name in names}


def _is_suffix(target: str, name: str) -> bool:
    return name == target or name.endswith(f".{target}")


def _compiled(pattern: str) -> re.Pattern[str]:
    try:
        return re.compile(pattern)
    except re.error as error:
        raise ValueError(f"{pattern!r} is no regular expression: {error}") from None


def _linear_names(model: nn.Module, modules: Mapping[str, nn.Module]) -> Iterator[str]:
    """All linear layers but the output head.

    The head is what the model says it is; if it says nothing, a module named lm_head, or score or
    classifier at the top, as transformers names the heads of its classifiers.
    """
    get_head = getattr(model, "get_output_embeddings", None)
    head = get_head() if get_head is not None else None
    for name, module in modules.items():
        linear = isinstance(module, nn.Linear) or is_transformers_conv1d(module)
        by_name = name in ("score", "classifier") or name.rpartition(".")[2] == "lm_head"
        is_head = module is head or (head is None and by_name)
        if linear and not is_head:
            yield name


def _check_all_match(
    chosen: Mapping[str, set[str]],
    modules: Mapping[str, nn.Module],
    is_pattern: bool,
    held_by: Mapping[str, str],
) -> None:
    missing = [target for target, names in chosen.items() if not names]
    if not missing:
        return
    known = sorted({name.rpartition(".")[2] for name in modules})
    named, holders = [], []
    for target in missing:
        own = re.split(r"\W", target)[-1]  # the last name, also of a pattern such as .*q_proj
        near = difflib.get_close_matches(own, known, n=1)
        if own in held_by:
            named.append(f"{target!r} (part of {held_by[own]!r})")
            holders.append(held_by[own])
        else:
            named.append(f"{target!r}" + (f" (nearest: {near[0]!r})" if near else ""))
    advice = ""
    if holders:
        valid = dict.fromkeys([*(t for t in chosen if t not in missing), *holders])
        advice = f"; the projections are fused here: pass target_modules={list(valid)}"
    elif is_pattern:
        advice = (
            "; a string is one regular expression for the whole name, to match by the end of the "
            f"name pass a list, [{missing[0]!r}]"
        )
    raise ValueError(f"target_modules match no module: {', '.join(named)}{advice}")


def _in_layers(names: set[str], layers: int | Collection[int]) -> set[str]:
    wanted = {layers} if isinstance(layers, int) else set(layers)
    of_layer: dict[int, set[str]] = {}
    for name in names:
        # PEFT's expression; it wants a name before `layers`, which a bare decoder does not have.
        number = re.match(r".*?\.[^.]*\.(\d+)\.", name) or re.search(r"(?:^|\.)(\d+)\.", name)
        if number:
            of_layer.setdefault(int(number[1]), set()).add(name)
    missing = sorted(wanted - of_layer.keys())
    if missing or not wanted:
        raise ValueError(
            f"layers_to_transform={layers!r}: no target lies in layer {missing}; there are targets "
            f"in layers {sorted(of_layer)}"
        )
    return set().union(*(of_layer[i] for i in wanted))


def replace(
    model: nn.Module,
    targets: Mapping[str, nn.Module],
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
) -> None:
    """Build a layer for every target with its options, then set them all, or leave all as it was."""
    ranks = _by_pattern("rank_pattern", rank_pattern or {}, targets, r)
    alphas = _by_pattern("alpha_pattern", alpha_pattern or {}, targets, lora_alpha)
    trainable = {p: p.requires_grad for p in model.parameters()}
    built: dict[nn.Module, LoRALayer] = {}
    try:
        for name, module in targets.items():
            try:
                _check_target(model, name, module)
                if isinstance(ranks[name], int) and ranks[name] == 0:
                    raise ValueError("r=0 adapts nothing: expected r of 1 or more")
                if module not in built:
                    options = {
                        "r": ranks[name],
                        "lora_alpha": alphas[name],
                        "lora_dropout": lora_dropout,
                        "merge_weights": merge_weights,
                        "lora_dtype": lora_dtype or _factor_dtype(module),
                    }
                    built[module] = build(name, module, options)
            except (TypeError, ValueError) as error:
                kind = TypeError if isinstance(error, TypeError) else ValueError
                raise kind(f"{name}: {error}") from error
        for name, module in targets.items():
            _set_module(model, name, built[module])
        mark_only_lora_as_trainable(model, bias)
    except BaseException:
        for name, module in targets.items():
            _set_module(model, name, module)
        for parameter, requires_grad in trainable.items():
            parameter.requires_grad = requires_grad
        raise


def _by_pattern(
    what: str, patterns: Mapping[str, Any], names: Collection[str], default: Any
) -> dict[str, Any]:
    """The value of every name: that of the first pattern that matches it as a suffix, or default."""
    compiled = {key: _compiled(rf"(?:.*\.)?(?:{key})") for key in patterns}
    hits = {
        name: next((key for key, c in compiled.items() if c.fullmatch(name)), None)
        for name in names
    }
    for key, pattern in compiled.items():
        if not any(pattern.fullmatch(name) for name in names):
            raise ValueError(f"{what}: {key!r} matches none of the targets, such as {min(names)!r}")
    return {name: default if key is None else patterns[key] for name, key in hits.items()}


def _check_target(model: nn.Module, name: str, module: nn.Module) -> None:
    """Refuse what would be bypassed, or would compute something else, as a LoRA layer."""
    own = name.rpartition(".")[2]
    path = [model]
    for part in name.split("."):
        path.append(path[-1].get_submodule(part))
    parent = path[-2]
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
    if any(_offloads(getattr(m, "_hf_hook", None)) for m in path) or hasattr(module, "_hf_hook"):
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


def _set_module(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, own = name.rpartition(".")
    setattr(model.get_submodule(parent), own, module)
