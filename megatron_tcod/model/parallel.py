"""The process mesh: tensor, context, pipeline, expert and data parallel ranks, on Megatron's parallel_state.

    layout = ParallelLayout(tensor_model_parallel_size=2)
    initialize(layout)            # under torchrun, or alone as a world of one
    other = build_mesh(ParallelLayout(pipeline_model_parallel_size=2))
    with other.active():          # the same ranks in other groups, for a model of another layout
        ...
    shutdown()

gloo without CUDA, NCCL with it. Bytes travel as tensors (`all_gather_bytes`), never as pickled objects. What the sizes
mean for a model is `build.py`, for a microbatch `context.py`.
"""

from __future__ import annotations

import contextlib
import datetime
import gc
import os
import re
import secrets
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state, tensor_parallel

from megatron_tcod.model import cpu

MEGATRON_WAITS = os.path.join(os.path.dirname(tensor_parallel.__file__), "")
"""Code of megatron-core that waits for other ranks without a call of torch.distributed on the stack."""


@dataclass(frozen=True, kw_only=True)
class ParallelLayout:
    """How one model replica is cut over ranks; data parallelism is what remains of the world.

    Example: `ParallelLayout(tensor_model_parallel_size=2, pipeline_model_parallel_size=2)` on 8 ranks has dp 2.
    """

    tensor_model_parallel_size: int = 1
    pipeline_model_parallel_size: int = 1
    virtual_pipeline_model_parallel_size: int | None = None
    """Model chunks per pipeline rank; None is the plain 1F1B schedule, 2 or more the interleaved one."""
    context_parallel_size: int = 1
    """Ranks that share the tokens of each packed microbatch; see `context.py`."""
    expert_model_parallel_size: int = 1
    """Ranks that share the experts of each layer: neighbours among those that hold the same weights otherwise (cp * dp).
    Each of them sends its tokens to the ranks of their experts, so it adds no ranks to a replica but joins replicas."""
    sequence_parallel: bool = False
    """Between the layers' matrix products each tensor-parallel rank holds only its part of the tokens."""

    def __post_init__(self) -> None:
        for kind in ("tensor_model", "pipeline_model", "context", "expert_model"):
            if getattr(self, f"{kind}_parallel_size") < 1:
                raise ValueError(f"{kind}_parallel_size must be at least 1, got {getattr(self, f'{kind}_parallel_size')}")
        if self.sequence_parallel and self.tensor_model_parallel_size == 1:
            raise ValueError(
                "sequence_parallel cuts tokens over the tensor-parallel ranks and tensor_model_parallel_size is 1; raise "
                "tensor_model_parallel_size or leave sequence_parallel off"
            )
        virtual = self.virtual_pipeline_model_parallel_size
        if virtual is not None and (virtual < 2 or self.pipeline_model_parallel_size < 2):
            raise ValueError(
                f"virtual_pipeline_model_parallel_size {virtual} needs at least 2 chunks and "
                f"pipeline_model_parallel_size >= 2, got {self.pipeline_model_parallel_size}; leave it unset for the "
                "schedule without interleaving"
            )

    @property
    def model_parallel_size(self) -> int:
        """Ranks in one model replica."""
        return self.tensor_model_parallel_size * self.pipeline_model_parallel_size * self.context_parallel_size

    @property
    def token_multiple(self) -> int:
        """The tokens of a microbatch are padded to a multiple of this, so that every rank holds an equal part."""
        return self.context_parallel_size * (self.tensor_model_parallel_size if self.sequence_parallel else 1)


def check_world_size(layout: ParallelLayout, world_size: int) -> int:
    """The data-parallel size; ValueError when no whole number of replicas fills the world, or experts are not shared by an
    equal number of ranks each."""
    dp, rest = divmod(world_size, layout.model_parallel_size)
    if rest or dp == 0:
        tp, pp = layout.tensor_model_parallel_size, layout.pipeline_model_parallel_size
        cp, unit = layout.context_parallel_size, layout.model_parallel_size
        raise ValueError(
            f"world size {world_size} != tp {tp} * pp {pp} * cp {cp} * dp for any whole dp; start a multiple of {unit} "
            f"processes (torchrun --nproc-per-node {unit * max(1, dp + (rest > 0))}) or change the parallel sizes"
        )
    ep, copies = layout.expert_model_parallel_size, dp * layout.context_parallel_size
    if copies % ep:
        raise ValueError(
            f"expert_model_parallel_size {ep} does not divide the {copies} ranks of the world of {world_size} that hold the "
            f"same weights (cp {layout.context_parallel_size} * dp {dp}); choose a divisor of {copies}, or start a multiple "
            f"of {world_size // copies * ep} processes"
        )
    return dp


def initialize(layout: ParallelLayout, *, seed: int = 1234, timeout_minutes: float = 10) -> None:
    """Join the world and build Megatron's process groups for `layout`. Collective over all ranks.

    Under torchrun (RANK, WORLD_SIZE in the environment) it joins that world, otherwise it is a world of one. Called
    again, it keeps the world and replaces the groups. ValueError when the world size does not fit the layout.
    """
    cpu.install()
    timeout = datetime.timedelta(minutes=timeout_minutes)
    if not dist.is_initialized():
        check_world_size(layout, int(os.environ.get("WORLD_SIZE", "1")))
        _join_world(timeout)
    check_world_size(layout, dist.get_world_size())
    if parallel_state.model_parallel_is_initialized():
        _close_groups()
    _build_groups(layout, timeout_minutes)
    tensor_parallel.model_parallel_cuda_manual_seed(seed)


def _close_groups() -> None:
    """Megatron only forgets its groups; gloo keeps threads and sockets for each, NCCL memory.

    They live until the last reference goes, and models refer to groups in cycles. A group that is gone on one rank makes
    the threads of gloo on the others spin.
    """
    for group in parallel_state._global_process_group_list or []:
        if isinstance(group, dist.ProcessGroup):
            dist.destroy_process_group(group)
    parallel_state.destroy_model_parallel()
    gc.collect()


def _build_groups(layout: ParallelLayout, timeout_minutes: float) -> None:
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=layout.tensor_model_parallel_size,
        pipeline_model_parallel_size=layout.pipeline_model_parallel_size,
        virtual_pipeline_model_parallel_size=layout.virtual_pipeline_model_parallel_size,
        context_parallel_size=layout.context_parallel_size,
        expert_model_parallel_size=layout.expert_model_parallel_size,
        expert_tensor_parallel_size=layout.tensor_model_parallel_size,  # an expert is cut like everything else
        distributed_timeout_minutes=max(1, round(timeout_minutes)),
        create_gloo_process_groups=False,
    )


@dataclass(frozen=True)
class Mesh:
    """A second layout over the same ranks, for a model that is cut otherwise; `build_mesh` makes one.

    Megatron knows one set of groups, and so do this file's functions: inside `active()` it is this mesh's.
    """

    layout: ParallelLayout
    _state: dict[str, Any]

    @contextlib.contextmanager
    def active(self) -> Iterator[None]:
        """Build and run the other model in here; the groups of before come back at the end. Not collective."""
        before = _group_state()
        vars(parallel_state).update(self._state)
        try:
            yield
        finally:
            vars(parallel_state).update(before)


def build_mesh(layout: ParallelLayout, *, timeout_minutes: float = 10) -> Mesh:
    """Groups of `layout` beside those of `initialize`, which stay in force. Collective over all ranks.

    They last until `initialize` is called again or `shutdown`."""
    check_world_size(layout, dist.get_world_size())
    before, open_groups = _group_state(), parallel_state._global_process_group_list
    parallel_state.destroy_model_parallel()  # forgets the groups, which live on in `before`
    try:
        _build_groups(layout, timeout_minutes)
        return Mesh(layout, _group_state())
    finally:
        vars(parallel_state).update(before)
        parallel_state._global_process_group_list = open_groups + (parallel_state._global_process_group_list or [])


def _group_state() -> dict[str, Any]:
    """Every group, rank and size that parallel_state keeps; its scratch buffer is good for all meshes."""
    state = {name: value for name, value in vars(parallel_state).items() if re.fullmatch(r"_[A-Z][A-Z_]+", name)}
    return {name: value for name, value in state.items() if not name.endswith("_BUFFER")}


def _join_world(timeout: datetime.timedelta) -> None:
    backend = "gloo"
    if torch.cuda.is_available():
        backend = "nccl"
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    if "RANK" in os.environ and "WORLD_SIZE" in os.environ:
        dist.init_process_group(backend, timeout=timeout)
    else:
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1, timeout=timeout)


def open_store(purpose: str, *, timeout_seconds: float) -> dist.Store | None:
    """A connection of this rank's own to the store by which the world has met; None in a world of one. Collective.

    Keys are this life's: a restarted job may meet the store of the life before.
    """
    if world_size() == 1:
        return None
    life = all_gather_bytes(secrets.token_hex(8).encode() if rank() == 0 else b"")[0].decode()
    store = dist.TCPStore(
        os.environ["MASTER_ADDR"],
        int(os.environ["MASTER_PORT"]),
        is_master=False,
        wait_for_workers=False,
        timeout=datetime.timedelta(seconds=timeout_seconds),
    )
    return dist.PrefixStore(f"{purpose}/{life}", store)


def shutdown() -> None:
    """Leave the world and forget Megatron's groups; safe to call twice."""
    global _io_group
    _io_group = None
    if parallel_state.model_parallel_is_initialized():
        parallel_state.destroy_model_parallel()
    if dist.is_initialized():
        dist.destroy_process_group()


_io_group: dist.ProcessGroup | None = None


def io_group() -> dist.ProcessGroup:
    """All ranks on gloo, for work on files: no kernel waits behind it, and another thread may use it meanwhile.
    Collective at its first call."""
    global _io_group
    if _io_group is None:
        _io_group = dist.new_group(backend="gloo", timeout=datetime.timedelta(hours=1))
    return _io_group


def device() -> torch.device:
    """Where this rank computes."""
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")


def rank() -> int:
    return dist.get_rank()


def world_size() -> int:
    return dist.get_world_size()


def tp_group() -> dist.ProcessGroup:
    return parallel_state.get_tensor_model_parallel_group()


def tp_rank() -> int:
    return parallel_state.get_tensor_model_parallel_rank()


def tp_size() -> int:
    return parallel_state.get_tensor_model_parallel_world_size()


def pp_group() -> dist.ProcessGroup:
    return parallel_state.get_pipeline_model_parallel_group()


def pp_rank() -> int:
    return parallel_state.get_pipeline_model_parallel_rank()


def pp_size() -> int:
    return parallel_state.get_pipeline_model_parallel_world_size()


def cp_group() -> dist.ProcessGroup:
    return parallel_state.get_context_parallel_group()


def cp_rank() -> int:
    return parallel_state.get_context_parallel_rank()


def cp_size() -> int:
    return parallel_state.get_context_parallel_world_size()


def ep_group() -> dist.ProcessGroup:
    """The ranks that share out the experts that would else be the same on all of them."""
    return parallel_state.get_expert_model_parallel_group()


def ep_rank() -> int:
    return parallel_state.get_expert_model_parallel_rank()


def ep_size() -> int:
    return parallel_state.get_expert_model_parallel_world_size()


def dp_group() -> dist.ProcessGroup:
    return parallel_state.get_data_parallel_group()


def dp_rank() -> int:
    return parallel_state.get_data_parallel_rank()


def dp_size() -> int:
    return parallel_state.get_data_parallel_world_size()


def dp_cp_group() -> dist.ProcessGroup:
    """The ranks that hold the same weights, experts apart: data-parallel replicas and, in them, the parts of a context."""
    return parallel_state.get_data_parallel_group(with_context_parallel=True)


def replica_group() -> dist.ProcessGroup:
    """The tp * pp ranks that together hold one copy of the weights; a replica with cp > 1 is cp such groups."""
    return parallel_state.get_model_parallel_group()


def replica_ranks() -> list[int]:
    """Global ranks of `replica_group`."""
    return dist.get_process_group_ranks(replica_group())


def is_first_in_replica() -> bool:
    """Whether this rank answers for its replica: exactly one rank of each does."""
    return tp_rank() == pp_rank() == cp_rank() == 0


def is_first_stage() -> bool:
    """Whether this rank holds the embedding."""
    return pp_rank() == 0


def is_last_stage() -> bool:
    """Whether this rank holds the output head, and so hidden states, targets and losses."""
    return pp_rank() == pp_size() - 1


def last_stage_rank() -> int:
    """Global rank of the last stage of this rank's pipeline."""
    return parallel_state.get_pipeline_model_parallel_last_rank()


def all_gather_bytes(data: bytes, *, group: dist.ProcessGroup | None = None) -> list[bytes]:
    """The bytes of every rank of `group` (default: the world), in rank order, on every rank. Collective."""
    where = torch.device("cpu") if dist.get_backend(group) == "gloo" else device()
    lengths = _all_gather(torch.tensor([len(data)], device=where), group)
    longest = int(max(lengths))
    if longest == 0:
        return [b""] * len(lengths)
    mine = torch.zeros(longest, dtype=torch.uint8, device=where)
    if data:
        mine[: len(data)] = torch.frombuffer(bytearray(data), dtype=torch.uint8).to(mine.device)
    rows = _all_gather(mine, group)  # [longest] of each rank
    return [row[: int(length)].cpu().numpy().tobytes() for row, length in zip(rows, lengths, strict=True)]


def _all_gather(tensor: torch.Tensor, group: dist.ProcessGroup | None) -> list[torch.Tensor]:
    gathered = [torch.empty_like(tensor) for _ in range(dist.get_world_size(group))]
    dist.all_gather(gathered, tensor, group=group)
    return gathered


def broadcast_bytes(data: bytes | None, *, source: int, group: dist.ProcessGroup) -> bytes:
    """The bytes of global rank `source` on every rank of `group`; only the source's `data` is read. Collective."""
    is_source = rank() == source
    assert data is not None or not is_source, "the source must bring data"
    length = torch.tensor([len(data) if is_source and data is not None else 0], device=device())
    dist.broadcast(length, source, group=group)
    if int(length) == 0:
        return b""
    buffer = torch.zeros(int(length), dtype=torch.uint8, device=device())
    if is_source and data is not None:
        buffer.copy_(torch.frombuffer(bytearray(data), dtype=torch.uint8))
    dist.broadcast(buffer, source, group=group)
    return buffer.cpu().numpy().tobytes()
