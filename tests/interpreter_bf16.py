"""bf16 in Triton's interpreter, which holds it as uint16, multiplies the bits and rounds towards zero.

To be imported in a process with TRITON_INTERPRET=1, before a kernel runs: products widen bf16 to fp32,
and fp32 is rounded to the nearest bf16, ties to even, as on a GPU (Triton 3.6 to 3.9).
"""

import numpy as np
import triton.language as tl
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

_cast, _dot = InterpreterBuilder.cast_impl, InterpreterBuilder.create_dot


def _cast_to_nearest(self, value, dtype):
    if (value.dtype.scalar, dtype.scalar) != (tl.float32, tl.bfloat16):
        return _cast(self, value, dtype)
    bits = np.ascontiguousarray(value.data, np.float32).view(np.uint32).astype(np.uint64)
    nearest = (bits + 0x7FFF + (bits >> 16 & 1)) >> 16
    nearest = np.where(np.isnan(value.data), 0x7FC0, nearest).astype(np.uint16)
    return TensorHandle(nearest, tl.bfloat16)


def _dot_in_fp32(self, a, b, *rest):
    a, b = (_cast(self, t, tl.float32) if t.dtype.scalar == tl.bfloat16 else t for t in (a, b))
    return _dot(self, a, b, *rest)


InterpreterBuilder.cast_impl, InterpreterBuilder.create_dot = _cast_to_nearest, _dot_in_fp32
