"""Microbatches through Megatron's pipeline schedules: no pipelining, 1F1B or interleaved, forward only or with gradients.

    results = run_schedule(chunks, layout, microbatches, on_hidden, forward_only=True)

`on_hidden(index, hidden)` is called on the last stage with the hidden states [S/cp, H] at the trained positions of
microbatch `index` that lie in this rank's part of its tokens, if any do, and returns the scalar that is differentiated.
Every rank of a replica passes the same, whole microbatches; replicas may differ in number and size, and may have none.
Where replicas share out experts, each of their layers waits for the others': those with fewer microbatches run empty ones.

It does not wrap or change Megatron's schedules, reduce gradients or step an optimizer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor

from megatron_tcod.model import build, context, parallel
from megatron_tcod.model.parallel import ParallelLayout
from megatron_tcod.trajectory import Microbatch

OnHidden = Callable[[int, Tensor], Tensor]


def empty_microbatch(device: torch.device) -> Microbatch:
    """One row of one token and no trained position: fills a schedule that asks for more microbatches than there are."""
    none = torch.empty(0, dtype=torch.int64, device=device)  # [0]
    return Microbatch(
        token_ids=torch.zeros(1, dtype=torch.int64, device=device),
        cu_seqlens=torch.tensor([0, 1], dtype=torch.int32, device=device),
        positions=none,
        target_ids=none,
        loss_weight=none.float(),
        old_logprobs=none.float(),
        turn_ids=none,
        episode_ids=none,
    )


def pad_microbatches(
    microbatches: list[Microbatch], layout: ParallelLayout, device: torch.device, *, least: int = 1
) -> list[Microbatch]:
    """At least `least` microbatches, and a multiple of the pipeline size where chunks are interleaved."""
    unit = layout.pipeline_model_parallel_size if layout.virtual_pipeline_model_parallel_size else 1
    count = -(-max(len(microbatches), least) // unit) * unit
    return microbatches + [empty_microbatch(device) for _ in range(count - len(microbatches))]


def _most_of_a_replica(count: int) -> int:
    """The largest `count` of any replica. Collective over the replicas."""
    most = torch.tensor(count, device=parallel.device())
    dist.all_reduce(most, dist.ReduceOp.MAX, group=parallel.dp_group())
    return int(most)


def run_schedule(
    chunks: list[torch.nn.Module],
    layout: ParallelLayout,
    microbatches: list[Microbatch],
    on_hidden: OnHidden,
    *,
    forward_only: bool,
) -> None:
    """Drive all microbatches through the pipeline; `on_hidden` collects what it wants. Collective in a replica, and over
    all replicas where they share out experts.

    With gradients, Megatron calls the config's `finalize_model_grads_func` at the end.
    """
    num_real = len(microbatches)
    is_joint = build.unwrap(chunks[0]).config.expert_model_parallel_size > 1
    least = max(1, _most_of_a_replica(num_real)) if is_joint else 1
    padded = pad_microbatches(microbatches, layout, next(chunks[0].parameters()).device, least=least)
    padded = [context.own_part(microbatch, layout) for microbatch in padded]
    all_rows = [build.packed_rows(chunks[0], microbatch) for microbatch in padded]

    def forward_step(data: Iterator[int], chunk: torch.nn.Module) -> tuple[Tensor, Callable[..., Any]]:
        index = next(data)
        microbatch = padded[index]
        output = build.forward_hidden(chunk, microbatch, rows=all_rows[index])

        def loss(output: Tensor) -> tuple[Tensor, Tensor, None]:
            hidden = output[0].index_select(0, microbatch.positions)  # [S/cp, H]
            # A microbatch without trained positions still sends a zero gradient up the pipeline.
            total = on_hidden(index, hidden) if index < num_real and len(hidden) else hidden.sum()
            return total, torch.zeros((), dtype=torch.int), None

        return output, loss

    iterators = [iter(range(len(padded))) for _ in chunks]
    schedule = get_forward_backward_func(
        pp_size=layout.pipeline_model_parallel_size, vp_size=layout.virtual_pipeline_model_parallel_size
    )
    schedule(
        forward_step_func=forward_step,
        data_iterator=iterators if len(chunks) > 1 else iterators[0],
        model=chunks if len(chunks) > 1 else chunks[0],
        num_microbatches=len(padded),
        seq_length=padded[0].num_tokens,  # variable_seq_lengths: shapes are exchanged, this one is not used
        micro_batch_size=1,
        forward_only=forward_only,
    )
