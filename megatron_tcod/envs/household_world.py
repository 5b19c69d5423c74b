"""The built-in household: a seeded text room in ALFWorld's action language, with text as short as a tiny model needs.

    world = draw_world(random.Random("7"), "pick_heat_then_place", held_out=False, num_places=9, num_distractors=4)
    episode = HouseholdEpisode(world)
    episode.reset()                       # room: countertop 1, shelf 1, ... desk 1. Task: put hot apple in shelf.
    episode.step("go to countertop 1")    # countertop 1: mug 1, apple 1. Task: put hot apple in shelf.
    episode.step("take apple 1 from countertop 1")    # countertop 1: mug 1. hold apple 1. Task: put hot apple in shelf.

Every answer is one state line, `PLACE: CONTENTS.` and `hold OBJECT.` while something is carried, and the task again, so
that the next move follows from the last observation and the order of the places; where things were seen earlier is the
only thing to remember. A refused command answers `Nothing happens.` and then the state line. A closed container says
`closed` until it is opened. One hand: whoever holds something cannot take a second thing. On request a star marks the
things that the task names: whether a name in one sentence is the name in another is what a tiny model learns last.

This file holds the room, its rules and how a room is drawn. It does not know splits, seeds or the expert
(`household.py`, `household_expert.py`), and it is no physics: an object's state is the last of hot, clean, cool that
was done to it.
"""

from __future__ import annotations

import copy
import random
from dataclasses import dataclass

from megatron_tcod.envs.base import Step

PLACES = (
    "countertop",
    "diningtable",
    "sidetable",
    "shelf",
    "cabinet",
    "drawer",
    "fridge",
    "microwave",
    "sinkbasin",
    "desk",
    "dresser",
    "safe",
)
"""All kinds of places, in the order in which every room lists the ones it has."""

OPENABLE = frozenset({"cabinet", "drawer", "fridge", "microwave", "safe"})
FIXTURES = ("fridge", "microwave", "sinkbasin", "desk")
"""Places that every room has, so that the list of places does not give the task away."""

APPLIANCES = {"heat": "microwave", "clean": "sinkbasin", "cool": "fridge"}
STATES = {"heat": "hot", "clean": "clean", "cool": "cool"}
LAMP = "desklamp 1"
LAMP_PLACE = "desk"
START = "room"
"""Where an episode begins: the middle of the room, from where every place can be reached."""

OBJECTS = {
    "apple": ("heat", "clean", "cool"),
    "egg": ("heat", "clean", "cool"),
    "potato": ("heat", "clean", "cool"),
    "tomato": ("heat", "clean", "cool"),
    "mug": ("heat", "clean", "cool"),
    "plate": ("heat", "clean", "cool"),
    "bread": ("heat", "cool"),
    "bowl": ("clean", "cool"),
    "cloth": ("clean",),
    "pen": (),
    "book": (),
    "watch": (),
}
"""Kinds of objects and what can be done to them; the rest is refused."""

FAMILIES = {
    "pick_and_place": "put {object} in {target}",
    "look_at_obj_in_light": "look at {object} under desklamp",
    "pick_clean_then_place": "put clean {object} in {target}",
    "pick_heat_then_place": "put hot {object} in {target}",
    "pick_cool_then_place": "put cool {object} in {target}",
    "pick_two_obj": "put two {object} in {target}",
}
"""ALFWorld's six task families and how the room states each."""

PROCESS = {"pick_clean_then_place": "clean", "pick_heat_then_place": "heat", "pick_cool_then_place": "cool"}

MAX_ACTION_CHARS = 120
"""Longer actions are refused unread; the longest valid one has less than half of that."""


@dataclass(frozen=True)
class Goal:
    """What has to be done.

    Example: `Goal("pick_heat_then_place", "apple", "shelf")` reads `put hot apple in shelf`
    """

    family: str
    object: str
    target: str
    """Kind of place; the lamp's place in `look_at_obj_in_light`."""

    @property
    def text(self) -> str:
        return FAMILIES[self.family].format(object=self.object, target=self.target)

    @property
    def is_held_out(self) -> bool:
        """Whether only the held-out split may ask for this: a seventh of all (family, object, target) triples, spread
        so that every family, object and target also occurs in training, only never in this combination."""
        family, kind, target = list(FAMILIES).index(self.family), list(OBJECTS).index(self.object), self.target
        return (3 * kind + 5 * PLACES.index(target) + family) % 7 == 0

    @property
    def count(self) -> int:
        return 2 if self.family == "pick_two_obj" else 1

    @property
    def state(self) -> str:
        """The state the object must be in, empty where any will do."""
        return STATES.get(PROCESS.get(self.family, ""), "")


@dataclass(frozen=True)
class World:
    """A room before the first move.

    Example: `World(goal, contents={"shelf 1": ("apple 1",), "fridge 1": (), ...})`, places in their listed order
    """

    goal: Goal
    contents: dict[str, tuple[str, ...]]
    marks_wanted: bool = False
    """Whether observations put a star before the things the task names."""


def kind(name: str) -> str:
    """`apple 1`, `hot apple 1` or `hot apple` -> `apple`."""
    words = name.split()
    return words[-2] if words[-1].isdigit() else words[-1]


def choose(rng: random.Random, items: list[str]) -> str:
    """A random item through `rng.random()`, the one draw that Python keeps stable over its versions."""
    return items[int(rng.random() * len(items))]


def goals(family: str, *, held_out: bool) -> list[Goal]:
    """Every goal of a family on one side of the split."""
    process = PROCESS.get(family)
    if family == "look_at_obj_in_light":
        targets = [LAMP_PLACE]
    else:
        targets = [place for place in PLACES if place != APPLIANCES.get(process)]
    objects = [name for name, affordances in OBJECTS.items() if process is None or process in affordances]
    candidates = [Goal(family, name, target) for name in objects for target in targets]
    return [goal for goal in candidates if goal.is_held_out == held_out]


def draw_world(
    rng: random.Random, family: str, *, held_out: bool, num_places: int, num_distractors: int, mark_wanted: bool = False
) -> World:
    """A random room for a family: `num_places` places, the goal's objects anywhere but on the target, and
    `num_distractors` objects of other kinds anywhere."""
    choices = goals(family, held_out=held_out)
    goal = choices[int(rng.random() * len(choices))]
    kept = {*FIXTURES, goal.target}
    spare = [place for place in PLACES if place not in kept]
    while len(kept) < num_places:
        kept.add(spare.pop(int(rng.random() * len(spare))))
    contents: dict[str, list[str]] = {f"{place} 1": [] for place in PLACES if place in kept}
    others = [name for name in OBJECTS if name != goal.object]
    for _ in range(num_distractors):
        name = others.pop(int(rng.random() * len(others)))
        contents[choose(rng, list(contents))].append(f"{name} 1")
    sources = [place for place in contents if kind(place) != goal.target]
    for number in range(1, goal.count + 1):
        objects = contents[choose(rng, sources)]
        objects.insert(int(rng.random() * (len(objects) + 1)), f"{goal.object} {number}")
    return World(goal, {place: tuple(objects) for place, objects in contents.items()}, mark_wanted)


class HouseholdEpisode:
    """One episode in one room. `step` never raises on text: what it cannot read is refused like any wrong move."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.goal = world.goal
        self.contents = {place: list(objects) for place, objects in world.contents.items()}
        self.closed = {place for place in self.contents if kind(place) in OPENABLE}
        self.states: dict[str, str] = {}
        self.here = START
        self.held: str | None = None
        self.is_lit = False
        self.is_done = False
        self._has_started = False

    def reset(self) -> str:
        assert not self._has_started, "an episode is used once: make a new one"
        self._has_started = True
        return self._answer()

    def step(self, action: str) -> Step:
        assert self._has_started and not self.is_done, "step needs reset() first and ends with done"
        words = action.lower().split() if len(action) <= MAX_ACTION_CHARS else []
        accepted = self._apply(words)
        self.is_done = self._is_solved()
        observation = self._answer() if accepted else f"Nothing happens. {self._answer()}"
        info = {"accepted": accepted, "success": self.is_done}
        return Step(observation, reward=float(self.is_done), done=self.is_done, info=info)

    def close(self) -> None:
        """Nothing to free."""

    def copy(self) -> HouseholdEpisode:
        """An independent episode in the same state."""
        return copy.deepcopy(self)

    def admissible_commands(self) -> list[str]:
        """Every command that changes something or looks at something here, in a fixed order."""
        here = self.here
        commands = [f"go to {place}" for place in self.contents if place != here] + ["look", "inventory"]
        if here == START:
            return commands
        commands.append(f"examine {here}")
        if kind(here) in OPENABLE:
            commands.append(f"open {here}" if here in self.closed else f"close {here}")
        if kind(here) == LAMP_PLACE:
            commands.append(f"use {LAMP}")
        if self.held is None and here not in self.closed:
            commands += [f"take {name} from {here}" for name in self.contents[here]]
        if self.held is not None:
            if here not in self.closed:
                commands.append(f"move {self.held} to {here}")
            commands += [
                f"{verb} {self.held} with {here}"
                for verb, appliance in APPLIANCES.items()
                if kind(here) == appliance and verb in OBJECTS[kind(self.held)]
            ]
        return commands

    def _apply(self, words: list[str]) -> bool:
        """Carry out a command; whether it was accepted."""
        match words:
            case ["go", "to", *place]:
                return self._go(" ".join(place))
            case ["open" | "close" as verb, *place] if " ".join(place) == self.here:
                return self._swing(verb)
            case ["take", *name, "from", where, number] if f"{where} {number}" == self.here:
                return self._take(" ".join(name))
            case ["move", *name, "to", where, number] if f"{where} {number}" == self.here:
                return self._move(" ".join(name))
            case ["heat" | "clean" | "cool" as verb, *name, "with", where, number] if f"{where} {number}" == self.here:
                return self._process(verb, " ".join(name))
            case ["use", *lamp]:
                is_usable = " ".join(lamp) == LAMP and kind(self.here) == LAMP_PLACE
                self.is_lit = self.is_lit or is_usable
                return is_usable
            case ["look"] | ["inventory"]:
                return True
            case ["examine", *thing]:
                visible = self.contents.get(self.here, []) if self.here not in self.closed else []
                return " ".join(thing) in {self.here, self.held, *visible} - {START}
        return False

    def _go(self, place: str) -> bool:
        if place not in self.contents or place == self.here:
            return False
        self.here = place
        self.is_lit = False
        return True

    def _swing(self, verb: str) -> bool:
        if kind(self.here) not in OPENABLE or (self.here in self.closed) != (verb == "open"):
            return False
        (self.closed.remove if verb == "open" else self.closed.add)(self.here)
        return True

    def _take(self, name: str) -> bool:
        if self.held is not None or self.here in self.closed or name not in self.contents[self.here]:
            return False
        self.contents[self.here].remove(name)
        self.held = name
        return True

    def _move(self, name: str) -> bool:
        if name != self.held or self.here in self.closed:
            return False
        self.contents[self.here].append(name)
        self.held = None
        return True

    def _process(self, verb: str, name: str) -> bool:
        if name != self.held or kind(self.here) != APPLIANCES[verb] or verb not in OBJECTS[kind(name)]:
            return False
        self.states[name] = STATES[verb]
        return True

    def _is_solved(self) -> bool:
        if self.goal.family == "look_at_obj_in_light":
            return self.is_lit and self.held is not None and kind(self.held) == self.goal.object
        wanted = self.goal.state
        there = [name for name in self.contents[f"{self.goal.target} 1"] if kind(name) == self.goal.object]
        return sum(1 for name in there if not wanted or self.states.get(name) == wanted) >= self.goal.count

    def _answer(self) -> str:
        return f"{self._state_line()} Task: {self.goal.text}."

    def _state_line(self) -> str:
        if self.here == START:
            return f"{START}: {', '.join(self.contents)}."
        if self.here in self.closed:
            seen = "closed"
        else:
            seen = ", ".join(map(self._title, self.contents[self.here])) or "nothing"
        return f"{self.here}: {seen}." if self.held is None else f"{self.here}: {seen}. hold {self._title(self.held)}."

    def _title(self, name: str) -> str:
        """`apple 1`, `hot apple 1` once it was heated, `* hot apple 1` where things of the task are marked."""
        title = f"{self.states[name]} {name}" if name in self.states else name
        return f"* {title}" if self.world.marks_wanted and kind(name) == self.goal.object else title
