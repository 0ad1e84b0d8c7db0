"""What torch's operations do with an NF4Tensor: some leave it quantised, the others see its elements.

A handler of `_own` returns NotImplemented for the arguments that it leaves to the elements.
"""

import math
import threading
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from . import nf4
from .nf4 import BLOCK, NF4
from .nf4_tensor import NF4Tensor, frozen

_aten = torch.ops.aten

# Operations on the elements

_PRODUCTS = {
    *("aten::mm", "aten::addmm", "aten::addmm_", "aten::linear", "aten::bmm"),
    *("lora::fused_forward", "lora::fused_backward"),
}


class _Buffers(threading.local):
    """The memory that this thread's products dequantise into, by device and stream."""

    def __init__(self) -> None:
        self.by_place: dict[tuple[torch.device, int], Tensor] = {}

    def take(self, weight: NF4Tensor) -> Tensor | None:
        """Flat memory for the elements of `weight`; None where it cannot be used again."""
        device, stream = weight.device, 0
        if type(weight.packed) is not Tensor:
            return None
        if device.type == "cuda":
            if torch.cuda.is_current_stream_capturing():
                return None  # a graph keeps its memory, this would be replaced
            stream = torch.cuda.current_stream(device).cuda_stream
        size = weight.numel() * weight.dtype.itemsize
        buffer = self.by_place.get((device, stream))
        if buffer is None or buffer.numel() < size:
            self.by_place.pop((device, stream), None)
            with _disable_current_modes(), torch.inference_mode(False):
                buffer = torch.empty(size, dtype=torch.uint8, device=device)
            self.by_place[device, stream] = buffer
        return buffer[:size].view(weight.dtype)


_buffers = _Buffers()


def run(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The operation `func` of torch, of which some arguments are NF4Tensors."""
    own = _OWN.get(func)
    result = NotImplemented if own is None else own(func, *args, **kwargs)
    return _on_elements(func, args, kwargs) if result is NotImplemented else result


def _on_elements(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """`func` of the dense weights; TypeError if it would write to one."""
    schema, leaves = func._schema, torch.utils._pytree.tree_leaves
    if schema.is_mutable or func.namespace == "c10d":  # whose schemas do not say what they write
        given = [*zip(schema.arguments, args, strict=False)]
        given += [(a, kwargs[a.name]) for a in schema.arguments if a.name in kwargs]
        for argument, value in given:
            alias = argument.alias_info
            written = func.namespace == "c10d" or (alias is not None and alias.is_write)
            if written and any(isinstance(t, NF4Tensor) for t in leaves(value)):
                raise frozen(schema.name)
    weights = [t for t in leaves((args, kwargs)) if isinstance(t, NF4Tensor)]
    reuse = schema.name in _PRODUCTS and len(weights) == 1  # two would share the buffer

    def dense(value: Any) -> Any:
        if not isinstance(value, NF4Tensor):
            return value
        return value._dense(_buffers.take(value) if reuse else None)

    args, kwargs = torch.utils._pytree.tree_map(dense, (args, kwargs))
    return func(*args, **kwargs)


# Operations that leave the weight quantised

_OWN: dict[Any, Callable[..., Any]] = {}


def _own(*funcs: Any) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    def register(handler: Callable[..., Any]) -> Callable[..., Any]:
        _OWN.update(dict.fromkeys(funcs, handler))
        return handler

    return register


@_own(_aten.detach.default, _aten.alias.default)
def _alias(func: Any, weight: NF4Tensor) -> NF4Tensor:
    return weight._each(lambda part: part)


@_own(_aten.clone.default)
def _clone(func: Any, weight: NF4Tensor, *, memory_format: Any = None) -> Tensor:
    if weight.transposed and memory_format is torch.contiguous_format:
        return weight._dense().contiguous()
    return weight._each(torch.clone)


@_own(_aten.dequantize.self)
def _dequantize(func: Any, weight: NF4Tensor) -> Tensor:
    return weight._dense()


@_own(_aten._pin_memory.default)
def _pin(func: Any, weight: NF4Tensor, device: Any = None) -> NF4Tensor:
    return weight._each(Tensor.pin_memory)


@_own(_aten.is_pinned.default)
def _is_pinned(func: Any, weight: NF4Tensor, device: Any = None) -> bool:
    return weight.packed.is_pinned()


@_own(_aten._to_copy.default)
def _to_copy(
    func: Any, weight: NF4Tensor, *, dtype: Any = None, device: Any = None, **options: Any
) -> Any:
    """On the same codes if only the dtype changes, as in every product under autocast."""
    dtype = dtype or weight.dtype
    if not dtype.is_floating_point:
        return NotImplemented
    place = weight.device if device is None else torch.device(device)
    moved = weight
    if place != weight.device or dtype == weight.dtype:
        non_blocking = options.get("non_blocking", False)
        moved = weight._each(lambda part: part.to(place, non_blocking=non_blocking, copy=True))
    return NF4Tensor(moved.parts, weight.shape, dtype, weight.transposed)


@_own(_aten.t.default)
def _t(func: Any, weight: NF4Tensor) -> Any:
    if weight.dim() != 2:
        return NotImplemented
    return NF4Tensor(weight.parts, weight.shape[::-1], weight.dtype, not weight.transposed)


@_own(_aten.transpose.int)
def _transpose(func: Any, weight: NF4Tensor, dim0: int, dim1: int) -> Any:
    swaps = weight.dim() == 2 and (dim0 - dim1) % 2 == 1
    return _t(func, weight) if swaps else NotImplemented


@_own(_aten.view.default)
def _view(func: Any, weight: NF4Tensor, shape: Sequence[int]) -> Any:
    if weight.transposed:
        return NotImplemented
    shape = torch.empty(weight.shape, device="meta").view(shape).shape
    return NF4Tensor(weight.parts, shape, weight.dtype)


@_own(_aten.as_strided.default)
def _as_strided(func: Any, weight: NF4Tensor, size: Any, stride: Any, offset: int = 0) -> Any:
    same = tuple(size) == weight.shape and tuple(stride) == weight.stride() and not offset
    return _alias(func, weight) if same else NotImplemented


@_own(_aten.slice.Tensor)
def _slice(
    func: Any, weight: NF4Tensor, dim: int = 0, start: Any = None, end: Any = None, step: int = 1
) -> Any:
    start, end, step = slice(start, end, step).indices(weight.shape[dim])
    if (start, end, step) == (0, weight.shape[dim], 1):
        return _alias(func, weight)
    if dim not in (0, -weight.dim()) or step != 1:
        return NotImplemented
    rows = _rows(weight, start, max(start, end))
    return NotImplemented if rows is None else rows


@_own(_aten.split.Tensor)
def _split(func: Any, weight: NF4Tensor, size: int, dim: int = 0) -> Any:
    if dim not in (0, -weight.dim()) or not weight.shape[0]:
        return NotImplemented
    rows = [
        _rows(weight, start, min(start + size, weight.shape[0]))
        for start in range(0, weight.shape[0], size)
    ]
    return NotImplemented if None in rows else rows


def _rows(weight: NF4Tensor, start: int, end: int) -> NF4Tensor | None:
    """A view of these rows, if they begin and end where blocks do."""
    columns = math.prod(weight.shape[1:])
    first, last = start * columns, end * columns
    if weight.transposed or first % BLOCK or (last % BLOCK and last != weight.numel()):
        return None
    packed = weight.packed[first // 2 : -(-last // 2)]
    absmax = weight.absmax[first // BLOCK : -(-last // BLOCK)]
    number = weight.first
    if first and weight.nested_absmax is not None:
        before = 0 if number is None else number
        number = weight.absmax.new_full((1,), first // BLOCK, dtype=torch.int64) + before
    parts = NF4(packed, absmax, weight.nested_absmax, weight.offset, number)
    return NF4Tensor(parts, (end - start, *weight.shape[1:]), weight.dtype)


@_own(_aten.empty_like.default)
def _empty_like(
    func: Any, weight: NF4Tensor, *, dtype: Any = None, device: Any = None, **options: Any
) -> Any:
    dtype = dtype or weight.dtype
    if not dtype.is_floating_point:
        return NotImplemented
    device = weight.device if device is None else torch.device(device)
    if weight.nested_absmax is not None:
        return NF4Tensor.empty(weight.shape, dtype, device)
    made = weight._each(lambda part: torch.empty_like(part, device=device))
    return NF4Tensor(made.parts, weight.shape, dtype)


@_own(_aten.new_zeros.default)
def _new_zeros(func: Any, weight: NF4Tensor, size: Sequence[int], **options: Any) -> Any:
    """Of rows of this weight, with no other dtype or device, as FSDP2 asks: a part; else dense."""
    asked = options.get("dtype") or options.get("device")
    if asked is not None or not size or tuple(size[1:]) != weight.shape[1:]:
        return _new(func, weight, size, **options)
    elements = math.prod(size)
    if elements % BLOCK:
        raise ValueError(
            f"{size[0]} rows of an NF4 weight {tuple(weight.shape)} are {elements} elements: a "
            f"process's part must be whole blocks of {BLOCK}; take another number of processes, or "
            "keep this weight out of fully_shard (ignored_params)"
        )
    zeros = torch.zeros(elements // 2, dtype=torch.uint8, device=weight.device)
    absmax = torch.zeros(elements // BLOCK, dtype=weight.absmax.dtype, device=weight.device)
    parts = NF4(zeros, absmax, None, None)
    if weight.nested_absmax is not None and weight.offset is not None:
        first = torch.zeros(1, dtype=torch.int64, device=weight.device)
        nested = torch.zeros_like(weight.nested_absmax)
        parts = NF4(zeros, absmax, nested, torch.zeros_like(weight.offset), first)
    return NF4Tensor(parts, size, weight.dtype)


@_own(_aten.new_empty.default, _aten.new_full.default, _aten.new_ones.default)
def _new(func: Any, weight: NF4Tensor, *args: Any, **options: Any) -> Any:
    """A dense tensor of this dtype and device."""
    return func(torch.empty(0, dtype=weight.dtype, device=weight.device), *args, **options)


@_own(_aten.copy_.default)
def _copy(func: Any, weight: Any, values: Tensor, non_blocking: bool = False) -> Any:
    """The parts of `values`, or those that it is quantised to.

    Dense values that are its own leave it as it is, though they would be quantised to others:
    DistributedDataParallel copies those of the first process into every one, which must have the same.
    """
    if not isinstance(weight, NF4Tensor):
        return NotImplemented
    if weight.shape != values.shape:
        raise ValueError(f"values {tuple(values.shape)} for an NF4 weight {tuple(weight.shape)}")
    if isinstance(values, NF4Tensor) and values.transposed == weight.transposed:
        new = values.parts
    else:
        dense = values.dequantize() if isinstance(values, NF4Tensor) else values
        if not weight.is_meta and torch.equal(
            dense.to(weight.device, weight.dtype), weight._dense()
        ):
            return weight
        new = NF4Tensor.quantize(dense.t().contiguous() if weight.transposed else dense).parts
    if weight.nested_absmax is None and new.nested_absmax is not None:
        new = NF4(new.packed, nf4.scales(new), None, None)
    if not _may_have_scales_of(weight, new):
        raise frozen("copy_ into some rows, whose scales others have too,")
    for name, part in new._asdict().items():
        held = getattr(weight, name)
        if held is None or part is None or held.dtype != part.dtype or held.shape != part.shape:
            if name == "first" and part is None and held is not None:
                held.zero_()
            else:
                setattr(weight, name, None if part is None else part.to(weight.device, copy=True))
        else:
            held.copy_(part, non_blocking=non_blocking)
    return weight


def _may_have_scales_of(weight: NF4Tensor, new: NF4) -> bool:
    """Whether nothing but this weight depends on its nested scales, or they are the same."""
    held, storage = weight.parts, weight.packed.untyped_storage()
    if held.nested_absmax is None or storage.nbytes() == weight.packed.nbytes or weight.is_meta:
        return True
    if all(
        one is other or (one is not None and other is not None and torch.equal(one, other))
        for one, other in zip(held[2:], new[2:], strict=True)
    ):
        return True
    others = torch.empty(0, dtype=torch.uint8, device=weight.device).set_(storage).count_nonzero()
    return bool(others == weight.packed.count_nonzero())  # the padding of FSDP2 has no codes
