"""The order of listed objects, and only that, makes no difference to how ScienceWorld's observations compare."""

from __future__ import annotations

import re

import pytest
from science_texts import LISTS, ROOM, shuffled, wrong_versions

from megatron_tcod.envs.scienceworld_text import canonical


@pytest.mark.parametrize("text", [ROOM, *LISTS])
@pytest.mark.parametrize("seed", range(20))
def test_any_order_of_listed_objects_compares_equal(text, seed):
    other = shuffled(text, seed)
    assert sorted(other) == sorted(text)
    assert canonical(other) == canonical(text)
    assert canonical(canonical(text)) == canonical(text)


def test_the_shuffles_differ_from_the_text():
    assert sum(shuffled(text, seed) != text for text in [ROOM, *LISTS] for seed in range(20)) > 60


@pytest.mark.parametrize("seed", range(40))
def test_a_wrong_observation_is_told_from_the_right_one(seed):
    kinds = set()
    for kind, wrong in wrong_versions(ROOM, seed):
        kinds.add(kind)
        assert canonical(wrong) != canonical(ROOM), (kind, wrong)
        assert canonical(shuffled(wrong, seed)) != canonical(ROOM), (kind, wrong)
    assert kinds >= {"object gone", "object twice", "state flipped", "number changed", "contents swapped", "renamed"}


@pytest.mark.parametrize(
    ("left", "right"),
    [
        ("a box (containing a cup)\ta table", "a box\ta table (containing a cup)"),
        ("See: \n\ta light, which is on\n\ta fan, which is off", "See: \n\ta light, which is off\n\ta fan, which is on"),
        ("On it is: a light, which is on, a fan, which is off.", "On it is: a light, which is off, a fan, which is on."),
        ("On it is: a jug (containing water, soil), a cup.", "On it is: a jug (containing water), a cup, soil."),
        ("You move the cup, then the jug.", "You move the jug, then the cup."),
        ("0: focus on jug (in kitchen)\n1: focus on cup", "0: focus on cup\n1: focus on jug (in kitchen)"),
        ("a cup, a cup", "a cup"),
        ("You see: \n\ta cup\nYou also see:\n\ta door", "You see: \n\ta door\nYou also see:\n\ta cup"),
    ],
)  # fmt: skip
def test_what_is_not_the_order_of_a_list_counts(left, right):
    assert canonical(left) != canonical(right)


def test_text_without_lists_keeps_its_words_in_one_line():
    assert canonical(" You  see\na desk 1. ") == "You see a desk 1."
    assert canonical("the thermometer measures 10 degrees, or so (at least)") == (
        "the thermometer measures 10 degrees, or so (at least)"
    )


@pytest.mark.parametrize("text", ["", "(", ")", ": ", "(containing ", "a: (b", ", , ,", ".", "\t", "a\n\t", "a.)", ": .:"])
def test_broken_text_is_read_to_its_end(text):
    words = re.findall(r"\w+", text)
    assert re.findall(r"\w+", canonical(text)) == words
