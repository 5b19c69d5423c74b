"""Training runs as processes of their own that start in a blink: forked from one that has done the imports.

    with RunServer(log_directory) as server:
        run = server.start(flags, num_ranks=2)      # as `torchrun --nproc-per-node 2 -m megatron_tcod.train` would
        run.signal(signal.SIGTERM)
        codes = run.wait(30)                        # one a rank; negative for a signal

A run here has no launcher: nobody ends the other ranks when one dies. Kill all of them.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent / "model"))
from gloo_world import free_port  # noqa: E402

TRAIN = "megatron_tcod.train"


class Run:
    """The ranks of one run."""

    def __init__(self, server: RunServer, pids: list[int], logs: list[Path]) -> None:
        self.pids, self._server, self._logs = pids, server, logs
        self._codes: dict[int, int] = {}

    @property
    def pid(self) -> int:
        return self.pids[0]

    def signal(self, number: int) -> None:
        for pid in self.pids:
            if self.poll(pid) is None:
                os.kill(pid, number)

    def poll(self, pid: int) -> int | None:
        if pid not in self._codes and (code := self._server.ask({"poll": pid})) is not None:
            self._codes[pid] = code
        return self._codes.get(pid)

    def is_running(self) -> bool:
        return any(self.poll(pid) is None for pid in self.pids)

    def wait(self, timeout: float) -> list[int]:
        deadline = time.monotonic() + timeout
        while self.is_running():
            assert time.monotonic() < deadline, f"still running after {timeout} s: {self.said()}"
            time.sleep(0.02)
        return [self._codes[pid] for pid in self.pids]

    def kill(self) -> None:
        self.signal(signal.SIGKILL)
        self.wait(30)

    def said(self) -> str:
        return "".join(path.read_text(errors="replace") for path in self._logs if path.exists())


class RunServer:
    """The process that forks. Used as a context manager; leaves no run behind."""

    def __init__(self, directory: Path) -> None:
        self._directory, self._runs = directory, []
        self._process = subprocess.Popen(
            [sys.executable, "-W", "ignore", __file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
        )

    def ask(self, request: dict) -> int | None:
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        return json.loads(self._process.stdout.readline())

    def start(self, flags: list[str], *, num_ranks: int = 1) -> Run:
        number, port = len(self._runs), str(free_port())
        pids, logs = [], []
        for rank in range(num_ranks):
            logs.append(self._directory / f"run_{number}_rank_{rank}.log")
            world = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(num_ranks)}
            world |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
            pids.append(self.ask({"flags": flags, "log": str(logs[-1]), "env": world if num_ranks > 1 else {}}))
        self._runs.append(Run(self, pids, logs))
        return self._runs[-1]

    def __enter__(self) -> RunServer:
        return self

    def __exit__(self, *exception: object) -> None:
        for run in self._runs:
            run.kill()
        self._process.stdin.close()
        self._process.wait(30)


def child(request: dict) -> None:
    """Becomes a run; never returns. `os._exit`, since what the parent set up is not this process's to tear down."""
    log = os.open(request["log"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.environ.update(request["env"])
    sys.argv = [TRAIN, *request["flags"]]
    from megatron_tcod.config import run_entry_point
    from megatron_tcod.train import main

    code = 1
    try:
        run_entry_point(main)
    except SystemExit as leaving:
        code = leaving.code
    except BaseException:  # noqa: BLE001  as the interpreter would
        import traceback

        traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def serve() -> None:
    import megatron_tcod.train  # noqa: F401

    for line in sys.stdin:
        request = json.loads(line)
        if "poll" in request:
            pid, status = os.waitpid(request["poll"], os.WNOHANG)
            answer = os.waitstatus_to_exitcode(status) if pid else None
        else:
            answer = os.fork()
            if answer == 0:
                child(request)
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    serve()
