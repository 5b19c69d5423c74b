"""One HTTP connection per call to an environment's server, with a deadline that holds and a bound on what is read.

    link = HttpLink("http://127.0.0.1:8000")
    answer = link.post("/step", {"action": {"message": "look"}}, deadline_s=30.0)      # a JSON object

Everything that can go wrong ends in an `EnvironmentFault` that says which call, and one of: no connection, no answer
within the deadline, connection lost, status N, a redirect, an answer too large, an answer that is no JSON object.

A deadline covers connecting, sending and reading together: a server that sends one byte a second does not outlive it.
Nothing is sent twice, since a step that was lost may have been played. Connections are not kept: a server may close an
idle one while the student thinks. Proxies of the environment are not used, redirects are not followed, answers are
not decompressed. It does not know what the messages mean.
"""

from __future__ import annotations

import http.client
import json
import select
import socket
import ssl
import threading
import time
import urllib.parse
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

from megatron_tcod.envs.base import EnvironmentFault

MAX_BODY_BYTES = 8 << 20
"""Of an answer. An observation is a few kilobytes of text."""

MAX_QUOTED_CHARS = 500
"""Of a server's own words in a fault."""

CHUNK_BYTES = 1 << 16


class NoAnswer(EnvironmentFault):
    """The deadline passed: whoever owns the server may want to end it."""


@dataclass(frozen=True)
class ServerAddress:
    """Where a server listens. Example: `ServerAddress("http", "127.0.0.1", 8000, "")`"""

    scheme: str
    host: str
    port: int
    path: str
    """What stands before every route, without a slash at its end."""

    @classmethod
    def parse(cls, url: str, schemes: tuple[str, ...] = ("http", "https")) -> ServerAddress:
        """ValueError for anything but `scheme://host[:port][/path]`."""
        try:
            parts = urllib.parse.urlsplit(url)
            port = parts.port
        except ValueError as error:
            raise ValueError(f"url {url!r}: {error}; expected {schemes[0]}://host:port") from error
        has_more = parts.query or parts.fragment or parts.username is not None
        is_plain = url.isascii() and url.isprintable() and " " not in url
        if parts.scheme not in schemes or not parts.hostname or has_more or not is_plain:
            raise ValueError(f"url {url!r} is not one of a server; expected {schemes[0]}://host:port, without a query")
        standard = 443 if parts.scheme in ("https", "wss") else 80
        return cls(parts.scheme, parts.hostname, port or standard, parts.path.rstrip("/"))

    @property
    def is_encrypted(self) -> bool:
        return self.scheme in ("https", "wss")

    def connect(self, timeout_s: float) -> socket.socket:
        """A connected socket; OSError where there is none to be had."""
        connection = socket.create_connection((self.host, self.port), timeout=timeout_s)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        if not self.is_encrypted:
            return connection
        try:
            return ssl.create_default_context().wrap_socket(connection, server_hostname=self.host)
        except BaseException:
            connection.close()
            raise


class HttpLink:
    """Calls to one server. Without state of its own, so threads may share it."""

    def __init__(self, url: str, *, max_body_bytes: int = MAX_BODY_BYTES) -> None:
        self.address = ServerAddress.parse(url)
        self.url = url
        self._max_body_bytes = max_body_bytes

    def get(self, path: str, *, deadline_s: float) -> dict[str, Any]:
        """The JSON object at a path; `EnvironmentFault` where there is none."""
        return self._call("GET", path, None, deadline_s)

    def post(self, path: str, fields: dict[str, Any], *, deadline_s: float) -> dict[str, Any]:
        """The JSON object that answers another one; `EnvironmentFault` where there is none."""
        return self._call("POST", path, json.dumps(fields).encode(), deadline_s)

    def _call(self, method: str, path: str, body: bytes | None, deadline_s: float) -> dict[str, Any]:
        what = f"{method} {self.url.rstrip('/')}{path.partition('?')[0]}"
        end = time.monotonic() + deadline_s
        try:
            connection = self.address.connect(deadline_s)
        except OSError as error:
            raise EnvironmentFault(f"{what}: no connection: {error}") from error
        with cut_off(connection, end=end, what=what, deadline_s=deadline_s):
            status, answer = self._exchange(connection, method, path, body, what)
        if 300 <= status < 400:
            raise EnvironmentFault(f"{what}: a redirect (status {status}), which is not followed; give the final url")
        if status != 200:
            raise EnvironmentFault(f"{what}: status {status}: {quote(answer)}")
        return json_object(answer, what)

    def _exchange(
        self, connection: socket.socket, method: str, path: str, body: bytes | None, what: str
    ) -> tuple[int, bytes]:
        http_connection = http.client.HTTPConnection(self.address.host, self.address.port)
        http_connection.sock = connection
        headers = {"Accept": "application/json", "Connection": "close"}
        if body is not None:
            headers["Content-Type"] = "application/json"
        http_connection.request(method, self.address.path + path, body, headers)
        response = http_connection.getresponse()
        answer = bytearray()
        while chunk := response.read(CHUNK_BYTES):
            answer += chunk
            if len(answer) > self._max_body_bytes:
                raise EnvironmentFault(f"{what}: an answer too large, more than {self._max_body_bytes} bytes")
        return response.status, bytes(answer)


@contextmanager
def cut_off(connection: socket.socket, *, end: float, what: str, deadline_s: float) -> Iterator[None]:
    """Close the connection when done or when `end` comes, whatever it waits for; failures become `EnvironmentFault`."""
    with guarded(connection, end=end, what=what, deadline_s=deadline_s), connection:
        yield


@contextmanager
def guarded(connection: socket.socket, *, end: float, what: str, deadline_s: float) -> Iterator[None]:
    """As `cut_off`, but a connection that did not fail stays open."""
    has_passed = threading.Event()

    def cut() -> None:
        has_passed.set()
        with suppress(OSError):  # it may have ended by itself
            connection.shutdown(socket.SHUT_RDWR)

    connection.settimeout(None)
    timer = threading.Timer(max(0.0, end - time.monotonic()), cut)
    timer.daemon = True
    timer.start()
    try:
        yield
    except (OSError, http.client.HTTPException, ValueError) as error:
        if not has_passed.is_set():
            raise EnvironmentFault(f"{what}: connection lost: {type(error).__name__}: {error}") from error
    finally:
        timer.cancel()
    if has_passed.is_set():  # an answer that the cut shortened is none
        raise NoAnswer(f"{what}: no answer within {deadline_s:g} s")


def is_readable(descriptor: int, timeout_s: float) -> bool:
    """Whether there is something to read, or an end, within the time. Unlike `select` it takes any descriptor."""
    poll = select.poll()
    poll.register(descriptor, select.POLLIN)
    return bool(poll.poll(1000 * timeout_s))


def json_object(body: bytes, what: str) -> dict[str, Any]:
    """The object that a body holds; `EnvironmentFault` for anything else, invalid UTF-8 included."""
    try:
        answer = json.loads(body.decode())
    except (ValueError, RecursionError) as error:
        raise EnvironmentFault(f"{what}: an answer that is no JSON object: {error}: {quote(body)}") from error
    if not isinstance(answer, dict):
        raise EnvironmentFault(f"{what}: an answer that is no JSON object: {quote(body)}")
    return answer


def quote(body: bytes) -> str:
    """The beginning of what a server said, in one line."""
    text = " ".join(body[: 4 * MAX_QUOTED_CHARS].decode(errors="replace").split())
    return text if len(text) <= MAX_QUOTED_CHARS else text[:MAX_QUOTED_CHARS] + "..."
