"""Thread blocks in lockstep: registers and control flow.

A register is an array of unsigned integers (a predicate: of bools), an element a thread, for all
threads of all blocks that run together. Blocks part where a branch takes some of them elsewhere.
"""

import collections
import copy

import numpy as np

from . import matrix, scalar
from .memory import GlobalMemory, SharedMemory
from .program import DTYPES, UNSIGNED, Address, Immediate, Instruction, Operand, Program

MOST_BLOCKS = 32  # in lockstep
MOST_SHARED = 1 << 21  # bytes of shared memory of all of them


def run(
    program: Program,
    memory: GlobalMemory,
    parameters: list[int | float],
    grid: tuple[int, int, int],
    *,
    copies: str,
) -> collections.Counter[tuple[str, str, str]]:
    """Run a grid; returns how often each (rule, what was seen, instruction and place) was broken.

    parameters: addresses, integers and floats, in the order of the entry's. copies: "early" lets the
    data of a cp.async arrive when it is issued, "late" when it is waited for.
    """
    if copies not in ("early", "late"):
        raise ValueError(f"copies={copies!r}: expected 'early' or 'late'")
    found: collections.Counter[tuple[str, str, str]] = collections.Counter()
    x, y, z = grid
    blocks = [(i, j, k) for k in range(z) for j in range(y) for i in range(x)]
    together = max(1, min(MOST_BLOCKS, MOST_SHARED // max(program.shared, 1)))
    for first in range(0, len(blocks), together):
        chosen = blocks[first : first + together]
        Machine(program, memory, parameters, first, chosen, copies == "early", found).run()
    return found


class Machine:
    """Some blocks of a grid, at one instruction."""

    def __init__(
        self,
        program: Program,
        memory: GlobalMemory,
        parameters: list[int | float],
        first_block: int,
        blocks: list[tuple[int, int, int]],
        early: bool,
        found: collections.Counter[tuple[str, str, str]],
    ) -> None:
        self.program, self.memory, self.parameters = program, memory, parameters
        self.early, self.found = early, found
        threads, count = program.threads, len(blocks)
        self.n = count * threads
        self.lanes = np.arange(self.n)
        self.block = first_block + self.lanes // threads  # its number in the grid
        self.shared = SharedMemory(count, max(program.shared, 16), threads)
        thread = np.tile(np.arange(threads, dtype=np.uint32), count)
        self.registers = {"%tid.x": thread, "global_smem": np.zeros(self.n, np.uint32)}
        for axis, numbers in zip("xyz", zip(*blocks, strict=True), strict=True):
            self.registers[f"%ctaid.{axis}"] = np.repeat(np.array(numbers, np.uint32), threads)
        self.copies = matrix.Copies()
        self.products = matrix.Products()
        self.now: Instruction | None = None

    def run(self, at: int = 0) -> None:
        """Until all blocks have returned."""
        machine, instructions, labels = self, self.program.instructions, self.program.labels
        while at < len(instructions):
            instruction = machine.now = instructions[at]
            at += 1
            if instruction.base in ("ret", "exit"):
                return
            if instruction.base != "bra":
                machine.execute(instruction)
                continue
            target = labels[instruction.operands[0].name]
            taken = machine.taken(instruction)
            if taken.all():
                at = target
            elif taken.any():
                machine.part(taken).run(target)
                machine = machine.part(~taken)

    def taken(self, instruction: Instruction) -> np.ndarray:
        """By which blocks a branch is taken."""
        by_block = self.active(instruction).reshape(-1, self.program.threads)
        if (by_block.any(1) != by_block.all(1)).any():
            self.report("divergence", "only some threads of a block take this branch")
        return by_block[:, 0]

    def part(self, blocks: np.ndarray) -> "Machine":
        """Some of the blocks (bools), from here on by themselves."""
        new, threads = copy.copy(self), np.repeat(blocks, self.program.threads)
        new.n = int(threads.sum())
        new.lanes, new.block = np.arange(new.n), self.block[threads]
        new.registers = {name: value[threads] for name, value in self.registers.items()}
        new.shared = self.shared.part(blocks)
        new.copies, new.products = self.copies.part(threads), self.products.part(blocks)
        return new

    def report(self, rule: str, what: str) -> None:
        where = "" if self.now is None else f"{self.now.place}: {self.now.text[:80]}"
        self.found[rule, what, where] += 1

    # Registers

    def active(self, instruction: Instruction) -> np.ndarray:
        """Bools, one a thread."""
        if instruction.predicate is None:
            return np.ones(self.n, bool)
        value = self.registers[instruction.predicate]
        return ~value if instruction.negated else value

    def value(self, operand: Operand, kind: str) -> np.ndarray:
        """An operand as PTX's type `kind`: an element a thread, or one for all of a constant."""
        dtype = np.dtype(DTYPES[kind])
        if isinstance(operand, Immediate):
            if kind == "pred":
                return np.array([operand.bits != 0])
            bits = operand.bits & ((1 << 8 * dtype.itemsize) - 1)
            return np.array([bits], UNSIGNED[dtype.itemsize]).view(dtype)
        if isinstance(operand, Address):
            return (self.value(operand.base, kind) + np.array(operand.offset)).astype(dtype)
        if operand.name in self.products.registers:
            self.report("registers", f"{operand.name} is read before wgmma.wait_group")
        raw = self.registers[operand.name]
        if kind == "pred":
            return raw
        if raw.itemsize != dtype.itemsize:
            raw = raw.astype(UNSIGNED[dtype.itemsize])
        return raw.view(dtype)

    def set(self, target: Operand, value: np.ndarray, active: np.ndarray | None = None) -> None:
        """Write a register, of the active threads alone (None: of all)."""
        name = target.name
        if value.dtype != np.bool_:
            value = value.view(UNSIGNED[value.dtype.itemsize])
        if len(value) != self.n:
            value = np.broadcast_to(value, self.n)
        if active is not None and not active.all():
            old = self.registers.get(name)
            value = np.where(active, value, 0 if old is None else old.astype(value.dtype))
        if name in self.products.registers or name in self.products.factors:
            self.report("registers", f"{name} is written before wgmma.wait_group")
        self.products.unfenced.add(name)
        self.registers[name] = value

    def address(self, operand: Address) -> np.ndarray:
        base = self.value(operand.base, "b64").astype(np.int64) + operand.offset
        return base if len(base) == self.n else np.broadcast_to(base, self.n)

    # Instructions

    def execute(self, instruction: Instruction) -> None:
        run = matrix.INSTRUCTIONS.get(instruction.base) or scalar.INSTRUCTIONS.get(instruction.base)
        if run is None:
            raise NotImplementedError(f"PTX instruction {instruction.text!r}")
        run(self, instruction)
