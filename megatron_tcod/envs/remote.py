"""The family `remote`: an environment behind a server that speaks OpenEnv's reset and step.

    env_options = {url = "http://127.0.0.1:8000", action_field = "message", observation_field = "prompt"}

    tasks = Remote.tasks("train", count=100, url="http://127.0.0.1:8000")
    episode = Remote.make(tasks[0], url="http://127.0.0.1:8000")
    print(episode.reset())

Two transports, the messages of openenv-core 0.3:

    websocket   one connection an episode at /ws; it holds the episode's state, as OpenEnv's own client has it
    http        POST /reset and POST /step. An openenv-core server builds a new environment for every HTTP request, so
                only environments that keep their episodes under the `episode_id` sent with each request work this way

An action is `{action_field: TEXT}`. An observation is the text in `observation_field`, or by default the only text that
the observation holds, or all of it as JSON. A task is a seed, or with `tasks_file` one line of a JSON Lines file:
`{"task_id": "a", "split": "train", "family": "b", "reset": {...}}`, where `reset` is sent with the reset.

It starts no server, has no expert, and follows no redirect. Docker, hubs and tool calls (MCP) are not its business.
"""

from __future__ import annotations

import json
import math
import uuid
from contextlib import suppress
from pathlib import Path
from typing import Any, Protocol

import msgspec

from megatron_tcod.envs.base import EnvironmentFault, Step
from megatron_tcod.envs.http_link import HttpLink, quote
from megatron_tcod.envs.websocket_link import WebSocketLink
from megatron_tcod.trajectory import Demonstration, Task

TRANSPORTS = ("websocket", "http")
SPLITS = ("train", "held_out")
DEFAULT_URL = "http://127.0.0.1:8000"
HELD_OUT_SEED = 1_000_000_000
"""Seeds of `held_out` start here; those of `train` start at 0."""

MAX_ACTION_CHARS = 10_000
"""Longer actions are refused unsent."""

HEALTH_DEADLINE_S = 10.0
CLOSE_DEADLINE_S = 2.0
RESET_DEADLINE_S = 120.0
STEP_DEADLINE_S = 60.0


class TaskLine(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """A line of a tasks file."""

    task_id: str
    split: str
    family: str = "remote"
    reset: dict[str, Any] = {}


class Remote:
    """Environments of other people, at a url."""

    blocking = True

    @classmethod
    def require(cls) -> None:
        """Nothing but Python."""

    @classmethod
    def tasks(
        cls,
        split: str,
        *,
        count: int | None = None,
        first: int = 0,
        url: str = DEFAULT_URL,
        transport: str = "websocket",
        action_field: str = "message",
        observation_field: str = "",
        accepted_field: str = "",
        success_reward: float = 1.0,
        tasks_file: str = "",
        num_train: int = 1000,
        num_held_out: int = 200,
        reset_deadline_s: float = RESET_DEADLINE_S,
        step_deadline_s: float = STEP_DEADLINE_S,
    ) -> list[Task]:
        """Tasks `[first, first + count)` of a split: seeds, or the lines of `tasks_file` in its order.

        `accepted_field` names a truth value of the observation that says whether the action was understood;
        `success_reward` is the last step's reward from which an episode counts as solved.
        ValueError: an unknown split or transport, more tasks than there are, or a server that does not answer.
        """
        if transport not in TRANSPORTS:
            raise ValueError(f"remote has no transport {transport!r}; use one of {', '.join(TRANSPORTS)}")
        if not action_field:
            raise ValueError("remote needs action_field, the field of the server's action that takes the text")
        if tasks_file:
            tasks = read_tasks(tasks_file, split)
        else:
            tasks = seed_tasks(split, num_train if split == "train" else num_held_out)
        if first < 0 or (count is not None and (count < 0 or first + count > len(tasks))):
            raise ValueError(f"remote {split} has {len(tasks)} tasks, [{first}, {first + (count or 0)}) were asked for")
        check_server(url)
        return tasks[first : None if count is None else first + count]

    @classmethod
    def make(
        cls, task: Task, *, tasks_file: str = "", num_train: int = 0, num_held_out: int = 0, **options: Any
    ) -> RemoteEpisode:
        """A fresh episode; it opens no connection before `reset`. The three options named here are for listing alone.
        ValueError for a task of another environment."""
        reset = task.payload.get("reset")
        if task.env != "remote" or not isinstance(reset, dict):
            raise ValueError(f"not a remote task: env {task.env!r}, payload {task.payload!r}; expected 'reset' fields")
        return RemoteEpisode(reset, **options)

    @staticmethod
    def normalise(observation: str) -> str:
        """White space collapsed."""
        return " ".join(observation.split())

    @classmethod
    def expert(cls, task: Task, *, seed: int, mistake_rate: float = 0.0, **options: Any) -> Demonstration:
        """ValueError, always: a server has no expert to ask."""
        raise ValueError(
            "env remote has no expert; write demonstrations with the teacher: python -m megatron_tcod.demonstrate"
        )


class Session(Protocol):
    """The server's side of one episode."""

    def reset(self, fields: dict[str, Any], *, deadline_s: float) -> dict[str, Any]: ...

    def step(self, action: dict[str, Any], *, deadline_s: float) -> dict[str, Any]: ...

    def close(self) -> None: ...


class HttpSession:
    """An episode under an id of its own; every request names it."""

    def __init__(self, url: str) -> None:
        self._link = HttpLink(url)
        self._episode = {"episode_id": uuid.uuid4().hex}

    def reset(self, fields: dict[str, Any], *, deadline_s: float) -> dict[str, Any]:
        return self._link.post("/reset", {**fields, **self._episode}, deadline_s=deadline_s)

    def step(self, action: dict[str, Any], *, deadline_s: float) -> dict[str, Any]:
        fields = {"action": action, "timeout_s": deadline_s, **self._episode}
        return self._link.post("/step", fields, deadline_s=deadline_s)

    def close(self) -> None:
        """Tell a server that keeps episodes to forget this one; one that knows no such route has none to forget."""
        with suppress(EnvironmentFault):
            self._link.post("/close", self._episode, deadline_s=CLOSE_DEADLINE_S)


class WebSocketSession:
    """An episode that lives as long as its connection."""

    def __init__(self, url: str, *, deadline_s: float) -> None:
        self._link = WebSocketLink(url, "/ws", deadline_s=deadline_s)

    def reset(self, fields: dict[str, Any], *, deadline_s: float) -> dict[str, Any]:
        return self._exchange("reset", fields, deadline_s)

    def step(self, action: dict[str, Any], *, deadline_s: float) -> dict[str, Any]:
        return self._exchange("step", action, deadline_s)

    def close(self) -> None:
        self._link.close(b'{"type": "close"}')

    def _exchange(self, kind: str, fields: dict[str, Any], deadline_s: float) -> dict[str, Any]:
        answer = self._link.exchange({"type": kind, "data": fields}, what=kind, deadline_s=deadline_s)
        data = answer.get("data")
        if answer.get("type") != "observation" or not isinstance(data, dict):
            self._link.drop()
            raise EnvironmentFault(f"{kind}: the server answered {quote(json.dumps(answer).encode())}")
        return data


class RemoteEpisode:
    """One play of one task. Between `reset` and `close` the server holds it."""

    def __init__(
        self,
        reset_fields: dict[str, Any],
        *,
        url: str = DEFAULT_URL,
        transport: str = "websocket",
        action_field: str = "message",
        observation_field: str = "",
        accepted_field: str = "",
        success_reward: float = 1.0,
        reset_deadline_s: float = RESET_DEADLINE_S,
        step_deadline_s: float = STEP_DEADLINE_S,
    ) -> None:
        self._reset_fields, self._url, self._transport = reset_fields, url, transport
        self._action_field, self._observation_field = action_field, observation_field
        self._accepted_field, self._success_reward = accepted_field, success_reward
        self._reset_deadline_s, self._step_deadline_s = reset_deadline_s, step_deadline_s
        self._session: Session | None = None
        self._has_started = self._is_done = False
        self._observation = ""

    def reset(self) -> str:
        assert not self._has_started, "an episode is used once: make a new one"
        self._has_started = True
        if self._transport == "http":
            self._session = HttpSession(self._url)
        else:
            self._session = WebSocketSession(self._url, deadline_s=self._reset_deadline_s)
        answer = self._session.reset(self._reset_fields, deadline_s=self._reset_deadline_s)
        return self._read(answer).observation

    def step(self, action: str) -> Step:
        assert self._session is not None and not self._is_done, "step needs reset() first and ends with done or close()"
        if len(action) > MAX_ACTION_CHARS:
            return Step(self._observation, info={"accepted": False, "success": False})
        text = action.encode(errors="replace").decode()  # half of a surrogate pair is no text for a server
        answer = self._session.step({self._action_field: text}, deadline_s=self._step_deadline_s)
        return self._read(answer)

    def close(self) -> None:
        session, self._session = self._session, None
        if session is not None:
            session.close()

    def _read(self, answer: dict[str, Any]) -> Step:
        """The step that a server's answer stands for; `EnvironmentFault` where it stands for none."""
        observation, reward, done = answer.get("observation"), answer.get("reward"), answer.get("done", False)
        reward = 0.0 if reward is None else reward
        is_number = isinstance(reward, int | float) and math.isfinite(reward)
        if not isinstance(observation, dict) or not is_number or not isinstance(done, bool):
            raise EnvironmentFault(f"a malformed answer: {quote(json.dumps(answer).encode())}; expected an object as "
                                   "observation, a finite number or null as reward, a truth value as done")
        self._observation, self._is_done = self._text_of(observation), done
        accepted = bool(observation.get(self._accepted_field, True)) if self._accepted_field else True
        success = done and reward >= self._success_reward
        info = {"accepted": accepted, "success": success}
        return Step(self._observation, reward=float(reward), done=done, info=info)

    def _text_of(self, observation: dict[str, Any]) -> str:
        texts = [value for value in observation.values() if isinstance(value, str)]
        if self._observation_field:
            text = observation.get(self._observation_field)
        else:
            text = texts[0] if len(texts) == 1 else json.dumps(observation, sort_keys=True, ensure_ascii=False)
        if not isinstance(text, str) or not text:
            raise EnvironmentFault(
                f"an observation without text in {self._observation_field or 'its only text field'!r}; it has the fields "
                f"{sorted(observation)}: name one with observation_field"
            )
        return text


def check_server(url: str) -> None:
    """ValueError where no server answers at `url`."""
    try:
        HttpLink(url).get("/health", deadline_s=HEALTH_DEADLINE_S)
    except EnvironmentFault as fault:
        raise ValueError(f"no environment's server at url {url!r}: {fault}; start it, or name another url") from fault


def seed_tasks(split: str, number: int) -> list[Task]:
    """Seeds as tasks; the splits have none in common."""
    if split not in SPLITS:
        raise ValueError(f"remote has no split {split!r}; use one of {', '.join(SPLITS)}, or name a tasks_file")
    start = 0 if split == "train" else HELD_OUT_SEED
    return [
        Task(env="remote", task_id=f"seed/{seed}", split=split, family="remote", payload={"reset": {"seed": seed}})
        for seed in range(start, start + number)
    ]


def read_tasks(path: str, split: str) -> list[Task]:
    """The tasks of a split in a file; ValueError names the line that is wrong, or the splits that there are."""
    file = Path(path)
    if not file.is_file():
        raise ValueError(f"tasks_file {path} does not exist; expected JSON Lines with task_id, split and reset")
    lines: list[TaskLine] = []
    for number, line in enumerate(file.read_bytes().splitlines(), start=1):
        try:
            lines.append(msgspec.json.decode(line, type=TaskLine))
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            raise ValueError(f"{path}:{number}: {error}; expected an object with task_id, split and reset") from error
    tasks = [
        Task(env="remote", task_id=line.task_id, split=split, family=line.family, payload={"reset": line.reset})
        for line in lines
        if line.split == split
    ]
    if not tasks:
        known = ", ".join(sorted({line.split for line in lines})) or "none at all"
        raise ValueError(f"remote has no split {split!r}; {path} has {known}")
    if len({task.task_id for task in tasks}) < len(tasks):
        raise ValueError(f"{path}: a task_id occurs twice in split {split!r}; give each task one of its own")
    return tasks
