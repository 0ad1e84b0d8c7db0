"""Adapters on disk: one safetensors file that PEFT reads, exact, checked, and never half-written."""

from .contents import Adapter, AdapterError, Layer
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
    "load_adapter",
    "read_adapter",
    "save_adapter",
    "write_adapter",
]
