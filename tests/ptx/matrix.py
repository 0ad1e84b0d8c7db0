"""What a warp or a warp group does together: ldmatrix, stmatrix, mma.sync, wgmma, and cp.async.

Fragments are those of the PTX ISA: with g = lane / 4 and t = lane % 4, register j of an m16n8k16
product holds two neighbours of A in row g + 8 (j % 2) from column 2 t + 8 (j / 2) on, of B in column g
from row 2 t + 8 j on, and element j of C is in row g + 8 (j / 2), column 2 t + j % 2.
"""

from __future__ import annotations

import collections
import re
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from .program import Immediate, Instruction, Vector

if TYPE_CHECKING:
    from .machine import Machine

LANE = np.arange(32)
GROUP, MEMBER = LANE // 4, LANE % 4
WARP_GROUP = np.arange(128)


def float_of_bf16(bits: np.ndarray) -> np.ndarray:
    return (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)


def float_of_f16(bits: np.ndarray) -> np.ndarray:
    return bits.view(np.float16).astype(np.float32)


def float_of_tf32(bits: np.ndarray) -> np.ndarray:
    """The thirteen lowest bits are not read."""
    return (bits & np.uint32(0xFFFFE000)).view(np.float32)


FLOAT_OF = {"bf16": float_of_bf16, "f16": float_of_f16}


def _registers(machine: Machine, operand: Vector, width: int) -> list[np.ndarray]:
    """Of a fragment: (warps or warp groups, width), one a register."""
    values = (np.broadcast_to(machine.value(part, "b32"), machine.n) for part in operand.parts)
    return [np.ascontiguousarray(value).reshape(-1, width) for value in values]


def _halves(bits: np.ndarray) -> np.ndarray:
    """(..., 2): the lower and the upper 16 bits."""
    return np.stack([bits & np.uint32(0xFFFF), bits >> np.uint32(16)], -1).astype(np.uint16)


# Asynchronous copies


class Copy(NamedTuple):
    at: np.ndarray  # shared addresses, one a thread
    raw: np.ndarray  # (threads, size)
    active: np.ndarray


@dataclass
class Copies:
    """cp.async: what is issued, and the groups that are committed and not waited for."""

    issued: list[Copy] = field(default_factory=list)
    groups: list[list[Copy]] = field(default_factory=list)

    def part(self, threads: np.ndarray) -> Copies:
        def of(copies: list[Copy]) -> list[Copy]:
            return [Copy(*(array[threads] for array in copy)) for copy in copies]

        return Copies(of(self.issued), [of(group) for group in self.groups])


def copy_async(machine: Machine, i: Instruction) -> None:
    copies, shared = machine.copies, machine.shared
    if i.modifiers[1] == "commit_group":
        copies.groups.append(copies.issued)
        copies.issued = []
        return
    if i.modifiers[1] == "wait_group":
        pending = i.operands[0].bits
        while len(copies.groups) > pending:
            for at, raw, active in copies.groups.pop(0):
                who = machine.lanes[active]
                index = shared.index(at[active], who, raw.shape[1], machine.report)
                shared.copied_to[index] = False
                shared.land(index, who, raw[active])
        return
    if i.modifiers[0] != "async" or "shared" not in i.text or "bulk" in i.text:
        raise NotImplementedError(i.text)
    to, of, size, *read = i.operands
    active, size = machine.active(i), size.bits
    length = machine.value(read[0], "b32") if read else np.array([size])
    if not np.isin(length[active[: len(length)]], (0, size)).all():
        raise NotImplementedError(f"a part of {size} bytes: {i.text}")
    raw = np.zeros((machine.n, size), np.uint8)
    whole = active & (length == size)
    raw[whole] = machine.memory.read(
        machine.address(of)[whole], size, machine.block[whole], machine.report
    )
    at, who = machine.address(to), machine.lanes[active]
    index = shared.index(at[active], who, size, machine.report)
    shared.check_free(index, who, machine.report)
    shared.copied_to[index] = True
    if machine.early:
        shared.data[index] = raw[active]
    copies.issued.append(Copy(at, raw, active))


# Products of a warp


def multiply_of_a_warp(machine: Machine, i: Instruction) -> None:
    shape, kind = i.modifiers[2], i.modifiers[-2]
    target, a, b, c = i.operands
    left, right = _registers(machine, a, 32), _registers(machine, b, 32)
    warps = machine.n // 32
    if shape == "m16n8k16" and kind in FLOAT_OF:
        A, B = np.zeros((warps, 16, 16)), np.zeros((warps, 16, 8))
        for j, bits in enumerate(left):
            pair = FLOAT_OF[kind](_halves(bits))
            for half in (0, 1):
                A[:, GROUP + 8 * (j % 2), 2 * MEMBER + 8 * (j // 2) + half] = pair[..., half]
        for j, bits in enumerate(right):
            pair = FLOAT_OF[kind](_halves(bits))
            for half in (0, 1):
                B[:, 2 * MEMBER + 8 * j + half, GROUP] = pair[..., half]
    elif shape == "m16n8k8" and kind == "tf32":
        A, B = np.zeros((warps, 16, 8)), np.zeros((warps, 8, 8))
        for j, bits in enumerate(left):
            A[:, GROUP + 8 * (j % 2), MEMBER + 4 * (j // 2)] = float_of_tf32(bits)
        for j, bits in enumerate(right):
            B[:, MEMBER + 4 * j, GROUP] = float_of_tf32(bits)
    else:
        raise NotImplementedError(i.text)
    product = A @ B
    sums = []
    for j, part in enumerate(c.parts):
        before = np.broadcast_to(machine.value(part, "f32"), machine.n).astype(np.float64)
        more = product[:, GROUP + 8 * (j // 2), 2 * MEMBER + j % 2].reshape(-1)
        sums.append((before + more).astype(np.float32))
    for part, value in zip(target.parts, sums, strict=True):
        machine.set(part, value)


def load_or_store_matrices(machine: Machine, i: Instruction) -> None:
    """8 x 8 matrices of two bytes: lanes 8 j to 8 j + 7 have the addresses of the rows of matrix j."""
    count = int(next(m for m in i.modifiers if m in ("x1", "x2", "x4"))[1])
    load, transposed = i.base == "ldmatrix", "trans" in i.modifiers
    place, fragment = i.operands[::-1] if load else i.operands
    rows = machine.address(place).reshape(-1, 32)
    if (rows[:, : 8 * count] % 16).any():
        machine.report("alignment", "rows of matrices that do not begin at multiples of 16")
    shared, who, report = machine.shared, machine.lanes, machine.report
    for j, part in enumerate(fragment.parts):
        if transposed:  # the two elements of a lane are one below the other
            at = [(rows[:, 8 * j + 2 * MEMBER + h] + 2 * GROUP).reshape(-1) for h in (0, 1)]
        else:
            at = [(rows[:, 8 * j + GROUP] + 4 * MEMBER).reshape(-1)]
        size = 4 // len(at)
        if load:
            raw = np.concatenate([shared.read(a, who, size, report) for a in at], 1)
            machine.set(part, np.ascontiguousarray(raw).view(np.uint32).reshape(-1))
        else:
            raw = np.ascontiguousarray(machine.value(part, "b32")).view(np.uint8).reshape(-1, 4)
            for h, a in enumerate(at):
                shared.write(a, who, raw[:, size * h : size * (h + 1)], report)


# Asynchronous products of a warp group


class Product(NamedTuple):
    reads: list[np.ndarray]  # (blocks, warp groups, bytes): offsets in shared memory
    factors: tuple[str, ...]  # registers of A
    sums: tuple[str, ...]  # and of D


@dataclass
class Products:
    """wgmma: what is issued, the groups that are committed and not waited for, and their registers."""

    issued: list[Product] = field(default_factory=list)
    groups: list[list[Product]] = field(default_factory=list)
    factors: collections.Counter[str] = field(default_factory=collections.Counter)
    registers: collections.Counter[str] = field(default_factory=collections.Counter)  # sums
    unfenced: set[str] = field(default_factory=set)  # written since the last wgmma.fence

    def part(self, blocks: np.ndarray) -> Products:
        def of(products: list[Product]) -> list[Product]:
            return [p._replace(reads=[read[blocks] for read in p.reads]) for p in products]

        return Products(
            of(self.issued),
            [of(group) for group in self.groups],
            self.factors.copy(),
            self.registers.copy(),
            set(self.unfenced),
        )


def multiply_of_a_warp_group(machine: Machine, i: Instruction) -> None:
    products = machine.products
    if i.modifiers[0] == "fence":
        products.unfenced.clear()
    elif i.modifiers[0] == "commit_group":
        products.groups.append(products.issued)
        products.issued = []
    elif i.modifiers[0] == "wait_group":
        while len(products.groups) > i.operands[0].bits:
            for product in products.groups.pop(0):
                _finish(machine, product)
    else:
        _multiply(machine, i)


def _finish(machine: Machine, product: Product) -> None:
    products, shared = machine.products, machine.shared
    for read in product.reads:
        blocks, groups, _ = read.shape
        index = read + (np.arange(blocks) * shared.size)[:, None, None]
        group = np.arange(blocks * groups).reshape(blocks, groups, 1)
        np.subtract.at(shared.multiplied, index, 1)
        same = shared.group_time[index] == shared.time
        shared.group[index] = np.where(same & (shared.group[index] != group), -2, group)
        other = index[(shared.group[index] != group) & (shared.group[index] != -2)]
        shared.group[other] = -2
        shared.group_time[index] = shared.time
    for counter, names in ((products.factors, product.factors), (products.registers, product.sums)):
        counter.subtract(names)
        for name in names:
            if counter[name] <= 0:
                del counter[name]


def _multiply(machine: Machine, i: Instruction) -> None:
    size = re.fullmatch(r"m64n(\d+)k16", i.modifiers[3])
    kind = i.modifiers[-1]
    if size is None or i.modifiers[-3] != "f32" or kind not in FLOAT_OF:
        raise NotImplementedError(i.text)
    columns, decode, products = int(size[1]), FLOAT_OF[kind], machine.products
    target, a, b, scale_d, scale_a, scale_b, *transposed = i.operands
    if scale_a != Immediate(1) or scale_b != Immediate(1):
        raise NotImplementedError(i.text)
    reads: list[np.ndarray] = []
    factors: tuple[str, ...] = ()
    groups = machine.n // 128
    if isinstance(a, Vector):
        factors = tuple(part.name for part in a.parts)
        A = np.zeros((groups, 64, 16), np.uint16)
        warp, lane = WARP_GROUP // 32, WARP_GROUP % 32
        for j, bits in enumerate(_registers(machine, a, 128)):
            pair = _halves(bits)
            for half in (0, 1):
                row = 16 * warp + lane // 4 + 8 * (j % 2)
                A[:, row, 2 * (lane % 4) + 8 * (j // 2) + half] = pair[..., half]
    else:
        A = _operand_in_memory(machine, a, 64, transposed.pop(0) == Immediate(1), reads)
    B = _operand_in_memory(machine, b, columns, transposed.pop(0) == Immediate(1), reads)
    sums = tuple(part.name for part in target.parts)
    if not products.unfenced.isdisjoint((*factors, *sums)):
        machine.report("wgmma fence", "registers are used that were written since wgmma.fence")
    product = decode(A).astype(np.float64) @ decode(B).astype(np.float64).transpose(0, 2, 1)
    add = np.broadcast_to(
        machine.value(scale_d, "pred" if not isinstance(scale_d, Immediate) else "b32"), machine.n
    ).astype(bool)
    warp, lane = WARP_GROUP // 32, WARP_GROUP % 32
    # Accumulators of earlier products may be used without a wait and without a fence.
    unfenced, pending, waiting = set(products.unfenced), products.registers, products.factors
    products.registers, products.factors = collections.Counter(), collections.Counter()
    for j, part in enumerate(target.parts):
        row, column = (
            16 * warp + lane // 4 + 8 * (j % 4 // 2),
            8 * (j // 4) + 2 * (lane % 4) + j % 2,
        )
        before = machine.value(part, "f32") if add.any() else np.zeros(1, np.float32)
        more = product[:, row, column].reshape(-1)
        machine.set(part, (np.where(add, before, 0).astype(np.float64) + more).astype(np.float32))
    products.unfenced, products.registers, products.factors = unfenced, pending, waiting
    products.factors.update(factors)
    products.registers.update(sums)
    for read in reads:
        index = read + (np.arange(read.shape[0]) * machine.shared.size)[:, None, None]
        np.add.at(machine.shared.multiplied, index, 1)
    products.issued.append(Product(reads, factors, sums))


SWIZZLES = {0: (0, 16, 8), 1: (7, 128, 64), 2: (3, 64, 32), 3: (1, 32, 16)}  # mask, pitch, elements


def _operand_in_memory(
    machine: Machine, operand: object, rows: int, transposed: bool, reads: list[np.ndarray]
) -> np.ndarray:
    """(warp groups, rows, 16) elements of two bytes that a matrix descriptor names; notes the reads.

    The descriptor has the start, the leading and the stride byte offset in units of 16 bytes, and the
    swizzle, which moves bits 7 to 9 of an address (as many as it is wide) into bits 4 to 6.
    """
    shared = machine.shared
    descriptors = np.broadcast_to(machine.value(operand, "b64"), machine.n)
    descriptors = np.ascontiguousarray(descriptors).reshape(-1, 128)
    if (descriptors != descriptors[:, :1]).any():
        machine.report("divergence", "the threads of a warp group have different descriptors")
    every = descriptors[:, 0].astype(np.int64)
    start, leading, stride = ((every >> shift & 0x3FFF) << 4 for shift in (0, 16, 32))
    if (every >> 49 & 7).any() or len(np.unique(every >> 62 & 3)) > 1:
        raise NotImplementedError("a base offset, or several swizzles, in matrix descriptors")
    swizzle = int(every[0] >> 62 & 3)
    mask, pitch, span = SWIZZLES[swizzle]
    start, leading, stride = (value[:, None, None] for value in (start, leading, stride))
    row, k = np.arange(rows)[None, :, None], np.arange(16)[None, None, :]
    if not transposed:
        offset = row // 8 * stride + row % 8 * pitch
        offset = offset + (k * 2 if swizzle else k // 8 * leading + k % 8 * 2)
    elif swizzle:
        offset = row % span * 2 + row // span * leading + k % 8 * span * 2 + k // 8 * stride
    else:
        offset = row % 8 * 2 + row // 8 * stride + k % 8 * 16 + k // 8 * leading
    at = start + offset
    at = at ^ (at >> 7 & mask) << 4
    groups = len(every)
    who = np.repeat(np.arange(groups) * 128, rows * 16)  # the first lane of each warp group
    index = shared.index(at.reshape(-1), who, 2, machine.report)
    shared.check_ready(index, machine.report)
    if shared.generic[index].any():
        machine.report(
            "proxy fence", "wgmma reads what was written with no fence.proxy.async since"
        )
    if (shared.write_time[index] == shared.time).any():
        machine.report("race", "wgmma reads what was written since the last barrier")
    blocks = machine.n // machine.program.threads
    offsets = index.reshape(blocks, -1) - (np.arange(blocks) * shared.size)[:, None]
    reads.append(offsets.reshape(blocks, groups // blocks, -1))
    return np.ascontiguousarray(shared.data[index]).view(np.uint16).reshape(groups, rows, 16)


INSTRUCTIONS = {
    "cp": copy_async,
    "mma": multiply_of_a_warp,
    "ldmatrix": load_or_store_matrices,
    "stmatrix": load_or_store_matrices,
    "wgmma": multiply_of_a_warp_group,
}
