"""What a reader should distrust: oddities of each run, and limits of comparing them.

Each note is `{"level": "warning" | "info", "run": index or None, "text": ...}`. Thresholds are stated in the text that
they trigger, so that a note can be judged without this file.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from megatron_tcod.report.comparison import outcome_counts
from megatron_tcod.report.run import Run, mean


def find_notes(runs: Sequence[Run], problems: Sequence[Sequence[str]]) -> list[dict[str, Any]]:
    """All notes, warnings first; `problems[i]` is what could not be read of run i."""
    notes = []
    for index, run in enumerate(runs):
        for check in (_non_finite, _hollow_kl, _success_at_the_edge, _outcomes, _cut_short, _stale, _gap, _idle, _gaps):
            notes += [{"level": "warning", "run": index, "text": text} for text in check(run)]
        for check in (_demonstrations_only, _samples_are_not_tasks):
            notes += [{"level": "info", "run": index, "text": text} for text in check(run)]
        notes += [{"level": "info", "run": index, "text": text} for text in (*run.problems, *problems[index])]
    notes += [{"level": "info", "run": None, "text": text} for text in _limits_of_comparison(runs)]
    return sorted(notes, key=lambda note: note["level"] != "warning")


def _hollow_kl(run: Run) -> Iterator[str]:
    """KL falls while success collapses: the student moved to where the teacher agrees and nothing happens."""
    kl_before, kl_after = _thirds(run.column("kl/trajectory"))
    if run.evaluations and len(run.evaluations) > 1:
        before, after = max(point.success for point in run.evaluations[:-1]), run.evaluations[-1].success
        source = "held-out success (best earlier evaluation to the last)"
    elif run.config.get("curriculum.curriculum") == "full":
        before, after = _thirds(run.column("rollout/success"))  # with a moving window this falls or rises by design
        source = "rollout success (first to last third of the steps)"
    else:
        return
    if None in (kl_before, kl_after, before, after):
        return
    if kl_after < 0.75 * kl_before and before >= 0.05 and after < 0.5 * before:
        yield (
            f"KL falls while success collapses: trajectory KL {kl_before:.3g} to {kl_after:.3g} (first to last third), "
            f"{source} {before:.1%} to {after:.1%}. The student may have found states where the teacher agrees and "
            "nothing happens, such as repeating itself; read its late episodes before trusting the KL."
        )


def _success_at_the_edge(run: Run) -> Iterator[str]:
    final = run.final_evaluation
    if final is not None and final.num_solved == 0:
        yield f"No held-out task solved ({len(final.tasks)} played): nothing can be said about which method is better."
    if final is not None and final.num_solved == len(final.tasks):
        yield f"Every held-out task solved ({len(final.tasks)} played): the tasks are too easy to tell methods apart."
    if run.total("rollout/success") == 0:
        yield "Not one rollout succeeded during training: the student never saw what reaching the goal looks like."


def _outcomes(run: Run) -> Iterator[str]:
    counts = {key.removeprefix("outcome/"): n for key, n in outcome_counts(run).items() if key.startswith("outcome/")}
    total, wrong = sum(counts.values()), {name: n for name, n in counts.items() if name != "ok"}
    if wrong:
        listed = ", ".join(f"{name} {n:,}" for name, n in sorted(wrong.items(), key=lambda item: -item[1]))
        share = sum(wrong.values()) / total
        yield f"{sum(wrong.values()):,} of {total:,} episodes ({share:.1%}) were not trained on: {listed}."


def _cut_short(run: Run) -> Iterator[str]:
    counts = {key.removeprefix("end/"): n for key, n in outcome_counts(run).items() if key.startswith("end/")}
    total, cut = sum(counts.values()), counts.get("context_length", 0)
    if total and cut > 0.05 * total:
        yield f"{cut / total:.1%} of episodes ended because the context was full (more than 5%)."


def _non_finite(run: Run) -> Iterator[str]:
    for key in ("train/loss", "train/grad_norm", "kl/token", "kl/trajectory"):
        steps = [record["step"] for record in run.steps if key in record and record[key] is None]
        if steps:
            yield f"{key} was not a finite number in {len(steps)} step(s), first in step {steps[0]}."


def _stale(run: Run) -> Iterator[str]:
    lag = [value for value in run.column("weights/lag") if value]
    if lag:
        yield f"Sampled with old weights in {len(lag)} step(s), up to {max(lag):g} steps behind."


def _gap(run: Run) -> Iterator[str]:
    gap = mean(run.column("logprob/rollout_gap"))
    if gap is not None and gap > 0.02:
        yield f"Engine and trainer disagree: mean |log-probability difference| {gap:.3f} nats a token (more than 0.02)."


def _idle(run: Run) -> Iterator[str]:
    idle = sum(value == 0 for value in run.column("tokens/trained"))
    if idle:
        yield f"{idle} step(s) had nothing to train on."


def _gaps(run: Run) -> Iterator[str]:
    steps = [record["step"] for record in run.steps]
    if steps[-1] - steps[0] + 1 != len(steps):
        yield f"Steps {steps[0]} to {steps[-1]} are recorded with {steps[-1] - steps[0] + 1 - len(steps)} missing."


def _demonstrations_only(run: Run) -> Iterator[str]:
    if run.total("tokens/generated") == 0:
        yield "Nothing was sampled in training (SFT): its rollout success and episodes are the demonstrations' own."


def _samples_are_not_tasks(run: Run) -> Iterator[str]:
    final = run.final_evaluation
    if final is None:
        return
    num_tasks = len({task.task_id for task in final.tasks})
    if num_tasks < len(final.tasks):
        yield (
            f"The evaluation holds {len(final.tasks)} episodes of {num_tasks} tasks. Episodes of one task are alike, "
            "so the interval and the paired tests count by task."
        )


def _limits_of_comparison(runs: Sequence[Run]) -> Iterator[str]:
    evaluated = [run for run in runs if run.final_evaluation is not None]
    widths = [100 * (high - low) for low, high in (run.final_evaluation.interval for run in evaluated)]
    if widths and max(widths) > 20:
        yield f"95% intervals of held-out success are up to {max(widths):.0f} points wide: few tasks were played."
    if len(runs) > 1:
        yield "Each run is one training seed. Intervals cover the choice of tasks, not what another seed would give."
        lasts = [run.steps[-1]["step"] for run in runs]
        if len(set(lasts)) > 1:
            listed = ", ".join(f"{run.name} {last}" for run, last in zip(runs, lasts, strict=True))
            yield f"The runs stop at different steps: {listed}."
    if len({frozenset(run.final_evaluation.outcomes()) for run in evaluated}) > 1:
        yield "The runs were evaluated on different tasks; pairs are compared on the tasks that both played."
    if len(evaluated) > 2:
        num_pairs = len(evaluated) * (len(evaluated) - 1) // 2
        yield f"The p-values of the {num_pairs} pairs are not corrected for their number."


def _thirds(values: Sequence[float | None]) -> tuple[float | None, float | None]:
    """Means of the first and the last third of what is known."""
    known = [value for value in values if value is not None]
    third = len(known) // 3
    return (mean(known[:third]), mean(known[-third:])) if third else (None, None)
