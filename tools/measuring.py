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
    together, and at least twice unless one takes more than 8 s; on a device 20 times, with its second-level cache
    overwritten before each.
    """
    warm()
    if device == "cuda":
        return _measure_cuda(prepare, step, keep)
    arguments = prepare(0)
    memory, start = PeakMemory(), time.process_time()
    out = step(*arguments)
    times, peak, kept = [time.process_time() - start], memory.grown(), keep(out)
    del out
    while (len(times) < 7 and sum(times) < 1.5) or (len(times) < 2 and sum(times) < 8):
        arguments = prepare(len(times))
        start = time.process_time()
        step(*arguments)
        times.append(time.process_time() - start)
    return kept, 1e3 * statistics.median(times), peak


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
    """Resident memory of this process from now on; Linux only, elsewhere `grown` is None."""

    def __init__(self) -> None:
        gc.collect()
        try:
            ctypes.CDLL(None).malloc_trim(0)
            Path("/proc/self/clear_refs").write_text("5")  # the peak starts again at what is resident
            self._before = self._status("VmRSS")
        except (OSError, AttributeError):
            self._before = None

    def grown(self) -> int | None:
        return None if self._before is None else max(self._status("VmHWM") - self._before, 0)

    @staticmethod
    def _status(name: str) -> int:
        line = next(x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith(name))
        return 1024 * int(line.split()[1])
