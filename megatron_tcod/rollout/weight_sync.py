"""Ways for new weights into SGLang servers.

    sync = FromDisk(run_directory / "weights", model_path)        # or FromTensor(), FromDistributed()
    expected = sync.push(links, student.hf_weights(), version=7)  # servers are paused; buckets go to all of them at once
    expected.compare(link.call(link.client.checksums()))          # weight_proof.py
    sync.restore(link, version=7)                                 # a restarted server gets the same weights again

disk: safetensors in a directory that appears whole; servers may be on other hosts that share the file system.
tensor: flattened buckets in the request itself; CUDA tensors go as handles to their memory, so the server must see the same
GPU under the same number; CPU tensors go as bytes. Same host.
distributed: rank 0 of a process group with all ranks of all servers broadcasts each tensor; NCCL, or gloo for CPU.

`push` runs in the caller's thread, because reading `hf_weights()` may be collective; HTTP goes through `link.call`.
Nothing here pauses, flushes or resumes; `sglang_engine.py` does. Updates never ask the server to flush: up to 0.5.20 a
refused flush after an update ends the server.

Pickles are written here, because the tensor path wants them, and never read.
"""

from __future__ import annotations

import base64
import io
import json
import os
import shutil
import types
import uuid
from collections.abc import Callable, Coroutine, Iterable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from multiprocessing.reduction import ForkingPickler
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.distributed as dist
import torch.multiprocessing  # noqa: F401  teaches ForkingPickler to pass CUDA tensors by handle
from safetensors import SafetensorError
from safetensors.torch import save_file

from megatron_tcod.rollout.sglang_client import ServerFeatures, SGLangClient
from megatron_tcod.rollout.sglang_loopback import LOOPBACK, loopback_store
from megatron_tcod.rollout.weight_proof import Expected

NamedTensors = Iterable[tuple[str, torch.Tensor]]
BUCKET_BYTES = 512 << 20
ALIGNMENT = 16
"""Bytes that every tensor of a flattened bucket starts at a multiple of."""


@dataclass
class Link:
    """One server as seen from the trainer's thread. `call` runs a coroutine where the client lives and waits for it."""

    client: SGLangClient
    features: ServerFeatures
    start: Callable[[Coroutine[Any, Any, Any]], Future]
    generation: int = 0
    """Counts restarts."""

    def call(self, coroutine: Coroutine[Any, Any, Any]) -> Any:
        return self.start(coroutine).result()


class WeightSync(Protocol):
    def push(self, links: Sequence[Link], weights: NamedTensors, version: int) -> Expected:
        """Give all servers the tensors and the version's name. Returns what they must hold now."""
        ...

    def restore(self, link: Link, version: int) -> None:
        """Give a restarted server what was pushed last. Runs in any thread."""
        ...

    def close(self) -> None: ...


class FromDisk:
    """Through a directory of safetensors: `directory/<version>` appears whole, older ones go, and the last with `close`."""

    def __init__(self, directory: Path, model_path: str | Path, *, shard_bytes: int = 4 << 30) -> None:
        """`model_path`: the served model; its configuration and tokenizer files are copied beside the weights."""
        self._directory, self._model_path, self._shard_bytes = Path(directory).absolute(), Path(model_path), shard_bytes
        self._current: Path | None = None

    def push(self, links: Sequence[Link], weights: NamedTensors, version: int) -> Expected:
        expected = Expected(links[0].features)
        older, self._current = self._current, self._write(weights, version, expected)
        _wait(link.start(self._update(link, version)) for link in links)
        if older is not None and older != self._current:
            shutil.rmtree(older)
        return expected

    def restore(self, link: Link, version: int) -> None:
        link.call(self._update(link, version))

    def close(self) -> None:
        if self._current is not None:
            shutil.rmtree(self._current, ignore_errors=True)
            self._current = None

    async def _update(self, link: Link, version: int) -> None:
        body = {
            "model_path": str(self._current),
            "load_format": "safetensors",  # a server started with dummy weights would stay with those otherwise
            "weight_version": str(version),
            "flush_cache": False,
        }
        await link.client.update("/update_weights_from_disk", body)

    def _write(self, weights: NamedTensors, version: int, expected: Expected) -> Path:
        self._directory.mkdir(parents=True, exist_ok=True)
        target, staging = self._directory / str(version), self._directory / f".{version}.{uuid.uuid4().hex[:8]}"
        staging.mkdir()
        try:
            for path in self._model_path.iterdir() if self._model_path.is_dir() else ():
                if path.is_file() and ".safetensors" not in path.name and path.suffix not in (".bin", ".pt"):
                    shutil.copyfile(path, staging / path.name)
            weight_map: dict[str, str] = {}
            for index, bucket in enumerate(buckets(weights, self._shard_bytes)):
                name = f"model-{index:05d}.safetensors"
                save_file(
                    {key: tensor.contiguous().cpu() for key, tensor in bucket}, staging / name, metadata={"format": "pt"}
                )
                for key, tensor in bucket:
                    expected.add(key, tensor)
                    weight_map[key] = name
            (staging / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
            shutil.rmtree(target, ignore_errors=True)
            os.rename(staging, target)
        except BaseException as error:
            shutil.rmtree(staging, ignore_errors=True)
            if isinstance(error, SafetensorError):  # no OSError, although a full disk is what it tells of
                raise OSError(f"the weights for the servers cannot be written below {self._directory}: {error}") from error
            raise
        return target


@dataclass
class _Copy:
    """The last pushed tensors in host memory, for servers that come back empty."""

    tensors: list[tuple[str, torch.Tensor]] = field(default_factory=list)

    def passing(self, weights: NamedTensors) -> Iterator[tuple[str, torch.Tensor]]:
        """The same tensors, each copied on its way."""
        self.tensors = []
        for name, tensor in weights:
            copy = tensor.detach().to("cpu", copy=True)
            self.tensors.append((name, copy))
            yield name, copy if tensor.device.type == "cpu" else tensor.detach()


class FromTensor:
    """Through the request: flattened buckets of at most `bucket_bytes`. Keeps a copy in host memory for restarts."""

    def __init__(self, *, bucket_bytes: int = BUCKET_BYTES) -> None:
        self._bucket_bytes, self._copy = bucket_bytes, _Copy()

    def push(self, links: Sequence[Link], weights: NamedTensors, version: int) -> Expected:
        expected = Expected(links[0].features)
        with update_sessions(links):
            for bucket in buckets(self._copy.passing(weights), self._bucket_bytes):
                _wait([link.start(send_bucket(link, bucket, version)) for link in links])
                for name, tensor in bucket:
                    expected.add(name, tensor)
        return expected

    def restore(self, link: Link, version: int) -> None:
        restore_from_copy(link, self._copy, version, self._bucket_bytes)

    def close(self) -> None:
        self._copy = _Copy()


class FromDistributed:
    """By broadcast from this process, rank 0, to every rank of every server. Keeps a copy in host memory for restarts.

    The group is formed at the first push and again after a server came back. `address` must reach this host from the
    servers'; on the loopback address nothing listens anywhere else.
    """

    def __init__(self, *, address: str = "127.0.0.1", backend: str = "nccl", bucket_bytes: int = BUCKET_BYTES) -> None:
        self._address, self._backend, self._bucket_bytes = address, backend, bucket_bytes
        self._copy = _Copy()
        self._group: dist.ProcessGroup | None = None
        self._name = ""
        self._members: list[tuple[Link, int]] = []

    def push(self, links: Sequence[Link], weights: NamedTensors, version: int) -> Expected:
        if self._members != [(link, link.generation) for link in links]:
            self._form(links)
        expected = Expected(links[0].features)
        device = "cpu" if self._backend == "gloo" else torch.cuda.current_device()
        with update_sessions(links):
            for bucket in buckets(self._copy.passing(weights), self._bucket_bytes):
                body = {
                    "names": [name for name, _ in bucket],
                    "dtypes": [str(tensor.dtype).removeprefix("torch.") for _, tensor in bucket],
                    "shapes": [list(tensor.shape) for _, tensor in bucket],
                    "group_name": self._name,
                    "weight_version": str(version),
                    "flush_cache": False,
                }
                asked = [link.start(link.client.update("/update_weights_from_distributed", body)) for link in links]
                for name, tensor in bucket:
                    self._group.broadcast(tensor.to(device).contiguous(), 0).wait()
                    expected.add(name, tensor)
                _wait(asked)
        return expected

    def restore(self, link: Link, version: int) -> None:
        restore_from_copy(link, self._copy, version, self._bucket_bytes)

    def close(self) -> None:
        if self._group is not None:
            dist.destroy_process_group(self._group)
        self._group, self._members, self._copy = None, [], _Copy()

    def _form(self, links: Sequence[Link]) -> None:
        """A group of this process and all ranks of `links`; the servers' ends of an older one are dropped."""
        if self._group is not None:
            body = {"group_name": self._name}
            for link, generation in self._members:
                if link.generation == generation:
                    link.call(link.client.update("/destroy_weights_update_group", body))
            dist.destroy_process_group(self._group)
            self._group = None
        self._name = f"weights-{uuid.uuid4().hex[:8]}"
        world = 1 + sum(link.features.num_ranks for link in links)
        store = loopback_store(self._address, 0, world, True, wait_for_workers=False)
        asked, offset = [], 1
        for link in links:
            body = {
                "master_address": self._address,
                "master_port": store.port,
                "rank_offset": offset,
                "world_size": world,
                "group_name": self._name,
                "backend": self._backend,
            }
            asked.append(link.start(link.client.update("/init_weights_update_group", body)))
            offset += link.features.num_ranks
        self._group = join_group(store, world, self._name, self._backend, is_local=self._address in LOOPBACK)
        _wait(asked)
        self._members = [(link, link.generation) for link in links]


def join_group(store: dist.Store, world: int, name: str, backend: str, *, is_local: bool) -> dist.ProcessGroup:
    """Rank 0 of a group beside the trainer's own world. torch has no public way to form one with other programs; SGLang's
    end does the same."""
    from torch.distributed import distributed_c10d as c10d

    with local_gloo() if is_local else nullcontext():
        group, _ = c10d._new_process_group_helper(
            world,
            0,
            [],
            c10d.Backend(backend),
            c10d.PrefixStore(name, store),
            group_name=name,
            timeout=c10d.default_pg_timeout,
        )
    c10d._world.pg_group_ranks[group] = {rank: rank for rank in range(world)}
    return group


@contextmanager
def local_gloo() -> Iterator[None]:
    """Within it gloo listens on the loopback interface."""
    variable, before = "GLOO_SOCKET_IFNAME", os.environ.get("GLOO_SOCKET_IFNAME")
    os.environ[variable] = before or "lo"
    try:
        yield
    finally:
        if before is None:
            del os.environ[variable]


@contextmanager
def update_sessions(links: Sequence[Link]) -> Iterator[None]:
    """Frames updates where the server wants that (from 0.5.21)."""
    framed = [link for link in links if link.features.has_update_session]
    _wait([link.start(link.client.update("/begin_weight_update", {})) for link in framed])
    try:
        yield
    finally:
        _wait([link.start(link.client.update("/end_weight_update", {})) for link in framed])


async def send_bucket(link: Link, bucket: list[tuple[str, torch.Tensor]], version: int) -> None:
    payload = [bucket_payload(bucket) for _ in range(link.features.tp_size)]  # a handle serves one reader
    body = {
        "serialized_named_tensors": payload,
        "load_format": "flattened_bucket",
        "weight_version": str(version),
        "flush_cache": False,
    }
    await link.client.update("/update_weights_from_tensor", body)


def restore_from_copy(link: Link, copy: _Copy, version: int, bucket_bytes: int) -> None:
    with update_sessions([link]):
        for bucket in buckets(copy.tensors, bucket_bytes):
            link.call(send_bucket(link, bucket, version))


def buckets(weights: NamedTensors, num_bytes: int) -> Iterator[list[tuple[str, torch.Tensor]]]:
    """Runs of tensors of at most `num_bytes`, or one tensor that is larger."""
    bucket: list[tuple[str, torch.Tensor]] = []
    held = 0
    for name, tensor in weights:
        size = tensor.numel() * tensor.element_size()
        if bucket and held + size > num_bytes:
            yield bucket
            bucket, held = [], 0
        bucket.append((name, tensor))
        held += size
    if bucket:
        yield bucket


def bucket_payload(bucket: list[tuple[str, torch.Tensor]]) -> str:
    """SGLang's flattened bucket: all bytes in one tensor, and where each tensor lies in it; pickled, base64."""
    pieces, entries, start = [], [], 0
    for name, tensor in bucket:
        data = tensor.detach().contiguous().reshape(-1).view(torch.uint8)
        gap = -len(data) % ALIGNMENT  # the server views the bytes as the tensor's dtype
        pieces += [data, data.new_zeros(gap)]
        place = dict(start_idx=start, end_idx=start + len(data), numel=len(data))
        # The server reads attributes and takes any object that it lets through; this one needs no class of its own.
        entries.append(types.SimpleNamespace(name=name, shape=tuple(tensor.shape), dtype=tensor.dtype, **place))
        start += len(data) + gap
    buffer = io.BytesIO()
    _Pickler(buffer).dump({"flattened_tensor": torch.cat(pieces), "metadata": entries})
    return base64.b64encode(buffer.getbuffer()).decode()


class _Pickler(ForkingPickler):
    """CPU memory as bytes: torch would pass a file descriptor, which dies with the handshake that SGLang cannot make."""

    def reducer_override(self, value: Any) -> Any:
        if isinstance(value, torch.Tensor) and value.device.type == "cpu":
            return value.__reduce_ex__(2)
        if isinstance(value, torch.storage.TypedStorage) and value._untyped_storage.device.type == "cpu":
            return value.__reduce__()
        return NotImplemented


def _wait(futures: Iterable[Future]) -> None:
    """All results; the first error once every one is done."""
    results = [(future, future.exception()) for future in list(futures)]
    for _, error in results:
        if error is not None:
            raise error
