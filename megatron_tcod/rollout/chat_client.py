"""OpenAI's chat protocol: text in, text out, over any server that speaks it.

    client = ChatClient("https://host/v1", model="my-model", api_key=key)
    reply = await client.complete([{"role": "user", "content": "You are in ..."}], sampling)
    reply.text, reply.finish_reason, reply.prompt_tokens
    await client.close()

Errors are those of `http_json.py`; ContextExceeded where the conversation no longer fits. Refused and broken connections,
truncated answers and the statuses 429, 500, 502, 503, 504 are asked again, after the server's Retry-After or a growing
pause, while the request's deadline lasts. Redirects are not followed and the key is in no message.

Not here: token ids and log-probabilities (the protocol has none that a trainer could use), tools, images, streaming.
Thinking that a server reports apart from the answer is not part of the answer.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from megatron_tcod.rollout.engine import Sampling
from megatron_tcod.rollout.http_json import (
    GarbledAnswer,
    JsonServer,
    RolloutError,
    ServerError,
    StreamBroken,
    TruncatedAnswer,
    repeat,
)

Message = dict[str, str]

MOST_ANSWER_BYTES = 16 << 20
_TOO_LONG = re.compile(rb"context.?length|maximum context|context window|longer than the model", re.IGNORECASE)


class ContextExceeded(RolloutError):
    """The conversation, with room for an answer, does not fit the endpoint's context."""


@dataclass(frozen=True, kw_only=True)
class Reply:
    """One answer. Example: `Reply(text="go to desk 1", finish_reason="stop", prompt_tokens=80)`

    Counts are 0 where the endpoint gives none.
    """

    text: str
    finish_reason: str
    prompt_tokens: int = 0
    cached_tokens: int = 0


class ChatClient:
    """One endpoint. See the module docstring."""

    def __init__(
        self,
        url: str,
        *,
        model: str = "",
        api_key: str = "",
        max_concurrent: int = 64,
        deadline_s: float = 600.0,
        pause_s: float = 0.5,
        extra: Mapping[str, Any] | None = None,
        omit: Sequence[str] = (),
    ) -> None:
        """`url` without a path means `/v1` below it. `deadline_s` bounds a request with its repetitions. `extra` fields
        are added to each request, those in `omit` are left out. An empty `model` is asked for (`find_model`)."""
        if not urlsplit(url).path.strip("/"):
            url = url.rstrip("/") + "/v1"
        url = url.removesuffix("/").removesuffix("/chat/completions")
        self._server = JsonServer(url, key_hint="endpoint_key_env", most_bytes=MOST_ANSWER_BYTES)
        self.url, self.model = self._server.url, model
        self._api_key, self._extra, self._omit = api_key, dict(extra or {}), frozenset(omit)
        self._deadline_s, self._pause_s = deadline_s, pause_s
        self._places = asyncio.Semaphore(max_concurrent)
        self.num_retries = 0

    async def close(self) -> None:
        await self._server.close()

    async def find_model(self) -> str:
        """The one model that the endpoint serves. ValueError where it names several or none."""
        answer = await self._repeat("GET", "/models", None, "")
        try:
            names = [str(entry["id"]) for entry in answer["data"]]
        except (KeyError, TypeError):
            raise GarbledAnswer(f"/models: no list of models in {str(answer)[:200]}", server=self.url) from None
        if not all(name.isprintable() and len(name) <= 200 for name in names):
            raise GarbledAnswer(f"/models: names that are no names: {str(names)[:200]!r}", server=self.url)
        if len(names) != 1:
            raise ValueError(f"{self.url} serves {len(names)} models ({', '.join(names[:8])}); name one with endpoint_model")
        return names[0]

    async def complete(self, messages: Sequence[Message], sampling: Sampling, *, request_id: str = "") -> Reply:
        """The answer to a conversation. Raises the errors of the module docstring."""
        async with self._places:
            try:
                answer = await self._repeat("POST", "/chat/completions", self._body(messages, sampling), request_id)
            except ServerError as error:
                if error.status in (400, 413, 422) and _TOO_LONG.search(str(error).encode()):
                    raise ContextExceeded(str(error), server=self.url, request_id=request_id) from None
                raise
        return read_reply(answer, server=self.url, request_id=request_id)

    def _body(self, messages: Sequence[Message], sampling: Sampling) -> dict[str, Any]:
        body = {
            "model": self.model,
            "messages": list(messages),
            "max_tokens": sampling.max_new_tokens,
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "seed": sampling.seed,
        } | self._extra
        return {name: value for name, value in body.items() if name not in self._omit}

    async def _repeat(self, method: str, path: str, body: Any, request_id: str) -> Any:
        def note() -> None:
            self.num_retries += 1

        async def ask(attempt: int) -> Any:
            return await self._server.ask(
                method, path, body, key=self._api_key, request_id=request_id, is_json=True
            )

        return await repeat(
            ask,
            deadline_s=self._deadline_s,
            retry_s=self._deadline_s,
            pause_s=self._pause_s,
            server=self.url,
            request_id=request_id,
            lost=(StreamBroken, TruncatedAnswer),
            count=note,
        )


def read_reply(answer: Any, **where: str) -> Reply:
    """An answer's first choice, checked. GarbledAnswer names what is missing or of a wrong type."""
    try:
        choice = answer["choices"][0]
        content, finish = choice["message"]["content"], choice.get("finish_reason")
        usage = answer.get("usage") or {}
        details = usage.get("prompt_tokens_details") or {}
        counts = [usage.get("prompt_tokens"), details.get("cached_tokens")]
    except (KeyError, IndexError, TypeError, AttributeError) as error:
        raise GarbledAnswer(f"no chat completion ({type(error).__name__}: {error}): {str(answer)[:200]}", **where) from None
    if content is None:
        content = ""  # a refusal or a tool call: no command, which the environment will refuse
    if not isinstance(content, str) or not isinstance(finish, str | None):
        raise GarbledAnswer(f"content and finish_reason must be text, got {str(choice)[:200]}", **where)
    if not all(count is None or (type(count) is int and count >= 0) for count in counts):
        raise GarbledAnswer(f"usage must count tokens, got {str(usage)[:200]}", **where)
    prompt, cached = (count or 0 for count in counts)
    finish = encodable(finish or "stop")[:40]
    return Reply(text=encodable(content), finish_reason=finish, prompt_tokens=prompt, cached_tokens=cached)


def encodable(text: str) -> str:
    """The text with a replacement character for each half of a pair, which JSON can spell and UTF-8 cannot."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
