"""The maths of the low-rank update on plain tensors; installed as `lora.kernels`."""

from .dispatch import lora_linear

__all__ = ["lora_linear"]
