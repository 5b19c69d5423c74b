"""Temporal curricula: which turns of an episode the student plays at a training step (arXiv 2604.24005, Eq. 3-5).

    k(step) = min(k_start + (step + step_origin) // eta, k_max)

`full` plays `[0, max_turns)`. `f2b` (front to back) plays the first k turns. `b2f` (back to front) lets the teacher's
demonstration of length L fill the first L - k turns and gives the student the rest. A curriculum is a pure function of
the step and the task, so nothing but the step has to be saved. Add one by writing a class and a line in CURRICULA.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, ClassVar, Literal, Protocol

from megatron_tcod.trajectory import Task, TurnWindow


class Curriculum(Protocol):
    needs_demonstrations: ClassVar[bool]

    def depth(self, step: int) -> int:
        """Window depth k in turns at a step (optimizer steps done, from 0), before clamping to a task."""
        ...

    def window(self, step: int, task: Task) -> TurnWindow: ...


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """k(step) = min(k_start + (step + step_origin) // eta, k_max). Example: `Schedule(k_start=1, eta=2).depth(4) == 3`."""

    k_start: int = 1
    eta: int = 2
    """Optimizer steps per turn of growth."""
    k_max: int | None = None
    step_origin: int = 0
    """1 where the first optimizer step counts as n = 1, as in the paper."""

    def __post_init__(self) -> None:
        for name in ("k_start", "eta"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.k_max is not None and self.k_max < self.k_start:
            raise ValueError(f"k_max {self.k_max} is below k_start {self.k_start}")

    def depth(self, step: int) -> int:
        if step < 0:
            raise ValueError(f"step must not be negative, got {step}")
        k = self.k_start + (step + self.step_origin) // self.eta
        return k if self.k_max is None else min(k, self.k_max)


@dataclass(frozen=True, kw_only=True)
class Full:
    """Vanilla on-policy distillation: the student plays every turn."""

    needs_demonstrations: ClassVar[bool] = False
    max_turns: int

    def depth(self, step: int) -> int:
        return self.max_turns

    def window(self, step: int, task: Task) -> TurnWindow:
        return TurnWindow(0, self.max_turns)


@dataclass(frozen=True, kw_only=True)
class FrontToBack:
    """F2B, Eq. 3: the episode is cut after the student's first k turns."""

    needs_demonstrations: ClassVar[bool] = False
    schedule: Schedule
    max_turns: int

    def depth(self, step: int) -> int:
        return self.schedule.depth(step)

    def window(self, step: int, task: Task) -> TurnWindow:
        return TurnWindow(0, min(self.depth(step), self.max_turns))


@dataclass(frozen=True, kw_only=True)
class BackToFront:
    """B2F, Eq. 5: the teacher's first L - k turns are replayed, the student finishes.

    `stop = horizon` lets it play to max_turns (released code), `demonstration` to L (paper). A task without a
    demonstration is played in full where `missing` says so; otherwise its window asks for one replayed turn, which the
    rollout cannot find and reports as `no_demonstration`.
    """

    needs_demonstrations: ClassVar[bool] = True
    schedule: Schedule
    max_turns: int
    lengths: Mapping[str, int]
    """Demonstration length L in turns by task id."""
    stop: Literal["horizon", "demonstration"] = "horizon"
    missing: Literal["outcome", "full"] = "outcome"

    def depth(self, step: int) -> int:
        return self.schedule.depth(step)

    def window(self, step: int, task: Task) -> TurnWindow:
        length = self.lengths.get(task.task_id, 0)
        if not length:
            return TurnWindow(int(self.missing == "outcome"), self.max_turns)
        start = max(0, min(length, self.max_turns) - self.depth(step))
        stop = length if self.stop == "demonstration" else self.max_turns
        return TurnWindow(start, min(stop, self.max_turns))


CURRICULA = {"full": Full, "f2b": FrontToBack, "b2f": BackToFront}


def make_curriculum(name: str, **settings: Any) -> Curriculum:
    """The curriculum behind a name of CURRICULA, from those of `settings` that are its fields."""
    if name not in CURRICULA:
        raise ValueError(f"curriculum {name!r} is unknown; known: {', '.join(CURRICULA)}")
    kind = CURRICULA[name]
    return kind(**{field.name: settings[field.name] for field in fields(kind)})
