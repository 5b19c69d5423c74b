"""Runs an SGLang server whose torch rendezvous listens on the loopback interface only.

    python megatron_tcod/rollout/sglang_loopback.py sglang.launch_server --host 127.0.0.1 ...
    python megatron_tcod/rollout/sglang_loopback.py path/to/launcher.py --host 127.0.0.1 ...

`--host` bounds SGLang's HTTP port, but torch's TCPStore, which every SGLang worker opens even on one GPU, listens on all
interfaces and asks for no key. `loopback_store` gives it a socket that is bound to the loopback address instead;
`bind_stores_to_loopback` makes torch's own rendezvous do so for loopback addresses. SGLang's worker processes import this
file again, so it holds there too. Stores at other addresses (servers over several nodes) are left alone.

It runs in the server's environment: nothing but the standard library and torch is imported here.
"""

from __future__ import annotations

import importlib
import os
import runpy
import socket
import sys
from pathlib import Path
from typing import Any

import torch.distributed as dist

LOOPBACK = ("127.0.0.1", "localhost")


def loopback_store(
    host_name: str, port: int, world_size: int | None = None, is_master: bool = False, **options: Any
) -> dist.TCPStore:
    """A TCPStore with torch's arguments; its server, where this process is the master, is bound to the loopback address.

    Port 0 takes a free one; `store.port` tells which.
    """
    if not is_master or host_name not in LOOPBACK:
        return dist.TCPStore(host_name, port, world_size, is_master, **options)
    listener = socket.create_server(("127.0.0.1", port), backlog=4096)
    options["master_listen_fd"] = listener.fileno()
    store = dist.TCPStore(host_name, listener.getsockname()[1], world_size, is_master, **options)
    listener.detach()  # the store's now
    return store


def bind_stores_to_loopback() -> None:
    importlib.import_module("torch.distributed.rendezvous").TCPStore = loopback_store  # a function hides that module


if __name__ in ("__main__", "__mp_main__"):  # the server, and each process that it spawns
    bind_stores_to_loopback()
    if __name__ == "__main__":
        del sys.argv[0]
        os.environ["TCOD_SERVER_PROGRAM"] = sys.argv[0]
    program = os.environ["TCOD_SERVER_PROGRAM"]
    if program.endswith(".py"):  # runpy.run_path would put the program in this file's place, and children import that
        exec(compile(Path(program).read_bytes(), program, "exec"), {"__name__": __name__, "__file__": program})
    else:
        runpy.run_module(program, run_name=__name__)
