"""A limit on what a process may hold, for tests of how much some work needs.

Resident memory would count the pages of libraries and files as well, that come and go with what else
the machine does. Linux only.
"""

import contextlib
import ctypes
import gc
import resource
from collections.abc import Iterator
from pathlib import Path

import pytest


def held() -> int:
    """Bytes that this process holds, resident or not."""
    return 1024 * int(Path("/proc/self/status").read_text().partition("VmData:")[2].split()[0])


@contextlib.contextmanager
def at_most(more: int) -> Iterator[int]:
    """An allocation fails that would make this process hold `more` bytes beyond the ones given."""
    gc.collect()
    ctypes.CDLL(None).mallopt(-3, 65536)  # M_MMAP_THRESHOLD: from there on, freed is given back
    ctypes.CDLL(None).malloc_trim(0)
    before, limits = held(), resource.getrlimit(resource.RLIMIT_DATA)
    resource.setrlimit(resource.RLIMIT_DATA, (before + more, limits[1]))
    try:
        with pytest.raises(MemoryError):  # else the limit limits nothing
            bytearray(more + 2**20)
        yield before
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, limits)
