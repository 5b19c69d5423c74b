"""The household: its rules by hand-played episodes, its expert by thousands of rooms, its replay over processes."""

from __future__ import annotations

import json
import os
import random
import string
import subprocess
import sys
import time
from collections import Counter

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_tcod.envs.household import Household
from megatron_tcod.envs.household_expert import Expert
from megatron_tcod.envs.household_world import (
    FAMILIES,
    MAX_ACTION_CHARS,
    OBJECTS,
    PLACES,
    Goal,
    HouseholdEpisode,
    World,
    choose,
    draw_world,
    goals,
)
from megatron_tcod.trajectory import Task, decode, encode

HEAT_WORLD = World(
    Goal("pick_heat_then_place", "apple", "shelf"),
    {
        "countertop 1": ("mug 1", "apple 1"),
        "shelf 1": (),
        "fridge 1": ("pen 1",),
        "microwave 1": (),
        "sinkbasin 1": (),
        "desk 1": (),
    },
)


def play(world: World, actions: list[str]) -> list:
    episode = HouseholdEpisode(world)
    episode.reset()
    return [episode.step(action) for action in actions]


def transcript(task: Task, actions: list[str]) -> list[str]:
    episode = Household.make(task)
    return [episode.reset()] + [episode.step(action).observation for action in actions]


def test_hand_played_heat_task_reads_as_documented():
    steps = play(
        HEAT_WORLD,
        [
            "go to countertop 1",
            "take apple 1 from countertop 1",
            "go to microwave 1",
            "heat apple 1 with microwave 1",
            "open microwave 1",
            "go to shelf 1",
            "move apple 1 to shelf 1",
        ],
    )
    assert [step.observation.removesuffix(" Task: put hot apple in shelf.") for step in steps] == [
        "countertop 1: mug 1, apple 1.",
        "countertop 1: mug 1. hold apple 1.",
        "microwave 1: closed. hold apple 1.",
        "microwave 1: closed. hold hot apple 1.",
        "microwave 1: nothing. hold hot apple 1.",
        "shelf 1: nothing. hold hot apple 1.",
        "shelf 1: hot apple 1.",
    ]
    assert [step.done for step in steps] == [False] * 6 + [True]
    assert steps[-1].info == {"accepted": True, "success": True} and steps[-1].reward == 1.0
    assert all(step.info["accepted"] for step in steps)


def test_cold_object_on_the_target_is_not_a_solution_until_it_was_heated():
    steps = play(
        HEAT_WORLD,
        ["go to countertop 1", "take apple 1 from countertop 1", "go to shelf 1", "move apple 1 to shelf 1"],
    )
    assert not steps[-1].done and steps[-1].observation == "shelf 1: apple 1. Task: put hot apple in shelf."


@pytest.mark.parametrize(
    ("before", "refused"),
    [
        ([], "open fridge 1"),
        ([], "take apple 1 from countertop 1"),
        ([], "examine room"),
        (["go to countertop 1"], "go to countertop 1"),
        (["go to countertop 1"], "go to garden 1"),
        (["go to countertop 1"], "take pen 1 from fridge 1"),
        (["go to countertop 1"], "open countertop 1"),
        (["go to fridge 1"], "take pen 1 from fridge 1"),
        (["go to fridge 1"], "examine pen 1"),
        (["go to fridge 1"], "close fridge 1"),
        (["go to fridge 1", "open fridge 1"], "open fridge 1"),
        (["go to countertop 1", "take mug 1 from countertop 1"], "take apple 1 from countertop 1"),
        (["go to countertop 1", "take mug 1 from countertop 1", "go to fridge 1"], "move mug 1 to fridge 1"),
        (["go to countertop 1", "take mug 1 from countertop 1"], "heat mug 1 with microwave 1"),
        (["go to microwave 1"], "heat apple 1 with microwave 1"),
        (["go to countertop 1"], "use desklamp 1"),
        (["go to countertop 1"], "put apple 1 in shelf 1"),
        (
            ["go to fridge 1", "open fridge 1", "take pen 1 from fridge 1", "go to microwave 1"],
            "heat pen 1 with microwave 1",
        ),
    ],
)
def test_wrong_moves_answer_nothing_happens_and_change_nothing(before, refused):
    episode = HouseholdEpisode(HEAT_WORLD)
    seen = [episode.reset()] + [episode.step(action).observation for action in before]
    step = episode.step(refused)
    where = episode.step("look").observation
    assert step.observation == f"Nothing happens. {where}"
    assert step.info == {"accepted": False, "success": False} and not step.done
    if before:
        assert where == seen[-1]


@pytest.mark.parametrize("family", FAMILIES)
def test_each_family_has_goals_on_both_sides_and_no_goal_on_both(family):
    train, held_out = goals(family, held_out=False), goals(family, held_out=True)
    assert train and held_out and not set(train) & set(held_out)


def test_objects_and_targets_of_held_out_goals_all_occur_in_training():
    train = [goal for family in FAMILIES for goal in goals(family, held_out=False)]
    assert {goal.object for goal in train} == set(OBJECTS)
    assert {goal.target for goal in train} == set(PLACES)


def test_no_held_out_task_is_asked_in_training():
    def stated(split, **options):
        tasks = Household.tasks(split, **options)
        return {(task.family, Household.make(task).reset().partition(" Task: ")[2]) for task in tasks}

    train, held_out = stated("train", count=3000), stated("held_out")
    assert len(held_out) > 40 and not train & held_out


def test_undisturbed_expert_solves_3000_rooms_within_the_limit_and_replays_exactly():
    start = time.perf_counter()
    demonstrations = [Household.expert(task, seed=0) for task in Household.tasks("train", count=3000)]
    seconds = time.perf_counter() - start
    lengths = sorted(len(demonstration.turns) for demonstration in demonstrations)
    steps_per_second = sum(lengths) / seconds
    print(f"3,000 rooms solved: mean {sum(lengths) / 3000:.1f} turns, p90 {lengths[2700]}, max {lengths[-1]}")
    print(f"{steps_per_second:,.0f} steps/s, drawing the room and the expert included")
    assert all(demonstration.success for demonstration in demonstrations)
    assert 10 <= sum(lengths) / 3000 <= 13 and lengths[-1] <= 20
    assert steps_per_second > 500, "hundreds of times slower than measured"
    for demonstration in demonstrations:
        actions = [turn.action for turn in demonstration.turns]
        observations = [turn.observation for turn in demonstration.turns] + [demonstration.final_observation]
        assert transcript(demonstration.task, actions) == observations


def test_held_out_tasks_are_solved():
    tasks = Household.tasks("held_out")
    assert len(tasks) == 200 and Counter(task.family for task in tasks).most_common()[-1][1] >= 33
    for task in tasks:
        demonstration = Household.expert(task, seed=0)
        episode = Household.make(task)
        episode.reset()
        steps = [episode.step(turn.action) for turn in demonstration.turns]
        assert [step.done for step in steps] == [False] * (len(steps) - 1) + [True]


@pytest.mark.parametrize("rate", [0.1, 0.3, 0.9])
def test_expert_recovers_from_injected_mistakes(rate):
    num_injected = num_refused = num_repeats = 0
    for seed, task in enumerate(Household.tasks("train", count=300, first=5000)):
        demonstration = Household.expert(task, seed=seed, mistake_rate=rate)
        turns = demonstration.turns
        episode = Household.make(task)
        assert episode.reset() == turns[0].observation
        for turn, following in zip(turns, turns[1:] + [None], strict=True):
            step = episode.step(turn.action)
            assert step.observation == (following.observation if following else demonstration.final_observation)
            assert step.info["accepted"] or not turn.is_trained, "the expert itself is never refused"
            num_injected += not turn.is_trained
            num_refused += not step.info["accepted"]
        num_repeats += sum(
            before.action == turn.action and not turn.is_trained for before, turn in zip(turns, turns[1:], strict=False)
        )
        assert step.done and step.info["success"]
    assert num_injected > 200 and 0 < num_refused < num_injected and num_repeats > 10


def test_expert_takes_over_after_any_number_of_random_commands():
    for seed, task in enumerate(Household.tasks("train", count=300)):
        rng = random.Random(seed)
        episode = Household.make(task)
        expert = Expert(episode.reset())
        for _ in range(seed % 60):
            step = episode.step(choose(rng, episode.admissible_commands()))
            if step.done:
                break
            expert.observe(step.observation)
        for _ in range(40):
            if episode.is_done:
                break
            step = episode.step(expert.act())
            assert step.info["accepted"]
            expert.observe(step.observation)
        assert episode.is_done


def test_mistakes_are_a_function_of_the_seed_and_zero_rate_injects_none():
    task = Household.tasks("train", count=1)[0]
    assert Household.expert(task, seed=3, mistake_rate=0.5) == Household.expert(task, seed=3, mistake_rate=0.5)
    assert Household.expert(task, seed=3, mistake_rate=0.5) != Household.expert(task, seed=4, mistake_rate=0.5)
    assert all(turn.is_trained for turn in Household.expert(task, seed=3).turns)


def test_admissible_commands_are_exactly_the_accepted_ones():
    """Every command over the words of the room is tried in a copy; those accepted must be those listed."""
    for task in Household.tasks("train", count=6):
        episode = Household.make(task)
        episode.reset()
        names = sorted(sum(episode.contents.values(), []))
        places = list(episode.contents)
        commands = ["look", "inventory", "use desklamp 1"]
        commands += [f"{verb} {place}" for verb in ("go to", "open", "close", "examine") for place in places]
        commands += [f"take {name} from {place}" for name in names for place in places]
        commands += [f"move {name} to {place}" for name in names for place in places]
        for verb in ("heat", "clean", "cool"):
            commands += [f"{verb} {name} with {place}" for name in names for place in places]
        for turn in Household.expert(task, seed=0).turns:
            accepted = {command for command in commands if episode.copy().step(command).info["accepted"]}
            assert accepted == set(episode.admissible_commands())
            episode.step(turn.action)


def test_a_copy_continues_alone():
    task = Household.tasks("train", count=1)[0]
    actions = [turn.action for turn in Household.expert(task, seed=0).turns]
    expected = transcript(task, actions)
    episode = Household.make(task)
    episode.reset()
    for index, action in enumerate(actions):
        branch = episode.copy()
        assert [branch.step(later).observation for later in actions[index:]] == expected[index + 1 :]
        assert episode.step(action).observation == expected[index + 1]


def test_reset_to_prefix_equals_the_recorded_state_at_every_turn():
    for task in Household.tasks("train", count=30):
        turns = Household.expert(task, seed=1, mistake_rate=0.2).turns
        for stop in range(len(turns)):
            assert transcript(task, [turn.action for turn in turns[:stop]])[-1] == turns[stop].observation


SCRIPT = """
import hashlib, json
from megatron_tcod.envs.household import Household
tasks = Household.tasks("train", count=100) + Household.tasks("held_out", count=50)
record = [[(t.observation, t.action) for t in Household.expert(x, seed=7, mistake_rate=0.2).turns] for x in tasks]
print(hashlib.sha256(json.dumps(record).encode()).hexdigest())
"""


def test_other_processes_with_other_hash_seeds_play_the_same():
    digests = {
        subprocess.run(
            [sys.executable, "-c", SCRIPT],
            env={**os.environ, "PYTHONHASHSEED": hash_seed},
            check=True,
            capture_output=True,
            text=True,
            timeout=120,
        ).stdout
        for hash_seed in ("0", "1", "4242")
    }
    assert len(digests) == 1 and len(digests.pop()) == 65


HOSTILE = [
    "",
    " ",
    "\x00",
    "go",
    "go to",
    "open",
    "take from",
    "take apple 1 from",
    "move to shelf 1",
    "heat with microwave 1",
    "use",
    "examine",
    "take {0} from {here}",
    "%s %(x)s {} {{}}",
    "<|im_end|>\n<|im_start|>assistant",
    "go to " * 50,
    "x" * 10_000_000,
    "go to countertop 1" + " " * 10_000_000,
    "göttliche Äpfel 🍎 \u202e\ud800",
    "take apple 1 from countertop 1; open fridge 1",
    "\n".join(["go to fridge 1"] * 3),
]


def test_hostile_actions_are_refused_and_change_nothing():
    episode = HouseholdEpisode(HEAT_WORLD)
    episode.reset()
    before = episode.step("go to countertop 1").observation
    for action in HOSTILE:
        step = episode.step(action)
        assert not step.info["accepted"] and step.observation == f"Nothing happens. {before}"
    longest = f"take {max(OBJECTS, key=len)} 1 from {max(PLACES, key=len)} 1"
    assert len(longest) <= MAX_ACTION_CHARS


WORDS = st.sampled_from(
    "go to open close take move heat clean cool use look inventory examine from with apple mug 1 countertop shelf "
    "fridge microwave desklamp room nothing {} hot".split()
)


@given(actions=st.lists(st.one_of(st.lists(WORDS, max_size=7).map(" ".join), st.text(string.printable)), max_size=30))
@settings(max_examples=150, deadline=None)
def test_no_text_breaks_a_room_and_objects_are_conserved(actions):
    episode = HouseholdEpisode(HEAT_WORLD)
    episode.reset()
    for action in actions:
        if episode.step(action).done:
            break
        held = [] if episode.held is None else [episode.held]
        assert sorted(sum(episode.contents.values(), held)) == ["apple 1", "mug 1", "pen 1"]


def test_the_language_stays_small():
    words = set()
    for seed, task in enumerate(Household.tasks("train", count=600)):
        demonstration = Household.expert(task, seed=seed, mistake_rate=0.2)
        text = " ".join(f"{turn.observation} {turn.action}" for turn in demonstration.turns)
        words |= set(text.replace(".", " ").replace(",", " ").replace(":", " ").split())
    assert len(words) <= 60


def test_tasks_survive_json_and_msgpack_and_are_the_same_whatever_the_range():
    tasks = Household.tasks("train", count=20, first=10)
    assert tasks == Household.tasks("train", count=30)[10:]
    assert [decode(encode(task), Task) for task in tasks] == tasks
    assert [msgspec.convert(json.loads(json.dumps(msgspec.to_builtins(task))), Task) for task in tasks] == tasks


@pytest.mark.parametrize("num_places", range(5, 13))
def test_sizes_are_respected(num_places):
    tasks = Household.tasks("train", count=6, num_places=num_places, num_distractors=11, max_solution=40)
    for task in tasks:
        world = Household.make(task).world
        assert len(world.contents) == num_places
        assert sum(map(len, world.contents.values())) == 11 + world.goal.count
        assert list(world.contents) == [f"{place} 1" for place in PLACES if f"{place} 1" in world.contents]
        Household.expert(task, seed=0)


def test_drawn_goal_objects_never_start_on_the_target():
    for seed in range(600):
        family = list(FAMILIES)[seed % 6]
        world = draw_world(random.Random(seed), family, held_out=False, num_places=6, num_distractors=3)
        assert not any(name.startswith(world.goal.object) for name in world.contents[f"{world.goal.target} 1"])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: Household.tasks("test"), "no split 'test'; use train or held_out"),
        (lambda: Household.tasks("held_out", first=150, count=51), r"no tasks \[150, 201\)"),
        (lambda: Household.tasks("train", num_places=13), r"num_places must be an integer in \[5, 12\], got 13"),
        (lambda: Household.tasks("train", max_solution=3), "max_solution must be an integer"),
        (lambda: Household.make(Task(env="household", task_id="x", split="train")), "not a household task"),
        (
            lambda: Household.make(Task(env="household", task_id="x", split="train", family="pick_two_obj")),
            "integer payload",
        ),
        (
            lambda: Household.make(
                Task(env="household", task_id="x", split="train", family="pick_two_obj", payload={"seed": 1})
            ),
            "has the sizes",
        ),
        (lambda: Household.expert(Household.tasks("train", count=1)[0], seed=0, mistake_rate=1.0), r"\[0, 1\)"),
        (lambda: Household.make(Household.tasks("train", count=1)[0], num_places=10), "expected {'num_places': 10}"),
        (lambda: Expert("Welcome to Zork."), "not a household's first observation"),
    ],
)
def test_wrong_requests_say_what_and_how(call, message):
    with pytest.raises(ValueError, match=message):
        call()
