"""Which modules a selection means, by PEFT's rules, with every name that matches nothing refused."""

from __future__ import annotations

import difflib
import re
from collections.abc import Collection, Iterator, Mapping
from typing import Any

from torch import nn

from .linear import is_transformers_conv1d


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
        chosen = {"all-linear": set(linear_names(model, modules))}
    elif isinstance(target_modules, str):
        if layers_to_transform is not None:
            raise ValueError(
                f"layers_to_transform={layers_to_transform!r} with the regular expression "
                f"{target_modules!r}: put the layers into the expression, or list the names"
            )
        pattern = _compiled(target_modules)
        chosen = {target_modules: {name for name in modules if pattern.fullmatch(name)}}
    else:
        chosen = {t: {name for name in modules if is_suffix(t, name)} for t in target_modules}
    _check_all_match(chosen, modules, isinstance(target_modules, str), held_by or {})
    names = set().union(*chosen.values())
    if layers_to_transform is not None:
        names = _in_layers(names, layers_to_transform)
    return {name: module for name, module in modules.items() if name in names}


def is_suffix(target: str, name: str) -> bool:
    return name == target or name.endswith(f".{target}")


def _compiled(pattern: str) -> re.Pattern[str]:
    try:
        return re.compile(pattern)
    except re.error as error:
        raise ValueError(f"{pattern!r} is no regular expression: {error}") from None


def linear_names(model: nn.Module, modules: Mapping[str, nn.Module]) -> Iterator[str]:
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
    elif any(name.lower().replace("_", "-") == "all-linear" for name in missing):
        advice = (
            "; the string 'all-linear', on its own, means every linear layer but the output head"
        )
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


def find_modules_to_save(model: nn.Module, names: Collection[str] | None) -> dict[str, nn.Module]:
    """Name and module of every entry of `modules_to_save`; ValueError if one matches nothing."""
    if names is None:
        return {}
    if not isinstance(names, (list, tuple, set, frozenset)):
        raise ValueError(f"modules_to_save={names!r}: expected a list of names, or None")
    modules = {name: m for name, m in model.named_modules(remove_duplicate=False) if name}
    chosen = {target: {n for n in modules if is_suffix(target, n)} for target in names}
    missing = [target for target, found in chosen.items() if not found]
    if missing:
        known = sorted({name.rpartition(".")[2] for name in modules})
        near = difflib.get_close_matches(missing[0].rpartition(".")[2], known, n=1)
        hint = f" (nearest: {near[0]!r})" if near else ""
        raise ValueError(f"modules_to_save match no module: {missing[0]!r}{hint}")
    return {name: modules[name] for found in chosen.values() for name in sorted(found)}


def by_pattern(
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
