"""The household's expert: it reads only what the player reads, from any history on.

    expert = Expert(episode.reset())
    while not step.done:
        step = episode.step(expert.act())
        expert.observe(step.observation)

Whoever acted, `observe` every answer and `act` says what to do now, so the expert can take over from a student at any
turn. It looks around in the order in which the first observation lists the places, always on from where it
stands and around the end to the first; it opens what is closed, takes what the task names, and goes back for what it
has seen. Where it stands decides, not a plan, so one rule serves the undisturbed run and the recovery from a mistake.

It is complete, not shortest: it may pass a place twice after a mistake, and it never guesses where a thing could be.
"""

from __future__ import annotations

from megatron_tcod.envs.household_world import APPLIANCES, FAMILIES, LAMP, LAMP_PLACE, START, STATES, kind


class Expert:
    """What has been seen so far, and the next command."""

    def __init__(self, first_observation: str) -> None:
        room, _, task = first_observation.partition(" Task: ")
        self.places = room.removeprefix(f"{START}: ").rstrip(".").split(", ")
        self.is_light_task = task.startswith("look at ")
        words = task.rstrip(".").split()
        if not task or words[-2] not in ("in", "under"):
            raise ValueError(f"not a household's first observation: {first_observation!r}; expected one of {FAMILIES}")
        self.object = words[-3]
        self.target = f"{LAMP_PLACE if self.is_light_task else words[-1]} 1"
        qualifier = "" if self.is_light_task else words[1]
        self.state = qualifier if qualifier in STATES.values() else ""
        self.has_pair = qualifier == "two"
        self.here = START
        self.held: str | None = None
        self.seen: dict[str, list[str] | None] = {}
        """What each place showed when last looked at, most recent last; None for closed."""

    def observe(self, observation: str) -> None:
        """Take in the answer to a command, whoever gave the command."""
        state_line = observation.removeprefix("Nothing happens. ").partition(" Task: ")[0].replace("* ", "")
        here, _, rest = state_line.partition(": ")
        shown, _, held = rest.removesuffix(".").partition(". hold ")
        self.here, self.held = here, held or None
        if here == START:
            return
        self.seen.pop(here, None)
        self.seen[here] = None if shown == "closed" else [] if shown == "nothing" else shown.split(", ")

    def act(self) -> str:
        """The next command towards the goal."""
        if self.held is not None:
            return self._handle()
        if self.here == START:
            return f"go to {self.places[0]}"
        shown = self.seen[self.here]
        if shown is None:
            return f"open {self.here}"
        for title in shown:
            if self._is_wanted(title, self.here):
                return f"take {_plain(title)} from {self.here}"
        for place in reversed(self.seen):
            if any(self._is_wanted(title, place) for title in self.seen[place] or ()):
                return f"go to {place}"
        return f"go to {self.places[(self.places.index(self.here) + 1) % len(self.places)]}"

    def _handle(self) -> str:
        """What to do with the thing in the hand: put a wrong one down at once, carry a right one on."""
        name = _plain(self.held)
        if kind(name) != self.object:
            return self._put_here(name)
        if self.is_light_task:
            return f"use {LAMP}" if self.here == self.target else f"go to {self.target}"
        if self.state and not self.held.startswith(self.state):
            verb = next(verb for verb, state in STATES.items() if state == self.state)
            appliance = f"{APPLIANCES[verb]} 1"
            return f"{verb} {name} with {appliance}" if self.here == appliance else f"go to {appliance}"
        return self._put_here(name) if self.here == self.target else f"go to {self.target}"

    def _put_here(self, name: str) -> str:
        return f"open {self.here}" if self.seen[self.here] is None else f"move {name} to {self.here}"

    def _is_wanted(self, title: str, place: str) -> bool:
        """Whether the task needs this thing picked up: its kind, and not already where and how it should end."""
        if kind(title) != self.object:
            return False
        is_delivered = place == self.target and not self.is_light_task and title.startswith(self.state)
        return not is_delivered


def _plain(title: str) -> str:
    """`hot apple 1` -> `apple 1`."""
    return " ".join(title.split()[-2:])
