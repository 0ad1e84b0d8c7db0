"""What reading a compiled kernel's code proves wrong, also for GPUs that tests/ptx does not emulate.

    refilled_early       Triton's IR: a buffer of a pipelined loop is refilled before its last reader
    written_in_flight    SASS of sm_90: a register that a wgmma in flight may use is written

Both walk the code in order. A loop of the IR is walked as often as makes every buffer come round twice,
with the indices of the buffers computed; a loop of SASS twice. Neither follows a branch that leaves.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass, field

COPIES = ("ttg.async_copy_global_to_local", "ttg.local_store", "amdgpu.buffer_load_to_local")
READS = ("ttg.local_load", "ttng.warp_group_dot", "ttng.tc_gen5_mma")
SAME_MEMORY = ("ttg.memdesc_trans", "ttg.memdesc_subslice", "ttg.memdesc_reshape")
Slot = tuple[str, int]  # of a buffer, which one


@dataclass
class _Loop:
    """The state of a walk: integers, and for each view of a buffer its slot and what it holds."""

    numbers: dict[str, int]
    slots: dict[str, Slot]
    contents: dict[Slot, int] = field(default_factory=dict)  # how often it was filled
    seen: dict[str, int] = field(default_factory=dict)  # by a view, when the iteration made it
    in_flight: list[list[Slot]] = field(default_factory=list)  # read by a product each


def refilled_early(ttgir: str) -> list[str]:
    """One line for every read that finds what a later iteration has copied there, or may find it."""
    lines = [re.sub(r" loc\(.*$", "", line) for line in ttgir.splitlines() if line[:1] != "#"]
    found: list[str] = []
    for start, line in enumerate(lines):
        if " scf.for " in line:
            indent = len(line) - len(line.lstrip())
            end = next(
                i for i in range(start + 1, len(lines)) if lines[i].startswith(" " * indent + "}")
            )
            found += _walk(lines[:start], line, lines[start + 1 : end])
    return list(dict.fromkeys(found))


def _walk(before: list[str], head: str, body: list[str]) -> Iterator[str]:
    state, buffers = _Loop({}, {}), 1
    for line in before:
        _index(line, state)
        if alloc := re.search(r"(%[\w-]+) = ttg\.local_alloc : .*memdesc<(\d+)x", line):
            buffers = max(buffers, int(alloc[2]))
            state.slots[alloc[1]] = (alloc[1], 0)
    inner = re.search(r"iter_args\((.*?)\)", head)
    pairs = re.findall(r"(%[\w-]+) = (%[\w-]+)", inner[1]) if inner else []
    state.numbers |= {name: state.numbers[v] for name, v in pairs if v in state.numbers}
    last = next((line for line in reversed(body) if "scf.yield" in line), "")
    yielded = re.findall(r"%[\w#-]+", last.partition(":")[0])
    for _ in range(2 * buffers + 1):
        for line in body:
            yield from _step(line, state)
        carried = zip(pairs, yielded, strict=False)
        state.numbers |= {
            name: state.numbers[value] for (name, _), value in carried if value in state.numbers
        }
        state.seen.clear()


def _index(line: str, state: _Loop) -> None:
    """Follow the integers and the views of buffers that an operation makes."""
    made = re.match(r"\s*(%[\w-]+) = (\S+) (.*)", line)
    if made is None:
        return
    name, operation, rest = made.groups()
    values = re.findall(r"%[\w-]+", rest)
    numbers = state.numbers
    known = [numbers[v] for v in values if v in numbers]
    if operation == "arith.constant":
        if value := re.match(r"(-?\d+) : i32", rest):
            numbers[name] = int(value[1])
    elif operation in ("arith.addi", "arith.subi") and len(known) == 2:
        numbers[name] = known[0] + known[1] * (1 if operation == "arith.addi" else -1)
    elif operation == "arith.cmpi" and len(known) == 2:
        a, b = known
        compared = {"sge": a >= b, "eq": a == b, "slt": a < b, "sgt": a > b, "ne": a != b}
        numbers[name] = int(compared[rest.partition(",")[0]])
    elif operation == "arith.select" and values[0] in numbers:
        chosen = values[1] if numbers[values[0]] else values[2]
        if chosen in numbers:
            numbers[name] = numbers[chosen]
    elif operation == "ttg.memdesc_index" and values[0] in state.slots and values[1] in numbers:
        state.slots[name] = (values[0], numbers[values[1]])
        state.seen[name] = state.contents.get(state.slots[name], 0)
    elif operation in SAME_MEMORY and values[0] in state.slots:
        state.slots[name] = state.slots[values[0]]
        if values[0] in state.seen:
            state.seen[name] = state.seen[values[0]]


def _step(line: str, state: _Loop) -> Iterator[str]:
    _index(line, state)
    text = line.strip()
    code = text.partition(" : ")[0]
    operation = next((word for word in code.split() if word.startswith(("ttg.", "ttng."))), "")
    operands = [
        v for v in re.findall(r"%[\w-]+", code.partition(" = ")[2] or code) if v in state.slots
    ]
    if operation in COPIES:
        target = state.slots[operands[-1]] if operands else None
        if target is None:
            return
        if any(target in slots for slots in state.in_flight):
            yield f"{target[0]} is refilled while a product may still read it: {text[:120]}"
        state.contents[target] = state.contents.get(target, 0) + 1
    elif operation in READS:
        for view in operands:
            if view in state.seen and state.seen[view] != state.contents.get(state.slots[view], 0):
                yield f"{state.slots[view][0]} is refilled, then read: {text[:120]}"
        if "isAsync = true" in text or "{is_async}" in text:
            state.in_flight.append([state.slots[view] for view in operands if view in state.seen])
    elif operation == "ttng.warp_group_dot_wait":
        pending = int(re.search(r"pendings = (\d+)", text)[1])
        state.in_flight = state.in_flight[len(state.in_flight) - pending :] if pending else []
    elif operation == "ttng.wait_barrier":
        state.in_flight = state.in_flight[1:]  # in the order in which they were issued


# SASS

_NO_TARGET = re.compile(
    r"(ST|RED|BAR|LDGSTS|LDGDEPBAR|DEPBAR|BRA|EXIT|WARP|MEMBAR|FENCE|ERRBAR|CCTL|NOP|R2UR|U[A-Z]|BSSY|"
    r"BSYNC|BREAK|RET|CALL|SYNCS|VOTEU|ELECT|.SETP|PLOP3|R2P|HGMMA)"
)


def instructions(sass: str) -> list[str]:
    """Without their encoding; branches name places in this list, "BRA @12", instead of addresses."""
    found = re.findall(r"/\*([0-9a-f]{4,})\*/\s+(.*?)\s*;", sass)
    places = {int(address, 16): place for place, (address, _) in enumerate(found)}

    def place(target: re.Match[str]) -> str:
        return f"{target[1]}@{places.get(int(target[2], 16), len(found))}"

    return [re.sub(r"(BRA.*?)0x([0-9a-f]+)", place, text) for _, text in found]


def loops(code: list[str]) -> list[tuple[int, int]]:
    """(place of the branch back, place that it goes to) of every loop in `instructions`."""
    branches = ((place, re.search(r"BRA.*?@(\d+)", text)) for place, text in enumerate(code))
    return [(place, int(to[1])) for place, to in branches if to and int(to[1]) <= place]


def written_in_flight(sass: str) -> list[str]:
    """One line for every register of A or D that is written while a HGMMA in flight may use it."""
    code = instructions(sass)
    if not any("HGMMA" in text for text in code):
        return []
    found: dict[str, None] = {}
    groups: list[list[tuple[str, set[int]]]] = [[]]  # the last one is not closed
    for place in _with_loops_twice(code):
        words = re.sub(r"^@!?\w+\s+", "", code[place])
        name, _, rest = words.partition(" ")
        if name.startswith("HGMMA"):
            columns = int(re.search(r"\.64x(\d+)x", name)[1])
            registers = re.match(r"\s*R(\d+)(?:\.\w+)*,\s*(?:R(\d+))?", rest)
            used = set(range(int(registers[1]), int(registers[1]) + columns // 2))
            if registers[2]:
                used |= set(range(int(registers[2]), int(registers[2]) + 4))
            groups[-1].append((words, used))
            if "gsb0" in rest:
                groups.append([])
        elif wait := re.match(r"WARPGROUP\.DEPBAR\.LE gsb0, 0x([0-9a-f]+)", words):
            closed, pending = groups[:-1], int(wait[1], 16)
            groups = [*(closed[len(closed) - pending :] if pending else []), groups[-1]]
        else:
            written = _targets(name, rest)
            for product, used in (entry for group in groups for entry in group):
                if hit := written & used:
                    found[
                        f"R{min(hit)} is written by {words[:50]!r} while {product[:50]!r} may use it"
                    ] = None
    return list(found)


def _with_loops_twice(code: list[str]) -> Iterator[int]:
    starts, done, place = dict(loops(code)), set(), 0
    while place < len(code):
        yield place
        if place in starts and place not in done and code[place].startswith("@"):
            done.add(place)
            place = starts[place]
        else:
            place += 1


def _targets(name: str, rest: str) -> set[int]:
    """The registers that an instruction writes; of those of several words, all."""
    first = re.match(r"\s*(?:P\w+,\s*)*R(\d+)\b", rest)
    if first is None or _NO_TARGET.match(name):
        return set()
    words = 1
    if name.startswith(("LD", "HMMA")):
        words = 4 if name.startswith("HMMA") or ".128" in name or name.endswith(".4") else 1
        words = 2 if ".64" in name or name.endswith(".2") else words
    elif "WIDE" in name or (name.startswith("CS2R") and ".32" not in name):
        words = 2
    return set(range(int(first[1]), int(first[1]) + words))
