"""Exact causal attention over packed segments on torch's scaled_dot_product_attention, for rows and for prefix forests.

    plan = SegmentPlan.build(microbatch.cu_seqlens, microbatch.parents)     # once per microbatch
    output = segment_attention(query, key, value, plan, scale=D**-0.5)      # [T, n, D], in every layer

A query sees its own segment up to itself, and all of the segments that its own continues. Segments with equally much
before them and of similar length form a group: their queries are padded on the right to the longest, their keys are
[what is before | the segment], gathered for each, and one call attends to the whole group. Right padding is invisible to
real tokens, because a causal query never looks right. Rows that share nothing have nothing before them: such a group is a
plain causal call without a mask. Other groups take one mask [L, P + L] for all their segments.

Each token is a query once, whatever shares it, so the linear work shrinks to the distinct tokens. Keys and values are
copied to every segment that sees them, and their gradients summed over those, in fp32.

The same in the terms of FlashAttention's variable-length kernels is `kv_index` with the cumulative lengths of
`path_lengths`: queries as they lie, keys gathered path by path, causal mask aligned to the bottom right
(`model/flash_attention.py`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_tcod.trajectory import first_positions

SIMILAR_LENGTH = 0.7
"""A segment joins a group when it is at least this fraction of the group's longest: padding stays under 1 / 0.7 in tokens
and, without anything before, 1 / 0.49 in attention scores."""


@dataclass(frozen=True)
class SegmentGroup:
    """Segments of similar length behind equally many tokens. Example: `SegmentGroup(num=8, length=200, before=800, mask)`"""

    num: int
    length: int
    """L: query slots of each segment."""
    before: int
    """P: tokens before each segment in its row."""
    mask: Tensor | None  # [L, P + L] bool, True where a query sees a key; None is plain causal


@dataclass(frozen=True)
class SegmentPlan:
    """Slots of padded queries and keys, the groups back to back, and which packed token stands in each."""

    groups: tuple[SegmentGroup, ...]
    query_index: Tensor  # [NQ] packed token of each query slot; padding repeats the segment's last token
    slots: Tensor  # [T] query slot of each packed token
    key_index: Tensor | None  # [NK] packed token of each key slot; None where keys lie as queries do

    @classmethod
    def build(cls, cu_seqlens: Tensor, parents: Tensor | None = None) -> SegmentPlan:
        """Segments of no token are allowed."""
        bounds, device = cu_seqlens.tolist(), cu_seqlens.device
        firsts = first_positions(cu_seqlens, parents)
        before = _tokens_before(bounds, None if parents is None else parents.tolist())
        queries, keys, is_real, groups = [], [], [], []
        for members in _groups([stop - start for start, stop in zip(bounds, bounds[1:], strict=False)], firsts):
            starts = torch.tensor([bounds[one] for one in members])[:, None]  # [num, 1]
            stops = torch.tensor([bounds[one + 1] for one in members])[:, None]  # [num, 1]
            own = starts + torch.arange(int((stops - starts).max()))  # [num, L]
            is_real.append((own < stops).flatten())
            own = torch.minimum(own, stops - 1)
            context = torch.stack([before[one] for one in members])  # [num, P]
            length, num_before = own.size(1), context.size(1)
            mask = None
            if num_before:
                mask = torch.ones(length, num_before + length, dtype=torch.bool).tril(num_before).to(device)
            queries.append(own.flatten())
            keys.append(torch.cat([context, own], 1).flatten())
            groups.append(SegmentGroup(len(members), length, num_before, mask))
        query_index = torch.cat(queries) if queries else torch.empty(0, dtype=torch.int64)
        slots = torch.empty(bounds[-1], dtype=torch.int64)  # [T]
        if queries:
            real = torch.cat(is_real).nonzero().flatten()  # [T]
            slots[query_index[real]] = real
        return cls(
            groups=tuple(groups),
            query_index=query_index.to(device),
            slots=slots.to(device),
            key_index=torch.cat(keys).to(device) if any(group.before for group in groups) else None,
        )


def cost_of_pair(shape: Any) -> float:
    """What a pair of a query and a key costs in a layer of a `ModelShape`, in tokens' worth of its matrix products.

    Multiplications: 2 n D a pair, for the score and the sum of values; the size of the layer's matrices a token.
    """
    queries, keys = (heads * shape.kv_channels for heads in (shape.num_attention_heads, shape.num_query_groups))
    return 2 * queries / (shape.hidden_size * (2 * queries + 2 * keys + 3 * shape.ffn_hidden_size))


def kv_index(cu_seqlens: Tensor, parents: Tensor) -> Tensor:
    """Packed tokens that each segment sees, segment after segment: [sum of `path_lengths`] int64."""
    bounds = cu_seqlens.tolist()
    before = _tokens_before(bounds, parents.tolist())
    parts = [torch.cat([seen, torch.arange(*bounds[at : at + 2])]) for at, seen in enumerate(before)]
    return torch.cat(parts).to(cu_seqlens.device)


def path_lengths(cu_seqlens: Tensor, parents: Tensor | None) -> Tensor:
    """[B] Tokens of the row up to each segment's end."""
    return torch.tensor(first_positions(cu_seqlens, parents), device=cu_seqlens.device) + cu_seqlens.diff()


def _tokens_before(bounds: list[int], parents: list[int] | None) -> list[Tensor]:
    """Packed tokens of the segments that each segment continues, in the order of the row."""
    before = [torch.empty(0, dtype=torch.int64)] * (len(bounds) - 1)
    for segment, parent in enumerate(parents or []):
        if parent >= 0:
            before[segment] = torch.cat([before[parent], torch.arange(*bounds[parent : parent + 2])])
    return before


def _groups(lengths: list[int], firsts: list[int]) -> list[list[int]]:
    """Segments with equally much before them and of similar length: most tokens first, packed order within a group."""
    order = sorted((at for at in range(len(lengths)) if lengths[at]), key=lambda at: (firsts[at], -lengths[at]))
    groups: list[list[int]] = []
    for at in order:
        longest = groups[-1][0] if groups else None
        if longest is not None and firsts[at] == firsts[longest] and lengths[at] >= SIMILAR_LENGTH * lengths[longest]:
            groups[-1].append(at)
        else:
            groups.append([at])
    return [sorted(group) for group in groups]


class _GatherQueries(torch.autograd.Function):
    """Packed [T, n, D] -> slots [NQ, n, D]. A padded slot has no gradient, so backward is a gather too."""

    @staticmethod
    def forward(ctx: Any, packed: Tensor, plan: SegmentPlan) -> Tensor:
        ctx.plan = plan
        return packed.index_select(0, plan.query_index)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return grad.index_select(0, ctx.plan.slots), None


class _GatherKeys(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, packed: Tensor, index: Tensor) -> Tensor:
        ctx.save_for_backward(index)
        ctx.num_tokens = packed.size(0)
        return packed.index_select(0, index)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        (index,) = ctx.saved_tensors
        wide = torch.promote_types(grad.dtype, torch.float32)
        total = torch.zeros(ctx.num_tokens, *grad.shape[1:], dtype=wide, device=grad.device)
        return total.index_add_(0, index, grad.to(wide)).to(grad.dtype), None


class _TakeTokens(torch.autograd.Function):
    """Slots [NQ, n, D] -> packed [T, n, D]; padding drops out."""

    @staticmethod
    def forward(ctx: Any, padded: Tensor, plan: SegmentPlan) -> Tensor:
        ctx.plan = plan
        return padded.index_select(0, plan.slots)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        plan = ctx.plan
        padded = grad.new_zeros(len(plan.query_index), *grad.shape[1:])
        return padded.index_copy_(0, plan.slots, grad), None


def gather_keys(packed: Tensor, index: Tensor) -> Tensor:
    """Packed [T, n, D] -> [NK, n, D]; a token may stand in many slots, whose gradients are summed in fp32 or wider."""
    return _GatherKeys.apply(packed, index)


def segment_attention(query: Tensor, key: Tensor, value: Tensor, plan: SegmentPlan, *, scale: float) -> Tensor:
    """Causal attention along each row. query [T, n, D], key and value [T, n_kv, D] -> [T, n, D]."""
    if not plan.groups:
        return query * 0.0
    query = _GatherQueries.apply(query, plan)  # [NQ, n, D]
    if plan.key_index is None:
        key, value = _GatherQueries.apply(key, plan), _GatherQueries.apply(value, plan)
    else:
        key, value = gather_keys(key, plan.key_index), gather_keys(value, plan.key_index)  # [NK, n_kv, D]
    query_sizes = [group.num * group.length for group in plan.groups]
    key_sizes = [group.num * (group.before + group.length) for group in plan.groups]
    parts = zip(plan.groups, query.split(query_sizes), key.split(key_sizes), value.split(key_sizes), strict=True)
    outputs = []
    for group, *qkv in parts:
        q, k, v = (x.unflatten(0, (group.num, -1)).transpose(1, 2) for x in qkv)  # [num, n, L or P + L, D]
        attended = F.scaled_dot_product_attention(
            q, k, v, attn_mask=group.mask, is_causal=group.mask is None, scale=scale, enable_gqa=q.size(1) != k.size(1)
        )
        outputs.append(attended.transpose(1, 2).flatten(0, 1))  # [num * L, n, D]
    return _TakeTokens.apply(outputs[0] if len(outputs) == 1 else torch.cat(outputs), plan)
