"""Episodes to balanced, packed microbatches; the only place that normalises.

Every per-token weight is fixed here, over the whole step's batch, so that the loss is the dot product
`sum(loss_weight * per_token)` and its gradient depends neither on how rows are packed nor on tp, pp or dp:

    token_mean      1 / (sampled tokens of the step)                       the released code
    turn_mean       1 / (turns * tokens of the turn)                       each turn counts alike
    sequence_mean   1 / (episodes * tokens of the episode)                 each episode counts alike
    sequence_sum    1 / episodes                                           Eq. 2: the sum over turns, mean over episodes

`pack` is a pure function: each data-parallel rank calls it with the same episodes and takes its own share. Only episodes
whose outcome is `ok` and that have sampled tokens carry a loss. It does not pad: rows lie back to back (thd layout).

What is dealt out are units: a row, or with `prefix_tree` all rows of a task, in whose forest each shared prefix is one
segment that is computed once (`prefix_tree.py`). A unit costs its tokens plus `pair_cost` for each pair of a query and a
key, since attention grows with the square of a row. Ranks, and the microbatches of a rank, get equal costs as near as the
longest units first, each to the least loaded, comes to it. A unit that is too large for a microbatch, or that holds back
a whole step, is halved: its parts compute their common prefix each.
"""

from __future__ import annotations

import heapq
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch

from megatron_tcod.prefix_tree import Forest, build_forest, in_preorder, separate
from megatron_tcod.trajectory import Episode, Microbatch, TokenRow

AGGREGATIONS = ("token_mean", "turn_mean", "sequence_mean", "sequence_sum")

EVEN_ENOUGH = 1.05
"""Times the mean that a rank may have to do before units are halved to relieve it."""

LEAST_SHARED = 16
"""Shortest stretch of tokens that rows share: a branch costs attention a gather and a kernel of its own."""


@dataclass(frozen=True)
class WeightedRow:
    """A row with the weight of each of its sampled tokens, in order."""

    row: TokenRow
    weights: list[float]  # [sum(loss_mask)]
    episode_id: int

    @cached_property
    def ids(self) -> np.ndarray:  # [T]
        return np.array(self.row.token_ids, np.int64)


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


@dataclass(frozen=True)
class Unit:
    """Rows that are computed together, with what that takes."""

    rows: list[WeightedRow]
    num_tokens: int
    cost: float
    """Tokens, and pairs of a query and a key at `pair_cost` tokens each."""


def make_unit(rows: list[WeightedRow], pair_cost: float, least_shared: int | None) -> Unit:
    forest = lay_out(rows, least_shared)
    return Unit(rows, forest.num_tokens, forest.num_tokens + pair_cost * forest.num_pairs)


def lay_out(rows: Sequence[WeightedRow], least_shared: int | None) -> Forest:
    """The rows as a forest whose branches have at least `least_shared` tokens in common; None shares nothing."""
    ids = [weighted.ids for weighted in rows]
    return build_forest(ids, least=least_shared) if least_shared else separate(ids)


def units_of(
    rows: Sequence[WeightedRow], episodes: Sequence[Episode], *, max_tokens: int, pair_cost: float, prefix_tree: bool
) -> list[Unit]:
    """One unit a row, or a task; a task's is halved until its distinct tokens fit `max_tokens`."""
    if not prefix_tree:
        return [make_unit([row], pair_cost, None) for row in rows]
    by_task: dict[tuple[str, str, str], list[WeightedRow]] = {}
    for row in rows:
        task = episodes[row.episode_id].task
        by_task.setdefault((task.env, task.split, task.task_id), []).append(row)
    units = []
    for together in by_task.values():
        order = in_preorder([weighted.ids for weighted in together])
        units += fitting(make_unit([together[index] for index in order], pair_cost, LEAST_SHARED), max_tokens, pair_cost)
    return units


def fitting(unit: Unit, max_tokens: int, pair_cost: float) -> list[Unit]:
    """The unit, or its parts of at most `max_tokens` tokens or one row."""
    if unit.num_tokens <= max_tokens or len(unit.rows) == 1:
        return [unit]
    return [part for half in halves(unit, pair_cost) for part in fitting(half, max_tokens, pair_cost)]


def halves(unit: Unit, pair_cost: float) -> list[Unit]:
    """The unit's rows in two, those that share most still together: they are in preorder."""
    middle = len(unit.rows) // 2
    return [make_unit(part, pair_cost, LEAST_SHARED) for part in (unit.rows[:middle], unit.rows[middle:])]


def deal(units: Sequence[Unit], num_ranks: int) -> list[list[Unit]]:
    """The units of each rank: the costliest first, each to the rank that has least to do so far."""
    shares: list[list[Unit]] = [[] for _ in range(num_ranks)]
    loads = [(0.0, rank) for rank in range(num_ranks)]  # a heap
    for unit in sorted(units, key=lambda unit: -unit.cost):
        load, rank = loads[0]
        heapq.heapreplace(loads, (load + unit.cost, rank))
        shares[rank].append(unit)
    return shares


def deal_evenly(units: Sequence[Unit], num_ranks: int, pair_cost: float) -> list[list[Unit]]:
    """`deal`, after halving the costliest unit of the busiest rank, one by one, for as long as that shortens the step."""
    shares = deal(units, num_ranks)
    loads = [total_cost(share) for share in shares]
    while max(loads) > EVEN_ENOUGH * sum(loads) / num_ranks:
        busiest = shares[loads.index(max(loads))]
        heaviest = max(busiest, key=lambda unit: (len(unit.rows) > 1, unit.cost))
        if len(heaviest.rows) == 1:
            break
        others = [unit for share in shares for unit in share if unit is not heaviest]
        tried = deal(others + halves(heaviest, pair_cost), num_ranks)
        tried_loads = [total_cost(share) for share in tried]
        if sorted(tried_loads, reverse=True) >= sorted(loads, reverse=True):
            break  # all loads are compared, since of equally busy ranks one is relieved after the other
        shares, loads = tried, tried_loads
    return shares


def total_cost(units: Sequence[Unit]) -> float:
    return sum(unit.cost for unit in units)


def fill_bins(units: Sequence[Unit], max_tokens: int) -> list[list[Unit]]:
    """Microbatches of at most `max_tokens` tokens and about equal cost, as few as it takes; a longer row travels alone."""
    alone = [[unit] for unit in units if unit.num_tokens >= max_tokens]
    rest = sorted((unit for unit in units if unit.num_tokens < max_tokens), key=lambda unit: -unit.cost)
    num_bins = -(-sum(unit.num_tokens for unit in rest) // max_tokens)
    while (bins := _try_bins(rest, num_bins, max_tokens)) is None:
        num_bins += 1
    return alone + bins


def _try_bins(units: Sequence[Unit], num_bins: int, max_tokens: int) -> list[list[Unit]] | None:
    """Each unit to the bin that costs least of those with room for it; None where there is no room."""
    bins: list[list[Unit]] = [[] for _ in range(num_bins)]
    costs, room = [0.0] * num_bins, [max_tokens] * num_bins
    for unit in units:
        best = min((at for at in range(num_bins) if room[at] >= unit.num_tokens), key=costs.__getitem__, default=None)
        if best is None:
            return None
        bins[best].append(unit)
        costs[best] += unit.cost
        room[best] -= unit.num_tokens
    return bins


def build_microbatch(
    rows: Sequence[WeightedRow], device: torch.device | str = "cpu", *, least_shared: int | None = None
) -> Microbatch:
    """Rows back to back, or as a forest where they share prefixes; at least one row."""
    forest = lay_out(rows, least_shared)
    is_shared = any(segment.parent >= 0 for segment in forest.segments) or len(forest.segments) < len(rows)
    starts = [0]  # [B+1] of each segment in the packed tokens
    token_ids: list[int] = []
    for segment in forest.segments:
        token_ids += rows[segment.row].row.token_ids[segment.start : segment.stop]
        starts.append(len(token_ids))
    trained = [
        trained
        for number, weighted in enumerate(rows)
        for trained in _trained_tokens(weighted, number, packed_indices(forest, starts, number))
    ]
    trained.sort(key=lambda one: one[0])  # stable: a row's own stay in order, positions ascend over all rows
    columns = list(zip(*trained, strict=True)) or [()] * 7

    def column(index: int, dtype: torch.dtype) -> torch.Tensor:  # [S]
        return torch.tensor(columns[index], dtype=dtype, device=device)

    def numbers(values: list[int]) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.int64, device=device)

    return Microbatch(
        token_ids=numbers(token_ids),
        cu_seqlens=torch.tensor(starts, dtype=torch.int32, device=device),
        positions=column(0, torch.int64),
        target_ids=column(1, torch.int64),
        loss_weight=column(2, torch.float32),
        old_logprobs=column(3, torch.float32),
        turn_ids=column(4, torch.int64),
        episode_ids=column(5, torch.int64),
        parents=numbers([segment.parent for segment in forest.segments]) if is_shared else None,
        ends=numbers(forest.ends) if is_shared else None,
        row_ids=column(6, torch.int64) if is_shared else None,
    )


def packed_indices(forest: Forest, starts: Sequence[int], row: int) -> list[int]:
    """[N] Where each token of a row lies in the packed tokens, whose segments begin at `starts`."""
    parts, number = [], forest.ends[row]
    while number >= 0:
        segment = forest.segments[number]
        parts.append(range(starts[number], starts[number] + segment.num_tokens))
        number = segment.parent
    return [index for part in reversed(parts) for index in part]


def _trained_tokens(weighted: WeightedRow, number: int, where: Sequence[int]) -> list[tuple[float, ...]]:
    """Of each sampled token: position, target, weight, log-probability, turn, episode, row."""
    row = weighted.row
    sampled = [at for at, is_sampled in enumerate(row.loss_mask) if is_sampled]
    return [
        (where[at - 1], row.token_ids[at], weight, logprob, row.turn_ids[at], weighted.episode_id, number)
        for at, weight, logprob in zip(sampled, weighted.weights, row.logprobs, strict=True)
    ]


def pack(
    episodes: Sequence[Episode],
    *,
    max_tokens: int,
    aggregation: str = "token_mean",
    prefix_tree: bool = False,
    pair_cost: float = 0.0,
    dp_rank: int = 0,
    dp_size: int = 1,
    device: torch.device | str = "cpu",
) -> list[Microbatch]:
    """This data-parallel rank's microbatches of a step, of at most `max_tokens` tokens unless one row is longer; none
    where this rank has nothing to train. `episode_ids` index `episodes`.

    prefix_tree: rows of a task share the tokens that they have in common at their start. pair_cost: what a pair of a query
    and a key costs, in tokens' worth of the rest of the layer (`model/segments.py::cost_of_pair`).
    """
    rows = weigh(episodes, aggregation)
    units = units_of(rows, episodes, max_tokens=max_tokens, pair_cost=pair_cost, prefix_tree=prefix_tree)
    own = deal_evenly(units, dp_size, pair_cost)[dp_rank]
    return [
        build_microbatch(
            [row for unit in together for row in unit.rows], device, least_shared=LEAST_SHARED if prefix_tree else None
        )
        for together in fill_bins(own, max_tokens)
    ]
