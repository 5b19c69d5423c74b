"""What a checkpoint holds of an optimizer, under names that no layout changes.

    state = optimizer_state(chunks, optimizer)
    tensors = state.sharded(model_shards)              # Megatron's sharded tensors, to save or to fill
    scalars = state.scalars()                          # JSON
    state.load(loaded, scalars)

`OptimizerState` is the seam: an optimizer that cuts its state otherwise brings a class of its own and a line in
`optimizer_state`. Adam's tensors are filed as `optimizer.state.<kind>.<parameter>` like Megatron's own, each beside the
parameter it belongs to and cut like it. Hyperparameters are not saved: those of the settings count.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing.optimizer import get_param_id_to_sharded_param_map, make_sharded_optimizer_tensor
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from torch import Tensor
from torch.nn import Module, Parameter

from megatron_tcod.model import parallel
from megatron_tcod.model.adam_shards import MOMENTS, AdamShard, adam_shards, gather
from megatron_tcod.model.build import named_parameters

MASTER = "fp32_param"


class OptimizerState(Protocol):
    """The part of an optimizer that a checkpoint must hold."""

    def sharded(self, model: Mapping[str, Any]) -> dict[str, Any]:
        """This rank's tensors as Megatron's sharded tensors; `model` holds those of its parameters."""

    def scalars(self) -> dict[str, Any]:
        """The rest, as JSON; equal on every rank and in every layout."""

    def check(self, scalars: Mapping[str, Any]) -> None:
        """ValueError when a checkpoint with these scalars belongs to another kind of optimizer."""

    def load(self, loaded: Mapping[str, Any], scalars: Mapping[str, Any]) -> None:
        """Take what `sharded` named, as `read_sharded` returned it."""


def optimizer_state(chunks: list[Module], optimizer: Any) -> OptimizerState:
    """The state of Megatron's optimizer or of a plain torch Adam; ValueError for one that is not known."""
    parts = getattr(optimizer, "chained_optimizers", [optimizer])
    is_cut = any(isinstance(part, DistributedOptimizer) for part in parts)
    return DistributedAdamState(chunks, optimizer) if is_cut else AdamState(chunks, optimizer)


class AdamState:
    """Adam's moments, fp32 master weights and step count of this rank's parameters, through Megatron's wrappers.

    Works on torch's Adam and AdamW (a step per parameter) and on fused ones that count in the parameter group. State
    that does not exist yet is created, as zeros.
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

    def sharded(self, model: Mapping[str, Any]) -> dict[str, Any]:
        parameters = dict(named_parameters(self._chunks))
        places = get_param_id_to_sharded_param_map(dict(model), parameters.values())
        return {
            f"{kind}.{name}": make_sharded_optimizer_tensor(places[index], tensor, f"optimizer.state.{kind}")
            for index, (name, parameter) in enumerate(parameters.items())
            for kind, tensor in self.tensors(parameter).items()
        }

    def tensors(self, parameter: Parameter) -> dict[str, Tensor]:
        """What the optimizer holds for one parameter, by kind; writing into it writes the optimizer's state."""
        main = _main(parameter)
        known = self._owner[id(main)][0].state[main]
        for kind in MOMENTS:
            if kind not in known:
                known[kind] = torch.zeros_like(main, memory_format=torch.preserve_format).detach()
        if "step" not in known and isinstance(self._owner[id(main)][0], torch.optim.Adam):
            self._set_step(main, 0.0)
        found = {kind: known[kind] for kind in MOMENTS}
        return found if main is parameter else {**found, MASTER: main.data}

    def scalars(self) -> dict[str, Any]:
        steps = {self._step_of(_main(parameter)) for _, parameter in named_parameters(self._chunks)}
        assert len(steps) == 1, f"parameters have taken different numbers of steps: {sorted(steps)}"
        return {"step": steps.pop(), "has_master_weights": self._has_masters()}

    def check(self, scalars: Mapping[str, Any]) -> None:
        check_masters(self._has_masters(), scalars)

    def load(self, loaded: Mapping[str, Any], scalars: Mapping[str, Any]) -> None:
        for name, parameter in named_parameters(self._chunks):
            for kind, tensor in self.tensors(parameter).items():
                tensor.copy_(loaded[f"{kind}.{name}"])
            self._set_step(_main(parameter), scalars["step"])

    def _step_of(self, main: Tensor) -> float:
        inner, group = self._owner[id(main)]
        return float(inner.state[main]["step"] if "step" in inner.state.get(main, {}) else group.get("step", 0.0))

    def _set_step(self, main: Tensor, step: float) -> None:
        inner, group = self._owner[id(main)]
        if isinstance(inner, torch.optim.Adam):
            is_on_device = group.get("capturable") or group.get("fused")
            device = main.device if is_on_device else torch.device("cpu")
            inner.state[main]["step"] = torch.tensor(step, dtype=torch.float32, device=device)
        else:
            group["step"] = int(step)

    def _has_masters(self) -> bool:
        return any(_main(parameter) is not parameter for _, parameter in named_parameters(self._chunks))


class DistributedAdamState:
    """The same of an optimizer that gives each data-parallel rank a stretch of the state, under the same names.

    So a run may go on with the distributed optimizer and without, at any data-parallel size. Each tensor is gathered from
    the ranks that hold its parts and kept whole in host memory until it is written: the state of this rank's parameters,
    12 bytes a parameter, once per rank. Every method is collective over the replicas.
    """

    def __init__(self, chunks: list[Module], optimizer: Any) -> None:
        self._chunks, self._optimizer = chunks, optimizer

    def sharded(self, model: Mapping[str, Any]) -> dict[str, Any]:
        parameters = [parameter for _, parameter in named_parameters(self._chunks)]
        places = get_param_id_to_sharded_param_map(dict(model), parameters)
        return {
            f"{kind}.{shard.name}": make_sharded_optimizer_tensor(
                places[index], gather(shard, part).cpu(), f"optimizer.state.{kind}"
            )
            for index, shard in enumerate(adam_shards(self._chunks, self._optimizer))
            for kind, part in self._parts(shard).items()
        }

    def scalars(self) -> dict[str, Any]:
        counts = [float(shard.state["step"]) for shard in adam_shards(self._chunks, self._optimizer)]
        counts += [float(group.get("step", 0.0)) for group in self._groups()]
        step = torch.tensor([max(counts)], device=parallel.device())
        dist.all_reduce(step, dist.ReduceOp.MAX)  # a rank may hold no part of any parameter
        return {"step": float(step), "has_master_weights": self._has_masters()}

    def check(self, scalars: Mapping[str, Any]) -> None:
        check_masters(self._has_masters(), scalars)

    def load(self, loaded: Mapping[str, Any], scalars: Mapping[str, Any]) -> None:
        for shard in adam_shards(self._chunks, self._optimizer):
            for kind, part in self._parts(shard).items():
                whole = loaded[f"{kind}.{shard.name}"].reshape(-1)
                part.copy_(whole[shard.start : shard.stop].view(part.shape))
            shard.state["step"].fill_(scalars["step"])
        for group in self._groups():
            if "step" in group or not isinstance(self._inner()[0], torch.optim.Adam):
                group["step"] = int(scalars["step"])

    def _parts(self, shard: AdamShard) -> dict[str, Tensor]:
        moments = {kind: shard.state[kind] for kind in MOMENTS}
        return {**moments, MASTER: shard.main.data} if _has_master(shard.parameter) else moments

    def _inner(self) -> list[torch.optim.Optimizer]:
        return [part.optimizer for part in getattr(self._optimizer, "chained_optimizers", [self._optimizer])]

    def _groups(self) -> list[dict[str, Any]]:
        return [group for inner in self._inner() for group in inner.param_groups]

    def _has_masters(self) -> bool:
        return any(_has_master(parameter) for _, parameter in named_parameters(self._chunks))


def _has_master(parameter: Parameter) -> bool:
    return parameter.dtype is not torch.float32


def check_masters(has_masters: bool, scalars: Mapping[str, Any]) -> None:
    """ValueError unless the checkpoint has fp32 master weights if and only if this run has."""
    if has_masters != scalars["has_master_weights"]:
        raise ValueError(
            f"this run {'has' if has_masters else 'has no'} fp32 master weights, the checkpoint is of the other "
            "precision; give or leave out --bf16 as the run that saved it did"
        )


def _main(parameter: Parameter) -> Tensor:
    """What the optimizer steps: the fp32 master copy of a bf16 parameter, else the parameter itself."""
    main = getattr(parameter, "main_param", None)
    return parameter if main is None else main


def _torch_optimizers(optimizer: Any) -> list[torch.optim.Optimizer]:
    """The torch optimizers under Megatron's wrappers."""
    wrappers = getattr(optimizer, "chained_optimizers", [optimizer])
    inner = [wrapper if isinstance(wrapper, torch.optim.Optimizer) else wrapper.optimizer for wrapper in wrappers]
    return [found for found in inner if found is not None]
