"""Whether an adapter fits the checkpoint of its base, on disk; AdapterError with the reason if not."""

from __future__ import annotations

import difflib
import math
from collections.abc import Collection, Iterable, Iterator, Sequence

import torch
from torch import Tensor

from ..kernels.nf4 import BLOCK
from . import fingerprint
from .checkpoint import Checkpoint
from .contents import DTYPES, Adapter, AdapterError, Layer

_ELEMENTS = 1 << 18  # of a block that is computed: 2 MiB in float64, a few of which exist at once
_EMBEDDINGS = ("embed_tokens", "wte", "word_embeddings", "embed_in")
_HEADS = ("lm_head", "embed_out")


def compare_base(base: Checkpoint, adapter: Adapter) -> str:
    """ "matches", or "not checked: ..." with the reason; AdapterError if it is another base.

    The names and shapes must fit already.
    """
    then = {name: layer.fingerprint for name, layer in adapter.layers.items()}
    now = {n: _of_stored(base, n, adapter.layers[n], known) for n, known in then.items() if known}
    verdict, problem = fingerprint.compare(then, now, adapter.base)
    if problem is not None:
        raise AdapterError(f"{base.folder} is {problem}")
    return verdict


def _of_stored(base: Checkpoint, name: str, layer: Layer, then: str) -> Collection[str]:
    """The fingerprints of a stored weight, as (out, in), that may be compared with `then`."""
    key = f"{name}.weight"
    shape = base.shape(key)
    elements = math.prod(shape)
    if base.is_quantized(key):
        levels = base.levels(key, fingerprint.positions(elements))
        return [fingerprint.of_levels(levels, shape)]
    if fingerprint.is_nf4(then):
        return fingerprint.of_blocks(_sampled(base, key), shape)
    where = fingerprint.positions(elements)
    if layer.transposed:
        shape = shape[::-1]
        where = [(i % shape[1]) * shape[0] + i // shape[1] for i in where]
    return [fingerprint.of_sample(base.take(key, where), shape)]


def _sampled(base: Checkpoint, name: str) -> Tensor:
    """The elements that tell the fingerprint of the weight once it is quantised."""
    elements = math.prod(base.shape(name))
    starts = fingerprint.sampled_blocks(elements)
    whole = [start for start in starts if start + BLOCK <= elements]
    last = starts[len(whole) :]  # a shorter one, at the end
    values = base.take(name, whole, BLOCK)
    return torch.cat([values, base.take(name, last, elements % BLOCK)]) if last else values


def _tail(name: str) -> str:
    """Last part of the name of the module whose weight `name` is, else an empty string."""
    module, _, own = name.rpartition(".")
    return module.rpartition(".")[2] if own == "weight" else ""


def is_tied(base: Checkpoint) -> bool:
    """Whether the head is the input embedding: as config.json says, or else as it looks.

    config.json leaves it out where it is the default of the model's class, as for GPT-2 and Gemma.
    """
    kinds = base.config.get("architectures") or ["ForCausalLM"]
    if not any(str(kind).endswith(("LM", "LMHeadModel", "Generation")) for kind in kinds):
        return False  # a classifier, which has no such head
    configs = [c for c in (base.config, base.config.get("text_config")) if isinstance(c, dict)]
    said = [c["tie_word_embeddings"] for c in configs if "tie_word_embeddings" in c]
    if said:
        return any(said)
    tails = {_tail(name) for name in base.stored}
    return not (tails & set(_EMBEDDINGS) and tails & set(_HEADS))


def check_ties(base: Checkpoint, trained: Iterable[str]) -> None:
    touched = [name for name in trained if _tail(name) in _EMBEDDINGS + _HEADS]
    if touched and is_tied(base):
        raise AdapterError(
            f"{touched[0]!r} was trained, and {base.folder} ties its input embedding and its head: "
            "config.json sets tie_word_embeddings, or leaves it to the class and one is not stored. "
            "Merging would change the other too, or untie them. Untie the base first (load it, "
            "set tie_word_embeddings=False in its config, give lm_head.weight a copy, save it), or "
            'train without; a base without a head needs "tie_word_embeddings": false in config.json'
        )


def stored_name(base: Checkpoint, name: str) -> str:
    """`name`, or that of the embedding for a head that the base does not store since it is tied."""
    if name not in base and _tail(name) in _HEADS and is_tied(base):
        embeddings = [stored for stored in base.stored if _tail(stored) in _EMBEDDINGS]
        if len(embeddings) == 1:
            return embeddings[0]
    return name


def weight_shape(layer: Layer) -> tuple[int, ...]:
    """Shape of the weight as it is stored; a convolution's kernel has size 1."""
    shape = layer.shape[::-1] if layer.transposed else layer.shape
    kernel = int(layer.kind[4]) if layer.kind.startswith("Conv") else 0
    return *shape, *[1] * kernel


def check_shapes(base: Checkpoint, shapes: Sequence[tuple[str, tuple[int, ...]]]) -> None:
    """Every name is in the base, with its shape; else the first of those that are not."""
    missing = [name for name, _ in shapes if name not in base]
    if missing:
        nearest = difflib.get_close_matches(missing[0], base.names, 1, 0.0)
        tied = " (tied tensors are stored under one name alone)" if is_tied(base) else ""
        raise AdapterError(
            f"{len(missing)} of the adapter's {len(shapes)} tensors are not in {base.folder}: "
            f"{', '.join(map(repr, missing[:3]))}{', ...' if len(missing) > 3 else ''}; expected "
            f"names such as {nearest[0] if nearest else None!r}{tied}: give the base that it was "
            "trained on"
        )
    wrong = [(name, shape) for name, shape in shapes if base.shape(name) != shape]
    if wrong:
        name, wants = wrong[0]
        has = base.shape(name)
        fix = "give the base that it was trained on"
        if has[1:] == wants[1:]:
            fix += (
                f", or if its vocabulary was resized, resize the base first "
                f"(model.resize_token_embeddings({wants[0]})) and save it"
            )
        raise AdapterError(
            f"{len(wrong)} of the adapter's {len(shapes)} tensors have other shapes in "
            f"{base.folder}: {name!r} is {has} there, expected {wants}; {fix}"
        )


def check_dtype(base: Checkpoint, name: str, trained: torch.dtype) -> None:
    dtype = base.dtype(name)
    if dtype != trained and not (dtype in DTYPES and trained in DTYPES):
        raise AdapterError(
            f"{name!r} of {base.folder} is stored as {dtype}: expected one of "
            f"{', '.join(map(str, DTYPES))} for what was trained in {trained}; give a base that is "
            "not quantised"
        )


def check_copy(base: Checkpoint, name: str, copy: Tensor) -> None:
    """A copy was taken of the base as it was loaded: exact if widened, rounded if narrowed."""
    for rows in row_blocks(tuple(copy.shape)):
        block = copy[rows] if copy.ndim else copy
        if not torch.equal(base.rows(name, rows.start, rows.stop).to(copy.dtype), block.cpu()):
            raise AdapterError(
                f"the adapter's file repeats {name!r}, with other values than {base.folder}: "
                "expected the base that it was trained on; if it was trained, name its module in "
                "modules_to_save"
            )


def row_blocks(shape: tuple[int, ...]) -> Iterator[slice]:
    """Slices of the first dimension with about _ELEMENTS elements; one for a tensor without."""
    rows = shape[0] if shape else 1
    step = max(_ELEMENTS // max(math.prod(shape[1:]), 1), 1)
    for start in range(0, rows, step):
        yield slice(start, min(start + step, rows))
