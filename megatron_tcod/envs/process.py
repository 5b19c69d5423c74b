"""Environments in processes of their own: a deadline on every call, a memory cap, a group that dies as one.

    KIND = WorkerKind(name="alfworld", script=Path("alfworld_worker.py"), packages=("alfworld",))
    worker = WORKERS.borrow(KIND)
    answer = worker.call({"op": "reset", "game": path}, deadline_s=120.0)
    WORKERS.give_back(worker)         # or worker.kill()

Engines of games are foreign code: they crash, hang, leak and start others (Java). So each has a process that leads a
session of its own; an episode borrows one and gives it back. One that faulted is killed with all that it started, one
that died while idle is replaced, one that has played `WorkerKind.episodes` episodes is retired. Each fault is an
`EnvironmentFault` with the name of its outcome and the end of the worker's stderr. What runs on the other side, and the
messages, are in `worker.py`; no pickle crosses the pipe.

Nothing outlives the trainer. A normal exit kills idle workers; however the trainer ends, SIGKILL included, the kernel
closes its end of the lifeline, a pipe on which nothing is ever written, and that sends SIGKILL to the worker's group
(Linux; elsewhere the worker notices the end of its stdin, unless it is stuck in native code).
"""

from __future__ import annotations

import atexit
import importlib.util
import json
import os
import select
import signal
import struct
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_tcod.envs.base import EnvironmentFault, check_observation

PROGRAM = Path(__file__).with_name("worker.py")
MAX_IDLE_WORKERS = 16
"""Of each kind."""


@dataclass(frozen=True, kw_only=True)
class WorkerKind:
    """How the processes of one environment are made. Example: see the module."""

    name: str
    """Of the environment, and of the extra that installs it."""
    script: Path
    """Defines `open_world()`; see `worker.py`."""
    packages: tuple[str, ...] = ()
    """Importable names that must be there."""
    memory_bytes: int = 4 << 30
    """Address space of each process of the group."""
    max_answer_bytes: int = 4 << 20
    """A longer answer is a fault, and is not read."""
    episodes: int = 200
    """Episodes after which a process is replaced, against leaks."""
    environment: Callable[[], Mapping[str, str]] = dict
    """Variables set beside the trainer's own. ValueError where something outside Python is missing."""

    def require(self) -> None:
        """ValueError with the command to run where something is missing."""
        missing = [package for package in self.packages if importlib.util.find_spec(package) is None]
        if missing:
            raise ValueError(
                f"env {self.name} needs the packages {', '.join(self.packages)}; {', '.join(missing)} not found: "
                f"pip install 'megatron_tcod[{self.name}]'"
            )
        self.environment()


class Worker:
    """One process of a kind, with the group that it leads. Used by one thread at a time."""

    def __init__(self, kind: WorkerKind) -> None:
        kind.require()
        self.kind = kind
        self.num_episodes = 0
        self._stderr = tempfile.TemporaryFile()
        lifeline, self._lifeline = os.pipe()
        program = [str(PROGRAM), str(self.kind.script), str(self.kind.memory_bytes), str(lifeline)]
        try:
            self._process = subprocess.Popen(
                [sys.executable, "-P", *program],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self._stderr,
                pass_fds=(lifeline,),
                start_new_session=True,
                env={**os.environ, "PYTHONHASHSEED": "0", **self.kind.environment()},
            )
        except OSError as error:
            os.close(self._lifeline)
            raise EnvironmentFault(f"{self.kind.name} process could not start: {error}") from error
        finally:
            os.close(lifeline)

    @property
    def pid(self) -> int:
        """Of the leader; also the number of the group."""
        return self._process.pid

    @property
    def is_alive(self) -> bool:
        """Whether the leader runs. It is not reaped here: as long as it is not, nobody else gets its number."""
        if self._process.returncode is not None:
            return False
        return os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None

    def call(self, request: dict[str, Any], *, deadline_s: float) -> dict[str, Any]:
        """The answer to one request. Whatever goes wrong kills the group and raises `EnvironmentFault`: a crash, a
        late, oversized or malformed answer, an error that the environment reports itself."""
        end = time.monotonic() + deadline_s
        crash = "env_crash_reset" if request["op"] == "reset" else "env_crash_step"
        try:
            self._send(json.dumps(request).encode(), end)
            (length,) = struct.unpack(">I", self._read(4, end))
            if length > self.kind.max_answer_bytes:
                text = f"it announces an answer of {length} bytes, more than {self.kind.max_answer_bytes}"
                raise EnvironmentFault(text, outcome="env_oversized")
            answer = json.loads(self._read(length, end))
            if "error" in answer:
                raise EnvironmentFault(f"it reports {answer['error']}", outcome=crash)
            check_observation(answer.get("observation", "none"), max_bytes=self.kind.max_answer_bytes)
        except EnvironmentFault as fault:
            raise self._failed(request, fault, fault.outcome) from fault
        except UnicodeDecodeError as error:
            raise self._failed(request, error, "env_invalid_text") from error
        except (OSError, ValueError, EOFError) as error:
            raise self._failed(request, error, crash) from error
        return answer

    def forget_stderr(self) -> None:
        """Start its stderr anew, which would otherwise grow as long as the process lives."""
        self._stderr.seek(0)
        self._stderr.truncate()

    def kill(self) -> None:
        """End the group: the process and everything that it started; safe to call twice."""
        if self._process.returncode is None:
            try:
                os.killpg(self.pid, signal.SIGKILL)
            except ProcessLookupError:  # killed before it could lead a group
                self._process.kill()
            self._process.wait()
            os.close(self._lifeline)
        for file in (self._process.stdin, self._process.stdout, self._stderr):
            file.close()

    def _failed(self, request: dict[str, Any], cause: Exception, outcome: str) -> EnvironmentFault:
        end = self._stderr.seek(0, os.SEEK_END)
        self._stderr.seek(max(0, end - 2000))
        last_words = self._stderr.read().decode(errors="replace").strip()
        self.kill()
        told = f"; its last words: {last_words}" if last_words else ""
        return EnvironmentFault(f"{self.kind.name} process failed in {request['op']}: {cause}{told}", outcome=outcome)

    def _send(self, body: bytes, end: float) -> None:
        """Write a message; a process that does not read must not hold us for ever."""
        descriptor, data = self._process.stdin.fileno(), memoryview(struct.pack(">I", len(body)) + body)
        while data:
            _wait(descriptor, select.POLLOUT, end)
            data = data[os.write(descriptor, data[: select.PIPE_BUF]) :]

    def _read(self, size: int, end: float) -> bytes:
        descriptor, data = self._process.stdout.fileno(), bytearray()
        while len(data) < size:
            _wait(descriptor, select.POLLIN, end)
            chunk = os.read(descriptor, size - len(data))
            if not chunk:
                raise EOFError("the process ended")
            data += chunk
        return bytes(data)


def _wait(descriptor: int, event: int, end: float) -> None:
    """Until the descriptor is ready or closed. By poll: select takes no descriptors beyond 1023."""
    ready = select.poll()
    ready.register(descriptor, event)
    if not ready.poll(1000 * max(0.0, end - time.monotonic())):
        raise EnvironmentFault("no answer within the deadline", outcome="env_hang")


class WorkerEpisode:
    """One episode in a borrowed process, which it holds between `_reset` and `close`. For environments to build on."""

    def __init__(self, kind: WorkerKind, *, reset_deadline_s: float, step_deadline_s: float) -> None:
        self._kind = kind
        self._reset_deadline_s, self._step_deadline_s = reset_deadline_s, step_deadline_s
        self._worker: Worker | None = None
        self._has_started = False

    def close(self) -> None:
        worker, self._worker = self._worker, None
        if worker is not None:
            WORKERS.give_back(worker)

    def _reset(self, **fields: Any) -> dict[str, Any]:
        assert not self._has_started, "an episode is used once: make a new one"
        self._has_started = True
        self._worker = WORKERS.borrow(self._kind)
        return self._worker.call({"op": "reset", **fields}, deadline_s=self._reset_deadline_s)

    def _step(self, **fields: Any) -> dict[str, Any]:
        assert self._worker is not None, "step comes after reset() and before close()"
        return self._worker.call({"op": "step", **fields}, deadline_s=self._step_deadline_s)


class Workers:
    """Warm workers of all kinds; as many as episodes ever ran at once, up to `MAX_IDLE_WORKERS` a kind. Thread-safe."""

    def __init__(self) -> None:
        self._idle: dict[WorkerKind, list[Worker]] = {}
        self._lock = threading.Lock()
        atexit.register(self.close)

    def borrow(self, kind: WorkerKind) -> Worker:
        """A live worker, an idle one if there is one. ValueError where the kind's packages are missing."""
        while True:
            with self._lock:
                idle = self._idle.get(kind)
                worker = idle.pop() if idle else None
            if worker is None:
                return Worker(kind)
            if worker.is_alive:
                return worker
            worker.kill()  # what it started may live on

    def give_back(self, worker: Worker) -> None:
        """Keep it for the next episode, or end it."""
        worker.num_episodes += 1
        is_kept = worker.is_alive and worker.num_episodes < worker.kind.episodes
        if is_kept:
            worker.forget_stderr()
            with self._lock:
                idle = self._idle.setdefault(worker.kind, [])
                is_kept = len(idle) < MAX_IDLE_WORKERS
                if is_kept:
                    idle.append(worker)
        if not is_kept:
            worker.kill()

    def close(self) -> None:
        """End all idle workers."""
        with self._lock:
            idle, self._idle = self._idle, {}
        for workers in idle.values():
            for worker in workers:
                worker.kill()


WORKERS = Workers()
