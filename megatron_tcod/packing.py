"""Episodes to balanced, packed microbatches; the only place that normalises.

Every per-token weight is fixed here, over the whole step's batch, so that the loss is the dot product
`sum(loss_weight * per_token)` and its gradient depends neither on how rows are packed nor on tp, pp or dp:

    token_mean      1 / (sampled tokens of the step)                       the released code
    turn_mean       1 / (turns * tokens of the turn)                       each turn counts alike
    sequence_mean   1 / (episodes * tokens of the episode)                 each episode counts alike
    sequence_sum    1 / episodes                                           Eq. 2: the sum over turns, mean over episodes

`pack` is a pure function: each data-parallel rank calls it with the same episodes and takes its own share. Only episodes
whose outcome is `ok` and that have sampled tokens carry a loss. It does not pad: rows lie back to back (thd layout).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from megatron_tcod.trajectory import Episode, Microbatch, TokenRow

AGGREGATIONS = ("token_mean", "turn_mean", "sequence_mean", "sequence_sum")


@dataclass(frozen=True)
class WeightedRow:
    """A row with the weight of each of its sampled tokens, in order."""

    row: TokenRow
    weights: list[float]  # [sum(loss_mask)]
    episode_id: int


def weigh(episodes: Sequence[Episode], aggregation: str) -> list[WeightedRow]:
    """The trained rows of a step with their normalised token weights."""
    if aggregation not in AGGREGATIONS:
        raise ValueError(f"loss_aggregation {aggregation!r} is unknown; known: {', '.join(AGGREGATIONS)}")
    trained = [(index, row) for index, episode in enumerate(episodes) if episode.outcome == "ok" for row in episode.rows]
    trained = [(index, row) for index, row in trained if any(row.loss_mask)]
    sampled = [(index, turn) for index, row in trained for turn in sampled_turns(row)]
    per_turn, per_episode = Counter(sampled), Counter(index for index, _ in sampled)

    def weight(index: int, turn: int) -> float:
        if aggregation == "token_mean":
            return 1 / len(sampled)
        if aggregation == "turn_mean":
            return 1 / (len(per_turn) * per_turn[index, turn])
        if aggregation == "sequence_mean":
            return 1 / (len(per_episode) * per_episode[index])
        return 1 / len(per_episode)

    return [
        WeightedRow(row, [weight(index, turn) for turn in sampled_turns(row)], index) for index, row in trained
    ]


def sampled_turns(row: TokenRow) -> list[int]:
    """The turn of each sampled token."""
    return [turn for turn, sampled in zip(row.turn_ids, row.loss_mask, strict=True) if sampled]


def share(rows: Sequence[WeightedRow], dp_rank: int, dp_size: int) -> list[WeightedRow]:
    """This rank's rows: longest first, each to the rank with the fewest tokens so far; returned longest first."""
    loads = [0] * dp_size
    mine = []
    for row in sorted(rows, key=lambda row: -len(row.row.token_ids)):
        rank = loads.index(min(loads))
        loads[rank] += len(row.row.token_ids)
        if rank == dp_rank:
            mine.append(row)
    return mine


def split_into_bins(rows: Sequence[WeightedRow], max_tokens: int) -> list[list[WeightedRow]]:
    """Consecutive rows of similar length per bin, at most max_tokens each; a longer row travels alone."""
    bins: list[list[WeightedRow]] = []
    room = 0
    for row in rows:
        length = len(row.row.token_ids)
        if not bins or length > room:
            bins.append([])
            room = max_tokens
        bins[-1].append(row)
        room -= length
    return bins


def build_microbatch(rows: Sequence[WeightedRow], device: torch.device | str = "cpu") -> Microbatch:
    """Rows back to back; at least one."""
    token_ids, starts = [], [0]
    positions, weights, old_logprobs, turn_ids, episode_ids = [], [], [], [], []
    for weighted in rows:
        row = weighted.row
        here = [starts[-1] + at - 1 for at, sampled in enumerate(row.loss_mask) if sampled]
        positions += here
        weights += weighted.weights
        old_logprobs += row.logprobs
        turn_ids += sampled_turns(row)
        episode_ids += [weighted.episode_id] * len(here)
        token_ids += row.token_ids
        starts.append(starts[-1] + len(row.token_ids))
    tokens = torch.tensor(token_ids, dtype=torch.int64, device=device)  # [T]
    where = torch.tensor(positions, dtype=torch.int64, device=device)  # [S]
    return Microbatch(
        token_ids=tokens,
        cu_seqlens=torch.tensor(starts, dtype=torch.int32, device=device),
        positions=where,
        target_ids=tokens[where + 1],
        loss_weight=torch.tensor(weights, dtype=torch.float32, device=device),
        old_logprobs=torch.tensor(old_logprobs, dtype=torch.float32, device=device),
        turn_ids=torch.tensor(turn_ids, dtype=torch.int64, device=device),
        episode_ids=torch.tensor(episode_ids, dtype=torch.int64, device=device),
    )


def pack(
    episodes: Sequence[Episode],
    *,
    max_tokens: int,
    aggregation: str = "token_mean",
    dp_rank: int = 0,
    dp_size: int = 1,
    device: torch.device | str = "cpu",
) -> list[Microbatch]:
    """This data-parallel rank's microbatches of a step, of at most `max_tokens` tokens unless one row is longer; none
    where this rank has nothing to train. `episode_ids` index `episodes`."""
    bins = split_into_bins(share(weigh(episodes, aggregation), dp_rank, dp_size), max_tokens)
    return [build_microbatch(rows, device) for rows in bins]
