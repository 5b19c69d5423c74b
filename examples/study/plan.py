"""The jobs behind a grid: what has to run, in which order, by which commands.

    jobs = plan(grid, "examples/study/quick.toml", Path("runs/study/quick"))

Per world: games, the expert's episodes, models from shapes; the teacher; its demonstrations; a warm start a size and
seed; a cell each. A job is a list of public commands (train, evaluate, demonstrate and two preparing scripts of this
folder) and names the jobs whose results it reads. Paths of models are known only when those have ended, so a command
is made at the last moment, by `Command.words`.

It runs nothing: `runner.py` does.
"""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from megatron_tcod.config import SGLANG, merge
from study.grid import SFT, Cell, Model, Settings, Study, World, run_settings
from study.rundir import newest_model

UNPLAYED = {"evaluation": {"eval_interval": 0, "eval_at_end": False}}
"""Of teachers and warm starts, which are evaluated once, after their training."""

EXPERT = {"curriculum": {"curriculum": "full", "demonstrations": "expert"}}
"""Where SFT's settings must name demonstrations that are never read."""

HERE = Path(__file__).parent
ROOT = HERE.parents[1]

ModelPath = Callable[[], str]
"""Where a model lies; raises ValueError until it exists."""


@dataclass(frozen=True, kw_only=True)
class Command:
    """One program of a job. Example: `Command(module="megatron_tcod.train", settings={...}, paths={"student": ...})`"""

    module: str = ""
    """A module of the package, launched with the study's `launch`; empty for `script`."""
    script: tuple[str, ...] = ()
    """A script below the repository and its arguments, run by this Python alone."""
    settings: Settings = field(default_factory=dict)
    """What goes into the file given to --config."""
    models: dict[str, ModelPath] = field(default_factory=dict)
    """Flag (without dashes) -> model."""
    flags: tuple[str, ...] = ()
    makes: Path | None = None
    """A file that is complete once it exists: the command is skipped then."""


@dataclass(frozen=True, kw_only=True)
class Job:
    """Commands that run one after the other on one core."""

    name: str
    commands: tuple[Command, ...]
    needs: tuple[str, ...] = ()
    cell: Cell | None = None
    """The cell that this job is, None for what prepares cells."""
    seed: int = 0
    """0 for what all seeds share."""


@dataclass(frozen=True, kw_only=True)
class Paths:
    """Where a world's results lie. Example: `Paths(root=Path("runs/study/quick/household"))`"""

    root: Path

    @property
    def games(self) -> Path:
        return self.root / "games"

    @property
    def corpus(self) -> Path:
        return self.root / "expert.jsonl"

    @property
    def models(self) -> Path:
        return self.root / "models"

    @property
    def teacher(self) -> Path:
        return self.root / "teacher"

    @property
    def teacher_evaluation(self) -> Path:
        return self.root / "teacher.json"

    @property
    def demonstrations(self) -> Path:
        return self.root / "demonstrations.jsonl"

    def start(self, start: str) -> Path:
        return self.root / start

    def start_evaluation(self, start: str) -> Path:
        return self.root / f"{start}.json"

    def cell(self, cell: Cell) -> Path:
        return self.root / "cells" / cell.name.partition("/")[2]

    def cell_evaluation(self, cell: Cell) -> Path:
        """The last evaluation of an SFT cell once more, scored by the teacher."""
        return self.cell(cell) / "scored.json"


def start_name(student: Model, size: str, seed: int) -> str:
    """Every seed has a start of its own, but a model that exists is the same for all."""
    return f"start/{size}" if student.model else f"start/{size}/seed-{seed}"


def uses_demonstrations(cell: Cell) -> bool:
    """SFT imitates the teacher's, B2F replays them."""
    return cell.curriculum in (SFT, "b2f")


def plan(study: Study, grid_path: str | Path, out: Path) -> list[Job]:
    """All jobs, each after those that it needs: what all seeds share, then seed by seed, then the repeats."""
    jobs: list[Job] = []
    cells = study.cells()
    for world in study.worlds:
        jobs += _Planner(world, str(grid_path), Paths(root=out / world.name)).jobs(cells)
    return sorted(jobs, key=lambda job: (bool(job.cell and job.cell.repeat), job.seed))


def fingerprints(jobs: Sequence[Job]) -> dict[str, str]:
    """By job: of its commands and those of the jobs that it needs. How commands are launched is left out."""
    found: dict[str, str] = {}
    for job in jobs:
        told = [[one.module, one.script, one.settings, sorted(one.models), one.flags] for one in job.commands]
        told.append([found[name] for name in job.needs])
        found[job.name] = hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()[:16]
    return found


class _Planner:
    """One world's jobs."""

    def __init__(self, world: World, grid_path: str, paths: Paths) -> None:
        self.world, self.paths = world, paths
        self._options = {"environment": {"env_options": {"root": str(paths.games)}}} if world.games else {}
        self._base = run_settings(world, grid_path, self._options_over(run_settings(world, grid_path)))

    def jobs(self, cells: list[Cell]) -> list[Job]:
        own = [cell for cell in cells if cell.world == self.world.name]
        starts: dict[str, Cell] = {}
        for cell in own:
            starts.setdefault(self._start_of(cell), cell)
        is_shown = any(uses_demonstrations(cell) for cell in own)
        found = self._preparations(is_shown=is_shown)
        found += [self._start(name, cell.size, cell.seed) for name, cell in starts.items()]
        return found + [self._cell(cell) for cell in own]

    def _options_over(self, settings: Settings) -> Settings:
        """The root of generated games beside the environment's other options: tables merge one level deep only."""
        given = settings.get("environment", {}).get("env_options", {})
        own = self._options.get("environment", {}).get("env_options", {})
        return {"environment": {"env_options": {**given, **own}}} if own else {}

    def _name(self, what: str) -> str:
        return f"{self.world.name}/{what}"

    @property
    def _is_made(self) -> bool:
        return any(model.shape for model in (self.world.teacher, *self.world.students.values()))

    def _preparations(self, *, is_shown: bool) -> list[Job]:
        world, paths, jobs, needs = self.world, self.paths, [], ()
        if world.games:
            flags = [word for split, count in world.games.items() for word in (f"--{split}", str(count))]
            script = ("tools/make_alfworld_games.py", "--out", str(paths.games), *flags)
            jobs.append(Job(name=self._name("games"), commands=(Command(script=script, makes=paths.games),)))
            needs = (jobs[-1].name,)
        if world.corpus:
            jobs.append(Job(name=self._name("expert"), commands=(self._record_expert(),), needs=needs))
            needs = (jobs[-1].name,)
        if self._is_made:
            jobs.append(Job(name=self._name("models"), commands=(self._make_models(),), needs=needs))
            needs = (jobs[-1].name,)
        jobs.append(Job(name=self._name("teacher"), commands=self._teacher_commands(), needs=needs))
        if is_shown:
            jobs.append(Job(name=self._name("demonstrations"), commands=(self._demonstrate(),), needs=(jobs[-1].name,)))
        return jobs

    def _record_expert(self) -> Command:
        environment, corpus = self._base.get("environment", {}), self.world.corpus
        words = ["examples/study/record_expert.py", "--output", str(self.paths.corpus)]
        words += ["--env", environment.get("env", "household"), "--split", environment.get("train_split", "train")]
        words += ["--tasks", str(corpus["tasks"]), "--mistake-rate", str(corpus.get("mistake_rate", 0.0))]
        words += ["--env-options", json.dumps(environment.get("env_options", {}))]
        return Command(script=tuple(words), makes=self.paths.corpus)

    def _make_models(self) -> Command:
        shapes = {"teacher": self.world.teacher.shape} | {size: one.shape for size, one in self.world.students.items()}
        words = ["examples/study/make_models.py", "--output", str(self.paths.models), "--corpus", str(self.paths.corpus)]
        words += ["--vocab-size", str(self.world.vocab_size), "--shapes", json.dumps({k: v for k, v in shapes.items() if v})]
        return Command(script=tuple(words), makes=self.paths.models)

    def _imitation(self) -> Settings:
        """SFT on the expert: on its recorded episodes, or on new ones at every step."""
        if self.world.corpus.get("is_corpus_imitated"):
            demonstrations = {"demonstrations": str(self.paths.corpus)}
        else:
            demonstrations = {"demonstrations": "expert", "mistake_rate": self.world.corpus.get("mistake_rate", 0.0)}
        return {"objective": {"objective": SFT}, "curriculum": {"curriculum": "full", **demonstrations}}

    def _teacher_model(self) -> ModelPath:
        model = self.world.teacher
        return (lambda: model.model) if model.model else (lambda: str(newest_model(self.paths.teacher)))

    def _teacher_commands(self) -> tuple[Command, ...]:
        teacher, save = self.world.teacher, {"training": {"save": str(self.paths.teacher)}}
        play = Command(
            module="megatron_tcod.evaluate",
            settings=self._settings(self._of_existing(teacher), {"objective": {"objective": SFT}}, EXPERT, save),
            models={"student": self._teacher_model()},
            flags=("--output", str(self.paths.teacher_evaluation)),
            makes=self.paths.teacher_evaluation,
        )
        if teacher.model:
            return () if teacher.model == SGLANG else (play,)
        fresh = {"model": {"init": "random", "student": str(self.paths.models / "teacher")}}
        settings = self._settings(self._imitation(), fresh, teacher.settings, save, UNPLAYED)
        return Command(module="megatron_tcod.train", settings=settings), play

    def _demonstrate(self) -> Command:
        size = next(iter(self.world.students))
        student = self.world.students[size].model or str(self.paths.models / size)
        settings = self._settings(
            self._of_existing(self.world.teacher),
            self.world.demonstrations,
            {"model": {"student": student}, "training": {"save": str(self.paths.root / "demonstrate")}},
            {"curriculum": {"curriculum": "full", "demonstrations": str(self.paths.demonstrations)}},
        )
        return Command(
            module="megatron_tcod.demonstrate",
            settings=settings,
            models=self._teacher_flag(),
            makes=self.paths.demonstrations,
        )

    def _start_of(self, cell: Cell) -> str:
        return start_name(self.world.students[cell.size], cell.size, cell.seed)

    def _start(self, name: str, size: str, seed: int) -> Job:
        model, paths = self.world.students[size], self.paths
        commands = []
        if model.shape:
            settings = self._settings(
                self._imitation(),
                self.world.warmstart,
                model.settings,
                {"model": {"init": "random", "student": str(paths.models / size)}},
                {"training": {"save": str(paths.start(name)), "seed": seed}},
                UNPLAYED,
            )
            commands.append(Command(module="megatron_tcod.train", settings=settings))
        commands.append(self._evaluate({"student": self._start_model(model, name)}, model, paths.start_evaluation(name)))
        seed = 0 if model.model else seed
        return Job(name=self._name(name), commands=tuple(commands), needs=(self._name("teacher"),), seed=seed)

    def _start_model(self, model: Model, name: str) -> ModelPath:
        return (lambda: model.model) if model.model else (lambda: str(newest_model(self.paths.start(name))))

    def _evaluate(self, models: dict[str, ModelPath], student: Model, output: Path) -> Command:
        settings = self._settings(
            self._of_existing(student), {"objective": {"objective": "reverse_kl"}, "curriculum": {"curriculum": "full"}},
            {"training": {"save": str(output.with_suffix(""))}},
        )  # fmt: skip
        return Command(
            module="megatron_tcod.evaluate",
            settings=settings,
            models=models | self._teacher_flag(),
            flags=("--output", str(output)),
            makes=output,
        )

    def _cell(self, cell: Cell) -> Job:
        student, paths = self.world.students[cell.size], self.paths
        method = {
            "objective": {"objective": cell.objective},
            "curriculum": {
                "curriculum": "full" if cell.curriculum == SFT else cell.curriculum,
                "demonstrations": str(paths.demonstrations) if uses_demonstrations(cell) else "",
            },
        }
        settings = self._settings(
            self._of_existing(student),
            self.world.of_curriculum.get(cell.curriculum, {}),
            self.world.of_objective.get(cell.objective, {}),
            method,
            {"training": {"save": str(paths.cell(cell)), "seed": cell.seed}},
        )
        start = {"student": self._start_model(student, self._start_of(cell))}
        teacher = {} if cell.curriculum == SFT else self._teacher_flag()
        commands = [Command(module="megatron_tcod.train", settings=settings, models=start | teacher)]
        if cell.curriculum == SFT:  # its own evaluations have no teacher to measure the divergence to
            trained = {"student": lambda: str(newest_model(paths.cell(cell)))}
            commands.append(self._evaluate(trained, student, paths.cell_evaluation(cell)))
        needs = [self._name("teacher"), self._name(self._start_of(cell))]
        needs += [self._name("demonstrations")] if uses_demonstrations(cell) else []
        return Job(name=cell.name, commands=tuple(commands), needs=tuple(needs), cell=cell, seed=cell.seed)

    def _teacher_flag(self) -> dict[str, ModelPath]:
        return {"teacher": self._teacher_model()}

    def _of_existing(self, model: Model) -> Settings:
        """Settings of a model that exists belong to every run that uses it."""
        return model.settings if model.model else {}

    def _settings(self, *layers: Settings) -> Settings:
        return merge(self._base, *layers)


def words(command: Command, *, launch: tuple[str, ...], settings_path: Path) -> list[str]:
    """The command line. ValueError while a model that it names is not there yet."""
    if command.script:
        return [sys.executable, str(ROOT / command.script[0]), *command.script[1:]]
    models = [word for flag, path in command.models.items() for word in (f"--{flag}", path())]
    start = list(launch) or [sys.executable, "-m"]
    return [*start, command.module, "--config", str(settings_path), *models, *command.flags]
