"""Adapter to and from a folder: one safetensors file that holds everything, and PEFT's JSON.

The safetensors file is the adapter: PEFT's tensors, and in its metadata

    lora          JSON: the complete config, and of every layer what PEFT's tensors do not say
    lora_sha256   SHA-256 over that text and the names, dtypes, shapes and bytes of all tensors

so that any change of the file is found, and lora's layers come back as they were, bit for bit.
`adapter_config.json` is derived from it and written after it; reading writes it anew if it differs.
Files without this metadata are read as PEFT's, `.pt` and `.bin` files without unpickling code.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .._version import __version__
from . import files, peft_format
from .contents import Adapter, AdapterError, Layer, check_parts, listed
from .peft_config import CONFIG_NAME
from .peft_format import TENSORS_NAME

_FACTS, _DIGEST = "lora", "lora_sha256"
_FORMAT = 1
_PEFT_PICKLE = "adapter_model.bin"
_log = logging.getLogger("lora")


@dataclass(frozen=True)
class File:
    """What `read_adapter` found.

    adapter: what of it could be understood. config: PEFT's.
    problems: everything that is wrong with the file itself, by the name of the module or tensor.
    verified: whether a digest was there and matched. native: whether lora wrote it.
    """

    path: Path
    adapter: Adapter
    config: Mapping[str, Any]
    problems: Mapping[str, str]
    verified: bool
    native: bool
    bytes: int

    def checked(self) -> Adapter:
        """The adapter; AdapterError if the file has any problem."""
        if self.problems:
            raise AdapterError(f"{self.path}: {listed(self.problems.values())}")
        return self.adapter


# Writing


def write_adapter(adapter: Adapter, directory: str | Path) -> None:
    """Write `adapter` into `directory`, atomically and durably (see `files.write_folder`)."""
    from safetensors.torch import save

    if not adapter.layers:
        raise AdapterError("the adapter has no LoRA layers: nothing to save")
    for problem in adapter.sound()[1].values():
        raise AdapterError(f"not saved: {problem}")
    config = peft_format.config_of(adapter)
    tensors = {
        key: tensor.detach().cpu().contiguous().clone()  # safetensors refuses shared memory
        for key, tensor in peft_format.tensors_of(adapter).items()
    }
    facts = json.dumps(_facts(adapter, config))
    metadata = {"format": "pt", _FACTS: facts, _DIGEST: digest(facts, tensors)}
    files.write_folder(
        Path(directory),
        {TENSORS_NAME: save(tensors, metadata), CONFIG_NAME: _config_bytes(config)},
    )


def _config_bytes(config: Mapping[str, Any]) -> bytes:
    return (json.dumps(config, indent=2, sort_keys=True) + "\n").encode()


def _facts(adapter: Adapter, config: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "format": _FORMAT,
        "version": __version__,
        "config": dict(config),
        "modules_to_save": sorted(adapter.saved),
        "layers": {
            name: {
                "kind": layer.kind,
                "lora_alpha": layer.lora_alpha,
                "scaling": layer.scaling,
                "lora_dropout": layer.lora_dropout,
                "enable_lora": layer.enable_lora,
                "out_splits": layer.out_splits,
                "transposed": layer.transposed,
                "fingerprint": layer.fingerprint,
                "frozen_rank": layer.frozen_rank,
                "use_lorafa": layer.use_lorafa,
            }
            for name, layer in adapter.layers.items()
        },
    }


def digest(facts: str, tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 over the facts and over every tensor's name, dtype, shape and bytes."""
    sha = hashlib.sha256(facts.encode())
    for key, tensor in sorted(tensors.items()):
        sha.update(f"\0{key}\0{tensor.dtype}\0{tuple(tensor.shape)}\0".encode())
        sha.update(tensor.contiguous().flatten().view(torch.uint8).numpy().data)
    return sha.hexdigest()


# Reading


def read_adapter(path: str | Path) -> File:
    """The adapter in a folder, or in a safetensors, `.bin` or `.pt` file of PEFT's format.

    Raises FileNotFoundError if there is none, AdapterError for what cannot be read at all: no
    safetensors, hostile or damaged structure, features of PEFT that lora does not have. All other
    problems are listed in the result.
    """
    path = Path(path)
    found = _locate(path)
    if found.suffix != ".safetensors":
        return _foreign(found, files.read_state_dict(found), found.stat().st_size)
    data = files.read_bytes(found)
    tensors, metadata = parse_safetensors(data, str(found))
    ours = {_FACTS, _DIGEST} & metadata.keys()
    if not ours:
        return _foreign(found, tensors, len(data))
    if len(ours) == 1:
        raise AdapterError(
            f"{found}: its metadata has {ours.pop()!r}, expected {_FACTS!r} and {_DIGEST!r} or "
            "neither: it is damaged"
        )
    return _native(found, tensors, metadata, len(data))


def _locate(path: Path) -> Path:
    """The file with the tensors."""
    if path.name == CONFIG_NAME:
        path = path.parent
    if path.is_dir():
        for name in (TENSORS_NAME, _PEFT_PICKLE):
            if (path / name).exists():
                return path / name
        inside = sorted(p.parent.name for p in path.glob(f"*/{TENSORS_NAME}"))
        hint = f"; there is one in its folder {inside[0]!r}" if inside else ""
        if (path / "config.json").exists():
            hint = "; it has a config.json, so it is a base model: give the folder of an adapter"
        raise FileNotFoundError(f"{path} has no {TENSORS_NAME}{hint}")
    if not path.exists():
        raise FileNotFoundError(
            f"{path}: there is no such adapter; for a name on the Hub, "
            "huggingface_hub.snapshot_download gives its folder"
        )
    return path


def parse_safetensors(data: bytes, where: str) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and metadata; the library checks sizes, offsets and dtypes against each other."""
    from safetensors import SafetensorError
    from safetensors.torch import load

    try:
        tensors = load(data)
    except (SafetensorError, ValueError, KeyError, OverflowError, RuntimeError, TypeError) as error:
        raise AdapterError(f"{where} is damaged or no safetensors file: {error}") from error
    header = files.parse_json(data[8 : 8 + int.from_bytes(data[:8], "little")], where)
    return dict(sorted(tensors.items())), header.get("__metadata__") or {}


def _native(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str], size: int) -> File:
    text = metadata[_FACTS]
    verified = digest(text, tensors) == metadata[_DIGEST]
    problems = {}
    if not verified:
        problems[""] = "its SHA-256 does not match its contents: it is damaged"
    facts = files.parse_json(text, f"{path}: its metadata")
    if verified and facts.get("format") != _FORMAT:
        raise AdapterError(
            f"{path}: format {facts.get('format')!r} of lora {facts.get('version')!r}: this version "
            f"reads format {_FORMAT}; update lora"
        )
    try:
        config = facts["config"]
        adapter, found = peft_format.parse(config, tensors, facts["modules_to_save"])
        layers = {
            name: _restored(layer, facts["layers"][name]) for name, layer in adapter.layers.items()
        }
        missing = [name for name in facts["layers"] if name not in {**layers, **found}]
    except AdapterError as error:
        raise AdapterError(f"{path}: {error}") from error
    except (KeyError, TypeError, AttributeError, IndexError, ValueError, RuntimeError) as error:
        raise AdapterError(f"{path}: its metadata is damaged ({error!r})") from error
    problems |= found | {name: f"missing tensors of {name}" for name in missing}
    return _file(path, adapter.replaced(layers=layers), config, problems, size, verified, True)


def _file(
    path: Path,
    adapter: Adapter,
    config: Mapping[str, Any],
    problems: dict[str, str],
    size: int,
    verified: bool = False,
    native: bool = False,
) -> File:
    """What was found, without tensors that no adapter may hold."""
    adapter, bad = adapter.sound()
    problems |= bad
    if not adapter.layers and not problems:
        problems[""] = "it has no LoRA layers"
    return File(path, adapter, config, problems, verified, native, size)


def _restored(layer: Layer, facts: Mapping[str, Any]) -> Layer:
    """lora's own layer, from PEFT's form of it and the facts."""
    as_tuple = {k: tuple(facts[k]) if facts[k] else None for k in ("enable_lora", "out_splits")}
    own = {k: facts[k] for k in ("lora_alpha", "scaling", "lora_dropout", "transposed")}
    variant = {"frozen_rank": 0, "use_lorafa": False}  # of files from before there were any
    own |= {key: facts.get(key, default) for key, default in variant.items()}
    A, B, kind = layer.lora_A, layer.lora_B, facts["kind"]
    if kind == "MergedLinear":
        mask, splits = as_tuple["enable_lora"] or (), as_tuple["out_splits"] or ()
        B = blocks(B, mask, splits)
    return layer.with_factors(A, B, kind=kind, fingerprint=facts["fingerprint"], **as_tuple, **own)


def blocks(B: Tensor, enable_lora: tuple[bool, ...], out_splits: tuple[int, ...]) -> Tensor:
    """The blocks of a block-diagonal B (out, n·r), stacked (rows, r): the inverse of `Layer.dense`.

    AdapterError if an entry beside the blocks is not zero: then it is not block-diagonal.
    """
    check_parts(out_splits, enable_lora)
    n = sum(enable_lora)
    if B.shape[1] % n or sum(out_splits) != len(B):
        raise AdapterError(
            f"lora_B {tuple(B.shape)} has no blocks for parts of {out_splits} rows with the mask "
            f"{enable_lora}"
        )
    r, part, found, rest = B.shape[1] // n, 0, [], B.clone()
    for enabled, rows in zip(enable_lora, torch.split(rest, list(out_splits)), strict=True):
        if enabled:
            columns = rows[:, part * r : (part + 1) * r]
            found.append(columns.clone())
            columns.zero_()
            part += 1
    if torch.count_nonzero(rest):
        raise AdapterError(
            f"lora_B {tuple(B.shape)} has {int(torch.count_nonzero(rest))} entries beside its blocks "
            "that are not zero: the update is dense (PEFT's training fills them), keep it as a Linear"
        )
    return torch.cat(found)


def _foreign(path: Path, tensors: dict[str, Tensor], size: int) -> File:
    """A file without our metadata: its meaning is in the JSON beside it."""
    if not (path.parent / CONFIG_NAME).exists():
        raise AdapterError(
            f"{path} does not say its rank and alpha, and there is no {CONFIG_NAME} beside it; of a "
            "loralib file give the model that it belongs to: lora.load_adapter(patched_model, file), "
            "or python -m lora convert with --lora-alpha"
        )
    config = files.read_json(path.parent / CONFIG_NAME)
    try:
        adapter, problems = peft_format.parse(config, tensors)
    except AdapterError as error:
        raise AdapterError(f"{path.parent / CONFIG_NAME}: {error}") from error
    return _file(path, adapter, config, problems, size)


# What a user may change in the JSON: where the base is, and what nobody computes with.
_FREE = ("base_model_name_or_path", "inference_mode", "revision", "task_type")


def heal(directory: Path, file: File) -> None:
    """Write the JSON of an adapter of ours anew if it says otherwise; remove what dead writers left.

    A process that died between the two files, or an editor, may have left it so.
    """
    if not directory.is_dir() or not file.verified:
        return
    with contextlib.suppress(OSError, AdapterError):  # it may only be read, or is damaged meanwhile
        files.tidy(directory)
        while not _says_the_same(directory / CONFIG_NAME, file.config):
            file = read_adapter(directory)  # which may be a newer one than that which was loaded
            config = dict(file.config) | _free(directory / CONFIG_NAME)
            if not file.verified or _says_the_same(directory / CONFIG_NAME, file.config):
                return
            files.write_folder(directory, {CONFIG_NAME: _config_bytes(config)})
            _log.warning("%s did not say what its adapter says: written anew", directory)
            file = read_adapter(directory)


def _says_the_same(path: Path, config: Mapping[str, Any]) -> bool:
    said = _said(path)
    return all(key in said and said[key] == config[key] for key in config.keys() - set(_FREE))


def _free(path: Path) -> dict[str, Any]:
    return {key: value for key, value in _said(path).items() if key in _FREE}


def _said(path: Path) -> dict[str, Any]:
    """What the JSON says; nothing if it cannot be read."""
    try:
        return files.read_json(path)
    except (AdapterError, FileNotFoundError):
        return {}
