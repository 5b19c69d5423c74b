"""One exchange of JSON over HTTP with a server, every failure a named error; and how failures are repeated.

    server = JsonServer("http://127.0.0.1:31000")
    answer = await server.ask("POST", "/generate", {"input_ids": [1, 2]}, key="...")
    answer = await repeat(ask, deadline_s=600, retry_s=10, pause_s=0.1, server=server.url)
    await server.close()

Errors are subclasses of `RolloutError` and carry server and request. Redirects are not followed: a key goes to the host that
it was given for. An answer longer than `most_bytes` is not read to its end.

It serves the event loop that it is first used in, and knows neither SGLang's protocol (`sglang_client.py`) nor that of
chat endpoints (`chat_client.py`).
"""

from __future__ import annotations

import asyncio
import json
import math
import random
from collections.abc import Awaitable, Callable, Mapping
from typing import Any

import aiohttp

from megatron_tcod.rollout.engine import EngineFault

RETRYABLE_STATUS = frozenset({429, 500, 502, 503, 504})
KEEP_ALIVE_S = 2.0
"""Shorter than the servers' own 5 s, so that no request is written into a connection that the server just closed."""
MOST_BYTES = 1 << 30
LONGEST_REQUESTED_PAUSE_S = 60.0
"""Of a server's Retry-After."""


class RolloutError(EngineFault):
    """A server did not do what it was asked. `server` is its URL, `request_id` the request's."""

    def __init__(self, message: str, *, server: str, request_id: str = "") -> None:
        super().__init__(f"{server}{f' request {request_id}' if request_id else ''}: {message}")
        self.server, self.request_id = server, request_id


class ServerUnreachable(RolloutError):
    """Nobody accepts connections, for as long as was tried."""


class ServerError(RolloutError):
    """An HTTP status other than 200, an aborted request, or an update that was not done."""

    def __init__(self, message: str, *, status: int = 0, pause_s: float = 0.0, **where: str) -> None:
        """`pause_s`: the server asks to be left alone for so long."""
        super().__init__(message, **where)
        self.status, self.pause_s = status, pause_s


class GarbledAnswer(RolloutError):
    """Status 200 and a body that is not what the protocol says."""


class TruncatedAnswer(RolloutError):
    """A body shorter than its header promised."""


class DeadlineExceeded(RolloutError):
    """No complete answer in time."""


class StreamBroken(RolloutError):
    """The connection died after the request was sent."""


class WrongTokenCount(RolloutError):
    """Another number of tokens than the finish reason or the counts in the answer imply."""


class LogprobMismatch(RolloutError):
    """Log-probabilities that do not belong to the tokens: another number, other ids, or no numbers."""


class JsonServer:
    """Connections to one server. See the module docstring."""

    def __init__(self, url: str, *, key_hint: str = "", most_bytes: int = MOST_BYTES) -> None:
        """`key_hint` names the settings that hold the key, for a server that refuses it."""
        if not url.startswith(("http://", "https://")):
            raise ValueError(f"server url {url!r} must start with http:// or https://")
        self.url = url.rstrip("/")
        self._key_hint, self._most_bytes = key_hint, most_bytes
        self._session: aiohttp.ClientSession | None = None
        self._is_closed = False

    async def close(self) -> None:
        """Requests that are under way, and those to come, end with StreamBroken."""
        self._is_closed = True
        if self._session is not None:
            await self._session.close()
            self._session = None

    async def ask(
        self,
        method: str,
        path: str,
        body: Any = None,
        *,
        key: str = "",
        request_id: str = "",
        is_json: bool = False,
    ) -> Any:
        """The parsed body of a 200; its text where the server says that it is no JSON, unless `is_json`."""
        where = {"server": self.url, "request_id": request_id}
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        response = None
        try:
            async with self._open_session().request(
                method, self.url + path, json=body, headers=headers, allow_redirects=False
            ) as response:
                raw = await self._read(response, path, where)
        except aiohttp.ClientConnectorError as error:
            raise ServerUnreachable(f"cannot connect: {error}", **where) from None
        except aiohttp.ClientPayloadError as error:
            kind = TruncatedAnswer if response is not None and "Content-Length" in response.headers else StreamBroken
            raise kind(f"{path} ended early: {error}", **where) from None
        except (aiohttp.ClientConnectionError, ConnectionError) as error:
            raise StreamBroken(f"{path}: connection lost ({error or type(error).__name__})", **where) from None
        except aiohttp.ClientError as error:
            raise GarbledAnswer(f"{path}: not HTTP ({type(error).__name__}: {error})", **where) from None
        if key:
            raw = raw.replace(key.encode(), b"(key)")  # what a server repeats may end in a log
        if response.status != 200:
            fix = f"; give the right key: {self._key_hint}" if response.status in (401, 403) and self._key_hint else ""
            raise ServerError(
                f"{path}: status {response.status}: {raw[:300]!r}{fix}",
                status=response.status,
                pause_s=requested_pause(response.headers),
                **where,
            )
        if "json" not in response.content_type and not is_json:
            return raw.decode(errors="replace")
        try:
            return json.loads(raw)
        except (ValueError, RecursionError) as error:
            raise GarbledAnswer(f"{path}: not JSON ({error}): {raw[:100]!r}", **where) from None

    async def _read(self, response: aiohttp.ClientResponse, path: str, where: dict[str, str]) -> bytes:
        parts, size = [], 0
        async for part in response.content.iter_any():
            parts.append(part)
            size += len(part)
            if size > self._most_bytes:
                raise GarbledAnswer(f"{path}: an answer of more than {self._most_bytes} bytes", **where)
        return b"".join(parts)

    def _open_session(self) -> aiohttp.ClientSession:
        if self._is_closed:
            raise StreamBroken("the connection was closed", server=self.url)
        if self._session is None:
            connector = aiohttp.TCPConnector(limit=0, keepalive_timeout=KEEP_ALIVE_S)
            self._session = aiohttp.ClientSession(connector=connector, timeout=aiohttp.ClientTimeout(total=None))
        return self._session


def requested_pause(headers: Mapping[str, str]) -> float:
    """Seconds that a Retry-After asks for, 0 where there is none that counts them."""
    try:
        seconds = float(headers.get("Retry-After", "0"))
    except ValueError:
        return 0.0
    return min(max(seconds, 0.0), LONGEST_REQUESTED_PAUSE_S) if math.isfinite(seconds) else 0.0


async def repeat(
    ask: Callable[[int], Awaitable[Any]],
    *,
    deadline_s: float,
    retry_s: float,
    pause_s: float,
    server: str,
    request_id: str = "",
    lost: tuple[type[RolloutError], ...] = (),
    count: Callable[[], None] = lambda: None,
) -> Any:
    """Await `ask(attempt)` until there is an answer, an error that repeating cannot mend, or no time left.

    A refused connection, the statuses of RETRYABLE_STATUS and the errors in `lost` are mended by asking again, for
    `retry_s` seconds, after a random, growing pause or the one that the server asks for; `count` is called each time.
    """
    loop = asyncio.get_running_loop()
    start, attempt = loop.time(), 0
    last: RolloutError | None = None
    try:
        async with asyncio.timeout(deadline_s):
            while True:
                requested = 0.0
                try:
                    return await ask(attempt)
                except (ServerUnreachable, ServerError, *lost) as error:
                    if isinstance(error, ServerError):
                        if error.status not in RETRYABLE_STATUS:
                            raise
                        requested = error.pause_s
                    last = error
                pause = max(pause_s * 2 ** min(attempt, 6) * random.uniform(0.5, 1.5), requested)
                if loop.time() + pause - start > retry_s:
                    raise last
                attempt += 1
                count()
                await asyncio.sleep(pause)
    except TimeoutError:
        if last is not None:
            raise last from None
        message = f"no answer within {deadline_s:g} s; raise the deadline or lower max_concurrent"
        raise DeadlineExceeded(message, server=server, request_id=request_id) from None
