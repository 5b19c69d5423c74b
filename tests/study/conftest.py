"""Makes `examples/study` importable as `study`, and a results file of a study that never ran."""

import json
import random
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "examples"))

SETTINGS = {"training": {"train_iters": 40}, "rollout": {"rollout_batch_size": 16, "max_turns": 6}, "curriculum": {"eta": 1}}


def played(rng, success, num_tasks=60):
    solved = "".join("1" if rng.random() < success else "0" for _ in range(num_tasks))
    return {
        "success": solved.count("1") / num_tasks, "turns": 9.0, "kl_trajectory": 3 * (1 - success),
        "kl_by_turn": [0.2, 0.3], "tasks": "abc", "solved": solved,
    }  # fmt: skip


def cell_line(rng, curriculum, objective, seed, success, repeat=0):
    points = [
        {"step": step, "success": 0.4 + (success - 0.4) * step / 40, "kl_trajectory": 2.0, "wall": 2.2 * step,
         "cpu": 2.0 * step, "generated": 900 * step, "trained": 900 * step, "packed": 5000 * step, "episodes": 16 * step}
        for step in (0, 20, 40)
    ]  # fmt: skip
    kl = {"steps": [20, 40], "turns": [[0.5, 0.25], [None, 0.5]]}
    return {
        "kind": "cell", "world": "household", "size": "small", "curriculum": curriculum, "objective": objective, "seed": seed,
        "repeat": repeat, "points": points, **played(rng, success), "kl_by_step": kl, "outcomes": {"ok": 640, "diverged": 2},
        "job_wall": 100.0, "job_cpu": 90.0, "unmeasured": 0,
    }  # fmt: skip


@pytest.fixture
def lines():
    """Three seeds: f2b clearly better than full, b2f worse than where it began, sft in between; one cell run twice."""
    rng = random.Random(0)
    found = [{
        "kind": "study", "title": "A study", "command": "python examples/study/run.py --quick", "jobs": 2, "launch": [],
        "machine": {"processor": "one <fast> & only", "cores": 2}, "seeds": [1, 2, 3], "success_targets": [0.5, 0.99],
        "num_resamples": 500, "num_cells": 12, "total_cpu": 1000.0, "total_wall": 1100.0, "unmeasured": 0,
    }]  # fmt: skip
    models = {"teacher": {"hidden_size": 128}, "small": {"hidden_size": 64}}
    found.append({"kind": "world", "world": "household", "teacher": played(rng, 0.95), "models": models, "settings": SETTINGS,
                  "num_demonstrations": 50, "games": {}, "corpus": {}, "warmstart": {}, "teacher_settings": {}})  # fmt: skip
    for seed in (1, 2, 3):
        found.append({"kind": "start", "world": "household", "size": "small", "seed": seed, **played(rng, 0.4)})
    rates = {"sft": 0.55, "full": 0.5, "f2b": 0.95, "b2f": 0.1}
    for seed in (1, 2, 3):
        found += [
            cell_line(rng, curriculum, "sft" if curriculum == "sft" else "reverse_kl", seed, rate)
            for curriculum, rate in rates.items()
        ]
    first = next(line for line in found if line.get("curriculum") == "full")
    found.append({**first, "repeat": 1})
    return found


@pytest.fixture
def results_path(lines, tmp_path):
    path = tmp_path / "results.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path
