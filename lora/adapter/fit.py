"""Whether an adapter fits a model: every function gives the problem in words, or None."""

from __future__ import annotations

import difflib
from collections.abc import Collection, Mapping

import torch
from torch import Tensor, nn

from ..patch import layer_type
from ..phi3 import PARTS
from .contents import Layer
from .save import CLASSES, is_pointwise, matrix


def unfit(name: str, layer: Layer, base: Mapping[str, nn.Module]) -> str | None:
    """Why an update does not fit the base's module of that name; None if it does."""
    module = base.get(name)
    if module is None:
        return stranger(name, base)
    try:
        kind = layer_type(module)
        shape = tuple(matrix(module).shape)
    except (TypeError, ValueError) as error:
        return f"misfit: {name}: {error}"
    if not issubclass(CLASSES[layer.kind], kind):
        return f"misfit: {name} is a {type(module).__name__}, the update is a {layer.kind}'s"
    if shape[:2] != layer.shape:
        return f"misshapen: {name} is {shape}, the update is for {layer.shape}"
    if layer.kind.startswith("Conv") and not is_pointwise(module):
        return f"misshapen: {name} is {shape}, the update is for kernel size 1 and one group"
    return None


def misfit(name: str, layer: Layer, now: Layer) -> str | None:
    """Why an update cannot go into a LoRA layer, described as `now`; None if it can."""
    for fact in ("kind", "enable_lora", "out_splits", "scaling"):
        there, here = getattr(layer, fact), getattr(now, fact)
        if there != here:
            return f"misfit: {name}: {fact} is {there!r}, in the model {here!r}"
    return misshapen(name, layer.parameters(), now.parameters())


def misshapen(name: str, values: Mapping[str, Tensor], now: Mapping[str, Tensor]) -> str | None:
    """Why values are not those of a layer whose parameters are `now`; None if their shapes are."""
    there, here = ({own: tuple(t.shape) for own, t in x.items()} for x in (values, now))
    for own in {**there, **here}:
        if there.get(own) != here.get(own):
            kept, has = there.get(own, "missing"), here.get(own, "missing")
            return f"misshapen: {name}: {own} is {kept}, in the model {has}"
    return None


def stranger(name: str, known: Collection[str]) -> str:
    """That the model has no module of this name, with the nearest that it has."""
    prefix, _, own = name.rpartition(".")
    text = f"unexpected: the model has no {name}"
    for fused, parts in PARTS.items():
        others, to = ((fused,), "fused") if own in parts else (parts, "split")
        if own in (fused, *parts) and any(f"{prefix}.{other}" in known for other in others):
            return f"{text}, but {', '.join(others)}: python -m lora convert --to {to}"
    near = difflib.get_close_matches(name, known, n=1)
    return f"{text} (nearest: {near[0]})" if near else text


def unholdable(key: str, value: Tensor, now: Tensor) -> str | None:
    """Why the tensor `now` cannot take `value`; None if it can, exactly."""
    if value.shape != now.shape:
        text = f"misshapen: {key} is {tuple(value.shape)}, in the model {tuple(now.shape)}"
        if value.ndim == now.ndim == 2 and value.shape[1] == now.shape[1]:
            text += f" (for added tokens: model.resize_token_embeddings({value.shape[0]}) first)"
        return text
    back = value.to(now.dtype).to(value.dtype)
    if not torch.equal(back.nan_to_num(), value.nan_to_num()):
        return f"dtype: {key} is {value.dtype}, {now.dtype} in the model would round it"
    return None
