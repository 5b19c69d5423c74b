"""A remote environment equals the local one over both transports, and servers that misbehave end in named faults in time."""

from __future__ import annotations

import base64
import hashlib
import json
import shutil
import socket
import ssl
import struct
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from megatron_tcod.envs.base import EnvironmentFault, Step
from megatron_tcod.envs.household import Household
from megatron_tcod.envs.http_link import HttpLink, ServerAddress
from megatron_tcod.envs.remote import HELD_OUT_SEED, MAX_ACTION_CHARS, Remote, RemoteEpisode
from megatron_tcod.envs.websocket_link import ACCEPT_GUID
from megatron_tcod.trajectory import Task

TRANSPORTS = ("websocket", "http")
DEADLINE_S = 0.5


def play(episode, actions: list[str]) -> list[Step]:
    try:
        return [Step(episode.reset()), *(episode.step(action) for action in actions)]
    finally:
        episode.close()


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_remote_episode_equals_the_local_one_step_by_step(remote_household, transport):
    from household_server import task_of_seed

    options = {**remote_household, "transport": transport}
    tasks = Remote.tasks("train", count=10, **options) + Remote.tasks("held_out", count=3, **options)
    for seed, task in enumerate(tasks):
        local_task = task_of_seed(task.payload["reset"]["seed"])
        demonstration = Household.expert(local_task, seed=seed, mistake_rate=0.2)
        actions = ["dance", "\ud800", *(turn.action for turn in demonstration.turns)]
        local, remote = play(Household.make(local_task), actions), play(Remote.make(task, **options), actions)
        assert [vars(step) for step in remote] == [vars(step) for step in local]
        assert remote[-1].done and remote[-1].info["success"]
    held = HttpLink(remote_household["url"]).get("/health", deadline_s=10)
    assert held["episodes"] == 0, "closed episodes are told to the server"


def test_session_outlives_a_student_that_thinks_for_longer_than_the_server_waits_for_pongs(remote_household):
    task = Remote.tasks("train", count=1, **remote_household)[0]
    episode = Remote.make(task, **remote_household)
    first = episode.reset()
    time.sleep(10)  # a heartbeat of the server and the time it waits for an answer
    assert episode.step("look").observation and first
    episode.close()


def test_session_that_the_server_ends_meanwhile_is_a_fault_that_says_when():
    def talk(connection: socket.socket, head: bytes) -> None:
        websocket(frame(OBSERVATION), frame(struct.pack(">H", 1012) + b"restart", 8))(connection, head)

    with script(talk) as server:
        episode = RemoteEpisode({}, url=server.url, observation_field="text")
        episode.reset()
        time.sleep(2.5)
        with pytest.raises(EnvironmentFault, match="the connection is closed; it was lost before: idle: .*restart"):
            episode.step("look")
        episode.close()


def test_splits_share_no_seed_and_a_file_names_tasks_of_its_own(remote_household, tmp_path):
    seeds = {
        split: [task.payload["reset"]["seed"] for task in Remote.tasks(split, **remote_household)]
        for split in ("train", "held_out")
    }
    assert seeds == {"train": [*range(1000)], "held_out": [*range(HELD_OUT_SEED, HELD_OUT_SEED + 200)]}
    file = tmp_path / "tasks.jsonl"
    file.write_text('{"task_id": "a", "split": "easy", "family": "f", "reset": {"seed": 3, "level": 2}}\n')
    listed = Remote.tasks("easy", tasks_file=str(file), **remote_household)
    reset = {"reset": {"seed": 3, "level": 2}}
    assert listed == [Task(env="remote", task_id="a", split="easy", family="f", payload=reset)]
    with pytest.raises(ValueError, match="remote has no split 'hard'; .* has easy"):
        Remote.tasks("hard", tasks_file=str(file), **remote_household)
    for line, words in (
        ('{"task_id": "a"}', "tasks.jsonl:2: .*split"),
        ('{"task_id": "a", "split": "easy", "seed": 1}', "tasks.jsonl:2: .*seed"),
        ("{", "tasks.jsonl:2: "),
        ('{"task_id": "a", "split": "easy"}', "a task_id occurs twice in split 'easy'"),
    ):
        (tmp_path / "bad" / "tasks.jsonl").parent.mkdir(exist_ok=True)
        bad = tmp_path / "bad" / "tasks.jsonl"
        bad.write_text(file.read_text() + line)
        with pytest.raises(ValueError, match=words):
            Remote.tasks("easy", tasks_file=str(bad), **remote_household)


def test_what_cannot_work_is_a_value_error_before_the_run(remote_household):
    with pytest.raises(ValueError, match="no environment's server at url 'http://127.0.0.1:9': .*no connection"):
        Remote.tasks("train", url="http://127.0.0.1:9")
    with pytest.raises(ValueError, match="remote has no transport 'grpc'; use one of websocket, http"):
        Remote.tasks("train", transport="grpc", **remote_household)
    with pytest.raises(ValueError, match=r"remote train has 1000 tasks, \[999, 1001\) were asked for"):
        Remote.tasks("train", first=999, count=2, **remote_household)
    with pytest.raises(ValueError, match="not a remote task: env 'household'"):
        Remote.make(Household.tasks("train", count=1)[0])


@pytest.mark.parametrize(
    "url", ["", "localhost:80", "file:///etc/passwd", "http://", "http://h:x", "http://h:99999", "http://u@h", "http://h/?a=1",
            "http://h\n/", "http://ho st/"]
)  # fmt: skip
def test_url_that_names_no_server_is_refused(url):
    with pytest.raises(ValueError, match="url"):
        ServerAddress.parse(url)


def test_url_may_have_a_path_and_needs_no_port():
    assert ServerAddress.parse("http://[::1]/env/") == ServerAddress("http", "::1", 80, "/env")
    assert ServerAddress.parse("https://host").port == 443


class Script:
    """Answers each connection with `talk(connection, request)`, and counts the requests."""

    def __init__(self, talk: Callable[[socket.socket, bytes], None], *, has_head: bool = True) -> None:
        self._talk, self._has_head, self.requests = talk, has_head, []
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._listener.getsockname()[1]}"
        threading.Thread(target=self._serve, daemon=True).start()

    def _serve(self) -> None:
        with suppress(OSError):
            while True:
                connection, _ = self._listener.accept()
                threading.Thread(target=self._answer, args=(connection,), daemon=True).start()

    def _answer(self, connection: socket.socket) -> None:
        with suppress(OSError), connection:
            if not self._has_head:
                return self._talk(connection, b"")
            head = b""
            while b"\r\n\r\n" not in head:
                head += connection.recv(65536)
            head, _, body = head.partition(b"\r\n\r\n")
            length = next((int(line[15:]) for line in head.split(b"\r\n") if line.lower().startswith(b"content-length")), 0)
            while len(body) < length:
                body += connection.recv(65536)
            self.requests.append(head.split(b" ")[1].decode())
            self._talk(connection, head)

    def close(self) -> None:
        self._listener.close()


@contextmanager
def script(talk: Callable[[socket.socket, bytes], None], *, has_head: bool = True) -> Iterator[Script]:
    server = Script(talk, has_head=has_head)
    yield server
    server.close()


def http(body: bytes, status: str = "200 OK", headers: str = "") -> bytes:
    return f"HTTP/1.1 {status}\r\nContent-Length: {len(body)}\r\n{headers}\r\n".encode() + body


def answer(**changed: object) -> bytes:
    return json.dumps({"observation": {"text": "a room"}, "reward": 0.5, "done": False, **changed}).encode()


def slowly(connection: socket.socket, data: bytes) -> None:
    for byte in data:
        connection.send(bytes([byte]))
        time.sleep(0.1)


HUGE = b"HTTP/1.1 200 OK\r\n\r\n"

MISBEHAVIOURS = {
    "it says nothing": (lambda c, _: time.sleep(5), "no answer within 0.5 s"),
    "its head trickles": (lambda c, _: slowly(c, http(answer())), "no answer within 0.5 s"),
    "its body trickles": (lambda c, _: (c.send(HUGE), slowly(c, answer())), "no answer within 0.5 s"),
    "it hangs up": (lambda c, _: None, "connection lost"),
    "it hangs up in the middle": (lambda c, _: c.send(http(answer())[:-9]), "no JSON object|connection lost"),
    "it redirects": (lambda c, _: c.send(http(b"", "302 Found", "Location: http://127.0.0.1:9/\r\n")), "a redirect .*302"),
    "it fails": (lambda c, _: c.send(http(b'{"detail": "no\\n more"}', "500 Oops")), "status 500: .*no.* more"),
    "it is no HTTP": (lambda c, _: c.send(b"SSH-2.0-OpenSSH_9.6\r\n"), "connection lost: BadStatusLine"),
    "it answers 9 MB": (lambda c, _: c.sendall(HUGE + b'{"a": "' + b"x" * (9 << 20)), "too large, more than 8388608 bytes"),
    "it answers for ever": (lambda c, _: [c.sendall(HUGE)] + [c.sendall(b"x" * 65536) for _ in range(999)], "too large"),
    "it is no UTF-8": (lambda c, _: c.send(http(b'{"a": "\xff\xfe"}')), "no JSON object: .*utf-8"),
    "it is no JSON": (lambda c, _: c.send(http(b"<html>")), "no JSON object: .*<html>"),
    "it is a list": (lambda c, _: c.send(http(b"[1]")), "no JSON object"),
    "it nests": (lambda c, _: c.send(http(b"[" * 100_000)), "no JSON object"),
    "its observation is empty": (lambda c, _: c.send(http(answer(observation={"text": ""}))), "without text"),
    "it has no observation": (lambda c, _: c.send(http(b"{}")), "malformed answer"),
    "its reward is no number": (lambda c, _: c.send(http(answer(reward=float("nan")))), "malformed answer"),
    "its done is a word": (lambda c, _: c.send(http(answer(done="no"))), "malformed answer"),
}


@pytest.mark.parametrize("case", MISBEHAVIOURS)
def test_server_that_misbehaves_ends_in_a_named_fault_within_the_deadline(case):
    talk, words = MISBEHAVIOURS[case]
    with script(talk) as server:
        episode = RemoteEpisode(
            {"seed": 0}, url=server.url, transport="http", observation_field="text", reset_deadline_s=DEADLINE_S
        )
        start = time.monotonic()
        with pytest.raises(EnvironmentFault, match=words):
            episode.reset()
        assert time.monotonic() - start < DEADLINE_S + 3
        assert server.requests == ["/reset"], "nothing is sent twice"


def test_proxies_of_the_environment_are_not_used(monkeypatch):
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    with script(lambda c, _: c.send(http(answer(done=True, reward=1)))) as server:
        assert HttpLink(server.url).get("/health", deadline_s=5)["done"] is True


def test_observation_is_the_only_text_or_all_of_it_and_rewards_may_be_absent():
    observations = [{"echo": "hello", "length": 5}, {"a": "x", "b": "y"}]
    expected = ["hello", '{"a": "x", "b": "y"}']
    for observation, text in zip(observations, expected, strict=True):
        body = answer(observation=observation, reward=None)
        with script(lambda c, _, body=body: c.send(http(body))) as server:
            episode = RemoteEpisode({}, url=server.url, transport="http")
            assert episode.reset() == text
            step = episode.step("x")
            assert (step.observation, step.reward, step.done) == (text, 0.0, False)
            assert episode.step("x" * (MAX_ACTION_CHARS + 1)).info["accepted"] is False
            assert server.requests == ["/reset", "/step"]
            episode.close()


@pytest.fixture(scope="module")
def certificate(tmp_path_factory) -> Path:
    """A self-signed certificate for 127.0.0.1 with its key, in one file."""
    if shutil.which("openssl") is None:
        pytest.skip("openssl is not installed")
    file = tmp_path_factory.mktemp("tls") / "own.pem"
    command = "openssl req -x509 -newkey rsa:2048 -nodes -days 2 -subj /CN=localhost -addext subjectAltName=IP:127.0.0.1"
    subprocess.run([*command.split(), "-keyout", str(file), "-out", f"{file}.crt"], check=True, capture_output=True)
    file.write_bytes(file.read_bytes() + Path(f"{file}.crt").read_bytes())
    return file


def test_https_needs_a_certificate_that_is_trusted_and_keeps_the_deadline(certificate, monkeypatch):
    def encrypted(talk: Callable[[socket.socket], None]) -> Callable[[socket.socket, bytes], None]:
        def start(connection: socket.socket, _: bytes) -> None:
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            context.load_cert_chain(certificate)
            with context.wrap_socket(connection, server_side=True) as secret:
                secret.recv(65536)
                talk(secret)

        return start

    with script(encrypted(lambda c: c.sendall(http(answer()))), has_head=False) as server:
        link = HttpLink(server.url.replace("http:", "https:"))
        with pytest.raises(EnvironmentFault, match="no connection: .*certificate verify failed"):
            link.get("/health", deadline_s=5)
        monkeypatch.setenv("SSL_CERT_FILE", f"{certificate}.crt")
        assert link.get("/health", deadline_s=5)["reward"] == 0.5
    with script(encrypted(lambda c: time.sleep(3)), has_head=False) as server:
        with pytest.raises(EnvironmentFault, match="no answer within 0.5 s"):
            HttpLink(server.url.replace("http:", "https:")).get("/health", deadline_s=DEADLINE_S)
    with script(lambda c, _: time.sleep(3), has_head=False) as server:
        with pytest.raises(EnvironmentFault, match="no connection: .*timed out"):
            HttpLink(server.url.replace("http:", "https:")).get("/health", deadline_s=DEADLINE_S)


def frame(payload: bytes, opcode: int = 1, *, is_final: bool = True, length: bytes | None = None) -> bytes:
    """A server's frame, unmasked."""
    size = len(payload)
    if length is None:
        wide = b"\x7e" + struct.pack(">H", size) if size < 65536 else b"\x7f" + struct.pack(">Q", size)
        length = bytes([size]) if size < 126 else wide
    return bytes([(0x80 if is_final else 0) | opcode]) + length + payload


def websocket(*frames: bytes, key: bytes | None = None) -> Callable[[socket.socket, bytes], None]:
    """Shake hands, then send frames after the first message."""

    def talk(connection: socket.socket, head: bytes) -> None:
        sent = next(line[19:] for line in head.split(b"\r\n") if line.lower().startswith(b"sec-websocket-key: "))
        accept = base64.b64encode(hashlib.sha1((key or sent) + ACCEPT_GUID).digest())
        lines = b"Upgrade: websocket\r\nConnection: Upgrade\r\nSec-WebSocket-Accept: " + accept
        connection.send(b"HTTP/1.1 101 Switching Protocols\r\n" + lines + b"\r\n\r\n")
        connection.recv(65536)
        for data in frames:
            connection.sendall(data)
            time.sleep(0.01)
        connection.recv(65536)

    return talk


OBSERVATION = b'{"type": "observation", "data": ' + answer() + b"}"
ERROR = b'{"type": "error", "data": {"message": "all 4 sessions are taken", "code": "CAPACITY_REACHED"}}'

BROKEN_FRAMES = {
    "no answer": (websocket(), "reset: no answer within 0.5 s"),
    "another key": (websocket(key=b"abc"), "does not open a WebSocket here"),
    "a page": (lambda c, _: c.send(http(b"hello")), "does not open a WebSocket here: HTTP/1.1 200 OK"),
    "a redirect": (lambda c, _: c.send(http(b"", "301 Moved")), "does not open a WebSocket here: HTTP/1.1 301"),
    "a trickling handshake": (lambda c, _: slowly(c, b"HTTP/1.1 101 Switching"), "no answer within 0.5 s"),
    "an endless handshake": (lambda c, _: [c.sendall(b"x" * 65536) for _ in range(99)], "handshake too large"),
    "an error": (websocket(frame(ERROR)), "CAPACITY_REACHED"),
    "another type": (websocket(frame(b'{"type": "state", "data": {}}')), "the server answered"),
    "a close": (websocket(frame(struct.pack(">H", 1011) + b"out of memory", 8)), "closed it: 1011 out of memory"),
    "bytes": (websocket(frame(b"\0\1", 2)), "a WebSocket frame of kind 2"),
    "a masked frame": (websocket(b"\x81\x81abcd!"), "bits set that were not agreed on"),
    "9 MB announced": (websocket(frame(b"", length=b"\x7f" + struct.pack(">Q", 9 << 20))), "too large, 9437184 bytes"),
    "9 MB in pieces": (
        websocket(frame(b"x" * (3 << 20), is_final=False), *[frame(b"x" * (3 << 20), 0, is_final=False)] * 2), "too large"
    ),
    "no UTF-8": (websocket(frame(b"\xff")), "no JSON object"),
    "an end": (websocket(b"\x81"), "connection lost|no answer"),
}


@pytest.mark.parametrize("case", BROKEN_FRAMES)
def test_websocket_that_misbehaves_ends_in_a_named_fault_and_is_closed(case):
    talk, words = BROKEN_FRAMES[case]
    with script(talk) as server:
        episode = RemoteEpisode({}, url=server.url, observation_field="text", reset_deadline_s=DEADLINE_S)
        start = time.monotonic()
        with pytest.raises(EnvironmentFault, match=words):
            episode.reset()
        assert time.monotonic() - start < DEADLINE_S + 3
        episode.close()
        assert server.requests == ["/ws"]


def test_websocket_joins_fragments_answers_pings_and_reads_long_messages():
    long = b'{"type": "observation", "data": ' + answer(observation={"text": "y" * 70_000}) + b"}"
    pieces = [frame(long[:9], is_final=False), frame(b"ping", 9), frame(long[9:40], 0, is_final=False), frame(b"", 10),
              frame(long[40:], 0)]  # fmt: skip
    with script(websocket(*pieces)) as server:
        episode = RemoteEpisode({}, url=server.url, observation_field="text")
        assert episode.reset() == "y" * 70_000
        episode.close()
