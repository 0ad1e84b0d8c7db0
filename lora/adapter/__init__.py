"""Adapters on disk: one safetensors file that PEFT reads, exact, checked, and never half-written.

    save, load          from and to a model, over  plan, fit (what would be done, does it fit?)
    storage             a folder's two files and the digest, over  peft_format, files
    selection           which modules a PEFT config selects
    contents            Adapter and Layer, what every file is read into; describe
    convert             split, fuse, portable, to_loralib, from_loralib
    merge               merge_checkpoint and rehearse, over  checkpoint, check
    fingerprint         is it the base of the training?

>>> from lora.adapter import read_adapter, write_adapter, split  # doctest: +SKIP
>>> write_adapter(split(read_adapter("adapter").checked()), "separate")  # doctest: +SKIP
"""

from .contents import Adapter, AdapterError, Layer
from .convert import from_loralib, fuse, portable, split, to_loralib
from .load import Report, load_adapter
from .save import adapter_of, save_adapter
from .storage import File, read_adapter, write_adapter

__all__ = [
    "Adapter",
    "AdapterError",
    "File",
    "Layer",
    "Report",
    "adapter_of",
    "from_loralib",
    "fuse",
    "load_adapter",
    "portable",
    "read_adapter",
    "save_adapter",
    "split",
    "to_loralib",
    "write_adapter",
]
