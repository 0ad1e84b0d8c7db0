"""The script's dictionaries of settings: change entries from the command line, and check them."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

from chat_data import InputError
from transformers import SchedulerType

_AT_LEAST_ONE = (
    "logging_steps",
    "per_device_eval_batch_size",
    "per_device_train_batch_size",
    "save_steps",
    "gradient_accumulation_steps",
    "max_seq_length",
    "eval_steps",
    "eval_samples",
)
_CHOICES = {
    "log_level": ("debug", "info", "warning", "error", "critical"),
    "logging_strategy": ("no", "epoch", "steps"),
    # The schedules that need nothing but the warm-up and the number of steps.
    "lr_scheduler_type": tuple(
        str(SchedulerType[name].value)
        for name in ("LINEAR", "COSINE", "CONSTANT_WITH_WARMUP", "COSINE_WITH_RESTARTS")
    ),
}
_MAY_BE_NONE = {"save_total_limit"}  # all checkpoints are kept then
# What does not change what is learned: a resumed run may have other values.
_FREE = {
    "do_eval",
    "eval_steps",
    "log_level",
    "logging_steps",
    "logging_strategy",
    "output_dir",
    "overwrite_output_dir",
    "per_device_eval_batch_size",
    "save_steps",
    "save_total_limit",
}


def assign(dictionaries: Sequence[dict[str, Any]], assignments: Sequence[str]) -> None:
    """Carry out each `NAME=VALUE` on the dictionary that has the name; VALUE is JSON or plain text.

    An entry keeps its type, except that a float may be given as a whole number, and that an entry
    that is None or a text (such as `target_modules`) takes anything.
    """
    for assignment in assignments:
        name, equals, text = assignment.partition("=")
        owner = next((d for d in dictionaries if name in d), None)
        if not equals or owner is None:
            known = ", ".join(sorted(name for d in dictionaries for name in d))
            raise InputError(f"--set {assignment}: expected NAME=VALUE, with NAME one of {known}")
        try:
            value = json.loads(text)
        except ValueError:
            value = text
        old = owner[name]
        if name in _MAY_BE_NONE and value is None:
            owner[name] = None
            continue
        if isinstance(old, float) and type(value) is int:
            value = float(value)
        if old is not None and not isinstance(old, str) and type(value) is not type(old):
            raise InputError(
                f"--set {assignment}: expected the type {type(old).__name__}, as of {old!r}"
            )
        owner[name] = value


def check(config: Mapping[str, Any]) -> None:
    """Refuse values of `training_config` that the loop could not obey."""
    for name in _AT_LEAST_ONE:
        if config[name] < 1:
            raise InputError(f"{name}={config[name]}: expected a whole number of 1 or more")
    for name, choices in _CHOICES.items():
        if config[name] not in choices:
            raise InputError(f"{name}={config[name]!r}: expected one of {choices}")
    if not config["learning_rate"] > 0 or not config["max_grad_norm"] > 0:
        raise InputError("learning_rate and max_grad_norm: expected numbers above 0")
    if not 0 < config["loraplus_lr_ratio"] < math.inf:
        raise InputError(
            f"loraplus_lr_ratio={config['loraplus_lr_ratio']}: expected a positive number"
        )
    if not 0 <= config["warmup_ratio"] <= 1:
        raise InputError(f"warmup_ratio={config['warmup_ratio']}: expected a number from 0 to 1")
    if config["max_steps"] < 1 and not config["num_train_epochs"] > 0:
        raise InputError("max_steps or num_train_epochs: expected one of them to be above 0")
    if config["save_total_limit"] is not None and config["save_total_limit"] < 1:
        raise InputError("save_total_limit: expected 1 or more, or null to keep all checkpoints")


def binding(training_config: Mapping[str, Any], peft_config: Mapping[str, Any]) -> dict[str, Any]:
    """All entries, by their full names, that must be the same when a run is resumed."""
    bound = {name: value for name, value in training_config.items() if name not in _FREE}
    return {
        **{f"training_config.{name}": value for name, value in bound.items()},
        **{f"peft_config.{name}": value for name, value in peft_config.items()},
    }


def steps_of(config: Mapping[str, Any], batches: int) -> int:
    """Training steps of a run whose epochs have so many batches."""
    if config["max_steps"] > 0:
        return config["max_steps"]
    return math.ceil(config["num_train_epochs"] * batches / config["gradient_accumulation_steps"])


def plan(config: Mapping[str, Any], rank: int, batches: int) -> str:
    """The settings that decide how much a run learns, in one line."""
    steps = steps_of(config, batches)
    epochs = steps * config["gradient_accumulation_steps"] / batches
    rate = f"{config['learning_rate']:g} ({config['lr_scheduler_type']})"
    return f"training: learning rate {rate}, {epochs:.3g} epochs ({steps} steps), r={rank}"


def hardly_moved(before: float, after: float, learning_rate: float) -> str:
    """A warning if training lowered the held-out loss by less than 1 %, else an empty string."""
    if after < 0.99 * before:
        return ""
    return (
        f"the held-out loss hardly moved: {before:.4f} before, {after:.4f} after training at the "
        f"learning rate {learning_rate:g}. Adapters usually need 1e-4 to 1e-3: try a higher --lr, "
        "more steps, or both"
    )
