"""Everything into one HTML file: template, style and scripts from this folder, the data as an inert JSON block.

Nothing from a run is ever markup. Data goes into a `<script type="application/json">` with `<`, `>` and `&` escaped,
and the scripts put it on the page as text nodes. The policy in the page's head allows exactly the style and the script
built in here, by their SHA-256, and no request of any kind.
"""

from __future__ import annotations

import base64
import hashlib
import html
import json
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path
from string import Template
from typing import Any

from megatron_tcod.report.comparison import (
    costs,
    differing_settings,
    evaluation_points,
    families,
    headline,
    outcome_counts,
    pairs,
    setting,
)
from megatron_tcod.report.episodes import sample_episodes
from megatron_tcod.report.notes import find_notes
from megatron_tcod.report.run import Run, read_run
from megatron_tcod.report.series import curves, heatmap, shorten

MAX_EPISODE_BYTES = 4_000_000
"""For the episodes of all runs together."""

_SCRIPTS = ("base.js", "chart.js", "heatmap.js", "tables.js", "reader.js", "page.js")


def build_report(directories: Sequence[Path], *, title: str = "TCOD run report") -> str:
    """The page for these run directories. ValueError when one of them has no usable metrics."""
    runs = [
        read_run(directory, name) for directory, name in zip(directories, name_runs(directories), strict=True)
    ]
    return render(collect(runs), title)


def name_runs(directories: Sequence[Path]) -> list[str]:
    """Directory names, each with as many parents in front as it takes to tell them apart."""
    parts = [directory.resolve().parts for directory in directories]
    if len(set(parts)) != len(parts):
        raise ValueError("a run directory was given twice; give each once")
    depth = 1
    while len({path[-depth:] for path in parts}) != len(parts):
        depth += 1
    return ["/".join(path[-depth:]).encode("utf-8", "replace").decode() for path in parts]


def collect(runs: Sequence[Run]) -> dict[str, Any]:
    """All that the page shows, as JSON-compatible values."""
    shown, problems = [], []
    for run in runs:
        episodes, episode_problems = sample_episodes(run.directory, max_bytes=MAX_EPISODE_BYTES // len(runs))
        problems.append(episode_problems)
        shown.append(_collect_run(run, episodes))
    return {
        "runs": shown,
        "pairs": pairs(runs),
        "differences": differing_settings(runs) if len(runs) > 1 else [],
        "notes": find_notes(runs, problems),
    }


def _collect_run(run: Run, episodes: list[dict[str, Any]]) -> dict[str, Any]:
    final = run.final_evaluation
    return {
        "name": run.name,
        "headline": headline(run),
        "curves": curves(run),
        "heatmap": heatmap(run),
        "evaluations": evaluation_points(run),
        "held_out_kl": [shorten(value) for value in final.mean_kl_by_turn()] if final else [],
        "families": families(run),
        "costs": costs(run),
        "outcomes": outcome_counts(run),
        "episodes": episodes,
        "config": [[key, setting(value)] for key, value in run.config.items()],
    }


def render(data: dict[str, Any], title: str) -> str:
    """The page with `data` in it."""
    assets = files("megatron_tcod.report") / "assets"
    style = (assets / "page.css").read_text(encoding="utf-8")
    script = '"use strict";\n' + "\n".join((assets / name).read_text(encoding="utf-8") for name in _SCRIPTS)
    policy = (
        f"default-src 'none'; style-src '{_digest(style)}'; script-src '{_digest(script)}'; img-src data:; "
        "base-uri 'none'; form-action 'none'"
    )
    page = Template((assets / "page.html").read_text(encoding="utf-8"))
    return page.substitute(
        policy=html.escape(policy), title=html.escape(title), style=style, script=script, data=embed(data)
    )


def embed(data: Any) -> str:
    """JSON that is safe inside a script element: no character of it can end the element or start another."""
    text = json.dumps(data, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    for character in "<>&\u2028\u2029":  # they occur in strings only, where an escape means the same
        text = text.replace(character, f"\\u{ord(character):04x}")
    return text.encode("utf-8", "replace").decode()


def _digest(text: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
