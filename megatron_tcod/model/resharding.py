"""Tensors on their way from ranks of one layout to ranks of another, in one world.

    places = gather_places()                             # of the mesh that is active: who holds which part of which replica
    parts = exchange(transfers, dtype=torch.bfloat16)    # point to point, each tensor once to each rank that needs it

Used between a teacher and a student that are cut differently: what travels are the hidden states at the trained positions,
each step, and once the rows of the teacher's head. Every rank must list the same transfers in the same order.

Not here: what is sent where (`teacher.py`), and weights of a training model, which have `mapping.py`.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_tcod.model import parallel


@dataclass(frozen=True, kw_only=True)
class Place:
    """A rank's coordinates. Example: `Place(rank=5, dp=1, tp=1, cp=0, is_last_stage=False)`"""

    rank: int
    dp: int
    tp: int
    cp: int
    is_last_stage: bool


def gather_places() -> list[Place]:
    """The places of all ranks in the mesh that is active, by rank. Collective over the world."""
    mine = Place(
        rank=parallel.rank(),
        dp=parallel.dp_rank(),
        tp=parallel.tp_rank(),
        cp=parallel.cp_rank(),
        is_last_stage=parallel.is_last_stage(),
    )
    return [Place(**json.loads(data)) for data in parallel.all_gather_bytes(json.dumps(asdict(mine)).encode())]


def last_stage_of(places: list[Place], replica: int) -> list[Place]:
    """Who holds hidden states and head of a data-parallel replica, by rank."""
    return [place for place in places if place.dp == replica and place.is_last_stage]


@dataclass(frozen=True, kw_only=True)
class Transfer:
    """One tensor from one rank to another. Example: `Transfer(source=0, destination=3, size=(17, 64), read=lambda: x)`"""

    source: int
    destination: int
    size: tuple[int, ...]
    read: Callable[[], Tensor]
    """Called on the source only."""


@torch.no_grad()
def exchange(transfers: list[Transfer], *, dtype: torch.dtype) -> list[Tensor | None]:
    """What each transfer brought to this rank, None where another rank is the destination. Collective over the world."""
    rank, device = parallel.rank(), parallel.device()
    arrived: list[Tensor | None] = []
    operations = []
    for transfer in transfers:
        is_source, is_destination = transfer.source == rank, transfer.destination == rank
        is_empty = 0 in transfer.size
        part = transfer.read().contiguous() if is_source and not is_empty else None
        assert part is None or (tuple(part.shape), part.dtype) == (transfer.size, dtype), (part.shape, part.dtype, transfer)
        if not is_destination:
            arrived.append(None)
            if part is not None:
                operations.append(dist.P2POp(dist.isend, part, transfer.destination))
            continue
        if part is None:
            part = torch.empty(transfer.size, dtype=dtype, device=device)
            if not is_empty:
                operations.append(dist.P2POp(dist.irecv, part, transfer.source))
        arrived.append(part)
    if operations:
        for request in dist.batch_isend_irecv(operations):
            request.wait()
    return arrived
