"""ALFWorld's engine at arm's length: a process of its own, a deadline on every call, and a few kept warm.

    engine = ENGINES.borrow()
    answer = engine.call({"op": "reset", "game": path, "has_planner": False}, deadline_s=120.0)
    ENGINES.give_back(engine)         # or engine.kill()

The engine is Python around a C++ planner: it can crash, hang and leak, and starting it takes a second. So an episode
borrows a process and gives it back; one that faulted is killed with its whole process group, one
that has played `EPISODES_PER_ENGINE` episodes is replaced. Every fault is an `EnvironmentFault` that carries the end of
the worker's stderr. What the messages mean is in `alfworld_worker.py`; no pickle crosses the pipe.
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
from pathlib import Path
from typing import Any

from megatron_tcod.envs.base import EnvironmentFault

WORKER = Path(__file__).with_name("alfworld_worker.py")
REQUIRED_PACKAGES = ("alfworld", "textworld", "fast_downward")
MAX_ANSWER_BYTES = 64 << 20
MAX_IDLE_ENGINES = 16
EPISODES_PER_ENGINE = 200


def require_packages() -> None:
    """ValueError with the command to run where ALFWorld is not installed."""
    missing = [name for name in REQUIRED_PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        raise ValueError(
            f"env alfworld needs the packages {', '.join(REQUIRED_PACKAGES)}; {', '.join(missing)} not found: "
            "pip install 'megatron_tcod[alfworld]'"
        )


class Engine:
    """One worker process."""

    def __init__(self) -> None:
        require_packages()
        self.num_episodes = 0
        self._stderr = tempfile.TemporaryFile()
        self._process = subprocess.Popen(
            [sys.executable, "-P", str(WORKER)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._stderr,
            start_new_session=True,
            env={**os.environ, "PYTHONHASHSEED": "0"},
        )

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def is_alive(self) -> bool:
        return self._process.poll() is None

    def call(self, request: dict[str, Any], *, deadline_s: float) -> dict[str, Any]:
        """The answer to one request. A crash, a late or a malformed answer kills the process and raises
        `EnvironmentFault`; so does an error that the engine itself reports."""
        end = time.monotonic() + deadline_s
        body = json.dumps(request).encode()
        try:
            self._process.stdin.write(struct.pack(">I", len(body)) + body)
            self._process.stdin.flush()
            (length,) = struct.unpack(">I", self._read(4, end))
            if length > MAX_ANSWER_BYTES:
                raise EnvironmentFault(f"it announces an answer of {length} bytes")
            answer = json.loads(self._read(length, end))
        except (OSError, ValueError, EnvironmentFault) as fault:
            self.kill()
            raise EnvironmentFault(f"alfworld engine failed in {request['op']}: {fault}{self._last_words()}") from fault
        if "error" in answer:
            self.kill()
            raise EnvironmentFault(
                f"alfworld engine reports in {request['op']}: {answer['error']}{self._last_words()}"
            )
        return answer

    def kill(self) -> None:
        """End the process and everything it started; safe to call twice."""
        if self.is_alive:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
        self._process.stdout.close()
        try:
            self._process.stdin.close()
        except BrokenPipeError:  # a request that it died over is still in the buffer
            pass

    def _read(self, size: int, end: float) -> bytes:
        descriptor, data = self._process.stdout.fileno(), bytearray()
        while len(data) < size:
            if not select.select([descriptor], [], [], max(0.0, end - time.monotonic()))[0]:
                raise EnvironmentFault("no answer within the deadline")
            chunk = os.read(descriptor, size - len(data))
            if not chunk:
                raise EnvironmentFault("the process ended")
            data += chunk
        return bytes(data)

    def _last_words(self) -> str:
        self._stderr.seek(max(0, self._stderr.seek(0, os.SEEK_END) - 2000))
        text = self._stderr.read().decode(errors="replace").strip()
        return f"; its last words: {text}" if text else ""


class Engines:
    """Warm engines; as many as episodes ever ran at once, up to `MAX_IDLE_ENGINES`. Safe to use from threads."""

    def __init__(self) -> None:
        self._idle: list[Engine] = []
        self._lock = threading.Lock()
        atexit.register(self.close)

    def borrow(self) -> Engine:
        with self._lock:
            while self._idle:
                engine = self._idle.pop()
                if engine.is_alive:
                    return engine
        return Engine()

    def give_back(self, engine: Engine) -> None:
        engine.num_episodes += 1
        with self._lock:
            is_kept = (
                engine.is_alive
                and engine.num_episodes < EPISODES_PER_ENGINE
                and len(self._idle) < MAX_IDLE_ENGINES
            )
            if is_kept:
                self._idle.append(engine)
        if not is_kept:
            engine.kill()

    def close(self) -> None:
        """End all idle engines."""
        with self._lock:
            idle, self._idle = self._idle, []
        for engine in idle:
            engine.kill()


ENGINES = Engines()
