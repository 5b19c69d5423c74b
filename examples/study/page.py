"""The study's page, from its results file alone: `python examples/study/page.py results.jsonl --output docs/study.md`.

Writes the page, and in a folder named like it the figures and a copy of the results. No figure and no sentence about
one is written by hand: the same file gives the same page.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

from megatron_tcod.config import (  # noqa: E402
    CurriculumConfig,
    EnvironmentConfig,
    EvaluationConfig,
    RolloutConfig,
    run_entry_point,
    toml_value,
)
from study.analysis import (  # noqa: E402
    PAIRS,
    Comparison,
    Results,
    comparisons,
    cost_rows,
    findings,
    mean,
    method_rows,
    noise_rows,
    p_text,
)
from study.figures import figures  # noqa: E402
from study.results import read_results  # noqa: E402


def write_page(results_path: str | Path, page_path: str | Path) -> None:
    """Page, figures and results; existing ones are replaced, other files beside them are not touched."""
    page_path = Path(page_path)
    if page_path.suffix != ".md" or page_path.is_dir():
        raise ValueError(f"page {page_path}: expected the name of a file that ends in .md")
    results = Results(read_results(results_path))
    rows = comparisons(results)
    folder = page_path.with_suffix("")
    made = figures(results, rows)
    text = page_text(results, rows, list(made), folder.name)
    kept = Path(results_path).read_bytes()
    folder.mkdir(parents=True, exist_ok=True)
    for name, svg in made.items():
        (folder / f"{name}.svg").write_text(svg, encoding="utf-8")
    (folder / "results.jsonl").write_bytes(kept)
    page_path.write_text(text, encoding="utf-8")


def page_text(results: Results, rows: Sequence[Comparison], names: Sequence[str], folder: str) -> str:
    """The whole page as Markdown."""
    study = results.study
    finished = sum(len(group.cells) for group in results.groups)
    parts = [
        f"# {study['title']}",
        f"Made by `{study['command']}` from [its results]({folder}/results.jsonl); every figure, table and sentence on this "
        f"page follows from that file (`python examples/study/page.py {folder}/results.jsonl --output {folder}.md`).",
        f"{finished} of {study['num_cells']} runs are in it."
        + (" **It is not finished.**" if finished < study["num_cells"] else ""),
        *section("What was found", findings_text(results, rows)),
        *section("What was run", setting_text(results)),
        *section("Success after the last step", success_text(results)),
        *pictures(names, folder, "success-by-step"),
        *section("Comparisons", comparison_text(results, rows)),
        *pictures(names, folder, "differences"),
        *section("Cost of a given success", cost_text(results)),
        *pictures(names, folder, "success-by-cpu"),
        *section("KL to the teacher by turn and step", KL_TEXT),
        *pictures(names, folder, "kl-"),
        *section("The machine and its noise", noise_text(results)),
        *section("Settings", settings_text(results)),
    ]
    return "\n\n".join(parts) + "\n"


def section(title: str, text: str) -> list[str]:
    return [f"## {title}", text]


def pictures(names: Sequence[str], folder: str, prefix: str) -> list[str]:
    return [f"![{name.replace('-', ' ')}]({folder}/{name}.svg)" for name in names if name.startswith(prefix)]


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def percent(value: float | None, digits: int = 1) -> str:
    return "-" if value is None else f"{100 * value:.{digits}f} %"


def count(value: float | None) -> str:
    """A number with three digits: 950, 12.3k, 4.56M."""
    if value is None:
        return "-"
    for size, letter in ((1e6, "M"), (1e3, "k")):
        if value >= size:
            return f"{value / size:.3g}{letter}"
    return f"{value:.3g}"


def findings_text(results: Results, rows: Sequence[Comparison]) -> str:
    lines = findings(results, rows)
    if not lines:
        return "Nothing yet: no two methods have a seed in common."
    return "\n".join(line if line.startswith("  ") else f"* {line}" for line in lines)


def setting_text(results: Results) -> str:
    seeds = results.study["seeds"]
    lines = [
        f"Seeds {seeds[0]} to {seeds[-1]} ({len(seeds)}). All methods of one seed, size and world begin at one start and "
        f"take the same number of episodes a step. `full` is vanilla on-policy distillation; SFT imitates the demonstrations "
        f"that B2F replays, which are the teacher's own successes."
    ]
    for name, world in results.worlds.items():
        lines.append(f"**{name}**")
        teacher, settings = world.get("teacher"), world["settings"]
        rollout = settings.get("rollout", {})
        facts = [f"{role}: {shape_text(model)}" for role, model in world["models"].items()]
        facts.append(
            f"{steps_text(results, name)} steps of {rollout.get('rollout_batch_size', RolloutConfig().rollout_batch_size)} "
            f"episodes, horizon {rollout.get('max_turns', RolloutConfig().max_turns)} turns, window grows a turn every "
            f"{settings.get('curriculum', {}).get('eta', CurriculumConfig().eta)} step(s)"
        )
        if teacher:
            facts.append(
                f"the teacher solves {percent(teacher['success'])} of {len(teacher['solved'])} {tasks_text(settings)} in "
                f"{teacher['turns']:.1f} turns on average; {world.get('num_demonstrations', 0)} demonstrations"
            )
        starts = {
            size: results.start_success(name, size) for size in world["models"] if results.start_success(name, size)
        }
        facts += [
            f"the {size} students start at {percent(mean(values))} ({percent(min(values))} to {percent(max(values))} by seed)"
            for size, values in starts.items()
        ]
        lines.append("\n".join(f"* {fact}" for fact in facts))
    return "\n\n".join(lines)


def tasks_text(settings: dict[str, Any]) -> str:
    """What success is measured on."""
    split = settings.get("evaluation", {}).get("eval_split", EvaluationConfig().eval_split)
    trained = settings.get("environment", {}).get("train_split", EnvironmentConfig().train_split)
    return "tasks of the split that is trained on" if split == trained else f"held-out tasks (split `{split}`)"


def steps_text(results: Results, world: str) -> str:
    """`40`, or `250 (sft 429)` where a method takes another number."""
    here = [group for group in results.groups if group.world == world]
    lasts = {group.method: cell["points"][-1]["step"] for group in here for cell in group.cells.values()}
    if not lasts:
        return "no finished"
    usual = max(set(lasts.values()), key=list(lasts.values()).count)
    others = ", ".join(f"{method} {steps}" for method, steps in lasts.items() if steps != usual)
    return f"{usual} ({others})" if others else str(usual)


def shape_text(shape: dict[str, int] | str) -> str:
    """A model's fields, or the name of one that exists."""
    return shape if isinstance(shape, str) else ", ".join(f"{key} {value}" for key, value in shape.items())


def success_text(results: Results) -> str:
    header = ["world", "size", "method", "success", "95 % interval", "by seed", "turns", "KL", "student tokens", "CPU s"]
    lines = []
    for row in method_rows(results):
        group = row.group
        low, high = row.interval
        by_seed = " ".join(f"{100 * value:.0f}" for value in row.by_seed)
        kl = "-" if row.kl is None else f"{row.kl:.2f}"
        lines.append(
            [group.world, group.size, group.method, percent(row.success), f"{100 * low:.1f} to {100 * high:.1f}", by_seed]
            + [f"{row.turns:.1f}", kl, count(row.generated), f"{row.cpu:.0f}"]
        )
    return (
        table(header, lines)
        + "\n\nThe interval is a BCa bootstrap over seeds and tasks, both drawn anew. KL is the reverse KL to the teacher "
        "summed over an evaluation episode, in nats. Tokens and CPU seconds are those of a run's training steps, mean over "
        "seeds; the warm start and the teacher, which all methods share, are not in them."
    )


def comparison_text(results: Results, rows: Sequence[Comparison]) -> str:
    header = ["world", "size", "objective", "first", "second", "points", "95 % interval", "seeds won"]
    header += ["p", "Holm p", "pooled McNemar p"]
    lines = []
    for row in rows:
        low, high = row.interval
        lines.append(
            [row.first.world, row.first.size, row.objective, row.first.curriculum, row.second.curriculum]
            + [f"{100 * row.mean:+.1f}", f"{100 * low:+.1f} to {100 * high:+.1f}", f"{row.wins} of {row.num_seeds}"]
            + [p_text(row.p), p_text(row.p_adjusted), p_text(row.mcnemar)]
        )
    pairs = ", ".join(f"{a} against {b}" for a, b in PAIRS)
    return (
        f"{len(rows)} comparisons were planned with the grid ({pairs}, at each world, size and objective) and all are shown. "
        f"`p` is two-sided and paired, with seeds and tasks both random (min F'); `Holm p` is corrected for the "
        f"{sum(row.p is not None for row in rows)} tests. The pooled McNemar test takes every episode as independent, as a "
        f"comparison of single runs does: it ignores that runs of one method differ.\n\n" + table(header, lines)
    )


def cost_text(results: Results) -> str:
    header = ["world", "size", "success", "method", "seeds that reached it", "steps", "CPU s", "wall s", "student tokens"]
    header += ["tokens through the student in training"]
    lines = []
    for row in cost_rows(results):
        group, costs = row.group, row.costs
        shown = [f"{costs['step']:.0f}", f"{costs['cpu']:.0f}", f"{costs['wall']:.0f}"] if costs else ["-"] * 3
        shown += [count(costs.get("generated")), count(costs.get("packed"))]
        reached = f"{row.num_reached} of {len(group.cells)}"
        lines.append([group.world, group.size, percent(row.target, 0), group.method, reached, *shown])
    return (
        "At the first evaluation at or above the success, median over the seeds that got there; so a method that few seeds "
        "take there is flattered, and the resolution is the interval between evaluations. 0 steps: the start was there "
        "already. Student tokens are those it sampled; SFT samples none.\n\n" + table(header, lines)
    )


KL_TEXT = (
    "During training, on the turns that the window lets the student play: reverse KL summed over a turn's tokens, mean over "
    "seeds. White is a turn that nobody trained at that time."
)


def noise_text(results: Results) -> str:
    study, machine = results.study, results.study["machine"]
    told = ", ".join(f"{name} {value}" for name, value in machine.items() if value)
    lines = [
        f"{told}. {study['jobs']} runs at a time, each on a core of its own where there are as many. All jobs together: "
        f"{study['total_cpu'] / 3600:.2f} CPU hours, {study['total_wall'] / 3600:.2f} hours of occupied cores"
        + (f"; {study['unmeasured']} attempts ended unseen and are not in it." if study["unmeasured"] else ".")
    ]
    for row in noise_rows(results):
        same = "solves the same tasks with the same KL" if row.same else "**does not repeat its figures**"
        lines.append(
            f"* {row.name}, run again: {same}; CPU {row.cpu[0]:.1f} and {row.cpu[1]:.1f} s, "
            f"wall-clock {row.wall[0]:.1f} and {row.wall[1]:.1f} s."
        )
    ratios = [cell["points"][-1]["wall"] / cell["points"][-1]["cpu"] for cell in _cells(results) if cell["points"][-1]["cpu"]]
    if ratios:
        lines.append(
            f"* Wall-clock over CPU time of a run's training: {min(ratios):.2f} to {max(ratios):.2f}, "
            f"mean {mean(ratios):.2f}. Compare methods by CPU time and tokens."
        )
    odd = {name: total for name, total in _outcomes(results).items() if name != "ok"}
    if odd:
        lines.append(f"* Episodes with another outcome than `ok`: {', '.join(f'{n} {t}' for n, t in sorted(odd.items()))}.")
    return "\n".join(lines)


def _cells(results: Results) -> list[dict[str, Any]]:
    return [cell for group in results.groups for cell in group.cells.values()]


def _outcomes(results: Results) -> dict[str, int]:
    totals: dict[str, int] = {}
    for cell in _cells(results):
        for name, number in cell["outcomes"].items():
            totals[name] = totals.get(name, 0) + number
    return totals


def settings_text(results: Results) -> str:
    blocks = []
    for name, world in results.worlds.items():
        lines = [f"# {name}: what all of its runs share, but for the number of steps where the text names another"]
        for part, settings in world["settings"].items():
            lines += ["", f"[{part}]", *(f"{key} = {toml_value(value)}" for key, value in settings.items())]
        blocks.append("```toml\n" + "\n".join(lines) + "\n```")
    return "\n\n".join(blocks)


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("results", type=Path)
    parser.add_argument("--output", type=Path, required=True)
    given = parser.parse_args(argv)
    write_page(given.results, given.output)


if __name__ == "__main__":
    run_entry_point(main)
