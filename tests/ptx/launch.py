"""Lets the launchers run their kernels in the emulator: on CPU tensors, from the PTX of a GPU's.

with emulated("sm_90", copies="early") as run:
    y = lora_linear(..., impl="triton")
run.found    # (kernel, rule, what was seen, where) -> how often
run.configs  # (kernel, table, padded rank) that the launchers chose
"""

import collections
import contextlib
import ctypes
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import aot
import numpy as np
import torch
import triton

from lora.kernels import dispatch

from . import machine
from .memory import GlobalMemory
from .program import Program, parse

PROCESSORS = 6  # few, so that small problems have several programs a processor and several splits
_compiled: dict[Any, Program] = {}


@dataclass
class Run:
    found: collections.Counter = field(default_factory=collections.Counter)
    configs: set[tuple[str, str, int]] = field(default_factory=set)
    programs: collections.Counter = field(default_factory=collections.Counter)


@dataclass
class _Kernel:
    """Replaces a kernel: `kernel[grid](...)` runs it in the emulator."""

    kernel: Any
    arch: str
    copies: str
    run: Run

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        def launch(*args: Any, **options: Any) -> None:
            names = self.kernel.arg_names
            values = dict(zip(names, args, strict=False)) | options
            source, compile_options = aot.source(self.kernel, args, options)
            program = _compile(self.arch, source, compile_options)
            whole = (*grid, 1, 1)[:3]
            with _in_emulated_memory([values[name] for name in names]) as (memory, addresses):
                given = [
                    addresses.get(id(values[name]), values[name])
                    for place, name in enumerate(names)
                    if (place,) not in source.constants
                ]
                found = machine.run(program, memory, given, whole, copies=self.copies)
            self.run.programs[self.kernel.__name__] += int(np.prod(whole))
            for what, count in found.items():
                self.run.found[(self.kernel.__name__, *what)] += count

        return launch


def _compile(arch: str, source: Any, options: dict[str, Any]) -> Program:
    key = (arch, source.hash(), str(sorted(options.items())))
    if key not in _compiled:
        made = triton.compile(source, target=aot.target(arch), options=options)
        if made.metadata.shared > aot.SHARED[arch]:
            raise ValueError(
                f"{made.metadata.shared} bytes of shared memory: {arch} has {aot.SHARED[arch]}"
            )
        _compiled[key] = parse(made.asm["ptx"], made.metadata.shared)
    return _compiled[key]


@contextlib.contextmanager
def _in_emulated_memory(values: list[Any]) -> Iterator[tuple[GlobalMemory, dict[int, int]]]:
    """Copies of the tensors' storages, and addresses by the tensors' ids; copied back at the end."""
    tensors = [value for value in values if isinstance(value, torch.Tensor)]
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage() for t in tensors}
    sizes = sum(storage.nbytes() + 2 * GlobalMemory.GAP for storage in storages.values())
    memory = GlobalMemory(sizes + 4 * GlobalMemory.GAP)
    at, views = {}, {}
    for pointer, storage in storages.items():
        buffer = (ctypes.c_uint8 * storage.nbytes()).from_address(pointer) if pointer else b""
        views[pointer] = np.frombuffer(buffer, np.uint8)
        at[pointer] = memory.put(views[pointer], offset=pointer % 16)
    yield (
        memory,
        {
            id(t): at[t.untyped_storage().data_ptr()] + t.storage_offset() * t.element_size()
            for t in tensors
        },
    )
    for pointer, view in views.items():
        if view.size:
            view[:] = memory.get(at[pointer], view.shape, np.uint8)[0]


@contextlib.contextmanager
def emulated(arch: str, copies: str) -> Iterator[Run]:
    """Within the block the launchers compile for `arch` and run in the emulator (see machine.run)."""
    run = Run()
    kernels = aot.launchers_with(
        lambda kernel: _Kernel(kernel, arch, copies, run), arch, PROCESSORS
    )
    with kernels, contextlib.ExitStack() as stack:
        stack.enter_context(mock.patch.object(dispatch, "_find_obstacle", return_value=""))
        for name, module in aot.MODULES.items():
            if hasattr(module, "choose"):
                noted = _noted(module.choose, name, run)
                stack.enter_context(mock.patch.object(module, "choose", noted))
        yield run


def _noted(choose: Any, kernel: str, run: Run) -> Any:
    """`tiling.choose`, which also notes the table and the rank of the config that it takes."""

    def choose_and_note(table: Any, *rest: Any) -> Any:
        padded, config = choose(table, *rest)
        for arch, configs in table.items():
            for rank, candidate in configs.items():
                if candidate is config:
                    run.configs.add((kernel, arch, rank))
        return padded, config

    return choose_and_note
