"""Megatron's torch_dist directories: every rank writes its part in its own process, every layout reads them.

    write = plan_sharded(directory, tensors, copy=True)     # collective; from here on the tensors may change
    write()                                                 # collective, over parallel.io_group(): also in a thread
    loaded = read_sharded(directory, tensors, allow_pickle=False)

    with ShardedWeights(directory, family, shape) as weights:   # under Hugging Face names, one process, tensor by tensor
        weights["lm_head.weight"]

`tensors` is what Megatron calls a sharded state dict. What differs from Megatron's own strategy: nothing is forked or
spawned to write (that costs seconds a save, and a fork copies whatever the CUDA context does), and reading runs no
code (`safe_reader.py`). Non-tensor settings are none of this file's matter: `common.pt` is written because the format
asks for it and never read. Completeness, hashes and names are `checkpoint.py`'s.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.core import CheckpointingConfig, CheckpointingException, save_config
from megatron.core.dist_checkpointing.mapping import ShardedTensor
from megatron.core.dist_checkpointing.strategies import torch as torch_dist
from megatron.core.dist_checkpointing.strategies.async_utils import AsyncRequest
from megatron.core.dist_checkpointing.strategies.base import (
    AsyncSaveShardedStrategy,
    LoadCommonStrategy,
    LoadShardedStrategy,
)
from megatron.core.dist_checkpointing.strategies.fully_parallel import FullyParallelSaveStrategyWrapper
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from megatron_tcod.model import parallel
from megatron_tcod.model.families.family import Family
from megatron_tcod.model.families.rules import Slot
from megatron_tcod.model.safe_reader import METADATA_FILE, SafeFileReader, SafeLoadPlanner
from megatron_tcod.model.shape import ModelShape
from megatron_tcod.model.weight_files import INDEX_FILE, SINGLE_FILE, WeightFiles

BACKEND, VERSION = "torch_dist", 1
FUSED_NORMS = {
    ".input_layernorm.weight": ".self_attention.linear_qkv.layer_norm_weight",
    ".pre_mlp_layernorm.weight": ".mlp.linear_fc1.layer_norm_weight",
}
"""Megatron files a layer's two norms under the projection behind them, where Transformer Engine keeps them."""
KEPT_TENSORS = 2
"""Of a layer's experts, what goes in and what comes out."""


class _Writer(AsyncSaveShardedStrategy):
    """Megatron's tensors into torch's files, by torch's own writer: one file a rank, one thread, flushed to disk."""

    def __init__(self, *, copy: bool) -> None:
        super().__init__(BACKEND, VERSION)
        self._copy = copy

    def async_save(self, sharded_state_dict: dict[str, Any], checkpoint_dir: str | Path) -> AsyncRequest:
        entries, _, _ = torch_dist._replace_state_dict_keys_with_sharded_keys(sharded_state_dict, True)
        if self._copy:
            for shard in (entry for found in entries.values() for entry in found if isinstance(entry, ShardedTensor)):
                shard.data = shard.data.detach().to("cpu", copy=True)
        state = torch_dist.mcore_to_pyt_state_dict(entries, False)
        return AsyncRequest(partial(_write, state, Path(checkpoint_dir)), (), [])

    @property
    def can_handle_sharded_objects(self) -> bool:
        return True


def _write(state: dict[str, Any], directory: Path) -> None:
    planner = torch_dist.MCoreSavePlanner(dedup_replicated_tensors=False, flatten_state_dict=False)
    writer = dcp.FileSystemWriter(directory, single_file_per_rank=True, sync_files=True, thread_count=1)
    try:
        dcp.save(state, storage_writer=writer, planner=planner, process_group=parallel.io_group())
    except CheckpointException as error:  # a BaseException, with the failures of all ranks
        raise OSError(f"cannot write {directory}: {_reasons(error)}") from None
    if parallel.rank() == 0:
        save_config(CheckpointingConfig(BACKEND, VERSION), str(directory))


def plan_sharded(directory: Path, tensors: dict[str, Any], *, copy: bool) -> Callable[[], None]:
    """Agree on who writes what, replicas sharing the work; the returned call writes. Both are collective.

    With `copy` the call works on copies in host memory, taken now. `directory` exists and is empty of shards.
    """
    writer = FullyParallelSaveStrategyWrapper(_Writer(copy=copy), parallel.dp_cp_group())
    request = dist_checkpointing.save(tensors, str(directory), writer, async_sharded_save=True)
    # The request's finalize_fns hold a barrier of the default group and metadata.json: `_write` does the one, its
    # collectives the other, so that all of it can run in a thread.
    return request.async_fn


class _Reader(LoadShardedStrategy):
    """The inverse of `_Writer`, at any layout."""

    def __init__(self, *, allow_pickle: bool) -> None:
        super().__init__()
        self._allow_pickle = allow_pickle

    def load(self, sharded_state_dict: dict[str, Any], checkpoint_dir: str | Path) -> dict[str, Any]:
        entries, flat_mapping, rename_mapping = torch_dist._replace_state_dict_keys_with_sharded_keys(
            sharded_state_dict
        )
        shards = [entry for found in entries.values() for entry in found if isinstance(entry, ShardedTensor)]
        exact = [shard for shard in shards if not shard.allow_shape_mismatch]
        padded = {shard.key: shard for shard in shards if shard.allow_shape_mismatch}
        planner_type = torch_dist.MCoreLoadPlanner if self._allow_pickle else SafeLoadPlanner
        state = torch_dist.mcore_to_pyt_state_dict(entries, True)
        dcp.load(
            state,
            storage_reader=(dcp.FileSystemReader if self._allow_pickle else SafeFileReader)(checkpoint_dir),
            planner=planner_type(
                flatten_state_dict=False,  # it is flat; flattening copies, and entries would land in the copy
                flatten_sharded_tensors=False,
                shapes_validation_sharded_tensors=exact,
                allow_shape_mismatch_sharded_tensors=padded,
            ),
            process_group=parallel.io_group(),
        )
        loaded = {key: torch_dist._unwrap_pyt_sharded_tensor(value) for key, value in state.items()}
        loaded = torch_dist._replace_sharded_keys_with_state_dict_keys(loaded, flat_mapping, rename_mapping)
        torch_dist._restore_dict_types(loaded, sharded_state_dict)
        return loaded

    @property
    def can_handle_sharded_objects(self) -> bool:
        return True

    def load_tensors_metadata(self, checkpoint_dir: str | Path) -> Any:
        raise NotImplementedError("not needed: what is loaded is asked for by name")

    load_sharded_metadata = remove_sharded_tensors = load_tensors_metadata

    def check_backend_compatibility(self, loaded_backend: str) -> None:
        if loaded_backend != BACKEND:
            raise CheckpointingException(f"sharded_backend {loaded_backend}, expected {BACKEND}")

    def check_version_compatibility(self, loaded_version: int) -> None:
        if loaded_version != VERSION:
            raise CheckpointingException(f"sharded_backend_version {loaded_version}, expected {VERSION}")


class _NoCommonState(LoadCommonStrategy):
    """`common.pt` is a pickle with nothing in it that is needed: it stays closed."""

    def load_common(self, checkpoint_dir: str | Path) -> dict[str, Any]:
        return {}

    def load_sharded_objects(self, *args: Any) -> Any:
        raise NotImplementedError("they are read with the tensors")

    load_sharded_metadata = load_sharded_objects

    def check_backend_compatibility(self, loaded_backend: str) -> None:
        pass

    check_version_compatibility = check_backend_compatibility


def read_sharded(directory: Path, tensors: dict[str, Any], *, allow_pickle: bool = False) -> dict[str, Any]:
    """`tensors` with the values of the checkpoint in place of the shards. Collective.

    ValueError, on every rank, for an entry that is missing, of another shape, or refused by the safe reader.
    """
    reader = _Reader(allow_pickle=allow_pickle)
    try:
        return dist_checkpointing.load(
            tensors, str(directory), reader, _NoCommonState(), validate_access_integrity=False
        )
    except (CheckpointException, CheckpointingException) as error:
        raise ValueError(f"cannot read {directory}: {_reasons(error)}") from None


def _reasons(error: BaseException) -> str:
    """torch packs the traceback of every rank into one exception: the last line of the first is what happened."""
    failures = getattr(error, "failures", None) or {}
    causes = [failure[0] if isinstance(failure, tuple) else failure for _, failure in sorted(failures.items())]
    return str(causes[0] if causes else error)


class ShardedWeights(Mapping[str, Tensor]):
    """The model of a sharded checkpoint under Hugging Face names; a `WeightFiles` to its callers. One process, no group.

    In memory at a time are two slots, or what a layer's experts have in and out."""

    def __init__(self, directory: str | Path, family: Family, shape: ModelShape) -> None:
        self.directory = Path(directory)
        self._shape = shape
        self._reader = SafeFileReader(self.directory)
        self._stored = self._reader.read_metadata().state_dict_metadata
        self._slots = {name: slot for slot in family.slots(shape) for name in slot.hf}
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.dtypes: dict[str, torch.dtype] = {}
        for slot in family.slots(shape):
            if isinstance(entry := self._stored.get(sharded_key(slot)), TensorStorageMetadata):
                size = entry.size if slot.expert is None else entry.size[1:]
                full = slot.join([torch.empty(size, device="meta")], shape)
                for name, tensor in zip(slot.hf, full, strict=True):
                    self.shapes[name], self.dtypes[name] = tuple(tensor.shape), entry.properties.dtype
        self._kept: dict[str, Tensor] = {}

    def __getitem__(self, name: str) -> Tensor:
        if name not in self.shapes:
            raise KeyError(name)
        slot = self._slots[name]
        stored = self._read(sharded_key(slot))
        full = slot.join([stored if slot.expert is None else stored[slot.expert]], self._shape)
        return dict(zip(slot.hf, full, strict=True))[name]

    def _read(self, key: str) -> Tensor:
        """A stored tensor; the last few stay in memory, for a slot or a layer of experts is asked for in pieces."""
        if key in self._kept:
            return self._kept[key]
        entry = self._stored[key]
        state = {key: torch.empty(entry.size, dtype=entry.properties.dtype)}
        try:
            dcp.load(state, storage_reader=self._reader, planner=DefaultLoadPlanner(), no_dist=True)
        except (CheckpointException, RuntimeError, OSError, KeyError) as error:
            raise ValueError(f"{self.directory}: cannot read {key}: {_reasons(error)}; restore the directory") from None
        while len(self._kept) >= KEPT_TENSORS:
            self._kept.pop(next(iter(self._kept)))
        self._kept[key] = state[key]
        return state[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self.shapes)

    def __len__(self) -> int:
        return len(self.shapes)

    def __enter__(self) -> ShardedWeights:
        return self

    def __exit__(self, *_: object) -> None:
        self._kept.clear()


def sharded_key(slot: Slot) -> str:
    """What Megatron files a parameter of the whole model under; all experts of a layer lie stacked in one tensor."""
    name = slot.megatron.replace(f".local_experts.{slot.expert}.", ".experts.")
    for own, fused in FUSED_NORMS.items():
        if name.endswith(own):
            return name.removesuffix(own) + fused
    return name


def open_weights(directory: str | Path, family: Family, shape: ModelShape) -> WeightFiles | ShardedWeights:
    """The weights of a Hugging Face directory, or of a training checkpoint that has none beside its shards."""
    directory = Path(directory)
    has_files = (directory / SINGLE_FILE).exists() or (directory / INDEX_FILE).exists()
    if not has_files and (directory / METADATA_FILE).exists():
        return ShardedWeights(directory, family, shape)
    return WeightFiles(directory)
