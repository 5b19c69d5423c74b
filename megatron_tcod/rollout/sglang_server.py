"""SGLang server processes: launched, watched, restarted, and gone when the trainer is gone.

    with launch("/models/student", run_directory=Path("runs/a"), flags={"tp_size": 1}) as server:
        client = SGLangClient(server.url, api_key=server.api_key, admin_key=server.admin_key)
    server = attach("http://10.0.0.5:30000", api_key=..., admin_key=...)      # somebody else's; never stopped here

A launched server listens on 127.0.0.1 at a free port, wants a random key, and a second one for everything but generating.
Keys go through a file that only the user can read and that is removed once the server is up, never through the command line
or the environment. SGLang writes its arguments, keys included, to its log, so the log is readable by the user only.

Between trainer and server stands a supervisor, this file run as a script. It starts the server in a session of its own,
adopts every process that the server leaves behind, and ends them all when its pipe from the trainer closes, which
also happens when the trainer is killed. Should the supervisor itself be killed, the kernel ends the server's main process
and SGLang's workers follow it.

It uses the standard library only, and neither generates nor updates weights.
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import http.client
import json
import os
import re
import secrets
import select
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any
from urllib.parse import urlsplit

LOOPBACK = "127.0.0.1"
PROGRAM = "sglang.launch_server"
GRACE_S = 3.0
"""Between asking the server to end and ending it."""
OWN_FLAGS = ("api_key", "admin_api_key", "host", "port", "model_path", "model", "config")
OTHERS_VARIABLES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "GROUP_RANK", "MASTER_ADDR", "MASTER_PORT")
"""Of the trainer's torchrun; a server that saw them would look for the trainer's ranks."""


class ServerStartFailed(OSError):
    """The server ended or was not healthy in time; the message has the end of its log."""


@dataclass(frozen=True, kw_only=True)
class LaunchSpec:
    """Everything needed to start one server again. Example: `LaunchSpec(model_path="/m", run_directory=Path("runs/a"))`"""

    model_path: str
    run_directory: Path
    flags: Mapping[str, Any]
    name: str = "sglang-0"
    python: str = sys.executable
    """Interpreter of the environment that SGLang is installed in."""
    program: str = PROGRAM
    """Module to run, or path of a launcher script."""
    environment: Mapping[str, str]
    start_timeout_s: float = 900.0

    def __post_init__(self) -> None:
        check_flags("server flags", self.flags)

    def command(self, port: int, secrets_file: Path) -> list[str]:
        loopback = str(Path(__file__).with_name("sglang_loopback.py"))
        program = os.path.abspath(self.program) if self.program.endswith(".py") else self.program
        model = os.path.abspath(self.model_path) if os.path.isdir(self.model_path) else self.model_path
        own = ["--model-path", model, "--host", LOOPBACK, "--port", str(port), "--config", str(secrets_file)]
        return [self.python, loopback, program, *own, *flag_arguments(self.flags)]


class Server:
    """A server's address and keys and, where it was launched here, its life. Use as a context manager, or `stop` it."""

    def __init__(self, url: str, api_key: str, admin_key: str, spec: LaunchSpec | None = None) -> None:
        self.url, self.api_key, self.admin_key = url, api_key, admin_key
        self.num_starts = 0
        self._spec, self._supervisor = spec, None

    @property
    def is_ours(self) -> bool:
        """Launched here, so it may be restarted."""
        return self._spec is not None

    @property
    def is_alive(self) -> bool:
        """As far as this process can know: an attached server always counts as alive."""
        return self._spec is None or (self._supervisor is not None and self._supervisor.poll() is None)

    @property
    def log_path(self) -> Path | None:
        return None if self._spec is None else self._spec.run_directory / f"{self._spec.name}.log"

    @property
    def _secrets_file(self) -> Path:
        return self._spec.run_directory / f".{self._spec.name}.yaml"

    def start(self) -> None:
        """Start and wait until healthy. Raises ServerStartFailed."""
        assert self._spec is not None, "an attached server is started by its owner"
        for _ in range(3):
            port = free_port()
            self._start_at(port)
            if self._await_health():
                self.num_starts += 1
                return
            has_ended, reason, is_port_lost = not self.is_alive, self._end_of_log(), not is_free(port)
            self.stop()
            self._secrets_file.unlink(missing_ok=True)
            if not is_port_lost:  # else another process was faster than the server
                break
        failure = "ended while it started" if has_ended else f"was not healthy within {self._spec.start_timeout_s:g} s"
        raise ServerStartFailed(f"server {self._spec.name} {failure}; its log {self.log_path} ends with: {reason}")

    def restart(self) -> None:
        """A fresh process at a new port, with the weights of its model path and the same keys."""
        self.stop()
        self.start()

    def stop(self) -> None:
        """End the server and everything it started; returns when that is done. Harmless when nothing runs."""
        supervisor, self._supervisor = self._supervisor, None
        if supervisor is None:
            return
        supervisor.stdin.close()
        try:
            supervisor.wait(timeout=GRACE_S + 10)
        except subprocess.TimeoutExpired:
            supervisor.kill()
            supervisor.wait()
        atexit.unregister(self.stop)

    def __enter__(self) -> Server:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: object, trace: TracebackType | None) -> None:
        self.stop()

    def _start_at(self, port: int) -> None:
        spec = self._spec
        spec.run_directory.mkdir(parents=True, exist_ok=True)
        write_private(self._secrets_file, json.dumps({"api-key": self.api_key, "admin-api-key": self.admin_key}))
        write_private(self.log_path, "", append=True)
        inherited = {
            name: value
            for name, value in os.environ.items()
            if name not in OTHERS_VARIABLES and not name.startswith("TORCHELASTIC_")
        }
        self.url = f"http://{LOOPBACK}:{port}"
        self._supervisor = subprocess.Popen(
            [sys.executable, "-I", __file__, str(self.log_path), *spec.command(port, self._secrets_file)],
            stdin=subprocess.PIPE,
            start_new_session=True,
            env={"GLOO_SOCKET_IFNAME": "lo"} | inherited | dict(spec.environment),
        )
        atexit.register(self.stop)

    def _await_health(self) -> bool:
        deadline = time.monotonic() + self._spec.start_timeout_s
        while self.is_alive and time.monotonic() < deadline:
            if status_of(self.url, "/health") == 200 and status_of(self.url, "/model_info", self.api_key) == 200:
                self._secrets_file.unlink(missing_ok=True)
                return True
            time.sleep(0.3)
        return False

    def _end_of_log(self, num_lines: int = 15) -> str:
        lines = self.log_path.read_text(errors="replace").splitlines()
        if lines and re.match(r"\S.*: error: ", lines[-1]):  # a flag that SGLang does not know, under pages of those it does
            return lines[-1]
        return "\n" + "\n".join(lines[-num_lines:])


def launch(
    model_path: str,
    *,
    run_directory: Path,
    flags: Mapping[str, Any] | None = None,
    environment: Mapping[str, str] | None = None,
    **options: Any,
) -> Server:
    """Start a server and wait until it is healthy. `flags` go to SGLang untouched ({"mem_fraction_static": 0.6}); `options`
    are those of LaunchSpec. Raises ServerStartFailed, and ValueError for a flag that is not the user's."""
    spec = LaunchSpec(
        model_path=model_path, run_directory=run_directory, flags=flags or {}, environment=environment or {}, **options
    )
    server = Server("", secrets.token_hex(32), secrets.token_hex(32), spec)
    server.start()
    return server


def check_flags(table: str, flags: Mapping[str, Any]) -> None:
    """ValueError for a flag that is not the user's; `table` is where it stands.

    SGLang takes any beginning of a flag that is the only one of its kind, so a beginning of ours counts as ours.
    """
    taken = sorted(flag for flag in flags if any(own.startswith(flag.replace("-", "_")) for own in OWN_FLAGS))
    if taken:
        raise ValueError(f"[{table}] must not set {', '.join(taken)}: the trainer chooses them; remove these lines")


def attach(url: str, *, api_key: str = "", admin_key: str = "") -> Server:
    """A server that somebody else started and will stop."""
    return Server(url, api_key, admin_key)


def flag_arguments(flags: Mapping[str, Any]) -> list[str]:
    """SGLang's command line from a table: true is a switch, false and None leave it out, a list gives several values."""
    arguments: list[str] = []
    for name, value in flags.items():
        if value is None or value is False:
            continue
        arguments.append("--" + name.replace("_", "-"))
        if isinstance(value, (list, tuple)):
            arguments += [str(item) for item in value]
        elif isinstance(value, Mapping):
            arguments.append(json.dumps(value))
        elif value is not True:
            arguments.append(str(value))
    return arguments


def free_port() -> int:
    with socket.create_server((LOOPBACK, 0)) as listener:
        return listener.getsockname()[1]


def is_free(port: int) -> bool:
    try:
        socket.create_server((LOOPBACK, port)).close()
    except OSError:
        return False
    return True


def status_of(url: str, path: str, key: str = "") -> int:
    """The HTTP status of a GET; 0 when there is no answer."""
    address = urlsplit(url)
    kind = http.client.HTTPSConnection if address.scheme == "https" else http.client.HTTPConnection
    connection = kind(address.hostname, address.port, timeout=10)
    try:
        connection.request("GET", address.path.rstrip("/") + path, headers={"Authorization": f"Bearer {key}"} if key else {})
        return connection.getresponse().status
    except (OSError, http.client.HTTPException):
        return 0
    finally:
        connection.close()


def write_private(path: Path, text: str, *, append: bool = False) -> None:
    """Write a file that only the user can read, whatever it was before."""
    mode = os.O_APPEND if append else os.O_TRUNC
    handle = os.open(path, os.O_WRONLY | os.O_CREAT | mode, 0o600)
    with os.fdopen(handle, "w") as file:
        os.fchmod(handle, 0o600)
        file.write(text)


def supervise(log_path: str, command: list[str]) -> int:
    """Run `command` until it ends or standard input closes, then end all of its processes; its exit code."""
    libc = ctypes.CDLL(None, use_errno=True)
    set_child_subreaper, set_parent_death_signal = 36, 1
    libc.prctl(set_child_subreaper, 1, 0, 0, 0)  # orphans of the server become children of this process
    parent = os.getppid()
    is_told: list[int] = []
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, lambda number, frame: is_told.append(number))
    with open(log_path, "ab") as log:
        server = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            preexec_fn=lambda: libc.prctl(set_parent_death_signal, signal.SIGKILL, 0, 0, 0),
        )
    while server.poll() is None and not is_told and os.getppid() == parent:
        readable, _, _ = select.select([0], [], [], 0.2)
        if readable and not os.read(0, 1):
            break
    if server.poll() is None:
        os.killpg(server.pid, signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            server.wait(timeout=GRACE_S)
    while left := children():
        for child in left:
            with contextlib.suppress(ProcessLookupError):
                os.kill(child, signal.SIGKILL)
        reap()
        time.sleep(0.02)
    return server.returncode or 0


def children() -> list[int]:
    """Processes whose parent is this one, adopted orphans included."""
    found = []
    for entry in os.scandir("/proc"):
        if entry.name.isdigit():
            with contextlib.suppress(OSError):
                stat = Path(entry.path, "stat").read_text()
                if int(stat.rpartition(")")[2].split()[1]) == os.getpid():
                    found.append(int(entry.name))
    return found


def reap() -> None:
    """Take the exit codes of whoever ended."""
    with contextlib.suppress(ChildProcessError):
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass


if __name__ == "__main__":
    raise SystemExit(supervise(sys.argv[1], sys.argv[2:]))
