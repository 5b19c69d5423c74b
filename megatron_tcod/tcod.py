"""The algorithm: on-policy distillation over many turns under a temporal curriculum (TCOD, arXiv 2604.24005).

    episodes, microbatches, stats = tcod_step(step, tasks, curriculum=..., engine=..., ...)

Every rank calls it; parallelism, timing and records live inside the collaborators or around the call. A step lets the
student play its window of each task, scores what it sampled with the teacher, makes one optimizer step on the
divergence, and hands the new weights to the engine. `sft_step` is the same step on recorded turns.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from typing import Any, Protocol

import torch

from megatron_tcod.curriculum import Curriculum
from megatron_tcod.trajectory import Episode, Microbatch, Task, TeacherTarget, TurnWindow


class Engine(Protocol):
    """What a step asks of the rollout engine; `rollout/engine.py` has the whole contract."""

    def released(self) -> AbstractContextManager[None]: ...

    def load_weights(self, weights: Iterator[tuple[str, torch.Tensor]], version: int) -> None: ...


class Teacher(Protocol):
    def score(self, microbatches: list[Microbatch]) -> list[TeacherTarget | None]: ...


class Student(Protocol):
    def train_step(
        self, microbatches: list[Microbatch], targets: list[TeacherTarget | None], objective: Callable[..., Any]
    ) -> Any: ...

    def measure(
        self, microbatches: list[Microbatch], targets: list[TeacherTarget | None], objective: Callable[..., Any]
    ) -> list[dict[str, torch.Tensor]]: ...

    def hf_weights(self) -> Iterator[tuple[str, torch.Tensor]]: ...


class Collect(Protocol):
    """Plays each task in its window, on whichever rank, and gives every rank all episodes in one order."""

    def __call__(
        self, tasks: Sequence[Task], windows: Sequence[TurnWindow], *, step: int, curriculum_k: int
    ) -> list[Episode]: ...


Pack = Callable[[list[Episode]], list[Microbatch]]


def tcod_step(
    step: int,
    tasks: Sequence[Task],
    *,
    curriculum: Curriculum,
    engine: Engine,
    teacher: Teacher,
    student: Student,
    objective: Callable[..., Any],
    collect: Collect,
    pack: Pack,
) -> tuple[list[Episode], list[Microbatch], Any]:
    """One optimizer step; `step` counts the steps done before it. The episodes of all replicas, this replica's
    microbatches, and the student's statistics."""
    windows = [curriculum.window(step, task) for task in tasks]
    episodes = collect(tasks, windows, step=step, curriculum_k=curriculum.depth(step))  # teacher turns replayed
    microbatches = pack(episodes)  # loss_weight [S] already carries every normalisation
    with engine.released():  # KV cache and serving weights leave the device
        targets = teacher.score(microbatches)  # hidden [S, H_teacher] at trained positions, last stage only
        stats = student.train_step(microbatches, targets, objective)
    engine.load_weights(student.hf_weights(), version=step + 1)
    return episodes, microbatches, stats


def sft_step(
    demonstrations: list[Episode], *, student: Student, objective: Callable[..., Any], pack: Pack
) -> tuple[list[Episode], list[Microbatch], Any]:
    """One optimizer step on recorded turns, with the same packing and weights as on-policy turns."""
    microbatches = pack(demonstrations)
    stats = student.train_step(microbatches, [None] * len(microbatches), objective)
    return demonstrations, microbatches, stats


def measure(
    episodes: list[Episode], *, student: Student, teacher: Teacher, objective: Callable[..., Any], pack: Pack
) -> tuple[list[Microbatch], list[dict[str, torch.Tensor]]]:
    """The divergence at every sampled token of episodes, without changing a weight."""
    microbatches = pack(episodes)
    return microbatches, student.measure(microbatches, teacher.score(microbatches), objective)
