"""Where episodes of WebShop are served: a server attached to by its url, or one launched here and watched.

    shop = shop_of(ShopOptions(webshop="/data/WebShop", python="/data/webshop-env/bin/python"))
    link = shop.link()                     # an HttpLink; launches the server, or launches it again after it died

A launched server (`webshop_server.py`) runs in the Python that WebShop is installed in, in a process group of its own,
listens on a free port of 127.0.0.1, and ends when its standard input closes: so also when this process is killed. It
loads the catalogue once for all episodes of this process. Its death ends the episodes that it held as
`EnvironmentFault`; the next `link()` launches another, which has the same goals because their prices are drawn from the
same seed. A launch that fails is a ValueError with the server's last words, but `EnvironmentFault` where the server has
run before, `MAX_FAILED_LAUNCHES` times in a row at most: something may have killed it while it loaded.

Every process launches its own; with many ranks on a node and a large catalogue start one by hand and give its url.
"""

from __future__ import annotations

import atexit
import functools
import json
import logging
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import dataclass
from pathlib import Path

from megatron_tcod.envs.base import EnvironmentFault
from megatron_tcod.envs.http_link import HttpLink, NoAnswer, is_readable

SERVER = Path(__file__).with_name("webshop_server.py")
INSTALL = "install it as its README says (github.com/princeton-nlp/WebShop), in a Python of its own"
OBSERVATION_MODES = ("text_rich", "text")
CATALOGUE_SIZES = (0, 100, 1000, 100_000)
MAX_LAST_WORDS = 2000
MAX_FAILED_LAUNCHES = 3
DEATH_S = 0.2
"""How long after its connections a dying server may be seen alive."""

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class ShopOptions:
    """The options of the family `webshop`. Of an attached server all but the last three are its own affair."""

    url: str = ""
    """Server to attach to. Empty: launch one."""
    webshop: str = ""
    """Folder of the installation, the one that holds `web_agent_site`. Empty: $WEBSHOP_ROOT."""
    python: str = ""
    """The Python that WebShop is installed in. Empty: $WEBSHOP_PYTHON, else this one."""
    data: str = ""
    """Folder of the catalogue's files. Empty: where WebShop's own `utils.py` says."""
    num_products: int = 1000
    """Size of catalogue and index: 100, 1,000 or 100,000; 0 for all."""
    human_goals: bool = True
    """Instructions that people wrote; False: those made from attributes."""
    observation_mode: str = "text_rich"
    """`text_rich` marks what can be clicked; `text` joins all texts with separators."""
    memory_gb: float = 64.0
    """Address space of a launched server, its Java virtual machine included; 0 for no limit."""
    start_deadline_s: float = 1800.0
    """Loading the whole catalogue takes minutes."""
    reset_deadline_s: float = 120.0
    step_deadline_s: float = 120.0
    """Calls of all episodes queue at one server."""
    show_admissible: bool = False
    """Add a line with the actions of the moment to each observation."""

    def __post_init__(self) -> None:
        if self.observation_mode not in OBSERVATION_MODES:
            raise ValueError(f"webshop has no observation_mode {self.observation_mode!r}; use one of {OBSERVATION_MODES}")
        if self.num_products not in CATALOGUE_SIZES:
            raise ValueError(f"webshop has no num_products {self.num_products}; use one of {CATALOGUE_SIZES} (0: all)")

    def command(self) -> list[str]:
        """The launch of a server; ValueError where WebShop or its Python is not there."""
        root = self.webshop or os.environ.get("WEBSHOP_ROOT", "")
        if not root:
            raise ValueError(f"webshop needs the folder of your WebShop: {INSTALL}, then give webshop=..., or a url=...")
        if not (Path(root) / "web_agent_site" / "envs").is_dir():
            raise ValueError(f"webshop {root!r} holds no web_agent_site/envs; {INSTALL}, and name its folder")
        python = self.python or os.environ.get("WEBSHOP_PYTHON", "") or sys.executable
        if shutil.which(python) is None:
            raise ValueError(f"webshop python {python!r} cannot be run; name the interpreter WebShop is installed in")
        arguments = ["--webshop", str(Path(root).resolve()), "--num-products", str(self.num_products)]
        arguments += ["--observation-mode", self.observation_mode, "--memory-gb", str(self.memory_gb)]
        arguments += ["--data", str(Path(self.data).resolve())] if self.data else []
        arguments += [] if self.human_goals else ["--synthetic-goals"]
        return [python, str(SERVER), *arguments, "--exit-with-stdin"]


class AttachedShop:
    """A server that somebody else started."""

    def __init__(self, url: str) -> None:
        self._link = HttpLink(url)

    def link(self) -> HttpLink:
        return self._link

    def explain(self, fault: EnvironmentFault, link: HttpLink) -> EnvironmentFault:
        """The fault of a call, as it was."""
        return fault


class LaunchedShop:
    """A server of this process, launched when it is first needed and again when it died. Threads may share it."""

    def __init__(self, options: ShopOptions) -> None:
        self._options = options
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._link: HttpLink | None = None
        self._stderr = tempfile.TemporaryFile("a+b")  # reading the end does not move where the server writes
        self.num_launches = self._num_failed = 0
        self._has_run = False
        atexit.register(self.stop)

    @property
    def pid(self) -> int | None:
        return self._process.pid if self._process else None

    def link(self) -> HttpLink:
        """A link to the running server. ValueError or `EnvironmentFault` with its last words where it does not start."""
        with self._lock:
            if self._process is not None and has_ended(self._process.pid):
                logger.warning("the webshop server ended, launching another%s", self._last_words())
                self._end()
            if self._link is None:
                self._link = self._launch()
            return self._link

    def explain(self, fault: EnvironmentFault, link: HttpLink) -> EnvironmentFault:
        """The fault of a call with the server's last words, if it died. A server that hangs is ended."""
        with self._lock:
            if link is not self._link:
                return fault
            if isinstance(fault, NoAnswer):
                self._end()
                return EnvironmentFault(f"{fault}; ended the webshop server{self._last_words()}")
            end = time.monotonic() + DEATH_S
            while not has_ended(self._process.pid):
                if time.monotonic() > end:
                    return fault
                time.sleep(0.01)
            self._end()
            return EnvironmentFault(f"{fault}; the webshop server ended{self._last_words()}")

    def stop(self) -> None:
        """End the server and all it started; safe to call twice."""
        with self._lock:
            self._end()

    def _launch(self) -> HttpLink:
        command = self._options.command()
        self.num_launches += 1
        self._stderr.truncate(0)
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._stderr,
            start_new_session=True,
            env={**os.environ, "PYTHONHASHSEED": "0", "PYTHONUTF8": "1"},
        )
        end = time.monotonic() + self._options.start_deadline_s
        line = b""
        while not line.endswith(b"\n"):
            is_ready = is_readable(self._process.stdout.fileno(), max(0.0, end - time.monotonic()))
            chunk = os.read(self._process.stdout.fileno(), 4096) if is_ready else b""
            if not chunk:
                self._end()
                why = "ended" if is_ready else f"was not ready within {self._options.start_deadline_s:g} s"
                self._num_failed += 1
                kind = EnvironmentFault if self._has_run and self._num_failed < MAX_FAILED_LAUNCHES else ValueError
                raise kind(f"the webshop server {why}{self._last_words()}; it was launched as {' '.join(command)}")
            line += chunk
        self._has_run, self._num_failed = True, 0
        return HttpLink(f"http://127.0.0.1:{json.loads(line)['port']}")

    def _end(self) -> None:
        process, self._process, self._link = self._process, None, None
        if process is None:
            return
        os.killpg(process.pid, signal.SIGKILL)  # not waited for yet, so the number is still its own
        process.wait()
        process.stdin.close()
        process.stdout.close()

    def _last_words(self) -> str:
        self._stderr.seek(max(0, self._stderr.seek(0, os.SEEK_END) - MAX_LAST_WORDS))
        text = self._stderr.read().decode(errors="replace").strip()
        return f"; its last words: {text}" if text else ""


def has_ended(pid: int) -> bool:
    """Whether a child ended; it is left to be waited for, so that its number is not given to another."""
    return os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None


Shop = AttachedShop | LaunchedShop


@functools.cache
def launched_shop(options: ShopOptions) -> LaunchedShop:
    """One server for all that ask with the same options."""
    return LaunchedShop(options)


def shop_of(options: ShopOptions) -> Shop:
    """The server that the options stand for. ValueError for a url that is none."""
    if options.url:
        return AttachedShop(options.url)
    served = {"reset_deadline_s": 0.0, "step_deadline_s": 0.0, "show_admissible": False}
    return launched_shop(ShopOptions(**{**vars(options), **served}))
