"""The family `scienceworld`: thirty kinds of school experiments, played by ScienceWorld's simulator in a process of its own.

    tasks = ScienceWorld.tasks("train", task_types="boil,melt")
    episode = ScienceWorld.make(tasks[0])
    print(episode.reset())

A task is a type and a variation of it. `train`, `dev` and `test` are the simulator's own split of each type's variations;
types take turns in the list, so that the first tasks of a split hold all types. `released_train` and `released_test` are
those of the released TCOD code: the first half of the variations of 17 types, and of the 13 others.

The first observation holds the task description. `show_commands` puts below each observation what may be done, as the paper's
prompt does: `templates` (commands with OBJ, and the objects; about 500 tokens) or `admissible` (about a thousand commands).
`simplification` is the simulator's: `easy` as in the released code, or names of it with commas, or nothing.

The reward of a turn is what it adds to the score, 0 to 1; losing a task takes the score back to 0. Success is the full score.
Needs the package `scienceworld` and Java (8 or newer); a process takes about 0.4 GB. Horizons belong to the caller: gold
paths can have 178 commands.
"""

from __future__ import annotations

import os
import random
import shutil
from collections.abc import Iterable, Mapping
from itertools import zip_longest
from pathlib import Path
from typing import Any

from megatron_tcod.envs.base import Step, with_commands, without_commands
from megatron_tcod.envs.process import WorkerEpisode, WorkerKind
from megatron_tcod.envs.scienceworld_text import canonical
from megatron_tcod.trajectory import Demonstration, DemonstrationTurn, Task


def find_java() -> dict[str, str]:
    """Where Java is, for the process; ValueError says how to get it."""
    home = os.environ.get("JAVA_HOME")
    found = shutil.which("java", path=f"{home}/bin") if home else shutil.which("java")
    if found is None:
        where = f"in JAVA_HOME={home}" if home else "on PATH, and JAVA_HOME is not set"
        raise ValueError(
            f"env scienceworld needs Java 8 or newer; no java {where}: install one (Debian, Ubuntu: apt-get install "
            "openjdk-17-jre-headless; conda: conda install openjdk) or set JAVA_HOME to one"
        )
    return {"SCIENCEWORLD_JAVA": found}


KIND = WorkerKind(
    name="scienceworld",
    script=Path(__file__).with_name("scienceworld_worker.py"),
    packages=("scienceworld", "py4j"),
    memory_bytes=6 << 30,
    environment=find_java,
)

VARIATIONS = {
    "boil": (14, 7, 9),
    "change-the-state-of-matter-of": (14, 7, 9),
    "chemistry-mix": (16, 8, 8),
    "chemistry-mix-paint-secondary-color": (18, 9, 9),
    "chemistry-mix-paint-tertiary-color": (18, 9, 9),
    "find-animal": (150, 75, 75),
    "find-living-thing": (150, 75, 75),
    "find-non-living-thing": (150, 75, 75),
    "find-plant": (150, 75, 75),
    "freeze": (14, 7, 9),
    "grow-fruit": (62, 31, 33),
    "grow-plant": (62, 31, 33),
    "identify-life-stages-1": (6, 3, 5),
    "identify-life-stages-2": (4, 2, 4),
    "inclined-plane-determine-angle": (84, 42, 42),
    "inclined-plane-friction-named-surfaces": (692, 346, 348),
    "inclined-plane-friction-unnamed-surfaces": (80, 40, 42),
    "lifespan-longest-lived": (62, 31, 32),
    "lifespan-longest-lived-then-shortest-lived": (62, 31, 32),
    "lifespan-shortest-lived": (62, 31, 32),
    "measure-melting-point-known-substance": (218, 109, 109),
    "measure-melting-point-unknown-substance": (150, 75, 75),
    "melt": (14, 7, 9),
    "mendelian-genetics-known-plant": (60, 30, 30),
    "mendelian-genetics-unknown-plant": (240, 120, 120),
    "power-component": (10, 5, 5),
    "power-component-renewable-vs-nonrenewable-energy": (10, 5, 5),
    "test-conductivity": (450, 225, 225),
    "test-conductivity-of-unknown-substances": (300, 150, 150),
    "use-thermometer": (270, 135, 135),
}
"""How many variations the simulator (1.2.3) puts into train, dev and test: consecutive ranges from 0."""

SPLITS = ("train", "dev", "test", "released_train", "released_test")

RELEASED_TRAIN_TYPES = (
    "boil",
    "melt",
    "change-the-state-of-matter-of",
    "use-thermometer",
    "measure-melting-point-known-substance",
    "power-component",
    "test-conductivity",
    "find-living-thing",
    "find-plant",
    "grow-plant",
    "chemistry-mix",
    "chemistry-mix-paint-secondary-color",
    "lifespan-shortest-lived",
    "identify-life-stages-2",
    "inclined-plane-determine-angle",
    "inclined-plane-friction-named-surfaces",
    "mendelian-genetics-known-plant",
)

SIMPLIFICATIONS = (
    "teleportAction",
    "selfWateringFlowerPots",
    "openContainers",
    "openDoors",
    "noElectricalAction",
    "easy",
)

ELECTRICAL = ("power-component", "conductivity")

SHOWN = ("none", "templates", "admissible")

MAX_ACTION_CHARS = 1000
"""Longer actions are refused unread, as any command that the simulator does not know."""

REFUSAL = "No known action matches that input."

GOLD_PATHS: dict[tuple[str, int, str], list[str]] = {}
"""By type, variation and simplification: what the simulator told. It is slow to ask, and free to answer otherwise."""

IDLE_COMMANDS = ("look around", "inventory", "task")

RESET_DEADLINE_S = 120.0
"""Seconds: a start of Java and building the world, gold path included."""

STEP_DEADLINE_S = 60.0


class ScienceWorld:
    """ScienceWorld (Wang et al., arXiv 2203.07540)."""

    blocking = True

    @classmethod
    def require(cls) -> None:
        """ValueError with what to install where the package or Java is missing."""
        KIND.require()

    @classmethod
    def tasks(
        cls,
        split: str,
        *,
        count: int | None = None,
        first: int = 0,
        task_types: str = "",
        simplification: str = "easy",
        show_commands: str = "none",
        reset_deadline_s: float = RESET_DEADLINE_S,
        step_deadline_s: float = STEP_DEADLINE_S,
    ) -> list[Task]:
        """`[first, first + count)` of the tasks of a split; of the types named with commas, else of all. The other
        options are for playing them. ValueError: an unknown split, type, simplification or way to show commands."""
        if split not in SPLITS:
            raise ValueError(f"scienceworld has no split {split!r}; use one of {', '.join(SPLITS)}")
        types = [name.strip() for name in task_types.split(",") if name.strip()] or list(VARIATIONS)
        check_choices(types, VARIATIONS, "task type")
        for name in types:
            check_settings(name, simplification, show_commands)
        rows = [[task_of(name, variation, split) for variation in variations(name, split)] for name in types]
        tasks = [task for row in zip_longest(*rows) for task in row if task is not None]
        if count is not None and first + count > len(tasks):
            raise ValueError(
                f"scienceworld {split} has {len(tasks)} tasks of the types asked for, {first + count} were asked for; ask "
                "for fewer, or name more task_types"
            )
        return tasks[first : None if count is None else first + count]

    @classmethod
    def make(
        cls,
        task: Task,
        *,
        task_types: str = "",
        simplification: str = "easy",
        show_commands: str = "none",
        reset_deadline_s: float = RESET_DEADLINE_S,
        step_deadline_s: float = STEP_DEADLINE_S,
    ) -> ScienceWorldEpisode:
        """A fresh episode; `task_types` is only for listing. ValueError where the task is not one of these."""
        name, _ = type_and_variation(task)
        check_settings(name, simplification, show_commands)
        return ScienceWorldEpisode(
            task,
            simplification=simplification,
            show_commands=show_commands,
            reset_deadline_s=reset_deadline_s,
            step_deadline_s=step_deadline_s,
        )

    @staticmethod
    def normalise(observation: str) -> str:
        """Listed objects in one order (`scienceworld_text.py`), commands that are shown left out."""
        return canonical(without_commands(observation))

    @classmethod
    def expert(
        cls,
        task: Task,
        *,
        seed: int,
        mistake_rate: float = 0.0,
        task_types: str = "",
        simplification: str = "easy",
        show_commands: str = "none",
        reset_deadline_s: float = RESET_DEADLINE_S,
        step_deadline_s: float = STEP_DEADLINE_S,
    ) -> Demonstration:
        """The simulator's gold path, asked for once a process and recorded as it was played; `success` says whether it
        solved the task.

        A gold path cannot take over from a state that it did not lead to. So injected mistakes are commands that
        change nothing, looking where one has looked, and none between a question of the simulator and its answer.
        """
        rng = random.Random(seed)
        episode = cls.make(
            task,
            simplification=simplification,
            show_commands=show_commands,
            reset_deadline_s=reset_deadline_s,
            step_deadline_s=step_deadline_s,
        )
        turns: list[DemonstrationTurn] = []
        try:
            step = Step(episode.reset_with_gold())
            path = iter(episode.gold)
            action = next(path, None)
            while action is not None and not step.done:
                is_mistake = rng.random() < mistake_rate and not action.isdigit()
                played = rng.choice(IDLE_COMMANDS) if is_mistake else action
                turn = DemonstrationTurn(
                    observation=step.observation, action=played, text=played, is_trained=not is_mistake
                )
                turns.append(turn)
                step = episode.step(played)
                action = action if is_mistake else next(path, None)
        finally:
            episode.close()
        return Demonstration(
            task=task,
            turns=turns,
            success=bool(step.info.get("success")),
            source="expert",
            final_observation=step.observation,
        )


class ScienceWorldEpisode(WorkerEpisode):
    """One play of one task. Between `reset` and `close` it holds a simulator. `gold` is the path, if asked for."""

    def __init__(
        self, task: Task, *, simplification: str, show_commands: str, reset_deadline_s: float, step_deadline_s: float
    ) -> None:
        super().__init__(KIND, reset_deadline_s=reset_deadline_s, step_deadline_s=step_deadline_s)
        self.task_type, self.variation = type_and_variation(task)
        self.gold: list[str] = []
        self._simplification, self._show_commands = simplification, show_commands
        self._score = 0.0
        self._is_done = False
        self._shown: tuple[list[str], list[str]] = ([], [])

    def reset(self) -> str:
        return self._begin(has_gold=False)

    def reset_with_gold(self) -> str:
        """`reset`, and `gold` is there afterwards."""
        key = (self.task_type, self.variation, self._simplification)
        observation = self._begin(has_gold=key not in GOLD_PATHS)
        self.gold = GOLD_PATHS.setdefault(key, self.gold)
        return observation

    def step(self, action: str) -> Step:
        assert not self._is_done, "the episode is over"
        if not action.strip() or len(action) > MAX_ACTION_CHARS or not is_utf8(action):
            return Step(self._show(REFUSAL), info=self._info(accepted=False, score=self._score))
        answer = self._step(command=action.strip(), shown=self._show_commands)
        self._shown = (answer["commands"], answer["objects"])
        score = answer["score"]
        self._is_done = answer["completed"] or score < 0
        is_accepted = not answer["observation"].startswith(REFUSAL)
        reward = 0.0
        if is_accepted:  # the simulator looks at the score with every command; what it finds is the next accepted one's
            reward, self._score = max(score, 0.0) - self._score, max(score, 0.0)
        return Step(
            self._show(answer["observation"]),
            reward=reward,
            done=self._is_done,
            info=self._info(accepted=is_accepted, score=score),
        )

    def _begin(self, *, has_gold: bool) -> str:
        answer = self._reset(
            task=self.task_type,
            variation=self.variation,
            simplification=self._simplification,
            has_gold=has_gold,
            shown=self._show_commands,
        )
        self._shown = (answer["commands"], answer["objects"])
        self.gold = answer["gold"]
        return self._show(f"{answer['task_description']}\n\n{answer['observation']}")

    def _show(self, observation: str) -> str:
        return observation if self._show_commands == "none" else with_commands(observation, *self._shown)

    def _info(self, *, accepted: bool, score: float) -> dict[str, Any]:
        info = {"accepted": accepted, "success": self._is_done and score >= 1.0, "score": score}
        return {**info, "admissible_commands": self._shown[0]} if self._show_commands == "admissible" else info


def variations(task_type: str, split: str) -> range:
    """The variations of a type that are in a split."""
    num_train, num_dev, num_test = VARIATIONS[task_type]
    total = num_train + num_dev + num_test
    if split in ("released_train", "released_test"):
        is_train = task_type in RELEASED_TRAIN_TYPES
        return range(total // 2 if is_train == (split == "released_train") else 0)
    start = {"train": 0, "dev": num_train, "test": num_train + num_dev}[split]
    return range(start, start + {"train": num_train, "dev": num_dev, "test": num_test}[split])


def task_of(task_type: str, variation: int, split: str) -> Task:
    """Example: `task_of("boil", 3, "train")` has the id `boil/3` and the family `boil`."""
    return Task(
        env="scienceworld",
        task_id=f"{task_type}/{variation}",
        split=split,
        family=task_type,
        payload={"task_type": task_type, "variation": variation},
    )


def type_and_variation(task: Task) -> tuple[str, int]:
    """What a task asks for; ValueError when it is not one of these."""
    name, variation = task.payload.get("task_type"), task.payload.get("variation")
    if task.env != "scienceworld" or name not in VARIATIONS or not isinstance(variation, int):
        raise ValueError(
            f"not a scienceworld task: env {task.env!r}, payload {task.payload!r}; expected a task_type and a variation"
        )
    if not 0 <= variation < sum(VARIATIONS[name]):
        raise ValueError(f"scienceworld {name} has the variations 0 to {sum(VARIATIONS[name]) - 1}, got {variation}")
    return name, variation


def check_settings(task_type: str, simplification: str, show_commands: str) -> None:
    """ValueError for a simplification or a way to show commands that there is not."""
    names = [name for name in simplification.split(",") if name]
    check_choices(names, SIMPLIFICATIONS, "simplification")
    check_choices([show_commands], SHOWN, "show_commands")
    if "noElectricalAction" in names and any(word in task_type for word in ELECTRICAL):
        raise ValueError(
            f"scienceworld {task_type} needs electrical actions; leave out noElectricalAction, or name other task_types"
        )


def check_choices(chosen: Iterable[str], known: Mapping[str, Any] | Iterable[str], what: str) -> None:
    for name in chosen:
        if name not in known:
            raise ValueError(f"scienceworld has no {what} {name!r}; use one of {', '.join(known)}")


def is_utf8(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
