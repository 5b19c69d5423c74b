"""Verified replay of real ScienceWorld: gold paths replay without a false alarm, and wrong recordings are caught."""

from __future__ import annotations

import asyncio
import dataclasses
import random

import pytest
from fakes import SayingEngine, Script, scripted_family
from science_texts import shuffled, wrong_versions
from tokenizer_fixtures import small_tokenizer

from megatron_tcod.envs.process import WORKERS
from megatron_tcod.envs.scienceworld import VARIATIONS, ScienceWorld, task_of
from megatron_tcod.rollout.episodes import Assignment, PlaySettings, collect_episodes
from megatron_tcod.trajectory import Demonstration, TurnWindow

FEW_TYPES = ("find-non-living-thing", "lifespan-longest-lived", "chemistry-mix-paint-secondary-color")

ALL_TYPES = pytest.param(tuple(VARIATIONS), marks=[pytest.mark.slow, pytest.mark.timeout(3600)], id="all")


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return small_tokenizer(tmp_path_factory.mktemp("tokenizer"), system_prompt="You act.")


@pytest.fixture(scope="module", params=[pytest.param(FEW_TYPES, id="few"), ALL_TYPES])
def recorded(request):
    """The gold path of a variation of each type, recorded once; skips where there is no simulator."""
    try:
        ScienceWorld.require()
    except ValueError as missing:
        pytest.skip(str(missing))
    tasks = [task_of(name, 0, "train") for name in request.param]
    demonstrations = [ScienceWorld.expert(task, seed=0) for task in tasks]
    WORKERS.close()
    assert all(one.success for one in demonstrations), [one.task.task_id for one in demonstrations if not one.success]
    return demonstrations


def replay(family, demonstrations, tokenizer):
    """Each demonstration from its first turn to its end, in `family`."""
    settings = PlaySettings(max_turns=400, max_new_tokens=8, max_context=10**6)
    assignments = [
        Assignment(task=one.task, window=TurnWindow(len(one.turns), 400), demonstration=one) for one in demonstrations
    ]
    engine = SayingEngine(tokenizer, ["wait"])
    playing = collect_episodes(
        family, assignments, engine=engine, tokenizer=tokenizer, settings=settings, step=0, max_open=2
    )
    return asyncio.run(playing)


def test_gold_paths_replay_twice_in_other_processes_without_a_false_divergence(recorded, tokenizer):
    num_turns = 0
    for _ in range(2):
        episodes = replay(ScienceWorld, recorded, tokenizer)
        for one, episode in zip(recorded, episodes, strict=True):
            assert (episode.outcome, episode.success) == ("solved_in_replay", True), (episode.task.task_id, episode.detail)
            assert len(episode.turns) == len(one.turns) and episode.reward == pytest.approx(1.0)
        num_turns += sum(len(episode.turns) for episode in episodes)
        WORKERS.close()
    print(f"{len(recorded)} gold paths twice, {num_turns} turns: 0 diverged")


def retold(demonstration: Demonstration, at: int, text: str) -> Demonstration:
    """The demonstration with another text recorded before turn `at`."""
    turns = list(demonstration.turns)
    turns[at] = dataclasses.replace(turns[at], observation=text)
    return dataclasses.replace(demonstration, turns=turns)


def as_script(demonstration: Demonstration) -> Script:
    """An environment that says again what the real one said."""
    said = [turn.observation for turn in demonstration.turns] + [demonstration.final_observation]
    return Script(observations=said, done_after=len(demonstration.turns))


def test_two_hundred_wrong_observations_are_all_caught_and_other_orders_none(recorded, tokenizer):
    rng = random.Random(11)
    wrong, kinds, reordered = [], set(), []
    while len(wrong) < 200:
        number = rng.randrange(len(recorded))
        one = recorded[number]
        at = rng.randrange(len(one.turns))
        right = one.turns[at].observation
        seed = rng.randrange(10**6)
        kind, text = rng.choice(list(wrong_versions(right, seed)))
        if text == right:
            continue
        kinds.add(kind)
        wrong.append((number, at, retold(one, at, text)))
        if shuffled(right, seed) != right:
            reordered.append((number, retold(one, at, shuffled(right, seed))))
    scripts = {one.task.task_id: as_script(one) for one in recorded}

    class Spoken(scripted_family(scripts)):
        normalise = staticmethod(ScienceWorld.normalise)

    episodes = replay(Spoken, [demonstration for _, _, demonstration in wrong], tokenizer)
    caught = [(episode.outcome, len(episode.turns)) for episode in episodes]
    assert caught == [("diverged", at) for _, at, _ in wrong], "each at its turn"
    assert len(kinds) >= 6 and len(reordered) > 20
    episodes = replay(Spoken, [demonstration for _, demonstration in reordered], tokenizer)
    assert {episode.outcome for episode in episodes} == {"solved_in_replay"}
    print(f"{len(wrong)} wrong observations of {len(kinds)} kinds: all caught; {len(reordered)} other orders: none")
