"""How one Megatron parameter and its Hugging Face tensors are the same numbers in two layouts.

A `Rule` names a Megatron parameter, the Hugging Face tensors it holds, their symbolic dimensions, and a kind. The kind
picks a `Layout` from LAYOUTS, the one place that says how a parameter is laid out: `merge` and `split` go between the
Hugging Face tensors and Megatron's full tensor, `cut` and `uncut` between that and the tensor-parallel ranks' parts.

    slot = Slot.of(rule, layer=3)
    mine = slot.shard([q, k, v], shape, tp_size=2, tp_rank=1)     # this rank's linear_qkv
    q, k, v = slot.join([shard_0, shard_1], shape)                # bit-identical

Pure tensor work on any device, meta included: no process groups and no files. Pipeline stages and expert parallelism
are a matter of which slots a rank has, so they do not appear here.

    kind        Megatron's full tensor                          cut over tp
    replicated  as it is                                        not at all
    column      as it is                                        rows
    row         as it is                                        columns
    vocab       rows of zeros up to the padded vocabulary       rows
    qkv         per query group: its queries, its key, value    rows
    gate_up     the gate rows, then the up rows                 rows of each half
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch

from megatron_tcod.model.shape import ModelShape, padded_vocab_size

DIMS: dict[str, tuple[Callable[[ModelShape], int], str]] = {
    "hidden": (lambda shape: shape.hidden_size, "hidden_size"),
    "ffn": (lambda shape: shape.ffn_hidden_size, "intermediate_size"),
    "vocab": (lambda shape: shape.vocab_size, "vocab_size"),
    "query": (lambda shape: shape.num_attention_heads * shape.kv_channels, "num_attention_heads * head_dim"),
    "kv": (lambda shape: shape.num_query_groups * shape.kv_channels, "num_key_value_heads * head_dim"),
    "head": (lambda shape: shape.kv_channels, "head_dim"),
    "experts": (lambda shape: shape.experts.num_experts, "num_experts"),
    "expert_ffn": (lambda shape: shape.experts.ffn_hidden_size, "moe_intermediate_size"),
}
"""Symbolic dimension -> (its size, the config.json fields that set it)."""


@dataclass(frozen=True)
class Rule:
    """One Megatron parameter and the Hugging Face tensors in it; `{layer}` and `{expert}` count from 0 over the model.

    Example: `Rule("decoder.layers.{layer}.mlp.linear_fc2.weight", "row",
    {"model.layers.{layer}.mlp.down_proj.weight": "hidden ffn"})`
    """

    megatron: str
    kind: str
    hf: Mapping[str, str]
    """Hugging Face name -> its dimensions, names of DIMS separated by spaces."""


@dataclass(frozen=True)
class Slot:
    """A rule with the layer and the expert filled in: one parameter of the unsharded model."""

    megatron: str
    kind: str
    hf: Mapping[str, str]
    expert: int | None = None
    """The expert it belongs to, and so the expert-parallel ranks that hold it; None: all of them do."""

    @classmethod
    def of(cls, rule: Rule, *, layer: int | None = None, expert: int | None = None) -> Slot:
        names = {name.format(layer=layer, expert=expert): dims for name, dims in rule.hf.items()}
        return cls(rule.megatron.format(layer=layer, expert=expert), rule.kind, names, expert)

    def hf_shapes(self, shape: ModelShape) -> dict[str, tuple[int, ...]]:
        """Full, unpadded shape of each Hugging Face tensor."""
        return {name: tuple(DIMS[dim][0](shape) for dim in dims.split()) for name, dims in self.hf.items()}

    def shard_shape(self, shape: ModelShape, tp_size: int) -> tuple[int, ...]:
        """Shape of the Megatron parameter on each tensor-parallel rank. Raises ValueError when tp does not divide."""
        full = [torch.empty(size, device="meta") for size in self.hf_shapes(shape).values()]
        return tuple(self.shard(full, shape, tp_size=tp_size, tp_rank=0).shape)

    def merge(self, tensors: Sequence[torch.Tensor], shape: ModelShape) -> torch.Tensor:
        """Megatron's full tensor, vocabulary padding left out, from the Hugging Face tensors in the order of `hf`."""
        assert len(tensors) == len(self.hf), (self.megatron, len(tensors))
        return LAYOUTS[self.kind].merge(tensors, shape)

    def cut(self, full: torch.Tensor, *, tp_size: int, tp_rank: int) -> torch.Tensor:
        """One rank's part of what `merge` returned. Raises ValueError when tp does not divide."""
        try:
            return LAYOUTS[self.kind].cut(full, tp_size=tp_size, tp_rank=tp_rank)
        except Indivisible as error:
            raise ValueError(
                f"{self.megatron}: {error.size} rows or columns do not split over tensor-model-parallel-size "
                f"{tp_size}; choose a size that divides the attention heads, the query groups and the ffn width"
            ) from None

    def shard(self, tensors: Sequence[torch.Tensor], shape: ModelShape, *, tp_size: int, tp_rank: int) -> torch.Tensor:
        """`merge`, then `cut`: one rank's Megatron parameter from the full Hugging Face tensors."""
        return self.cut(self.merge(tensors, shape), tp_size=tp_size, tp_rank=tp_rank)

    def join(self, shards: Sequence[torch.Tensor], shape: ModelShape) -> list[torch.Tensor]:
        """The full Hugging Face tensors from the shards of all ranks; views of the shards where the layout allows."""
        layout = LAYOUTS[self.kind]
        return layout.split(layout.uncut(shards), shape)


class Indivisible(Exception):
    """A dimension of `size` that the tensor-parallel ranks cannot share equally."""

    def __init__(self, size: int) -> None:
        self.size = size


def _first(tensors: Sequence[torch.Tensor], shape: ModelShape) -> torch.Tensor:
    return tensors[0]


def _alone(full: torch.Tensor, shape: ModelShape) -> list[torch.Tensor]:
    return [full]


@dataclass(frozen=True)
class Layout:
    """How Megatron's full tensor is made, and how tensor parallelism cuts it."""

    dim: int | None
    """The dimension that is cut; None when every rank holds the whole."""
    merge: Callable[[Sequence[torch.Tensor], ModelShape], torch.Tensor] = _first
    split: Callable[[torch.Tensor, ModelShape], list[torch.Tensor]] = _alone
    stride: int = 1
    """Equal parts along `dim` that are cut each on its own and stacked again on every rank."""
    is_padded: bool = False
    """Whether rows of zeros fill the last ranks up to the padded vocabulary."""

    def cut(self, full: torch.Tensor, *, tp_size: int, tp_rank: int) -> torch.Tensor:
        """Rank `tp_rank`'s part of a full tensor; a view of it where one part is all."""
        if self.dim is None:
            return full
        if self.is_padded:
            return _padded_rows(full, tp_size, tp_rank)
        if full.shape[self.dim] % (self.stride * tp_size):
            raise Indivisible(full.shape[self.dim] // self.stride)
        parts = [part.chunk(tp_size, self.dim)[tp_rank] for part in full.chunk(self.stride, self.dim)]
        return _concatenate(parts, self.dim)

    def uncut(self, shards: Sequence[torch.Tensor]) -> torch.Tensor:
        """The inverse of `cut`, given every rank's part in rank order; padding stays."""
        if self.dim is None or len(shards) == 1:
            return shards[0]
        pieces = [shard.chunk(self.stride, self.dim) for shard in shards]  # [tp][stride]
        return _concatenate([piece for part in zip(*pieces, strict=True) for piece in part], self.dim)


def _concatenate(parts: Sequence[torch.Tensor], dim: int) -> torch.Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(list(parts), dim)


def _padded_rows(full: torch.Tensor, tp_size: int, tp_rank: int) -> torch.Tensor:
    num_rows = padded_vocab_size(full.shape[0], tp_size) // tp_size
    real = full[tp_rank * num_rows : (tp_rank + 1) * num_rows]  # [<= rows, H]  empty on a rank of padding only
    if real.shape[0] == num_rows:
        return real
    return torch.cat([real, real.new_zeros(num_rows - real.shape[0], full.shape[1])])


def _without_padding(full: torch.Tensor, shape: ModelShape) -> list[torch.Tensor]:
    return [full[: shape.vocab_size]]


def _merge_qkv(tensors: Sequence[torch.Tensor], shape: ModelShape) -> torch.Tensor:
    groups = [part.unflatten(0, (shape.num_query_groups, -1)) for part in tensors]  # [G, heads_in_group * D, ...]
    return torch.cat(groups, 1).flatten(0, 1)


def _split_qkv(full: torch.Tensor, shape: ModelShape) -> list[torch.Tensor]:
    head = shape.kv_channels
    queries = shape.num_attention_heads // shape.num_query_groups * head
    fused = full.unflatten(0, (shape.num_query_groups, -1))  # [G, (queries + 2 * D), ...]
    return [part.flatten(0, 1) for part in fused.split([queries, head, head], 1)]


LAYOUTS = {
    "replicated": Layout(dim=None),
    "column": Layout(dim=0),
    "row": Layout(dim=1),
    "vocab": Layout(dim=0, split=_without_padding, is_padded=True),
    "qkv": Layout(dim=0, merge=_merge_qkv, split=_split_qkv),
    "gate_up": Layout(
        dim=0,
        merge=lambda tensors, shape: torch.cat(list(tensors)),
        split=lambda full, shape: list(full.chunk(2)),
        stride=2,
    ),
}
