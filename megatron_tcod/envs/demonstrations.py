"""Demonstration files: our own JSON Lines, and the published ones that name a game and its commands.

    write_demonstrations("demos.jsonl", demonstrations)
    demonstrations = read_demonstrations("demos.jsonl", "household")
    published = read_demonstrations("train_expert.jsonl", "alfworld", root="games")

Our own: one object a line, `{"version": 1, "demonstration": {...}}`, the fields of `trajectory.Demonstration`.
Observations are recorded with the commands, so that a replay can be checked turn by turn.

Published (kokolerk/TCOD): `{"game_file": PATH, "actions": [...]}`, other keys ignored. The path is one on somebody
else's disk, so the part of it that exists below `root` counts. There are no observations, so each game is played once
to record them: about a second a game. Write the result with `write_demonstrations` and read that from then on.
A game without commands stays in the list as an unsuccessful demonstration without turns.

Files are read whole. A line that cannot be read stops the reading with its number; nothing is skipped.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable
from pathlib import Path

import msgspec

from megatron_tcod.envs import load_env
from megatron_tcod.envs.alfworld import locate_game, resolve_root, task_of
from megatron_tcod.envs.base import Step
from megatron_tcod.trajectory import Demonstration, DemonstrationTurn

VERSION = 1

logger = logging.getLogger(__name__)


class RecordedLine(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """A line of our own files. Example: `{"version": 1, "demonstration": {"task": {...}, "turns": [...], ...}}`"""

    version: int
    demonstration: Demonstration


class PublishedLine(msgspec.Struct, kw_only=True):
    """A line of a published file. Example: `{"game_file": "/data/train/.../game.tw-pddl", "actions": ["look"]}`"""

    game_file: str
    actions: list[str] = []


def write_demonstrations(path: str | Path, demonstrations: Iterable[Demonstration]) -> int:
    """Write all demonstrations, replacing the file in one go once they are on disk; how many there were."""
    path = Path(path)
    staging = path.with_name(f"{path.name}.partial")
    count = 0
    with open(staging, "wb") as file:
        for demonstration in demonstrations:
            file.write(msgspec.json.encode(RecordedLine(version=VERSION, demonstration=demonstration)) + b"\n")
            count += 1
        file.flush()
        os.fsync(file.fileno())
    os.replace(staging, path)
    return count


def read_demonstrations(
    path: str | Path, env: str, root: str | None = None, *, limit: int | None = None
) -> list[Demonstration]:
    """The demonstrations of a file of either kind, in its order, the first `limit` lines of it.

    `root` is where the games of a published file lie. ValueError: no such file, a line that is broken, cut off, of
    another version or for another environment, or a game that is not below the root; it names file and line.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"demonstration file {path} does not exist; write one with megatron_tcod.demonstrate")
    demonstrations = []
    with open(path, "rb") as file:
        for number, line in enumerate(file, start=1):
            if limit is not None and number > limit:
                break
            where = f"{path}:{number}"
            demonstrations.append(_read_line(line, where=where, env=env, root=root))
    if not demonstrations:
        raise ValueError(f"demonstration file {path} is empty; expected one JSON object a line")
    return demonstrations


def _read_line(line: bytes, *, where: str, env: str, root: str | None) -> Demonstration:
    fix = "remove the line, or write the file again"
    try:
        fields = msgspec.json.decode(line)
    except msgspec.DecodeError as error:
        state = "is cut off" if not line.endswith(b"\n") else "is no JSON"
        raise ValueError(f"{where}: the line {state} ({error}); expected one JSON object; {fix}") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"{where}: the line is no UTF-8 ({error}); expected one JSON object; {fix}") from error
    if not isinstance(fields, dict):
        raise ValueError(f"{where}: the line is a {type(fields).__name__}; expected one JSON object; {fix}")
    kind = PublishedLine if "game_file" in fields else RecordedLine
    if kind is RecordedLine and fields.get("version", VERSION) != VERSION:
        version = fields["version"]
        raise ValueError(f"{where}: demonstration version {version!r}; expected {VERSION}: record it again")
    try:
        read = msgspec.convert(fields, kind)
    except (msgspec.ValidationError, ValueError) as error:
        expected = "version and demonstration, or game_file and actions"
        raise ValueError(f"{where}: {error}; expected {expected}; {fix}") from error
    if isinstance(read, PublishedLine):
        return _record(read, where=where, env=env, root=root)
    if read.demonstration.task.env != env:
        raise ValueError(f"{where}: a demonstration for env {read.demonstration.task.env!r}; expected {env!r}")
    return read.demonstration


def _record(line: PublishedLine, *, where: str, env: str, root: str | None) -> Demonstration:
    """Play the commands of a published line once, and keep what was seen."""
    if env != "alfworld":
        raise ValueError(f"{where}: lines with game_file are alfworld's; expected lines for env {env!r}")
    task = task_of(locate_game(line.game_file, resolve_root(root), where=where))
    turns: list[DemonstrationTurn] = []
    step = Step("")
    episode = load_env(env).make(task, root=root)
    try:
        if line.actions:
            step = Step(episode.reset())
        for action in line.actions:
            if step.done:
                logger.warning("%s: solved by %d of %d commands; others unused", where, len(turns), len(line.actions))
                break
            turns.append(DemonstrationTurn(observation=step.observation, action=action, text=action))
            step = episode.step(action)
    finally:
        episode.close()
    return Demonstration(
        task=task,
        turns=turns,
        success=bool(step.info.get("success")),
        source="published",
        final_observation=step.observation,
    )
