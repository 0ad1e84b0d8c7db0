"""Context managers over all LoRA layers of a model: without the update, or with it merged."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from ._base import lora_layers
from .full import full_modules, use_original, use_own


@contextmanager
def disabled(model: nn.Module) -> Iterator[nn.Module]:
    """Within the block the LoRA layers compute what the plain layers would, to the bit.

    So do calls of modules that train in full (`modules_to_save`), with the frozen tensors.
    Nothing is copied or written. Biases that were trained stay trained.

    >>> model, x = Linear(4, 4, r=2), torch.randn(1, 4)
    >>> with disabled(model):
    ...     torch.equal(model(x), torch.nn.functional.linear(x, model.weight, model.bias))
    True
    """
    before = [(layer, layer.disabled) for _, layer in lora_layers(model)]
    full = [module for _, module in full_modules(model) if "forward" not in module.__dict__]
    try:
        for layer, _ in before:
            layer.disabled = True
        for module in full:
            use_original(module)
        yield model
    finally:
        for layer, was_disabled in before:
            layer.disabled = was_disabled
        for module in full:
            use_own(module)


@contextmanager
def merged(model: nn.Module) -> Iterator[nn.Module]:
    """Within the block the LoRA layers are in eval mode and merged, whatever `merge_weights` says.

    It costs a second copy of every adapted weight, freed at the end, when mode and `merge_weights`
    are as they were. A forward that trains still takes the unmerged path (see `LoRALayer`).

    >>> model = Linear(4, 4, r=2, merge_weights=False)
    >>> with merged(model), torch.inference_mode():
    ...     model(torch.randn(1, 4)).shape, model.merged
    (torch.Size([1, 4]), True)
    """
    before = [
        (layer, layer.merge_weights, layer.training, layer.lora_dropout.training)
        for _, layer in lora_layers(model)
    ]
    try:
        for layer, *_ in before:
            layer.merge_weights = True
            layer.eval()
        yield model
    finally:
        present = {layer for _, layer in lora_layers(model)}
        for layer, merge_weights, training, dropping in before:
            layer.merge_weights = merge_weights and layer in present  # else it would merge, unused
            layer.train(training)
            layer.merge_weights = merge_weights
            layer.lora_dropout.train(dropping)
