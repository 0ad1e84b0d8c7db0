"""The instructions of a single thread: loads, stores, arithmetic, comparisons, conversions, fences."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np

from . import matrix
from .program import DTYPES, UNSIGNED, Immediate, Instruction, Vector

if TYPE_CHECKING:
    from .machine import Machine

np.seterr(over="ignore", invalid="ignore", divide="ignore")  # of integers that wrap, of inf and NaN


def _load_or_store(machine: Machine, i: Instruction) -> None:
    space, kind = i.modifiers[0], i.modifiers[-1]
    if space == "param":
        machine.set(i.operands[0], _parameter(machine, i.operands[1].base.name, kind))
        return
    width = np.dtype(DTYPES[kind]).itemsize
    value, place = i.operands if i.base == "ld" else i.operands[::-1]
    parts = value.parts if isinstance(value, Vector) else (value,)
    active = machine.active(i)
    who = machine.lanes[active]
    at = machine.address(place)[active]
    size = width * len(parts)
    shared = space.startswith("shared")
    if i.base == "ld":
        raw = np.zeros((machine.n, size), np.uint8)
        raw[active] = (
            machine.shared.read(at, who, size, machine.report)
            if shared
            else machine.memory.read(at, size, machine.block[active], machine.report)
        )
        for number, part in enumerate(parts):
            bits = np.ascontiguousarray(raw[:, number * width : (number + 1) * width])
            loaded = bits.view(UNSIGNED[width]).reshape(-1)
            machine.set(part, loaded.astype(np.uint16) if width == 1 else loaded, active)
        return
    columns = [np.broadcast_to(machine.value(p, f"b{8 * width}"), machine.n) for p in parts]
    raw = np.stack(columns, 1).view(np.uint8)[active]
    if shared:
        machine.shared.write(at, who, raw, machine.report)
    else:
        machine.memory.write(at, raw, machine.block[active], machine.report)


def _parameter(machine: Machine, name: str, kind: str) -> np.ndarray:
    number = int(name.rsplit("_", 1)[1])
    # Triton's own two last parameters, which these kernels do not use, are null pointers.
    given = machine.parameters[number] if number < len(machine.parameters) else 0
    if isinstance(given, float):
        return np.array([given], np.float32)
    size = np.dtype(DTYPES[kind]).itemsize
    return np.array([given & ((1 << 8 * size) - 1)], UNSIGNED[size])


def _move(machine: Machine, i: Instruction) -> None:
    target, value = i.operands
    kind, active = i.modifiers[-1], machine.active(i)
    if isinstance(target, Vector):  # one register into several smaller ones
        size = np.dtype(DTYPES[kind]).itemsize // len(target.parts)
        bits = np.broadcast_to(machine.value(value, f"b{kind[1:]}"), machine.n)
        parts = np.ascontiguousarray(bits).view(UNSIGNED[size]).reshape(machine.n, -1)
        for number, part in enumerate(target.parts):
            if part is not None:
                machine.set(part, np.ascontiguousarray(parts[:, number]), active)
    elif isinstance(value, Vector):  # and back
        size = np.dtype(DTYPES[kind]).itemsize // len(value.parts)
        parts = [
            np.broadcast_to(machine.value(part, f"b{8 * size}"), machine.n) for part in value.parts
        ]
        joined = np.stack(parts, 1).view(UNSIGNED[size * len(parts)]).reshape(-1)
        machine.set(target, joined, active)
    else:
        kind = kind if kind == "pred" else f"b{kind[1:]}"
        machine.set(target, machine.value(value, kind).copy(), active)


Function = Callable[..., np.ndarray]


def _kind(i: Instruction) -> str:
    """The type of an arithmetic instruction. bf16 is held as bits: nothing here computes with it."""
    kind = i.modifiers[-1]
    if kind == "bf16" or (kind.endswith("x2") and kind not in ("s16x2", "u16x2")):
        raise NotImplementedError(i.text)
    return kind


def _elementwise(function: Function) -> Callable[[Machine, Instruction], None]:
    """d = function(a, b, ...), all of one type."""

    def run(machine: Machine, i: Instruction) -> None:
        target, *operands = i.operands
        kind = _kind(i)
        if kind.endswith("x2"):
            values = [_halves(machine.value(operand, "b32"), kind) for operand in operands]
            result = np.ascontiguousarray(function(*values)).view(np.uint32).reshape(-1)
        else:
            values = [machine.value(operand, kind) for operand in operands]
            result = np.asarray(function(*values)).astype(values[0].dtype)
        machine.set(target, result, machine.active(i))

    return run


def _halves(bits: np.ndarray, kind: str) -> np.ndarray:
    dtype = {"s": np.int16, "u": np.uint16}[kind[0]]
    return np.ascontiguousarray(bits).view(dtype).reshape(-1, 2)


def _fused(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
    return a.astype(np.float64) * b + c  # of fp32: the product is exact, the sum nearly


def _divide(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    if a.dtype.kind == "f":
        return a / b
    if a.dtype.kind == "u":
        return a // b
    return np.abs(a) // np.abs(b) * np.sign(a) * np.sign(b)  # towards zero


def _remainder(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return a - _divide(a, b) * b


def _multiply(machine: Machine, i: Instruction) -> None:
    """mul and mad: the low half, the high half, or the whole of an integer product; plus c."""
    kind, active = _kind(i), machine.active(i)
    target, a, b, *c = i.operands
    if kind[0] == "f":
        product = machine.value(a, kind) * machine.value(b, kind)
        product = product + machine.value(c[0], kind) if c else product
        machine.set(target, product.astype(DTYPES[kind]), active)
        return
    size = np.dtype(DTYPES[kind]).itemsize
    x, y = machine.value(a, kind), machine.value(b, kind)
    if "lo" in i.modifiers:
        result = x * y
    elif size == 8:
        if "hi" not in i.modifiers:
            raise NotImplementedError(i.text)
        result = np.array([int(p) * int(q) >> 64 for p, q in np.broadcast(x, y)], dtype=object)
        result = (result & (2**64 - 1)).astype(np.uint64)
    else:
        wide = np.dtype(f"{x.dtype.kind}{2 * size}")
        result = x.astype(wide) * y.astype(wide)
        if "hi" in i.modifiers:
            result = (result >> wide.type(8 * size)).astype(x.dtype)
    if c:
        result = result + machine.value(c[0], f"{kind[0]}{8 * result.dtype.itemsize}")
    machine.set(target, result, active)


def _shift(machine: Machine, i: Instruction) -> None:
    """By more than a register has bits: zero, or the sign."""
    kind = i.modifiers[-1]
    value, by = machine.value(i.operands[1], kind), machine.value(i.operands[2], "u32")
    bits = 8 * value.dtype.itemsize
    near = np.minimum(by, bits - 1).astype(value.dtype)
    result = value << near if i.base == "shl" else value >> near
    if value.dtype.kind != "i" or i.base == "shl":
        result = np.where(by >= bits, value.dtype.type(0), result)
    machine.set(i.operands[0], result.astype(value.dtype), machine.active(i))


COMPARISONS: dict[str, Function] = {
    **{"eq": np.equal, "ne": np.not_equal, "neu": np.not_equal},
    **{"lt": np.less, "lo": np.less, "le": np.less_equal, "ls": np.less_equal},
    **{"gt": np.greater, "hi": np.greater, "ge": np.greater_equal, "hs": np.greater_equal},
}


def _compare(machine: Machine, i: Instruction) -> None:
    kind, comparison = _kind(i), i.modifiers[0]
    if len(i.modifiers) > 2:
        raise NotImplementedError(i.text)
    a, b = (machine.value(operand, kind) for operand in i.operands[1:])
    machine.set(i.operands[0], COMPARISONS[comparison](a, b), machine.active(i))


def _select(machine: Machine, i: Instruction) -> None:
    target, a, b, predicate = i.operands
    kind = f"b{i.modifiers[-1][1:]}"
    chosen = np.where(
        machine.value(predicate, "pred"), machine.value(a, kind), machine.value(b, kind)
    )
    machine.set(target, chosen, machine.active(i))


def _extract_bits(machine: Machine, i: Instruction) -> None:
    kind = i.modifiers[-1]
    value = machine.value(i.operands[1], f"u{kind[1:]}")
    position, length = (int(machine.value(operand, "u32")[0]) for operand in i.operands[2:])
    up = 8 * value.dtype.itemsize - position - length
    moved = (value << value.dtype.type(up)).view(DTYPES[kind])
    machine.set(i.operands[0], moved >> moved.dtype.type(up + position), machine.active(i))


def _permute_bytes(machine: Machine, i: Instruction) -> None:
    a, b, selector = (
        np.broadcast_to(machine.value(operand, "b32"), machine.n) for operand in i.operands[1:]
    )
    eight = np.stack([a, b], 1).view(np.uint8)
    rows, result = np.arange(machine.n), np.zeros((machine.n, 4), np.uint8)
    for number in range(4):
        nibble = selector >> np.uint32(4 * number) & np.uint32(15)
        chosen = eight[rows, nibble & 7]
        sign = np.where(chosen & 128, 255, 0)
        result[:, number] = np.where(nibble & 8, sign, chosen)
    machine.set(i.operands[0], result.view(np.uint32).reshape(-1), machine.active(i))


def bits_of_bf16(value: np.ndarray) -> np.ndarray:
    """fp32 rounded to the nearest bf16, ties to even."""
    bits = np.ascontiguousarray(value, np.float32).view(np.uint32).astype(np.uint64)
    nearest = (bits + 0x7FFF + (bits >> 16 & 1)) >> 16
    return np.where(np.isnan(value), 0x7FFF, nearest).astype(np.uint16)


def bits_of_f16(value: np.ndarray) -> np.ndarray:
    return value.astype(np.float16).view(np.uint16)


ROUND = {"bf16": bits_of_bf16, "f16": bits_of_f16}


def _convert(machine: Machine, i: Instruction) -> None:
    to, of = i.modifiers[-2:]
    first = i.operands[1]
    if to.endswith("x2"):  # the first operand is the upper half
        high, low = (ROUND[to[:-2]](machine.value(x, of)) for x in i.operands[1:])
        result = high.astype(np.uint32) << np.uint32(16) | low
    elif to in ROUND:
        result = ROUND[to](machine.value(first, of))
    elif of == "bf16":
        result = matrix.float_of_bf16(machine.value(first, of))
    elif of == "f16":
        result = machine.value(first, of).astype(DTYPES[to])
    elif to == "tf32":  # nearest, ties away from zero: the ten bits of the fraction that are left
        bits = machine.value(first, "b32").astype(np.uint64)
        result = (bits + 0x1000 & 0xFFFFE000).astype(np.uint32)
    elif of[0] == "f" and to[0] != "f":
        value = machine.value(first, of)
        if "rzi" not in i.modifiers and "rni" not in i.modifiers:
            raise NotImplementedError(i.text)
        result = (np.rint(value) if "rni" in i.modifiers else value).astype(DTYPES[to])
    else:
        result = machine.value(first, of).astype(DTYPES[to])
    if result.itemsize == 1:  # PTX has no registers of a byte
        result = result.astype(np.int16 if to[0] == "s" else np.uint16)
    machine.set(i.operands[0], result, machine.active(i))


def _count_bits(machine: Machine, i: Instruction) -> None:
    value = np.ascontiguousarray(machine.value(i.operands[1], i.modifiers[-1]))
    raw = value.view(np.uint8).reshape(len(value), -1)
    machine.set(
        i.operands[0], np.unpackbits(raw, axis=1).sum(1).astype(np.uint32), machine.active(i)
    )


def _shuffle(machine: Machine, i: Instruction) -> None:
    mode, lane = i.modifiers[1], machine.lanes % 32
    by = machine.value(i.operands[2], "u32").astype(np.int64)
    other = {
        "idx": lambda: by % 32,
        "bfly": lambda: lane ^ by,
        "down": lambda: np.where(lane + by < 32, lane + by, lane),
        "up": lambda: np.where(lane >= by, lane - by, lane),
    }[mode]()
    value = np.broadcast_to(machine.value(i.operands[1], "b32"), machine.n)
    machine.set(i.operands[0], value[machine.lanes - lane + other], machine.active(i))


def _barrier(machine: Machine, i: Instruction) -> None:
    if i.modifiers[0] == "warp":
        machine.shared.warp_barrier()
    elif i.operands == (Immediate(0),) or i.modifiers[0] == "cta":
        machine.shared.barrier()
    else:
        raise NotImplementedError(f"named barriers: {i.text}")


def _fence(machine: Machine, i: Instruction) -> None:
    if i.modifiers[:2] == ("proxy", "async"):
        machine.shared.proxy_fence()


def _nothing(machine: Machine, i: Instruction) -> None:
    pass


INSTRUCTIONS: dict[str, Callable[[Machine, Instruction], None]] = {
    **{"ld": _load_or_store, "st": _load_or_store, "mov": _move},
    **{"mul": _multiply, "mad": _multiply, "shl": _shift, "shr": _shift},
    **{"setp": _compare, "selp": _select, "bfe": _extract_bits, "prmt": _permute_bytes},
    **{"cvt": _convert, "popc": _count_bits, "shfl": _shuffle},
    **{"bar": _barrier, "barrier": _barrier, "fence": _fence},
    **{"membar": _nothing, "nop": _nothing, "griddepcontrol": _nothing},
    **{
        name: _elementwise(function)
        for name, function in {
            "add": np.add,
            "sub": np.subtract,
            "div": _divide,
            "rem": _remainder,
            "fma": _fused,
            "min": np.fmin,
            "max": np.fmax,
            "neg": np.negative,
            "abs": np.abs,
            "and": np.bitwise_and,
            "or": np.bitwise_or,
            "xor": np.bitwise_xor,
            "not": np.invert,
        }.items()
    },
}
