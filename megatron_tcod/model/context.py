"""How the tokens of a packed microbatch are shared: padding, the part of one context-parallel rank, whole rows for attention.

    part = own_part(microbatch, layout)                  # what this rank feeds to its layers
    span = own_span(microbatch, layout)                  # which of the microbatch's S trained positions lie in it
    query = to_heads(query, cp_group)                    # [T/cp, n, D] -> [T, n/cp, D], inside the core attention
    output = to_tokens(output, cp_group)                 # and back

Every rank of a context-parallel group holds an equal, contiguous part of the packed tokens. Norms, projections and MLPs
look at one token at a time and never notice. Only attention looks further, and there the ranks trade tokens for heads:
each gets all tokens of its share of the heads, so that rows, positions and masks are those of the whole microbatch, and
the work is equal on every rank however long the rows are. (The other way, gathering all keys and values, needs masks for
queries that start in the middle of a row, and an interleaved cut to balance a causal one.)

A microbatch is padded, with a row of its own, to a multiple of the ranks that share its tokens. Padding has no trained
position, and rows do not see each other, so it changes nothing.

Not here: sequence parallelism, which Megatron's own layers do inside the part that a context-parallel rank has.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_tcod.model import parallel
from megatron_tcod.model.parallel import ParallelLayout
from megatron_tcod.trajectory import Microbatch


def own_part(microbatch: Microbatch, layout: ParallelLayout) -> Microbatch:
    """This rank's tokens and trained positions. `positions` count from the part's first token; `cu_seqlens` stays that of
    the whole microbatch, padding included."""
    microbatch = _padded(microbatch, layout.token_multiple)
    if layout.context_parallel_size == 1:
        return microbatch
    first, stop = _own_tokens(microbatch.num_tokens, layout)
    span = own_span(microbatch, layout)
    return dataclasses.replace(
        microbatch,
        token_ids=microbatch.token_ids[first:stop],  # [T/cp]
        positions=microbatch.positions[span] - first,
        target_ids=microbatch.target_ids[span],
        loss_weight=microbatch.loss_weight[span],
        old_logprobs=microbatch.old_logprobs[span],
        turn_ids=microbatch.turn_ids[span],
        episode_ids=microbatch.episode_ids[span],
    )


def own_span(microbatch: Microbatch, layout: ParallelLayout, *, cp_rank: int | None = None) -> slice:
    """The trained positions of a whole microbatch whose hidden states a rank computes; they ascend, so a slice.

    `cp_rank` None is this rank's."""
    if layout.context_parallel_size == 1:
        return slice(0, len(microbatch.positions))
    bounds = microbatch.positions.new_tensor(_own_tokens(microbatch.num_tokens, layout, cp_rank))
    start, stop = torch.searchsorted(microbatch.positions, bounds).tolist()
    return slice(start, stop)


def _own_tokens(num_tokens: int, layout: ParallelLayout, cp_rank: int | None = None) -> tuple[int, int]:
    cp_rank = parallel.cp_rank() if cp_rank is None else cp_rank
    part = -(-num_tokens // layout.token_multiple) * layout.token_multiple // layout.context_parallel_size
    return cp_rank * part, (cp_rank + 1) * part


def _padded(microbatch: Microbatch, multiple: int) -> Microbatch:
    """With a last row of token 0 where the tokens are no multiple."""
    missing = -microbatch.num_tokens % multiple
    if not missing:
        return microbatch
    ids, bounds = microbatch.token_ids, microbatch.cu_seqlens
    return dataclasses.replace(
        microbatch,
        token_ids=torch.cat([ids, ids.new_zeros(missing)]),
        cu_seqlens=torch.cat([bounds, bounds[-1:] + missing]),
    )


def to_heads(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """This rank's tokens of all heads -> all tokens of its heads: [T/cp, n, D] -> [T, max(n, cp)/cp, D].

    Fewer (key-value) heads than ranks are repeated, each for the ranks whose query heads read it.
    """
    size = dist.get_world_size(group)
    if size == 1:
        return x
    if x.size(1) % size:
        x = x.repeat_interleave(size // x.size(1), 1)
    parts = torch.stack(x.chunk(size, 1))  # [cp, T/cp, n/cp, D] what each rank is sent
    return _AllToAll.apply(parts, group).flatten(0, 1)


def to_tokens(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """All tokens of this rank's heads -> its tokens of all heads: [T, n/cp, D] -> [T/cp, n, D]."""
    size = dist.get_world_size(group)
    if size == 1:
        return x
    parts = x.unflatten(0, (size, -1))  # [cp, T/cp, n/cp, D]
    return torch.cat(_AllToAll.apply(parts.contiguous(), group).unbind(), 1)


class _AllToAll(torch.autograd.Function):
    """Part i goes to rank i, and the part from rank i takes its place; the gradients travel the same way back."""

    @staticmethod
    def forward(ctx: Any, parts: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        received = torch.empty_like(parts)
        dist.all_to_all_single(received, parts, group=group)
        return received

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return _AllToAll.apply(grad.contiguous(), ctx.group), None
