"""The driver over real training runs: tiny models, a page at the end, and the same figures after kills."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from study.results import job_costs, kl_by_step, read_results

ROOT = Path(__file__).parents[2]

GRID = """
[study]
title = "A tiny study"
out = "unused"
seeds = {seeds}
curricula = {curricula}
objectives = ["reverse_kl"]
success_targets = [0.5]
num_resamples = 200
num_repeats = 1

[[world]]
name = "household"
[world.settings.training]
train_iters = 2
lr = 1e-3
save_interval = 1
[world.settings.rollout]
rollout_batch_size = 2
rollout_max_response_len = 6
rollout_max_context_len = 512
max_turns = 4
[world.settings.environment]
train_tasks = 6
[world.settings.evaluation]
eval_interval = 1
eval_tasks = 3
[world.teacher]
model = "{models}/teacher"
[world.students.small]
model = "{models}/student"
"""


MADE_HERE = """
[study]
title = "Models and games made here"
out = "unused"
seeds = [1]
curricula = ["full"]
objectives = ["reverse_kl"]
num_resamples = 200

[[world]]
name = "alfworld"
games = { train = 6, valid-seen = 2, valid-unseen = 0 }
corpus = { tasks = 6, mistake_rate = 0.1, is_corpus_imitated = true }
[world.settings.training]
train_iters = 2
[world.settings.rollout]
rollout_batch_size = 2
rollout_max_response_len = 6
rollout_max_context_len = 2048
max_turns = 3
[world.settings.environment]
env = "alfworld"
[world.settings.evaluation]
eval_split = "valid_seen"
[world.teacher]
shape = { hidden_size = 32, num_hidden_layers = 1, intermediate_size = 64, num_attention_heads = 2 }
[world.students.small]
shape = { hidden_size = 16, num_hidden_layers = 1, intermediate_size = 32, num_attention_heads = 2 }
"""


def write_grid(path, models, *, seeds, curricula):
    text = GRID.format(models=models, seeds=json.dumps(seeds), curricula=json.dumps(curricula))
    path.write_text(text)
    return path


def start(grid, out):
    line = [sys.executable, str(ROOT / "examples" / "study" / "run.py"), "--grid", str(grid), "--out", str(out)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(line, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def num_lines(path):
    return len(path.read_bytes().splitlines()) if path.exists() else 0


def figures_of(path):
    """What a results file says but for what a machine's speed decides."""
    of_time = ("wall", "cpu", "job_wall", "job_cpu", "unmeasured")
    cells = [line for line in read_results(path) if line["kind"] == "cell"]
    for cell in cells:
        cell["points"] = [{key: value for key, value in point.items() if key not in of_time} for point in cell["points"]]
    return [{key: value for key, value in cell.items() if key not in of_time} for cell in cells]


def test_a_study_runs_from_a_grid_to_a_page_and_repeats_itself(household_models, tmp_path):
    grid = write_grid(tmp_path / "grid.toml", household_models, seeds=[1], curricula=["full"])
    driver = start(grid, tmp_path / "out")
    said, _ = driver.communicate(timeout=400)
    assert driver.returncode == 0, said
    results = read_results(tmp_path / "out" / "results.jsonl")
    first, again = (line for line in results if line["kind"] == "cell")
    assert (first["repeat"], again["repeat"]) == (0, 1)
    assert [point["step"] for point in first["points"]] == [0, 1, 2]
    assert 0 < first["points"][1]["cpu"] < first["points"][2]["cpu"] < first["job_cpu"]
    assert first["points"][2]["generated"] > 0 and len(first["solved"]) == 3
    for key in ("solved", "kl_trajectory", "kl_by_step"):
        assert first[key] == again[key]
    page = (tmp_path / "out" / "study.md").read_text()
    assert "1 of 1 runs are in it." in page and "solves the same tasks with the same KL" in page


@pytest.mark.slow
@pytest.mark.timeout(2400)
def test_games_models_teacher_and_warm_start_are_made_where_the_grid_gives_shapes(tmp_path):
    pytest.importorskip("alfworld")
    (tmp_path / "grid.toml").write_text(MADE_HERE)
    driver = start(tmp_path / "grid.toml", tmp_path / "out")
    said, _ = driver.communicate(timeout=900)
    assert driver.returncode == 0, said
    results = read_results(tmp_path / "out" / "results.jsonl")
    assert [line["kind"] for line in results] == ["study", "world", "start", "cell"]
    assert len(results[1]["teacher"]["solved"]) == len(results[3]["solved"]) == 2
    assert "alfworld" in (tmp_path / "out" / "study.md").read_text()


@pytest.mark.slow
@pytest.mark.timeout(2400)
def test_a_study_that_is_killed_again_and_again_has_the_figures_of_one_that_was_not(household_models, tmp_path):
    grid = write_grid(tmp_path / "grid.toml", household_models, seeds=[1], curricula=["full", "f2b"])
    whole = start(grid, tmp_path / "whole")
    said, _ = whole.communicate(timeout=900)
    assert whole.returncode == 0, said
    rng = random.Random(0)
    journal = tmp_path / "killed" / "jobs.jsonl"
    for _ in range(6):
        written = num_lines(journal)
        driver = start(grid, tmp_path / "killed")
        while driver.poll() is None and num_lines(journal) < written + rng.randint(1, 3):
            time.sleep(0.2)
        time.sleep(4 * rng.random())
        driver.send_signal(signal.SIGKILL)
        driver.communicate()
    last = start(grid, tmp_path / "killed")
    said, _ = last.communicate(timeout=900)
    assert last.returncode == 0, said
    assert figures_of(tmp_path / "killed" / "results.jsonl") == figures_of(tmp_path / "whole" / "results.jsonl")


def test_kl_by_step_averages_bins_and_leaves_untrained_turns_empty():
    steps = [{"step": step + 1, "kl/turn_00": float(step)} for step in range(5)]
    steps[4]["kl/turn_01"] = 7.0
    assert kl_by_step(steps, num_bins=2) == {"steps": [3, 5], "turns": [[1.0, 3.5], [None, 7.0]]}
    assert kl_by_step([]) == {"steps": [], "turns": []}


def test_an_attempt_that_nobody_saw_end_is_counted_and_costs_nothing():
    records = [
        {"job": "a", "event": "start"},
        {"job": "a", "event": "start"},
        {"job": "a", "event": "end", "wall": 3.0, "cpu": 2.0},
        {"job": "a", "event": "done"},
    ]
    assert job_costs(records) == {"a": {"job_wall": 3.0, "job_cpu": 2.0, "unmeasured": 1}}
