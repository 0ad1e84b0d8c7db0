"""NF4Tensor: a frozen weight of 4 bits that stands where a dense one would.

It has the weight's shape, dtype and device, and holds the parts of nf4.py instead of its elements. What
needs the elements gets them dequantised, rounded to its dtype, for as long as it runs; autograd saves
the tensor itself. So a product and its backward read 4 bits a weight, and nothing dense is kept:

    F.linear(x, W)      W dequantised, one GEMM, W forgotten; and again for dX = dY W

Products dequantise into one buffer, of this thread, device and stream, as large as the largest weight
so far. What moves, copies, transposes, or cuts between blocks of rows stays quantised; so does a change
of dtype, which is the dtype that elements are rounded to. `copy_` quantises; nothing else writes.

Sharded by FSDP2 (`fully_shard`), a process has its rows' codes and nested codes, and all nested scales,
which are 1 / 2,000 of it. Not handled: a gradient of the weight itself.
"""

import math
import threading
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from . import nf4
from .nf4 import BLOCK, GROUP, NF4

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_aten = torch.ops.aten
_Parts = tuple[Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None]


class NF4Tensor(Tensor):
    """A tensor of 4-bit elements, most often a matrix (see the module).

    `dequantize()` gives them, rounded to this dtype, in a new dense tensor.

    packed, absmax, nested_absmax, offset, first: its parts, as in `lora.kernels.nf4.NF4`.
    transposed: whether the elements of the matrix lie column by column.
    """

    packed: Tensor
    absmax: Tensor
    nested_absmax: Tensor | None
    offset: Tensor | None
    first: Tensor | None
    transposed: bool

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @staticmethod
    def __new__(
        cls, parts: NF4, shape: Sequence[int], dtype: torch.dtype, transposed: bool = False
    ) -> "NF4Tensor":
        stride = _contiguous(shape[::-1])[::-1] if transposed else _contiguous(shape)
        made: NF4Tensor = Tensor._make_wrapper_subclass(
            cls, tuple(shape), strides=stride, dtype=dtype, device=parts.packed.device
        )
        made._hold(parts)
        made.transposed = transposed
        return made

    @classmethod
    def quantize(cls, weight: Tensor) -> "NF4Tensor":
        """Of a contiguous or other `weight`; ValueError for a dtype or values that cannot be."""
        if weight.dtype not in DTYPES:
            raise ValueError(
                f"NF4 of {weight.dtype}: expected one of {', '.join(map(str, DTYPES))}"
            )
        if weight.is_meta:
            return cls.empty(weight.shape, weight.dtype, weight.device)
        parts = nf4.quantize(weight)
        if not torch.isfinite(parts.offset).all():  # type: ignore[arg-type]
            raise ValueError("NF4 of a weight with infinite or NaN elements: expected finite ones")
        return cls(parts, weight.shape, weight.dtype)

    @classmethod
    def empty(cls, shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> "NF4Tensor":
        """With memory, but no values yet."""
        n = math.prod(shape)
        blocks = -(-n // BLOCK)
        sizes = (-(-n // 2), blocks, -(-blocks // GROUP), 1)
        dtypes = (torch.uint8, torch.uint8, torch.float32, torch.float32)
        made = [torch.empty(s, dtype=d, device=device) for s, d in zip(sizes, dtypes, strict=True)]
        return cls(NF4(*made), shape, dtype)

    @property
    def parts(self) -> NF4:
        return NF4(self.packed, self.absmax, self.nested_absmax, self.offset, self.first)

    def _hold(self, parts: NF4) -> None:
        for name, part in parts._asdict().items():
            setattr(self, name, part)

    def _each(self, change: Callable[[Tensor], Tensor]) -> "NF4Tensor":
        """With `change` of every part."""
        parts = NF4(*(None if part is None else change(part) for part in self.parts))  # type: ignore[arg-type]
        return NF4Tensor(parts, self.shape, self.dtype, self.transposed)

    @property
    def nbytes(self) -> int:  # type: ignore[override]
        """Of what it holds."""
        return sum(part.nbytes for part in self.parts if part is not None)

    def _dense(self, into: Tensor | None = None) -> Tensor:
        """The elements, in the flat memory of `into` if it is given."""
        if type(self.packed) is not Tensor:  # traced: the loop over blocks must not be
            call = torch.empty(0, device=self.device)
            flat = nf4.dequantize_op(*self.parts, self.numel(), self.dtype, call)
        else:
            flat = self.packed.new_empty(self.numel(), dtype=self.dtype) if into is None else into
            nf4.dequantize(self.parts, flat)
        dense: Tensor = (
            flat.view(self.shape[::-1]).t() if self.transposed else flat.view(self.shape)
        )
        return dense

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        return f"NF4Tensor({tuple(self.shape)}, dtype={self.dtype}, device={str(self.device)!r})"

    # Copies

    def __deepcopy__(self, memo: dict[int, Any]) -> "NF4Tensor":
        if id(self) not in memo:
            memo[id(self)] = _like(self, self._each(torch.clone))
        copied: NF4Tensor = memo[id(self)]
        return copied

    def __reduce_ex__(self, protocol: Any) -> Any:
        state = (self.requires_grad, getattr(self, "_is_param", False))
        return _rebuild, (tuple(self.parts), tuple(self.shape), self.dtype, self.transposed, state)

    # torch.compile

    def __tensor_flatten__(self) -> tuple[list[str], tuple[torch.dtype, bool]]:
        there = [name for name, part in self.parts._asdict().items() if part is not None]
        return there, (self.dtype, self.transposed)

    @staticmethod
    def __tensor_unflatten__(
        parts: dict[str, Tensor], context: tuple[torch.dtype, bool], shape: Any, stride: Any
    ) -> "NF4Tensor":
        return NF4Tensor(NF4(*map(parts.get, NF4._fields)), shape, *context)  # type: ignore[arg-type]

    def _stable_hash_for_caching(self) -> str:
        """What compiled code depends on: everything but the elements."""
        parts = [None if p is None else (p.dtype, tuple(p.shape), p.device) for p in self.parts]
        return repr((tuple(self.shape), self.dtype, self.transposed, self.requires_grad, parts))

    # FSDP2

    def fsdp_pre_all_gather(
        self, mesh: Any, outer_size: torch.Size, outer_stride: Any, module: Any, mp_policy: Any
    ) -> tuple[tuple[Tensor, ...], Any]:
        """What is gathered, and what every process has."""
        dtype = mp_policy.param_dtype or self.dtype
        return (self.packed, self.absmax), (self.nested_absmax, self.offset, outer_size, dtype)

    def fsdp_post_all_gather(
        self,
        gathered: tuple[Tensor, ...],
        metadata: Any,
        param_dtype: torch.dtype,
        *,
        out: Tensor | None = None,
    ) -> Any:
        """The whole weight, on the gathered tensors; `out`, once made, is on the same ones."""
        if out is not None:
            return None
        (packed, absmax), (nested_absmax, offset, shape, dtype) = gathered, metadata
        return NF4Tensor(NF4(packed, absmax, nested_absmax, offset), shape, dtype), gathered

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        own = _OWN.get(func)
        if own is not None:
            result = own(func, *args, **kwargs)
            if result is not NotImplemented:
                return result
        return _on_elements(func, args, kwargs)


def _contiguous(shape: Sequence[int]) -> tuple[int, ...]:
    stride, strides = 1, []
    for size in reversed(shape):
        strides.append(stride)
        stride = stride * max(size, 1)
    return tuple(reversed(strides))


def _like(old: NF4Tensor, new: NF4Tensor) -> NF4Tensor:
    """`new` as a Parameter, and trainable, if `old` is."""
    if getattr(old, "_is_param", False):
        return torch.nn.Parameter(new, old.requires_grad)  # type: ignore[return-value]
    return new.requires_grad_(old.requires_grad)  # type: ignore[return-value]


def _rebuild(
    parts: _Parts, shape: Any, dtype: torch.dtype, transposed: bool, state: tuple[bool, bool]
) -> NF4Tensor:
    made = NF4Tensor(NF4(*parts), shape, dtype, transposed)
    requires_grad, is_parameter = state
    if is_parameter:
        return torch.nn.Parameter(made, requires_grad)  # type: ignore[return-value]
    return made.requires_grad_(requires_grad)  # type: ignore[return-value]


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
        if weight.is_meta or type(weight.packed) is not Tensor:
            return None
        if device.type == "cuda":
            if torch.cuda.is_current_stream_capturing():
                return None  # a graph keeps its memory, this would be replaced
            stream = torch.cuda.current_stream(device).cuda_stream
        size = weight.numel() * weight.dtype.itemsize
        buffer = self.by_place.get((device, stream))
        if buffer is None or buffer.numel() < size:
            self.by_place.pop((device, stream), None)
            with torch.inference_mode(False):
                buffer = torch.empty(size, dtype=torch.uint8, device=device)
            self.by_place[device, stream] = buffer
        return buffer[:size].view(weight.dtype)


_buffers = _Buffers()


def _on_elements(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """`func` of the dense weights; TypeError if it would write to one."""
    name = func._schema.name
    given = [*zip(func._schema.arguments, args, strict=False)]
    given += [(a, kwargs[a.name]) for a in func._schema.arguments if a.name in kwargs]
    for argument, value in given:
        written = argument.alias_info is not None and argument.alias_info.is_write
        if written and any(
            isinstance(t, NF4Tensor) for t in torch.utils._pytree.tree_leaves(value)
        ):
            raise TypeError(
                f"{name} would write to an NF4 weight, which is frozen: dequantize() it, or train an "
                "adapter"
            )
    weights = [
        t for t in torch.utils._pytree.tree_leaves((args, kwargs)) if isinstance(t, NF4Tensor)
    ]
    reuse = name in _PRODUCTS and len(weights) == 1  # two would share the buffer

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
def _clone(func: Any, weight: NF4Tensor, *, memory_format: Any = None) -> NF4Tensor:
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
    dtype = dtype or weight.dtype
    if not dtype.is_floating_point:
        return NotImplemented
    moved = weight
    if device is not None and torch.device(device) != weight.device:
        non_blocking = options.get("non_blocking", False)
        moved = weight._each(lambda part: part.to(device, non_blocking=non_blocking))
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
    if dim not in (0, -weight.dim()):
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
        number = torch.full((1,), first // BLOCK, device=weight.device) + before
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
    if asked is not None or tuple(size[1:]) != weight.shape[1:]:
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
    DistributedDataParallel copies those of the first process into every one.
    """
    if not isinstance(weight, NF4Tensor):
        return NotImplemented
    if weight.shape != values.shape:
        raise ValueError(f"values {tuple(values.shape)} for an NF4 weight {tuple(weight.shape)}")
    if isinstance(values, NF4Tensor) and values.transposed == weight.transposed:
        new = values
    else:
        dense = values.dequantize() if isinstance(values, NF4Tensor) else values
        if not weight.is_meta and torch.equal(
            dense.to(weight.device, weight.dtype), weight._dense()
        ):
            return weight
        new = NF4Tensor.quantize(dense.t().contiguous() if weight.transposed else dense)
    for name, part in new.parts._asdict().items():
        held = getattr(weight, name)
        if held is None or part is None or held.dtype != part.dtype or held.shape != part.shape:
            if name == "first" and part is None and held is not None:
                held.zero_()
            else:
                setattr(weight, name, None if part is None else part.to(weight.device, copy=True))
        else:
            held.copy_(part, non_blocking=non_blocking)
    return weight
