"""The schedules against the paper's formulas, written out independently here."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_tcod.curriculum import CURRICULA, BackToFront, FrontToBack, Full, Schedule, make_curriculum
from megatron_tcod.trajectory import Task, TurnWindow

TASK = Task(env="household", task_id="a", split="train")
schedules = st.builds(
    lambda k_start, eta, extra, origin: Schedule(
        k_start=k_start, eta=eta, k_max=None if extra is None else k_start + extra, step_origin=origin
    ),
    st.integers(1, 40),
    st.integers(1, 50),
    st.none() | st.integers(0, 60),
    st.sampled_from([0, 1]),
)


def test_full_plays_every_turn_at_every_step():
    assert {Full(max_turns=30).window(step, TASK) for step in (0, 1, 999)} == {TurnWindow(0, 30)}


@given(schedules, st.integers(0, 2000), st.integers(1, 60))
def test_f2b_plays_the_first_k_turns(schedule, step, max_turns):
    k = schedule.k_start + math.floor((step + schedule.step_origin) / schedule.eta)
    k = min(k, schedule.k_max or k)
    assert FrontToBack(schedule=schedule, max_turns=max_turns).window(step, TASK) == TurnWindow(0, min(k, max_turns))


@given(schedules, st.integers(0, 2000), st.integers(1, 60), st.sampled_from(["horizon", "demonstration"]))
def test_b2f_replays_the_first_l_minus_k_turns(schedule, step, length, stop):
    curriculum = BackToFront(schedule=schedule, max_turns=60, lengths={"a": length}, stop=stop)
    window = curriculum.window(step, TASK)
    k = schedule.k_start + math.floor((step + schedule.step_origin) / schedule.eta)
    assert window.start == max(0, length - min(k, schedule.k_max or k))
    assert window.stop == (60 if stop == "horizon" else length)


@given(schedules, st.integers(1, 60), st.integers(1, 60))
def test_windows_only_grow_and_reach_their_end(schedule, length, max_turns):
    for curriculum in (
        FrontToBack(schedule=schedule, max_turns=max_turns),
        BackToFront(schedule=schedule, max_turns=max_turns, lengths={"a": length}),
    ):
        windows = [curriculum.window(step, TASK) for step in range(0, 60 * schedule.eta, schedule.eta)]
        sizes = [window.stop - window.start for window in windows]
        assert sizes == sorted(sizes)
        if schedule.k_max is None:
            assert windows[-1] == TurnWindow(0, max_turns)


def test_paper_steps_count_from_one():
    assert [Schedule(k_start=1, eta=2, step_origin=1).depth(step) for step in range(5)] == [1, 2, 2, 3, 3]
    assert [Schedule(k_start=1, eta=2).depth(step) for step in range(5)] == [1, 1, 2, 2, 3]


def test_b2f_without_a_demonstration_plays_in_full_or_asks_for_a_turn_that_is_not_there():
    assert BackToFront(schedule=Schedule(), max_turns=30, lengths={}, missing="full").window(0, TASK) == TurnWindow(0, 30)
    assert BackToFront(schedule=Schedule(), max_turns=30, lengths={}).window(0, TASK).start == 1


def test_a_demonstration_longer_than_the_horizon_leaves_a_turn_to_play():
    window = BackToFront(schedule=Schedule(), max_turns=10, lengths={"a": 40}).window(0, TASK)
    assert window == TurnWindow(9, 10)


@pytest.mark.parametrize("wrong", [{"k_start": 0}, {"eta": 0}, {"k_start": 5, "k_max": 4}])
def test_impossible_schedules_are_refused(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        Schedule(**wrong)


@pytest.mark.parametrize("name", CURRICULA)
def test_every_curriculum_of_the_table_gives_playable_windows(name):
    curriculum = make_curriculum(name, schedule=Schedule(), max_turns=30, lengths={"a": 12}, stop="horizon", missing="full")
    assert all(curriculum.window(step, TASK).stop > curriculum.window(step, TASK).start for step in range(100))
