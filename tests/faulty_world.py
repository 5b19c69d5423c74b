"""A world for `megatron_tcod/envs/worker.py` that breaks in the way that its task is named for.

The fault comes at the third step, or at the reset where the name says so. It also starts a process of its own, whose
number it tells in its first observation, to see what becomes of it.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

BREAKS_AT = 3


def open_world() -> World:
    return World()


class World:
    def __init__(self) -> None:
        self.child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
        self.fault, self.turn, self.kept = "", 0, []

    def reset(self, *, fault: str) -> dict[str, object]:
        self.fault, self.turn = fault, 0
        if fault == "crash on reset":
            os.kill(os.getpid(), signal.SIGSEGV)
        if fault == "hang on reset":
            time.sleep(600)
        return {"observation": f"A room. Process {self.child.pid} lives here."}

    def step(self, *, command: str) -> dict[str, object]:
        self.turn += 1
        return {"observation": self._observe(command) if self.turn >= BREAKS_AT else f"Room {self.turn}."}

    def _observe(self, command: str) -> str:
        match self.fault:
            case "crash on step":
                print("the last words", file=sys.stderr, flush=True)
                os.kill(os.getpid(), signal.SIGSEGV)
            case "error on step":
                raise RuntimeError("the simulator gave up")
            case "hang":
                time.sleep(600)
            case "hang with the lock held":
                sum(range(10**12))  # one call into C: no other thread of this process runs
            case "oversized":
                return "x" * 10_000_000
            case "invalid UTF-8":
                return b"a caf\xe9".decode(errors="surrogateescape")
            case "empty":
                return ""
            case "same for ever":
                return "Room."
            case "out of memory":
                self.kept.append(bytearray(8 << 30))
        return f"Room {self.turn}, after {command}."
