"""A rollout engine over an endpoint that takes and gives text: every message counts as one token.

    messages = MessageTable(system_prompt="")                      # in the place of a `TurnTokenizer`
    engine = ChatEngine(ChatClient(url, model=name), messages)     # in the place of a `RolloutEngine`
    episodes = await collect_episodes(family, assignments, engine=engine, tokenizer=messages, settings=settings, step=0)
    episodes = [without_ids(episode) for episode in episodes]

Episodes, verified replay, histories and faults are then those of `episodes.py`. An id stands for a (role, text) pair in
the table and means nothing elsewhere, so `without_ids` takes the ids and the rows out of what was played: nothing of it can
be trained on or scored. Token counts of turns are the endpoint's own.

The context limit is the endpoint's: an episode whose conversation it refuses as too long ends with `context_length`.
"""

from __future__ import annotations

import asyncio
import dataclasses
import math
import threading
from collections.abc import Coroutine, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from megatron_tcod.rollout.chat_client import ChatClient, ContextExceeded, Message
from megatron_tcod.rollout.engine import Completion, Sampling
from megatron_tcod.rollout.prefix import PrefixReuse
from megatron_tcod.trajectory import Episode

UNLIMITED_MESSAGES = 1 << 40
"""As `max_context` where a message is a token."""


class MessageTable:
    """What `Transcript` and `episodes.py` ask of a tokenizer, over messages."""

    end_of_turn_id = -1
    stop_token_ids: tuple[int, ...] = ()

    def __init__(self, *, system_prompt: str = "") -> None:
        self._system = [("system", system_prompt)] if system_prompt else []
        self.num_system_tokens = len(self._system)
        self._messages: list[tuple[str, str]] = []
        self._ids: dict[tuple[str, str], int] = {}

    def prompt(self, observation: str) -> list[int]:
        """Ids of the system prompt and the first user message."""
        return [self.id_of(*message) for message in (*self._system, ("user", observation))]

    def bridge(self, finish_reason: str, observation: str, *, last_id: int | None = None) -> list[int]:
        """The next user message; an endpoint's template closes answers itself."""
        return [self.id_of("user", observation)]

    def recorded_answer(self, text: str, token_ids: list[int]) -> list[int]:
        """A recorded answer as a message; the recorder's ids are not the endpoint's."""
        return [self.id_of("assistant", text)]

    def answer_text(self, ids: list[int]) -> str:
        """The text of an answer."""
        return "".join(self._messages[token][1] for token in ids)

    def id_of(self, role: str, text: str) -> int:
        message = role, text
        if message not in self._ids:
            self._ids[message] = len(self._messages)
            self._messages.append(message)
        return self._ids[message]

    def conversation(self, ids: Iterable[int]) -> list[Message]:
        """Ids as the messages that they stand for."""
        return [{"role": role, "content": text} for role, text in (self._messages[token] for token in ids)]


class ChatEngine:
    """Implements `engine.RolloutEngine` for plays whose weights are somebody else's."""

    version = 0
    cache_tokens = None

    def __init__(self, client: ChatClient, messages: MessageTable) -> None:
        """A thread with an event loop of its own does the talking, as in `sglang_engine.py`. An empty model of the client
        is asked for now."""
        self._client, self._messages = client, messages
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="chat_engine", daemon=True)
        self._thread.start()
        try:
            if not client.model:
                client.model = self._start(client.find_model()).result()
        except BaseException:
            self.close()
            raise

    async def generate(self, prompt_ids: list[int], sampling: Sampling) -> Completion:
        """See `engine.RolloutEngine`; one id, of the answer, whose log-probability nobody told."""
        conversation = self._messages.conversation(prompt_ids)
        reply = await asyncio.wrap_future(self._start(self._client.complete(conversation, sampling)))
        return Completion(
            token_ids=[self._messages.id_of("assistant", reply.text)],
            logprobs=[math.nan],
            finish_reason=reply.finish_reason,
            cached_tokens=reply.cached_tokens,
            prompt_tokens=reply.prompt_tokens,
            weight_version=self.version,
        )

    async def prewarm(self, prefixes: Iterable[list[int]]) -> None:
        """Nothing: an endpoint's cache is its own business."""

    @contextmanager
    def released(self) -> Iterator[None]:
        yield

    def load_weights(self, weights: Iterator[tuple[str, torch.Tensor]], version: int) -> None:
        raise RuntimeError("an endpoint's weights are not ours to change")

    def take_prefix_reuse(self) -> PrefixReuse:
        return PrefixReuse()

    def close(self) -> None:
        """Close the connections; safe to call twice."""
        if self._loop.is_closed():
            return
        self._start(self._client.close()).result()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def _start(self, coroutine: Coroutine[Any, Any, Any]) -> Any:
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop)


def without_ids(episode: Episode) -> Episode:
    """A played episode without the table's ids; one that the endpoint refused as too long ended for its length."""
    turns = [dataclasses.replace(turn, token_ids=[]) for turn in episode.turns]
    ended: dict[str, Any] = {}
    if episode.outcome == "engine_fault" and episode.detail.startswith(f"{ContextExceeded.__name__}: "):
        ended = {"outcome": "ok", "end_reason": "context_length", "detail": ""}
    return dataclasses.replace(episode, turns=turns, rows=[], **ended)
