"""Forests of shared prefixes: every row is a path, nothing is shared that differs, everything that may be is."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_tcod.prefix_tree import build_forest, separate

ROWS = st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=12), min_size=0, max_size=12)


def path(forest, end):
    """Segments from the root to `end`."""
    found = []
    while end >= 0:
        found.append(forest.segments[end])
        end = forest.segments[end].parent
    return found[::-1]


@given(ROWS, st.integers(1, 4))
def test_every_row_is_the_tokens_along_its_path_and_segments_follow_their_parents(rows, least):
    forest = build_forest(rows, least=least)
    for number, segment in enumerate(forest.segments):
        assert segment.parent < number and segment.num_tokens > 0
        assert segment.start == (forest.segments[segment.parent].stop if segment.parent >= 0 else 0)
    for row, end in zip(rows, forest.ends, strict=True):
        assert [token for one in path(forest, end) for token in rows[one.row][one.start : one.stop]] == row
    on_paths = {id(one) for end in forest.ends for one in path(forest, end)}
    assert on_paths == {id(one) for one in forest.segments}, "a segment that belongs to no row"


@given(ROWS)
def test_with_least_one_each_distinct_prefix_stands_once(rows):
    forest = build_forest(rows, least=1)
    assert forest.num_tokens == len({tuple(row[:stop]) for row in rows for stop in range(1, len(row) + 1)})
    assert forest.num_pairs == sum(
        len(prefix) for prefix in {tuple(row[:stop]) for row in rows for stop in range(1, len(row) + 1)}
    )


@given(ROWS, st.integers(1, 6))
def test_no_shorter_prefix_than_the_least_is_branched_from(rows, least):
    forest = build_forest(rows, least=least)
    inner = {segment.parent for segment in forest.segments} - {-1}
    for number in inner:
        rows_ending_here = forest.ends.count(number)
        assert forest.segments[number].num_tokens >= least or rows_ending_here
    assert forest.num_tokens <= separate(rows).num_tokens


@pytest.mark.parametrize(
    ("rows", "segments", "ends"),
    [
        ([[5, 6, 7], [5, 6, 8, 9]], [(0, 0, 2, -1), (0, 2, 3, 0), (1, 2, 4, 0)], [1, 2]),
        ([[5, 6, 8, 9], [5, 6], [5, 6]], [(1, 0, 2, -1), (0, 2, 4, 0)], [1, 0, 0]),
        ([[1], [2], [1]], [(0, 0, 1, -1), (1, 0, 1, -1)], [0, 1, 0]),
    ],
)
def test_forests_written_out_by_hand(rows, segments, ends):
    forest = build_forest(rows, least=1)
    assert [(one.row, one.start, one.stop, one.parent) for one in forest.segments] == segments
    assert forest.ends == ends


def test_a_chain_of_a_thousand_nested_rows_needs_no_deep_stack():
    row = list(range(3000))
    forest = build_forest([row[: 3 * number] for number in range(1, 1001)], least=1)
    assert forest.num_tokens == 3000 and len(forest.segments) == 1000
