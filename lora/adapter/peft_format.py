"""Adapter to and from PEFT's two files: `adapter_config.json` and the tensors.

    module X of kind                  tensors, each after "base_model.model."
    Linear, MergedLinear              X.lora_A.weight (R, in), X.lora_B.weight (out, R)
    Conv1d, Conv2d, Conv3d            the same, with kernel dimensions of size 1
    the same with DoRA                X.lora_magnitude_vector (out,) too
    the same with lora_bias           X.lora_B.bias (out,) too
    Embedding                         X.lora_embedding_A (R, num), X.lora_embedding_B (dim, R)
    bias of an adapted X, of another  X.base_layer.bias, X.bias
    a module trained in full          X.weight, X.bias, ...

A MergedLinear of n parts of rank r is one update of rank R = n·r whose lora_B has a block a part:
the same numbers, since every other entry is zero. PEFT knows no such blocks: reading a file alone
gives a Linear, and PEFT training on would fill the zeros. The scale is lora_alpha / R, or with
rsLoRA lora_alpha / √R (arXiv 2312.03732). PiSSA's update is plain LoRA's of rank 2 r here: PEFT's own
PiSSA files are for a base that it has changed. Fields and keys: PEFT 0.21, `LoraConfig` and
`get_peft_model_state_dict`.
"""

from __future__ import annotations

import itertools
import math
import re
from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from typing import Any

from torch import Tensor

from ..state import is_bias
from .contents import Adapter, AdapterError, Layer
from .peft_config import CONFIG_NAME, check_config

TENSORS_NAME = "adapter_model.safetensors"
PREFIX = "base_model.model."

_FACTORS = {
    ".lora_A.weight": "lora_A",
    ".lora_B.weight": "lora_B",
    ".lora_embedding_A": "lora_A",
    ".lora_embedding_B": "lora_B",
    ".lora_magnitude_vector": "magnitude",
    ".lora_B.bias": "lora_bias",
}
_CONVOLUTIONS = {3: "Conv1d", 4: "Conv2d", 5: "Conv3d"}


def tensors_of(adapter: Adapter) -> dict[str, Tensor]:
    """The tensors as PEFT names and shapes them."""
    found: dict[str, Tensor] = {}
    for name, layer in adapter.layers.items():
        A, B = layer.dense()
        if layer.kind.startswith("Conv"):
            ones = (1,) * int(layer.kind[4])
            A, B = A.reshape(*A.shape, *ones), B.reshape(*B.shape, *ones)
        suffixes = list(_FACTORS)
        a, b = suffixes[2:4] if layer.kind == "Embedding" else suffixes[:2]
        vectors = zip(suffixes[4:], (layer.magnitude, layer.lora_bias), strict=True)
        found[f"{PREFIX}{name}{a}"], found[f"{PREFIX}{name}{b}"] = A, B
        found |= {f"{PREFIX}{name}{end}": value for end, value in vectors if value is not None}
    for key, bias in adapter.biases.items():
        name, _, own = key.rpartition(".")
        inner = f"{name}.base_layer.{own}" if name in adapter.layers else key
        found[PREFIX + inner] = bias
    found.update({PREFIX + key: tensor for key, tensor in adapter.saved.items()})
    for key, tensor in adapter.copies.items():  # of those, PEFT needs what it is going to wrap
        if in_any(key.rpartition(".")[0], adapter.modules_to_save):
            found[PREFIX + key] = tensor
    return found


def config_of(adapter: Adapter) -> dict[str, Any]:
    """`adapter_config.json`, with the fields that PEFT has had for long."""
    layers = adapter.layers
    ranks = {name: layer.r * layer.parts for name, layer in layers.items()}
    stabilized = all(
        layer.scaling == layer.lora_alpha / math.sqrt(layer.r) != layer.lora_alpha / layer.r
        and layer.parts == 1
        for layer in layers.values()
    )
    alphas = {
        name: layer.lora_alpha if stabilized else _alpha(layer) for name, layer in layers.items()
    }
    _check_alike(layers)
    r, rank_pattern = _patterns(ranks)
    alpha, alpha_pattern = _patterns(alphas)
    dropouts = [layer.lora_dropout for layer in layers.values()]
    targets = adapter.target_modules or tuple(layers)
    return {
        "alpha_pattern": alpha_pattern,
        "base_model_name_or_path": adapter.base,
        "bias": adapter.bias,
        "fan_in_fan_out": any(layer.transposed for layer in layers.values()),
        "inference_mode": True,
        "init_lora_weights": True,
        "layers_pattern": None,
        "layers_to_transform": None,
        "lora_alpha": alpha,
        "lora_bias": any(layer.lora_bias is not None for layer in layers.values()),
        "lora_dropout": Counter(dropouts).most_common(1)[0][0],
        "modules_to_save": list(adapter.modules_to_save) or None,
        "peft_type": "LORA",
        "r": r,
        "rank_pattern": rank_pattern,
        "revision": None,
        "target_modules": targets if isinstance(targets, str) else list(targets),
        "task_type": adapter.task_type,
        "use_dora": any(layer.magnitude is not None for layer in layers.values()),
        "use_rslora": stabilized,
    }


def _check_alike(layers: Mapping[str, Layer]) -> None:
    """PEFT's config says DoRA and lora_bias of all layers at once, and never both."""
    for name, other in (("magnitude", "lora_bias"), ("lora_bias", "magnitude")):
        has = {key: getattr(layer, name) is not None for key, layer in layers.items()}
        if len(set(has.values())) > 1:
            first = next(key for key, there in has.items() if not there)
            raise AdapterError(f"{first} has no {name}, other layers have: expected all or none")
        if any(has.values()) and any(getattr(x, other) is not None for x in layers.values()):
            raise AdapterError("the layers have a magnitude and a lora_bias: PEFT has one or none")


def _alpha(layer: Layer) -> float:
    """The lora_alpha of the one update of rank parts · r that has this layer's scale."""
    if layer.scaling == layer.lora_alpha / layer.r:
        return layer.lora_alpha * layer.parts
    return layer.scaling * (layer.r * layer.parts)


def _patterns(values: Mapping[str, Any]) -> tuple[Any, dict[str, Any]]:
    """The most common value, and the pattern for those names that have another."""
    default = Counter(values.values()).most_common(1)[0][0]
    of_own_name: dict[str, set[Any]] = {}
    for name, value in values.items():
        of_own_name.setdefault(name.rpartition(".")[2], set()).add(value)
    pattern = {}
    for name, value in values.items():
        own = name.rpartition(".")[2]
        if value != default or len(of_own_name[own]) > 1:
            alike = len(of_own_name[own]) == 1
            pattern[re.escape(own) if alike else f"^{re.escape(name)}"] = value
    return default, {key: value for key, value in pattern.items() if value != default}


def by_pattern(patterns: Mapping[str, Any], name: str, default: Any) -> Any:
    """The value of the first pattern that matches `name`, by PEFT's rule."""
    hits = (value for key, value in patterns.items() if re.match(rf"(.*\.)?({key})$", name))
    return next(hits, default)


# Reading


def parse(
    config: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
    saved_names: Collection[str] | None = None,
) -> tuple[Adapter, dict[str, str]]:
    """The adapter in a PEFT file, and its problems by module or key (strange keys, no factors).

    saved_names: which tensors are those of modules that were trained in full; None: as PEFT tells them.

    AdapterError for what would be computed otherwise here: features that lora does not have, a
    missing r or lora_alpha, another type of adapter.
    """
    check_config(config)
    factors, others, unexpected = _by_module(tensors)
    problems = {
        key: f"unexpected tensor {key}: expected a name that begins with {PREFIX!r}"
        for key in unexpected
    }
    layers: dict[str, Layer] = {}
    for name, found in sorted(factors.items(), key=_in_model_order):
        missing = sorted(_expected(config) - found.keys())
        strange = sorted({"magnitude", "lora_bias"} & found.keys() - _expected(config))
        if missing or strange:
            what = f"missing tensor {name}.{missing[0]}" if missing else ""
            problems[name] = what or f"unexpected tensor {name}.{strange[0]}: its config has none"
            continue
        try:
            layers[name] = _layer(name, found, config)
        except AdapterError as error:
            problems[name] = f"misshapen: {name}: {error}"
    biases, saved, copies, strange = _sort_others(others, factors, config, saved_names)
    problems |= {key: f"unexpected tensor {key}" for key in strange}
    targets = config["target_modules"]
    adapter = Adapter(
        layers=layers,
        bias=config.get("bias") or "none",
        biases=biases,
        modules_to_save=tuple(config.get("modules_to_save") or ()),
        saved=saved,
        copies=copies,
        base=config.get("base_model_name_or_path"),
        task_type=config.get("task_type"),
        target_modules=tuple(targets) if isinstance(targets, (list, tuple)) else None,
    )
    return adapter, problems


def _expected(config: Mapping[str, Any]) -> set[str]:
    """What there is of every layer."""
    vectors = {"use_dora": "magnitude", "lora_bias": "lora_bias"}
    return {"lora_A", "lora_B", *(own for flag, own in vectors.items() if config.get(flag))}


def _in_model_order(item: tuple[str, object]) -> list[tuple[int, str]]:
    """Layer 2 before layer 10, and attention before the MLP, as in transformers' decoders."""
    parts = ["" if part == "self_attn" else part for part in item[0].split(".")]
    return [(int(part), "") if part.isdecimal() else (0, part) for part in parts]


def _by_module(
    tensors: Mapping[str, Tensor],
) -> tuple[dict[str, dict[str, Tensor]], dict[str, Tensor], list[str]]:
    """Factors by module and own name; the other tensors by name; keys without PEFT's prefix."""
    factors: dict[str, dict[str, Tensor]] = {}
    others: dict[str, Tensor] = {}
    unexpected = []
    for key, tensor in tensors.items():
        if not key.startswith(PREFIX):
            unexpected.append(key)
            continue
        inner = key.removeprefix(PREFIX)
        suffix = next((s for s in _FACTORS if inner.endswith(s)), None)
        if suffix is None:
            others[inner] = tensor
        else:
            found = factors.setdefault(inner.removesuffix(suffix), {})
            found[_FACTORS[suffix]] = tensor
            if _FACTORS[suffix] in ("lora_A", "lora_B"):
                found["embedding" if "embedding" in suffix else "weight"] = tensor
    return factors, others, unexpected


def _layer(name: str, found: Mapping[str, Tensor], config: Mapping[str, Any]) -> Layer:
    if "embedding" in found and "weight" in found:
        raise AdapterError("it has factors of a linear layer and of an embedding")
    A, B = found["lora_A"], found["lora_B"]
    kind = "Embedding" if "embedding" in found else _CONVOLUTIONS.get(A.ndim, "Linear")
    if kind.startswith("Conv"):
        if A.ndim != B.ndim or any(size != 1 for size in (*A.shape[2:], *B.shape[2:])):
            raise AdapterError(
                f"lora_A {tuple(A.shape)}, lora_B {tuple(B.shape)}: only convolutions with kernel "
                "size 1 have the same factors in PEFT and here"
            )
        A, B = A.flatten(1), B.flatten(1)
    r = by_pattern(config.get("rank_pattern") or {}, name, config["r"])
    alpha = by_pattern(config.get("alpha_pattern") or {}, name, config["lora_alpha"])
    if A.ndim != 2 or B.ndim != 2 or A.shape[0] != r or B.shape[1] != r:
        raise AdapterError(
            f"lora_A {tuple(A.shape)}, lora_B {tuple(B.shape)}: {CONFIG_NAME} says rank {r}"
        )
    scaling = alpha / math.sqrt(r) if config.get("use_rslora") else alpha / r
    dropout = config.get("lora_dropout") or 0.0
    vectors: dict[str, Any] = {
        own: found[own] for own in ("magnitude", "lora_bias") if own in found
    }
    return Layer(kind, A, B, alpha, scaling, 0.0 if kind == "Embedding" else dropout, **vectors)


def _sort_others(
    others: Mapping[str, Tensor],
    adapted: Collection[str],
    config: Mapping[str, Any],
    saved_names: Collection[str] | None,
) -> tuple[dict[str, Tensor], dict[str, Tensor], dict[str, Tensor], list[str]]:
    """Tensors that are no factors: trained biases, saved modules', copies of the base's, the rest."""
    biases: dict[str, Tensor] = {}
    saved: dict[str, Tensor] = {}
    copies: dict[str, Tensor] = {}
    strange = []
    mode, modules = config.get("bias") or "none", config.get("modules_to_save") or ()
    for key, tensor in others.items():
        name, _, own = key.rpartition(".")
        outer = name.removesuffix(".base_layer")
        trained = in_any(name, modules) if saved_names is None else key in saved_names
        if trained:
            saved[key] = tensor
        elif outer != name and own == "bias" and outer in adapted and mode != "none":
            biases[f"{outer}.{own}"] = tensor
        elif is_bias(own) and outer == name and mode == "all":
            biases[key] = tensor
        elif saved_names is not None or (own == "weight" and (outer == name or outer in adapted)):
            copies[f"{outer}.{own}"] = tensor  # PEFT repeats embeddings that it did not train
        else:
            strange.append(key)
    return biases, saved, copies, strange


def in_any(name: str, modules_to_save: Collection[str]) -> bool:
    """Whether `name` is one of the modules that PEFT wraps for these entries, or inside of one.

    It wraps whatever ends in an entry: "norm" means input_layernorm too.
    """
    return any(outer.endswith(tuple(modules_to_save)) for outer in outer_names(name))


def outer_names(name: str) -> Iterator[str]:
    """The name, and before it those of the modules around it, outermost first."""
    return itertools.accumulate(name.split("."), "{}.{}".format)
