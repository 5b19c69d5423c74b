"""A study's directory as one results file: a line for the study, for each world, each start and each finished cell.

    write_results(study, jobs, out, command="python examples/study/run.py --quick", num_slots=2)      # out/results.jsonl
    results = read_results(out / "results.jsonl")

    {"kind": "study", "title": ..., "command": ..., "machine": {...}, "num_cells": 100, ...}
    {"kind": "world", "world": "household", "teacher": {"success": 0.93, ...}, "settings": {...}, ...}
    {"kind": "start", "world": ..., "size": "small", "seed": 1, "success": 0.41, "solved": "0110...", ...}
    {"kind": "cell", ..., "points": [{"step": 20, "success": 0.5, "cpu": 41.2, "wall": ..., "generated": ...}, ...],
     "solved": "0111...", "kl_by_turn": [...], "kl_by_step": {"steps": [...], "turns": [[...], ...]}, ...}

`solved` has one character a held-out task, in the order of `tasks`' digest: cells with one digest are paired. Costs of
a point are those of the training steps before it; evaluations, start-up and checkpoints are in `job_cpu` and `job_wall`.
The page and every figure are made of this file alone (`page.py`).
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import os
import platform
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatron_tcod.envs.demonstrations import read_demonstrations
from study import rundir
from study.grid import SFT, Cell, Settings, Study
from study.plan import Job, Paths, start_name
from study.runner import read_records

MAX_BINS = 12
"""Columns of the KL by turn and step."""

COSTS = {
    "wall": "seconds/step",
    "cpu": "seconds/cpu",
    "generated": "tokens/generated",
    "trained": "tokens/trained",
    "packed": "tokens/packed",
    "episodes": "rollout/episodes",
}
"""Cost of a point -> the step's metric that it sums."""


def write_results(study: Study, jobs: Sequence[Job], out: Path, *, command: str, num_slots: int) -> Path:
    """Collect what has finished by `num_slots` runs at a time. Safe to call at any time; the file appears complete."""
    records = read_records(out)
    finished = {record["job"] for record in records if record["event"] == "done"}
    costs = job_costs(records)
    paths = {world.name: Paths(root=out / world.name) for world in study.worlds}
    lines: list[dict[str, Any]] = [_study_line(study, command, num_slots, costs)]
    lines += [_world_line(world, paths[world.name], jobs) for world in study.worlds]
    starts = {}
    for cell in study.cells():
        start = start_name(study.world(cell.world).students[cell.size], cell.size, cell.seed)
        key = {"world": cell.world, "size": cell.size, "seed": cell.seed}
        if f"{cell.world}/{start}" in finished and tuple(key.values()) not in starts:
            starts[tuple(key.values())] = rundir.evaluation(paths[cell.world].start_evaluation(start))
            lines.append({"kind": "start", **key, **played(starts[tuple(key.values())])})
    for cell in study.cells():
        if cell.name in finished:
            start = starts[cell.world, cell.size, cell.seed]
            lines.append(_cell_line(cell, paths[cell.world], start, costs.get(cell.name, {})))
    path = out / "results.jsonl"
    staging = path.with_suffix(".partial")
    staging.write_text("".join(json.dumps(_short(line)) + "\n" for line in lines), encoding="utf-8")
    os.replace(staging, path)
    return path


_PLAYED = {"world": str, "size": str, "seed": int, "success": float, "tasks": str, "solved": str}
FIELDS: dict[str, dict[str, type]] = {
    "study": {"title": str, "command": str, "machine": dict, "seeds": list, "num_resamples": int, "num_cells": int},
    "world": {"world": str, "models": dict, "settings": dict},
    "start": _PLAYED,
    "cell": {**_PLAYED, "curriculum": str, "objective": str, "repeat": int, "points": list},
}
"""By the kind of a line: the fields that analysis and page cannot do without."""


def read_results(path: str | Path) -> list[dict[str, Any]]:
    """The lines of a results file; ValueError names the first that is none."""
    try:
        texts = Path(path).read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise ValueError(f"results {path}: {error.strerror}; run the study first") from None
    except UnicodeDecodeError:
        raise ValueError(f"results {path} is no text; give the results.jsonl that the study wrote") from None
    lines = []
    for number, text in enumerate(texts, start=1):
        try:
            line = json.loads(text)
        except json.JSONDecodeError:
            line = None
        if fault := _fault_of(line):
            raise ValueError(f"{path}:{number}: {fault}; write the file again by the study")
        lines.append(line)
    if not lines or lines[0]["kind"] != "study":
        raise ValueError(f"{path}: expected a line of kind study first; write the file again by the study")
    return lines


def _fault_of(line: Any) -> str:
    """What a line of a results file lacks, empty for nothing."""
    if not isinstance(line, dict) or line.get("kind") not in FIELDS:
        return f"expected a JSON object with a kind ({', '.join(FIELDS)})"
    for key, kind in FIELDS[line["kind"]].items():
        value = line.get(key)
        if not (isinstance(value, kind) or (kind is float and isinstance(value, int))):
            return f"expected {key} of type {kind.__name__}, got {value!r}"
    if set(line.get("solved", "")) - {"0", "1"}:
        return f"expected solved of 0 and 1, got {line['solved']!r}"
    if not line.get("seeds", True):
        return "expected seeds with at least one, got []"
    points = line.get("points", [{"step": 0}])
    if not points or not all(isinstance(point, dict) and isinstance(point.get("step"), int) for point in points):
        return "expected points of a step each, and at least one"
    return ""


def job_costs(records: Sequence[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """Wall-clock and CPU seconds a job, all its attempts; `unmeasured` counts those that nobody saw end."""
    costs: dict[str, dict[str, float]] = {}
    for record in records:
        cost = costs.setdefault(record["job"], {"job_wall": 0.0, "job_cpu": 0.0, "unmeasured": 0})
        if record["event"] == "start":
            cost["unmeasured"] += 1
        elif record["event"] == "end":
            cost["unmeasured"] -= 1
            cost["job_wall"] += record["wall"]
            cost["job_cpu"] += record["cpu"]
    return costs


def played(record: dict[str, Any]) -> dict[str, Any]:
    """What is kept of an evaluation."""
    tasks = record["tasks"]
    digest = hashlib.sha256("\n".join(task["task_id"] for task in tasks).encode()).hexdigest()[:12]
    return {
        "success": record["success"],
        "turns": record["mean_turns"],
        "kl_trajectory": record.get("kl_trajectory"),
        "kl_by_turn": record.get("kl_by_turn", []),
        "tasks": digest,
        "solved": "".join(str(int(task["success"])) for task in tasks),
    }


def kl_by_step(steps: Sequence[dict[str, Any]], num_bins: int = MAX_BINS) -> dict[str, Any]:
    """KL of each turn over training: neighbouring steps share a bin, a turn that no step of a bin trained has null."""
    num_turns = 1 + max((int(key[8:]) for step in steps for key in step if key.startswith("kl/turn_")), default=-1)
    size = -(-len(steps) // num_bins) if steps else 1
    bins = [steps[first : first + size] for first in range(0, len(steps), size)]
    turns = []
    for turn in range(num_turns):
        known = [[step[f"kl/turn_{turn:02d}"] for step in one if f"kl/turn_{turn:02d}" in step] for one in bins]
        turns.append([sum(values) / len(values) if values else None for values in known])
    return {"steps": [one[-1]["step"] for one in bins], "turns": turns}


def _study_line(study: Study, command: str, num_slots: int, costs: dict[str, dict[str, float]]) -> dict[str, Any]:
    return {
        "kind": "study",
        "title": study.title,
        "command": command,
        "machine": machine(),
        "jobs": num_slots,
        "launch": list(study.launch),
        "seeds": list(study.seeds),
        "success_targets": list(study.success_targets),
        "num_resamples": study.num_resamples,
        "num_cells": sum(not cell.repeat for cell in study.cells()),
        "total_cpu": sum(cost["job_cpu"] for cost in costs.values()),
        "total_wall": sum(cost["job_wall"] for cost in costs.values()),
        "unmeasured": sum(cost["unmeasured"] for cost in costs.values()),
    }


def machine() -> dict[str, Any]:
    """What the figures depend on: processor, cores, versions. No names, no paths."""
    model = ""
    if (info := Path("/proc/cpuinfo")).exists():
        names = [line.partition(":")[2].strip() for line in info.read_text().splitlines() if line.startswith("model name")]
        model = names[0] if names else ""
    versions = {name: importlib.metadata.version(name) for name in ("torch", "megatron-core", "numpy")}
    return {"processor": model, "cores": os.cpu_count(), "python": platform.python_version(), **versions}


def _world_line(world: Any, paths: Paths, jobs: Sequence[Job]) -> dict[str, Any]:
    line: dict[str, Any] = {"kind": "world", "world": world.name}
    if paths.teacher_evaluation.exists():
        line["teacher"] = played(rundir.evaluation(paths.teacher_evaluation))
    if paths.demonstrations.exists():
        line["num_demonstrations"] = len(read_demonstrations(paths.demonstrations, None))
    shapes = {"teacher": world.teacher, **{size: world.students[size] for size in world.sizes or world.students}}
    line["models"] = {name: dict(one.shape) or one.model for name, one in shapes.items()}
    line["games"] = dict(world.games)
    line["corpus"] = dict(world.corpus)
    line["warmstart"] = world.warmstart
    line["teacher_settings"] = world.teacher.settings
    cell = next(job for job in jobs if job.cell and job.cell.world == world.name and job.cell.curriculum != SFT)
    return line | {"settings": shared_settings(cell.commands[0].settings)}


def shared_settings(settings: Settings) -> Settings:
    """A run's settings without what names a method, a seed or a place on this disk."""
    own = {("training", "save"), ("training", "seed"), ("objective", "objective"), ("curriculum", "curriculum")}
    own |= {("curriculum", "demonstrations")}
    shared: Settings = {}
    for part, values in settings.items():
        if part != "model" and isinstance(values, dict):
            shared[part] = {key: value for key, value in values.items() if (part, key) not in own}
    environment = shared.setdefault("environment", {})
    options = environment.get("env_options", {})
    environment["env_options"] = {key: value for key, value in options.items() if key != "root"}
    return {part: values for part, values in shared.items() if values}


def _cell_line(cell: Cell, paths: Paths, start: dict[str, Any], cost: dict[str, float]) -> dict[str, Any]:
    directory = paths.cell(cell)
    steps, evaluations = rundir.steps(directory), rundir.evaluations(directory)
    points = [_point(start, [])]
    points += [_point(one, [step for step in steps if step["step"] <= one["step"]]) for one in evaluations]
    points[0]["step"] = 0
    final = rundir.evaluation(paths.cell_evaluation(cell)) if cell.curriculum == SFT else evaluations[-1]
    outcomes: dict[str, int] = {}
    for step in steps:
        for key, count in step.items():
            if key.startswith("rollout/outcome/") and count:
                outcomes[key[16:]] = outcomes.get(key[16:], 0) + count
    return {
        "kind": "cell",
        "world": cell.world,
        "size": cell.size,
        "curriculum": cell.curriculum,
        "objective": cell.objective,
        "seed": cell.seed,
        "repeat": cell.repeat,
        "points": points,
        **played(final),
        "kl_by_step": kl_by_step(steps),
        "outcomes": outcomes,
        **cost,
    }


def _point(evaluation: dict[str, Any], steps: Sequence[dict[str, Any]]) -> dict[str, Any]:
    point = {"step": evaluation["step"], "success": evaluation["success"], "kl_trajectory": evaluation.get("kl_trajectory")}
    return point | {name: sum(step.get(key, 0) for step in steps) for name, key in COSTS.items()}


def _short(value: Any) -> Any:
    """Floats with as many digits as a reader of the file needs."""
    if isinstance(value, float):
        return float(f"{value:.6g}")
    if isinstance(value, dict):
        return {key: _short(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [_short(one) for one in value]
    return value
