"""Adam's state of this rank's parameters, read and written alike whether each rank holds it whole or a part of it.

    for shard in adam_shards(chunks, optimizer):            # in the order of build.named_parameters, on every rank
        shard.state["exp_avg"]                              # what this rank holds; writing into it writes the optimizer
    whole = gather(shard, shard.state["exp_avg"])           # of the parameter's shape, on every rank. Collective

Megatron's distributed optimizer lays the parameters of a bucket end to end and gives each data-parallel rank an equal
stretch, so that a rank may hold all, some or none of a parameter: entries [start, stop) of its flattened tensor. Its own
checkpoint entry points fail on torch's AdamW (it keeps a `step` per parameter, which they do not know); this file reads
the maps that they read. Shards need no gathering to be saved: name, [start, stop) and the parameter's place say it all.

Not here: files, and names outside Megatron (`mapping.py`).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from torch import Tensor

from megatron_tcod.model import build

MOMENTS = ("exp_avg", "exp_avg_sq")


@dataclass(frozen=True, kw_only=True)
class AdamShard:
    """What this rank's optimizer holds of one parameter: entries [start, stop) of it, flattened; all of them without the
    distributed optimizer, none where `start == stop`.

    Example: `AdamShard(name="decoder.final_layernorm.weight", parameter=parameter, start=0, stop=48, main=main,
    state={"step": step, "exp_avg": exp_avg, "exp_avg_sq": exp_avg_sq}, group=None)`
    """

    name: str
    """In the whole model."""
    parameter: torch.nn.Parameter
    start: int
    stop: int
    main: Tensor
    """What the optimizer steps: the fp32 master weights of a bf16 parameter, else the parameter's own storage."""
    state: dict[str, Tensor]
    """`exp_avg` and `exp_avg_sq`, of the shape of `main`, and `step`; zeros before the first step."""
    group: dist.ProcessGroup | None
    """Ranks that hold the other parts; None where this one holds all."""


def adam_shards(chunks: list[torch.nn.Module], optimizer: Any) -> Iterator[AdamShard]:
    """One for each of this rank's parameters, of a MegatronOptimizer around torch's or the fused Adam. State that the
    optimizer has not made yet is made, of zeros."""
    optimizers = getattr(optimizer, "chained_optimizers", [optimizer])
    stepped = {id(main): each for each in optimizers for group in each.optimizer.param_groups for main in group["params"]}
    for name, parameter in build.named_parameters(chunks):
        cutting = [each for each in optimizers if isinstance(each, DistributedOptimizer) and _has(each, parameter)]
        if cutting:
            yield _part(name, parameter, cutting[0])
            continue
        main = getattr(parameter, "main_param", parameter)
        yield AdamShard(
            name=name,
            parameter=parameter,
            start=0,
            stop=parameter.numel(),
            main=main,
            state=_state(stepped[id(main)].optimizer, main),
            group=None,
        )


def _has(optimizer: DistributedOptimizer, parameter: torch.nn.Parameter) -> bool:
    """Whether some rank's part of this optimizer steps the parameter."""
    return any(parameter in buffer.param_index_map for buffer in optimizer.buffers)


def _part(name: str, parameter: torch.nn.Parameter, optimizer: DistributedOptimizer) -> AdamShard:
    start = stop = 0
    main = torch.empty(0, device=parameter.device)
    state = {"step": torch.tensor(0.0), **{kind: main for kind in MOMENTS}}
    if parameter in optimizer.model_param_group_index_map:
        index, place = optimizer.model_param_group_index_map[parameter]
        main = optimizer.optimizer.param_groups[index]["params"][place]
        state = _state(optimizer.optimizer, main)
        span = optimizer._get_model_param_range_map(parameter)["param"]
        start, stop = span.start, span.end
    return AdamShard(
        name=name, parameter=parameter, start=start, stop=stop, main=main, state=state, group=optimizer.data_parallel_group
    )


def _state(adam: torch.optim.Optimizer, main: Tensor) -> dict[str, Tensor]:
    state = adam.state[main]
    if "exp_avg" not in state:
        state["step"] = torch.tensor(0.0)
        for kind in MOMENTS:
            state[kind] = torch.zeros_like(main).detach()
    return state


@torch.no_grad()
def gather(shard: AdamShard, part: Tensor) -> Tensor:
    """The whole tensor, of the parameter's shape, of which each rank passes its part of entries [start, stop). Collective
    over `shard.group`; without one it is `part` itself."""
    if shard.group is None:
        return part
    whole = part.new_zeros(shard.parameter.numel())
    whole[shard.start : shard.stop] = part
    dist.all_reduce(whole, group=shard.group)  # the parts do not overlap
    return whole.view(shard.parameter.shape)
