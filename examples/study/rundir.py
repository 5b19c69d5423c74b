"""The one place that knows how a training run's directory is laid out: its newest checkpoint, its evaluations, its metrics.

    model = newest_model("runs/study/quick/household/teacher")      # what --student and --teacher take
    run = read("runs/study/quick/household/cells/...")

It reads what `megatron_tcod.train` and `megatron_tcod.evaluate` wrote, and writes nothing. It imports no torch, so that
the driver of a study starts at once and stays small beside its runs.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from megatron_tcod.journal import read_journal


def newest_model(directory: str | Path) -> Path:
    """The newest checkpoint of a run. ValueError where it has none."""
    checkpoints = Path(directory) / "checkpoints"
    try:
        newest = checkpoints / (checkpoints / "latest").read_text(encoding="utf-8").strip()
    except OSError as error:
        raise ValueError(f"{directory} has no finished checkpoint ({error.strerror}); run the study again") from None
    if not newest.is_dir():
        raise ValueError(f"{directory}: its newest checkpoint {newest.name} is gone; remove {directory} and run again")
    return newest


def evaluation(path: Path) -> dict[str, Any]:
    """One evaluation, which its program wrote completely or not at all."""
    return json.loads(path.read_text(encoding="utf-8"))


def evaluations(directory: str | Path) -> list[dict[str, Any]]:
    """A run's evaluations by step."""
    records = [evaluation(path) for path in sorted((Path(directory) / "evaluation").glob("*.json"))]
    return sorted(records, key=lambda record: record["step"])


def steps(directory: str | Path) -> list[dict[str, Any]]:
    """One record of metrics a step, ascending; a step that was made again counts once."""
    by_step = {record["step"]: record for record in read_journal(Path(directory) / "metrics.jsonl").records}
    return [by_step[step] for step in sorted(by_step)]
