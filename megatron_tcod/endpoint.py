"""A player whose model somebody else serves: any OpenAI-compatible endpoint, or an SGLang server.

    with closing(seat_endpoint(config)) as player:                # collective
        episodes = player.play_in_full(tasks, temperature=0.4, seed=7, num_samples=8)

`endpoint_api = chat` sends conversations as text and gets text: every figure that needs token ids or log-probabilities is
absent (`NOT_MEASURED`). `endpoint_api = sglang` sends and gets token ids over /generate, which asks for the tokenizer in
`student`; the server's own is compared with it. The API key comes from the environment variable `endpoint_key_env`, and
from nowhere else, so that it is in no file of the run.

The server's weights stay what they are; `serving.py` has the servers of a training run.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import logging
import os
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from megatron_tcod import serving
from megatron_tcod.assembly import Player, join_world, tokenizer_of
from megatron_tcod.config import Config, EndpointConfig, ParallelConfig
from megatron_tcod.envs import check_env_options, load_env
from megatron_tcod.model import parallel
from megatron_tcod.trajectory import Episode

logger = logging.getLogger(__name__)

NOT_MEASURED = {
    "chat": {
        "kl": "the endpoint tells no token ids and log-probabilities that a teacher could score",
        "generated_tokens": "the endpoint counts tokens by its own tokenizer",
    },
    "sglang": {},
}
"""Which figures an endpoint's protocol rules out, and why."""

LOOPBACK = ("localhost", "127.0.0.1", "::1")


@dataclass(kw_only=True)
class EndpointPlayer(Player):
    """A `Player` over an endpoint."""

    name: str
    """The model as the endpoint calls it, and where."""

    def play_in_full(self, *args: Any, **options: Any) -> list[Episode]:
        """See `Player`. Over a chat endpoint, whose ids stand for messages, episodes come without ids and rows."""
        episodes = super().play_in_full(*args, **options)
        if self.config.endpoint.endpoint_api != "chat":
            return episodes
        from megatron_tcod.rollout.chat_engine import without_ids

        return [without_ids(episode) for episode in episodes]


def seat_endpoint(config: Config) -> EndpointPlayer:
    """The endpoint ready to play. Collective. ValueError for settings that do not fit, an absent key or package."""
    key = check_endpoint(config.endpoint)
    family = load_env(config.environment.env)
    family.require()
    check_env_options(config.environment.env, config.environment.env_options)
    join_world(dataclasses.replace(config, parallel=ParallelConfig()))  # no rank holds a part of a model
    seat = _seat_chat if config.endpoint.endpoint_api == "chat" else _seat_sglang
    config, tokenizer, engine, name = seat(config, key)
    closing = ExitStack()
    closing.callback(engine.close)
    return EndpointPlayer(
        config=config,
        tokenizer=tokenizer,
        family=family,
        engine=engine,
        players=list(range(parallel.world_size())),
        closing=closing,
        name=name,
    )


def check_endpoint(endpoint: EndpointConfig) -> str:
    """The API key, empty where none is to be sent. ValueError names what is missing."""
    serving.check_urls("endpoint_url", [endpoint.endpoint_url], key_setting="endpoint_key_env")
    address = urlsplit(endpoint.endpoint_url)
    if importlib.util.find_spec("aiohttp") is None:
        raise ValueError("endpoints are spoken to with aiohttp, which is not installed; pip install '.[sglang]'")
    if not endpoint.endpoint_key_env:
        return ""
    key = os.environ.get(endpoint.endpoint_key_env, "").strip()
    if not key:
        raise ValueError(f"endpoint_key_env = {endpoint.endpoint_key_env}: no such environment variable, or it is empty")
    if not key.isascii() or not key.isprintable():
        raise ValueError(f"endpoint_key_env = {endpoint.endpoint_key_env}: the key must be one line of printable ASCII")
    if address.scheme == "http" and address.hostname not in LOOPBACK:
        logger.warning("the API key travels unencrypted to %s; use https where the network is not yours", address.hostname)
    return key


def _seat_chat(config: Config, key: str) -> tuple[Config, Any, Any, str]:
    from megatron_tcod.rollout.chat_client import ChatClient
    from megatron_tcod.rollout.chat_engine import UNLIMITED_MESSAGES, ChatEngine, MessageTable

    endpoint = config.endpoint
    client = ChatClient(
        endpoint.endpoint_url,
        model=endpoint.endpoint_model,
        api_key=key,
        max_concurrent=config.rollout.max_running_requests,
        deadline_s=endpoint.endpoint_timeout,
        extra=endpoint.endpoint_extra,
        omit=endpoint.endpoint_omit,
    )
    messages = MessageTable(system_prompt=config.model.system_prompt)
    engine = ChatEngine(client, messages)
    unlimited = dataclasses.replace(config.rollout, rollout_max_context_len=UNLIMITED_MESSAGES)  # the endpoint has its own
    return dataclasses.replace(config, rollout=unlimited), messages, engine, f"{client.model} at {client.url}"


def _seat_sglang(config: Config, key: str) -> tuple[Config, Any, Any, str]:
    if not config.model.student:
        raise ValueError("student is empty; endpoint_api = sglang needs --student DIR with the served model's tokenizer.json")
    endpoint = config.endpoint
    timed = dataclasses.replace(config.sglang, request_timeout=endpoint.endpoint_timeout)
    tokenizer = tokenizer_of(config, config.model.student)
    engine = serving.engine_over(dataclasses.replace(config, sglang=timed), endpoint.endpoint_url.rstrip("/"), key, tokenizer)
    return config, tokenizer, engine, endpoint.endpoint_url
