"""One self-contained HTML file that shows what one run, or several, did.

    python -m megatron_tcod.report runs/full runs/f2b runs/b2f --output report.html

    html = build_report([Path("runs/f2b")], title="F2B")      # the same as a string

A run directory holds what training and evaluation leave there. Only the first is required; the page says what it lacks.

    metrics.jsonl                   a journal; keys as in `megatron_tcod.metrics`
    trajectories*.jsonl             journals of `metrics.trajectory_record`; a sample of a few steps is shown
    evaluation/*.json               {"step", "split", "tasks": [{"task_id", "family", "success", "turns",
                                    "kl_by_turn"}]}
    config.toml or config.json      the resolved configuration

The page loads nothing: styles, scripts and data are inside, a Content-Security-Policy allows just those by hash, and
text from episodes reaches the document as text nodes only. It deliberately has no server, no live update and no model
calls, and says nothing about what varies between training seeds: a run is one draw.

    run.py          a run directory as numbers        series.py      curves and heatmaps, thinned to fit a page
    comparison.py   the headline table and pairs      episodes.py    which episodes are shown, clipped
    notes.py        what a reader should distrust     page.py        everything into one file
"""

from megatron_tcod.report.page import build_report

__all__ = ["build_report"]
