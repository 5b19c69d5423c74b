"""Demonstration files: our own JSON Lines, published ones that name a game, and lists of actions for any environment.

    write_demonstrations("demos.jsonl", demonstrations)
    demonstrations = read_demonstrations("demos.jsonl", "household")
    published = read_demonstrations("train_expert.jsonl", "alfworld", root="games")
    difference = replay_difference(Household, demonstrations[0])       # "" where a fresh episode shows what was recorded

Our own, version 2, one object a line:

    {"version":2,"demonstration":{...},"sha256":"..."}             the fields of `trajectory.Demonstration`
    {"version":2,"end":{"demonstrations":1,"sha256":"..."}}        the last line

A line's sha256 is that of its own bytes without that key, `{"version":2,"demonstration":{...}}`; the last line's is that of
all bytes before it (since the previous such line, so that files may be concatenated). A file of version 1 has neither and
is read as it is.

Published (kokolerk/TCOD): `{"game_file": PATH, "actions": [...]}`, other keys ignored. The path is one on somebody
else's disk, so the part of it that exists below `root` counts. Any environment: `{"task_id": ID, "split": SPLIT, "actions":
[...]}`, an oracle's or a gold path. In both there are no observations, so each is played once to record them: about a
second a game. Write the result with `write_demonstrations` (`megatron_tcod.demonstrate --import`) and read that from then on.
A line without actions stays in the list as an unsuccessful demonstration without turns.

Files are read whole. A line that cannot be read stops the reading with its number and field; nothing is skipped. Two
successful demonstrations of one task are an error, since only one of them could be replayed.
"""

from __future__ import annotations

import hashlib
import logging
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import msgspec

from megatron_tcod.envs import load_env
from megatron_tcod.envs.alfworld import locate_game, resolve_root, task_of
from megatron_tcod.envs.base import EnvironmentFamily, EnvironmentFault, Step
from megatron_tcod.trajectory import Demonstration, DemonstrationTurn, Task

VERSION = 2
MOST_LINE_BYTES = 64 << 20
_SEAL = re.compile(rb',"sha256":"([0-9a-f]{64})"\}\Z')
_FIX = "remove the line, or write the file again"

logger = logging.getLogger(__name__)


class RecordedLine(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """A line of our own files. Example: `{"version": 1, "demonstration": {"task": {...}, "turns": [...], ...}}`"""

    version: int
    demonstration: Demonstration
    sha256: str = ""


class EndFigures(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """How many lines there are and the hash of their bytes."""

    demonstrations: int
    sha256: str


class EndLine(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """The last line of our own files. Example: `{"version": 2, "end": {"demonstrations": 3, "sha256": "..."}}`"""

    version: int
    end: EndFigures


class PublishedLine(msgspec.Struct, kw_only=True):
    """A line of a published file. Example: `{"game_file": "/data/train/.../game.tw-pddl", "actions": ["look"]}`"""

    game_file: str
    actions: list[str] = []


class ActionsLine(msgspec.Struct, kw_only=True):
    """An oracle's actions. Example: `{"task_id": "boil/3", "split": "train", "actions": ["look around"]}`"""

    task_id: str
    split: str
    actions: list[str]


KINDS = {"demonstration": RecordedLine, "end": EndLine, "game_file": PublishedLine, "actions": ActionsLine}
"""The key that tells a line's kind, first match."""


def write_demonstrations(path: str | Path, demonstrations: Iterable[Demonstration]) -> int:
    """Write all demonstrations, replacing the file in one go once they are on disk; how many there were."""
    path = Path(path)
    staging = path.with_name(f"{path.name}.partial")
    total = _Total()
    with open(staging, "wb") as file:
        for demonstration in demonstrations:
            line = seal(demonstration)
            file.write(line)
            total.add(line)
        end = EndLine(version=VERSION, end=EndFigures(demonstrations=total.count, sha256=total.digest.hexdigest()))
        file.write(msgspec.json.encode(end) + b"\n")
        file.flush()
        os.fsync(file.fileno())
    os.replace(staging, path)
    return total.count


def seal(demonstration: Demonstration) -> bytes:
    """A demonstration as one line with its hash, newline included. ValueError where no reader would take it."""
    task_id = demonstration.task.task_id
    try:
        body = msgspec.json.encode({"version": VERSION, "demonstration": demonstration})
    except UnicodeEncodeError as error:
        raise ValueError(f"the demonstration of task {task_id!r} holds text that is no UTF-8: {error}") from error
    line = body[:-1] + b',"sha256":"%s"}\n' % hashlib.sha256(body).hexdigest().encode()
    if len(line) > MOST_LINE_BYTES:
        raise ValueError(f"the demonstration of task {task_id!r} has {len(line)} bytes, at most {MOST_LINE_BYTES} are read")
    return line


def read_demonstrations(
    path: str | Path,
    env: str | None,
    root: str | None = None,
    *,
    limit: int | None = None,
    env_options: Mapping[str, Any] | None = None,
) -> list[Demonstration]:
    """The demonstrations of a file of any kind, in its order, the first `limit` lines of it.

    `env` None takes our own files of any environment. `root` is where the games of a published file lie, the same as in
    `env_options`, with which files without observations are played. ValueError: no such file, a line that is broken,
    changed, cut off, too long, of another version or for another environment, a task that is solved twice, a game that is
    not below the root; it names file, line and field.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"demonstration file {path} does not exist; write one with megatron_tcod.demonstrate")
    options = dict(env_options or {}) | ({"root": root} if root is not None else {})
    reader = _Reader(env=env, options=options)
    with open(path, "rb") as file:
        for number, line in enumerate(_lines(file, path), start=1):
            if limit is not None and number > limit:
                return reader.found
            reader.take(line, where=f"{path}:{number}")
    if reader.total.count:
        raise ValueError(
            f"{path}: the file is cut off: no last line tells of its last {reader.total.count} demonstrations; "
            "write it again, or copy it again from where it is whole"
        )
    if not reader.found:
        raise ValueError(f"demonstration file {path} is empty; expected one JSON object a line")
    return reader.found


def _lines(file: BinaryIO, path: Path) -> Iterable[bytes]:
    number = 0
    while line := file.readline(MOST_LINE_BYTES + 1):
        number += 1
        if len(line) > MOST_LINE_BYTES:
            raise ValueError(f"{path}:{number}: the line has more than {MOST_LINE_BYTES} bytes; {_FIX}")
        yield line


@dataclass
class _Total:
    """What an end line tells about the lines before it."""

    count: int = 0
    digest: Any = field(default_factory=hashlib.sha256)

    def add(self, line: bytes) -> None:
        self.count += 1
        self.digest.update(line)


@dataclass
class _Reader:
    """The lines of a file so far."""

    env: str | None
    options: dict[str, Any]
    found: list[Demonstration] = field(default_factory=list)
    total: _Total = field(default_factory=_Total)
    """Of the lines since the last end line."""
    solved: dict[tuple[str, str], str] = field(default_factory=dict)
    """(split, task id) -> where it was solved."""
    listed: dict[str, dict[str, Task]] = field(default_factory=dict)
    """Split -> its tasks by id, for lines that name a task."""

    def take(self, line: bytes, *, where: str) -> None:
        """Read one line. ValueError names what is wrong with it."""
        read = parse_line(line, where=where)
        if isinstance(read, EndLine):
            self._end(read.end, where)
            return
        if isinstance(read, RecordedLine):
            if read.version > 1:
                self.total.add(line)
            demonstration = read.demonstration
        else:
            demonstration = record(self._task_of(read, where), read.actions, where=where, options=self.options)
        task = demonstration.task
        if self.env not in (None, task.env):
            raise ValueError(f"{where}: a demonstration for env {task.env!r}; expected {self.env!r}")
        if demonstration.success:
            first = self.solved.setdefault((task.split, task.task_id), where)
            if first != where:
                raise ValueError(f"{where}: task {task.task_id!r} is solved already in {first}; keep one of the two")
        self.found.append(demonstration)

    def _end(self, end: EndFigures, where: str) -> None:
        if end.demonstrations != self.total.count:
            raise ValueError(
                f"{where}: end.demonstrations is {end.demonstrations}, but there are {self.total.count} before it; "
                "lines were lost or added: write the file again"
            )
        if end.sha256 != self.total.digest.hexdigest():
            raise ValueError(f"{where}: end.sha256 is not that of the lines before it: write the file again")
        self.total = _Total()

    def _task_of(self, line: PublishedLine | ActionsLine, where: str) -> Task:
        if self.env is None:
            raise ValueError(f"{where}: the line holds no observations; import the file with megatron_tcod.demonstrate first")
        if isinstance(line, PublishedLine):
            if self.env != "alfworld":
                raise ValueError(f"{where}: lines with game_file are alfworld's; expected lines for env {self.env!r}")
            return task_of(locate_game(line.game_file, resolve_root(self.options.get("root")), where=where))
        if line.split not in self.listed:
            tasks = load_env(self.env).tasks(line.split, **self.options)
            self.listed[line.split] = {task.task_id: task for task in tasks}
        try:
            return self.listed[line.split][line.task_id]
        except KeyError:
            num_tasks = len(self.listed[line.split])
            raise ValueError(
                f"{where}: task_id {line.task_id!r} is none of the {num_tasks} tasks of {self.env} {line.split}; {_FIX}"
            ) from None


def parse_line(line: bytes, *, where: str) -> RecordedLine | EndLine | PublishedLine | ActionsLine:
    """A line as one of KINDS, its hash checked. ValueError names line and field."""
    try:
        fields = msgspec.json.decode(line)
    except (msgspec.DecodeError, RecursionError) as error:
        state = "is cut off" if not line.endswith(b"\n") else "is no JSON"
        raise ValueError(f"{where}: the line {state} ({error}); expected one JSON object; {_FIX}") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"{where}: the line is no UTF-8 ({error}); expected one JSON object; {_FIX}") from error
    if not isinstance(fields, dict):
        raise ValueError(f"{where}: the line is a {type(fields).__name__}; expected one JSON object; {_FIX}")
    kind = next((kind for key, kind in KINDS.items() if key in fields), RecordedLine)
    version = fields.get("version", VERSION)
    if kind in (RecordedLine, EndLine) and (isinstance(version, bool) or version not in (1, VERSION)):
        raise ValueError(
            f"{where}: demonstration version {version!r}; expected at most {VERSION}: update the package, or record it again"
        )
    try:
        read = msgspec.convert(fields, kind)
    except (msgspec.ValidationError, ValueError) as error:
        expected = "version and demonstration, game_file and actions, or task_id, split and actions"
        raise ValueError(f"{where}: {error}; expected {expected}; {_FIX}") from error
    if isinstance(read, RecordedLine) and (read.version > 1 or read.sha256):
        check_seal(line, where=where)
    return read


def check_seal(line: bytes, *, where: str) -> None:
    """ValueError where a line's bytes are not those that were written."""
    line = line.removesuffix(b"\n")
    seal = _SEAL.search(line)
    if seal is None:
        raise ValueError(f"{where}: sha256 is not the line's last field; it was changed since it was written; {_FIX}")
    if hashlib.sha256(line[: seal.start()] + b"}").hexdigest().encode() != seal[1]:
        raise ValueError(f"{where}: sha256 does not fit the line; it was changed since it was written; {_FIX}")


def record(task: Task, actions: list[str], *, where: str, options: Mapping[str, Any]) -> Demonstration:
    """Play actions once, and keep what was seen."""
    turns: list[DemonstrationTurn] = []
    step = Step("")
    episode = load_env(task.env).make(task, **options)
    try:
        if actions:
            step = Step(episode.reset())
        for action in actions:
            if step.done:
                logger.warning("%s: solved by %d of %d commands; others unused", where, len(turns), len(actions))
                break
            turns.append(DemonstrationTurn(observation=step.observation, action=action, text=action))
            step = episode.step(action)
    except EnvironmentFault as fault:
        raise ValueError(f"{where}: the environment broke at command {len(turns)} of {len(actions)}: {fault}") from fault
    finally:
        episode.close()
    return Demonstration(
        task=task,
        turns=turns,
        success=bool(step.info.get("success")),
        source="published",
        final_observation=step.observation,
    )


def replay_difference(family: type[EnvironmentFamily], demonstration: Demonstration, **options: Any) -> str:
    """What a fresh episode shows otherwise than the recording, first difference; empty where nothing does."""
    episode = family.make(demonstration.task, **options)
    try:
        step = Step(episode.reset())
        for index, turn in enumerate(demonstration.turns):
            if step.done:
                return f"turn {index}: the episode is over, {len(demonstration.turns)} turns are recorded"
            if turn.observation and family.normalise(turn.observation) != family.normalise(step.observation):
                return f"turn {index}: recorded {turn.observation!r}, seen {step.observation!r}"
            step = episode.step(turn.action)
    except EnvironmentFault as fault:
        return f"the environment broke: {fault}"
    finally:
        episode.close()
    last = demonstration.final_observation
    if last and family.normalise(last) != family.normalise(step.observation):
        return f"at the end: recorded {last!r}, seen {step.observation!r}"
    if demonstration.success != bool(step.info.get("success")):
        return f"at the end: recorded success {demonstration.success}, seen {not demonstration.success}"
    return ""
