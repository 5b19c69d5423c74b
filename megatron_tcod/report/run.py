"""A run directory as numbers: metrics by step, evaluations, configuration, and what is missing.

    run = read_run(Path("runs/f2b"), name="f2b")

Broken pieces are skipped and named in `run.problems`; only a directory without usable metrics is an error. Trajectories
are large and are read by `episodes.py`.
"""

from __future__ import annotations

import json
import math
import re
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron_tcod.journal import read_journal
from megatron_tcod.significance import clustered_interval, wilson_interval

_SECRET_KEY = re.compile(r"(^|_)(key|password|secret|credentials?)$")


@dataclass(frozen=True)
class TaskResult:
    """One held-out task as it was played. Example: `TaskResult("heat/3", "heat", True, 14, [0.2, 0.4])`"""

    task_id: str
    family: str
    success: bool
    turns: float | None
    kl_by_turn: list[float | None]


@dataclass(frozen=True)
class Evaluation:
    """All tasks of one evaluation after `step` optimizer steps."""

    step: int
    split: str
    tasks: list[TaskResult]

    @property
    def num_solved(self) -> int:
        return sum(task.success for task in self.tasks)

    @property
    def success(self) -> float:
        return self.num_solved / len(self.tasks)

    @property
    def interval(self) -> tuple[float, float]:
        by_task: dict[str, list[bool]] = {}
        for task in self.tasks:
            by_task.setdefault(task.task_id, []).append(task.success)
        trials = {len(solved) for solved in by_task.values()}
        if len(trials) > 1:  # tasks of unlike weight, which no evaluation of ours has
            return wilson_interval(self.num_solved, len(self.tasks))
        return clustered_interval([sum(solved) for solved in by_task.values()], trials=trials.pop())

    def mean_turns(self) -> float | None:
        return mean([task.turns for task in self.tasks])

    def trajectory_kl(self) -> float | None:
        """Summed over a task's turns, mean over the tasks that have figures."""
        return mean([sum(filter(None, task.kl_by_turn)) for task in self.tasks if task.kl_by_turn])

    def mean_kl_by_turn(self) -> list[float | None]:
        """Mean over the tasks that reached the turn."""
        longest = max((len(task.kl_by_turn) for task in self.tasks), default=0)
        return [
            mean([task.kl_by_turn[turn] for task in self.tasks if turn < len(task.kl_by_turn)])
            for turn in range(longest)
        ]

    def outcomes(self) -> dict[tuple[str, int], bool]:
        """`(task id, how often it came before)` -> solved: the key under which two runs are compared."""
        seen: dict[str, int] = {}
        solved = {}
        for task in self.tasks:
            seen[task.task_id] = seen.get(task.task_id, -1) + 1
            solved[task.task_id, seen[task.task_id]] = task.success
        return solved


@dataclass(frozen=True)
class Run:
    """What a directory says about one run."""

    name: str
    directory: Path
    steps: list[dict[str, Any]]
    """One record a step, ascending."""
    evaluations: list[Evaluation]
    """Ascending by step; of one split."""
    config: dict[str, Any]
    """Dotted keys, secrets removed."""
    problems: list[str] = field(default_factory=list)

    def column(self, key: str) -> list[float | None]:
        """One value a step; None where the step has none, or one that is not finite."""
        return [number(record.get(key)) for record in self.steps]

    def total(self, key: str) -> float | None:
        """Sum over the steps; None when no step has it."""
        values = [value for value in self.column(key) if value is not None]
        return sum(values) if values else None

    def wall_clock(self) -> list[float] | None:
        """Seconds since the start at the end of each step, None when steps were not timed."""
        if self.total("seconds/step") is None:
            return None
        elapsed, at = 0.0, []
        for seconds in self.column("seconds/step"):
            elapsed += seconds or 0.0
            at.append(elapsed)
        return at

    @property
    def final_evaluation(self) -> Evaluation | None:
        return self.evaluations[-1] if self.evaluations else None


def read_run(directory: Path, name: str) -> Run:
    """Everything but the trajectories. ValueError when there are no metrics to show."""
    problems: list[str] = []
    steps = _read_steps(directory, problems)
    evaluations = _read_evaluations(directory / "evaluation", problems)
    config = _read_config(directory, problems)
    return Run(name, directory, steps, evaluations, config, problems)


def number(value: Any) -> float | None:
    """A finite number, or None for anything else."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return None
    return float(value)


def mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None


def _read_steps(directory: Path, problems: list[str]) -> list[dict[str, Any]]:
    path = directory / "metrics.jsonl"
    if not path.is_file():
        raise ValueError(
            f"{directory} has no metrics.jsonl; give the directory that training was told to write to"
            if directory.is_dir()
            else f"{directory} is not a directory; give a run directory with a metrics.jsonl in it"
        )
    reading = read_journal(path)
    if reading.num_bad:
        problems.append(f"metrics.jsonl: {reading.num_bad} unreadable line(s) skipped")
    by_step: dict[int, dict[str, Any]] = {}
    num_repeated = 0
    for record in reading.records:
        step = record.get("step")
        if isinstance(step, bool) or not isinstance(step, int):
            problems.append("metrics.jsonl: a record without a step number was skipped")
            continue
        num_repeated += step in by_step
        by_step[step] = record
    if not by_step:
        raise ValueError(f"{path} holds no readable step; the run wrote none, or the file is damaged")
    if num_repeated:
        problems.append(f"metrics.jsonl: {num_repeated} step(s) appear more than once; the last of each is shown")
    return [by_step[step] for step in sorted(by_step)]


def _read_evaluations(directory: Path, problems: list[str]) -> list[Evaluation]:
    evaluations = []
    for path in sorted(directory.glob("*.json")):
        try:
            evaluations.append(_parse_evaluation(json.loads(path.read_text(encoding="utf-8"))))
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            problems.append(f"evaluation/{path.name} skipped: {type(error).__name__}: {error}")
    if not evaluations:
        problems.append("no evaluation: no held-out success, no comparison by task")
        return []
    evaluations.sort(key=lambda evaluation: evaluation.step)
    split = evaluations[-1].split
    others = sorted({evaluation.split for evaluation in evaluations} - {split})
    if others:
        problems.append(f"evaluations of {', '.join(map(repr, others))} are not shown; the last one is of {split!r}")
    by_step = {evaluation.step: evaluation for evaluation in evaluations if evaluation.split == split}
    return list(by_step.values())


def _parse_evaluation(content: Mapping[str, Any]) -> Evaluation:
    tasks = []
    for task in content["tasks"]:
        kl = task.get("kl_by_turn") or []
        if isinstance(kl, dict):
            kl = [kl.get(str(turn)) for turn in range(1 + max(map(int, kl)))]
        tasks.append(
            TaskResult(
                task_id=str(task["task_id"]),
                family=str(task.get("family") or ""),
                success=bool(task["success"]),
                turns=number(task.get("turns")),
                kl_by_turn=[number(value) for value in kl],
            )
        )
    if not tasks:
        raise ValueError("it has no tasks")
    return Evaluation(int(content["step"]), str(content.get("split") or "held-out"), tasks)


def _read_config(directory: Path, problems: list[str]) -> dict[str, Any]:
    for name, parse in (("config.toml", tomllib.loads), ("config.json", json.loads)):
        path = directory / name
        if not path.is_file():
            continue
        try:
            content = parse(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            problems.append(f"{name} skipped: {error}")
            continue
        if isinstance(content, dict):
            return _flatten(content)
        problems.append(f"{name} skipped: expected a table, got {type(content).__name__}")
    problems.append("no readable config.toml or config.json: settings are not shown")
    return {}


def _flatten(table: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in table.items():
        if isinstance(value, dict):
            flat |= _flatten(value, f"{prefix}{key}.")
        else:
            flat[prefix + str(key)] = "(removed)" if _SECRET_KEY.search(str(key)) and value else value
    return flat
