"""The built-in household behind OpenEnv's messages, on aiohttp: an independent end for the client under test.

    with serve() as url: ...            # HTTP routes that keep episodes by id, and WebSocket sessions at /ws

Seeds are those of `remote.seed_tasks`; `task_of_seed` is the household task behind one.
"""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from aiohttp import WSMsgType, web

from megatron_tcod.envs.base import Step
from megatron_tcod.envs.household import Household
from megatron_tcod.envs.remote import HELD_OUT_SEED
from megatron_tcod.trajectory import Task

FIELDS = {"action_field": "command", "observation_field": "text", "accepted_field": "accepted"}
"""The options of `remote` that name this server's fields."""


def task_of_seed(seed: int) -> Task:
    split, first = ("held_out", seed - HELD_OUT_SEED) if seed >= HELD_OUT_SEED else ("train", seed)
    return Household.tasks(split, first=first, count=1)[0]


def answer_of(step: Step) -> dict[str, Any]:
    observation = {"text": step.observation, "accepted": step.info.get("accepted", True), "extra": [1, None]}
    return {"observation": observation, "reward": step.reward or None, "done": step.done}


class Server:
    """Its routes. `episodes` are those kept for HTTP."""

    def __init__(self) -> None:
        self.episodes: dict[str, Any] = {}
        self.app = web.Application()
        self.app.add_routes([
            web.get("/health", self.health),
            web.post("/reset", self.reset),
            web.post("/step", self.step),
            web.post("/close", self.close),
            web.get("/ws", self.session),
        ])

    async def health(self, request: web.Request) -> web.Response:
        return web.json_response({"status": "healthy", "episodes": len(self.episodes)})

    async def reset(self, request: web.Request) -> web.Response:
        fields = await request.json()
        episode = self.episodes[fields["episode_id"]] = Household.make(task_of_seed(fields["seed"]))
        return web.json_response(answer_of(Step(episode.reset())))

    async def step(self, request: web.Request) -> web.Response:
        fields = await request.json()
        return web.json_response(answer_of(self.episodes[fields["episode_id"]].step(fields["action"]["command"])))

    async def close(self, request: web.Request) -> web.Response:
        self.episodes.pop((await request.json())["episode_id"])
        return web.json_response({})

    async def session(self, request: web.Request) -> web.WebSocketResponse:
        socket = web.WebSocketResponse(heartbeat=6.0)  # hangs up where a ping is not answered within half of that
        await socket.prepare(request)
        episode = None
        async for message in socket:
            assert message.type is WSMsgType.TEXT
            fields = json.loads(message.data)
            if fields["type"] == "close":
                break
            await socket.ping(b"still there?")
            if fields["type"] == "reset":
                episode = Household.make(task_of_seed(fields["data"]["seed"]))
                answer = answer_of(Step(episode.reset()))
            else:
                answer = answer_of(episode.step(fields["data"]["command"]))
            await socket.send_json({"type": "observation", "data": answer})
        return socket


@contextmanager
def serve() -> Iterator[str]:
    """Run the server in a thread of its own; its url."""
    loop, runner = asyncio.new_event_loop(), web.AppRunner(Server().app, shutdown_timeout=1.0)
    ports: list[int] = []
    ready = threading.Event()

    async def start() -> None:
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        ports.append(runner.addresses[0][1])
        ready.set()

    def run() -> None:
        loop.run_until_complete(start())
        loop.run_forever()
        loop.run_until_complete(runner.cleanup())
        loop.close()

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    assert ready.wait(30)
    yield f"http://127.0.0.1:{ports[0]}"
    loop.call_soon_threadsafe(loop.stop)
    thread.join(30)
