"""What an `adapter_config.json` of PEFT may say; what would be computed otherwise here is refused."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from .contents import AdapterError, check_number

CONFIG_NAME = "adapter_config.json"

# What a config may say beside the fields below without changing what the adapter computes.
_WITHOUT_EFFECT = {
    "auto_mapping",
    "base_model_name_or_path",
    "eva_config",
    "fan_in_fan_out",
    "inference_mode",
    "init_lora_weights",
    "megatron_core",
    "peft_version",
    "qalora_group_size",
    "revision",
    "runtime_config",
    "task_type",
}
# The others (pissa, olora, corda, loftq, lora_ga) also change the frozen weight.
_INITS_THAT_KEEP_THE_BASE = (None, True, False, "gaussian", "orthogonal", "eva")
_READ = {
    "alpha_pattern",
    "bias",
    "exclude_modules",
    "layers_pattern",
    "layers_to_transform",
    "lora_alpha",
    "lora_bias",
    "lora_dropout",
    "modules_to_save",
    "peft_type",
    "r",
    "rank_pattern",
    "target_modules",
    "use_dora",
    "use_rslora",
}


def check_config(config: Mapping[str, Any]) -> None:
    """AdapterError unless `config` describes LoRA with known features and a known scale."""
    kind = config.get("peft_type")
    if kind != "LORA":
        raise AdapterError(f"peft_type={kind!r}: expected 'LORA'")
    for name in ("r", "lora_alpha", "target_modules"):
        if config.get(name) is None:
            raise AdapterError(
                f"{CONFIG_NAME} has no {name}: PEFT would take a default of its own; write the one "
                "that the adapter was trained with into it"
            )
    strange = {
        name: value
        for name, value in config.items()
        if name not in _READ | _WITHOUT_EFFECT and value not in (None, False, {}, [], "")
    }
    if config.get("init_lora_weights") not in _INITS_THAT_KEEP_THE_BASE:
        strange["init_lora_weights"] = config["init_lora_weights"]
    if strange:
        name, value = min(strange.items())
        raise AdapterError(
            f"{name}={value!r}: lora does not have this feature of PEFT and would compute something "
            f"else ({len(strange)} such field{'s' if len(strange) > 1 else ''}: "
            f"{', '.join(sorted(strange))}); merge the adapter with PEFT instead"
        )
    _check_names(config)
    _check_numbers(config)
    for name in ("use_rslora", "use_dora", "lora_bias"):
        if not isinstance(config.get(name), (bool, type(None))):
            raise AdapterError(f"{name}={config[name]!r}: expected a bool")
    if (config.get("bias") or "none") not in ("none", "all", "lora_only"):
        raise AdapterError(f"bias={config['bias']!r}: expected 'none', 'all' or 'lora_only'")
    dropout = config.get("lora_dropout") or 0.0
    check_number("lora_dropout", dropout)
    if not 0 <= dropout < 1:
        raise AdapterError(f"lora_dropout={dropout!r}: expected a number in [0, 1)")


def _check_names(config: Mapping[str, Any]) -> None:
    for name in ("target_modules", "modules_to_save", "exclude_modules", "layers_pattern"):
        value = config.get(name)
        may_be_one = isinstance(value, str) and name != "modules_to_save"
        if value is not None and not may_be_one and not _is_list_of(str, value):
            raise AdapterError(f"{name}={value!r}: expected a list of names")
    layers = config.get("layers_to_transform")
    if not isinstance(layers, (int, type(None))) and not _is_list_of(int, layers):
        raise AdapterError(f"layers_to_transform={layers!r}: expected a list of numbers")
    for name in ("rank_pattern", "alpha_pattern"):
        if not isinstance(config.get(name) or {}, dict):
            raise AdapterError(f"{name}={config[name]!r}: expected an object")
    _check_expressions(config)


def _check_expressions(config: Mapping[str, Any]) -> None:
    """What is going to be used as a regular expression must be one."""
    targets = config["target_modules"]
    found = [v for v in (targets, config.get("exclude_modules")) if isinstance(v, str)]
    patterns = config.get("layers_pattern") or ()
    found += [patterns] if isinstance(patterns, str) else patterns
    found += [*(config.get("rank_pattern") or ()), *(config.get("alpha_pattern") or ())]
    found += config.get("modules_to_save") or ()
    for pattern in found:
        try:
            re.compile(pattern)
        except (re.error, RecursionError) as error:
            raise AdapterError(f"{pattern!r} is no regular expression: {error}") from None


def _is_list_of(kind: type, value: object) -> bool:
    return isinstance(value, list) and all(isinstance(entry, kind) for entry in value)


def _check_numbers(config: Mapping[str, Any]) -> None:
    ranks = {"r": config["r"], **(config.get("rank_pattern") or {})}
    alphas = {"lora_alpha": config["lora_alpha"], **(config.get("alpha_pattern") or {})}
    for name, r in ranks.items():
        if isinstance(r, bool) or not isinstance(r, int) or r < 1:
            raise AdapterError(f"rank of {name!r} is {r!r}: expected a whole number above 0")
    for name, alpha in alphas.items():
        check_number(f"alpha of {name!r}", alpha)
