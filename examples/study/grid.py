"""A study's TOML file as data: worlds, student sizes, methods and seeds, and the cells that they span.

    grid = read_grid("examples/study/quick.toml")
    for cell in grid.cells():
        print(cell.name)                    # household/small/f2b-reverse_kl/seed-1

The file has a `[study]` table and one `[[world]]` each; their keys are the fields of `Study` and `World` below. With
`base = "full.toml"` in `[study]` it is a part of another file: it names the worlds to keep, and says what differs.
Settings of training, evaluation and demonstration are written as in a run's own TOML file, below `settings`:
`[world.settings.rollout] max_turns = 24`. What is not known is refused with the nearest name.

It starts nothing and reads no run; `plan.py` says which commands a cell needs.
"""

from __future__ import annotations

import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Annotated, Any, NotRequired, TypeVar

import pydantic
from pydantic import Field
from pydantic.dataclasses import dataclass as validated
from typing_extensions import TypedDict

from megatron_tcod.config import STRICT, Faults, complaints, merge, nearest, read_file

CURRICULA = ("sft", "full", "f2b", "b2f")
OBJECTIVES = ("sampled_token", "reverse_kl", "forward_kl", "jsd")
SFT = "sft"

Settings = dict[str, Any]
"""Tables of a run's TOML file: `{"training": {"lr": 1e-3}}`."""
Tables = dict[str, dict[str, Any]]
"""`Settings` as a grid file may write them."""
Count = Annotated[int, Field(ge=1)]
Name = Annotated[str, Field(min_length=1)]
Slug = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]
"""What names a directory too."""


class Shape(TypedDict):
    """The fields of a config.json that tell models of a study apart."""

    __pydantic_config__ = STRICT
    hidden_size: Count
    num_hidden_layers: Count
    intermediate_size: Count
    num_attention_heads: Count


class Corpus(TypedDict):
    """Expert episodes to record."""

    __pydantic_config__ = STRICT
    tasks: Count
    mistake_rate: NotRequired[Annotated[float, Field(ge=0, le=1)]]
    is_corpus_imitated: NotRequired[bool]


Games = TypedDict(
    "Games",
    {name: NotRequired[Annotated[int, Field(ge=0)]] for name in ("train", "valid-seen", "valid-unseen", "max-walkthrough")},
)
Games.__pydantic_config__ = STRICT


@validated(frozen=True, kw_only=True, config=STRICT)
class Model:
    """Where a model comes from. Example: `Model(shape={"hidden_size": 64, "num_hidden_layers": 2, ...})`"""

    shape: Shape = field(default_factory=dict)
    """Of a model that the study makes and trains from random weights."""
    model: str = ""
    """A Hugging Face directory that exists, instead of `shape`."""
    settings: Tables = field(default_factory=dict)
    """Of the run that trains it, or of every run that uses it where it exists already."""


@validated(frozen=True, kw_only=True, config=STRICT)
class World:
    """One environment with its teacher and its students."""

    name: Slug
    config: tuple[str, ...] = ()
    """Run files that all settings below are laid over, relative to the grid's own file."""
    settings: Tables = field(default_factory=dict)
    """Of every run in this world."""
    games: Games = field(default_factory=dict)
    """alfworld: games to generate by split, and their longest walkthrough, in the spelling of the tool's flags."""
    corpus: Corpus = field(default_factory=dict)
    """Expert episodes to record once. The tokenizer is trained on them; teacher and warm start imitate them where playing
    is slow (`is_corpus_imitated`), else they ask the expert for new ones."""
    vocab_size: Count = 512
    """Ids of the tokenizer that is trained where models are made from shapes."""
    teacher: Model = field(default_factory=Model)
    students: dict[Slug, Model] = field(default_factory=dict)
    """By size."""
    warmstart: Tables = field(default_factory=dict)
    """Of the SFT that gives students made from a shape their first competence, one a size and seed."""
    demonstrations: Tables = field(default_factory=dict)
    """Of recording the teacher's own solutions, which SFT imitates and B2F replays."""
    of_curriculum: dict[str, Tables] = field(default_factory=dict)
    """Settings of the cells of one curriculum, `sft` among them."""
    of_objective: dict[str, Tables] = field(default_factory=dict)
    """Settings of the cells of one objective."""
    curricula: tuple[str, ...] = ()
    """Fewer than the study's; empty for the same."""
    objectives: tuple[str, ...] = ()
    seeds: tuple[Count, ...] = ()
    sizes: tuple[str, ...] = ()
    """Fewer than the students that are described; empty for all."""


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One training run of the grid. Example: `Cell(world="household", size="small", curriculum="f2b",
    objective="reverse_kl", seed=1)`"""

    world: str
    size: str
    curriculum: str
    objective: str
    seed: int
    repeat: int = 0
    """Above 0: the same run once more, to see what the machine adds; no statistics count it."""

    @property
    def method(self) -> str:
        return method_name(self.curriculum, self.objective)

    @property
    def name(self) -> str:
        again = f"/repeat-{self.repeat}" if self.repeat else ""
        return f"{self.world}/{self.size}/{self.method}/seed-{self.seed}{again}"


@validated(frozen=True, kw_only=True, config=STRICT)
class Study:
    """The whole grid."""

    title: Name
    out: Name
    """Where runs and results go unless the command line says otherwise."""
    seeds: tuple[Count, ...]
    curricula: tuple[str, ...] = CURRICULA
    objectives: tuple[str, ...] = ("sampled_token", "reverse_kl", "forward_kl")
    success_targets: tuple[Annotated[float, Field(gt=0, le=1)], ...] = ()
    """Held-out success whose cost is compared."""
    jobs: Count = 2
    """Runs at a time, each on a core of its own where there are as many."""
    launch: tuple[str, ...] = ()
    """Words before a module that trains or plays, such as torchrun's; empty for this Python alone."""
    num_resamples: Count = 9999
    """Of each bootstrap interval."""
    num_repeats: Annotated[int, Field(ge=0)] = 0
    """How often the first cell of each world is run again."""
    worlds: tuple[World, ...] = ()

    def world(self, name: str) -> World:
        return next(world for world in self.worlds if world.name == name)

    def cells(self) -> list[Cell]:
        """Seed by seed, so that an unfinished study is a finished one of fewer seeds; worlds take turns."""
        found = [
            Cell(world=world.name, size=size, curriculum=curriculum, objective=objective, seed=seed)
            for seed in sorted({seed for world in self.worlds for seed in world.seeds or self.seeds})
            for world in self.worlds
            if seed in (world.seeds or self.seeds)
            for size in world.sizes or world.students
            for curriculum, objective in methods(world.curricula or self.curricula, world.objectives or self.objectives)
        ]
        for world in self.worlds:
            first = next(cell for cell in found if cell.world == world.name and cell.curriculum != SFT)
            found += [repeated(first, repeat) for repeat in range(1, self.num_repeats + 1)]
        return found


def repeated(cell: Cell, repeat: int) -> Cell:
    return Cell(**{one.name: getattr(cell, one.name) for one in fields(Cell)} | {"repeat": repeat})


def methods(curricula: Sequence[str], objectives: Sequence[str]) -> list[tuple[str, str]]:
    """(curriculum, objective); SFT has one objective of its own."""
    found = [(SFT, SFT)] if SFT in curricula else []
    return found + [(curriculum, one) for one in objectives for curriculum in curricula if curriculum != SFT]


def method_name(curriculum: str, objective: str) -> str:
    return SFT if curriculum == SFT else f"{curriculum}-{objective}"


def read_grid(path: str | Path) -> Study:
    """A grid file; ValueError names file, key, what was expected and the fix."""
    path = Path(path)
    table, worlds = _read(path)
    study = _build(Study, table, f"{path}: [study]", worlds=tuple(_world(one, path) for one in worlds))
    _check(study, path)
    return study


def _read(path: Path, above: tuple[Path, ...] = ()) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The [study] table and the worlds, laid over those of the base file. `above` are the files that led here."""
    try:
        tables = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"grid {path}: {error.strerror}; give an existing TOML file") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"grid {path} is not TOML: {error}") from None
    study, worlds = tables.pop("study", None), tables.pop("world", None)
    _check_keys(tables, {"study", "world"}, f"{path}")
    if not isinstance(worlds, list) or not worlds or not isinstance(study, dict):
        raise ValueError(f"{path}: expected one [study] table and at least one [[world]]")
    for world in worlds:
        _check_table(world, f"{path}: [[world]]")
        if not isinstance(world.get("name"), str):
            raise ValueError(f"{path}: a [[world]] needs a name, got {world.get('name')!r}")
    if "base" not in study:
        return study, worlds
    if not isinstance(name := study.pop("base"), str):
        raise ValueError(f"{path}: [study] base must be the name of a grid file, got {name!r}")
    if path.resolve() in above:
        raise ValueError(f"{path}: [study] base comes back to this file; name one that does not")
    base, of_base = _read(path.parent / name, (*above, path.resolve()))
    by_name = {one.get("name"): one for one in of_base}
    for world in worlds:
        if world.get("name") not in by_name:
            raise ValueError(f"{path}: world {world.get('name')!r} is not in the base file; it has {', '.join(by_name)}")
    return base | study, [_laid_over(by_name[one["name"]], one) for one in worlds]


def _laid_over(below: dict[str, Any], above: dict[str, Any]) -> dict[str, Any]:
    """Tables merged at every level, other values replaced."""
    made = dict(below)
    for key, value in above.items():
        is_table = isinstance(value, dict) and isinstance(below.get(key), dict)
        made[key] = _laid_over(below[key], value) if is_table else value
    return made


def _world(table: Mapping[str, Any], path: Path) -> World:
    where = f"{path}: [[world]] {table.get('name', '')}"
    made = dict(table)
    made["teacher"] = _build(Model, made.get("teacher", {}), f"{where} teacher")
    students = made.get("students", {})
    _check_table(students, f"{where} students")
    made["students"] = {size: _build(Model, one, f"{where} student {size}") for size, one in students.items()}
    return _build(World, made, where)


Kind = TypeVar("Kind")


def _build(kind: type[Kind], table: Mapping[str, Any], where: str, **further: Any) -> Kind:
    _check_table(table, where)
    _check_keys(table, {one.name for one in fields(kind)} - further.keys(), where)
    plain = {key: tuple(value) if isinstance(value, list) else value for key, value in table.items()}
    try:
        return kind(**plain, **further)
    except pydantic.ValidationError as error:
        raise Faults(f"{where}: {told}" for told in complaints(error)) from None


def _check_table(table: Any, where: str) -> None:
    if not isinstance(table, Mapping):
        raise ValueError(f"{where} must be a table, got {table!r}")


def _check_keys(table: Mapping[str, Any], known: set[str], where: str) -> None:
    for key in table:
        if key not in known:
            raise ValueError(f"{where}: unknown key {key!r}; {nearest(key, sorted(known))}")


def _check(study: Study, path: Path) -> None:
    names = [world.name for world in study.worlds]
    if len(set(names)) != len(names):
        raise ValueError(f"{path}: two worlds have one name among {names}; rename one")
    for world in study.worlds:
        for value, known in (
            *((one, CURRICULA) for one in world.of_curriculum),
            *((one, (*OBJECTIVES, SFT)) for one in world.of_objective),
            *((one, CURRICULA) for one in world.curricula or study.curricula),
            *((one, OBJECTIVES) for one in world.objectives or study.objectives),
        ):
            if value not in known:
                raise ValueError(f"{path}: {value!r} in world {world.name}; {nearest(str(value), known)}")
        if not (world.seeds or study.seeds) or not world.students:
            raise ValueError(f"{path}: world {world.name} has no seed or no student; give seeds and [world.students.NAME]")
        if not any(one != SFT for one in world.curricula or study.curricula):
            raise ValueError(f"{path}: world {world.name} has no curriculum beside sft; add full")
        if not (world.objectives or study.objectives):
            raise ValueError(f"{path}: world {world.name} has no objective; add one of {', '.join(OBJECTIVES)}")
        for key in ("seeds", "curricula", "objectives", "sizes"):
            values = getattr(world, key) or getattr(study, key, ())
            if len(set(values)) != len(values):
                raise ValueError(f"{path}: {key} of world {world.name} names one twice among {list(values)}; remove it")
        if "teacher" in world.students:
            raise ValueError(f"{path}: a student of world {world.name} is called teacher, as its teacher is; rename it")
        for size in world.sizes:
            if size not in world.students:
                raise ValueError(f"{path}: size {size!r} of world {world.name}; {nearest(size, list(world.students))}")
        for role, model in (("teacher", world.teacher), *world.students.items()):
            if bool(model.shape) == bool(model.model):
                raise ValueError(f"{path}: {role} of world {world.name} needs one of shape and model; give exactly one")
            if model.shape and not world.corpus:
                raise ValueError(
                    f"{path}: {role} of world {world.name} is made from a shape, and its tokenizer from a corpus that is not "
                    f"there; give corpus = {{ tasks = N }}"
                )


def run_settings(world: World, grid_path: str | Path, *layers: Mapping[str, Any]) -> Settings:
    """The world's run files, its settings and further layers as tables of one run file. Later ones win."""
    files = [read_file(str(Path(grid_path).parent / one)) for one in world.config]
    return merge(*files, world.settings, *layers)
