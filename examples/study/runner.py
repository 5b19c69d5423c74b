"""Runs jobs in parallel, each on a core of its own, and remembers across kills what is finished.

    runner = Runner(jobs, out=Path("runs/study/quick"), launch=(), num_slots=2, say=print)
    failed = runner.run()                   # [] once every job has ended well

    out/jobs.jsonl          what started and ended, with exit status, wall-clock, CPU seconds and memory
    out/settings/NAME.toml  what was given to --config
    out/logs/NAME.log       what its commands printed

A finished job is never run again. One that was killed runs its commands again, and they go on where they were:
training from its newest checkpoint, the others from the start, whose results appear complete or not at all. A job
whose commands have changed since it finished is refused. Two runners on one directory are refused by the journal's lock.
CPU seconds are the kernel's for a command and all its descendants that it waited for.

Every command is a session of its own, so that a signal ends it with what it started; it dies with the runner.
"""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_tcod.config import toml_value
from megatron_tcod.journal import Journal, read_journal
from study.grid import Settings
from study.plan import Job, fingerprints, words

SET_PARENT_DEATH_SIGNAL = 1
"""prctl's number."""


@dataclass
class Running:
    """A job's command in flight. Example: `Running(job, index=0, process=Popen(...), slot=1, since=12.5)`"""

    job: Job
    index: int
    process: subprocess.Popen
    slot: int
    since: float


class Runner:
    """One pass over the jobs. A failed one is named and skipped with all that need it; the others go on."""

    def __init__(
        self, jobs: Sequence[Job], *, out: Path, launch: tuple[str, ...], num_slots: int, say: Callable[[str], None]
    ) -> None:
        self.jobs, self.out, self.launch, self.say = list(jobs), out, launch, say
        self.fingerprints = fingerprints(self.jobs)
        out.mkdir(parents=True, exist_ok=True)
        records = read_records(out)  # before the journal is opened: closing any other descriptor would end its lock
        self.journal = Journal(out / "jobs.jsonl")
        self.done = finished_jobs(records, self.fingerprints, out)
        self.failed: list[str] = []
        self.free_slots = list(range(num_slots))
        self.running: dict[int, Running] = {}
        self.since = time.monotonic()

    def run(self) -> list[str]:
        """Names of the jobs that did not end well, or could not start."""
        self.say(f"{len(self.jobs)} jobs, {len(self.done)} of them finished before; logs in {self.out / 'logs'}")
        handlers = {one: signal.signal(one, _interrupt) for one in (signal.SIGINT, signal.SIGTERM)}
        try:
            while self._start_what_is_ready() or self.running:
                self._wait()
        finally:
            self._end_all()
            for one, handler in handlers.items():
                signal.signal(one, handler)
            self.journal.close()
        return [job.name for job in self.jobs if job.name not in self.done]

    def _start_what_is_ready(self) -> bool:
        """Fill the free slots; whether anything was started."""
        started = False
        busy = {one.job.name for one in self.running.values()}
        for job in self.jobs:
            if not self.free_slots:
                break
            if job.name in self.done or job.name in busy or job.name in self.failed:
                continue
            if all(name in self.done for name in job.needs):
                started |= self._start(job, 0, self.free_slots.pop())
        return started

    def _start(self, job: Job, index: int, slot: int) -> bool:
        """Start the job's command `index`, or a later one where its result is there; finish the job after the last."""
        while index < len(job.commands) and job.commands[index].makes and job.commands[index].makes.exists():
            index += 1
        if index == len(job.commands):
            self._finish(job, slot)
            return True
        settings_path = self.out / "settings" / f"{job.name}.{index}.toml"
        log_path = self.out / "logs" / f"{job.name}.log"
        for path in (settings_path, log_path):
            path.parent.mkdir(parents=True, exist_ok=True)
        settings_path.write_text(settings_toml(job.commands[index].settings), encoding="utf-8")
        line = words(job.commands[index], launch=self.launch, settings_path=settings_path)
        self.journal.append({"job": job.name, "event": "start", "command": index, "time": time.time()})
        with open(log_path, "ab") as log:
            log.write(f"+ {' '.join(line)}\n".encode())
            log.flush()
            process = subprocess.Popen(
                line,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env={"OMP_NUM_THREADS": "1", **os.environ},
                start_new_session=True,
                preexec_fn=lambda: self._settle(slot),
            )
        self.running[process.pid] = Running(job, index, process, slot, time.monotonic())
        return True

    def _settle(self, slot: int) -> None:
        """In the child, before it becomes the command: die with the runner, stay on the core of the slot. A launcher
        gets a signal that it can pass on, and all cores."""
        death_signal = signal.SIGTERM if self.launch else signal.SIGKILL
        ctypes.CDLL(None).prctl(SET_PARENT_DEATH_SIGNAL, death_signal, 0, 0, 0)
        cores = sorted(os.sched_getaffinity(0))
        if not self.launch and slot < len(cores):
            os.sched_setaffinity(0, {cores[slot]})

    def _wait(self) -> None:
        """Take in the end of one command."""
        if not self.running:
            return
        pid, status, usage = os.wait4(-1, 0)
        one = self.running.pop(pid, None)
        if one is None:
            return
        code = one.process.returncode = os.waitstatus_to_exitcode(status)
        self.journal.append(
            {
                "job": one.job.name,
                "event": "end",
                "command": one.index,
                "code": code,
                "wall": time.monotonic() - one.since,
                "cpu": usage.ru_utime + usage.ru_stime,
                "memory_mb": usage.ru_maxrss / 1024,
            }
        )
        if code == 0:
            self._start(one.job, one.index + 1, one.slot)
            return
        self.free_slots.append(one.slot)
        self.failed.append(one.job.name)
        self.say(f"FAILED {one.job.name}: exit code {code}; see {self.out / 'logs' / one.job.name}.log")

    def _finish(self, job: Job, slot: int) -> None:
        self.journal.append({"job": job.name, "event": "done", "fingerprint": self.fingerprints[job.name]})
        self.journal.sync()
        self.done.add(job.name)
        self.free_slots.append(slot)
        self.say(f"[{len(self.done)}/{len(self.jobs)}] {time.monotonic() - self.since:6.0f} s  {job.name}")

    def _end_all(self) -> None:
        """On the way out after a signal or an error: nothing stays behind."""
        for one in self.running.values():
            os.killpg(one.process.pid, signal.SIGTERM)
        for one in self.running.values():
            try:
                one.process.wait(timeout=20)
            except subprocess.TimeoutExpired:
                os.killpg(one.process.pid, signal.SIGKILL)
                one.process.wait()


def _interrupt(number: int, frame: object) -> None:
    raise KeyboardInterrupt(signal.Signals(number).name)


def read_records(out: Path) -> list[dict[str, Any]]:
    """What the runners of a directory wrote."""
    path = out / "jobs.jsonl"
    return read_journal(path).records if path.exists() else []


def finished_jobs(records: Sequence[dict[str, Any]], expected: dict[str, str], out: Path) -> set[str]:
    """Names of the jobs that an earlier run of the same study finished. ValueError where one was another job then."""
    finished = set()
    for record in records:
        name = record.get("job")
        if record.get("event") != "done" or name not in expected:
            continue
        if record["fingerprint"] != expected[name]:
            raise ValueError(
                f"{out} holds {name}, made with other settings than the grid file's of now; give --out another directory, "
                f"or remove {out}"
            )
        finished.add(name)
    return finished


def settings_toml(settings: Settings) -> str:
    """Tables as a run file."""
    tops = [f"{key} = {toml_value(value)}" for key, value in settings.items() if not isinstance(value, dict)]
    tables = [
        "\n".join(["", f"[{part}]", *(f"{key} = {toml_value(value)}" for key, value in table.items())])
        for part, table in settings.items()
        if isinstance(table, dict)
    ]
    return "\n".join([*tops, *tables]) + "\n"
