"""Evaluation records: what full-horizon plays of some tasks say about a player, as JSON, as text, and two at a time.

    record = evaluation_record(step, episodes, scores, config=config, max_turns=30, player=name, seconds=9.1)
    write_evaluation(Path("a.json"), record); record = read_evaluation("a.json")
    print("\\n".join(summary_lines("a", record)))
    print("\\n".join(comparison_lines({"a": a, "b": b})))

A record holds one entry an episode under `tasks` and the figures over them. An episode with another outcome than `ok`
counts as not solved, and how many there were is told. What was not measured is absent and named with its reason under
`not_measured`; it is never 0.

    success             pass@1: mean over tasks of the share of their samples that solve them
    interval            95 %; Wilson's for one sample a task, else with the likeness of a task's samples (`significance.py`)
    pass_at             {"1": .., "2": .., "4": .., "n": ..}: unbiased pass@k
    families            the first three and `turns` by family of tasks
    mean_turns          over all episodes; `mean_turns_solved` over those that solve their task
    invalid_actions     share of the actions that the environment did not take as a command, over those it judged
    kl_trajectory       KL to the teacher summed over an episode's turns, mean over episodes with figures, nats
    kl_by_turn          mean over the episodes that reached the turn
    kl_source           reverse_kl, or sampled_token: its estimate from the sampled tokens alone

It plays nothing; `report` reads the same files by itself and more leniently.
"""

from __future__ import annotations

import math
import os
from collections import defaultdict
from collections.abc import Mapping, Sequence
from itertools import combinations
from pathlib import Path
from typing import Any

import msgspec

from megatron_tcod.config import EvaluationConfig
from megatron_tcod.metrics import TurnScores, turn_kl
from megatron_tcod.significance import clustered_interval, pass_at, sign_flip_exact
from megatron_tcod.trajectory import Episode

VERSION = 2
MOST_BYTES = 1 << 30
SETTINGS = ("split", "temperature", "samples", "max_turns")
"""What two evaluations should share to be compared."""


class EpisodeEntry(msgspec.Struct, kw_only=True):
    """What reading asks of one entry of `tasks`."""

    task_id: str
    success: bool
    turns: int
    outcome: str
    family: str = ""
    sample: int = 0
    invalid_actions: int | None = None
    judged_actions: int | None = None
    kl_by_turn: list[float | None] | None = None


class EvaluationFile(msgspec.Struct, kw_only=True):
    """What reading asks of a record. Files of version 1 have no version and fewer figures."""

    tasks: list[EpisodeEntry]
    success: float
    interval: tuple[float, float]
    mean_turns: float
    step: int = 0
    version: int = 1
    kl_trajectory: float | None = None
    kl_by_turn: list[float | None] = []
    invalid_actions: float | None = None
    pass_at: dict[str, float] = {}
    families: dict[str, dict[str, Any]] = {}
    not_measured: dict[str, str] = {}


def evaluation_record(
    step: int,
    episodes: Sequence[Episode],
    scores: Mapping[int, Mapping[int, TurnScores]],
    *,
    config: EvaluationConfig,
    max_turns: int,
    player: str,
    seconds: float,
    kl_source: str = "",
    not_measured: Mapping[str, str] | None = None,
) -> dict[str, Any]:
    """What an evaluation file holds. `scores` are of `scores_by_turn`, by episode; KL values are `turn_kl`'s."""
    entries = [_entry(episode, scores.get(index, {})) for index, episode in enumerate(episodes)]
    missing = dict(not_measured or {})
    record: dict[str, Any] = {
        "version": VERSION,
        "step": step,
        "player": player,
        "env": episodes[0].task.env if episodes else "",
        "split": config.eval_split,
        "temperature": config.eval_temperature,
        "seed": config.eval_seed,
        "samples": config.eval_samples,
        "max_turns": max_turns,
        "seconds": seconds,
        **_rates(entries),
    }
    families = sorted({entry["family"] for entry in entries})
    record["families"] = {name: _rates([one for one in entries if one["family"] == name]) for name in families}
    solved = [entry["turns"] for entry in entries if entry["success"]]
    if solved:
        record["mean_turns_solved"] = sum(solved) / len(solved)
    if "invalid_actions" not in record:
        missing["invalid_actions"] = "the environment does not say which actions it takes"
    measured = [entry["kl_by_turn"] for entry in entries if entry.get("kl_by_turn")]
    if measured:
        record["kl_trajectory"] = sum(map(sum, measured)) / len(measured)
        record["kl_by_turn"] = mean_by_turn(measured)
        record["kl_source"] = kl_source
    return record | {"not_measured": missing, "tasks": entries}


def _entry(episode: Episode, of_turn: Mapping[int, TurnScores]) -> dict[str, Any]:
    judged = [turn.is_accepted for turn in episode.turns if turn.is_accepted is not None]
    entry: dict[str, Any] = {
        "task_id": episode.task.task_id,
        "family": episode.task.family,
        "sample": episode.sample,
        "success": episode.success and episode.outcome == "ok",
        "turns": len(episode.turns),
        "outcome": episode.outcome,
        "end_reason": episode.end_reason,
    }
    counts = {
        "prompt_tokens": sum(turn.prompt_tokens for turn in episode.turns),
        "generated_tokens": sum(len(turn.token_ids) for turn in episode.turns),
    }
    entry |= {name: count for name, count in counts.items() if count}
    if judged:
        entry |= {"invalid_actions": judged.count(False), "judged_actions": len(judged)}
    if of_turn:
        entry["kl_by_turn"] = [turn_kl(of_turn[turn]) for turn in sorted(of_turn)]
    if episode.detail:
        entry["detail"] = episode.detail[:1000]
    return entry


def _rates(entries: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Success, its interval, pass@k, turns and invalid actions over some entries."""
    counts = successes_by_task(entries)
    trials = min((tried for _, tried in counts.values()), default=0)
    rates: dict[str, Any] = {
        "success": sum(solved for solved, _ in counts.values()) / max(len(entries), 1),
        "interval": list(clustered_interval([solved for solved, _ in counts.values()], trials=max(trials, 1))),
        "pass_at": {
            str(k): sum(pass_at(k, successes=solved, trials=tried) for solved, tried in counts.values()) / len(counts)
            for k in shown_tries(trials)
        },
        "mean_turns": sum(entry["turns"] for entry in entries) / max(len(entries), 1),
        "episodes": len(entries),
    }
    judged = sum(entry.get("judged_actions") or 0 for entry in entries)
    if judged:
        rates["invalid_actions"] = sum(entry.get("invalid_actions") or 0 for entry in entries) / judged
    return rates


def successes_by_task(entries: Sequence[Mapping[str, Any]]) -> dict[str, tuple[int, int]]:
    """Task id -> (episodes that solve it, episodes)."""
    outcomes: dict[str, list[bool]] = defaultdict(list)
    for entry in entries:
        outcomes[entry["task_id"]].append(entry["success"])
    return {task_id: (sum(found), len(found)) for task_id, found in outcomes.items()}


def shown_tries(trials: int) -> list[int]:
    """1, 2, 4, ... and all tries."""
    return sorted({2**power for power in range(trials.bit_length()) if 2**power <= trials} | ({trials} - {0}))


def mean_by_turn(by_episode: Sequence[Sequence[float | None]]) -> list[float | None]:
    """Mean over the episodes that reached each turn and have a figure there."""
    means: list[float | None] = []
    for turn in range(max(map(len, by_episode), default=0)):
        values = [kl[turn] for kl in by_episode if len(kl) > turn and kl[turn] is not None]
        means.append(sum(values) / len(values) if values else None)
    return means


def write_evaluation(path: Path, record: Mapping[str, Any]) -> None:
    """Complete or absent: written beside and renamed. A number that is not finite becomes null."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_suffix(".partial")
    beside.write_bytes(msgspec.json.encode(record))
    os.replace(beside, path)


def read_evaluation(path: str) -> dict[str, Any]:
    """An evaluation file of this version or of the first; ValueError names what is wrong with anything else."""
    fix = "give a file that evaluate or train wrote"
    try:
        size = Path(path).stat().st_size
        if size > MOST_BYTES:
            raise ValueError(f"evaluation {path} has {size} bytes, expected at most {MOST_BYTES}; {fix}")
        record = msgspec.json.decode(Path(path).read_bytes())
    except OSError as error:
        raise ValueError(f"evaluation {path}: {error.strerror}; {fix}") from None
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ValueError(f"evaluation {path} is no JSON ({error}); {fix}") from None
    version = record.get("version", 1) if isinstance(record, dict) else 1
    if version not in (1, VERSION):
        raise ValueError(f"evaluation {path} has version {version!r}, expected at most {VERSION}; update megatron_tcod")
    try:
        read = msgspec.convert(record, EvaluationFile)
    except msgspec.ValidationError as error:
        raise ValueError(f"evaluation {path} is no evaluation record: {error}; {fix}") from None
    if not read.tasks:
        raise ValueError(f"evaluation {path} holds no task; {fix}")
    pairs = [(one.task_id, one.sample) for one in read.tasks]
    if len(set(pairs)) < len(pairs) and version > 1:
        again = next(pair for index, pair in enumerate(pairs) if pair in pairs[:index])
        raise ValueError(f"evaluation {path}: task {again[0]!r}, sample {again[1]} is there twice; {fix}")
    return record


def summary_lines(name: str, record: Mapping[str, Any]) -> list[str]:
    """An evaluation as text."""
    low, high = record["interval"]
    entries, counts = record["tasks"], successes_by_task(record["tasks"])
    trials = min(tried for _, tried in counts.values())
    of = f"{sum(entry['success'] for entry in entries)}/{len(entries)}"
    if trials > 1:
        of = f"pass@1, {trials} samples of {len(counts)} tasks"
    lines = [
        f"{name}: success {record['success']:.1%} ({of}, 95 % interval {low:.1%} to {high:.1%}), "
        f"{record['mean_turns']:.1f} turns on average"
    ]
    if trials > 1 and record.get("pass_at"):
        lines.append("  " + ", ".join(f"pass@{k} {rate:.1%}" for k, rate in record["pass_at"].items()))
    if len(record.get("families", {})) > 1:
        shown = [f"{family} {rates['success']:.1%}" for family, rates in record["families"].items()]
        lines.append(f"  by family: {', '.join(shown)}")
    if record.get("invalid_actions") is not None:
        lines.append(f"  invalid actions: {record['invalid_actions']:.1%}")
    for outcome in sorted({entry["outcome"] for entry in entries} - {"ok"}):
        number = sum(entry["outcome"] == outcome for entry in entries)
        lines.append(f"  {outcome}: {number} episodes, counted as not solved")
    if record.get("kl_trajectory") is not None:
        by_turn = record.get("kl_by_turn") or mean_by_turn([entry.get("kl_by_turn") or [] for entry in entries])
        shown = " ".join("-" if kl is None else f"{kl:.3f}" for kl in by_turn)
        lines.append(f"  trajectory KL {record['kl_trajectory']:.3f}; by turn: {shown}")
    lines += [f"  no {figure}: {reason}" for figure, reason in record.get("not_measured", {}).items()]
    return lines


def comparison_lines(records: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Exact paired tests over the tasks that two evaluations share."""
    lines = []
    for (name_a, a), (name_b, b) in combinations(records.items(), 2):
        tried_a, tried_b = successes_by_task(a["tasks"]), successes_by_task(b["tasks"])
        shared = [task_id for task_id in tried_a if task_id in tried_b]
        if not shared:
            lines.append(f"{name_a} and {name_b} share no task; no paired test")
            continue
        lines.append(f"{name_a} against {name_b} on {len(shared)} shared tasks: {_paired(tried_a, tried_b, shared)}")
        for setting in SETTINGS:
            if setting in a and setting in b and a[setting] != b[setting]:
                lines.append(f"  with unlike settings: {setting} {a[setting]} against {b[setting]}")
    return lines


def _paired(
    tried_a: Mapping[str, tuple[int, int]], tried_b: Mapping[str, tuple[int, int]], shared: Sequence[str]
) -> str:
    """McNemar's exact test where each task was tried once, sign flips of the tasks' differences where more often."""
    pairs = [(tried_a[task_id], tried_b[task_id]) for task_id in shared]
    unit = math.lcm(*(tried for pair in pairs for _, tried in pair))
    differences = [a * (unit // of_a) - b * (unit // of_b) for (a, of_a), (b, of_b) in pairs]
    p = sign_flip_exact(differences)
    told = f"p {f'= {p:.4f}' if p >= 1e-4 else '< 0.0001'}"
    if unit == 1:
        only_a, only_b = differences.count(1), differences.count(-1)
        return f"only the first solves {only_a}, only the second {only_b}; exact McNemar {told}"
    mean = sum(differences) / unit / len(pairs)
    return f"success differs by {mean:+.1%} (first minus second); exact sign-flip test over tasks {told}"
