"""The maths of the low-rank update on plain tensors; installed as `lora.kernels`."""

from .dispatch import explain, lora_linear

__all__ = ["explain", "lora_linear"]
