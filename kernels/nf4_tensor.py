"""NF4Tensor: a frozen weight of 4 bits that stands where a dense one would.

It has the weight's shape, dtype and device, and holds the parts of nf4.py instead of its elements. What
needs the elements gets them dequantised, rounded to its dtype, for as long as it runs; autograd saves
the tensor itself. So a product and its backward read 4 bits a weight, and nothing dense is kept:

    F.linear(x, W)      W dequantised, one GEMM, W forgotten; and again for dX = dY W

Products dequantise into one buffer, of this thread, device and stream, as large as the largest weight
so far. What moves, copies, transposes, or cuts between blocks of rows stays quantised. So does a change
of dtype, to which elements are rounded; it shares the codes. `copy_` quantises, and nothing else
writes: what was taken out otherwise, as `W[0]`, is a dense copy.

Sharded by FSDP2 (`fully_shard`), a process has its rows' codes and nested codes, and all nested scales,
which are 1 / 2,000 of it. Not handled: a gradient of the weight itself.
"""

import contextlib
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from . import nf4
from .nf4 import BLOCK, GROUP, NF4

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
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
        with _inference_as(parts.packed):
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

    @property
    def data(self) -> Tensor:
        return super().data

    @data.setter
    def data(self, new: Tensor) -> None:
        if not isinstance(new, NF4Tensor):
            raise frozen("its .data")
        Tensor.data.__set__(self, new)  # type: ignore[attr-defined]
        self._hold(new.parts)
        self.transposed = new.transposed

    def __setitem__(self, *_: Any) -> None:
        raise frozen("W[...] =")

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        return f"NF4Tensor({tuple(self.shape)}, dtype={self.dtype}, device={str(self.device)!r})"

    # Copies

    def __deepcopy__(self, memo: dict[int, Any]) -> "NF4Tensor":
        if id(self) not in memo:
            is_parameter = getattr(self, "_is_param", False)
            memo[id(self)] = _leaf(self._each(torch.clone), self.requires_grad, is_parameter)
        copied: NF4Tensor = memo[id(self)]
        return copied

    def __reduce_ex__(self, protocol: Any) -> Any:
        state = (self.requires_grad, getattr(self, "_is_param", False))
        return _rebuild, (tuple(self.parts), tuple(self.shape), self.dtype, self.transposed, state)

    def share_memory_(self) -> "NF4Tensor":
        self._each(Tensor.share_memory_)
        return self

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
        return nf4_ops.run(func, args, kwargs or {})


def _contiguous(shape: Sequence[int]) -> tuple[int, ...]:
    stride, strides = 1, []
    for size in reversed(shape):
        strides.append(stride)
        stride = stride * max(size, 1)
    return tuple(reversed(strides))


def _leaf(made: NF4Tensor, requires_grad: bool, is_parameter: bool) -> NF4Tensor:
    if is_parameter:
        return torch.nn.Parameter(made, requires_grad)  # type: ignore[return-value]
    return made.requires_grad_(requires_grad)  # type: ignore[return-value]


def _rebuild(
    parts: _Parts, shape: Any, dtype: torch.dtype, transposed: bool, state: tuple[bool, bool]
) -> NF4Tensor:
    return _leaf(NF4Tensor(NF4(*parts), shape, dtype, transposed), *state)


torch.serialization.add_safe_globals([_rebuild])  # torch.load(weights_only=True): it runs nothing


def _inference_as(part: Tensor) -> contextlib.AbstractContextManager[Any]:
    """For a tensor that is an inference tensor if `part` is, as views are."""
    if not torch.is_inference_mode_enabled():
        return contextlib.nullcontext()
    return torch.inference_mode(part.is_inference())


def frozen(what: str) -> TypeError:
    return TypeError(
        f"{what} would write to an NF4 weight, which is frozen: dequantize() it, or train an adapter"
    )


from . import nf4_ops  # noqa: E402  (it needs the class, the class needs it when something is called)
