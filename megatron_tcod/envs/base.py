"""The environment contract: text in, text out, one object per episode.

An environment never sees tokens, turns or curricula. It is used once and thrown away: `reset` once, `step` until
`done` or until the caller has enough, `close` always. Two environments built from one task behave identically.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from megatron_tcod.trajectory import ENV_FAULTS, Demonstration, Task


@dataclass(frozen=True)
class Step:
    """What the environment answers to one action.

    Example: `Step("You open the fridge 1.", reward=0.0, done=False, info={"accepted": True})`
    """

    observation: str
    reward: float = 0.0
    done: bool = False
    info: dict[str, Any] = field(default_factory=dict)
    """`accepted` False: the engine did not understand or refused the action. `success` True: the goal is reached."""


class Environment(Protocol):
    """One episode of one task."""

    def reset(self) -> str:
        """Start the episode; the first observation, task description included."""
        ...

    def step(self, action: str) -> Step:
        """Play one command. Raises `EnvironmentFault` when the environment itself breaks."""
        ...

    def close(self) -> None:
        """Free whatever the episode holds; safe to call twice."""
        ...


class EnvironmentFault(Exception):
    """The environment broke (crash, deadline, malformed answer). Ends the episode as `outcome`, never the run."""

    def __init__(self, message: str, *, outcome: str = "env_fault") -> None:
        assert outcome in ENV_FAULTS, f"{outcome} is none of {ENV_FAULTS}"
        super().__init__(message)
        self.outcome = outcome


def check_observation(observation: str, *, max_bytes: int, is_last: bool = False) -> None:
    """`EnvironmentFault` for a text that cannot be shown to a student: too long, no UTF-8, or blank before the end."""
    if len(observation) > max_bytes:
        raise EnvironmentFault(f"an observation of {len(observation)} characters", outcome="env_oversized")
    try:
        num_bytes = len(observation.encode())
    except UnicodeEncodeError as error:
        raise EnvironmentFault(f"an observation that is no UTF-8: {error}", outcome="env_invalid_text") from error
    if num_bytes > max_bytes:
        raise EnvironmentFault(f"an observation of {num_bytes} bytes; at most {max_bytes}", outcome="env_oversized")
    if not is_last and not observation.strip():
        raise EnvironmentFault("an empty observation", outcome="env_empty")


COMMANDS_LABEL = "\n\nYou can: "


def with_commands(observation: str, commands: Sequence[str], objects: Sequence[str] = ()) -> str:
    """An observation and below it what may be done; templates of commands come with the objects to put into them.

    Example: `with_commands("A door.", ["open OBJ", "wait"], ["door"])` ends in `You can: open OBJ, wait` and `OBJ: door`.
    """
    shown = f"{observation}{COMMANDS_LABEL}{', '.join(commands)}"
    return f"{shown}\nOBJ: {', '.join(objects)}" if objects else shown


def without_commands(observation: str) -> str:
    """The observation alone."""
    return observation.partition(COMMANDS_LABEL)[0]


class EnvironmentFamily(Protocol):
    """A class in the table ENVS: lists its tasks, builds an episode, and says how observations are compared.

    A family has one set of options, and `tasks`, `make` and `expert` all take every one of them, so that a caller
    passes the same everywhere. A family with a true attribute `blocking` waits for other processes: its episodes play
    in threads, side by side.
    """

    @classmethod
    def require(cls) -> None:
        """ValueError with the install line where a package that the environment needs is missing."""
        ...

    @classmethod
    def tasks(cls, split: str, *, count: int | None = None, **options: Any) -> list[Task]:
        """The first `count` tasks of a split in its fixed order, or all. ValueError names the known splits, and the
        number of tasks where there are fewer."""
        ...

    @classmethod
    def make(cls, task: Task, **options: Any) -> Environment: ...

    @staticmethod
    def normalise(observation: str) -> str:
        """The text under which two observations count as equal in verified replay."""
        ...

    @classmethod
    def expert(cls, task: Task, *, seed: int, mistake_rate: float = 0.0, **options: Any) -> Demonstration:
        """A demonstration by the environment's own expert; ValueError where there is none. With `mistake_rate` > 0
        random valid commands are injected (marked `is_trained=False`) and the expert recovers from them."""
        ...
