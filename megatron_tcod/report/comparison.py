"""What the runs come to: a headline row each, a paired test for each pair, and where their settings differ.

Success is of the last evaluation. Pairs are compared on the tasks that both played, by the exact McNemar test, which
where tasks were played several times is the sign-flip test over tasks; without correction for the number of pairs.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from itertools import combinations
from typing import Any

from megatron_tcod.report.run import Run, mean
from megatron_tcod.report.series import shorten
from megatron_tcod.significance import discordant, sign_flip_exact

_LAST_STEPS = 5


def headline(run: Run) -> dict[str, Any]:
    """The run's row of the table; None for what is not known."""
    row: dict[str, Any] = {
        "steps": run.steps[-1]["step"],
        "curriculum": run.config.get("curriculum.curriculum"),
        "wall": run.total("seconds/step"),
        "generated": run.total("tokens/generated"),
        "trained": run.total("tokens/trained"),
        "train_kl": shorten(mean(run.column("kl/trajectory")[-_LAST_STEPS:])),
        "held_out": None,
    }
    final = run.final_evaluation
    if final is not None:
        row["held_out"] = {
            "step": final.step,
            "split": final.split,
            "solved": final.num_solved,
            "tasks": len(final.tasks),
            "success": final.success,
            "interval": final.interval,
            "turns": shorten(final.mean_turns()),
            "kl": shorten(final.trajectory_kl()),
        }
    return row


def evaluation_points(run: Run) -> list[dict[str, Any]]:
    """Each evaluation with its interval and the wall-clock at which training stood."""
    wall = run.wall_clock()
    points = []
    for evaluation in run.evaluations:
        done = [index for index, record in enumerate(run.steps) if record["step"] <= evaluation.step]
        elapsed = None if wall is None else (wall[done[-1]] if done else 0.0)
        points.append(
            {
                "step": evaluation.step,
                "wall": elapsed,
                "success": evaluation.success,
                "interval": evaluation.interval,
                "tasks": len(evaluation.tasks),
                "turns": shorten(evaluation.mean_turns()),
                "kl": shorten(evaluation.trajectory_kl()),
            }
        )
    return points


def families(run: Run) -> dict[str, list[int]]:
    """Family of held-out tasks -> [solved, played] in the last evaluation."""
    counts: dict[str, list[int]] = {}
    for task in run.final_evaluation.tasks if run.final_evaluation else []:
        solved_and_played = counts.setdefault(task.family or "all", [0, 0])
        solved_and_played[0] += task.success
        solved_and_played[1] += 1
    return dict(sorted(counts.items()))


def pairs(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """Every two runs that were evaluated on common tasks; `a` and `b` are places in `runs`."""
    tests = []
    for (a, run_a), (b, run_b) in combinations(enumerate(runs), 2):
        if run_a.final_evaluation is None or run_b.final_evaluation is None:
            continue
        if run_a.final_evaluation.split != run_b.final_evaluation.split:
            continue
        outcomes_a, outcomes_b = run_a.final_evaluation.outcomes(), run_b.final_evaluation.outcomes()
        shared = outcomes_a.keys() & outcomes_b.keys()
        if not shared:
            continue
        only_a, only_b = discordant(outcomes_a, outcomes_b)
        by_task: Counter[str] = Counter()
        for key in shared:
            by_task[key[0]] += outcomes_a[key] - outcomes_b[key]
        both = sum(outcomes_a[key] and outcomes_b[key] for key in shared)
        tests.append(
            {
                "a": a,
                "b": b,
                "tasks": len(shared),
                "both": both,
                "only_a": only_a,
                "only_b": only_b,
                "neither": len(shared) - both - only_a - only_b,
                "p": sign_flip_exact(list(by_task.values())),
            }
        )
    return tests


def costs(run: Run) -> dict[str, Any]:
    """Seconds by phase (what no phase accounts for is `other`) and tokens by kind, summed over the run."""
    no_phases = {"seconds/step", "seconds/cpu"}
    keys = sorted({key for record in run.steps for key in record if key.startswith("seconds/")} - no_phases)
    phases = {key.removeprefix("seconds/"): total for key in keys if (total := run.total(key))}
    wall = run.total("seconds/step")
    if wall is not None and wall > sum(phases.values()):
        phases["other"] = wall - sum(phases.values())
    kinds = ("generated", "trained", "packed", "prompt", "cached")
    tokens = {kind: total for kind in kinds if (total := run.total(f"tokens/{kind}")) is not None}
    return {"phases": {name: shorten(seconds) for name, seconds in phases.items()}, "tokens": tokens}


def outcome_counts(run: Run) -> dict[str, int]:
    """How often each outcome and each end of an episode occurred, those that did."""
    prefixes = ("rollout/outcome/", "rollout/end/")
    keys = sorted({key for record in run.steps for key in record if key.startswith(prefixes)})
    return {key.removeprefix("rollout/"): int(total) for key in keys if (total := run.total(key))}


def differing_settings(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """Settings that are not the same in all runs that have a configuration, as text."""
    configured = [run for run in runs if run.config]
    keys = sorted({key for run in configured for key in run.config})
    rows = []
    for key in keys:
        if len({repr(run.config.get(key)) for run in configured}) > 1:
            rows.append({"key": key, "values": [setting(run.config[key]) if key in run.config else "" for run in runs]})
    return rows


def setting(value: Any) -> str:
    """A setting's value as a reader writes it, at most 200 characters."""
    text = value if isinstance(value, str) else repr(value)
    return text if len(text) <= 200 else text[:200] + " ..."
