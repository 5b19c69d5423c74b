"""A radix tree of key/value segments keyed on token ids: which prefixes are already computed, and their KV.

    tree = RadixTree()
    hit = tree.match(prompt)                       # longest cached prefix, hit.length tokens of it
    hit.read(row.write)                            # row.write(start, segment, num_tokens), piece by piece
    tree.pin(hit.node)                             # never evicted until unpin
    end = tree.insert(prompt, row.segment)         # row.segment(start, stop) is asked for the missing part only
    tree.evict(num_tokens)                         # oldest unpinned leaves first

Every edge holds a run of token ids and the KV of exactly these tokens; a node's path from the root spells a prefix.
Splitting an edge copies both halves, so that evicting one of them frees its memory and `num_tokens` is the truth.
The tree knows nothing of layers, slots or models: a segment is anything with `segment(start, stop)`, relative to
itself, that returns an independent copy.

It does not decide when to evict and it never grows beyond what the caller inserts: the engine owns the budget.
"""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Protocol

import numpy as np


class Segment(Protocol):
    """KV of a run of tokens."""

    def segment(self, start: int, stop: int) -> Segment:
        """An independent copy of tokens `[start, stop)` of this run."""
        ...


class Node:
    """The tokens and KV of one edge, and the node it leads to."""

    __slots__ = ("tokens", "value", "parent", "children", "num_pins", "last_use")

    def __init__(self, tokens: np.ndarray, value: Segment | None, parent: Node | None) -> None:
        self.tokens = tokens  # [n] int64
        self.value = value
        self.parent = parent
        self.children: dict[int, Node] = {}
        self.num_pins = 0
        self.last_use = 0


@dataclass(frozen=True)
class Match:
    """The longest cached prefix of a query. Example: `Match(node, length=96)`, which end at `node`."""

    node: Node
    length: int

    def read(self, write: Callable[[int, Segment, int], None], length: int | None = None) -> None:
        """Call `write(start, segment, num_tokens)` for each piece of the first `length` tokens, in order."""
        wanted = self.length if length is None else min(length, self.length)
        node, path = self.node, []
        while node.parent is not None:
            path.append(node)
            node = node.parent
        start = 0
        for node in reversed(path):
            stop = min(start + len(node.tokens), wanted)
            if stop > start:
                write(start, node.value, stop - start)
            start += len(node.tokens)


def common_length(left: np.ndarray, right: np.ndarray) -> int:
    """Length of the longest common prefix of two 1-d arrays."""
    n = min(len(left), len(right))
    differs = left[:n] != right[:n]
    first = int(differs.argmax()) if n else 0
    return first if n and differs[first] else n


class RadixTree:
    """See the module docstring. `num_tokens` counts every token held, `num_pinned_tokens` those that cannot go."""

    def __init__(self) -> None:
        self.root = Node(np.empty(0, np.int64), None, None)
        self.num_tokens = 0
        self.num_evicted_tokens = 0
        self._clock = 0

    def match(self, tokens: np.ndarray) -> Match:
        """The longest cached prefix of `tokens` [n] int64. Marks the path as just used, and splits the last edge where
        the match ends inside it, so that a pin holds exactly what matched."""
        self._clock += 1
        node, length = self.root, 0
        while length < len(tokens):
            child = node.children.get(int(tokens[length]))
            if child is None:
                break
            shared = common_length(child.tokens, tokens[length:])
            length += shared
            node = child if shared == len(child.tokens) else self._split(child, shared)
            node.last_use = self._clock
            if node is not child:
                break
        return Match(node, length)

    def insert(self, tokens: np.ndarray, segment: Callable[[int, int], Segment]) -> Node:
        """Hold the KV of `tokens` [n] int64; returns the node that ends there.

        `segment(start, stop)` is called at most once, for the part of `[0, n)` that is not held yet, and must return
        a copy that nobody else writes to.
        """
        self._clock += 1
        node, start = self.root, 0
        while start < len(tokens):
            child = node.children.get(int(tokens[start]))
            if child is None:
                return self._append(node, tokens[start:].copy(), segment(start, len(tokens)))
            shared = common_length(child.tokens, tokens[start:])
            node = child if shared == len(child.tokens) else self._split(child, shared)
            node.last_use = self._clock
            start += shared
        return node

    def pin(self, node: Node) -> None:
        """Keep the path to `node` until `unpin`; pins count."""
        while node.parent is not None:
            node.num_pins += 1
            node = node.parent

    def unpin(self, node: Node) -> None:
        while node.parent is not None:
            assert node.num_pins > 0, "unpin without pin"
            node.num_pins -= 1
            node = node.parent

    def evict(self, num_tokens: int) -> list[Node]:
        """Drop least recently used unpinned leaves until `num_tokens` are freed or none is left; returns them."""
        order = itertools.count()
        leaves = [(node.last_use, next(order), node) for node in self.nodes() if not node.children and not node.num_pins]
        heapq.heapify(leaves)
        dropped: list[Node] = []
        freed = 0
        while leaves and freed < num_tokens:
            node = heapq.heappop(leaves)[2]
            parent = node.parent
            freed += len(node.tokens)
            self._remove(node)
            dropped.append(node)
            if parent is not self.root and not parent.children and not parent.num_pins:
                heapq.heappush(leaves, (parent.last_use, next(order), parent))
        self.num_evicted_tokens += freed
        return dropped

    def flush(self) -> None:
        """Forget everything, pins included; nodes handed out before are dead."""
        self.root = Node(np.empty(0, np.int64), None, None)
        self.num_tokens = 0

    def nodes(self) -> Iterator[Node]:
        """All nodes but the root, parents first."""
        stack = list(self.root.children.values())
        while stack:
            node = stack.pop()
            yield node
            stack.extend(node.children.values())

    @property
    def num_pinned_tokens(self) -> int:
        return sum(len(node.tokens) for node in self.nodes() if node.num_pins)

    def _append(self, parent: Node, tokens: np.ndarray, value: Segment) -> Node:
        node = Node(tokens, value, parent)
        node.last_use = self._clock
        parent.children[int(tokens[0])] = node
        self.num_tokens += len(tokens)
        return node

    def _split(self, node: Node, length: int) -> Node:
        """Put a new node after the first `length` tokens of `node`'s edge. `node` keeps its identity and its end."""
        upper = Node(node.tokens[:length].copy(), node.value.segment(0, length), node.parent)
        upper.num_pins, upper.last_use = node.num_pins, node.last_use
        node.parent.children[int(node.tokens[0])] = upper
        node.value = node.value.segment(length, len(node.tokens))
        node.tokens = node.tokens[length:].copy()
        node.parent = upper
        upper.children[int(node.tokens[0])] = node
        return upper

    def _remove(self, node: Node) -> None:
        del node.parent.children[int(node.tokens[0])]
        node.parent = None
        self.num_tokens -= len(node.tokens)
