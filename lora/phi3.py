"""patch_phi3: a table of Phi-3's names and splits over `patch`."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import nn

from ._base import LoRALayer
from .linear import Linear
from .merged_linear import MergedLinear
from .patch import check_patchable, replace
from .quantize import quantize_in_place
from .targets import find_modules_to_save, find_targets
from .variants import Variant, checked

if TYPE_CHECKING:
    from typing_extensions import Unpack

_Model = TypeVar("_Model", bound=nn.Module)

# The linear layers of a decoder layer (transformers, models/phi3/modeling_phi3.py), by their block.
_PROJECTIONS = {
    "qkv_proj": "self_attn",
    "o_proj": "self_attn",
    "gate_up_proj": "mlp",
    "down_proj": "mlp",
}
# The fused ones, and what models name their parts that do not fuse them, in the order of the rows.
PARTS = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}
_FUSED = {part: fused for fused, parts in PARTS.items() for part in parts}


def patch_phi3(
    model: _Model,
    r: int = 16,
    lora_alpha: float = 32,
    lora_dropout: float = 0.05,
    target_modules: str | Collection[str] = ("qkv_proj", "gate_up_proj", "down_proj"),
    enable_qkv: Sequence[bool] = (True, True, True),
    *,
    bias: str = "none",
    task_type: str | None = None,
    modules_to_save: Collection[str] | None = None,
    layers_to_transform: int | Collection[int] | None = None,
    rank_pattern: Mapping[str, int] | None = None,
    alpha_pattern: Mapping[str, float] | None = None,
    merge_weights: bool = False,
    lora_dtype: torch.dtype | None = None,
    quantize: str | None = None,
    **variant: Unpack[Variant],
) -> _Model:
    """Adapt the projections of a Phi-3 model in place, freeze the rest, and return the model.

    qkv_proj becomes a MergedLinear of q, k and v (the sizes from the config, so grouped-query
    attention is exact), gate_up_proj a MergedLinear of two parts, o_proj and down_proj a Linear.
    r is the rank of each part. Works for transformers' Phi-3, Phi-3.5, Phi-4 and Phi-4-mini, and
    for a model of other code with the same structure. The base's own state-dict keys do not change.

    Args:
        target_modules: of qkv_proj, o_proj, gate_up_proj, down_proj; or a regular expression; or
            "all-linear", all four.
        enable_qkv: which of q, k and v get an update.
        task_type: of a published `peft_config`, so that it can be passed whole; "CAUSAL_LM" or None.
        modules_to_save: modules that train in full, such as ["lm_head", "embed_tokens"] after new
            chat tokens were added.
        quantize: "nf4" is the QLoRA recipe: all four projections of every layer get 4-bit weights,
            adapted or not; lm_head, embeddings and norms stay.
        The rest, and the variants (use_dora, init_lora_weights="pissa", ...), as in `lora.patch`.

    Raises:
        ValueError, TypeError: a model that is no Phi-3, targets that match nothing, and what
            `lora.patch` refuses. The model is then as it was.

    >>> model = transformers.AutoModelForCausalLM.from_pretrained(path)  # doctest: +SKIP
    >>> patch_phi3(model, r=16, lora_alpha=32, target_modules="all-linear")  # doctest: +SKIP
    """
    check_patchable(model)
    checked("patch_phi3", variant)
    layers = decoder_layers(model)
    if task_type not in (None, "CAUSAL_LM"):
        raise ValueError(
            f"task_type={task_type!r}: expected 'CAUSAL_LM' or None; for another head pass None and "
            "name the head in modules_to_save, so that it trains and is saved"
        )
    if len(enable_qkv) != 3:
        raise ValueError(f"enable_qkv={enable_qkv!r}: expected three bools, for q, k and v")
    allowed = {
        f"{layer}.{block}.{own}" if layer else f"{block}.{own}": own
        for layer in layers
        for own, block in _PROJECTIONS.items()
    }
    if isinstance(target_modules, str) and target_modules.lower() == "all-linear":
        target_modules = tuple(_PROJECTIONS)
    targets = find_targets(model, target_modules, layers_to_transform, _FUSED)
    others = sorted(targets.keys() - allowed.keys())
    if others:
        raise ValueError(
            f"target_modules={target_modules!r} reaches {others[0]!r}, which is none of a decoder "
            f"layer's {', '.join(_PROJECTIONS)}; use lora.patch for other modules"
        )

    def build(name: str, module: nn.Module, options: dict[str, Any]) -> LoRALayer:
        own = allowed[name]
        if own in ("o_proj", "down_proj"):
            return Linear.from_module(module, **options)
        splits: list[int]
        enabled: tuple[bool, ...]
        if own == "gate_up_proj":
            splits, enabled = [getattr(module, "out_features", 0) // 2] * 2, (True, True)
        else:
            attention = model.get_submodule(name.rpartition(".")[0])
            splits = qkv_splits(getattr(attention, "config", None) or model.config)
            enabled = tuple(enable_qkv)
        return MergedLinear.from_module(module, enable_lora=enabled, out_splits=splits, **options)

    quantized = replace(
        model,
        targets,
        find_modules_to_save(model, modules_to_save),
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
    del targets
    quantize_in_place(model, quantized)
    return model


def qkv_splits(config: Any) -> list[int]:
    """Rows of q, k and v: heads · head_dim, then twice the key-value heads · head_dim."""
    heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    return [heads * head_dim, kv_heads * head_dim, kv_heads * head_dim]


def decoder_layers(model: nn.Module) -> list[str]:
    """Names of the modules with Phi-3's four projections in self_attn and mlp."""
    layers = [
        name
        for name, module in model.named_modules()
        if all(
            isinstance(getattr(getattr(module, block, None), own, None), nn.Module)
            for own, block in _PROJECTIONS.items()
        )
    ]
    if layers:
        return layers
    linear = dict.fromkeys(
        name.rpartition(".")[2] for name, m in model.named_modules() if isinstance(m, nn.Linear)
    )
    model_type = getattr(getattr(model, "config", None), "model_type", None)
    raise ValueError(
        f"{type(model).__name__} is no Phi-3: expected decoder layers with self_attn.qkv_proj, "
        f"self_attn.o_proj, mlp.gate_up_proj and mlp.down_proj; it looks like "
        f"{model_type or 'a model without a config'} with the linear layers "
        f"{', '.join(map(repr, list(linear)[:12])) or 'none'}; "
        "use lora.patch(model, target_modules, ...)"
    )
