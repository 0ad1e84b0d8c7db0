"""parameter_groups: what trains, in groups for an optimizer: plain LoRA, or LoRA+ with lr_ratio > 1."""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor, nn

from ._base import lora_layers
from .embedding import Embedding

_ROLES = {"lora_A": "rest", "lora_B": "B"}


def parameter_groups(
    model: nn.Module,
    lr: float,
    lr_ratio: float = 1.0,
    *,
    weight_decay: float = 0.0,
    embedding_lr: float | None = None,
) -> list[dict[str, Any]]:
    """Parameter groups of what trains in `model`, to construct any optimizer of torch.optim with.

    By default everything learns at `lr`, as in LoRA. With lr_ratio above 1 it is LoRA+ (arXiv
    2402.12354, sections 4 and 5.3): B learns at lr_ratio · lr, A at lr. As in its authors' code,
    trained vectors (biases, norms' weights, DoRA's magnitudes) go with B, here without weight decay;
    matrices that train in full go with A; embeddings' factors have a rate of their own.

    Args:
        lr: learning rate of A, a positive number.
        lr_ratio: of B's rate to A's, positive; 1 is plain LoRA. For LoRA+ the paper advises about
            16, with a smaller lr than LoRA's where the task is hard.
        weight_decay: of all but vectors.
        embedding_lr: of embeddings' factors; None is lr (the authors' code takes 1e-6).

    Returns:
        groups with the keys "params", "lr" and "weight_decay"; empty ones are left out.

    Raises ValueError for a number out of range, and for a model of which nothing trains.

    >>> groups = parameter_groups(Linear(4, 4, r=2), lr=1e-4, lr_ratio=16)
    >>> optimizer = torch.optim.AdamW(groups)
    """
    rates = {
        "lr": lr,
        "lr_ratio": lr_ratio,
        "embedding_lr": lr if embedding_lr is None else embedding_lr,
    }
    for name, value in rates.items():
        if (
            isinstance(value, bool)
            or not isinstance(value, (int, float))
            or not 0 < value < math.inf
        ):
            raise ValueError(f"{name}={value!r}: expected a positive number")
    if not isinstance(weight_decay, (int, float)) or not 0 <= weight_decay < math.inf:
        raise ValueError(f"weight_decay={weight_decay!r}: expected a number, 0 or more")
    rate_of = {
        "rest": lr,
        "embedding": rates["embedding_lr"],
        "B": lr * lr_ratio,
        "vector": lr * lr_ratio,
    }
    role = {
        id(parameter): "embedding" if isinstance(layer, Embedding) else _ROLES.get(own, "vector")
        for _, layer in lora_layers(model)
        for own, parameter in layer.update_parameters().items()
    }
    groups: dict[str, list[Tensor]] = {name: [] for name in rate_of}
    for parameter in model.parameters():
        if parameter.requires_grad:
            name = "vector" if parameter.ndim <= 1 else "rest"
            groups[role.get(id(parameter), name)].append(parameter)
    if not any(groups.values()):
        raise ValueError(
            f"nothing of this {type(model).__name__} trains: expected a model with LoRA layers; call "
            "lora.patch or lora.mark_only_lora_as_trainable first"
        )
    return [
        {
            "params": parameters,
            "lr": rate_of[name],
            "weight_decay": 0.0 if name == "vector" else weight_decay,
        }
        for name, parameters in groups.items()
        if parameters
    ]
