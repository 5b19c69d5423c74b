"""Play held-out tasks over the full horizon: `torchrun ... -m megatron_tcod.evaluate --config run.toml [flags]`.

    python -m megatron_tcod.evaluate --config run.toml --student runs/a/checkpoints/step_0000060 --output a.json
    python -m megatron_tcod.evaluate --config run.toml --eval-samples 8 --eval-temperature 0.7 --eval-seed 1 --output b.json
    python -m megatron_tcod.evaluate --config run.toml --endpoint-url https://HOST/v1 --endpoint-key-env KEY --output c.json
    python -m megatron_tcod.evaluate --compare a.json b.json            # paired, without playing anything

Prints success with its interval, pass@k, families, turns, the share of invalid actions and the KL to the teacher turn by
turn (`evaluation.py` defines them), and an exact paired test between every two evaluations that share tasks. Without a
teacher (`--objective sft --demonstrations expert`) and over an endpoint (`endpoint.py`) there is no KL. See
docs/evaluation.md.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import time
from collections.abc import Callable, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

from megatron_tcod.assembly import Assembly, assemble
from megatron_tcod.config import Config, load_config, log_to_console, run_entry_point, take_flag
from megatron_tcod.demonstrate import teacher_as_player
from megatron_tcod.endpoint import NOT_MEASURED, seat_endpoint
from megatron_tcod.evaluation import (
    comparison_lines,
    evaluation_record,
    read_evaluation,
    summary_lines,
    write_evaluation,
)
from megatron_tcod.metrics import TurnScores, scores_by_turn, turn_kl
from megatron_tcod.model import parallel
from megatron_tcod.preflight import check_writable, preflight
from megatron_tcod.serving import is_teacher_served
from megatron_tcod.tcod import measure
from megatron_tcod.trajectory import Episode, decode, encode


def evaluate(run: Assembly, *, step: int) -> dict[str, Any]:
    """Play the evaluation tasks with the student's weights. Collective; the record on every rank."""
    run.publish_weights(step)  # sft does not keep the engine current
    config, environment = run.config.evaluation, run.config.environment
    tasks = run.family.tasks(config.eval_split, count=config.eval_tasks, **environment.env_options)
    start = time.perf_counter()
    episodes = run.play_in_full(
        tasks, temperature=config.eval_temperature, seed=config.eval_seed, num_samples=config.eval_samples
    )
    scores: dict[int, dict[int, TurnScores]] = {}
    name = ""
    if run.teacher is not None:
        tells_sampled_alone = is_teacher_served(run.config) and not run.config.sglang.teacher_top_k
        name = "sampled_token" if tells_sampled_alone else "reverse_kl"
        measuring = run.objective_named(dataclasses.replace(run.config.objective, objective=name))
        microbatches, per_token = measure(
            episodes, student=run.student, teacher=run.teacher, objective=measuring, pack=run.pack
        )
        speaks = parallel.is_first_in_replica()
        scores = gather_scores(scores_by_turn(microbatches, per_token) if speaks else {})
        check_scores(scores, run.config.model.teacher)
    return evaluation_record(
        step,
        episodes,
        scores,
        config=config,
        max_turns=run.config.rollout.max_turns,
        player=run.config.model.student,
        seconds=time.perf_counter() - start,
        kl_source=name,
        not_measured={} if run.teacher is not None else {"kl": "there is no teacher (objective = sft)"},
    )


def evaluate_endpoint(config: Config) -> dict[str, Any]:
    """Play the evaluation tasks with whoever answers at the endpoint. Collective; the record on every rank."""
    settings, environment = config.evaluation, config.environment
    missing = dict(NOT_MEASURED[config.endpoint.endpoint_api])
    if "kl" not in missing and (obstacle := kl_obstacle(config)):
        missing["kl"] = obstacle
    if "kl" not in missing:
        preflight(judge_of(config), world_size=int(os.environ.get("WORLD_SIZE", "1")), player="teacher")
    with closing(seat_endpoint(config)) as player:
        tasks = player.family.tasks(settings.eval_split, count=settings.eval_tasks, **environment.env_options)
        start = time.perf_counter()
        episodes = player.play_in_full(
            tasks, temperature=settings.eval_temperature, seed=settings.eval_seed, num_samples=settings.eval_samples
        )
        name = player.name
    scores = {} if "kl" in missing else sampled_scores(config, episodes)
    return evaluation_record(
        0,
        episodes,
        scores,
        config=settings,
        max_turns=config.rollout.max_turns,
        player=name,
        seconds=time.perf_counter() - start,
        kl_source="sampled_token",
        not_measured=missing,
    )


def kl_obstacle(config: Config) -> str:
    """Why the log-probabilities that an endpoint tells give no estimate of the KL; empty where they do."""
    rollout, temperature = config.rollout, config.evaluation.eval_temperature
    if config.objective.objective == "sft" or not config.model.teacher:
        return "there is no teacher"
    if is_teacher_served(config):
        return "a teacher behind a server scores students in these processes only; give --teacher DIR"
    if temperature != rollout.rollout_temperature or rollout.rollout_top_p != 1 or config.objective.teacher_temperature != 1:
        return (
            f"sampled tokens estimate it only where they are drawn from the distributions compared: eval_temperature "
            f"{temperature:g} must be rollout_temperature {rollout.rollout_temperature:g}, top_p and teacher_temperature 1"
        )
    return ""


def judge_of(config: Config) -> Config:
    """The teacher in the student's seat of a run that launches no servers: its own log-probabilities are its scores."""
    seated = teacher_as_player(config)
    idle = dataclasses.replace(seated.rollout, rollout_engine="embedded", max_staleness=0, server={})
    unserved = dataclasses.replace(seated.sglang, sglang_urls=[], sglang_key_file="")
    return dataclasses.replace(seated, rollout=idle, sglang=unserved)


def sampled_scores(config: Config, episodes: list[Episode]) -> dict[int, dict[int, TurnScores]]:
    """Log-probabilities of the sampled tokens, as told by who sampled them and as the teacher has them. Collective."""
    with closing(assemble(judge_of(config))) as run:
        microbatches = run.pack(episodes)
        of_teacher = run.student.measure(microbatches, [None] * len(microbatches), run.objective)
        per_token = [
            {"student_logprob": microbatch.old_logprobs, "teacher_logprob": told["student_logprob"]}
            for microbatch, told in zip(microbatches, of_teacher, strict=True)
        ]
        speaks = parallel.is_first_in_replica()
        scores = gather_scores(scores_by_turn(microbatches, per_token) if speaks else {})
        check_scores(scores, config.model.teacher)
        return scores


def evaluate_model(config: Config) -> dict[str, Any]:
    """Play the evaluation tasks with the student's weights in these processes, or its own servers. Collective."""
    unused = "expert" if config.objective.objective == "sft" else ""  # nothing is replayed or imitated here
    config = dataclasses.replace(
        config,
        model=dataclasses.replace(config.model, init="load"),
        curriculum=dataclasses.replace(config.curriculum, curriculum="full", demonstrations=unused),
    )
    preflight(config, world_size=int(os.environ.get("WORLD_SIZE", "1")))
    step = step_of(config.model.student)
    run = assemble(config)
    with closing(run):
        return evaluate(run, step=step)


def gather_scores(own: dict[int, dict[int, TurnScores]]) -> dict[int, dict[int, TurnScores]]:
    """Per-token scores of all replicas, on every rank. Collective."""
    gathered: dict[int, dict[int, TurnScores]] = {}
    for part in parallel.all_gather_bytes(encode(own)):
        for episode, of_turn in decode(part, dict[int, dict[int, TurnScores]]).items():
            gathered.setdefault(episode, {}).update(of_turn)  # rows of one episode may lie on several replicas
    return gathered


def check_scores(scores: dict[int, dict[int, TurnScores]], teacher: str) -> None:
    """FloatingPointError where the KL of a turn is no number."""
    if any(math.isnan(turn_kl(of_turn)) for turns in scores.values() for of_turn in turns.values()):
        raise FloatingPointError(f"teacher = {teacher}: the KL to it is no number; check its weights, and the player's")


def step_of(directory: str) -> int:
    """Optimizer steps behind a checkpoint, 0 for any other Hugging Face directory. ValueError for a damaged one."""
    path = Path(directory) / "state.json"
    if not path.is_file():
        return 0
    try:
        return int(json.loads(path.read_text(encoding="utf-8"))["step"])
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} tells no step ({type(error).__name__}: {error}); restore the checkpoint") from None


def check_output(path: str) -> None:
    """ValueError before anything is played where the record could not be written."""
    check_writable("--output", str(Path(path).parent))
    if Path(path).is_dir():
        raise ValueError(f"--output {path} is a directory; give a file")


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
    log_to_console()
    if output:
        check_output(output)
    is_endpoint = bool(config.endpoint.endpoint_url)
    record = evaluate_endpoint(config) if is_endpoint else evaluate_model(config)
    if parallel.rank() == 0:
        print("\n".join(summary_lines(record["player"], record)))
        if output:
            write_evaluation(Path(output), record)
    parallel.shutdown()
    return 0


if __name__ == "__main__":
    run_entry_point(main)
