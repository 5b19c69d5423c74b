"""The radix tree against a model that keeps every held prefix in a plain dictionary."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_tcod.rollout.radix import RadixTree


class PrefixKV:
    """KV of a run of tokens that says, for each token, which whole prefix it was computed behind."""

    def __init__(self, prefixes):
        self.prefixes = list(prefixes)

    def segment(self, start, stop):
        return PrefixKV(self.prefixes[start:stop])


def kv_of(tokens):
    return lambda start, stop: PrefixKV(tuple(tokens[: i + 1]) for i in range(start, stop))


def array(tokens):
    return np.array(tokens, dtype=np.int64)


def read(tree, tokens):
    """What a match of `tokens` reads, as a list of prefixes, checking that pieces come in order without gaps."""
    hit = tree.match(array(tokens))
    pieces = []

    def write(start, segment, num_tokens):
        assert start == len(pieces)
        pieces.extend(segment.prefixes[:num_tokens])

    hit.read(write)
    assert len(pieces) == hit.length
    return hit, pieces


class BruteForce:
    """Every held prefix with the time of its last use; pins by prefix."""

    def __init__(self):
        self.held, self.pins, self.clock = {}, [], 0

    def touch(self, tokens, length):
        self.clock += 1
        for i in range(1, length + 1):
            self.held[tuple(tokens[:i])] = self.clock

    def longest(self, tokens):
        return max(i for i in range(len(tokens) + 1) if i == 0 or tuple(tokens[:i]) in self.held)

    def is_pinned(self, prefix):
        return any(pin[: len(prefix)] == prefix for pin in self.pins)


SHORT = st.lists(st.integers(0, 2), min_size=1, max_size=9)
OPERATIONS = st.lists(
    st.tuples(st.sampled_from(["insert", "insert", "match", "pin", "unpin", "evict", "flush"]), SHORT), max_size=40
)


@settings(max_examples=400, deadline=None)
@given(OPERATIONS)
def test_every_sequence_of_operations_equals_the_brute_force_model(operations):
    tree, model, pinned = RadixTree(), BruteForce(), []
    for name, tokens in operations:
        if name == "insert":
            tree.insert(array(tokens), kv_of(tokens))
            model.touch(tokens, len(tokens))
        elif name in ("match", "pin"):
            hit, pieces = read(tree, tokens)
            assert hit.length == model.longest(tokens)
            assert pieces == [tuple(tokens[: i + 1]) for i in range(hit.length)]
            model.touch(tokens, hit.length)
            if name == "pin":
                tree.pin(hit.node)
                pinned.append(hit.node)
                model.pins.append(tuple(tokens[: hit.length]))
        elif name == "unpin" and pinned:
            tree.unpin(pinned.pop(0))
            model.pins.pop(0)
        elif name == "evict":
            evict_and_compare(tree, model, len(tokens))
        elif name == "flush":
            for node in pinned:
                tree.unpin(node)
            pinned, model.pins, model.held = [], [], {}
            tree.flush()
        assert tree.num_tokens == len(model.held) == sum(len(node.tokens) for node in tree.nodes())
        assert tree.num_pinned_tokens == sum(model.is_pinned(prefix) for prefix in model.held)
    for prefix in model.held:
        assert read(tree, list(prefix))[1] == [prefix[: i + 1] for i in range(len(prefix))]


def evict_and_compare(tree, model, num_tokens):
    """Eviction frees enough unless only pinned prefixes stay, never a pinned one, and nothing younger than what stays."""
    before = dict(model.held)
    tree.evict(num_tokens)
    model.held = {prefix: used for prefix, used in before.items() if tree.match(array(prefix)).length == len(prefix)}
    model.clock += 1
    gone = before.keys() - model.held.keys()
    assert not any(model.is_pinned(prefix) for prefix in gone)
    assert len(gone) >= num_tokens or all(model.is_pinned(prefix) for prefix in model.held)
    for prefix in model.held:  # what is held is held with all its beginnings
        assert all(prefix[:i] in model.held for i in range(1, len(prefix)))
    leaves = [p for p in model.held if not model.is_pinned(p) and not any(q[:-1] == p for q in model.held)]
    if gone and leaves:
        assert max(before[p] for p in gone) <= min(before[p] for p in leaves)
    # The probes above count as uses in the tree; use everything again in the order of its last use.
    for prefix in sorted(model.held, key=lambda p: (before[p], len(p))):
        tree.match(array(prefix))
        model.clock += 1
    order = {used: i for i, used in enumerate(sorted(set(before.values())))}
    for prefix in model.held:
        model.held[prefix] = model.clock - len(order) + order[before[prefix]]


def test_a_match_inside_an_edge_splits_it_so_that_the_pin_is_exact():
    tree = RadixTree()
    tree.insert(array([1, 2, 3, 4, 5]), kv_of([1, 2, 3, 4, 5]))
    hit = tree.match(array([1, 2, 9]))
    tree.pin(hit.node)
    assert (hit.length, tree.num_pinned_tokens, tree.num_tokens) == (2, 2, 5)
    tree.evict(5)
    assert tree.num_tokens == 2
    tree.unpin(hit.node)
    tree.evict(1)
    assert tree.num_tokens == 0


def test_insert_asks_only_for_the_missing_part_once():
    tree, asked = RadixTree(), []

    def segment(start, stop):
        asked.append((start, stop))
        return kv_of(range(20))(start, stop)

    tree.insert(array(range(10)), segment)
    tree.insert(array(range(14)), segment)
    tree.insert(array(range(7)), segment)
    assert asked == [(0, 10), (10, 14)]


def test_the_oldest_leaf_goes_first_and_its_parent_follows():
    tree = RadixTree()
    for tokens in ([1, 2, 3], [1, 2, 4, 4], [5, 5]):
        tree.insert(array(tokens), kv_of(tokens))
    tree.match(array([1, 2, 3]))
    tree.evict(1)
    assert [tree.match(array(t)).length for t in ([1, 2, 4, 4], [5, 5], [1, 2, 3])] == [2, 2, 3]
    tree.evict(3)
    assert [tree.match(array(t)).length for t in ([5, 5], [1, 2, 3])] == [0, 2] and tree.num_evicted_tokens == 5
    tree.evict(1)
    assert tree.num_tokens == 0 and tree.num_evicted_tokens == 7


def test_unpin_without_pin_is_an_error():
    tree = RadixTree()
    node = tree.insert(array([1]), kv_of([1]))
    with pytest.raises(AssertionError, match="unpin without pin"):
        tree.unpin(node)
