"""Curves and heatmaps of a run, thinned so that a page stays small however long the run was.

    curves(run)     # {"step": [...], "wall": [...] or None, "bin": 1, "values": {key: [...]}}
    heatmap(run)    # {"columns": [[first step, last step], ...], "sum": [turn][column], "token": ..., "k": ...}

Neighbouring steps share a point or a column, as their mean, once there are more of them than fit; `bin` says how many.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from megatron_tcod.report.run import Run, mean

MAX_POINTS = 600
MAX_COLUMNS = 300
CURVES = (
    "rollout/success",
    "kl/trajectory",
    "kl/token",
    "entropy/student",
    "tokens/generated",
    "turns/student",
    "train/loss",
    "train/grad_norm",
    "logprob/rollout_gap",
    "curriculum/k",
)
_TURN = re.compile(r"kl/turn_(\d+)\Z")


def curves(run: Run) -> dict[str, Any]:
    """Every curve of `CURVES` that the run has, over the same points."""
    groups = _groups(len(run.steps), MAX_POINTS)
    steps, wall = [record["step"] for record in run.steps], run.wall_clock()
    values = {key: _means(run.column(key), groups) for key in CURVES if run.total(key) is not None}
    return {
        "bin": len(groups[0]),
        "step": [steps[group[-1]] for group in groups],
        "wall": wall and [round(wall[group[-1]], 3) for group in groups],
        "values": values,
    }


def heatmap(run: Run) -> dict[str, Any] | None:
    """KL by turn and step with the window that was open; None when the run recorded no KL by turn."""
    turns = {int(match[1]) for record in run.steps for key in record if (match := _TURN.match(key))}
    if not turns:
        return None
    groups = _groups(len(run.steps), MAX_COLUMNS)
    names = [f"turn_{turn:02d}" for turn in range(max(turns) + 1)]
    return {
        "columns": [[run.steps[group[0]]["step"], run.steps[group[-1]]["step"]] for group in groups],
        "sum": [_means(run.column(f"kl/{name}"), groups) for name in names],
        "token": [_means(run.column(f"kl_token/{name}"), groups) for name in names],
        "k": _means(run.column("curriculum/k"), groups),
        "start": _means(run.column("curriculum/window_start"), groups),
        "stop": _means(run.column("curriculum/window_stop"), groups),
    }


def _groups(num_items: int, most: int) -> list[range]:
    """Neighbours that share a point: at most `most` ranges of equal size, the last may be shorter."""
    size = -(-num_items // most)
    return [range(start, min(start + size, num_items)) for start in range(0, num_items, size)]


def _means(values: Sequence[float | None], groups: Sequence[range]) -> list[float | None]:
    return [shorten(mean([values[index] for index in group])) for group in groups]


def shorten(value: float | None, digits: int = 5) -> float | None:
    """As many digits as a page needs."""
    return None if value is None else float(f"{value:.{digits}g}")
