"""Global and shared memory, and the rules of who may touch a byte when.

Arrays have one element a byte. A "lane" is a thread of the blocks that run together, numbered through;
`who` holds lanes, `at` addresses, one each. Every method gets the lanes that are active alone.
"""

from collections.abc import Callable
from typing import Any

import numpy as np

Report = Callable[[str, str], None]  # a rule's name, what was seen
SEVERAL = -2  # instead of a lane or a block: more than one
NOBODY = -1


class GlobalMemory:
    """Tensors at aligned addresses, with gaps between them that no access may touch."""

    BASE = 0x7_0000_0000
    GAP = 4096

    def __init__(self, size: int) -> None:
        self.data = np.full(size, 0xCD, np.uint8)
        self.inside = np.zeros(size, bool)
        self.written = np.zeros(size, bool)
        self.writer = np.full(size, NOBODY, np.int32)  # the block that wrote it in this launch
        self.reader = np.full(size, NOBODY, np.int32)
        self.top = self.GAP

    def put(self, array: np.ndarray, initialised: bool = True, offset: int = 0) -> int:
        """The address of a copy of `array`, `offset` bytes above a multiple of 512."""
        raw = np.ascontiguousarray(array).view(np.uint8).reshape(-1)
        at = self.top + offset
        where = slice(at, at + raw.size)
        self.data[where], self.inside[where], self.written[where] = raw, True, initialised
        self.top = (at + raw.size + self.GAP + 511) // 512 * 512
        return self.BASE + at

    def get(self, address: int, shape: tuple[int, ...], dtype: Any) -> tuple[np.ndarray, bool]:
        """The array at an address, and whether all of it is initialised."""
        at = address - self.BASE
        stop = at + int(np.prod(shape)) * np.dtype(dtype).itemsize
        whole = bool(self.written[at:stop].all())
        return self.data[at:stop].view(dtype).reshape(shape).copy(), whole

    def read(self, at: np.ndarray, size: int, block: np.ndarray, report: Report) -> np.ndarray:
        """(lanes, size) bytes."""
        index = self._index(at, size, report)
        if not self.written[index].all():
            report("uninitialised", "global memory is read that nothing has written")
        blocks = block[:, None]
        if ((self.writer[index] != NOBODY) & (self.writer[index] != blocks)).any():
            report("programs", "a block reads what another one of this launch writes")
        readers = self.reader[index]
        self.reader[index] = np.where((readers == NOBODY) | (readers == blocks), blocks, SEVERAL)
        return self.data[index]

    def write(self, at: np.ndarray, raw: np.ndarray, block: np.ndarray, report: Report) -> None:
        index = self._index(at, raw.shape[1], report)
        blocks = block[:, None]
        for before, what in ((self.writer[index], "writes"), (self.reader[index], "reads")):
            if ((before != NOBODY) & (before != blocks)).any():
                report("programs", f"a block writes what another one of this launch {what}")
        self.data[index], self.written[index] = raw, True
        self.writer[index] = blocks
        if (self.data[index] != raw).any():
            report("race", "threads write different values to one place of global memory")
        elif (self.writer[index] != blocks).any():
            report("programs", "two blocks write one place")

    def _index(self, at: np.ndarray, size: int, report: Report) -> np.ndarray:
        index = (at - self.BASE)[:, None] + np.arange(size)
        clipped = np.clip(index, 0, self.data.size - 1)
        if (index != clipped).any() or not self.inside[clipped].all():
            report("bounds", "global memory outside of every tensor")
        if (at % size).any():
            report("alignment", f"global addresses that are not multiples of {size}")
        return clipped


class SharedMemory:
    """The shared memory of several blocks, one after the other.

    Time is counted in barriers of the block, and between those in barriers of the warps. All blocks and
    warps are in step, so one clock serves them.
    """

    PER_BYTE = (
        *("data", "written", "writer", "write_time", "reader", "read_time", "read_warp"),
        *("write_step", "read_step", "group", "group_time", "copied_to", "multiplied", "generic"),
    )

    def __init__(self, blocks: int, size: int, threads: int) -> None:
        self.size, self.threads = size, threads
        n = blocks * size
        self.data = np.full(n, 0xEE, np.uint8)
        self.written = np.zeros(n, bool)
        self.writer, self.write_time, self.write_step = (
            np.full(n, NOBODY, np.int32) for _ in range(3)
        )
        self.reader, self.read_time, self.read_step = (
            np.full(n, NOBODY, np.int32) for _ in range(3)
        )
        self.read_warp = np.full(n, NOBODY, np.int32)
        # The warp group that read it by a wgmma which has been waited for, and when.
        self.group, self.group_time = (np.full(n, NOBODY, np.int32) for _ in range(2))
        self.copied_to = np.zeros(n, bool)  # by a cp.async that is not waited for
        self.multiplied = np.zeros(n, np.int16)  # wgmmas that read it and are not waited for
        self.generic = np.zeros(n, bool)  # written by st or cp.async since the last proxy fence
        self.time = self.step = 0

    def part(self, blocks: np.ndarray) -> "SharedMemory":
        """A copy of the memory of some blocks (bools)."""
        new = object.__new__(SharedMemory)
        new.__dict__.update(self.__dict__)
        for name in self.PER_BYTE:
            setattr(new, name, getattr(self, name).reshape(-1, self.size)[blocks].reshape(-1))
        return new

    def index(self, at: np.ndarray, who: np.ndarray, size: int, report: Report) -> np.ndarray:
        """(lanes, size): places in the arrays."""
        offset = at[:, None] + np.arange(size)
        inside = np.clip(offset, 0, self.size - 1)
        if (offset != inside).any():
            report("bounds", f"shared memory outside of its {self.size} bytes")
        if (at % size).any():
            report("alignment", f"shared addresses that are not multiples of {size}")
        return inside + (who // self.threads * self.size)[:, None]

    def read(self, at: np.ndarray, who: np.ndarray, size: int, report: Report) -> np.ndarray:
        """(lanes, size) bytes."""
        index = self.index(at, who, size, report)
        self.check_ready(index, report)
        lane, warp = who[:, None], who[:, None] // 32
        if self._unordered_write(index, lane, warp).any():
            report("race", "shared memory is read that another thread writes")
        readers, same = self.reader[index], self.read_time[index] == self.time
        self.read_warp[index] = np.where(same & (self.read_warp[index] != warp), SEVERAL, warp)
        self.reader[index] = np.where(same & (readers != lane), SEVERAL, lane)
        self.read_time[index], self.read_step[index] = self.time, self.step
        several = index[(self.reader[index] != lane) & (self.reader[index] != SEVERAL)]
        self.reader[several] = SEVERAL  # of this access: the last one was noted
        other = index[(self.read_warp[index] != warp) & (self.read_warp[index] != SEVERAL)]
        self.read_warp[other] = SEVERAL
        return self.data[index]

    def check_ready(self, index: np.ndarray, report: Report) -> None:
        """What both proxies must not read."""
        if self.copied_to[index].any():
            report("in flight", "shared memory is read that a cp.async may still write")
        if not (self.written[index] | self.copied_to[index]).all():
            report("uninitialised", "shared memory is read that nothing has written")

    def write(self, at: np.ndarray, who: np.ndarray, raw: np.ndarray, report: Report) -> None:
        index = self.index(at, who, raw.shape[1], report)
        self.check_free(index, who, report)
        self.land(index, who, raw)
        if (self.data[index] != raw).any():
            report("race", "threads write different values to one place of shared memory")

    def check_free(self, index: np.ndarray, who: np.ndarray, report: Report) -> None:
        """That nobody else may still use these bytes, which are about to be written."""
        lane, warp = who[:, None], who[:, None] // 32
        if self.copied_to[index].any():
            report("in flight", "shared memory is written that a cp.async may still write")
        if (self.multiplied[index] > 0).any():
            report("in flight", "shared memory is written that a wgmma may still read")
        if self._unordered_write(index, lane, warp).any():
            report("race", "shared memory is written that another thread writes")
        now = self.read_time[index] == self.time
        ordered = (self.read_warp[index] == warp) & (self.read_step[index] < self.step)
        if (now & (self.reader[index] != lane) & ~ordered).any():
            report("race", "shared memory is written that another thread reads")
        now = self.group_time[index] == self.time
        if (now & (self.group[index] != lane // 128)).any():
            report("race", "shared memory is written that another warp group's wgmma reads")

    def land(self, index: np.ndarray, who: np.ndarray, raw: np.ndarray) -> None:
        """Write without a check, as the threads `who`."""
        self.data[index], self.written[index] = raw, True
        self.writer[index] = who[:, None]
        self.write_time[index], self.write_step[index] = self.time, self.step
        several = index[self.writer[index] != who[:, None]]
        self.writer[several] = SEVERAL  # that agree: Triton lets copies of a value be stored twice
        self.generic[index] = True

    def _unordered_write(self, index: np.ndarray, lane: np.ndarray, warp: np.ndarray) -> np.ndarray:
        """Whether another thread wrote it, and no barrier was passed since."""
        writer = self.writer[index]
        same_warp = (writer >= 0) & (writer // 32 == warp) & (self.write_step[index] < self.step)
        return (self.write_time[index] == self.time) & (writer != lane) & ~same_warp

    def barrier(self) -> None:
        self.time += 1

    def warp_barrier(self) -> None:
        self.step += 1

    def proxy_fence(self) -> None:
        self.generic &= self.copied_to
