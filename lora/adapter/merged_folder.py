"""Writing a merged checkpoint: shards from blocks of bytes, and the files that go along."""

from __future__ import annotations

import fnmatch
import json
import math
import os
import shutil
import struct
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import BinaryIO

import torch

from .checkpoint import INDEX, Checkpoint, Stored
from .contents import AdapterError

_NOT_CARRIED = (
    *("*.safetensors", "*.bin", "*.pt", "*.pth", "*.ckpt", "*.gguf", "*.h5", "*.msgpack", "*.onnx"),
    *("*.onnx_data", "*.index.json", "*.index.*.json", "adapter_config.json", ".*"),
)


def write_shard(
    path: Path, tensors: Mapping[str, Stored], tensor_bytes: Callable[[str], Iterator[memoryview]]
) -> None:
    """A safetensors file with these dtypes and shapes, in this order, streamed from its blocks."""
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    begin = 0
    for name, stored in tensors.items():
        offsets = [begin, begin + stored.nbytes]
        header[name] = {"dtype": stored.dtype, "shape": stored.shape, "data_offsets": offsets}
        begin += stored.nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # so that the first tensor is aligned
    with path.open("xb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for name in tensors:
            for block in tensor_bytes(name):
                file.write(block)
        assert file.tell() == 8 + len(text) + begin
        _to_disk(file)


def rewritten(
    base: Checkpoint, planned: Mapping[str, Stored], dtype: torch.dtype
) -> dict[str, dict[str, object]]:
    """The JSON files that say what the dequantised checkpoint is."""
    config = {key: said for key, said in base.config.items() if key != "quantization_config"}
    config["dtype" if "torch_dtype" not in config else "torch_dtype"] = str(dtype)[6:]
    metadata: dict[str, object] = {"total_size": sum(t.nbytes for t in planned.values())}
    if "total_parameters" in base.index.get("metadata", {}):
        metadata["total_parameters"] = sum(math.prod(t.shape) for t in planned.values())
    weight_map = {name: tensor.shard for name, tensor in planned.items()}
    return {"config.json": config, INDEX: {"metadata": metadata, "weight_map": weight_map}}


def write(path: Path, contents: Mapping[str, object]) -> None:
    with path.open("xb") as file:
        file.write((json.dumps(contents, indent=2, sort_keys=True) + "\n").encode())
        _to_disk(file)


def carried(base: Path) -> Iterator[str]:
    """Files that go along: regular ones, or links to such, that are neither weights nor hidden."""
    for folder, folders, files in os.walk(base, onerror=_fail):  # which enters no linked folder
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted(files):
            weights = any(fnmatch.fnmatch(name.lower(), pattern) for pattern in _NOT_CARRIED)
            if not weights and (Path(folder) / name).is_file():
                yield (Path(folder) / name).relative_to(base).as_posix()


def _fail(error: OSError) -> None:
    raise error


def copy(source: Path, target: Path) -> None:
    """The contents of a file; a link, as in Hugging Face's cache, becomes a file of its own."""
    target.parent.mkdir(parents=True, exist_ok=True)
    with source.open("rb") as old, target.open("xb") as new:
        shutil.copyfileobj(old, new)
        _to_disk(new)


def _to_disk(file: BinaryIO) -> None:
    file.flush()
    os.fsync(file.fileno())


def check_target(base: Path, target: Path) -> None:
    if target == base or base in target.parents:
        raise AdapterError(
            f"out={target} is the base's folder or lies in it: expected a folder elsewhere"
        )
    if target.exists() and not target.is_dir():
        raise AdapterError(f"out={target} is a file: expected a new folder")
    if target.exists() and any(target.iterdir()):
        raise AdapterError(
            f"out={target} is a folder with files in it: expected a new or an empty one; nothing is "
            "overwritten, so remove it or choose another name"
        )
