"""Time and peak memory of one step: process CPU time and resident memory on a CPU, events and allocations on a device.

    kept, ms, peak = measure("cpu", lambda i: (inputs[i % 3],), work, warm=lambda: work(inputs[0]), keep=torch.sum)

Not here: what is measured, and what it is compared with (`bench_divergence.py`).
"""

from __future__ import annotations

import ctypes
import gc
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch


def measure(
    device: str, prepare: Callable[[int], tuple], step: Callable, *, warm: Callable, keep: Callable = lambda out: None
) -> tuple[Any, float, int | None]:
    """`keep` of what a run gave; median milliseconds; bytes that a run adds at its peak, its result included, or None.

    `prepare(i)` gives the arguments of run i, outside the clock, and `warm()` is called once before: a run, or a small one
    where that loads and builds as much. On a CPU runs are repeated up to 7 times while they have taken less than 1.5 s
    together, and at least twice unless one takes more than 12 s; the lower of two is their median. On a device they are
    repeated 20 times, with its second-level cache overwritten before each.
    """
    warm()
    if device == "cuda":
        return _measure_cuda(prepare, step, keep)
    arguments = prepare(0)
    memory, start = PeakMemory(), time.process_time()
    out = step(*arguments)
    times, peak, kept = [time.process_time() - start], memory.grown(), keep(out)
    del out
    while (len(times) < 7 and sum(times) < 1.5) or (len(times) < 2 and sum(times) < 12):
        arguments = prepare(len(times))
        start = time.process_time()
        step(*arguments)
        times.append(time.process_time() - start)
    return kept, 1e3 * statistics.median_low(times), peak


def _measure_cuda(prepare: Callable[[int], tuple], step: Callable, keep: Callable) -> tuple[Any, float, int]:
    flush = torch.empty(256 << 20, dtype=torch.int8, device="cuda")  # larger than any second-level cache
    arguments, times = prepare(0), []
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    out = step(*arguments)
    peak, kept = torch.cuda.max_memory_allocated() - before, keep(out)
    del out
    for i in range(20):
        arguments = prepare(i)
        flush.zero_()
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        step(*arguments)
        stop.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(stop))
    return kept, statistics.median(times), peak


class PeakMemory:
    """Resident memory of this process from now on; on Linux with glibc, elsewhere `grown` is None.

    By default glibc keeps freed blocks below 32 MiB for itself, now one more and now one less. Until `grown` is asked it
    gets every block of a megabyte from the system and gives it back when it is freed, so that resident is what lives.
    """

    def __init__(self) -> None:
        gc.collect()
        try:
            self._libc = ctypes.CDLL(None)
            self._libc.malloc.restype, self._libc.free.argtypes = ctypes.c_void_p, [ctypes.c_void_p]
            self._libc.mallinfo2.restype = _Mallinfo
            self._kept = self._take_kept_blocks()
            self._ask_system_from(1 << 20)
            self._libc.malloc_trim(0)
            Path("/proc/self/clear_refs").write_text("5")  # the peak starts again at what is resident
            self._before = self._status("VmRSS")
        except (OSError, AttributeError):
            self._before = None

    def grown(self) -> int | None:
        if self._before is None:
            return None
        grown = max(self._status("VmHWM") - self._before, 0)
        for block in self._kept:
            self._libc.free(block)
        self._ask_system_from(32 << 20)
        return grown

    def _take_kept_blocks(self) -> list[int]:
        """Occupy, without touching it, what earlier runs left free in the heap: it would be handed out first."""
        self._ask_system_from(32 << 20)
        blocks = []
        for size in (16 << 20, 1 << 20):
            while True:
                heap = self._libc.mallinfo2().arena
                block = self._libc.malloc(size)
                if self._libc.mallinfo2().arena > heap:  # nothing of this size was left
                    self._libc.free(block)
                    break
                blocks.append(block)
        return blocks

    def _ask_system_from(self, size: int) -> None:
        self._libc.mallopt(-3, size)  # M_MMAP_THRESHOLD
        self._libc.mallopt(-1, 2 * size)  # M_TRIM_THRESHOLD

    @staticmethod
    def _status(name: str) -> int:
        line = next(x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith(name))
        return 1024 * int(line.split()[1])


class _Mallinfo(ctypes.Structure):
    """glibc's struct mallinfo2: `arena` counts the bytes of the heap."""

    _fields_ = [("arena", ctypes.c_size_t), ("others", ctypes.c_size_t * 9)]
