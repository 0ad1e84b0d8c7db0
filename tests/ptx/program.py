"""PTX text -> instructions, and PTX's types."""

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

UNSIGNED = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}
DTYPES: dict[str, Any] = {"pred": np.bool_, "f16": np.float16, "f32": np.float32, "f64": np.float64}
DTYPES |= {f"{kind}{8 * size}": u for kind in "bu" for size, u in UNSIGNED.items()}
DTYPES |= {f"s{8 * size}": np.dtype(f"i{size}").type for size in UNSIGNED}
DTYPES |= {"bf16": np.uint16, "tf32": np.uint32}


class Register(NamedTuple):
    """A register, or what reads like one: %tid.x, %ctaid.y, global_smem."""

    name: str


class Immediate(NamedTuple):
    """The bits of a constant; of a floating-point one too."""

    bits: int


class Address(NamedTuple):
    """[base + offset], and the sum alone."""

    base: Register | Immediate
    offset: int


class Vector(NamedTuple):
    """{a, b, ...}; None stands for a part that is not wanted."""

    parts: tuple[Register | Immediate | None, ...]


class Label(NamedTuple):
    name: str


Operand = Register | Immediate | Address | Vector | Label


@dataclass(slots=True)
class Instruction:
    """`@!predicate base.modifiers operands`; `place` is its line in the source of the kernel."""

    text: str
    place: str
    base: str
    modifiers: tuple[str, ...]
    operands: tuple[Operand, ...]
    predicate: str | None
    negated: bool


@dataclass
class Program:
    """An entry: its name, threads of a block, bytes of shared memory, instructions, labels."""

    name: str
    threads: int
    shared: int
    instructions: list[Instruction] = field(default_factory=list)
    labels: dict[str, int] = field(default_factory=dict)


def parse(ptx: str, shared: int) -> Program:
    """The only entry of a PTX module. shared: bytes, as the compiler's metadata has them."""
    entry = re.search(r"\.entry\s+(\w+)\(", ptx)
    threads = re.search(r"\.(?:reqntid|maxntid)\s+(\d+)", ptx)
    if entry is None or threads is None:
        raise ValueError("expected PTX with an .entry and its .reqntid")
    program = Program(entry[1], int(threads[1]), shared)
    body = ptx[ptx.index("{", threads.end()) + 1 :]
    place = ""
    for line in body.splitlines():
        if line.lstrip().startswith(".loc"):
            place = line.partition("//")[2].strip() or place
            continue
        code = line.partition("//")[0].strip()
        if code.startswith(".section"):
            break
        if label := re.match(r"(\$\w+):", code):
            program.labels[label[1]] = len(program.instructions)
            code = code[label.end() :].strip()
        for text in _statements(code):
            program.instructions.append(_instruction(text, place))
    return program


def _statements(code: str) -> Iterator[str]:
    """One statement a semicolon; without the braces of inline assembly and without directives."""
    for text in code.split(";"):
        text = text.strip()
        while text and text[0] in "{}":
            text = text[1:].strip()
        if text and not text.startswith("."):
            yield text


def _instruction(text: str, place: str) -> Instruction:
    guard = re.match(r"@(!?)(%\w+)\s+", text)
    words = text[guard.end() :] if guard else text
    name, _, rest = words.replace("\t", " ").partition(" ")
    base, *modifiers = name.split(".")
    operands = tuple(_operand(part) for part in _split(rest))
    return Instruction(
        text,
        place,
        base,
        tuple(modifiers),
        operands,
        guard[2] if guard else None,
        bool(guard and guard[1]),
    )


def _split(text: str) -> Iterator[str]:
    """At the commas outside of braces and brackets."""
    depth, begin = 0, 0
    for at, letter in enumerate(text):
        depth += (letter in "{[") - (letter in "}]")
        if letter == "," and depth == 0:
            yield text[begin:at].strip()
            begin = at + 1
    if last := text[begin:].strip():
        yield last


def _operand(text: str) -> Operand:
    if text.startswith("{"):
        parts = (part.strip() for part in text.strip("{} ").split(","))
        return Vector(tuple(None if part == "_" else _scalar(part) for part in parts))
    if text.startswith("$"):
        return Label(text)
    if text.startswith("["):
        text = text.strip("[] ")
        return _sum(text) or Address(_scalar(text), 0)
    return _sum(text) or _scalar(text.partition("|")[0])  # %r1|%p1: the predicate is not used


def _sum(text: str) -> Address | None:
    found = re.fullmatch(r"([%\w.]+)\s*\+\s*(-?\w+)", text)
    return Address(_scalar(found[1]), int(found[2], 0)) if found else None


def _scalar(text: str) -> Register | Immediate:
    if re.fullmatch(r"0[fd][0-9A-Fa-f]+", text):
        return Immediate(int(text[2:], 16))
    if re.fullmatch(r"-?(0x)?[0-9A-Fa-f]+U?", text) and text.lstrip("-")[0].isdigit():
        return Immediate(int(text.removesuffix("U"), 0))
    return Register(text)
