"""The program that holds one environment at arm's length: requests on stdin, answers on stdout.

    python -P megatron_tcod/envs/worker.py SCRIPT MEMORY_BYTES LIFELINE      # started by `process.py`, not by hand

SCRIPT is a Python file with `open_world()`, whose result answers `reset(**fields) -> dict` and `step(**fields) -> dict`.
A message is four bytes of length, big-endian, and that much UTF-8 JSON. A request is `{"op": "reset" or "step", ...}` with
the fields of the call; an answer is what the call returned, with the text as `observation`, or `error`.

Run by path and with `-P`: the folder beside it holds files that would hide packages of the same name. It imports nothing
of this project, so that a worker does not pay for torch. It ends, and its whole process group with it, when stdin closes or
when the other end of the pipe LIFELINE closes, so that a parent that is killed leaves nothing behind; the second is the
kernel's doing and needs no cooperation of a world that is stuck. Native code prints to descriptor 1, hence the answers go
through a copy of it and descriptor 1 itself is turned to stderr.
"""

from __future__ import annotations

import fcntl
import importlib.util
import json
import os
import queue
import resource
import select
import signal
import struct
import sys
import threading
import traceback
from typing import Any, BinaryIO

F_SETSIG = 10
"""Linux: which signal a descriptor with O_ASYNC sends."""


def main() -> None:
    script, memory_bytes, lifeline = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
    die_with(lifeline)
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    resource.setrlimit(resource.RLIMIT_AS, (memory_bytes, memory_bytes))
    requests: queue.SimpleQueue[dict[str, Any]] = queue.SimpleQueue()
    threading.Thread(target=_listen, args=(sys.stdin.buffer, requests), daemon=True).start()
    world = None
    while True:
        request = requests.get()
        try:
            if world is None:
                world = load_script(script).open_world()
            answer = getattr(world, request.pop("op"))(**request)
        except (Exception, SystemExit) as error:  # there are planners that call sys.exit on a game they cannot read
            traceback.print_exc()
            answer = {"error": f"{type(error).__name__}: {error}"}
        body = json.dumps(answer).encode()
        answers.write(struct.pack(">I", len(body)) + body)
        answers.flush()


def load_script(path: str) -> Any:
    """The module of a file that no import finds."""
    spec = importlib.util.spec_from_file_location("world", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules["world"] = module
    spec.loader.exec_module(module)
    return module


def die_with(lifeline: int) -> None:
    """Have the kernel kill this process group once nobody holds the other end of the pipe."""
    if sys.platform != "linux":
        return
    fcntl.fcntl(lifeline, fcntl.F_SETOWN, -os.getpgrp())
    fcntl.fcntl(lifeline, F_SETSIG, signal.SIGKILL)
    fcntl.fcntl(lifeline, fcntl.F_SETFL, fcntl.fcntl(lifeline, fcntl.F_GETFL) | os.O_ASYNC)
    closed = select.poll()
    closed.register(lifeline, 0)
    if closed.poll(0):  # before we asked
        _end_group()


def _listen(stdin: BinaryIO, requests: queue.SimpleQueue[dict[str, Any]]) -> None:
    while len(head := stdin.read(4)) == 4:
        requests.put(json.loads(stdin.read(struct.unpack(">I", head)[0])))
    _end_group()


def _end_group() -> None:
    os.killpg(os.getpgrp(), signal.SIGKILL)


if __name__ == "__main__":
    main()
