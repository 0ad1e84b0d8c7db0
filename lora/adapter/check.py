"""An adapter against the checkpoint of its base, on disk: is it the right one, and does it work?"""

from __future__ import annotations

import math

from . import fingerprint
from .checkpoint import Checkpoint
from .contents import Adapter, AdapterError, Layer


def compare_base(base: Checkpoint, adapter: Adapter) -> str:
    """ "matches", or "not checked: ..." with the reason; AdapterError if it is another base.

    The names and shapes must fit already.
    """
    verdicts = {
        name: fingerprint.agree(layer.fingerprint, _of_stored(base, name, layer))
        for name, layer in adapter.layers.items()
        if layer.fingerprint is not None
    }
    differing = [name for name, verdict in verdicts.items() if verdict is False]
    if differing:
        trained_on = f" (it was trained on {adapter.base})" if adapter.base else ""
        raise AdapterError(
            f"{base.folder} is another base model: the weights of {len(differing)} of "
            f"{len(verdicts)} layers are not those of the training{trained_on}, the first is "
            f"{differing[0]}"
        )
    if not verdicts:
        return "not checked: the adapter has no fingerprint of them"
    return "not checked: fp16 rounds them otherwise" if None in verdicts.values() else "matches"


def _of_stored(base: Checkpoint, name: str, layer: Layer) -> str:
    """The fingerprint of a stored weight, as (out, in)."""
    shape = base.shape(f"{name}.weight")
    where = fingerprint.positions(math.prod(shape))
    if layer.transposed:
        shape = shape[::-1]
        where = [(i % shape[1]) * shape[0] + i // shape[1] for i in where]
    return fingerprint.of_sample(base.take(f"{name}.weight", where), shape)
