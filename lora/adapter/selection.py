"""Which modules a PEFT config selects, by PEFT's own rules (its `check_target_module_exists`)."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from typing import Any

from ..targets import is_suffix


def selected(
    config: Mapping[str, Any], names: Collection[str], linear: Collection[str]
) -> set[str]:
    """The modules among `names` that PEFT would adapt; `linear`: those that "all-linear" means."""
    chosen = _by_targets(config, names, linear)
    excluded = config.get("exclude_modules")
    if isinstance(excluded, str):
        chosen -= {name for name in chosen if re.fullmatch(excluded, name)}
    elif excluded:
        chosen -= {name for name in chosen if _ends_in_any(name, excluded)}
    modules = config.get("modules_to_save") or ()
    inside = re.compile("|".join(rf"(?:.*\.)?{module}(?:$|\.)" for module in modules) or "(?!)")
    return {name for name in chosen if not inside.match(name)}


def _by_targets(
    config: Mapping[str, Any], names: Collection[str], linear: Collection[str]
) -> set[str]:
    targets = config["target_modules"]
    if isinstance(targets, str):
        if targets.lower() == "all-linear":
            return set(linear)
        return {name for name in names if re.fullmatch(targets, name)}
    chosen = {name for name in names if _ends_in_any(name, targets)}
    layers = config.get("layers_to_transform")
    if layers is None or layers == []:
        return chosen
    numbers = {layers} if isinstance(layers, int) else set(layers)
    return {
        name
        for name in chosen
        if name in targets or _layer_number(name, config.get("layers_pattern")) in numbers
    }


def _ends_in_any(name: str, targets: Collection[str]) -> bool:
    return any(is_suffix(target, name) for target in targets)


def _layer_number(name: str, patterns: str | Collection[str] | None) -> int | None:
    """The first number that follows a name, or that follows one of `patterns`."""
    for pattern in [patterns] if isinstance(patterns, str) else patterns or ():
        found = re.match(rf"(?:^|.*?\.){pattern}\.(\d+)\.", name)
        if found:
            return int(found[1])
    found = None if patterns else re.match(r".*?\.[^.]*\.(\d+)\.", name)
    return int(found[1]) if found else None
