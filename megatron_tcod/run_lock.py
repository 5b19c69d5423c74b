"""One run at a time in a run directory, over all hosts that see it.

    with RunLock(directory):                 # ValueError names the process that is there
        ...

`run.lock` names its holder by host, process id, the process's start and the scheduler's job, and is touched every few
seconds. It is stale, and taken over with a word in the log, when on this host that process is gone (a number in use
again has another start), or when the holder of another host belongs to the same scheduler job, which was requeued, or
has not touched the file for STALE_SECONDS by the file system's own clock. The last cannot tell a host that is paused
from one that is dead, so a holder that finds its lock taken does not remove it.
"""

from __future__ import annotations

import json
import logging
import os
import socket
import threading
import time
from pathlib import Path
from typing import Any

import psutil

LOCK_FILE = "run.lock"
TOUCH_SECONDS = 15.0
STALE_SECONDS = 120.0
JOB_VARIABLES = ("SLURM_JOB_ID", "KUBERNETES_JOB_UID")
"""What names a batch job over all its hosts and starts; the second is set by examples/launch/kubernetes.yaml."""

logger = logging.getLogger(__name__)


class RunLock:
    """Held from `__enter__` to `__exit__`; a killed holder leaves the file, and the next one recognises that."""

    def __init__(self, directory: str | Path) -> None:
        self.path = Path(directory) / LOCK_FILE
        self._own = _describe_self()
        self._released = threading.Event()

    def __enter__(self) -> RunLock:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        mine = self.path.with_name(f".{LOCK_FILE}.{self._own['host']}.{self._own['pid']}")
        mine.write_text(json.dumps(self._own), encoding="utf-8")
        try:
            self._take(mine)
        finally:
            mine.unlink(missing_ok=True)
        threading.Thread(target=self._keep_touching, name="run lock", daemon=True).start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._released.set()
        if _read(self.path) == self._own:
            self.path.unlink(missing_ok=True)

    def _take(self, mine: Path) -> None:
        """Link the complete file under the lock's name: atomic, on NFS too, and never half written."""
        for _ in range(10):
            try:
                _link(mine, self.path)
                return
            except FileExistsError:
                self._remove_if_stale(_read(self.path), now=mine.stat().st_mtime)
        raise ValueError(f"{self.path} comes back each time it is removed; stop the other runs that start here")

    def _remove_if_stale(self, holder: dict[str, Any] | None, *, now: float) -> None:
        """ValueError when somebody alive holds the lock. `now` is the file system's clock."""
        if holder is None and not self.path.exists():
            return  # released meanwhile
        try:
            age = now - self.path.stat().st_mtime
        except FileNotFoundError:
            return
        reason = _why_stale(holder, self._own, age)
        if reason is None:
            host, pid = (holder or {}).get("host"), (holder or {}).get("pid")
            raise ValueError(
                f"{self.path.parent} is in use by process {pid} on {host}; wait for that run, stop it, or choose "
                f"another --save (if that host is gone, the lock expires {STALE_SECONDS:.0f} s after its last sign of life)"
            )
        logger.warning("%s: taking over the lock of a run that is gone: %s", self.path.parent, reason)
        aside = self.path.with_name(f".{LOCK_FILE}.{self._own['host']}.{self._own['pid']}.stale")
        try:
            os.rename(self.path, aside)  # of several that see it stale one gets it
        except FileNotFoundError:
            return
        if _read(aside) != holder:  # a live one had come in between
            os.rename(aside, self.path)
            return
        aside.unlink(missing_ok=True)

    def _keep_touching(self) -> None:
        while not self._released.wait(TOUCH_SECONDS):
            try:
                os.utime(self.path)
            except OSError:
                logger.warning("%s cannot be touched; another host may take this run for dead", self.path)


def _link(source: Path, target: Path) -> None:
    """A second name for a file; where a file system has none, a copy under a name that nobody else gets."""
    try:
        os.link(source, target)
    except FileExistsError:
        raise
    except OSError:
        handle = os.open(target, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
        try:
            os.write(handle, source.read_bytes())
        finally:
            os.close(handle)


def _why_stale(holder: dict[str, Any] | None, own: dict[str, Any], age: float) -> str | None:
    """Why the holder must be gone; None when it may be alive."""
    if holder is None:
        return "the lock is damaged"
    if holder.get("host") == own["host"]:
        return _why_gone(holder)
    if own["job"] and holder.get("job") == own["job"]:
        return f"job {own['job']} was requeued from {holder.get('host')}"
    if age > STALE_SECONDS:
        return f"{holder.get('host')} has not touched it for {age:.0f} s"
    return None


def _why_gone(holder: dict[str, Any]) -> str | None:
    pid = holder.get("pid")
    try:
        start = psutil.Process(pid).create_time()
        distance = abs(start - float(holder.get("process_started", 0.0)))
    except (psutil.Error, TypeError, ValueError):
        return f"process {pid} has ended"
    if distance > 1.0:
        return f"process {pid} is another one by now"
    return None


def _describe_self() -> dict[str, Any]:
    job = next((f"{name}={os.environ[name]}" for name in JOB_VARIABLES if os.environ.get(name)), "")
    pid = os.getpid()
    return {
        "host": socket.gethostname(),
        "pid": pid,
        "process_started": psutil.Process(pid).create_time(),
        "locked": time.time(),
        "job": job,
    }


def _read(path: Path) -> dict[str, Any] | None:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) else None
