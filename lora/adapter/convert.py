"""Exact conversions between forms of an adapter; what cannot be exact is refused with the reason.

    split      qkv_proj -> q_proj, k_proj, v_proj;  gate_up_proj -> gate_proj, up_proj
               (for a Phi-3 whose projections were separated, as Llama's are), and `fuse` back
    portable   one rank for all layers, zero-padded; the scale folded into B, so lora_alpha = r; no
               patterns. PEFT, vLLM and llama.cpp's converter read it alike (vLLM knows no
               patterns, the converter neither patterns nor rsLoRA: they would take a wrong scale
               without a word)
    loralib    `lora_A` and `lora_B` as in `lora.lora_state_dict`, without rank, alpha and kinds

A dense update of qkv_proj has one A for all rows: split, every part gets a copy of it. That computes
the same; trained further, the copies go their own ways.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ..phi3 import PARTS
from .contents import Adapter, AdapterError, Layer
from .fingerprint import is_loftq, mark_alone


def split(adapter: Adapter, qkv_rows: Sequence[int] | None = None) -> Adapter:
    """The adapter for the same model with separate projections.

    qkv_rows: rows of q, k and v, needed for an update of qkv_proj as a whole (PEFT's), since its
    factors do not say them. Raises AdapterError if it is missing, and for trained fused biases.
    """
    layers: dict[str, Layer] = {}
    masks: dict[str, set[tuple[bool, ...]]] = {}
    _refuse_trained(adapter, PARTS)
    for name, layer in adapter.layers.items():
        prefix, own = _own_name(name)
        if own not in PARTS:
            if layer.kind == "MergedLinear":
                raise AdapterError(f"{name} has parts, and no names for them are known: not split")
            layers[name] = layer
            continue
        pieces = _pieces(name, layer, own, qkv_rows)
        masks.setdefault(own, set()).add(tuple(piece is not None for piece in pieces))
        for part, piece in zip(PARTS[own], pieces, strict=True):
            if piece is not None:
                layers[prefix + part] = piece
    targets = _retarget(adapter.target_modules, masks)
    return adapter.replaced(layers=layers, target_modules=targets)


def _refuse_trained(adapter: Adapter, renamed: Collection[str]) -> None:
    """Tensors that were trained as they are, in modules that will have other names."""
    for key in (*adapter.biases, *adapter.saved):
        module = next((part for part in key.split(".") if part in renamed), None)
        if module is not None:
            raise AdapterError(
                f"{key} was trained itself, and {module} would not be there any more"
            )


def _own_name(name: str) -> tuple[str, str]:
    own = name.rpartition(".")[2]
    return name.removesuffix(own), own


def _pieces(
    name: str, layer: Layer, own: str, qkv_rows: Sequence[int] | None
) -> list[Layer | None]:
    """The update of every part, None where a part has none."""
    parts = len(PARTS[own])
    plain: dict[str, Any] = dict.fromkeys(("enable_lora", "out_splits"))
    plain |= {"kind": "Linear", "fingerprint": mark_alone(layer.fingerprint)}
    if layer.kind == "MergedLinear":
        mask = layer.enable_lora or ()
        if len(mask) != parts:
            raise AdapterError(f"{name} has {len(mask)} parts, expected {', '.join(PARTS[own])}")
        if own == "qkv_proj" and qkv_rows and list(qkv_rows) != list(layer.out_splits or ()):
            raise AdapterError(
                f"{name} has parts of {layer.out_splits} rows, the base {tuple(qkv_rows)}"
            )
        factors_A = torch.split(layer.lora_A, layer.r)
        factors_B = torch.split(layer.lora_B, [stop - start for start, stop in layer.rows])
        pairs = iter(zip(factors_A, factors_B, strict=True))
        vectors = _vectors_of_parts(layer, layer.out_splits or ())
        return [
            layer.with_factors(*next(pairs), **(plain | of_part)) if on else None
            for on, of_part in zip(mask, vectors, strict=True)
        ]
    out = layer.shape[0]
    rows = list(qkv_rows or ()) if own == "qkv_proj" else [out // parts] * parts
    if len(rows) != parts or sum(rows) != out:
        raise AdapterError(
            f"{name} is one update of {out} rows: to split it, the rows of {', '.join(PARTS[own])} "
            f"must be known, got {rows or None} (python -m lora convert takes them from --base)"
        )
    factors_B, vectors = torch.split(layer.lora_B, rows), _vectors_of_parts(layer, rows)
    return [
        layer.with_factors(layer.lora_A, B, **(plain | of_part))
        for B, of_part in zip(factors_B, vectors, strict=True)
    ]


def _vectors_of_parts(layer: Layer, rows: Sequence[int]) -> list[dict[str, Any]]:
    """DoRA's magnitude and lora_bias, where there are such, of every part."""
    pieces = {name: torch.split(vector, list(rows)) for name, vector in layer.vectors.items()}
    return [{name: parts[i] for name, parts in pieces.items()} for i in range(len(rows))]


def _retarget(
    targets: tuple[str, ...] | str | None, masks: Mapping[str, set[tuple[bool, ...]]]
) -> tuple[str, ...] | None:
    """Short names for the parts, where every layer has the same ones; else None, the whole names."""
    if not isinstance(targets, tuple) or any("." in t for t in targets):
        return None
    if any(len(found) > 1 for found in masks.values()):
        return None
    parts: list[str] = []
    for target in targets:
        if target not in PARTS:
            parts.append(target)
        elif target in masks:
            mask = next(iter(masks[target]))
            parts += [part for part, on in zip(PARTS[target], mask, strict=True) if on]
    return tuple(parts)


def fuse(adapter: Adapter) -> Adapter:
    """The inverse of `split`: q_proj, k_proj, v_proj -> qkv_proj, gate_proj, up_proj -> gate_up_proj.

    Parts that share one A become one update of the whole, others a MergedLinear. Raises AdapterError
    for parts of different rank or scale, and where the rows of a missing part are not known.
    """
    of_part = {part: fused for fused, parts in PARTS.items() for part in parts}
    _refuse_trained(adapter, of_part)
    layers: dict[str, Layer] = {}
    for name, layer in adapter.layers.items():
        prefix, own = _own_name(name)
        fused = of_part.get(own)
        if fused is None:
            layers[name] = layer
        elif prefix + fused in adapter.layers:
            raise AdapterError(f"{name} and {prefix + fused} both have an update: not fused")
        elif prefix + fused not in layers:
            found = [adapter.layers.get(prefix + part) for part in PARTS[fused]]
            layers[prefix + fused] = _fused(prefix + fused, fused, found)
    targets = adapter.target_modules
    if isinstance(targets, tuple) and all("." not in target for target in targets):
        targets = tuple(dict.fromkeys(of_part.get(target, target) for target in targets))
    else:
        targets = None
    return adapter.replaced(layers=layers, target_modules=targets)


def _fused(name: str, own: str, found: Sequence[Layer | None]) -> Layer:
    there = [layer for layer in found if layer is not None]
    facts = {(x.kind, x.r, x.scaling, x.frozen_rank, x.use_lorafa, *x.vectors) for x in there}
    if len(facts) > 1 or there[0].kind != "Linear":
        raise AdapterError(
            f"{name}: its parts have (kind, r, scale, PiSSA's frozen rank, LoRA-FA, ...) "
            f"{sorted(facts)}: expected Linear layers of one rank and scale, and of one variant"
        )
    rows = {p: x.shape[0] for p, x in zip(PARTS[own], found, strict=True) if x is not None}
    equal = PARTS[own][-2:]  # k and v have as many rows as each other, and so have gate and up
    known = next((rows[part] for part in equal if part in rows), 0)
    splits = tuple(rows.get(part, known if part in equal else 0) for part in PARTS[own])
    if not all(splits):
        raise AdapterError(
            f"{name}: the adapter has {', '.join(rows)} alone, so the rows of the others are unknown"
        )
    B = torch.cat([layer.lora_B for layer in there])
    loftq = next((x.fingerprint for x in there if is_loftq(x.fingerprint)), None)
    first = replace(there[0], fingerprint=mark_alone(loftq))
    if first.magnitude is not None and None in found:
        raise AdapterError(f"{name}: DoRA's magnitudes of the parts without an update are unknown")
    vectors = {
        own: torch.cat(
            [
                B.new_zeros(rows_of) if part is None else getattr(part, own)
                for part, rows_of in zip(found, splits, strict=True)
            ]
        )
        for own in first.vectors
    }
    if None not in found and all(torch.equal(x.lora_A, first.lora_A) for x in there):
        return first.with_factors(first.lora_A, B, **vectors)
    mask = tuple(layer is not None for layer in found)
    A = torch.cat([layer.lora_A for layer in there])
    parts = {"kind": "MergedLinear", "enable_lora": mask, "out_splits": splits}
    return first.with_factors(A, B, **parts, **vectors)


def portable(adapter: Adapter, dtype: torch.dtype | None = None) -> tuple[Adapter, float]:
    """The adapter in the form that most loaders read alike, and the worst relative rounding of B.

    The rounding is 0.0 where B times the scale is exact, as for scales that are powers of two. It is
    done once, in fp64, to `dtype`; None is the factors' own dtype if that is exact, else fp32.
    Raises AdapterError for convolutions, trained biases and modules that were trained in full.
    """
    if adapter.saved or adapter.biases:
        what = adapter.modules_to_save or tuple(adapter.biases)
        raise AdapterError(
            f"{what[0]} was trained in full, which vLLM and llama.cpp do not read: merge the adapter "
            "into its base instead (python -m lora merge)"
        )
    r = max(layer.r * layer.parts for layer in adapter.layers.values())
    layers, worst = {}, 0.0
    for name, layer in adapter.layers.items():
        if layer.kind.startswith("Conv"):
            raise AdapterError(
                f"{name} is a {layer.kind}: only linear layers and embeddings are read"
            )
        _refuse_vectors(name, layer, "vLLM and llama.cpp do")
        A, B = layer.dense()
        scaled = B.double() * layer.scaling
        own = torch.promote_types(A.dtype, B.dtype)
        kept = dtype or (own if torch.equal(scaled.to(own).double(), scaled) else torch.float32)
        rounded = scaled.to(kept)
        if not torch.isfinite(rounded).all() or not torch.isfinite(A.to(kept)).all():
            raise AdapterError(f"{name}: A, or B times its scale {layer.scaling}, overflows {kept}")
        for exact, got in ((scaled, rounded), (A.double(), A.to(kept))):
            error = (got.double() - exact).abs().max() / exact.abs().max().clamp(min=1e-300)
            worst = max(worst, float(error))
        missing = r - B.shape[1]
        layers[name] = Layer(
            "Embedding" if layer.kind == "Embedding" else "Linear",
            torch.nn.functional.pad(A.to(kept), (0, 0, 0, missing)),
            torch.nn.functional.pad(rounded, (0, missing)),
            lora_alpha=r,
            scaling=1.0,
            lora_dropout=layer.lora_dropout,
            transposed=layer.transposed,
            fingerprint=layer.fingerprint,
        )
    return adapter.replaced(layers=layers, bias="none"), worst


def _refuse_vectors(name: str, layer: Layer, who: str) -> None:
    for own in layer.vectors:
        feature = {"magnitude": "DoRA's magnitude", "lora_bias": "a lora_bias"}[own]
        raise AdapterError(
            f"{name} has {feature}, which {who} not read: merge the adapter into its base instead "
            "(python -m lora merge)"
        )


def to_loralib(adapter: Adapter) -> dict[str, Tensor]:
    """The state dict of loralib's layers, as `lora.lora_state_dict` gives it.

    It does not hold r, lora_alpha and the kinds: the model must be built with them, so that
    lora_alpha / r is the scale (for PiSSA with rank 2 r). Raises AdapterError for parts of unequal
    size, DoRA, lora_bias and modules that were trained in full, which loralib does not have.
    """
    if adapter.saved:
        raise AdapterError(
            f"{adapter.modules_to_save[0]} was trained in full: loralib has no place for it"
        )
    state = {}
    for name, layer in adapter.layers.items():
        _refuse_vectors(name, layer, "loralib does")
        if layer.kind == "MergedLinear" and len(set(layer.out_splits or ())) > 1:
            raise AdapterError(
                f"{name} has parts of {list(layer.out_splits or ())} rows: loralib's MergedLinear has "
                "equal ones"
            )
        state[f"{name}.lora_A"], state[f"{name}.lora_B"] = layer.lora_A, layer.lora_B
    return {**state, **adapter.biases}


def from_loralib(
    state: Mapping[str, Tensor],
    shapes: Mapping[str, Sequence[int]],
    lora_alpha: float,
    *,
    enable_lora: Sequence[bool] | None = None,
    embeddings: Collection[str] = (),
) -> Adapter:
    """The adapter in a state dict of loralib's layers.

    Args:
        state: what `lora_state_dict` gave.
        shapes: of the base's weights, by their name; they tell the kinds of the layers.
        lora_alpha: of all layers; the file does not say it.
        enable_lora: the mask of MergedLinear layers with parts that have no update.
        embeddings: names, or ends of names, of the embeddings.
    """
    names = {key.removesuffix(".lora_A") for key in state if key.endswith(".lora_A")}
    names |= {key.removesuffix(".lora_B") for key in state if key.endswith(".lora_B")}
    layers = {}
    for name in sorted(names):
        A, B = state.get(f"{name}.lora_A"), state.get(f"{name}.lora_B")
        shape = shapes.get(f"{name}.weight", shapes.get(f"{name}.conv.weight"))
        if A is None or B is None or shape is None:
            missing = "lora_A" if A is None else "lora_B" if B is None else "weight in the base"
            raise AdapterError(f"{name} has no {missing}")
        is_embedding = any(name == e or name.endswith(f".{e}") for e in embeddings)
        try:
            layers[name] = _from_loralib(A, B, tuple(shape), lora_alpha, enable_lora, is_embedding)
        except AdapterError as error:
            raise AdapterError(f"{name}: {error}") from error
    biases = {k: v for k, v in state.items() if k.rpartition(".")[2] == "bias"}
    strange = [k for k in state if k not in biases and not k.endswith((".lora_A", ".lora_B"))]
    if strange or not layers:
        what = (
            f"{strange[0]!r} is neither a factor nor a bias" if strange else "no lora_A, no lora_B"
        )
        raise AdapterError(f"this is no state dict of LoRA factors: {what}")
    mode = "none" if not biases else "all"
    return Adapter(layers=layers, bias=mode, biases=biases)


def _from_loralib(
    A: Tensor,
    B: Tensor,
    shape: tuple[int, ...],
    lora_alpha: float,
    enable_lora: Sequence[bool] | None,
    is_embedding: bool,
) -> Layer:
    if A.ndim != 2 or B.ndim != 2 or not B.shape[1] or A.shape[0] % B.shape[1]:
        raise AdapterError(f"lora_A {tuple(A.shape)} and lora_B {tuple(B.shape)} do not fit")
    r, parts, dense = B.shape[1], A.shape[0] // B.shape[1], (B.shape[0], A.shape[1])
    scale = (lora_alpha, lora_alpha / r)
    if len(shape) > 2 and math.prod(shape[2:]) == 1 and shape[:2] == dense and parts == 1:
        return Layer(f"Conv{len(shape) - 2}d", A, B, *scale)
    if len(shape) == 2 and is_embedding and shape == (A.shape[1], B.shape[0]) and parts == 1:
        return Layer("Embedding", A, B, *scale)
    if len(shape) != 2 or A.shape[1] not in shape or is_embedding:
        raise AdapterError(
            f"factors {tuple(A.shape)}, {tuple(B.shape)} on a weight of {shape}: expected a linear "
            "layer, an embedding, or a convolution with kernel size 1"
        )
    if parts == 1 and shape == dense:
        return Layer("Linear", A, B, *scale)
    if parts == 1 and shape == dense[::-1]:
        raise AdapterError(
            f"factors {tuple(A.shape)}, {tuple(B.shape)} on a weight of {shape} may be an embedding "
            "or a linear layer with fan_in_fan_out: name the embeddings (--embedding), or load it "
            "into the patched model by lora.load_adapter"
        )
    transposed = shape[1] != A.shape[1]
    out, rows = shape[1] if transposed else shape[0], B.shape[0] // parts
    mask = tuple(enable_lora or (True,) * (out // max(rows, 1)))
    if not rows or sum(mask) != parts or rows * len(mask) != out or B.shape[0] != rows * parts:
        raise AdapterError(
            f"lora_B has {B.shape[0]} rows of {parts} parts, the weight has {out}: say which parts "
            f"have an update (--enable-lora, such as 1,0,1), got {mask}"
        )
    splits = (rows,) * len(mask)
    return Layer(
        "MergedLinear", A, B, *scale, enable_lora=mask, out_splits=splits, transposed=transposed
    )
