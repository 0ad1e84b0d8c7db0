"""A fingerprint of a frozen weight: enough to tell another base model, cheap to take.

A sample of 64 elements, evenly spread over the weight as (out, in), each rounded to bf16; what is
below 2⁻¹⁴ counts as zero. So a bf16 checkpoint has one fingerprint, whether it is loaded in bf16,
fp32, fp64 or fp16 (whose normal numbers begin at 2⁻¹⁴). An fp32 checkpoint may have another in fp16,
which rounds before bf16 does.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from ..sharded import is_sharded, values_at

_SAMPLE = 64
_SMALLEST = 2.0**-14


def positions(elements: int) -> list[int]:
    """Flat indices of the sample in a weight with so many elements."""
    n = min(_SAMPLE, elements)
    return [i * (elements - 1) // max(n - 1, 1) for i in range(n)]


def of_sample(values: Tensor, shape: tuple[int, ...]) -> str:
    """The fingerprint of a weight of this shape, from its elements at `positions`; fp16 is marked."""
    rounded = values.detach().cpu().to(torch.bfloat16).float()
    rounded[rounded.abs() < _SMALLEST] = 0.0
    rounded += 0.0  # minus zero becomes zero
    data = repr((tuple(shape), [float(v) for v in rounded.tolist()]))
    mark = ":fp16" if values.dtype == torch.float16 else ""
    return hashlib.sha256(data.encode()).hexdigest()[:16] + mark


def fingerprint(weight: Tensor, order: Tensor | None = None) -> str | None:
    """The fingerprint of `weight`, a matrix as (out, in); None if its values are not at hand.

    They are not for weights that are quantised, fake or on the meta device. Of a sharded weight every
    process must ask, and `order` is the row that each of its rows is in one process.
    """
    if is_sharded(weight) and not weight.is_meta and weight.ndim == 2:
        rows, columns = torch.unravel_index(torch.tensor(positions(weight.numel())), weight.shape)
        rows = rows if order is None else order.argsort()[rows]
        return of_sample(values_at(weight, (rows, columns)), tuple(weight.shape))
    plain = type(weight) in (nn.Parameter, Tensor) and weight.is_floating_point()
    if not plain or weight.is_meta:
        return None
    where = torch.tensor(positions(weight.numel()), device=weight.device)
    return of_sample(weight.detach()[torch.unravel_index(where, weight.shape)], tuple(weight.shape))


def compare(
    then: Mapping[str, str | None], now: Mapping[str, str | None], trained_on: str | None
) -> tuple[str, str | None]:
    """("matches", "differs" or "not checked: ..." with the reason; if they differ, the problem).

    then, now: fingerprints by name, those of the training and those of the base at hand.
    """
    known = {name: value for name, value in then.items() if value is not None}
    verdicts = {name: _agree(value, now[name]) for name, value in known.items()}
    differing = [name for name, verdict in verdicts.items() if verdict is False]
    if differing:
        said = f" (on {trained_on})" if trained_on else ""
        return "differs", (
            f"another base model: the frozen weights of {len(differing)} of {len(known)} layers are "
            f"not those of the training{said}, the first is {differing[0]}"
        )
    if not known:
        return "not checked: the adapter has no fingerprint of them", None
    if None in verdicts.values():
        return "not checked: quantised, on the meta device, or rounded by fp16", None
    return "matches", None


def _agree(one: str, other: str | None) -> bool | None:
    """Whether two fingerprints are of one weight; None where that cannot be told."""
    if other is None:
        return None
    if one.partition(":")[0] == other.partition(":")[0]:
        return True
    return None if one.endswith(":fp16") != other.endswith(":fp16") else False
