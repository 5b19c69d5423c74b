"""Several gloo ranks on this machine, for tests: `run_ranks(4, worker, path)` calls `worker(path)` in 4 processes."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable
from typing import Any

import torch
import torch.multiprocessing


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _start(rank: int, num_ranks: int, port: int, worker: Callable[..., None], args: tuple[Any, ...]) -> None:
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(num_ranks), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port)
    )
    torch.set_num_threads(1)
    worker(*args)


def run_ranks(num_ranks: int, worker: Callable[..., None], *args: Any) -> None:
    """Call `worker(*args)` once per rank, torchrun's variables set; the first exception is raised here."""
    torch.multiprocessing.spawn(_start, (num_ranks, free_port(), worker, args), nprocs=num_ranks, join=True)
