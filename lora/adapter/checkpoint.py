"""Checkpoint: read-only access to a Hugging Face folder of safetensors, a slice at a time.

A folder holds `model.safetensors`, or shards and `model.safetensors.index.json`, whose weight_map
names the shard of every tensor; where it has both, the single file counts, as in transformers.
Opening reads and checks every header; a read takes the bytes asked for, so memory is bounded by the
largest slice. Shapes are those of the files, rows are along the first dimension.

A weight that bitsandbytes quantised to NF4 counts as one tensor, of the dense weight's name, shape and
dtype; its parts (see ..quantized) are none of the names. What reads elements refuses it, so that codes
are never taken for elements: `nf4` reads it whole, `levels` some of its codes.

It builds no model, downloads nothing, needs no bitsandbytes, and expects a little-endian machine, as
the format is. Weights that are quantised otherwise are refused.
"""

from __future__ import annotations

import math
import os
import struct
from collections.abc import Callable, Mapping
from pathlib import Path, PureWindowsPath
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..kernels import nf4
from ..kernels.nf4_tensor import NF4Tensor
from ..quantized import STATE, from_entries
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
_CODES = {dtype: code for code, dtype in _DTYPES.items()}
# What config.json says of the one kind of quantised weights that is read.
_NF4 = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}


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

    @property
    def itemsize(self) -> int:
        return self.nbytes // max(math.prod(self.shape), 1)

    @property
    def torch_dtype(self) -> torch.dtype:
        return _DTYPES[self.dtype]

    @classmethod
    def planned(cls, shard: str, dtype: torch.dtype, shape: tuple[int, ...]) -> Stored:
        """Of a tensor that is yet to be written: as if it were the first."""
        return cls(shard, _CODES[dtype], shape, 0, math.prod(shape) * dtype.itemsize)


class Checkpoint:
    """The tensors of a folder by name, read when asked for.

    Attributes:
        folder: the folder; config: its config.json, {} if it has none.
        shards: file name to the names of its tensors, in the order of their bytes.
        stored: name to where the tensor lies, in the order of the shards; of a 4-bit weight, where its
            codes lie, and where each of its other parts does, by a name of its own.
        quantized: the name of every 4-bit weight, and that weight on the meta device.
        sharded: whether the folder has an index; index: what is in it, {} without.

    Raises AdapterError for a folder that is no such checkpoint, or is damaged.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        if not self.folder.is_dir():
            raise AdapterError(
                f"{self.folder}: expected the folder of a base model; for a name on the Hub, "
                "huggingface_hub.snapshot_download gives its folder"
            )
        self.config = self._read_config()
        self.index: dict[str, Any] = {}
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
        self._parts = self._parts_of_weights()
        self.quantized = {name: self._joined(name, self._on_meta) for name in self._parts}

    def _read_config(self) -> dict[str, Any]:
        path = self.folder / "config.json"
        config = read_json(path) if path.exists() else {}
        found = config.get("quantization_config")
        stated = found if isinstance(found, dict) else {}
        unlike = {key: stated.get(key) for key, said in _NF4.items() if stated.get(key) != said}
        if found is not None and unlike:
            expected, got = (
                ", ".join(f"{key}={value!r}" for key, value in values.items())
                for values in (_NF4, unlike)
            )
            raise AdapterError(
                f"{path}: quantised with {got if 'quant_method' in stated else repr(found)}: expected "
                f"weights that are not quantised, or those of bitsandbytes with {expected}; give the "
                "base model that this one was quantised from"
            )
        return config

    def _parts_of_weights(self) -> dict[str, dict[str, str]]:
        """Of every 4-bit weight, the stored names of its parts by their own ("" are the codes)."""
        mark = f".{STATE}"
        found = {n.partition(mark)[0]: dict[str, str]() for n in self.stored if mark in n}
        for name in self.stored:
            weight = name.partition(mark)[0] if mark in name else name.rpartition(".")[0]
            if name in found:
                found[name][""] = name
            elif weight in found:
                found[weight][name[len(weight) + 1 :]] = name
        return found

    def _joined(self, weight: str, read: Callable[[str], Tensor]) -> NF4Tensor:
        try:
            parts = {own: read(key) for own, key in self._parts[weight].items()}
            return from_entries({"": None, **parts})
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            what = f"{error} is missing" if isinstance(error, KeyError) else str(error)
            raise AdapterError(f"the 4-bit weight {weight!r} of {self.folder}: {what}") from error

    def _on_meta(self, key: str) -> Tensor:
        """A part by the header alone, but for what the weight says of itself."""
        if STATE in key:
            return self._read(key, 0, self.stored[key].shape[0])
        return torch.empty(self.stored[key].shape, dtype=self._stored_dtype(key), device="meta")

    def _weight_map(self) -> dict[str, str]:
        path = self.folder / INDEX
        if not path.exists():
            raise AdapterError(f"{self.folder}: {_what_is_there(self.folder)}")
        self.index = read_json(path)
        weight_map = self.index.get("weight_map")
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
        return [name for name in self.stored if name in self]

    def __contains__(self, name: object) -> bool:
        return name in self.stored and not self._is_part(str(name))

    def _is_part(self, name: str) -> bool:
        """Whether it is a part of a 4-bit weight beside the codes."""
        weight = name.partition(f".{STATE}")[0] if STATE in name else name.rpartition(".")[0]
        return weight in self._parts

    def is_quantized(self, name: str) -> bool:
        """Whether it is a 4-bit weight."""
        return name in self.quantized

    def shape(self, name: str) -> tuple[int, ...]:
        if name in self.quantized:
            return tuple(self.quantized[name].shape)
        return self.stored[name].shape

    def dtype(self, name: str) -> torch.dtype:
        if name in self.quantized:
            dtype: torch.dtype = self.quantized[name].dtype
            return dtype
        return self._stored_dtype(name)

    def _stored_dtype(self, name: str) -> torch.dtype:
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
        self._refuse_quantized(name)
        return self._read(name, start, stop)

    def _read(self, name: str, start: int, stop: int) -> Tensor:
        shape, dtype = self.stored[name].shape, self._stored_dtype(name)
        if not shape:
            return torch.frombuffer(self.read(name, 0, dtype.itemsize), dtype=dtype).reshape(())
        if not 0 <= start <= stop <= shape[0]:
            raise IndexError(f"{name!r}: rows {start} to {stop} of {shape[0]}")
        row = self.stored[name].nbytes // max(shape[0], 1)
        if start == stop or not row:  # frombuffer takes no empty buffer
            return torch.empty(stop - start, *shape[1:], dtype=dtype)
        data = self.read(name, start * row, stop * row)
        return torch.frombuffer(data, dtype=dtype).reshape(stop - start, *shape[1:])

    def take(self, name: str, flat_indices: list[int], count: int = 1) -> Tensor:
        """`count` elements of `name` from each of these indices into the order of its bytes."""
        self._refuse_quantized(name)
        dtype = self.dtype(name)
        size = dtype.itemsize
        elements = self.stored[name].nbytes // size
        for index in flat_indices:
            if not 0 <= index <= elements - count:
                raise IndexError(f"{name!r}: element {index} of {elements}")
        if not flat_indices:
            return torch.empty(0, dtype=dtype)
        data = self._read_many(name, [index * size for index in flat_indices], count * size)
        return torch.frombuffer(data, dtype=dtype)

    def nf4(self, name: str) -> NF4Tensor:
        """The 4-bit weight `name`."""
        return self._joined(name, lambda key: self._read(key, 0, (*self.stored[key].shape, 1)[0]))

    def levels(self, name: str, flat_indices: list[int]) -> Tensor:
        """Of the elements of a 4-bit weight at these indices the levels, fp32: without their scales."""
        data = self._read_many(name, [index // 2 for index in flat_indices], 1)
        codes = [b >> 4 if i % 2 == 0 else b & 15 for i, b in zip(flat_indices, data, strict=True)]
        return torch.tensor([nf4.LEVELS[code] for code in codes], dtype=torch.float32)

    def _refuse_quantized(self, name: str) -> None:
        if name in self.quantized:
            raise AdapterError(
                f"{name!r} of {self.folder} is a 4-bit weight: expected one that is not quantised"
            )

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
    from safetensors import SafetensorError, safe_open

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
