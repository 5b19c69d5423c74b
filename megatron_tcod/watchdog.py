"""Ends a job of several ranks when one of them is dead or hung, and says which one and where it was.

    with watch_ranks(heartbeat_seconds=120, stall_seconds=1800) as watchdog:      # collective; nothing in a world of one
        watchdog.enter("rollout", step=12)                                       # from the main thread, as it moves on

A thread of each rank reports to the job's store every few seconds: the phase, and where in the code the main thread is.
It listens to the next rank only, so that the traffic grows with the number of ranks and not with its square.

* Under some launchers rank 0 keeps the store: where the store does not answer for `heartbeat_seconds`, rank 0 is to blame.
* A rank that reports nothing for `heartbeat_seconds` is killed, stopped, or its host is gone: the rank that listens to it
  writes the verdict.
* A rank that reports but whose main thread stays in one phase for `stall_seconds` may be hung or may wait for one that is.
  The first to find this reads all reports: the hung ones are those that wait for nobody, else those that have entered
  the fewest phases.

Every rank that finds a verdict leaves with `EXIT_HUNG` and without clean-up, since a process that waits in a collective
cannot be asked to. The launcher (torchrun, Slurm, Kubernetes) then ends what is left and starts the job again where it
was told to; the run continues from its last checkpoint.

Not here: restarting anything, killing another process, hangs before the ranks have met. Time is counted by the thread's
own turns, so a job that is suspended and continued as a whole does not end.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import sys
import threading
import time
from collections.abc import Callable
from types import FrameType
from typing import Any

import torch.distributed as dist

from megatron_tcod.model import parallel

EXIT_HUNG = 75
"""Of a rank that leaves because another is dead or hung; BSD's EX_TEMPFAIL: starting again is right."""
REPORTS_PER_TIMEOUT = 6
LONGEST_PAUSE = 10.0
"""Seconds between two reports, at most."""
PACKAGE = os.path.dirname(__file__) + os.sep
WAITING = (os.path.dirname(dist.__file__) + os.sep, parallel.MEGATRON_WAITS)
"""Code in which a rank waits for others."""


class NoWatchdog:
    """In a world of one, or turned off."""

    def enter(self, phase: str, *, step: int | None = None) -> None:
        pass

    def __enter__(self) -> NoWatchdog:
        return self

    def __exit__(self, *exception: object) -> None:
        pass


def watch_ranks(*, heartbeat_seconds: float, stall_seconds: float) -> Watchdog | NoWatchdog:
    """The watchdog of this rank over the whole world. Collective."""
    if not heartbeat_seconds or parallel.world_size() == 1:
        return NoWatchdog()
    return Watchdog(
        parallel.open_store("watchdog", timeout_seconds=heartbeat_seconds),
        rank=parallel.rank(),
        world_size=parallel.world_size(),
        heartbeat_seconds=heartbeat_seconds,
        stall_seconds=stall_seconds,
    )


class Watchdog:
    """One rank's thread; see the module docstring. `leave` ends the process and is called from the thread."""

    def __init__(
        self,
        store: dist.Store,
        *,
        rank: int,
        world_size: int,
        heartbeat_seconds: float,
        stall_seconds: float,
        leave: Callable[[int], Any] = os._exit,
    ) -> None:
        self._store, self._rank, self._world_size, self._leave = store, rank, world_size, leave
        self._heartbeat_seconds, self._stall_seconds = heartbeat_seconds, stall_seconds
        self._pause = min(heartbeat_seconds / REPORTS_PER_TIMEOUT, LONGEST_PAUSE)
        self._main = threading.get_ident()
        self._report: dict[str, Any] = {"host": socket.gethostname(), "pid": os.getpid(), "is_done": False, "moves": 0}
        self._moves, self._stalled = 0, 0.0
        self._next, self._heard, self._silent = (rank + 1) % world_size, "", 0.0
        self._is_ending = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        self.enter("start")

    def enter(self, phase: str, *, step: int | None = None) -> None:
        """This rank moves on. Cheap: the thread reports it."""
        step = self._report.get("step", 0) if step is None else step
        self._report = self._report | {"phase": phase, "step": step, "moves": self._report["moves"] + 1}

    def __enter__(self) -> Watchdog:
        self._publish(beat=0)
        self._thread.start()
        return self

    def __exit__(self, kind: object, *exception: object) -> None:
        """A rank that leaves in good order says so; one that fails falls silent and is found.

        Where another rank has left by a verdict, this one may first see a broken connection: then the verdict is the reason.
        """
        self._is_ending.set()
        self._thread.join()
        verdict = ""
        with contextlib.suppress(RuntimeError):  # the store may be gone already with the host of rank 0
            if kind is None:
                self._report = self._report | {"is_done": True}
                self._publish(beat=-1)
            elif self._store.check(["verdict"]):
                verdict = self._store.get("verdict").decode()
        if verdict:
            self._end(verdict)

    def _watch(self) -> None:
        beat, before = 0, time.monotonic()
        answered = before
        while not self._is_ending.wait(self._pause):
            now = time.monotonic()
            elapsed, before, beat = min(now - before, 2 * self._pause), now, beat + 1
            verdict = ""
            try:
                self._publish(beat)
                verdict = self._verdict(elapsed)
                answered = now
            except RuntimeError:  # torch's for every failure of the store; at the end of a job it goes before the last rank
                unanswered = time.monotonic() - answered
                if unanswered > self._heartbeat_seconds:
                    verdict = (
                        f"rank 0 or its launcher is dead or stopped, or their host is gone: the store that they keep "
                        f"has not answered for {unanswered:.0f} s"
                    )
            if verdict:
                self._end(verdict)
                return

    def _publish(self, beat: int) -> None:
        where, is_waiting = whereabouts(self._main)
        report = self._report | {"beat": beat, "where": where, "is_waiting": is_waiting}
        self._store.set(f"rank/{self._rank}", json.dumps(report))

    def _verdict(self, elapsed: float) -> str:
        """Why the job must end; empty while it need not."""
        if self._store.check(["verdict"]):
            return self._store.get("verdict").decode()
        self._silent += elapsed
        moves = self._report["moves"]
        # A turn in which the rank has moved counts for nothing: part of it was before the move.
        self._moves, self._stalled = moves, self._stalled + elapsed if moves == self._moves else 0.0
        heard = self._store.get(f"rank/{self._next}").decode() if self._store.check([f"rank/{self._next}"]) else ""
        if heard != self._heard or (heard and json.loads(heard)["is_done"]):
            self._heard, self._silent = heard, 0.0
        if self._silent > self._heartbeat_seconds:
            return self._pronounce(silence(self._next, self._heard, self._silent))
        if self._stalled <= self._stall_seconds:
            return ""
        if self._store.add("judges", 1) == 1:
            keys = [f"rank/{rank}" for rank in range(self._world_size)]
            reports = [json.loads(self._store.get(key)) if self._store.check([key]) else {} for key in keys]
            return self._pronounce(stall(reports, self._stalled))
        return ""  # the judge's verdict comes with one of the next turns, or the judge falls silent

    def _pronounce(self, verdict: str) -> str:
        """The first verdict stands."""
        return self._store.compare_set("verdict", "", verdict).decode()

    def _end(self, verdict: str) -> None:
        if os.environ.get("LOCAL_RANK", "0") == "0":  # the one whose output a launcher shows
            told = f"error (rank {self._rank}): {verdict}; the job ends; a restart continues from its last checkpoint"
            print(told, file=sys.stderr, flush=True)
        sys.stdout.flush()
        self._leave(EXIT_HUNG)


def silence(rank: int, last: str, seconds: float) -> str:
    """The verdict on a rank whose last report is `last`."""
    if not last:
        return f"rank {rank} has not reported once in {seconds:.0f} s"
    report = json.loads(last)
    return (
        f"rank {rank} (host {report['host']}, pid {report['pid']}) is dead or stopped: silent for {seconds:.0f} s, "
        f"last seen in {describe(report)}"
    )


def stall(reports: list[dict[str, Any]], seconds: float) -> str:
    """The verdict on a job that reports and does not move: who is at fault, and where everybody is."""
    known = {rank: report for rank, report in enumerate(reports) if report and not report["is_done"]}
    suspects = [rank for rank, report in known.items() if not report["is_waiting"]]
    if not suspects or len(suspects) == len(known):
        fewest = min(report["moves"] for report in known.values())
        suspects = [rank for rank, report in known.items() if report["moves"] == fewest]
    places: dict[str, list[int]] = {}
    for rank, report in known.items():
        places.setdefault(describe(report), []).append(rank)
    table = "; ".join(f"{ranges(ranks)} in {place}" for place, ranks in places.items())
    first = known[suspects[0]]
    if len(suspects) == len(known):
        return f"no rank has moved on for {seconds:.0f} s and none stands out: ranks {table}"
    return (
        f"rank {ranges(suspects)} (host {first['host']}, pid {first['pid']}) hangs: no rank has moved on for "
        f"{seconds:.0f} s while the others wait for it: ranks {table}"
    )


def describe(report: dict[str, Any]) -> str:
    return f"{report['phase']} of step {report['step'] + 1}, {report['where']}"


def ranges(ranks: list[int]) -> str:
    """`[0, 1, 2, 5]` as `0-2, 5`."""
    runs: list[list[int]] = []
    for rank in ranks:
        if runs and rank == runs[-1][-1] + 1:
            runs[-1] = [runs[-1][0], rank]
        else:
            runs.append([rank, rank])
    return ", ".join(str(start) if start == stop else f"{start}-{stop}" for start, stop in runs)


def whereabouts(thread: int) -> tuple[str, bool]:
    """The innermost line of this package that a thread is in, and whether it waits for other ranks below it."""
    frame: FrameType | None = sys._current_frames().get(thread)
    is_waiting = False
    while frame is not None:
        file = frame.f_code.co_filename
        is_waiting = is_waiting or file.startswith(WAITING)
        if file.startswith(PACKAGE):
            return f"{file.removeprefix(PACKAGE)}:{frame.f_lineno} {frame.f_code.co_name}", is_waiting
        frame = frame.f_back
    return "code outside this package", is_waiting
