"""How one Megatron parameter and its Hugging Face tensors are the same numbers in two layouts.

A `Rule` names a Megatron parameter, the Hugging Face tensors it holds, their symbolic dimensions, and a kind. The kind
picks a pair of inverse functions from LAYOUTS: `shard` builds one tensor-parallel rank's parameter from the full
tensors, `join` rebuilds the full tensors from all shards.

    slot = Slot.of(rule, layer=3)
    mine = slot.shard([q, k, v], shape, tp_size=2, tp_rank=1)     # this rank's linear_qkv
    q, k, v = slot.join([shard_0, shard_1], shape)                # bit-identical

Pure tensor work on any device, meta included: no process groups and no files. Pipeline stages are a matter of which
slots a rank has, so they do not appear here.

    kind        Megatron's full tensor                          cut over tp
    replicated  as it is                                        not at all
    column      as it is                                        rows
    row         as it is                                        columns
    vocab       rows of zeros up to the padded vocabulary       rows
    qkv         per query group: its queries, its key, value    rows
    gate_up     each rank's gate rows, then its up rows         rows of both
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch

from megatron_tcod.model.build import ModelShape, padded_vocab_size

DIMS: dict[str, tuple[Callable[[ModelShape], int], str]] = {
    "hidden": (lambda shape: shape.hidden_size, "hidden_size"),
    "ffn": (lambda shape: shape.ffn_hidden_size, "intermediate_size"),
    "vocab": (lambda shape: shape.vocab_size, "vocab_size"),
    "query": (lambda shape: shape.num_attention_heads * shape.kv_channels, "num_attention_heads * head_dim"),
    "kv": (lambda shape: shape.num_query_groups * shape.kv_channels, "num_key_value_heads * head_dim"),
    "head": (lambda shape: shape.kv_channels, "head_dim"),
}
"""Symbolic dimension -> (its size, the config.json fields that set it)."""


@dataclass(frozen=True)
class Rule:
    """One Megatron parameter and the Hugging Face tensors in it; `{layer}` in the names counts from 0 over the model.

    Example: `Rule("decoder.layers.{layer}.mlp.linear_fc2.weight", "row",
    {"model.layers.{layer}.mlp.down_proj.weight": "hidden ffn"})`
    """

    megatron: str
    kind: str
    hf: Mapping[str, str]
    """Hugging Face name -> its dimensions, names of DIMS separated by spaces."""


@dataclass(frozen=True)
class Slot:
    """A rule with the layer filled in: one parameter of the unsharded model."""

    megatron: str
    kind: str
    hf: Mapping[str, str]

    @classmethod
    def of(cls, rule: Rule, *, layer: int | None = None) -> Slot:
        names = {name.format(layer=layer): dims for name, dims in rule.hf.items()}
        return cls(rule.megatron.format(layer=layer), rule.kind, names)

    def hf_shapes(self, shape: ModelShape) -> dict[str, tuple[int, ...]]:
        """Full, unpadded shape of each Hugging Face tensor."""
        return {name: tuple(DIMS[dim][0](shape) for dim in dims.split()) for name, dims in self.hf.items()}

    def shard_shape(self, shape: ModelShape, tp_size: int) -> tuple[int, ...]:
        """Shape of the Megatron parameter on each tensor-parallel rank. Raises ValueError when tp does not divide."""
        full = [torch.empty(size, device="meta") for size in self.hf_shapes(shape).values()]
        return tuple(self.shard(full, shape, tp_size=tp_size, tp_rank=0).shape)

    def shard(self, tensors: Sequence[torch.Tensor], shape: ModelShape, *, tp_size: int, tp_rank: int) -> torch.Tensor:
        """One rank's Megatron parameter from the full Hugging Face tensors, in the order of `hf`."""
        assert len(tensors) == len(self.hf), (self.megatron, len(tensors))
        try:
            return LAYOUTS[self.kind].shard(tensors, shape, tp_size, tp_rank)
        except _Indivisible as error:
            raise ValueError(
                f"{self.megatron}: {error.size} rows or columns do not split over tensor-model-parallel-size "
                f"{tp_size}; choose a size that divides the attention heads, the query groups and the ffn width"
            ) from None

    def join(self, shards: Sequence[torch.Tensor], shape: ModelShape) -> list[torch.Tensor]:
        """The full Hugging Face tensors from the shards of all ranks; views of the shards where the layout allows."""
        return LAYOUTS[self.kind].join(shards, shape)


@dataclass(frozen=True)
class Layout:
    """Two inverse functions; `is_cut` is False when every tensor-parallel rank holds the same numbers."""

    shard: Callable[[Sequence[torch.Tensor], ModelShape, int, int], torch.Tensor]
    join: Callable[[Sequence[torch.Tensor], ModelShape], list[torch.Tensor]]
    is_cut: bool = True


class _Indivisible(Exception):
    def __init__(self, size: int) -> None:
        self.size = size


def _cut(full: torch.Tensor, dim: int, tp_size: int, tp_rank: int) -> torch.Tensor:
    if full.shape[dim] % tp_size:
        raise _Indivisible(full.shape[dim])
    return full.chunk(tp_size, dim)[tp_rank]


def _concatenate(shards: Sequence[torch.Tensor], dim: int) -> torch.Tensor:
    return shards[0] if len(shards) == 1 else torch.cat(list(shards), dim)


def _shard_vocab(tensors: Sequence[torch.Tensor], shape: ModelShape, tp_size: int, tp_rank: int) -> torch.Tensor:
    (full,) = tensors  # [V, H]
    num_rows = padded_vocab_size(shape.vocab_size, tp_size) // tp_size
    real = full[tp_rank * num_rows : (tp_rank + 1) * num_rows]  # [<= rows, H]  empty on a rank of padding only
    if real.shape[0] == num_rows:
        return real
    return torch.cat([real, real.new_zeros(num_rows - real.shape[0], full.shape[1])])


def _join_vocab(shards: Sequence[torch.Tensor], shape: ModelShape) -> list[torch.Tensor]:
    return [_concatenate(shards, 0)[: shape.vocab_size]]


def _shard_qkv(tensors: Sequence[torch.Tensor], shape: ModelShape, tp_size: int, tp_rank: int) -> torch.Tensor:
    groups = [part.unflatten(0, (shape.num_query_groups, -1)) for part in tensors]  # [G, heads_in_group * D, ...]
    return _cut(torch.cat(groups, 1).flatten(0, 1), 0, tp_size, tp_rank)


def _join_qkv(shards: Sequence[torch.Tensor], shape: ModelShape) -> list[torch.Tensor]:
    head = shape.kv_channels
    queries = shape.num_attention_heads // shape.num_query_groups * head
    fused = _concatenate(shards, 0).unflatten(0, (shape.num_query_groups, -1))  # [G, (queries + 2 * D), ...]
    return [part.flatten(0, 1) for part in fused.split([queries, head, head], 1)]


def _shard_gate_up(tensors: Sequence[torch.Tensor], shape: ModelShape, tp_size: int, tp_rank: int) -> torch.Tensor:
    return torch.cat([_cut(part, 0, tp_size, tp_rank) for part in tensors])


def _join_gate_up(shards: Sequence[torch.Tensor], shape: ModelShape) -> list[torch.Tensor]:
    halves = [shard.chunk(2) for shard in shards]
    return [_concatenate(part, 0) for part in zip(*halves, strict=True)]


LAYOUTS = {
    "replicated": Layout(
        shard=lambda tensors, shape, tp_size, tp_rank: tensors[0],
        join=lambda shards, shape: [shards[0]],
        is_cut=False,
    ),
    "column": Layout(
        shard=lambda tensors, shape, tp_size, tp_rank: _cut(tensors[0], 0, tp_size, tp_rank),
        join=lambda shards, shape: [_concatenate(shards, 0)],
    ),
    "row": Layout(
        shard=lambda tensors, shape, tp_size, tp_rank: _cut(tensors[0], 1, tp_size, tp_rank),
        join=lambda shards, shape: [_concatenate(shards, 1)],
    ),
    "vocab": Layout(shard=_shard_vocab, join=_join_vocab),
    "qkv": Layout(shard=_shard_qkv, join=_join_qkv),
    "gate_up": Layout(shard=_shard_gate_up, join=_join_gate_up),
}
