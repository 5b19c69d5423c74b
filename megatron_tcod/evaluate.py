"""Play held-out tasks over the full horizon: `torchrun ... -m megatron_tcod.evaluate --config run.toml [flags]`.

    python -m megatron_tcod.evaluate --config run.toml --student runs/a/checkpoints/step_0000060 --output a.json
    python -m megatron_tcod.evaluate --compare a.json b.json            # paired, without playing anything

Prints success with its Wilson interval, mean turns and the KL to the teacher turn by turn, and an exact McNemar test
between every two evaluations that share tasks. Without a teacher (`--objective sft`) there is no KL.
"""

from __future__ import annotations

import dataclasses
import json
import os
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from itertools import combinations
from pathlib import Path
from typing import Any

from megatron_tcod.assembly import Assembly, assemble
from megatron_tcod.config import load_config, log_to_console, run_entry_point, take_flag
from megatron_tcod.metrics import TurnScores, scores_by_turn, turn_kl
from megatron_tcod.model import parallel
from megatron_tcod.preflight import preflight
from megatron_tcod.serving import is_teacher_served
from megatron_tcod.significance import discordant, mcnemar_exact, wilson_interval
from megatron_tcod.tcod import measure
from megatron_tcod.trajectory import Episode, decode, encode


def evaluate(run: Assembly, *, step: int) -> dict[str, Any]:
    """Play the evaluation tasks with the student's weights. Collective; the record on every rank."""
    run.publish_weights(step)  # sft does not keep the engine current
    config, environment = run.config.evaluation, run.config.environment
    tasks = run.family.tasks(config.eval_split, count=config.eval_tasks, **environment.env_options)
    start = time.perf_counter()
    episodes = run.play_in_full(tasks, temperature=config.eval_temperature, seed=config.eval_seed)
    scores: dict[int, dict[int, TurnScores]] = {}
    if run.teacher is not None:
        tells_sampled_alone = is_teacher_served(run.config) and not run.config.sglang.teacher_top_k
        name = "sampled_token" if tells_sampled_alone else "reverse_kl"
        measuring = run.objective_named(dataclasses.replace(run.config.objective, objective=name))
        microbatches, per_token = measure(
            episodes, student=run.student, teacher=run.teacher, objective=measuring, pack=run.pack
        )
        speaks = parallel.is_first_in_replica()
        scores = gather_scores(scores_by_turn(microbatches, per_token) if speaks else {})
    return evaluation_record(
        step, episodes, scores, split=config.eval_split, temperature=config.eval_temperature,
        seconds=time.perf_counter() - start,
    )  # fmt: skip


def gather_scores(own: dict[int, dict[int, TurnScores]]) -> dict[int, dict[int, TurnScores]]:
    """Per-token scores of all replicas, on every rank. Collective."""
    gathered: dict[int, dict[int, TurnScores]] = {}
    for part in parallel.all_gather_bytes(encode(own)):
        for episode, of_turn in decode(part, dict[int, dict[int, TurnScores]]).items():
            gathered.setdefault(episode, {}).update(of_turn)  # rows of one episode may lie on several replicas
    return gathered


def evaluation_record(
    step: int,
    episodes: Sequence[Episode],
    scores: Mapping[int, Mapping[int, TurnScores]],
    *,
    split: str,
    temperature: float,
    seconds: float,
) -> dict[str, Any]:
    """What an evaluation file holds; `report` reads it. KL values are `turn_kl`'s."""
    tasks = []
    for index, episode in enumerate(episodes):
        of_turn = scores.get(index, {})
        tasks.append({
            "task_id": episode.task.task_id,
            "family": episode.task.family,
            "success": episode.success,
            "turns": len(episode.turns),
            "outcome": episode.outcome,
            "kl_by_turn": [turn_kl(of_turn[turn]) for turn in sorted(of_turn)],
        })  # fmt: skip
    num_success = sum(task["success"] for task in tasks)
    trajectory_kls = [sum(task["kl_by_turn"]) for task in tasks if task["kl_by_turn"]]
    return {
        "step": step,
        "split": split,
        "temperature": temperature,
        "success": num_success / max(len(tasks), 1),
        "interval": list(wilson_interval(num_success, len(tasks))) if tasks else None,
        "mean_turns": sum(task["turns"] for task in tasks) / max(len(tasks), 1),
        "kl_trajectory": sum(trajectory_kls) / len(trajectory_kls) if trajectory_kls else None,
        "seconds": seconds,
        "tasks": tasks,
    }


def write_evaluation(path: Path, record: Mapping[str, Any]) -> None:
    """Complete or absent: written beside and renamed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_suffix(".partial")
    beside.write_text(json.dumps(record), encoding="utf-8")
    os.replace(beside, path)


TASK_KEYS = {"task_id", "success", "turns", "outcome", "kl_by_turn"}


def read_evaluation(path: str) -> dict[str, Any]:
    """An evaluation file; ValueError for anything else."""
    fix = "give a file that evaluate or train wrote"
    try:
        record = json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"evaluation {path}: {error.strerror}; {fix}") from None
    except (json.JSONDecodeError, UnicodeDecodeError):
        raise ValueError(f"evaluation {path} is no JSON; {fix}") from None
    tasks = record.get("tasks") if isinstance(record, dict) and record.get("interval") else None
    if not isinstance(tasks, list) or not all(isinstance(task, dict) and set(task) >= TASK_KEYS for task in tasks):
        raise ValueError(f"evaluation {path} is no evaluation record; {fix}")
    return record


def step_of(directory: str) -> int:
    """Optimizer steps behind a checkpoint, 0 for any other Hugging Face directory."""
    path = Path(directory) / "state.json"
    return int(json.loads(path.read_text(encoding="utf-8"))["step"]) if path.is_file() else 0


def summary_lines(name: str, record: Mapping[str, Any]) -> list[str]:
    """An evaluation as text."""
    low, high = record["interval"]
    num_success = sum(task["success"] for task in record["tasks"])
    lines = [
        f"{name}: success {record['success']:.1%} ({num_success}/{len(record['tasks'])}, "
        f"95 % interval {low:.1%} to {high:.1%}), {record['mean_turns']:.1f} turns on average"
    ]
    outcomes = {task["outcome"] for task in record["tasks"]} - {"ok"}
    for outcome in sorted(outcomes):
        lines.append(f"  {outcome}: {sum(task['outcome'] == outcome for task in record['tasks'])} episodes")
    if record.get("kl_trajectory") is not None:
        depth = max(len(task["kl_by_turn"]) for task in record["tasks"])
        by_turn = []
        for turn in range(depth):
            values = [task["kl_by_turn"][turn] for task in record["tasks"] if len(task["kl_by_turn"]) > turn]
            by_turn.append(f"{sum(values) / len(values):.3f}")
        lines.append(f"  trajectory KL {record['kl_trajectory']:.3f}; by turn: {' '.join(by_turn)}")
    return lines


def comparison_lines(records: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Exact McNemar tests over the tasks that two evaluations share."""
    lines = []
    for (name_a, a), (name_b, b) in combinations(records.items(), 2):
        solved_a = {task["task_id"]: task["success"] for task in a["tasks"]}
        solved_b = {task["task_id"]: task["success"] for task in b["tasks"]}
        shared = solved_a.keys() & solved_b.keys()
        if not shared:
            lines.append(f"{name_a} and {name_b} share no task; no paired test")
            continue
        only_a, only_b = discordant(
            {key: solved_a[key] for key in shared}, {key: solved_b[key] for key in shared}
        )
        p = mcnemar_exact(only_a, only_b)
        lines.append(
            f"{name_a} against {name_b} on {len(shared)} shared tasks: only the first solves {only_a}, only the second "
            f"{only_b}; exact McNemar p {f'= {p:.4f}' if p >= 1e-4 else '< 0.0001'}"
        )
    return lines


def compare(paths: Sequence[str], say: Callable[[str], None]) -> int:
    records = {path: read_evaluation(path) for path in paths}
    for path, record in records.items():
        for line in summary_lines(path, record):
            say(line)
    for line in comparison_lines(records):
        say(line)
    return 0


def main(argv: list[str]) -> int:
    if argv[:1] == ["--compare"]:
        if len(argv) < 3:
            raise ValueError(f"--compare needs at least two evaluation files, got {len(argv) - 1}")
        return compare(argv[1:], print)
    output, argv = take_flag(argv, "--output")
    config = load_config(argv, prog="python -m megatron_tcod.evaluate")
    unused = "expert" if config.objective.objective == "sft" else ""  # nothing is replayed or imitated here
    config = dataclasses.replace(
        config,
        model=dataclasses.replace(config.model, init="load"),
        curriculum=dataclasses.replace(config.curriculum, curriculum="full", demonstrations=unused),
    )
    log_to_console()
    preflight(config, world_size=int(os.environ.get("WORLD_SIZE", "1")))
    run = assemble(config)
    with closing(run):
        record = evaluate(run, step=step_of(config.model.student))
    if parallel.rank() == 0:
        print("\n".join(summary_lines(config.model.student, record)))
        if output:
            write_evaluation(Path(output), record)
    parallel.shutdown()
    return 0


if __name__ == "__main__":
    run_entry_point(main)
