"""Rows of token ids as a forest in which every shared prefix stands once.

    forest = build_forest([[5, 6, 7], [5, 6, 8, 9]], least=1)
    forest.segments        # [Segment(row=0, start=0, stop=2, parent=-1), Segment(0, 2, 3, 0), Segment(1, 2, 4, 0)]
    forest.ends            # [1, 2]: row 0 is segments 0 and 1, row 1 is segments 0 and 2

A causal model computes the same at a token whatever follows it, so what rows have in common at their start need not be
computed more than once: the replayed turns of a task's samples, turns that samples happened to play alike, the rows of
one episode that repeat their prompt. A prefix may branch again and again. A segment stands behind the one that it
continues, and the segments of a branch stand together (preorder).

A branch costs something: attention gathers the keys of everything before it. Where less than `least` tokens would be
shared, rows go separate ways at once.

Pure functions on lists or arrays of ids; what a model does with a forest is `model/segments.py`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

Ids = Sequence[int] | np.ndarray


@dataclass(frozen=True)
class Segment:
    """Tokens [start, stop) of row `row`, and of every other row that passes through. `parent` is -1 at the root."""

    row: int
    start: int
    stop: int
    parent: int

    @property
    def num_tokens(self) -> int:
        return self.stop - self.start

    @property
    def num_pairs(self) -> int:
        """Pairs of a query in the segment and a key at or before it in the row."""
        return (self.stop * (self.stop + 1) - self.start * (self.start + 1)) // 2


@dataclass(frozen=True)
class Forest:
    segments: list[Segment]
    ends: list[int]
    """[R] The segment at whose end each row ends."""

    @property
    def num_tokens(self) -> int:
        return sum(segment.num_tokens for segment in self.segments)

    @property
    def num_pairs(self) -> int:
        return sum(segment.num_pairs for segment in self.segments)


def separate(rows: Sequence[Ids]) -> Forest:
    """The forest in which nothing is shared: one segment a row, in the order of the rows."""
    return Forest([Segment(index, 0, len(row), -1) for index, row in enumerate(rows)], list(range(len(rows))))


def in_preorder(rows: Sequence[Ids]) -> list[int]:
    """Indices of the rows such that any that share a prefix stand together, a row before those that it begins."""
    keys = [np.asarray(row).astype(">u4").tobytes() for row in rows]  # bytes compare as the ids do, and faster
    return sorted(range(len(rows)), key=keys.__getitem__)


def build_forest(rows: Sequence[Ids], *, least: int) -> Forest:
    """The forest of `rows`, none of them empty. No segment but the last of a row is shorter than `least` >= 1."""
    assert least >= 1 and all(len(row) for row in rows)
    ids = [np.asarray(row, np.int64) for row in rows]
    order = in_preorder(rows)
    segments: list[Segment] = []
    ends = [-1] * len(rows)
    waiting = [(0, len(rows), 0, -1)] if rows else []  # rows order[low:high] agree on [0, depth), laid down up to `parent`
    while waiting:
        low, high, depth, parent = waiting.pop()
        first, last = ids[order[low]], ids[order[high - 1]]
        common = _num_common(first, last, depth)  # of all between them too: they are sorted
        is_laid_down = common - depth >= least or common == len(last)
        if is_laid_down:
            segments.append(Segment(order[low], depth, common, parent))
            parent = len(segments) - 1
        ending = [at for at in range(low, high) if len(ids[order[at]]) == common]  # they come first
        low += len(ending)
        if ending and not is_laid_down:
            segments.append(Segment(order[low - 1], depth, common, parent))
        for at in ending:
            ends[order[at]] = len(segments) - 1
        branches = _branches([int(ids[order[at]][common]) for at in range(low, high)], low)
        depth = common if is_laid_down else depth
        waiting += [(start, stop, depth, parent) for start, stop in reversed(branches)]
    return Forest(segments, ends)


def _num_common(first: np.ndarray, second: np.ndarray, start: int) -> int:
    """Length of the longest common prefix of two rows that agree up to `start`."""
    stop = min(len(first), len(second))
    differing = first[start:stop] != second[start:stop]
    return start + int(differing.argmax()) if differing.any() else stop


def _branches(next_ids: list[int], low: int) -> list[tuple[int, int]]:
    """Half-open ranges of rows, the first being `low`, that go on with the same id."""
    cuts = [at for at in range(1, len(next_ids)) if next_ids[at] != next_ids[at - 1]]
    bounds = [low, *(low + cut for cut in cuts), low + len(next_ids)] if next_ids else []
    return list(pairwise(bounds))
