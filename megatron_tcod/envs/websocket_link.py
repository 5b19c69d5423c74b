"""A WebSocket to an environment's server: text messages both ways, one session for as long as it is open.

    link = WebSocketLink("http://127.0.0.1:8000", "/ws", deadline_s=30.0)
    answer = link.exchange({"type": "step", "data": {"message": "look"}}, what="step", deadline_s=30.0)
    link.close(b'{"type": "close"}')

The part of RFC 6455 that a client needs, on the standard library: handshake, masked text frames out, text frames in
(in fragments too), pings answered, a close frame understood. Deadlines, bounds and faults are those of `http_link.py`; a
fault closes the connection, since what comes next on it would answer another question. Used by one thread at a time.

Servers ping, and hang up on who does not answer for some seconds (uvicorn: twenty), while a student may think for
longer. So one thread of the process looks after all open links between their exchanges, every `ATTENDANCE_S`.

No extensions (so nothing is compressed), no binary messages, no subprotocols, no redirects.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
import socket
import threading
import time
import weakref
from contextlib import suppress
from typing import Any

from megatron_tcod.envs.base import EnvironmentFault
from megatron_tcod.envs.http_link import (
    CHUNK_BYTES,
    MAX_BODY_BYTES,
    ServerAddress,
    guarded,
    is_readable,
    json_object,
    quote,
)

ACCEPT_GUID = b"258EAFA5-E914-47DA-95CA-C5AB0DC85B11"
"""RFC 6455, section 1.3."""

CONTINUATION, TEXT, BINARY, CLOSE, PING, PONG = 0x0, 0x1, 0x2, 0x8, 0x9, 0xA
FINAL, MASKED = 0x80, 0x80
MAX_HANDSHAKE_BYTES = 1 << 16
CLOSE_DEADLINE_S = 1.0
ATTENDANCE_S = 1.0


class WebSocketLink:
    """One open WebSocket. `EnvironmentFault` where the server is not there or does not speak the protocol."""

    def __init__(self, url: str, path: str, *, deadline_s: float, max_body_bytes: int = MAX_BODY_BYTES) -> None:
        self.address = ServerAddress.parse(url, ("http", "https", "ws", "wss"))
        self._max_body_bytes = max_body_bytes
        self._received = bytearray()
        self._lock = threading.Lock()
        self._lost = ""
        what = f"WebSocket {url.rstrip('/')}{path}"
        end = time.monotonic() + deadline_s
        try:
            self._socket: socket.socket | None = self.address.connect(deadline_s)
        except OSError as error:
            raise EnvironmentFault(f"{what}: no connection: {error}") from error
        try:
            with guarded(self._socket, end=end, what=what, deadline_s=deadline_s):
                self._shake_hands(self.address.path + path, what)
        except EnvironmentFault:
            self.drop()
            raise
        ATTENDANT.add(self)

    def exchange(self, message: dict[str, Any], *, what: str, deadline_s: float) -> dict[str, Any]:
        """Send a JSON object and return the one that answers it."""
        with self._lock:
            return self._exchange(message, what, deadline_s)

    def attend(self) -> None:
        """Answer pings that came between exchanges; whatever else came ends the session."""
        if not self._lock.acquire(blocking=False):
            return
        try:
            while self._socket is not None and is_readable(self._socket.fileno(), 0.0):
                with guarded(
                    self._socket, end=time.monotonic() + ATTENDANCE_S, what="idle", deadline_s=ATTENDANCE_S
                ):
                    opcode, _, payload = self._receive_frame("idle")
                    if opcode == PING:
                        self._send(PONG, payload)
                    elif opcode != PONG:
                        raise EnvironmentFault(f"idle: a WebSocket frame of kind {opcode}: {quote(payload)}")
        except EnvironmentFault as fault:
            self._lost = f"; it was lost before: {fault}"
            self.drop()
        finally:
            self._lock.release()

    def _exchange(self, message: dict[str, Any], what: str, deadline_s: float) -> dict[str, Any]:
        if self._socket is None:
            raise EnvironmentFault(f"{what}: the connection is closed{self._lost}")
        end = time.monotonic() + deadline_s
        try:
            with guarded(self._socket, end=end, what=what, deadline_s=deadline_s):
                self._send(TEXT, json.dumps(message).encode())
                body = self._receive_message(what)
            return json_object(body, what)
        except EnvironmentFault:
            self.drop()
            raise

    def close(self, farewell: bytes = b"") -> None:
        """End the session, with a last message where the server expects one; a server that is gone does not matter."""
        with self._lock:
            if self._socket is not None:
                end = time.monotonic() + CLOSE_DEADLINE_S
                with suppress(EnvironmentFault):
                    with guarded(self._socket, end=end, what="close", deadline_s=CLOSE_DEADLINE_S):
                        if farewell:
                            self._send(TEXT, farewell)
                        self._send(CLOSE, (1000).to_bytes(2, "big"))
            self.drop()

    @property
    def is_open(self) -> bool:
        return self._socket is not None

    def drop(self) -> None:
        """Close the connection without a word."""
        connection, self._socket = self._socket, None
        if connection is not None:
            connection.close()

    def _shake_hands(self, path: str, what: str) -> None:
        key = base64.b64encode(os.urandom(16))
        host = f"[{self.address.host}]" if ":" in self.address.host else self.address.host
        request = (
            f"GET {path} HTTP/1.1\r\nHost: {host}:{self.address.port}\r\nUpgrade: websocket\r\n"
            f"Connection: Upgrade\r\nSec-WebSocket-Version: 13\r\nSec-WebSocket-Key: {key.decode()}\r\n\r\n"
        )
        self._socket.sendall(request.encode())
        while b"\r\n\r\n" not in self._received:
            self._receive_some()
            if len(self._received) > MAX_HANDSHAKE_BYTES:
                raise EnvironmentFault(f"{what}: a handshake too large")
        head, _, rest = bytes(self._received).partition(b"\r\n\r\n")
        self._received = bytearray(rest)
        lines = head.decode("latin-1").split("\r\n")
        headers = {name.strip().lower(): value.strip() for name, _, value in (line.partition(":") for line in lines[1:])}
        expected = base64.b64encode(hashlib.sha1(key + ACCEPT_GUID).digest()).decode()
        if lines[0].split(" ")[1:2] != ["101"] or headers.get("sec-websocket-accept") != expected:
            raise EnvironmentFault(f"{what}: the server does not open a WebSocket here: {quote(head)}")

    def _receive_message(self, what: str) -> bytes:
        """The next text message, put together from its fragments."""
        message = bytearray()
        is_text = False
        while True:
            opcode, is_final, payload = self._receive_frame(what)
            if opcode == PING:
                self._send(PONG, payload)
            elif opcode == CLOSE:
                reason = f"{int.from_bytes(payload[:2], 'big')} {quote(payload[2:])}".strip()
                raise EnvironmentFault(f"{what}: connection lost: the server closed it: {reason}")
            elif opcode == (CONTINUATION if is_text else TEXT):
                is_text = True
                message += payload
                if len(message) > self._max_body_bytes:
                    raise EnvironmentFault(f"{what}: an answer too large, more than {self._max_body_bytes} bytes")
                if is_final:
                    return bytes(message)
            elif opcode != PONG:
                raise EnvironmentFault(f"{what}: a WebSocket frame of kind {opcode} where text was expected")

    def _receive_frame(self, what: str) -> tuple[int, bool, bytes]:
        head = self._take(2)
        opcode, is_final, length = head[0] & 0x0F, bool(head[0] & FINAL), head[1] & 0x7F
        if head[0] & 0x70 or head[1] & MASKED:
            raise EnvironmentFault(f"{what}: a WebSocket frame with bits set that were not agreed on")
        if length >= 126:
            length = int.from_bytes(self._take(2 if length == 126 else 8), "big")
        if length > self._max_body_bytes:
            raise EnvironmentFault(f"{what}: an answer too large, {length} bytes; allowed are {self._max_body_bytes}")
        return opcode, is_final, self._take(length)

    def _take(self, size: int) -> bytes:
        while len(self._received) < size:
            self._receive_some()
        taken = bytes(self._received[:size])
        del self._received[:size]
        return taken

    def _receive_some(self) -> None:
        chunk = self._socket.recv(CHUNK_BYTES)
        if not chunk:
            raise ConnectionError("the server ended the connection")
        self._received += chunk

    def _send(self, opcode: int, payload: bytes) -> None:
        """One final frame; a client masks what it sends."""
        size = len(payload)
        if size < 126:
            length = bytes([MASKED | size])
        elif size < 1 << 16:
            length = bytes([MASKED | 126]) + size.to_bytes(2, "big")
        else:
            length = bytes([MASKED | 127]) + size.to_bytes(8, "big")
        mask = os.urandom(4)
        repeated = (mask * (size // 4 + 1))[:size]
        masked = (int.from_bytes(payload, "big") ^ int.from_bytes(repeated, "big")).to_bytes(size, "big")
        self._socket.sendall(bytes([FINAL | opcode]) + length + mask + masked)


class Attendant:
    """The thread that looks after open links. It holds none of them alive, and ends with the process."""

    def __init__(self) -> None:
        self._links: weakref.WeakSet[WebSocketLink] = weakref.WeakSet()
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None

    def add(self, link: WebSocketLink) -> None:
        with self._lock:
            self._links.add(link)
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="websocket-attendant", daemon=True)
                self._thread.start()

    def _run(self) -> None:
        while True:
            time.sleep(ATTENDANCE_S)
            with self._lock:
                links = [link for link in self._links if link.is_open]
            for link in links:
                link.attend()
            del links


ATTENDANT = Attendant()
