"""Training checkpoints: complete or invisible, verified before use, run no code when read, and fit any layout.

    save(root, step=40, chunks=chunks, family=family, shape=shape, optimizer=optimizer, state={...}, keep=2)
    loaded = load_latest(root, chunks=chunks, family=family, shape=shape, optimizer=optimizer)   # None: nothing there

    root/latest                      the text "step_0000040"
    root/step_0000040/
        __<rank>_0.distcp, .metadata, metadata.json, common.pt
                                     Megatron's torch_dist format: weights, optimizer, generators, each rank's part by itself
        state.json                   step, shape, layout, optimizer's scalars, scheduler, and what the caller passed
        config.json, tokenizer files, and model.safetensors where asked for: a Hugging Face directory
        manifest.json                size and sha256 of every file, and its own

A directory is filled under a hidden name, flushed, and renamed; `latest` is replaced the same way afterwards. To go
back, write an older directory's name into `latest`. Resuming is bit-exact in the same layout, and exact in every
weight and moment in another; generators go back where they were when the number of ranks is the same. What the files
hold is `sharded_files.py`'s and `optimizer_state.py`'s matter, this file's is that all of it is there or none.
"""

from __future__ import annotations

import json
import logging
import re
import shutil
import threading
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol

from megatron.core.dist_checkpointing.mapping import ShardedObject
from torch.nn import Module

from megatron_tcod.model import parallel
from megatron_tcod.model.build import named_parameters, unwrap
from megatron_tcod.model.families.family import Family
from megatron_tcod.model.mapping import (
    CONFIG_FILE,
    export_hf,
    on_rank_zero,
    read_hf_config,
    write_hf_config,
    write_hf_directory,
)
from megatron_tcod.model.optimizer_state import OptimizerState, optimizer_state
from megatron_tcod.model.rng_state import rng_state, set_rng_state
from megatron_tcod.model.shape import ModelShape
from megatron_tcod.model.sharded_files import plan_sharded, read_sharded
from megatron_tcod.model.weight_files import (
    file_sha256,
    publish_directory,
    read_json,
    restore_set_aside,
    staging_directory,
    staging_name,
    sync_file,
    verify_manifest,
    write_durably,
    write_json,
    write_manifest,
)

STATE_FILE = "state.json"
LATEST_FILE = "latest"
KEYS_BY_LAYER = {"non_homogeneous_layers": True}
"""Megatron's word for a key per layer (`decoder.layers.3...`) instead of one tensor of all layers."""

logger = logging.getLogger(__name__)


class CheckpointError(ValueError):
    """A checkpoint that cannot be used: of another model, or none left that is intact."""


class Scheduler(Protocol):
    """What is saved of a learning-rate scheduler; Megatron's OptimizerParamScheduler fits."""

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state_dict: dict[str, Any]) -> None: ...


@dataclass(frozen=True, kw_only=True)
class Loaded:
    """Example: `Loaded(path=Path("run/step_0000040"), step=40, state={"curriculum": {"k": 7}})`"""

    path: Path
    step: int
    """Optimizer steps done."""
    state: dict[str, Any]
    """What the caller of `save` passed."""


class BackgroundSaver:
    """Finishes one save at a time in a thread, while training goes on. Every rank has one.

    Example: `saver = BackgroundSaver(); save(..., saver=saver); ...; saver.wait()`
    """

    def __init__(self) -> None:
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None

    def start(self, job: Callable[[], None]) -> None:
        """Run `job` beside the caller; the one before must have been waited for."""
        assert self._thread is None, "wait for the save in progress first"

        def work() -> None:
            try:
                job()
            except BaseException as error:  # noqa: BLE001  raised by `wait`, in the thread that can act on it
                self._error = error

        self._thread = threading.Thread(target=work, name="checkpoint", daemon=True)
        self._thread.start()

    def wait(self) -> None:
        """Return when nothing is being saved; raises what the save raised. Not collective by itself, but the save is."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        error, self._error = self._error, None
        if error is not None:
            raise error


def save(
    root: str | Path,
    *,
    step: int,
    chunks: list[Module],
    family: Family,
    shape: ModelShape,
    optimizer: Any,
    state: Mapping[str, Any] | None = None,
    scheduler: Scheduler | None = None,
    tokenizer: str | Path | None = None,
    keep: int = 2,
    with_hf_weights: bool = False,
    saver: BackgroundSaver | None = None,
) -> Path:
    """Write `root/step_<step>`, point `latest` at it, and remove all but the `keep` newest. Collective over all ranks.

    Every rank writes its share of the tensors; global rank 0 the rest. With a `saver` it returns once tensors are copied
    to host memory, and the checkpoint appears later. `optimizer` is Megatron's or a plain torch Adam. `state` must be
    JSON, `tokenizer` a directory whose tokenizer files are copied; `with_hf_weights` adds model.safetensors. An error on
    one rank, a full disk say, is raised on every rank (by `saver.wait` where there is one), and earlier checkpoints
    stay as they were.
    """
    if keep < 1:
        raise ValueError(f"keep {keep}: expected at least 1 checkpoint to stay; raise keep")
    if saver is not None:
        saver.wait()
    target = Path(root) / f"step_{step:07d}"
    kept = optimizer_state(chunks, optimizer)
    content = {
        "step": step,
        "model_type": family.model_type,
        "shape": asdict(shape),
        "num_ranks": parallel.world_size(),
        "optimizer": kept.scalars(),
        "scheduler": None if scheduler is None else scheduler.state_dict(),
        "state": dict(state or {}),
    }
    dtype = next(named_parameters(chunks))[1].dtype
    weights = export_hf(chunks, family, shape) if with_hf_weights else iter(())

    on_rank_zero(partial(staging_directory, target), drain=[])
    staging = staging_name(target)
    write = plan_sharded(staging, _tensors(chunks, kept, with_rng=True), copy=saver is not None)

    def write_the_rest() -> None:
        try:
            write_json(staging / STATE_FILE, content)
            if with_hf_weights:
                write_hf_directory(staging, weights, family, shape, dtype=dtype, source=tokenizer)
            else:
                write_hf_config(staging, family, shape, dtype=dtype, source=tokenizer)
        except BaseException:
            shutil.rmtree(staging, ignore_errors=True)
            raise

    on_rank_zero(write_the_rest, drain=[weights])
    job = partial(_complete, target, write, step=step, keep=keep)
    if saver is None:
        job()
    else:
        parallel.io_group()  # made by all ranks before a thread needs it
        saver.start(job)
    return target


def _tensors(chunks: list[Module], optimizer: OptimizerState, *, with_rng: bool) -> dict[str, Any]:
    """All that the ranks save each their part of, as Megatron's sharded state dict."""
    models = []
    for chunk in chunks:
        entries = unwrap(chunk).sharded_state_dict(metadata=dict(KEYS_BY_LAYER))  # it is written into
        empty = [name for name, entry in entries.items() if isinstance(entry, ShardedObject) and entry.data is None]
        models.append({name: entry for name, entry in entries.items() if name not in empty})
    tensors: dict[str, Any] = {
        "model": {str(index): entries for index, entries in enumerate(models)},
        "optimizer": optimizer.sharded({str(index): entries for index, entries in enumerate(models)}),
    }
    if with_rng:
        place = {"global_shape": (parallel.world_size(),), "global_offset": (parallel.rank(),)}
        tensors["rng"] = ShardedObject("rng_state", rng_state(), **place, replica_id=0)
    return tensors


def _complete(target: Path, write: Callable[[], None], *, step: int, keep: int) -> None:
    """The part of a save that needs no model: write, hash, list, rename. Collective over `parallel.io_group()`."""
    staging = staging_name(target)
    try:
        _together(write)
        own = json.dumps([file_sha256(path) for path in _shards(staging, parallel.rank())])
        digests = [json.loads(part) for part in parallel.all_gather_bytes(own.encode(), group=parallel.io_group())]

        def publish() -> None:
            known = {
                path.name: digest
                for rank, found in enumerate(digests)
                for path, digest in zip(_shards(staging, rank), found, strict=True)
            }
            for path in staging.iterdir():
                if path.name not in known:
                    sync_file(path)
            write_manifest(staging, {"step": step}, known=known)
            publish_directory(staging, target)
            write_durably(target.parent / LATEST_FILE, target.name + "\n")
            _remove_old(target.parent, keep=keep, newest=target)

        _together(publish if parallel.rank() == 0 else None)
    except Exception:
        if parallel.rank() == 0:
            shutil.rmtree(staging, ignore_errors=True)
        raise


def _shards(directory: Path, rank: int) -> list[Path]:
    return sorted(directory.glob(f"__{rank}_*.distcp"))


def _together(work: Callable[[], None] | None) -> None:
    """Run `work` on the ranks that have some; an error of one is raised on all. Collective over `io_group`."""
    error: Exception | None = None
    try:
        if work is not None:
            work()
    except Exception as caught:  # noqa: BLE001  raised below, when all ranks know
        error = caught
    messages = parallel.all_gather_bytes(str(error or "").encode(), group=parallel.io_group())
    if error is not None:
        raise error
    for rank, message in enumerate(messages):
        if message:
            raise ValueError(f"rank {rank}: {message.decode()}")


def _remove_old(root: Path, *, keep: int, newest: Path) -> None:
    """Keep `newest` and the `keep` - 1 steps before it. Steps behind it are of a history that a resume has left."""
    steps = _directories(root)
    place = steps.index(newest)
    if place:
        logger.warning("removing %s: training has gone back behind them", ", ".join(path.name for path in steps[:place]))
    for path in [*steps[:place], *steps[place + keep :]]:
        hidden = path.with_name(f".{path.name}.gone")
        path.rename(hidden)  # invisible before it is incomplete
        if hidden.is_symlink():
            hidden.unlink()  # what it leads to is somebody's own
        else:
            shutil.rmtree(hidden)
    for stale in root.glob(".step_*"):
        shutil.rmtree(stale, ignore_errors=True)


def _directories(root: Path) -> list[Path]:
    """Checkpoints by name, newest first; hidden ones are being written or removed."""
    named = [path for path in root.glob("step_*") if path.is_dir() and re.fullmatch(r"step_\d{7,}", path.name)]
    return sorted(named, key=lambda path: int(path.name.removeprefix("step_")), reverse=True)


def candidates(root: Path) -> list[Path]:
    """Checkpoints in the order in which a resume tries them: what `latest` names, then from the newest back."""
    found = _directories(root)
    pointer = root / LATEST_FILE
    named = root / pointer.read_text(encoding="utf-8", errors="replace").strip() if pointer.is_file() else None
    if named in found:
        if named != found[0]:
            logger.warning("%s names %s, although %s is there too", pointer, named.name, found[0].name)
        found.remove(named)
        found.insert(0, named)
    elif named is not None:
        logger.warning("%s names %s, which is not there; taking the newest intact checkpoint", pointer, named.name)
    return found


def first_intact(paths: Iterable[Path], verify: Callable[[Path], object]) -> Path | None:
    """The first path that `verify` does not refuse, saying in the log which were. None when there is no path at all;
    CheckpointError, with the reason for each, when none is intact."""
    reasons = []
    for path in paths:
        try:
            verify(path)
        except (ValueError, OSError) as error:
            logger.warning("checkpoint %s is not intact, trying the next: %s", path.name, error)
            reasons.append(f"{path.name}: {error}")
            continue
        if reasons:
            logger.warning("falling back to checkpoint %s", path.name)
        return path
    if reasons:
        raise CheckpointError(
            f"none of {len(reasons)} checkpoints is intact ({'; '.join(reasons)}); restore one, or start a new run in "
            "another directory"
        )
    return None


def find_latest(root: str | Path) -> Path | None:
    """The checkpoint that a resume would take; as `first_intact`. One process, which hashes every byte."""
    return first_intact(candidates(Path(root)), verify_manifest)


def _find_together(root: Path) -> Path | None:
    """`find_latest` by all ranks: rank 0 lists, each hashes its share of the files. Collective."""
    group = parallel.io_group()
    if parallel.rank() == 0:
        restore_set_aside(root)
    names = json.dumps([path.name for path in candidates(root)] if parallel.rank() == 0 else [])
    listed = json.loads(parallel.all_gather_bytes(names.encode(), group=group)[0])
    return first_intact([root / name for name in listed], verify)


def verify(directory: Path) -> None:
    """ValueError on every rank unless each file is as its manifest says; each rank hashes its share. Collective."""
    _together(partial(verify_manifest, directory, share=(parallel.rank(), parallel.world_size())))


def load_latest(
    root: str | Path,
    *,
    chunks: list[Module],
    family: Family,
    shape: ModelShape,
    optimizer: Any,
    scheduler: Scheduler | None = None,
    allow_pickle: bool = False,
) -> Loaded | None:
    """Load the newest intact checkpoint into model, optimizer and scheduler; None when there is none. Collective.

    Every hash is verified before anything is loaded; `root` must be one directory for all ranks. Master weights of
    bf16 training are set too: copying the model's weights over them afterwards (`reload_model_params`) would round
    them. `allow_pickle` reads with stock torch, which runs whatever the files say. CheckpointError names the fields when
    the checkpoint belongs to another model, and is raised on every rank when none is intact.
    """
    path = _find_together(Path(root))
    if path is None:
        return None
    state = read_json(path / STATE_FILE)
    _check_same_model(path, state, family, shape)
    kept = optimizer_state(chunks, optimizer)
    try:
        kept.check(state["optimizer"])
    except ValueError as error:
        raise CheckpointError(f"{path}: {error}") from None
    has_our_ranks = state["num_ranks"] == parallel.world_size()
    loaded = read_sharded(path, _tensors(chunks, kept, with_rng=has_our_ranks), allow_pickle=allow_pickle)
    for index, chunk in enumerate(chunks):
        missing, unexpected = unwrap(chunk).load_state_dict(loaded["model"][str(index)], strict=False)
        odd = [name for name in missing if not name.endswith("_extra_state")]
        assert not odd and not unexpected, (odd, unexpected)
    kept.load(loaded["optimizer"], state["optimizer"])
    if has_our_ranks:
        set_rng_state(loaded["rng"])
    if scheduler is not None and state["scheduler"] is not None:
        scheduler.load_state_dict(state["scheduler"])
    return Loaded(path=path, step=state["step"], state=state["state"])


def _check_same_model(path: Path, state: Mapping[str, Any], family: Family, shape: ModelShape) -> None:
    found = {"model_type": state["model_type"], **state["shape"]}
    expected = {"model_type": family.model_type, **asdict(shape)}
    odd = sorted(key for key in expected | found if expected.get(key) != found.get(key))
    if odd:
        listed = ", ".join(f"{key} expected {expected.get(key)!r}, got {found.get(key)!r}" for key in odd)
        raise CheckpointError(
            f"{path}: checkpoint of another model: {listed}; point --save at this run's directory, or start from the "
            "model that it was saved from"
        )
    if read_hf_config(path)[1] != shape:
        raise CheckpointError(f"{path}: {CONFIG_FILE} and {STATE_FILE} disagree; restore the directory")
