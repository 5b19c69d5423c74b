"""The family `household`: its tasks, its two splits, and its expert's demonstrations.

    tasks = Household.tasks("train", count=1000)            # any count, from any `first`
    held_out = Household.tasks("held_out")                  # 200, always the same
    episode = Household.make(tasks[0])
    demonstration = Household.expert(tasks[0], seed=0, mistake_rate=0.1)

A task is a seed and three sizes; the room is drawn from them when the episode is made, identically in every process.
The splits differ in what is asked: a seventh of all (family, object, target) triples is asked in
`held_out` only (`Goal.is_held_out`), so no held-out goal is ever trained on, in whatever room.
A room whose expert needs more than `max_solution` turns is drawn again.

It needs nothing but Python. It does not read files, keep state between episodes, or know turns and horizons.
"""

from __future__ import annotations

import random
from typing import Any

from megatron_tcod.envs.base import Step
from megatron_tcod.envs.household_expert import Expert
from megatron_tcod.envs.household_world import (
    FAMILIES,
    FIXTURES,
    LAMP,
    OBJECTS,
    OPENABLE,
    PLACES,
    HouseholdEpisode,
    World,
    draw_world,
    kind,
)
from megatron_tcod.envs.mistakes import Mistakes
from megatron_tcod.trajectory import Demonstration, DemonstrationTurn, Task

NUM_HELD_OUT = 200
NUM_TRAIN = 1000
"""How many training tasks `tasks` lists unless told."""

TURN_LIMIT = 200
"""Far beyond any episode of the expert: reaching it means that the expert is broken."""


class Household:
    """The built-in text household (`household_world.py` has the room and its rules)."""

    @classmethod
    def require(cls) -> None:
        """Nothing but Python."""

    @classmethod
    def tasks(
        cls,
        split: str,
        *,
        count: int | None = None,
        first: int = 0,
        num_places: int = 9,
        num_distractors: int = 4,
        max_solution: int = 20,
        mark_wanted: bool = False,
    ) -> list[Task]:
        """Tasks `[first, first + count)` of a split, the six families in turn.

        `train` has no end (1,000 unless told); `held_out` has 200. `num_places` counts places a room, `num_distractors`
        objects that the task does not ask for, `max_solution` the turns that the expert may need; `mark_wanted` puts a
        star before the things that the task names.
        ValueError: an unknown split, a range outside the split, sizes that no room can have.
        """
        if split not in ("train", "held_out"):
            raise ValueError(f"household has no split {split!r}; use train or held_out")
        if count is None:
            count = NUM_TRAIN if split == "train" else NUM_HELD_OUT - first
        if first < 0 or count < 0 or (split == "held_out" and first + count > NUM_HELD_OUT):
            raise ValueError(
                f"household {split} has no tasks [{first}, {first + count}); "
                f"held_out has [0, {NUM_HELD_OUT}), train starts at 0 and has no end"
            )
        sizes = {
            "num_places": num_places,
            "num_distractors": num_distractors,
            "max_solution": max_solution,
            "mark_wanted": mark_wanted,
        }
        _check_sizes(sizes)
        families = list(FAMILIES)
        return [
            Task(
                env="household",
                task_id=f"{families[seed % len(families)]}/{split}/{seed}",
                split=split,
                family=families[seed % len(families)],
                payload={"seed": seed, **sizes},
            )
            for seed in range(first, first + count)
        ]

    @classmethod
    def make(cls, task: Task, **sizes: int) -> HouseholdEpisode:
        """A fresh episode of a task. The task holds its sizes; given here as well, they must be the same.
        ValueError names what is wrong with a task that `tasks` did not make."""
        return HouseholdEpisode(_world(task, sizes))

    @staticmethod
    def normalise(observation: str) -> str:
        """White space collapsed; nothing else varies between two plays of a room."""
        return " ".join(observation.split())

    @classmethod
    def expert(cls, task: Task, *, seed: int, mistake_rate: float = 0.0, **sizes: int) -> Demonstration:
        """The expert's solution of a task. Each turn starts, with probability `mistake_rate`, a burst of one to three
        injected commands: random valid ones, plausible wrong ones and repetitions of the last one, all
        `is_trained=False`; then the expert goes on from wherever that led. `seed` draws the mistakes, nothing else.
        """
        return play_expert(_world(task, sizes), task, mistakes=Mistakes(seed=seed, rate=mistake_rate))


def play_expert(world: World, task: Task, *, mistakes: Mistakes) -> Demonstration:
    """One episode of the expert, disturbed by the mistakes."""
    episode = HouseholdEpisode(world)
    step = Step(episode.reset())
    expert = Expert(step.observation)
    turns: list[DemonstrationTurn] = []
    while not step.done:
        assert len(turns) < TURN_LIMIT, f"the expert does not finish {task.task_id}"
        is_mistake = mistakes.strikes()
        action = _wrong_action(episode, mistakes, turns[-1].action if turns else None) if is_mistake else expert.act()
        turns.append(
            DemonstrationTurn(observation=step.observation, action=action, text=action, is_trained=not is_mistake)
        )
        step = episode.step(action)
        expert.observe(step.observation)
    return Demonstration(task=task, turns=turns, success=True, source="expert", final_observation=step.observation)


def _wrong_action(episode: HouseholdEpisode, mistakes: Mistakes, last: str | None) -> str:
    """Half of the time a valid command, else the last one again or one that sounds right but is refused here."""
    draw = mistakes.rng.random()
    if draw < 0.5:
        return mistakes.choose(episode.admissible_commands())
    if draw < 0.75 and last is not None:
        return last
    name = f"{mistakes.choose(list(OBJECTS))} 1"
    place = mistakes.choose(list(episode.contents))
    return mistakes.choose(
        [
            f"go to {episode.here}",
            f"take {name} from {place}",
            f"move {name} to {place}",
            f"open {mistakes.choose([place for place in episode.contents if kind(place) in OPENABLE])}",
            f"heat {name} with microwave 1",
            f"clean {name} with sinkbasin 1",
            f"cool {name} with fridge 1",
            f"use {LAMP}",
        ]
    )


def _world(task: Task, sizes: dict[str, int]) -> World:
    """The room of a task: the first draw that its expert solves within `max_solution` turns."""
    payload = dict(task.payload)
    seed = payload.pop("seed", None)
    if task.env != "household" or task.family not in FAMILIES or task.split not in ("train", "held_out"):
        raise ValueError(
            f"not a household task: env {task.env!r}, split {task.split!r}, family {task.family!r}; "
            f"expected household, train or held_out, one of {list(FAMILIES)}"
        )
    if not isinstance(seed, int):
        raise ValueError(f"household task {task.task_id!r} needs an integer payload['seed'], got {seed!r}")
    _check_sizes(payload)
    if not sizes.items() <= payload.items():
        raise ValueError(f"household task {task.task_id!r} was made with {payload}; expected {sizes}: list it again")
    rng = random.Random(f"{task.split}/{task.family}/{seed}")
    undisturbed = Mistakes(seed=0, rate=0.0)
    while True:
        world = draw_world(
            rng,
            task.family,
            held_out=task.split == "held_out",
            num_places=payload["num_places"],
            num_distractors=payload["num_distractors"],
            mark_wanted=payload["mark_wanted"],
        )
        if len(play_expert(world, task, mistakes=undisturbed).turns) <= payload["max_solution"]:
            return world


def _check_sizes(sizes: dict[str, Any]) -> None:
    ranges = {
        "num_places": (len(FIXTURES) + 1, len(PLACES)),
        "num_distractors": (0, len(OBJECTS) - 1),
        "max_solution": (16, TURN_LIMIT),
        "mark_wanted": (False, True),
    }
    if set(sizes) != set(ranges):
        raise ValueError(f"a household task has the sizes {sorted(ranges)}, got {sorted(sizes)}")
    for name, (low, high) in ranges.items():
        if not isinstance(sizes[name], int) or not low <= sizes[name] <= high:
            raise ValueError(f"household {name} must be an integer in [{low}, {high}], got {sizes[name]!r}")
