"""The maths of the low-rank update on plain tensors; installed as `lora.kernels`.

By another name it is empty. Where Python starts in a checkout, `import kernels` finds this folder, and
transformers does that, to ask for a version. A second copy would register the same operators again,
upon which PyTorch frees the schemas of the first ones, and their calls fail at random.
"""

if __name__ == "lora.kernels":
    from .dispatch import explain, lora_linear

    __all__ = ["explain", "lora_linear"]
