"""Training progress on a terminal: a live table where there is one, one aligned line a step where there is not.

    with ConsoleWriter(total_steps=60) as console:
        console.write(record)            # a record of `metrics.StepMetrics.finish`

A terminal shows the last steps, a progress line and sparklines of success and trajectory KL, and keeps the final state
on screen. Anything else (a file, a pipe, CI) gets one line a step under a header that is repeated now and then.
ETA is the mean of the last ten steps' seconds times the steps to go.

Not here: anything that is kept (`metrics.JsonlWriter`), logging of events.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TextIO

from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

_ROWS_ON_SCREEN = 12
_LINES_BETWEEN_HEADERS = 25
_SPARKS = "▁▂▃▄▅▆▇█"


@dataclass(frozen=True)
class Column:
    """One column: heading, width in characters, the record's key and how its number is written."""

    heading: str
    width: int
    key: str
    form: str


COLUMNS = (
    Column("step", 6, "step", "d"),
    Column("k", 5, "curriculum/k", "g"),
    Column("loss", 8, "train/loss", ".4f"),
    Column("success", 8, "rollout/success", ".1%"),
    Column("KL", 8, "kl/token", ".4f"),
    Column("traj KL", 9, "kl/trajectory", ".2f"),
    Column("tok/s", 8, "tokens/per_second", ",.0f"),
    Column("s/step", 7, "seconds/step", ".2f"),
)


class ConsoleWriter:
    """Shows each step's record. Use as a context manager, or call `close`.

    Example: `ConsoleWriter(total_steps=60).write({"step": 1, "rollout/success": 0.25, "seconds/step": 1.9})`
    """

    def __init__(
        self, *, total_steps: int, interval: int = 1, file: TextIO | None = None, force_live: bool | None = None
    ) -> None:
        """interval: steps between rows; the first and the last step always have one. file: where to write, stdout by
        default. force_live: table or lines whatever `file` is."""
        self._interval = interval
        self._console = Console(file=file, force_terminal=force_live, highlight=False)
        self._total_steps = total_steps
        self._rows: deque[list[str]] = deque(maxlen=_ROWS_ON_SCREEN)
        self._seconds: deque[float] = deque(maxlen=10)
        self._success: deque[float] = deque(maxlen=40)
        self._trajectory_kl: deque[float] = deque(maxlen=40)
        self._num_lines = 0
        self._live: Live | None = None
        if self._console.is_terminal:
            self._live = Live(console=self._console, auto_refresh=False, transient=False)
            self._live.start()

    def write(self, record: Mapping[str, float | int]) -> None:
        """Show one step. Figures that the record lacks are dashes."""
        self._remember(record)
        step = int(record["step"])
        if step % self._interval and step not in (1, self._total_steps):
            return
        row = [_cell(column, record.get(column.key)) for column in COLUMNS] + [self._remaining(record)]
        if self._live is None:
            self._write_line(row)
            return
        self._rows.append(row)
        self._live.update(Group(self._table(), self._progress(record)), refresh=True)

    def close(self) -> None:
        """Leave the last state on screen; safe to call twice."""
        if self._live is not None:
            self._live.stop()
            self._live = None

    def __enter__(self) -> ConsoleWriter:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _remember(self, record: Mapping[str, float | int]) -> None:
        for key, history in (
            ("seconds/step", self._seconds),
            ("rollout/success", self._success),
            ("kl/trajectory", self._trajectory_kl),
        ):
            value = record.get(key)
            if value is not None and math.isfinite(value):
                history.append(float(value))

    def _remaining(self, record: Mapping[str, float | int]) -> str:
        if not self._seconds:
            return "-"
        return clock(sum(self._seconds) / len(self._seconds) * max(0, self._total_steps - int(record["step"])))

    def _write_line(self, row: Sequence[str]) -> None:
        if self._num_lines % _LINES_BETWEEN_HEADERS == 0:
            self._print(" ".join(f"{column.heading:>{column.width}}" for column in COLUMNS) + f" {'ETA':>8}")
        self._num_lines += 1
        widths = [column.width for column in COLUMNS] + [8]
        self._print(" ".join(f"{cell:>{width}}" for cell, width in zip(row, widths, strict=True)))

    def _print(self, line: str) -> None:
        self._console.print(line, markup=False, soft_wrap=True)
        self._console.file.flush()

    def _table(self) -> Table:
        table = Table(box=None, pad_edge=False, header_style="bold")
        for column in COLUMNS:
            table.add_column(column.heading, justify="right", min_width=column.width)
        table.add_column("ETA", justify="right", min_width=8)
        for index, row in enumerate(self._rows):
            table.add_row(*row, style=None if index == len(self._rows) - 1 else "dim")
        return table

    def _progress(self, record: Mapping[str, float | int]) -> Text:
        share = min(1.0, int(record["step"]) / max(1, self._total_steps))
        line = Text()
        line.append("━" * round(24 * share), style="cyan").append("━" * (24 - round(24 * share)), style="bright_black")
        line.append(f" {int(record['step'])}/{self._total_steps}\n")
        line.append(f"success {sparkline(self._success)}\n", style="green")
        line.append(f"traj KL {sparkline(self._trajectory_kl)}", style="magenta")
        return line


def sparkline(values: Sequence[float]) -> str:
    """One block character a value, lowest to highest; a flat series is a low line."""
    if not values:
        return ""
    low, high = min(values), max(values)
    scale = (len(_SPARKS) - 1) / (high - low) if high > low else 0.0
    return "".join(_SPARKS[round((value - low) * scale)] for value in values)


def clock(seconds: float) -> str:
    """Seconds as `mm:ss`, `h:mm:ss` from an hour on."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes:02d}:{rest:02d}"


def _cell(column: Column, value: float | int | None) -> str:
    if value is None:
        return "-"
    if not math.isfinite(value):
        return str(value)
    return format(int(value) if column.form == "d" else value, column.form)
