"""What an adapter holds: as facts, and as a table of its kinds of layers."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from typing import Any

from ..table import aligned
from .contents import Layer
from .storage import File


def facts_of(file: File) -> dict[str, Any]:
    adapter = file.adapter
    tensors = adapter.tensors().values()
    return {
        "path": str(file.path),
        "written_by": "lora" if file.native else "PEFT, or another library",
        "verified": file.verified,
        "problems": list(file.problems.values()),
        "base": adapter.base,
        "task_type": adapter.task_type,
        "bias": adapter.bias,
        "modules_to_save": list(adapter.modules_to_save),
        "parameters": sum(t.numel() for t in tensors),
        "bytes": file.bytes,
        "layers": [_of_layer(name, layer) for name, layer in adapter.layers.items()],
    }


def _of_layer(name: str, layer: Layer) -> dict[str, Any]:
    return {
        "name": name,
        "kind": layer.kind,
        "shape": list(layer.shape),
        "parts": _parts(layer),
        "r": layer.r - layer.frozen_rank,
        "lora_alpha": layer.lora_alpha,
        "scaling": layer.scaling,
        "lora_dropout": layer.lora_dropout,
        "variant": _variant(layer),
        "dtype": str(layer.lora_A.dtype).removeprefix("torch."),
        "norm": _norm(layer),
    }


def _parts(layer: Layer) -> list[int]:
    """Rows of every part, negative without an update; one part for most kinds."""
    if layer.kind != "MergedLinear":
        return [layer.shape[0]]
    parts = zip(layer.out_splits or (), layer.enable_lora or (), strict=True)
    return [rows if on else -rows for rows, on in parts]


def _variant(layer: Layer) -> list[str]:
    """What is not plain LoRA's, in the words of `lora.variants`; rsLoRA shows in the scale."""
    has = {
        "use_dora": layer.magnitude is not None,
        "lora_bias": layer.lora_bias is not None,
        "pissa": layer.frozen_rank > 0,
        "use_lorafa": layer.use_lorafa,
    }
    return [name for name, there in has.items() if there]


def _norm(layer: Layer) -> float:
    """Frobenius norm of the low-rank update: ‖s B A‖² = s² tr(BᵀB · AAᵀ), without forming B A."""
    A, B = (factor.double() for factor in layer.dense())
    square = float(((B.T @ B) * (A @ A.T)).sum())
    return abs(layer.scaling) * math.sqrt(max(square, 0.0))


def as_text(facts: Mapping[str, Any]) -> str:
    layers = facts["layers"]
    kinds = Counter(_row(layer) for layer in layers)
    head = (
        "layer",
        "count",
        "weight",
        "parts",
        "r per part",
        "alpha",
        "scaling",
        "dtype",
        "|update|",
    )
    cells: list[tuple[str, ...]] = [head]
    for (own, kind, *rest), count in kinds.items():
        norms = [x["norm"] for x in layers if _row(x) == (own, kind, *rest)]
        span = f"{min(norms):.3g} to {max(norms):.3g}" if count > 1 else f"{norms[0]:.3g}"
        cells.append((f"{own} ({kind})", str(count), *rest, span))
    verified = "verified" if facts["verified"] else "not verified (no digest of ours)"
    return "\n".join(
        [
            f"{facts['path']}: written by {facts['written_by']}, {verified}",
            f"base: {facts['base'] or 'not said'}; task: {facts['task_type'] or 'not said'}; "
            f"trained biases: {facts['bias']}; "
            f"trained in full: {', '.join(facts['modules_to_save']) or 'none'}",
            *aligned(cells),
            f"{len(layers)} layers, {facts['parameters']:,} parameters, {facts['bytes']:,} bytes",
            *(f"problem: {problem}" for problem in facts["problems"]),
        ]
    )


def _row(layer: Mapping[str, Any]) -> tuple[str, ...]:
    parts = " ".join(f"{p}" if p > 0 else f"({-p})" for p in layer["parts"])
    shape = " x ".join(map(str, layer["shape"]))
    numbers = (str(layer["r"]), f"{layer['lora_alpha']:g}", f"{layer['scaling']:g}")
    own = layer["name"].rpartition(".")[2]
    return (
        own,
        ", ".join([layer["kind"], *layer["variant"]]),
        shape,
        parts,
        *numbers,
        layer["dtype"],
    )
