"""SGLang's HTTP protocol: one client per server, every failure a named error.

    client = SGLangClient("http://127.0.0.1:31000", api_key=..., admin_key=...)
    features = await client.features()                       # what this server can do, from its own answers
    answers = await client.generate(prompt_ids, sampling, salt=lambda: "v3", request_id="e7.t2", features=features)
    await client.close()

Versions 0.5.16 to 0.5.23 are told apart by their OpenAPI description and `server_info`, never by their number.

Errors are those of `http_json.py` and carry server and request. Refused connections and answers
429, 500, 502, 503, 504 to a generation are asked again after a random, growing pause while the request's deadline lasts;
generating twice harms nobody. At most `max_concurrent` generations are with the server, the others wait here, and their
deadline starts when they are sent.

It starts no process and holds no weights (`sglang_server.py`, `weight_sync.py`), knows nothing about which version should
answer (`sglang_engine.py`), and serves the event loop that it is first used in.
"""

from __future__ import annotations

import asyncio
import math
import random
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from megatron_tcod.rollout.engine import Sampling
from megatron_tcod.rollout.http_json import (
    DeadlineExceeded,
    GarbledAnswer,
    JsonServer,
    LogprobMismatch,
    ServerError,
    WrongTokenCount,
    repeat,
)

FLUSH_PAUSE_S = 0.05


@dataclass(frozen=True, kw_only=True)
class ServerFeatures:
    """What a server can do and how it was started. Example: `ServerFeatures(salt_field="cache_salt", device="cpu")`"""

    version: str = ""
    device: str = "cuda"
    dtype: str = "auto"
    tp_size: int = 1
    num_ranks: int = 1
    """Processes that hold weights: tp x pp x dp."""
    max_input_tokens: int = 0
    cache_tokens: int = 0
    """Tokens that the server's KV pool holds; 0 where it does not say."""
    has_update_session: bool = False
    """begin_weight_update and end_weight_update must frame updates (from 0.5.21)."""
    has_checksums: bool = False
    has_seeds: bool = False
    """A request's seed fixes its tokens (--enable-deterministic-inference); without it SGLang ignores seeds."""
    has_memory_saver: bool = False
    """Weights and KV can leave the GPU (--enable-memory-saver)."""
    has_sessions: bool = False
    """A session pins its prefix (--enable-session-radix-cache)."""
    salt_field: str = ""
    """The request field that keeps cached prefixes apart; empty where there is none."""

    @staticmethod
    def from_answers(openapi: Any, info: Any, *, server: str) -> ServerFeatures:
        """From the bodies of /openapi.json and /server_info; GarbledAnswer where they are no objects."""
        if not isinstance(openapi, dict) or not isinstance(info, dict):
            raise GarbledAnswer("openapi.json and server_info must be JSON objects; is this an SGLang server?", server=server)
        paths = openapi.get("paths", {})
        request = openapi.get("components", {}).get("schemas", {}).get("GenerateReqInput", {}).get("properties", {})
        salts = [name for name in ("cache_salt", "extra_key") if name in request]
        sizes = [int(info.get(name) or 1) for name in ("tp_size", "pp_size", "dp_size")]
        return ServerFeatures(
            version=str(info.get("version", "")),
            device=str(info.get("device") or "cuda"),
            dtype=str(info.get("dtype") or "auto"),
            tp_size=sizes[0],
            num_ranks=math.prod(sizes),
            max_input_tokens=int(info.get("max_req_input_len") or 0),
            cache_tokens=int(info.get("max_total_num_tokens") or 0),
            has_update_session="/begin_weight_update" in paths,
            has_checksums="/weights_checker" in paths,
            has_seeds=bool(info.get("enable_deterministic_inference")),
            has_memory_saver=bool(info.get("enable_memory_saver")),
            has_sessions=bool(info.get("enable_session_radix_cache")),
            salt_field=salts[0] if salts else "",
        )


@dataclass(frozen=True, kw_only=True)
class Answer:
    """One sample as the server gave it, checked against the request.

    Example: `Answer(token_ids=[17, 2], logprobs=[-0.1, -2.0], finish_reason="stop", cached_tokens=96, prompt_tokens=120,
    versions=("3",))`
    """

    token_ids: list[int]
    logprobs: list[float]
    finish_reason: str
    cached_tokens: int
    prompt_tokens: int
    versions: tuple[str, ...]
    """Names of the weights behind it: one per span of tokens where the server tells, else the newest."""
    has_spans: bool = True
    """The server tells spans (from 0.5.20)."""
    input_logprobs: list[float | None] = field(default_factory=list)


class SGLangClient:
    """See the module docstring."""

    def __init__(
        self,
        url: str,
        *,
        api_key: str = "",
        admin_key: str = "",
        max_concurrent: int = 256,
        deadline_s: float = 600.0,
        control_deadline_s: float = 600.0,
        retry_s: float = 10.0,
        pause_s: float = 0.1,
    ) -> None:
        """`deadline_s` bounds one generation with its retries, `retry_s` how long a refused or failed one is repeated,
        `pause_s` the first pause. Control requests have `control_deadline_s` and are never repeated."""
        if max_concurrent < 1 or min(deadline_s, control_deadline_s) <= 0:
            raise ValueError("need max_concurrent >= 1 and deadlines > 0")
        self._server = JsonServer(url, key_hint="sglang_key_file, teacher_key_file")
        self.url = self._server.url
        self.num_in_flight = 0
        self.num_retries = 0
        self._api_key, self._admin_key = api_key, admin_key or api_key
        self._deadline_s, self._control_deadline_s = deadline_s, control_deadline_s
        self._retry_s, self._pause_s = retry_s, pause_s
        self._places = asyncio.Semaphore(max_concurrent)

    async def close(self) -> None:
        """Requests that are under way, or still wait here to be sent, end with StreamBroken."""
        await self._server.close()

    async def features(self) -> ServerFeatures:
        openapi, info = await self._control("GET", "/openapi.json"), await self._control("GET", "/server_info")
        return ServerFeatures.from_answers(openapi, info, server=self.url)

    async def generate(
        self,
        prompt_ids: list[int],
        sampling: Sampling,
        *,
        request_id: str,
        features: ServerFeatures,
        salt: Callable[[], str] = str,
        masked_ids: tuple[int, ...] = (),
        num_samples: int = 1,
    ) -> list[Answer]:
        """`num_samples` answers to one prompt from one request, which the server computes the prompt for once.

        `salt` is called whenever the request is sent, which may be long after this call. `masked_ids` are never sampled
        and no part of the softmax. The prompt must fit the server: ids beyond its vocabulary would end it. A warm-up is
        `max_new_tokens=0`. Raises the errors of the module docstring.
        """
        async with self._places:
            self.num_in_flight += 1
            try:
                parsed = await self._repeat(
                    "/generate",
                    lambda: generate_body(
                        prompt_ids, sampling, features, salt=salt(), masked_ids=masked_ids, num_samples=num_samples
                    ),
                    request_id,
                )
            finally:
                self.num_in_flight -= 1
        answers = parsed if isinstance(parsed, list) else [parsed]
        where = {"server": self.url, "request_id": request_id}
        if len(answers) != num_samples:
            raise GarbledAnswer(f"{len(answers)} answers to a request for {num_samples} samples", **where)
        return [parse_answer(answer, prompt_ids, sampling, **where) for answer in answers]

    async def get(self, path: str) -> Any:
        """What the server tells about itself at `path`."""
        return await self._control("GET", path)

    async def post(self, path: str, body: dict[str, Any]) -> Any:
        """The parsed answer of an endpoint that needs no admin key; repeated like a generation, not counted as one."""
        return await self._repeat(path, lambda: body, "")

    async def pause(self) -> None:
        """Stop computing. Running requests go back to the queue and are computed again after `resume`."""
        await self._control("POST", "/pause_generation", {"mode": "retract"})

    async def resume(self) -> None:
        await self._control("POST", "/continue_generation", {})

    async def flush(self, timeout_s: float) -> None:
        """Drop every cached prefix, as soon as no request holds one; ServerError 400 when some still do in the end.

        Asked again and again, because the server's own `timeout` also waits for requests that a pause put back.
        """
        loop = asyncio.get_running_loop()
        deadline = loop.time() + timeout_s
        while True:
            try:
                await self._control("POST", "/flush_cache")
                return
            except ServerError as error:
                if error.status != 400 or loop.time() > deadline:
                    raise
            await asyncio.sleep(FLUSH_PAUSE_S)

    async def release_memory(self) -> None:
        await self._control("POST", "/release_memory_occupation", {})

    async def resume_memory(self) -> None:
        """Only after `release_memory`: a server that released nothing dies of it."""
        await self._control("POST", "/resume_memory_occupation", {})

    async def checksums(self) -> dict[str, str]:
        """Of every weight the server holds, by its own fused names; one rank only."""
        answer = await self._control("POST", "/weights_checker", {"action": "checksum"})
        try:
            (rank,) = answer["ranks"]
            return dict(rank["checksums"])
        except (KeyError, TypeError, ValueError):
            raise GarbledAnswer(f"no checksums of one rank in {str(answer)[:200]}", server=self.url) from None

    async def update(self, path: str, body: dict[str, Any]) -> None:
        """One of the endpoints that answer {success, message}."""
        answer = await self._control("POST", path, body)
        if not isinstance(answer, dict) or answer.get("success") is not True:
            raise ServerError(f"{path} was not done: {str(answer)[:300]}", server=self.url)

    async def _repeat(self, path: str, make_body: Callable[[], dict[str, Any]], request_id: str) -> Any:
        """Ask until there is an answer, an error that repeating cannot mend, or no time left."""

        async def ask(attempt: int) -> Any:
            # The server refuses an id that it still works on, so every attempt has its own.
            named = make_body() | {"rid": f"{request_id}.{attempt}.{random.getrandbits(48):012x}"}
            is_json = path == "/generate"
            return await self._server.ask("POST", path, named, key=self._api_key, request_id=request_id, is_json=is_json)

        return await repeat(
            ask,
            deadline_s=self._deadline_s,
            retry_s=self._retry_s,
            pause_s=self._pause_s,
            server=self.url,
            request_id=request_id,
            count=self._note_retry,
        )

    def _note_retry(self) -> None:
        self.num_retries += 1

    async def _control(self, method: str, path: str, body: dict[str, Any] | None = None) -> Any:
        try:
            async with asyncio.timeout(self._control_deadline_s):
                key = self._admin_key if method == "POST" else self._api_key
                return await self._server.ask(method, path, body, key=key)
        except TimeoutError:
            raise DeadlineExceeded(f"{path} not done within {self._control_deadline_s:g} s", server=self.url) from None


def generate_body(
    prompt_ids: list[int],
    sampling: Sampling,
    features: ServerFeatures,
    *,
    salt: str,
    masked_ids: tuple[int, ...] = (),
    num_samples: int = 1,
) -> dict[str, Any]:
    """A request in SGLang's terms."""
    params: dict[str, Any] = {
        "max_new_tokens": sampling.max_new_tokens,
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "top_k": sampling.top_k,
        "stop_token_ids": list(sampling.stop_token_ids),
        "no_stop_trim": True,
        "skip_special_tokens": False,
        "n": num_samples,
    }
    if features.has_seeds:
        params["sampling_seed"] = sampling.seed
    if masked_ids:
        params["logit_bias"] = {str(token): -100.0 for token in masked_ids}
    is_warmup = sampling.max_new_tokens == 0 and sampling.logprob_start_len < 0
    body = {
        "input_ids": prompt_ids,
        "sampling_params": params,
        "return_logprob": not is_warmup,
        "logprob_start_len": sampling.logprob_start_len,
    }
    return body | ({features.salt_field: salt} if features.salt_field and salt else {})


def parse_answer(answer: Any, prompt_ids: list[int], sampling: Sampling, **where: str) -> Answer:
    """One element of /generate's body, checked; raises the errors of the module docstring."""
    try:
        ids, meta = answer["output_ids"], answer["meta_info"]
        finish = meta["finish_reason"]
        reason, prompt_tokens, cached = finish["type"], meta["prompt_tokens"], meta["cached_tokens"]
        completion_tokens = meta["completion_tokens"]
        spans = tuple(str(span["version"]) for span in meta.get("weight_versions") or ())
        versions = spans or (str(meta.get("weight_version", "")),)
    except (KeyError, TypeError) as error:
        raise GarbledAnswer(f"no {error} in {str(answer)[:200]}", **where) from None
    if reason not in ("stop", "length"):
        raise ServerError(f"finished with {str(finish)[:200]}", status=int(finish.get("status_code") or 0), **where)
    if not isinstance(ids, list) or not all(isinstance(token, int) and token >= 0 for token in ids):
        raise GarbledAnswer(f"output_ids are not token ids: {str(ids)[:100]}", **where)
    asked = sampling.max_new_tokens
    is_whole = len(ids) == asked if reason == "length" else 0 < len(ids) <= asked
    if not is_whole or completion_tokens != len(ids) or prompt_tokens != len(prompt_ids) or not 0 <= cached <= prompt_tokens:
        raise WrongTokenCount(
            f"finished by {reason!r} with {len(ids)} ids of {asked}, counted {completion_tokens}; prompt of "
            f"{len(prompt_ids)} counted {prompt_tokens}, cached {cached}; a short answer means that the server's context "
            "length is too small",
            **where,
        )
    # Where a prompt that asks for no ids shares a batch with some that do, SGLang samples one, drops it and tells its number.
    sampled = meta.get("output_token_logprobs") or [] if asked else []
    logprobs = _logprobs(sampled, ids, "sampled", **where)
    inputs: list[float | None] = []
    if sampling.logprob_start_len >= 0:
        start, entries = sampling.logprob_start_len, meta.get("input_token_logprobs") or []
        if not entries or entries[0][0] is not None:
            raise LogprobMismatch(f"{len(entries)} prompt log-probabilities; expected None for the first", **where)
        scored = _logprobs(entries[1:], prompt_ids[start + 1 :], "prompt", **where)
        inputs = [None, *scored]
    return Answer(
        token_ids=ids,
        logprobs=logprobs,
        finish_reason=reason,
        cached_tokens=cached,
        prompt_tokens=prompt_tokens,
        versions=versions,
        has_spans=bool(spans),
        input_logprobs=inputs,
    )


def _logprobs(entries: list[Any], ids: list[int], what: str, **where: str) -> list[float]:
    """The numbers of [log-probability, id, text] entries that must belong to `ids`."""
    try:
        numbers, named = [entry[0] for entry in entries], [entry[1] for entry in entries]
        is_sound = all(isinstance(number, (int, float)) and math.isfinite(number) for number in numbers)
    except (TypeError, IndexError, KeyError):
        raise LogprobMismatch(f"{what} log-probabilities are no pairs: {str(entries)[:100]}", **where) from None
    # SGLang names the last id of a prompt's vocabulary 0.
    is_same = len(named) == len(ids) and all(
        theirs == ours or (theirs == 0 and what == "prompt") for theirs, ours in zip(named, ids, strict=True)
    )
    if not is_same or not is_sound:
        raise LogprobMismatch(
            f"{len(entries)} {what} log-probabilities for {len(ids)} ids; ids agree: {is_same}, finite: {is_sound}",
            **where,
        )
    return [float(number) for number in numbers]
