"""Checkpoint: read-only access to a Hugging Face folder of safetensors, a slice at a time.

A folder holds `model.safetensors`, or shards and `model.safetensors.index.json`, whose weight_map
names the shard of every tensor; where it has both, the single file counts, as in transformers.
Opening reads and checks every header; a read takes the bytes asked for, so memory is bounded by the
largest slice. Shapes are those of the files, rows are along the first dimension.

It builds no model, dequantises nothing, downloads nothing, and expects a little-endian machine, as
the format is.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Mapping
from pathlib import Path, PureWindowsPath
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from .contents import AdapterError
from .files import parse_json, read_json

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"

_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "C64": torch.complex64,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


class Stored(NamedTuple):
    """Where a tensor lies: its shard, the format's name of its dtype, its shape, its bytes there."""

    shard: str
    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int

    @property
    def nbytes(self) -> int:
        return self.end - self.begin


class Checkpoint:
    """The tensors of a folder by name, read when asked for.

    Attributes:
        folder: the folder; config: its config.json, {} if it has none.
        shards: file name to the names of its tensors, in the order of their bytes.
        stored: name to where the tensor lies, in the order of the shards.
        sharded: whether the folder has an index.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        if not self.folder.is_dir():
            raise AdapterError(
                f"{self.folder}: expected the folder of a base model; for a name on the Hub, "
                "huggingface_hub.snapshot_download gives its folder"
            )
        self.config = self._read_config()
        self.sharded = not os.path.lexists(self.folder / SINGLE)
        weight_map = self._weight_map() if self.sharded else {}
        self.shards: dict[str, list[str]] = {}
        self.stored: dict[str, Stored] = {}
        for shard in sorted(set(weight_map.values())) if self.sharded else [SINGLE]:
            tensors = _read_header(self.folder / shard)
            for name in tensors.keys() & self.stored.keys():
                raise AdapterError(
                    f"{self.folder}: tensor {name!r} is in {self.stored[name].shard} and in {shard}; "
                    "expected one of them: save the base again"
                )
            self.shards[shard] = list(tensors)
            self.stored.update(tensors)
        for name, shard in weight_map.items():
            if name not in self.stored or self.stored[name].shard != shard:
                raise AdapterError(
                    f"{self.folder / INDEX}: tensor {name!r} should be in {shard}, which lacks it; "
                    "download or save the base again"
                )

    def _read_config(self) -> dict[str, Any]:
        path = self.folder / "config.json"
        config = read_json(path) if path.exists() else {}
        if config.get("quantization_config") is not None:
            raise AdapterError(
                f"{path}: quantization_config={config['quantization_config']!r}: expected weights "
                "that are not quantised; give the base model that this one was quantised from"
            )
        return config

    def _weight_map(self) -> dict[str, str]:
        path = self.folder / INDEX
        if not path.exists():
            raise AdapterError(f"{self.folder}: {_what_is_there(self.folder)}")
        weight_map = read_json(path).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise AdapterError(
                f"{path}: weight_map={weight_map!r}: expected names of tensors to names of files"
            )
        for name, shard in weight_map.items():
            # PureWindowsPath knows both separators and drives, on every system.
            if not isinstance(shard, str) or PureWindowsPath(shard).name != shard or "\0" in shard:
                raise AdapterError(
                    f"{path}: {name!r} is said to be in {shard!r}: expected the bare name of a "
                    "file in this folder; do not trust this checkpoint"
                )
            if not shard.endswith(".safetensors"):
                raise AdapterError(
                    f"{path}: {name!r} is said to be in {shard!r}: expected a *.safetensors file; "
                    "save the base again"
                )
        return weight_map

    @property
    def names(self) -> list[str]:
        """Names of all tensors, shard by shard, in the order of their bytes."""
        return list(self.stored)

    def __contains__(self, name: object) -> bool:
        return name in self.stored

    def shape(self, name: str) -> tuple[int, ...]:
        return self.stored[name].shape

    def dtype(self, name: str) -> torch.dtype:
        code = self.stored[name].dtype
        if code not in _DTYPES:
            raise AdapterError(
                f"tensor {name!r} of {self.folder} is stored as {code}, which torch has no "
                f"elements of: expected one of {', '.join(_DTYPES)}"
            )
        return _DTYPES[code]

    def read(self, name: str, start: int, stop: int) -> bytearray:
        """Bytes start to stop of the tensor `name`, counted from its own first."""
        stored = self.stored[name]
        if not 0 <= start <= stop <= stored.nbytes:
            raise IndexError(f"{name!r}: bytes {start} to {stop} of {stored.nbytes}")
        return self._read_many(name, [start], stop - start)

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        """Rows start to stop of `name`, a new tensor; of one without dimensions, all of it."""
        shape, dtype = self.shape(name), self.dtype(name)
        if not shape:
            return torch.frombuffer(self.read(name, 0, dtype.itemsize), dtype=dtype).reshape(())
        if not 0 <= start <= stop <= shape[0]:
            raise IndexError(f"{name!r}: rows {start} to {stop} of {shape[0]}")
        row = self.stored[name].nbytes // max(shape[0], 1)
        if start == stop or not row:  # frombuffer takes no empty buffer
            return torch.empty(stop - start, *shape[1:], dtype=dtype)
        data = self.read(name, start * row, stop * row)
        return torch.frombuffer(data, dtype=dtype).reshape(stop - start, *shape[1:])

    def take(self, name: str, flat_indices: list[int]) -> Tensor:
        """The elements of `name` at these indices into its bytes' order, one read for each."""
        dtype = self.dtype(name)
        size = dtype.itemsize
        elements = self.stored[name].nbytes // size
        for index in flat_indices:
            if not 0 <= index < elements:
                raise IndexError(f"{name!r}: element {index} of {elements}")
        if not flat_indices:
            return torch.empty(0, dtype=dtype)
        data = self._read_many(name, [index * size for index in flat_indices], size)
        return torch.frombuffer(data, dtype=dtype)

    def _read_many(self, name: str, starts: list[int], size: int) -> bytearray:
        """`size` bytes from each of `starts`, one after the other.

        Plain reads, for a mapping cannot do it: safe_open for torch maps the whole file private and
        writable, which Linux refuses for a shard larger than memory (40 GiB on a machine of 23:
        "unable to mmap ...: Cannot allocate memory"), and for numpy it knows no bf16. Nor do pages
        that were read count as the process's own.
        """
        stored = self.stored[name]
        path = self.folder / stored.shard
        data = bytearray(size * len(starts))
        with path.open("rb", buffering=0) as file:
            for number, start in enumerate(starts):
                file.seek(stored.begin + start)
                rest = memoryview(data)[number * size : (number + 1) * size]
                while rest:
                    count = file.readinto(rest)
                    if not count:
                        raise AdapterError(
                            f"{path} ends inside the tensor {name!r}: it was changed since it was "
                            "opened; try again with a folder at rest"
                        )
                    rest = rest[count:]
        return data


def _what_is_there(folder: Path) -> str:
    """Why a folder without the files that are expected is no base model."""
    expected = f"expected {SINGLE} or {INDEX}"
    pickled = sorted(path.name for path in folder.glob("pytorch_model*.bin"))
    others = sorted(path.name for path in folder.glob("*.safetensors"))
    if (folder / "adapter_config.json").exists():
        return f"it has adapter_config.json, so it is an adapter; {expected}: give its base model"
    if pickled:
        return (
            f"its weights are in {pickled[0]}; {expected}: load it with transformers and save it "
            "with save_pretrained(folder, safe_serialization=True)"
        )
    if others:
        return f"it has {others[0]} ({len(others)} such), but {expected}: save the base again"
    return f"{expected}, found no weights: give the folder that save_pretrained wrote"


def _read_header(path: Path) -> Mapping[str, Stored]:
    """Where the tensors of a file lie, in the order of their bytes.

    safetensors checks that the header is sound: every dtype known, sizes right, bytes without gaps
    or overlaps, up to the end of the file. It does not tell the offsets, so these are read here; for
    numpy it maps the file read-only, which takes no memory.
    """
    if not path.is_file():
        is_there = path.exists() or path.is_symlink()
        raise AdapterError(
            f"{path} {'is no regular file' if is_there else 'is missing'}: expected a safetensors "
            "file; download or save the base again"
        )
    try:
        with safe_open(path, "numpy"):
            pass
        with path.open("rb") as file:
            (size,) = struct.unpack("<Q", file.read(8))
            header = parse_json(file.read(size), f"the header of {path}")
    except (SafetensorError, struct.error) as error:
        raise AdapterError(
            f"{path} is damaged or no safetensors file ({error}); download or save the base again"
        ) from error
    header.pop("__metadata__", None)
    tensors = {
        name: Stored(
            path.name,
            entry["dtype"],
            tuple(entry["shape"]),
            *(8 + size + offset for offset in entry["data_offsets"]),
        )
        for name, entry in header.items()
    }
    return dict(sorted(tensors.items(), key=lambda item: (item[1].begin, item[1].end)))
