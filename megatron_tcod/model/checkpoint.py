"""Training checkpoints: complete or invisible, verified before use, free of pickle, independent of tp and pp.

    save(root, step=40, chunks=chunks, family=family, shape=shape, optimizer=optimizer, state={...}, keep=2)
    loaded = load_latest(root, chunks=chunks, family=family, shape=shape, optimizer=optimizer)   # None: nothing there

    root/latest                      the text "step_0000040"
    root/step_0000040/               a Hugging Face directory: config.json, model.safetensors, tokenizer files
        optimizer.safetensors        exp_avg.<name>, exp_avg_sq.<name>, step; main_param.<name> for bf16 training
        state.json                   step, shape, scheduler, and what the caller passed
        manifest.json                size and sha256 of every file, and its own

A directory is filled under a hidden name, flushed, and renamed; `latest` is replaced the same way afterwards. To go
back, write an older directory's name into `latest`. Resuming is bit-exact in the same layout, and exact in every
weight and moment in another. Random number generators are not saved: draws here are seeded by step and name. Megatron's
distributed optimizer is refused: it cuts its state across parameters.
"""

from __future__ import annotations

import logging
import re
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn import Module, Parameter

from megatron_tcod.model import parallel
from megatron_tcod.model.build import ModelShape, named_parameters
from megatron_tcod.model.families.family import Family
from megatron_tcod.model.mapping import (
    CONFIG_FILE,
    export_hf,
    hf_plan,
    load_hf,
    load_named,
    on_rank_zero,
    read_hf_config,
    write_hf_directory,
)
from megatron_tcod.model.weight_files import (
    SINGLE_FILE,
    TensorWriter,
    WeightFiles,
    read_json,
    replaced_directory,
    verify_manifest,
    write_durably,
    write_json,
    write_manifest,
)

OPTIMIZER_FILE = "optimizer.safetensors"
STATE_FILE = "state.json"
LATEST_FILE = "latest"
MOMENTS = ("exp_avg", "exp_avg_sq")

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
) -> Path:
    """Write `root/step_<step>`, point `latest` at it, and remove all but the `keep` newest. Collective over all ranks.

    Global rank 0 writes; all ranks take part in the export and return together. `optimizer` is Megatron's or a plain
    torch Adam. `state` must be JSON, `tokenizer` a directory whose tokenizer files are copied. An error on rank 0, a
    full disk say, is raised on every rank and leaves earlier checkpoints as they were.
    """
    if keep < 1:
        raise ValueError(f"keep {keep}: expected at least 1 checkpoint to stay; raise keep")
    root = Path(root)
    target = root / f"step_{step:07d}"
    dtype = next(named_parameters(chunks))[1].dtype
    weights = export_hf(chunks, family, shape)
    moments = AdamState(chunks, optimizer).export(family, shape)
    content = {
        "step": step,
        "model_type": family.model_type,
        "shape": asdict(shape),
        "scheduler": None if scheduler is None else scheduler.state_dict(),
        "state": dict(state or {}),
    }

    def write() -> None:
        with replaced_directory(target) as staging:
            model = write_hf_directory(staging, weights, family, shape, dtype=dtype, source=tokenizer)
            plan = next(moments)
            with TensorWriter(staging / OPTIMIZER_FILE, plan) as writer:
                for name, tensor in moments:
                    writer.write(name, tensor)
            write_json(staging / STATE_FILE, content)
            known = {SINGLE_FILE: model.sha256, OPTIMIZER_FILE: writer.sha256}
            write_manifest(staging, {"step": step}, known=known)
        write_durably(root / LATEST_FILE, target.name + "\n")
        _remove_old(root, keep=keep, newest=target)

    on_rank_zero(write, drain=[weights, moments])
    return target


def _remove_old(root: Path, *, keep: int, newest: Path) -> None:
    others = [path for path in _directories(root) if path != newest]
    for path in others[keep - 1 :]:
        hidden = path.with_name(f".{path.name}.old")
        path.rename(hidden)  # invisible before it is incomplete
        shutil.rmtree(hidden)
    for stale in root.glob(".step_*"):
        shutil.rmtree(stale, ignore_errors=True)


def _directories(root: Path) -> list[Path]:
    """Checkpoints by name, newest first; hidden ones are being written or removed."""
    named = [path for path in root.glob("step_*") if path.is_dir() and re.fullmatch(r"step_\d{7,}", path.name)]
    return sorted(named, key=lambda path: int(path.name.removeprefix("step_")), reverse=True)


def find_latest(root: str | Path) -> Path | None:
    """The checkpoint `latest` names if it verifies, else the newest that does, saying so in the log. One process.

    None when there is none; CheckpointError, with the reason for each, when there are some but none is intact.
    """
    root = Path(root)
    candidates = _directories(root)
    pointer = root / LATEST_FILE
    named = root / pointer.read_text(encoding="utf-8", errors="replace").strip() if pointer.is_file() else None
    if named in candidates:
        candidates.remove(named)
        candidates.insert(0, named)
    elif named is not None:
        logger.warning("%s names %s, which is not there; taking the newest intact checkpoint", pointer, named.name)
    reasons = []
    for path in candidates:
        try:
            verify_manifest(path)
        except (ValueError, OSError) as error:
            logger.warning("checkpoint %s is not intact, trying the next: %s", path.name, error)
            reasons.append(f"{path.name}: {error}")
            continue
        if reasons:
            logger.warning("falling back to checkpoint %s", path.name)
        return path
    if reasons:
        raise CheckpointError(
            f"{root}: none of {len(reasons)} checkpoints is intact ({'; '.join(reasons)}); restore one, or start "
            "a new run in another directory"
        )
    return None


def load_latest(
    root: str | Path,
    *,
    chunks: list[Module],
    family: Family,
    shape: ModelShape,
    optimizer: Any,
    scheduler: Scheduler | None = None,
) -> Loaded | None:
    """Load the newest intact checkpoint into model, optimizer and scheduler; None when there is none. Collective.

    Rank 0 verifies every hash before anything is loaded and tells the others which one it is; `root` must be one
    directory for all ranks. Master weights of bf16 training are set too: copying the model's weights over them
    afterwards (`reload_model_params`) would round them. CheckpointError names the fields when it belongs to another
    model, and is raised on every rank when no checkpoint is intact.
    """
    chosen: list[Path | None] = [None]

    def choose() -> None:
        chosen[0] = find_latest(root)

    on_rank_zero(choose, drain=[])
    name = parallel.all_gather_bytes((chosen[0].name if chosen[0] else "").encode())[0].decode()
    if not name:
        return None
    path = Path(root) / name
    state = read_json(path / STATE_FILE)
    _check_same_model(path, state, family, shape)
    load_hf(chunks, path, family, shape)
    AdamState(chunks, optimizer).load(path / OPTIMIZER_FILE, family, shape)
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


class AdamState:
    """Adam's moments and step count of this rank's parameters, read and set through Megatron's optimizer wrappers.

    Works on torch's Adam and AdamW (a step per parameter) and on fused ones that count in the parameter group. State
    that does not exist yet reads as zero, and is created when it is loaded.
    """

    def __init__(self, chunks: list[Module], optimizer: Any) -> None:
        self._chunks = chunks
        self._owner: dict[int, tuple[torch.optim.Optimizer, dict[str, Any]]] = {}
        for inner in _torch_optimizers(optimizer):
            for group in inner.param_groups:
                self._owner.update({id(parameter): (inner, group) for parameter in group["params"]})
        for name, parameter in named_parameters(chunks):
            if id(_main(parameter)) not in self._owner:
                raise ValueError(
                    f"parameter {name} is not in the optimizer; build the optimizer from these model chunks"
                )

    def export(self, family: Family, shape: ModelShape) -> Iterator[Any]:
        """First the plan for `TensorWriter`, then (name, full tensor) pairs in its order. Collective."""
        kinds = [*MOMENTS, *(["main_param"] if self._has_main() else [])]
        plan = [
            (f"{kind}.{name}", torch.float32, size)
            for kind in kinds
            for name, _, size in hf_plan(family, shape, torch.float32)
        ]
        yield [*plan, ("step", torch.float32, ())]
        for kind in kinds:
            read = _main_data if kind == "main_param" else lambda parameter, kind=kind: self._moment(parameter, kind)
            for name, tensor in export_hf(self._chunks, family, shape, read=read):
                yield f"{kind}.{name}", tensor
        yield "step", torch.tensor(self.step, dtype=torch.float32)

    def load(self, path: Path, family: Family, shape: ModelShape) -> None:
        """Set moments, master weights and step from a file that `export` filled. No communication."""
        with WeightFiles(path.parent, file_names=[path.name]) as files:
            if self._has_main() != any(name.startswith("main_param.") for name in files):
                raise CheckpointError(
                    f"{path}: this run {'has' if self._has_main() else 'has no'} fp32 master weights, the checkpoint "
                    "is of the other precision; resume with the precision of the checkpoint"
                )
            for kind in MOMENTS:
                load_named(
                    self._chunks,
                    family,
                    shape,
                    _Prefixed(files, kind),
                    write=lambda parameter, part, kind=kind: self._moment(parameter, kind, create=True).copy_(part),
                )
            if self._has_main():
                masters = _Prefixed(files, "main_param")
                load_named(
                    self._chunks,
                    family,
                    shape,
                    masters,
                    write=lambda parameter, part: _main_data(parameter).copy_(part),
                )
            self._set_step(float(files["step"]))

    @property
    def step(self) -> float:
        """Steps taken, equal for all parameters; 0 before the first."""
        steps = {self._step_of(_main(parameter)) for _, parameter in named_parameters(self._chunks)}
        assert len(steps) == 1, f"parameters have taken different numbers of steps: {sorted(steps)}"
        return steps.pop()

    def _step_of(self, main: Tensor) -> float:
        inner, group = self._owner[id(main)]
        return float(inner.state[main]["step"] if "step" in inner.state.get(main, {}) else group.get("step", 0.0))

    def _set_step(self, step: float) -> None:
        for _, parameter in named_parameters(self._chunks):
            main = _main(parameter)
            inner, group = self._owner[id(main)]
            if isinstance(inner, torch.optim.Adam):
                is_on_device = group.get("capturable") or group.get("fused")
                device = main.device if is_on_device else torch.device("cpu")
                inner.state[main]["step"] = torch.tensor(step, dtype=torch.float32, device=device)
            else:
                group["step"] = int(step)

    def _moment(self, parameter: Parameter, kind: str, *, create: bool = False) -> Tensor:
        main = _main(parameter)
        inner, _ = self._owner[id(main)]
        known = inner.state.get(main, {})
        if kind in known:
            return known[kind]
        zero = torch.zeros_like(main, memory_format=torch.preserve_format).detach()
        if create:
            inner.state[main][kind] = zero
        return zero

    def _has_main(self) -> bool:
        return any(_main(parameter) is not parameter for _, parameter in named_parameters(self._chunks))


@dataclass(frozen=True)
class _Prefixed(Mapping[str, Tensor]):
    """The tensors `<prefix>.<name>` of `files`, under `<name>`."""

    files: WeightFiles
    prefix: str

    def __getitem__(self, name: str) -> Tensor:
        return self.files[f"{self.prefix}.{name}"]

    def __iter__(self) -> Iterator[str]:
        start = f"{self.prefix}."
        return (name.removeprefix(start) for name in self.files if name.startswith(start))

    def __len__(self) -> int:
        return sum(1 for _ in self)


def _main(parameter: Parameter) -> Tensor:
    """What the optimizer steps: the fp32 master copy of a bf16 parameter, else the parameter itself."""
    main = getattr(parameter, "main_param", None)
    return parameter if main is None else main


def _main_data(parameter: Parameter) -> Tensor:
    return _main(parameter).data


def _torch_optimizers(optimizer: Any) -> list[torch.optim.Optimizer]:
    """The torch optimizers under Megatron's wrappers; ValueError for the distributed optimizer."""
    wrappers = getattr(optimizer, "chained_optimizers", [optimizer])
    if any(type(wrapper).__name__ == "DistributedOptimizer" for wrapper in wrappers):
        raise ValueError(
            "checkpoints do not support Megatron's distributed optimizer; set use_distributed_optimizer False"
        )
    inner = [wrapper if isinstance(wrapper, torch.optim.Optimizer) else wrapper.optimizer for wrapper in wrappers]
    return [found for found in inner if found is not None]
