"""What a results file says: success of each method, paired comparisons, the cost of a given success, the noise.

    results = Results(read_results("docs/study/results.jsonl"))
    for row in comparisons(results):
        print(row.better, row.worse, row.mean, row.interval, row.p_adjusted)

Methods are compared at the same world, size, seeds and held-out tasks. Only seeds that both sides have finished count,
so an unfinished study gives honest figures of fewer seeds. It writes nothing; `page.py` does.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from statistics import median
from typing import Any

from megatron_tcod.replication import crossed_interval, crossed_test, holm
from megatron_tcod.significance import discordant, mcnemar_exact
from study.grid import SFT, method_name

PAIRS = (("f2b", "full"), ("b2f", "full"), ("full", SFT))
"""What is asked of every objective: does a curriculum beat vanilla OPD, and does that beat SFT."""

Line = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Group:
    """The cells of one method in one world at one size, by seed. Example: `Group(world="household", size="small",
    curriculum="f2b", objective="reverse_kl", cells={1: {...}, 2: {...}})`"""

    world: str
    size: str
    curriculum: str
    objective: str
    cells: dict[int, Line]

    @property
    def method(self) -> str:
        return method_name(self.curriculum, self.objective)


class Results:
    """The lines of a results file by what they are."""

    def __init__(self, lines: Sequence[Line]) -> None:
        self.study = lines[0]
        self.worlds = {line["world"]: line for line in lines if line["kind"] == "world"}
        self.starts = {(one["world"], one["size"], one["seed"]): one for one in lines if one["kind"] == "start"}
        cells = [line for line in lines if line["kind"] == "cell"]
        self.repeats = [line for line in cells if line["repeat"]]
        self.groups: list[Group] = []
        for cell in cells:
            if not cell["repeat"]:
                self._group(cell).cells[cell["seed"]] = cell

    def _group(self, cell: Line) -> Group:
        key = {name: cell[name] for name in ("world", "size", "curriculum", "objective")}
        for group in self.groups:
            if all(getattr(group, name) == value for name, value in key.items()):
                return group
        self.groups.append(Group(**key, cells={}))
        return self.groups[-1]

    def find(self, world: str, size: str, curriculum: str, objective: str) -> Group | None:
        objective = SFT if curriculum == SFT else objective
        wanted = (world, size, curriculum, objective)
        return next((one for one in self.groups if (one.world, one.size, one.curriculum, one.objective) == wanted), None)

    def places(self) -> list[tuple[str, str]]:
        """(world, size) with finished cells."""
        return list(dict.fromkeys((group.world, group.size) for group in self.groups))

    def objectives(self, world: str, size: str) -> list[str]:
        here = [group for group in self.groups if (group.world, group.size) == (world, size)]
        return list(dict.fromkeys(group.objective for group in here if group.curriculum != SFT))

    def start_success(self, world: str, size: str) -> list[float]:
        return [one["success"] for key, one in self.starts.items() if key[:2] == (world, size)]


def solved_table(cells: Iterable[Line]) -> list[list[float]]:
    """[seeds, tasks] of 0 and 1. ValueError where the cells played different tasks."""
    cells = list(cells)
    if len({cell["tasks"] for cell in cells}) > 1:
        raise ValueError("cells of one world were evaluated on different tasks; run the study into a new directory")
    return [[float(character) for character in cell["solved"]] for cell in cells]


def mean(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None


@dataclass(frozen=True, kw_only=True)
class MethodRow:
    """One line of the success table."""

    group: Group
    success: float
    interval: tuple[float, float]
    by_seed: list[float]
    turns: float
    kl: float | None
    cpu: float
    wall: float
    generated: float
    packed: float


def method_rows(results: Results) -> list[MethodRow]:
    rows = []
    for group in results.groups:
        cells = list(group.cells.values())
        last = [cell["points"][-1] for cell in cells]
        interval = crossed_interval(solved_table(cells), num_resamples=results.study["num_resamples"])
        rows.append(
            MethodRow(
                group=group,
                success=mean(cell["success"] for cell in cells),
                interval=interval,
                by_seed=[cell["success"] for cell in cells],
                turns=mean(cell["turns"] for cell in cells),
                kl=mean(cell["kl_trajectory"] for cell in cells),
                **{name: mean(point[name] for point in last) for name in ("cpu", "wall", "generated", "packed")},
            )
        )
    return rows


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """`first` against `second` on the same seeds and tasks. `p` is None with a single seed."""

    first: Group
    second: Group
    num_seeds: int
    num_tasks: int
    wins: int
    """Seeds at which the first solves more."""
    mean: float
    interval: tuple[float, float]
    p: float | None
    mcnemar: float
    """Of all pairs of episodes, as if they were independent: what a comparison without seeds would claim."""
    p_adjusted: float | None = None

    @property
    def objective(self) -> str:
        """The one of the side that has a choice."""
        return self.second.objective if self.first.curriculum == SFT else self.first.objective

    @property
    def verdict(self) -> str:
        if self.p_adjusted is None or self.p_adjusted >= 0.05:
            return "not distinguished"
        return "better" if self.mean > 0 else "worse"


def compare(first: Group, second: Group, *, num_resamples: int) -> Comparison | None:
    """None where the two share no seed."""
    seeds = sorted(first.cells.keys() & second.cells.keys())
    if not seeds:
        return None
    a, b = (solved_table(group.cells[seed] for seed in seeds) for group in (first, second))
    if first.cells[seeds[0]]["tasks"] != second.cells[seeds[0]]["tasks"]:
        raise ValueError(f"{first.method} and {second.method} were evaluated on different tasks; run the study anew")
    differences = [[x - y for x, y in zip(*rows, strict=True)] for rows in zip(a, b, strict=True)]
    keyed = [{(seed, task): bool(row[task]) for seed, row in enumerate(one) for task in range(len(row))} for one in (a, b)]
    return Comparison(
        first=first,
        second=second,
        num_seeds=len(seeds),
        num_tasks=len(a[0]),
        wins=sum(sum(row) > 0 for row in differences),
        mean=sum(map(sum, differences)) / (len(seeds) * len(a[0])),
        interval=crossed_interval(differences, num_resamples=num_resamples),
        p=crossed_test(differences).p if len(seeds) > 1 else None,
        mcnemar=mcnemar_exact(*discordant(*keyed)),
    )


def comparisons(results: Results) -> list[Comparison]:
    """Every pair of PAIRS in every place and objective, with Holm's correction over all of them."""
    found = []
    for world, size in results.places():
        for objective in results.objectives(world, size):
            for names in PAIRS:
                groups = [results.find(world, size, one, objective) for one in names]
                row = compare(*groups, num_resamples=results.study["num_resamples"]) if all(groups) else None
                found += [row] if row else []
    tested = [row for row in found if row.p is not None]
    adjusted = iter(holm([row.p for row in tested]))
    return [row if row.p is None else replace(row, p_adjusted=next(adjusted)) for row in found]


@dataclass(frozen=True, kw_only=True)
class CostRow:
    """What the first evaluation at or above a success had cost, median over the seeds that got there."""

    group: Group
    target: float
    num_reached: int
    costs: dict[str, float]
    """Empty where no seed got there."""


def cost_rows(results: Results, names: Sequence[str] = ("step", "cpu", "wall", "generated", "packed")) -> list[CostRow]:
    rows = []
    for target in results.study["success_targets"]:
        for group in results.groups:
            reached = [first_at(cell["points"], target) for cell in group.cells.values()]
            points = [point for point in reached if point is not None]
            costs = {name: median(point[name] for point in points) for name in names} if points else {}
            rows.append(CostRow(group=group, target=target, num_reached=len(points), costs=costs))
    return rows


def first_at(points: Sequence[Line], target: float) -> Line | None:
    """The first point at or above a success."""
    return next((point for point in points if point["success"] >= target), None)


def findings(results: Results, rows: Sequence[Comparison]) -> list[str]:
    """Sentences on what was found and what was not, from fixed rules."""
    lines = []
    for curriculum, other in PAIRS:
        own = [row for row in rows if (row.first.curriculum, row.second.curriculum) == (curriculum, other)]
        if not own:
            continue
        counts = {verdict: sum(row.verdict == verdict for row in own) for verdict in ("better", "worse", "not distinguished")}
        higher = sum(row.mean > 0 for row in own)
        lines.append(
            f"`{curriculum}` against `{other}`: better in {counts['better']}, worse in {counts['worse']}, not distinguished "
            f"in {counts['not distinguished']} of {len(own)} comparisons after correction; the mean is higher in {higher}."
        )
        lines += [f"  * {sentence(row)}" for row in own if row.verdict != "not distinguished"]
    for group in results.groups:
        starts = {seed: results.starts.get((group.world, group.size, seed)) for seed in group.cells}
        fallen = [s for s, cell in group.cells.items() if starts[s] and cell["success"] < starts[s]["success"]]
        if fallen:
            lines.append(
                f"`{group.method}` ({group.world}, {group.size}) ends below its start in {len(fallen)} of "
                f"{len(group.cells)} seeds{_of_which_agree(group, fallen, starts)}."
            )
    return lines


def _of_which_agree(group: Group, fallen: Sequence[int], starts: dict[int, Line]) -> str:
    """How many of them did so while their divergence to the teacher fell."""
    pairs = [(group.cells[seed]["kl_trajectory"], starts[seed]["kl_trajectory"]) for seed in fallen]
    falling = sum(after is not None and before is not None and after < before for after, before in pairs)
    return f", in {falling} of them while the KL to the teacher fell" if falling else ""


def sentence(row: Comparison) -> str:
    low, high = row.interval
    return (
        f"{row.first.world}, {row.first.size}, {row.objective}: "
        f"{100 * row.mean:+.1f} points [{100 * low:+.1f}, {100 * high:+.1f}], "
        f"adjusted p {p_text(row.p_adjusted, equals='= ')}, higher in {row.wins} of {row.num_seeds} seeds"
    )


def p_text(p: float | None, *, equals: str = "") -> str:
    """Two digits that matter, or `< 0.0001`."""
    if p is None:
        return "-"
    return "< 0.0001" if p < 1e-4 else equals + (f"{p:.4f}" if p < 0.01 else f"{p:.3f}" if p < 0.1 else f"{p:.2f}")


@dataclass(frozen=True, kw_only=True)
class NoiseRow:
    """A cell and the same cell run once more."""

    name: str
    same: bool
    """Whether both solve the same tasks at the end and have the same divergence."""
    cpu: tuple[float, float]
    wall: tuple[float, float]


def noise_rows(results: Results) -> list[NoiseRow]:
    rows = []
    for again in results.repeats:
        group = results.find(*(again[name] for name in ("world", "size", "curriculum", "objective")))
        first = group.cells.get(again["seed"]) if group else None
        if first is None:
            continue
        ends = first["points"][-1], again["points"][-1]
        rows.append(
            NoiseRow(
                name=f"{group.world}, {group.size}, {group.method}, seed {again['seed']}",
                same=all(first[key] == again[key] for key in ("solved", "kl_trajectory", "kl_by_step")),
                cpu=(ends[0]["cpu"], ends[1]["cpu"]),
                wall=(ends[0]["wall"], ends[1]["wall"]),
            )
        )
    return rows
