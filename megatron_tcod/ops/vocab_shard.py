"""Who owns which tokens of a vocabulary that is cut over a tensor-parallel group, and how a head changes its cut.

    teacher_head = align_head(teacher_head, vocab_size, padded_to=student_padded, tp_group=tp_group)    # once

Rank r of n owns ids [r * rows, (r + 1) * rows) with `rows` the padded vocabulary over n; those from `vocab_size` on are
padding. Two models padded differently are cut at different ids, so their shards do not hold the same tokens.

Not here: gradients through a changed cut, and caching: the caller keeps what `align_head` returns.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.distributed as dist


class VocabShard(NamedTuple):
    """The real tokens of one rank: ids [first, first + columns); `columns` is 0 where there is only padding."""

    first: int
    columns: int

    @classmethod
    def of(cls, vocab_size: int, rows: int, rank: int) -> VocabShard:
        return cls(rank * rows, min(max(vocab_size - rank * rows, 0), rows))

    def overlap(self, other: VocabShard) -> int:
        start, stop = max(self.first, other.first), min(self.first + self.columns, other.first + other.columns)
        return max(stop - start, 0)


@torch.no_grad()
def align_head(head: torch.Tensor, vocab_size: int, padded_to: int, tp_group: dist.ProcessGroup | None) -> torch.Tensor:
    """Cut a head shard anew for another padded vocabulary, so that student and teacher shards hold the same tokens.

    head [V_padded/tp, H], this rank's shard; returns [padded_to/tp, H] without gradient, rows of padding zero. Each
    token's row travels once, from the rank that has it to the rank that needs it: one all-to-all, meant for once
    before training, with the result kept by the caller. Collective: each rank of `tp_group` calls it with equal sizes.
    Raises ValueError when `padded_to` does not divide over the group or does not hold `vocab_size` tokens.
    """
    size, rank = group_size(tp_group), group_rank(tp_group)
    if padded_to % size or padded_to < vocab_size:
        raise ValueError(
            f"padded_to {padded_to} must be a multiple of tp size {size} and at least vocab_size {vocab_size}"
        )
    if head.shape[0] * size < vocab_size:
        raise ValueError(f"{size} head shards of {head.shape[0]} rows do not hold vocab_size {vocab_size} tokens")
    old = [VocabShard.of(vocab_size, head.shape[0], r) for r in range(size)]
    new = [VocabShard.of(vocab_size, padded_to // size, r) for r in range(size)]
    aligned = head.new_zeros(padded_to // size, head.shape[1])  # [padded_to/tp, H]
    if size == 1:
        aligned[:vocab_size] = head[:vocab_size]
        return aligned
    dist.all_to_all_single(
        aligned[: new[rank].columns],
        head[: old[rank].columns].contiguous(),
        output_split_sizes=[new[rank].overlap(other) for other in old],
        input_split_sizes=[old[rank].overlap(other) for other in new],
        group=tp_group,
    )
    return aligned


def group_size(tp_group: dist.ProcessGroup | None) -> int:
    return 1 if tp_group is None else dist.get_world_size(tp_group)


def group_rank(tp_group: dist.ProcessGroup | None) -> int:
    return 0 if tp_group is None else dist.get_rank(tp_group)
