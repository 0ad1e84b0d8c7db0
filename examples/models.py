"""Load a causal language model, adapt it, and let it answer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from chat_data import Example, InputError, render
from processes import first_alone, sharded
from safetensors import SafetensorError
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

import lora
import lora.distributed

_NEEDED = ["*.json", "*.safetensors", "*.jinja"]  # of a model on the Hub


def device() -> torch.device:
    """Where the model lives: on the GPU if there is one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def load(factory: Any, name: str, **options: Any) -> Any:
    """`factory.from_pretrained(name, ...)`; what goes wrong is an InputError with the name."""
    try:
        return factory.from_pretrained(name, **options)
    except (OSError, ValueError, ImportError, SafetensorError) as error:
        first_line = str(error).strip().partition("\n")[0]
        hint = (
            "is the folder whole? A damaged stand-in can be deleted, it is made anew"
            if Path(name).is_dir()
            else "there is no such folder here either"
        )
        raise InputError(f"cannot load {name}: {first_line} ({hint})") from error


def load_quantized(name: str, change: Callable[[nn.Module], object], **options: Any) -> Any:
    """The model with the 4-bit weights that `change` asks for, while it has no weights yet.

    They are made one by one as they are read: all of the dense model is never held.
    """
    model, folder = _on_meta(name, change, **options)
    _fill(lora.load_pretrained, model, folder)
    return model.eval()


def load_in_shards(name: str, change: Callable[[nn.Module], object], **options: Any) -> Any:
    """The model over all processes by FSDP2, each of which reads its own part of the checkpoint.

    `change` adapts the model, while it has no weights yet. No process ever holds all of it.
    """
    model, folder = _on_meta(name, change, **options)
    model = sharded(model)
    _fill(lora.distributed.load_sharded, model, folder)
    return model.eval()


def _on_meta(name: str, change: Callable[[nn.Module], object], **options: Any) -> tuple[Any, Path]:
    """(the adapted model, all of it on the meta device but for its frequencies; its folder)."""
    cache = options.pop("cache_dir", None)
    config = load(AutoConfig, name, cache_dir=cache)
    folder = folder_of(name, cache)
    dtype = getattr(torch, options.pop("dtype"))
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype, **options)
    if (folder / "generation_config.json").exists():
        model.generation_config = load(GenerationConfig, str(folder))
    # Of the frequencies, which are in no checkpoint, every process makes all.
    with device():
        model.model.rotary_emb = type(model.model.rotary_emb)(config=model.config)
    change(model)
    return model, folder


def _fill(load_weights: Callable[..., None], model: nn.Module, folder: Path) -> None:
    try:
        load_weights(model, folder, device())
    except lora.AdapterError as error:
        raise InputError(f"cannot load {folder}: {error}") from error


def folder_of(name: str, cache: Path | None) -> Path:
    """The folder of a model, downloaded by the first process if it is a name on the Hub."""
    if Path(name).is_dir():
        return Path(name)
    from huggingface_hub import snapshot_download

    with first_alone() as alone:
        if alone:
            snapshot_download(name, cache_dir=cache, allow_patterns=_NEEDED)
    return Path(snapshot_download(name, cache_dir=cache, allow_patterns=_NEEDED))


def adapt(model: PreTrainedModel, name: str, **options: Any) -> PreTrainedModel:
    """`lora.patch_phi3(model, ...)`; what it refuses is an InputError with the model's name."""
    try:
        return lora.patch_phi3(model, **options)
    except (ValueError, TypeError) as error:
        raise InputError(f"{name} cannot be adapted: {error}") from error


def base_bytes(model: nn.Module) -> int:
    """Bytes of the frozen weights that this process holds, as it holds them: of 4 bits, or dense."""
    held = (
        p.to_local() if hasattr(p, "to_local") else p
        for name, p in model.named_parameters()
        if not p.requires_grad and not name.rpartition(".")[2].startswith("lora_")
    )
    return sum(part.nbytes for part in held)


def checkpoint_activations(model: PreTrainedModel, options: dict[str, Any]) -> None:
    """Keep only the layers' inputs and compute the rest again in backward: `options` says how."""
    if hasattr(model, "activation_checkpointing_enable"):
        model.activation_checkpointing_enable(options)
    else:  # its name in older versions of transformers
        model.gradient_checkpointing_enable(options)


def answers(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, examples: Sequence[Example]
) -> list[str]:
    """The model's replies in the place of each chat's last, word by most likely word."""
    was_training = model.training
    model.eval()
    replies = []
    for example in examples:
        prompt = render(example.prompt, tokenizer, reply=True)
        ids = tokenizer(prompt, add_special_tokens=False, return_tensors="pt")["input_ids"]
        generated = model.generate(
            ids.to(model.device),
            attention_mask=torch.ones_like(ids).to(model.device),
            max_new_tokens=48,
            do_sample=False,
            pad_token_id=tokenizer.eos_token_id,
        )
        replies.append(tokenizer.decode(generated[0, ids.shape[1] :], skip_special_tokens=True))
    model.train(was_training)
    return replies


def side_by_side(examples: Sequence[Example], before: Sequence[str], after: Sequence[str]) -> str:
    """Questions, the answers that were expected, and those given before and after the training."""
    lines = []
    for example, old, new in zip(examples, before, after, strict=True):
        question = example.prompt[-1]["content"] if example.prompt else ""
        rows = {"": question, "expected": example.reply, "before": old, "after": new}
        lines += [f"  {name:>8}  {' '.join(text.split())}" for name, text in rows.items()]
    return "\n".join(lines)
