"""A fingerprint of a frozen weight: enough to tell another base model, cheap to take.

A sample of 64 elements, evenly spread over the weight as (out, in), each rounded to bf16; what is
below 2⁻¹⁴ counts as zero. So a bf16 checkpoint has one fingerprint, whether it is loaded in bf16,
fp32, fp64 or fp16 (whose normal numbers begin at 2⁻¹⁴). An fp32 checkpoint may have another in fp16,
which rounds before bf16 does.

Of a 4-bit weight the sample is of its codes, as levels of NF4, and the fingerprint is marked ":nf4".
A code depends on the 64 elements of its block alone, and is the same on every device, and made by
bitsandbytes. So the original weight tells it too: its blocks with sampled elements are quantised, as
they are, and rounded to bf16 and to fp16, as the model may have been. ":loftq" after that marks an
update that began as what quantising lost (`lora.variants`), which fits the 4-bit weight alone. A weight
that was sharded leaves nothing but the marks.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Collection, Mapping

import torch
from torch import Tensor, nn

from ..kernels import nf4
from ..kernels.nf4 import BLOCK, NF4
from ..quantized import is_quantized
from ..sharded import is_sharded, values_at

_SAMPLE = 64
_SMALLEST = 2.0**-14
_NF4, _LOFTQ = ":nf4", ":loftq"


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


def of_levels(levels: Tensor, shape: tuple[int, ...]) -> str:
    """The fingerprint of a 4-bit weight of this shape, from its levels at `positions`."""
    return of_sample(levels, shape) + _NF4


def sampled_blocks(elements: int) -> list[int]:
    """Where the blocks begin that have an element of the sample, ascending."""
    return sorted({i // BLOCK * BLOCK for i in positions(elements)})


def of_blocks(values: Tensor, shape: tuple[int, ...]) -> set[str]:
    """The fingerprints that a dense weight of this shape has once it is quantised.

    values: the elements of its `sampled_blocks`, one after the other. Several fingerprints, since it
    may have been rounded before.
    """
    elements = math.prod(shape)
    starts = sampled_blocks(elements)
    where = [starts.index(i // BLOCK * BLOCK) * BLOCK + i % BLOCK for i in positions(elements)]
    values = values.detach().cpu()
    found = set()
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        packed = nf4.quantize(values.to(dtype)).packed
        found.add(of_levels(_levels(packed, torch.tensor(where)), shape))
    return found


def _levels(packed: Tensor, where: Tensor) -> Tensor:
    ones = torch.ones(-(-2 * len(packed) // BLOCK), device=packed.device)
    levels: Tensor = nf4.at(NF4(packed, ones, None, None), where)
    return levels


def is_nf4(found: str | None) -> bool:
    """Whether it is a fingerprint of a 4-bit weight."""
    return found is not None and _NF4 in found


def is_loftq(found: str | None) -> bool:
    """Whether the update began as what quantising lost."""
    return found is not None and found.endswith(_LOFTQ)


def loftq_alone(name: str) -> str:
    """Why such an update fits no dense weight."""
    return (
        f"the update of {name} began as what quantising lost (LoftQ), and the weight here is dense: "
        "what was lost would be added to a weight that has it"
    )


def marked_loftq(found: str | None) -> str | None:
    return f"{found}{_LOFTQ}" if is_nf4(found) else found


def mark_alone(found: str | None) -> str | None:
    """What is still known where the weight is cut or joined: that the update is LoftQ's."""
    return _NF4 + _LOFTQ if is_loftq(found) else None


def fingerprint(weight: Tensor, order: Tensor | None = None) -> str | None:
    """The fingerprint of `weight`, a matrix as (out, in); None if its values are not at hand.

    They are not for weights that are fake or on the meta device, or quantised but not to NF4. Of a
    sharded weight every process must ask, and `order` is the row that each of its rows is in one
    process; of a sharded 4-bit weight there is the mark alone.
    """
    if is_quantized(weight):
        if is_sharded(weight) or weight.is_meta:
            return _NF4
        where = torch.tensor(positions(weight.numel()), device=weight.device)
        return of_levels(_levels(weight.packed, where), tuple(weight.shape))  # type: ignore[attr-defined]
    if is_sharded(weight) and not weight.is_meta and weight.ndim == 2:
        rows, columns = torch.unravel_index(torch.tensor(positions(weight.numel())), weight.shape)
        rows = rows if order is None else order.argsort()[rows]
        return of_sample(values_at(weight, (rows, columns)), tuple(weight.shape))
    if not _is_plain(weight):
        return None
    where = torch.tensor(positions(weight.numel()), device=weight.device)
    return of_sample(weight.detach()[torch.unravel_index(where, weight.shape)], tuple(weight.shape))


def _is_plain(weight: Tensor) -> bool:
    plain = type(weight) in (nn.Parameter, Tensor) and weight.is_floating_point()
    return plain and not weight.is_meta


def of_base(then: str, weight: Tensor, order: Tensor | None = None) -> Collection[str] | None:
    """The fingerprints of `weight` to be compared with `then`; None if its values are not there."""
    if is_nf4(then) and not is_quantized(weight):
        if not _is_plain(weight):
            return None
        flat = weight.detach().reshape(-1)
        blocks = [flat[start : start + BLOCK] for start in sampled_blocks(flat.numel())]
        return of_blocks(torch.cat(blocks), tuple(weight.shape))
    now = fingerprint(weight, order)
    return None if now is None else [now]


def compare(
    then: Mapping[str, str | None],
    now: Mapping[str, Collection[str] | None],
    trained_on: str | None,
) -> tuple[str, str | None]:
    """("matches", "differs" or "not checked: ..." with the reason; if they differ, the problem).

    then, now: by name the fingerprint of the training, and those that the base at hand may have had.
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


def _agree(then: str, now: Collection[str] | None) -> bool | None:
    """Whether a fingerprint is one of a base's; None where that cannot be told."""
    verdicts = {_same(then, one) for one in now} if now is not None else {None}
    return next((verdict for verdict in (True, None) if verdict in verdicts), False)


def _same(one: str, other: str) -> bool | None:
    """Whether two fingerprints are of one weight; None where that cannot be told."""
    value, other_value = (text.partition(":")[0] for text in (one, other))
    if is_nf4(one) != is_nf4(other) or not value or not other_value:
        return None
    if value == other_value:
        return True
    return None if one.endswith(":fp16") != other.endswith(":fp16") else False
