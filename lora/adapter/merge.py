"""merge_checkpoint: a plain checkpoint with an adapter merged in, for a base larger than memory.

    merged = round(weight + scaling · update(lora_A, lora_B))
    with DoRA  round(magnitude / ‖weight + ...‖ ∘ (weight + ...)), norms of the rows of (out, in)
    bias       round(bias + scaling · lora_bias), where the update has one

in float64, rounded once to the dtype of the base's tensor, a block of rows at a time. weight is
(out, in), or (in, out) if the layer is transposed; (num, dim) of an embedding; (out, in, 1, ...) of a
convolution. Biases and modules that were trained in full take the place of the base's; every other
tensor keeps its bytes. Shards, their order and the index stay as they are, and so do configuration,
tokenizer and other files that are no weights.

With `dequantize`, a dtype, every 4-bit weight of the base becomes a dense one of it, merged or not:

    merged = round(dequantised weight + scaling · update)

and so does a dense weight whose update was trained on four bits: it is quantised, then dequantised.
Such weights are in memory whole, one at a time; config.json and the index say what was done.

It builds no model. What it writes appears whole or not at all.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor

from ..kernels.nf4_tensor import DTYPES as QUANTIZABLE
from ..kernels.nf4_tensor import NF4Tensor
from .check import (
    check_copy,
    check_dtype,
    check_shapes,
    check_ties,
    compare_base,
    row_blocks,
    stored_name,
    weight_shape,
)
from .checkpoint import INDEX, Checkpoint, Stored
from .contents import DTYPES, Adapter, AdapterError, Layer
from .files import new_folder
from .fingerprint import is_loftq, is_nf4, loftq_alone
from .merge_report import LayerError, MergeReport
from .merged_folder import carried, check_target, copy, rewritten, write, write_shard

Progress = Callable[[int, int], None]  # gets how many are done, and how many there are

_CHUNK = 16 << 20  # bytes of a block that is copied


def merge_checkpoint(
    base: str | Path,
    adapter: Adapter,
    out: str | Path,
    *,
    dequantize: torch.dtype | None = None,
    progress: Progress | None = None,
) -> MergeReport:
    """Write to the new folder `out` the checkpoint in the folder `base` with `adapter` merged in.

    An adapter that was trained on 4-bit weights is merged into the original base, the recipe's way,
    and the report says how far that is from the weights of the training. Or into those weights, with
    `dequantize`.

    Args:
        dequantize: the dtype of the weights that were of 4 bits, for a base that has such; all other
            tensors keep theirs. With a dense base, those weights that the adapter was trained on in 4
            bits are quantised first, as in training, and other linear layers stay as they are, since
            nothing says whether they were quantised: right for a LoftQ adapter, which holds what
            quantising lost and is refused without.
        progress: called after every tensor with how many are done, and how many there are.

    Raises AdapterError, before anything is written, if the two do not fit, if the base is not the one
    of the training, if it has 4-bit weights and `dequantize` is None, or if `out` is taken; later, if a
    merged value is not finite. OSError if the disk is full. `out` is then as it was.
    """
    source, target = Checkpoint(base), Path(out).resolve()
    check_target(source.folder.resolve(), target)
    merge = _Merge(source, adapter, dequantize)
    names = count_up(len(merge.planned), progress)

    def tensor_bytes(name: str) -> Iterator[memoryview]:
        yield from merge.blocks(name)
        next(names)

    try:
        with new_folder(target) as folder:
            for shard, own in source.shards.items():
                planned = {
                    n: stored for n, stored in merge.planned.items() if stored.shard == shard
                }
                if planned or not own:  # else it had nothing but parts of 4-bit weights
                    write_shard(folder / shard, planned, tensor_bytes)
            copied = tuple(carried(source.folder))
            written = {} if dequantize is None else rewritten(source, merge.planned, dequantize)
            for path in (*copied, *([INDEX] if source.sharded else [])):
                if path in written:
                    write(folder / path, written[path])
                else:
                    copy(source.folder / path, folder / path)
    except OSError as error:
        reason = error.strerror or str(error)
        where = f" ({error.filename})" if error.filename else ""
        raise type(error)(
            error.errno,
            f"cannot write the merged checkpoint {target}: {reason}{where}; nothing was left of it",
        ) from error
    return merge.report(copied)


def rehearse(
    base: Checkpoint, adapter: Adapter, *, progress: Progress | None = None
) -> MergeReport:
    """All that `merge_checkpoint` does, but for writing: every check, and every layer's rounding.

    A base with 4-bit weights is dequantised, to the dtype that it has said of the first of them. The
    report counts no files. Raises AdapterError where `merge_checkpoint` would.
    """
    dequantize = next((weight.dtype for weight in base.quantized.values()), None)
    merge = _Merge(base, adapter, dequantize)
    names = [*merge.weights, *merge.replaced]
    steps = count_up(len(names), progress)
    for name in names:
        for _ in merge.blocks(name):
            pass
        next(steps)
    return merge.report(())


def count_up(total: int, progress: Progress | None) -> Iterator[None]:
    """Tell `progress` of one more, at every `next`."""
    for done in range(1, total + 1):
        if progress is not None:
            progress(done, total)
        yield


# What is written


class _Merge:
    """The tensors of the merged checkpoint, as blocks of bytes; made only if the adapter fits."""

    def __init__(self, base: Checkpoint, adapter: Adapter, dequantize: torch.dtype | None) -> None:
        self.base = base
        self.weights = {f"{name}.weight": name for name in adapter.layers}
        self.layers = adapter.layers
        self.replaced = {**adapter.biases, **adapter.saved} | _merged_biases(base, adapter)
        self.errors: dict[str, LayerError] = {}
        for name in self.weights.keys() & self.replaced.keys():
            raise AdapterError(
                f"{name!r} has a low-rank update and was trained in full too: expected one of "
                "them; take it from modules_to_save or from the layers"
            )
        self.on_nf4 = {key for key, n in self.weights.items() if is_nf4(self.layers[n].fingerprint)}
        self._check_dequantize(dequantize)
        check_ties(base, [*self.weights, *self.replaced])
        copies = [(stored_name(base, name), copy) for name, copy in adapter.copies.items()]
        shapes = [(name, weight_shape(self.layers[of])) for name, of in self.weights.items()]
        shapes += [(name, tuple(t.shape)) for name, t in [*self.replaced.items(), *copies]]
        check_shapes(base, shapes)
        for name in self.weights:
            check_dtype(base, name, torch.float32)
        for name, tensor in self.replaced.items():
            check_dtype(base, name, tensor.dtype)
        for name, values in copies:
            check_copy(base, name, values)
        self.verdict = compare_base(base, adapter)
        dense = {*base.quantized, *(self.on_nf4 if dequantize is not None else ())}
        self.requantized = dense - base.quantized.keys()
        self.planned = {name: base.stored[name] for name in base.names}
        if dequantize is not None:
            for name in dense:
                shard, shape = base.stored[name].shard, base.shape(name)
                self.planned[name] = Stored.planned(shard, dequantize, shape)
            largest_first = sorted(self.planned.items(), key=lambda item: -item[1].itemsize)
            self.planned = dict(largest_first)  # so that every tensor is aligned

    def _check_dequantize(self, dtype: torch.dtype | None) -> None:
        first = next(iter(self.base.quantized), None)
        if dtype is not None and dtype not in DTYPES:
            raise AdapterError(
                f"dequantize={dtype}: expected one of {', '.join(map(str, DTYPES))}, or None"
            )
        if first is not None and dtype is None:
            raise AdapterError(
                f"{self.base.folder} has {len(self.base.quantized)} weights of 4 bits, the first is "
                f"{first!r}: an update would be lost in them; pass dequantize=torch.bfloat16 (lora "
                "merge --dequantize bfloat16) for a dense checkpoint, or give the original base, "
                "which this one was quantised from"
            )
        if first is None and dtype is not None and not self.on_nf4:
            raise AdapterError(
                f"dequantize={dtype}: {self.base.folder} has no weights of 4 bits, and the adapter was "
                "not trained on such: leave it out"
            )
        for key, name in self.weights.items():
            dense = not self.base.is_quantized(key) and dtype is None
            if dense and is_loftq(self.layers[name].fingerprint):
                raise AdapterError(
                    f"{loftq_alone(name)}; pass dequantize=torch.bfloat16 (lora merge --dequantize "
                    "bfloat16), which quantises the weights as in training and merges into those"
                )

    def report(self, copied: tuple[str, ...]) -> MergeReport:
        return MergeReport(
            {name: self.errors[name] for name in self.layers},
            len(self.planned),
            sum(tensor.nbytes for tensor in self.planned.values()),
            copied,
            self.verdict,
        )

    def blocks(self, name: str) -> Iterator[memoryview]:
        """The bytes of the tensor `name`."""
        if name in self.weights:
            yield from self._merged(name)
        elif name in self.replaced:
            dtype, value = self.planned[name].torch_dtype, self.replaced[name].detach()
            for rows in row_blocks(tuple(value.shape)):
                given = value[rows].cpu() if value.ndim else value.cpu()
                block = given if given.dtype == dtype else _rounded(given.double(), dtype)
                _check_finite(name, block, given)
                yield _bytes(block)
        elif self.base.is_quantized(name):
            frozen, dtype = self.base.nf4(name).dequantize(), self.planned[name].torch_dtype
            for rows in row_blocks(tuple(frozen.shape)):
                block = frozen[rows].to(dtype)
                _check_finite(name, block, frozen[rows])
                yield _bytes(block)
        else:
            nbytes = self.base.stored[name].nbytes
            for start in range(0, nbytes, _CHUNK):
                yield memoryview(self.base.read(name, start, min(start + _CHUNK, nbytes)))

    def _merged(self, name: str) -> Iterator[memoryview]:
        layer = self.layers[self.weights[name]]
        left, right = _factors(layer)
        shape, dtype = self.base.shape(name), self.planned[name].torch_dtype
        weight_rows, distance = self._frozen(name)
        row_scale = self._row_scale(name, layer, left, right, weight_rows)
        update_square = error_square = largest = 0.0
        changed = 0
        for rows in row_blocks(shape):
            weight = weight_rows(rows)
            update = (left[rows] @ right).mul_(layer.scaling).reshape(weight.shape)
            exact = update + weight
            if row_scale is not None:
                exact *= row_scale if layer.transposed else row_scale[rows, None]
                update = exact - weight
            merged = _rounded(exact, dtype)
            _check_finite(name, merged, exact)
            update_square += float(update.square_().sum())
            changed += int((merged != weight).sum())
            error = exact - merged  # not in place: in float64 they are one tensor
            largest = max(largest, float(error.abs().max()))
            error_square += float(error.square_().sum())
            yield _bytes(merged)
        self.errors[self.weights[name]] = LayerError(
            math.sqrt(update_square),
            math.sqrt(error_square),
            largest,
            changed / max(math.prod(shape), 1),
            distance,
        )

    def _frozen(self, name: str) -> tuple[Callable[[slice], Tensor], float]:
        """Rows of the weight that is merged into, and its distance from that of the training."""
        if self.base.is_quantized(name):
            dequantized = self.base.nf4(name).dequantize()
            return dequantized.__getitem__, 0.0
        if name not in self.on_nf4:
            return lambda rows: self.base.rows(name, rows.start, rows.stop), 0.0
        original = self.base.rows(name, 0, self.base.shape(name)[0])
        narrow = original if original.dtype in QUANTIZABLE else original.float()
        try:
            trained = NF4Tensor.quantize(narrow).dequantize()
        except ValueError as error:
            raise AdapterError(f"{name!r} of {self.base.folder}: {error}") from error
        if name in self.requantized:
            return trained.__getitem__, 0.0
        blocks = row_blocks(tuple(original.shape))
        squares = [(original[rows].double() - trained[rows]).square_().sum() for rows in blocks]
        return original.__getitem__, math.sqrt(sum(map(float, squares)))

    def _row_scale(
        self,
        name: str,
        layer: Layer,
        left: Tensor,
        right: Tensor,
        weight_rows: Callable[[slice], Tensor],
    ) -> Tensor | None:
        """DoRA's magnitude / ‖weight + update‖ (out,), in a pass of its own over the weight."""
        if layer.magnitude is None:
            return None
        squares = torch.zeros(layer.shape[0], dtype=torch.float64)
        for rows in row_blocks(self.base.shape(name)):
            weight = weight_rows(rows)
            square = (left[rows] @ right).mul_(layer.scaling).add_(weight).square_()
            if layer.transposed:
                squares += square.sum(0)
            else:
                squares[rows] = square.sum(1)
        magnitude = layer.magnitude.detach().cpu()
        norms = squares.sqrt_().to(magnitude.dtype).double()  # rounded alike, as in lora.Linear
        scale = torch.ones_like(norms)
        for start, stop in layer.rows:
            near = norms[start:stop].masked_fill(norms[start:stop] == 0, 1.0)
            scale[start:stop] = magnitude[start:stop].double() / near
        return scale


def _merged_biases(base: Checkpoint, adapter: Adapter) -> dict[str, Tensor]:
    """The biases of the layers whose updates have one."""
    found = {}
    for name, layer in adapter.layers.items():
        key = f"{name}.bias"
        if layer.lora_bias is None:
            continue
        if key not in base:
            raise AdapterError(
                f"the update of {name!r} has a bias (lora_bias), and {base.folder} has no {key!r} to "
                "merge it into: load the adapter with lora.load_adapter, or train without lora_bias"
            )
        check_shapes(base, [(key, tuple(layer.lora_bias.shape))])
        frozen = base.rows(key, 0, base.shape(key)[0])
        now = adapter.biases.get(key, frozen).detach().cpu().double()
        found[key] = now + layer.scaling * layer.lora_bias.detach().cpu().double()
    return found


def _factors(layer: Layer) -> tuple[Tensor, Tensor]:
    """(left, right) in float64 with the update scaling · left[rows] @ right of the stored rows.

    The rows of `Layer.dense` would be columns of a transposed weight, and its blocks of a MergedLinear
    would be made anew for each block of rows.
    """
    A, B = (factor.detach().to("cpu", torch.float64) for factor in layer.dense())
    return (A.t(), B.t()) if layer.transposed or layer.kind == "Embedding" else (B, A)


def _rounded(exact: Tensor, dtype: torch.dtype) -> Tensor:
    """Float64 values rounded once, half to even.

    torch rounds to bf16 and fp16 by way of fp32: twice, and 1 + 2⁻⁸ + 2⁻⁴⁰ becomes 1 in bf16 instead
    of 1 + 2⁻⁷. So the way leads through fp32 rounded to odd: towards zero, with the last bit set if
    anything was lost, which the second rounding then sees (Boldo and Melquiond, 2008: exact if the
    format between has two bits more than the last).
    """
    if dtype.itemsize > 2:
        return exact.to(dtype)
    near = exact.to(torch.float32)
    back = near.to(torch.float64)
    bits = near.view(torch.int32)
    bits -= (back.abs() > exact.abs()).int()
    bits |= (back != exact).int()
    return near.to(dtype)


def _bytes(block: Tensor) -> memoryview:
    return block.contiguous().reshape(-1).view(torch.uint8).numpy().data


def _check_finite(name: str, block: Tensor, exact: Tensor) -> None:
    if block.dtype not in DTYPES or block.isfinite().all():
        return
    largest = float(exact.abs().max())
    dtype = block.dtype
    if math.isfinite(largest):
        reason = f"{largest:g} is beyond {dtype}'s largest, {torch.finfo(dtype).max:g}"
        fix = "save the base in bfloat16 or float32 first"
    else:
        reason, fix = "the base or the adapter holds inf or nan", "mend that first"
    raise AdapterError(f"merging gives {name!r} values that are not finite: {reason}; {fix}")
