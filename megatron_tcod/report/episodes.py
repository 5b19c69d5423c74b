"""The episodes a page shows: a few of the first, a middle and the last step, clipped so that the page stays small.

    episodes, problems = sample_episodes(Path("runs/f2b"), max_bytes=1_500_000)

The journals are read twice: a light pass that finds out what there is, and the lines that were chosen. Of each step,
successes, failures and episodes that went wrong take turns; the choice is the same every time. A clipped text is
`[beginning, number of characters left out, end]` instead of a string.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec

from megatron_tcod.journal import scan_journal, unseal
from megatron_tcod.report.run import number
from megatron_tcod.report.series import shorten

EPISODES_PER_STEP = 4
MAX_TEXT = 1_600
MAX_TOKENS_PER_TURN = 400
MAX_TURNS = 80


class Glance(msgspec.Struct):
    """What the choice needs of a record."""

    step: int
    outcome: str
    success: bool = False


Place = tuple[Path, int]


def sample_episodes(directory: Path, *, max_bytes: int) -> tuple[list[dict[str, Any]], list[str]]:
    """Episodes as the page wants them, oldest step first, at most `max_bytes` of JSON; and what was wrong."""
    problems: list[str] = []
    places: dict[int, dict[str, list[Place]]] = {}
    paths = sorted(directory.glob("trajectories*.jsonl"))
    for path in paths:
        num_bad = 0
        for offset, glance in scan_journal(path, Glance):
            if glance is None:
                num_bad += 1
                continue
            kind = glance.outcome if glance.outcome != "ok" else "success" if glance.success else "failure"
            places.setdefault(glance.step, {}).setdefault(kind, []).append((path, offset))
        if num_bad:
            problems.append(f"{path.name}: {num_bad} unreadable line(s) skipped")
    if not places:
        problems.append("no trajectories: there are no episodes to read" if not paths else "no readable trajectory")
        return [], problems
    steps = sorted(places)
    shown = sorted({steps[0], steps[len(steps) // 2], steps[-1]})
    chosen = [place for step in shown for place in choose(places[step])]
    return _load(chosen, max_bytes, problems), problems


def choose(by_kind: dict[str, list[Place]]) -> list[Place]:
    """`EPISODES_PER_STEP` of a step's episodes: each kind in turn, success first, in the order they were written."""
    order = sorted(by_kind, key=lambda kind: (kind != "success", kind != "failure", kind))
    queues = [list(by_kind[kind]) for kind in order]
    chosen: list[Place] = []
    while any(queues) and len(chosen) < EPISODES_PER_STEP:
        for queue in queues:
            if queue and len(chosen) < EPISODES_PER_STEP:
                chosen.append(queue.pop(0))
    return chosen


def _load(places: Sequence[Place], max_bytes: int, problems: list[str]) -> list[dict[str, Any]]:
    # Each place gets an equal share of the budget, and what it leaves goes to those behind it.
    episodes, num_left_out = [], 0
    for index, (path, offset) in enumerate(places):
        with open(path, "rb") as file:
            file.seek(offset)
            record = unseal(file.readline())
        try:
            episode = present(record or {})
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            problems.append(f"{path.name}: an episode is not in the expected form and is not shown ({error!r})")
            continue
        size = len(json.dumps(episode, ensure_ascii=False).encode("utf-8", "replace"))
        if size > max_bytes // (len(places) - index):
            num_left_out += 1
            continue
        max_bytes -= size
        episodes.append(episode)
    if num_left_out:
        problems.append(f"{num_left_out} sampled episode(s) are too long to be shown in a page of this size")
    return episodes


def present(record: dict[str, Any]) -> dict[str, Any]:
    """A record of `metrics.trajectory_record` as the page's reader takes it."""
    turns = record["turns"]
    scores = ("token_texts", "tokens_kl", "student_logprobs", "teacher_logprobs")
    columns = [record.get(key) or [] for key in scores]
    kl_values = [kl for turn in record.get("tokens_kl") or [] for kl in turn if number(kl) is not None]
    return {
        "task": clip(str(record["task"].get("task_id", ""))),
        "family": clip(str(record["task"].get("family", ""))),
        "sample": int(record.get("sample", 0)),
        "step": int(record["step"]),
        "version": int(record.get("weight_version", 0)),
        "k": number(record.get("curriculum_k")),
        "window": [int(record["window"]["start"]), int(record["window"]["stop"])],
        "outcome": clip(str(record["outcome"])),
        "end": clip(str(record.get("end_reason", ""))),
        "success": bool(record.get("success")),
        "reward": number(record.get("reward")),
        "detail": clip(str(record.get("detail") or "")),
        "kl": shorten(sum(kl_values)) if kl_values else None,
        "hidden_turns": max(0, len(turns) - MAX_TURNS),
        "turns": [
            _present_turn(turn, [column[index] if index < len(column) else [] for column in columns])
            for index, turn in enumerate(turns[:MAX_TURNS])
        ],
    }


def clip(text: str, most: int = MAX_TEXT) -> str | list[Any]:
    """The text, or `[beginning, number of characters left out, end]` when it is longer than `most`."""
    if len(text) <= most:
        return text
    head, tail = most * 3 // 4, most // 4
    return [text[:head], len(text) - head - tail, text[-tail:]]


def _present_turn(turn: dict[str, Any], columns: Sequence[list[Any]]) -> dict[str, Any]:
    texts, kl, student, teacher = columns
    shown = {
        "index": int(turn["index"]),
        "actor": "student" if turn["actor"] == "student" else "teacher",
        "observation": clip(str(turn["observation"])),
        "action": clip(str(turn["action"]), 300),
        "text": clip(str(turn["text"])),
        "reward": number(turn.get("reward")),
        "done": bool(turn.get("done")),
        "finish": clip(str(turn.get("finish_reason", "")), 40),
        "cached": [int(turn.get("cached_tokens", 0)), int(turn.get("prompt_tokens", 0))],
    }
    if texts and len(kl) == len(texts):
        known = [value for value in map(number, kl) if value is not None]
        shown["kl"] = shorten(sum(known))
        shown["hidden_tokens"] = max(0, len(texts) - MAX_TOKENS_PER_TURN)
        shown["tokens"] = [clip(str(text), 80) for text in texts[:MAX_TOKENS_PER_TURN]]
        for name, values in (("token_kl", kl), ("student", student), ("teacher", teacher)):
            few = values[:MAX_TOKENS_PER_TURN] if len(values) == len(texts) else []
            shown[name] = [shorten(number(value), 4) for value in few]
    return shown
