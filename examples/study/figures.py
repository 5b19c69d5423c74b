"""The study's figures as SVG text, from a results file: no plotting package, no scripts, white background.

    for name, svg in figures(results, rows).items():
        (directory / f"{name}.svg").write_text(svg)

    success-by-step-WORLD, success-by-cpu-WORLD     held-out success of each curriculum, a panel a size and objective
    kl-WORLD-SIZE                                   KL to the teacher by turn and step, a panel a curriculum and objective
    differences                                     every comparison with its interval
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from html import escape
from math import log

from study.analysis import Comparison, Group, Results, mean
from study.grid import CURRICULA, SFT

COLOURS = {"sft": "#777777", "full": "#d55e00", "f2b": "#0072b2", "b2f": "#009e73"}
PANEL_WIDTH, PANEL_HEIGHT = 250, 170
MARGIN = 46
FONT = 'font-family="sans-serif" font-size="11"'

Point = tuple[float, float]


class Drawing:
    """SVG elements on a canvas of a fixed size."""

    def __init__(self, width: float, height: float) -> None:
        self._parts: list[str] = []
        self._open = (
            f'<svg xmlns="http://www.w3.org/2000/svg" width="{width:g}" height="{height:g}" '
            f'viewBox="0 0 {width:g} {height:g}" {FONT}>\n<rect width="100%" height="100%" fill="white"/>'
        )

    def text(self, x: float, y: float, words: str, *, anchor: str = "start", colour: str = "#222", rotate: int = 0) -> None:
        turned = f' transform="rotate({rotate} {x:.1f} {y:.1f})"' if rotate else ""
        self._parts.append(
            f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" fill="{colour}"{turned}>{escape(words)}</text>'
        )

    def line(self, points: Sequence[Point], colour: str, *, width: float = 1.0, opacity: float = 1.0) -> None:
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
        self._parts.append(
            f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="{width:g}" opacity="{opacity:g}"/>'
        )

    def dot(self, x: float, y: float, colour: str, radius: float = 2.5) -> None:
        self._parts.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="{radius:g}" fill="{colour}"/>')

    def box(self, x: float, y: float, width: float, height: float, fill: str) -> None:
        self._parts.append(f'<rect x="{x:.1f}" y="{y:.1f}" width="{width:.2f}" height="{height:.2f}" fill="{fill}"/>')

    def svg(self) -> str:
        return "\n".join([self._open, *self._parts, "</svg>"]) + "\n"


class Axes:
    """A panel with scaled axes: `at(x, y)` is the place of a value."""

    def __init__(
        self,
        drawing: Drawing,
        corner: Point,
        *,
        x_range: Point,
        y_range: Point,
        title: str,
        x_name: str = "",
        percent: bool = False,
    ) -> None:
        self.drawing, (self.left, self.top) = drawing, corner
        self.x_range, self.y_range = x_range, y_range
        right, bottom = self.left + PANEL_WIDTH, self.top + PANEL_HEIGHT
        drawing.line([(self.left, self.top), (self.left, bottom), (right, bottom)], "#222")
        drawing.text(self.left, self.top - 8, title)
        drawing.text((self.left + right) / 2, bottom + 30, x_name, anchor="middle")
        for value in ticks(*x_range):
            x, _ = self.at(value, y_range[0])
            drawing.line([(x, bottom), (x, bottom + 4)], "#222")
            drawing.text(x, bottom + 16, f"{value:g}", anchor="middle")
        for value in ticks(*y_range):
            _, y = self.at(x_range[0], value)
            drawing.line([(self.left, y), (right, y)], "#dddddd")
            drawing.text(self.left - 5, y + 4, f"{100 * value:g} %" if percent else f"{value:g}", anchor="end")

    def at(self, x: float, y: float) -> Point:
        (x0, x1), (y0, y1) = self.x_range, self.y_range
        return (
            self.left + PANEL_WIDTH * (x - x0) / ((x1 - x0) or 1),
            self.top + PANEL_HEIGHT * (1 - (y - y0) / ((y1 - y0) or 1)),
        )


def ticks(low: float, high: float) -> list[float]:
    """Four to eight round values within a range."""
    span = high - low
    if span <= 0:
        return [low]
    step = next(base * 10**power for power in range(-6, 12) for base in (1, 2, 5) if span / (base * 10**power) <= 7)
    first = -(-low // step)
    return [round(step * (first + index), 10) for index in range(int((high - first * step) // step) + 1)]


def figures(results: Results, rows: Sequence[Comparison]) -> dict[str, str]:
    """File name without its ending -> SVG."""
    made: dict[str, str] = {}
    for world in results.worlds:
        groups = [group for group in results.groups if group.world == world]
        if not groups:
            continue
        made[f"success-by-step-{world}"] = success_figure(results, groups, "step", "optimizer step")
        made[f"success-by-cpu-{world}"] = success_figure(results, groups, "cpu", "CPU seconds of training")
        for size in dict.fromkeys(group.size for group in groups):
            played = [group for group in groups if group.size == size and group.curriculum != SFT]
            made[f"kl-{world}-{size}"] = kl_figure(played)
    if rows:
        made["differences"] = difference_figure(rows)
    return made


def success_figure(results: Results, groups: Sequence[Group], cost: str, x_name: str) -> str:
    """Thin lines are seeds, thick ones their mean at each evaluation."""
    sizes = list(dict.fromkeys(group.size for group in groups))
    objectives = list(dict.fromkeys(group.objective for group in groups if group.objective != SFT))
    points = [point for group in groups for cell in group.cells.values() for point in cell["points"]]
    x_range = (0.0, max(point[cost] for point in points) or 1.0)
    y_range = (0.0, min(1.0, 0.05 + max(point["success"] for point in points)))
    drawing = Drawing(*canvas(len(objectives), len(sizes), legend=True))
    for row, size in enumerate(sizes):
        for column, objective in enumerate(objectives):
            axes = Axes(
                drawing, corner_of(row, column), x_range=x_range, y_range=y_range, title=f"{size}, {objective}",
                x_name=x_name, percent=True,
            )  # fmt: skip
            for group in groups:
                if group.size == size and group.objective in (objective, SFT):
                    draw_curves(axes, group, cost)
    names = [name for name in CURRICULA if any(group.curriculum == name for group in groups)]
    draw_legend(drawing, names)
    return drawing.svg()


def draw_curves(axes: Axes, group: Group, cost: str) -> None:
    colour, cells = COLOURS[group.curriculum], list(group.cells.values())
    for cell in cells:
        axes.drawing.line([axes.at(one[cost], one["success"]) for one in cell["points"]], colour, opacity=0.25)
    shortest = min(len(cell["points"]) for cell in cells)
    middle = [
        axes.at(*(mean(cell["points"][index][name] for cell in cells) for name in (cost, "success")))
        for index in range(shortest)
    ]
    axes.drawing.line(middle, colour, width=2)
    for x, y in middle:
        axes.drawing.dot(x, y, colour)


def kl_figure(groups: Sequence[Group]) -> str:
    """Colour is the KL summed over a turn's tokens, on a logarithmic scale; white where no step trained the turn."""
    objectives = list(dict.fromkeys(group.objective for group in groups))
    curricula = [name for name in CURRICULA if any(group.curriculum == name for group in groups)]
    tables = {id(group): mean_table([cell["kl_by_step"] for cell in group.cells.values()]) for group in groups}
    known = [value for _, turns in tables.values() for row in turns for value in row if value]
    low, high = (min(known), max(known)) if known else (0.1, 1.0)
    shade = log_shade(max(low, high / 1000), high)
    drawing = Drawing(*canvas(len(curricula), len(objectives), legend=True))
    for group in groups:
        steps, turns = tables[id(group)]
        if not steps:
            continue
        axes = Axes(
            drawing, corner_of(objectives.index(group.objective), curricula.index(group.curriculum)),
            x_range=(0, steps[-1]), y_range=(0, len(turns)), title=f"{group.curriculum}, {group.objective}",
            x_name="optimizer step; turn upwards",
        )  # fmt: skip
        draw_cells(axes, steps, turns, shade)
    for index in range(60):
        drawing.box(MARGIN + 110 + 2 * index, 8, 2, 10, shade(low * (high / low) ** (index / 59)))
    drawing.text(MARGIN + 105, 17, f"KL a turn {low:.2g} nats", anchor="end")
    drawing.text(MARGIN + 235, 17, f"{high:.2g} nats")
    return drawing.svg()


def draw_cells(axes: Axes, steps: Sequence[float], turns: Sequence[Sequence[float | None]], shade: Callable) -> None:
    edges = [0, *steps]
    for turn, row in enumerate(turns):
        for column, value in enumerate(row):
            if value is not None:
                left, bottom = axes.at(edges[column], turn)
                right, top = axes.at(edges[column + 1], turn + 1)
                axes.drawing.box(left, top, right - left, bottom - top, shade(value))


def mean_table(tables: Sequence[dict]) -> tuple[list[float], list[list[float | None]]]:
    """Cell by cell over the seeds that have a value."""
    steps = min((table["steps"] for table in tables), key=len)
    num_turns = max(len(table["turns"]) for table in tables)
    turns = [
        [
            mean(table["turns"][turn][column] for table in tables if turn < len(table["turns"]))
            for column in range(len(steps))
        ]
        for turn in range(num_turns)
    ]
    return steps, turns


def log_shade(low: float, high: float) -> Callable[[float], str]:
    """A colour from pale yellow to dark blue."""
    pale, dark = (255, 247, 188), (8, 48, 107)

    def shade(value: float) -> str:
        share = min(1.0, max(0.0, log(max(value, low) / low) / (log(high / low) or 1.0)))
        return "#" + "".join(f"{round(a + share * (b - a)):02x}" for a, b in zip(pale, dark, strict=True))

    return shade


def difference_figure(rows: Sequence[Comparison]) -> str:
    """A line a comparison: the difference of success in points and its interval."""
    label_width, width, height = 330, 360, 18
    bound = max(max(abs(end) for end in row.interval) for row in rows) or 1.0
    drawing = Drawing(label_width + width + 2 * MARGIN, height * len(rows) + 70)

    def place(value: float) -> float:
        return MARGIN + label_width + width * (value + bound) / (2 * bound)

    bottom = 30 + height * len(rows)
    for value in ticks(-100 * bound, 100 * bound):
        drawing.line([(place(value / 100), 24), (place(value / 100), bottom)], "#222" if value == 0 else "#dddddd")
        drawing.text(place(value / 100), bottom + 14, f"{value:+g}", anchor="middle")
    drawing.text(place(0), bottom + 30, "difference of success, points (first minus second)", anchor="middle")
    for index, row in enumerate(rows):
        y = 36 + height * index
        colour = {"better": "#0072b2", "worse": "#d55e00"}.get(row.verdict, "#777777")
        drawing.text(MARGIN + label_width - 8, y + 4, label(row), anchor="end")
        drawing.line([(place(row.interval[0]), y), (place(row.interval[1]), y)], colour, width=2)
        drawing.dot(place(row.mean), y, colour, 3.5)
    drawing.text(MARGIN, 14, "blue: better, orange: worse, grey: not distinguished (Holm, 5 %)")
    return drawing.svg()


def label(row: Comparison) -> str:
    return f"{row.first.world}, {row.first.size}, {row.objective}: {row.first.curriculum} - {row.second.curriculum}"


def draw_legend(drawing: Drawing, names: Iterable[str]) -> None:
    for index, name in enumerate(names):
        drawing.line([(MARGIN + 70 * index, 13), (MARGIN + 20 + 70 * index, 13)], COLOURS[name], width=3)
        drawing.text(MARGIN + 25 + 70 * index, 17, name)


def corner_of(row: int, column: int) -> Point:
    return MARGIN + column * (PANEL_WIDTH + MARGIN + 14), 48 + row * (PANEL_HEIGHT + 68)


def canvas(columns: int, rows: int, *, legend: bool) -> Point:
    return MARGIN + columns * (PANEL_WIDTH + MARGIN + 14), (30 if legend else 10) + rows * (PANEL_HEIGHT + 68) + 6
