"""A rollout engine over one or several SGLang servers.

    servers = [launch(model_path, run_directory=run, flags={...})]
    engine = SGLangEngine(servers, FromTensor(), vocab_size=151_665, max_context=16_384)
    engine.load_weights(student.hf_weights(), version=0)
    completion = await engine.generate(prompt_ids, Sampling(max_new_tokens=32, seed=7, stop_token_ids=(2,)))
    engine.close()                                            # the servers are the caller's to stop

It keeps the contract of `engine.RolloutEngine` as the embedded engine does. Where SGLang differs:

* a seed fixes the tokens only where the server runs with --enable-deterministic-inference (logged once otherwise);
* a greedy completion's log-probabilities are those of temperature 1, as the embedded engine's;
* the model's own end-of-text ids (config.json, generation_config.json) end a completion too, as `stop`;
* head rows from `vocab_size` on are masked by a logit bias in sampling and in the sampled tokens' log-probabilities; prompt
  log-probabilities include them.

Weights. `load_weights` pauses the servers (running requests are put back and computed again), updates them
(`weight_sync.py`), flushes, has them prove what they hold by checksum or by a probe's log-probabilities, and resumes.
Until that has succeeded the engine does not generate. Every request carries the version as cache salt, so that a prefix
of older weights is never reused even if a flush was lost, and every answer names the versions of its tokens: one that is
not within `max_staleness` of the engine's is refused with StaleWeights and counted.

Staleness. With `max_staleness` 0 an update finds no request in flight. With more, requests go on through it: those that
run are put back and continue under the new weights, those that come wait until it is over, and `released` changes
nothing, because the servers generate while the trainer trains.

Servers. A request goes where most of its prompt is cached, or else to the server with least to do. A server that was
launched here and died is restarted once for all who wait, gets the last weights again, proves them, and the requests that
died with it are repeated; nothing but tokens is lost. Between rollouts the next `load_weights` restarts it, and an update
waits for a restart that is under way. Attached servers are not restarted.

A thread with an event loop of its own does the talking, so that one engine serves any number of `asyncio.run` calls.
"""

from __future__ import annotations

import asyncio
import logging
import threading
import uuid
from collections.abc import Callable, Coroutine, Iterable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from megatron_tcod.rollout.engine import Completion, Sampling
from megatron_tcod.rollout.http_json import GarbledAnswer, RolloutError, ServerError, ServerUnreachable, StreamBroken
from megatron_tcod.rollout.prefix import PrefixLedger, PrefixReuse, warm_waves
from megatron_tcod.rollout.prefix_router import PrefixRouter
from megatron_tcod.rollout.sglang_client import Answer, SGLangClient, generate_body, parse_answer
from megatron_tcod.rollout.sglang_server import Server
from megatron_tcod.rollout.weight_proof import Expected, UnprovenWeights
from megatron_tcod.rollout.weight_sync import Link, WeightSync

logger = logging.getLogger(__name__)

BUSY_FLUSH_S = 1.0
"""How long a flush is tried while requests wait on a paused server."""
UPDATE_POLL_S = 0.02
"""How often a request that came during an update looks whether it is over."""
WARM_AT_LEAST = 32
"""Shared runs of fewer tokens are computed again rather than warmed in a wave of their own."""


class StaleWeights(RolloutError):
    """An answer from weights other than the expected ones."""


@dataclass(frozen=True, kw_only=True)
class Probe:
    """What the trainer's own forward says about a sequence.

    Example: `Probe(token_ids=[5, 6, 7], logprobs=[-1.2, -0.4], tolerance=1e-4)`
    """

    token_ids: list[int]
    logprobs: list[float]
    """[N - 1] of each token but the first, at temperature 1, over all head rows."""
    tolerance: float
    """Largest allowed absolute difference; 1e-4 for fp32, some tenths for bf16."""


@dataclass
class EngineCounters:
    """What the engine did since it was built. Warm-ups are requests too."""

    requests: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    computed_tokens: int = 0
    sampled_tokens: int = 0
    refused_stale: int = 0
    restarts: int = 0
    repeated: int = 0
    """Requests asked again because their server died."""
    unproven_updates: int = 0
    """Weight updates after which a server could prove nothing."""


class SGLangEngine:
    """Implements `engine.RolloutEngine`; see the module docstring."""

    def __init__(
        self,
        servers: Sequence[Server],
        sync: WeightSync | None,
        *,
        vocab_size: int,
        max_context: int,
        head_rows: int | None = None,
        max_concurrent: int = 256,
        deadline_s: float = 600.0,
        update_deadline_s: float = 600.0,
        max_staleness: int = 0,
        probe: Callable[[], Probe] | None = None,
        client_type: type[SGLangClient] = SGLangClient,
    ) -> None:
        """`vocab_size` real ids of `head_rows` (default: the same). `max_concurrent` requests per server.

        `sync` None: the servers keep the weights of their model path, which count as version 0, and `load_weights` is an
        error. `probe` gives the trainer's own numbers after an update, on the rank that calls `load_weights`.
        """
        if not servers:
            raise ValueError("need at least one server")
        rows = vocab_size if head_rows is None else head_rows
        if not 0 < vocab_size <= rows or max_context < 2:
            raise ValueError(f"need 0 < vocab_size <= head_rows and max_context >= 2: {vocab_size}, {rows}, {max_context}")
        self.vocab_size, self.max_context = vocab_size, max_context
        self.version = -1 if sync else 0
        self.counters = EngineCounters()
        self._servers, self._sync = list(servers), sync
        self._masked = tuple(range(vocab_size, rows))
        self._max_staleness, self._probe = max_staleness, probe
        self._update_deadline_s = update_deadline_s
        self._is_ready, self._is_released, self._is_updating = sync is None, False, False
        self._num_in_flight, self._counting = 0, threading.Lock()
        self._expected: Expected | None = None
        self._last_probe: Probe | None = None
        self._ledger, self._router = PrefixLedger(), PrefixRouter(len(self._servers))
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="sglang_engine", daemon=True)
        self._thread.start()
        self._limits = dict(max_concurrent=max_concurrent, deadline_s=deadline_s, control_deadline_s=update_deadline_s)
        self._client_type = client_type
        try:
            self._links = [self._connect(server) for server in self._servers]
        except BaseException:
            self._stop_loop()
            raise
        self._reviving = [asyncio.Lock() for _ in self._servers]
        self._lived_at = [0.0] * len(self._servers)
        """When a server that had broken a connection was last seen alive, by the loop's clock."""
        self._log_features()

    async def generate(self, prompt_ids: list[int], sampling: Sampling) -> Completion:
        """See `engine.RolloutEngine`. `max_new_tokens=0` computes the prompt and returns no ids.

        Raises ValueError for a request that cannot be served, RuntimeError without proven weights, StaleWeights, and
        the errors of `http_json.py`.
        """
        (completion,) = await self.generate_samples(prompt_ids, [sampling])
        return completion

    async def generate_samples(self, prompt_ids: list[int], samplings: Sequence[Sampling]) -> list[Completion]:
        """Several completions of one prompt, which is computed once.

        One request with n samples where the samplings differ in their seeds only and the server ignores those;
        else the prompt is warmed and the samples follow.
        """
        await self._await_update()
        for sampling in samplings:
            self._check(prompt_ids, sampling)
        first = samplings[0]
        if len(samplings) == 1:
            return await self._in_loop(self._generate(prompt_ids, first, 1))
        is_alike = len({repr(dict(vars(one), seed=0)) for one in samplings}) == 1
        if is_alike and not any(link.features.has_seeds for link in self._links):
            return await self._in_loop(self._generate(prompt_ids, first, len(samplings)))
        await self.prewarm([prompt_ids])
        return list(await asyncio.gather(*(self.generate(prompt_ids, one) for one in samplings)))

    async def prewarm(self, prefixes: Iterable[list[int]]) -> None:
        """See `engine.RolloutEngine`. What several prefixes share is computed first, once."""
        once = Sampling(max_new_tokens=0)
        for wave in warm_waves([list(prefix) for prefix in prefixes], least=WARM_AT_LEAST):
            await asyncio.gather(*(self.generate(ids, once) for ids in wave))

    @property
    def cache_tokens(self) -> int | None:
        """See `engine.RolloutEngine`. Of all servers together."""
        return sum(link.features.cache_tokens for link in self._links) or None

    def take_prefix_reuse(self) -> PrefixReuse:
        """What the servers' caches did since the last call; `prefix.py` defines the counts."""
        return self._ledger.take()

    @contextmanager
    def released(self) -> Iterator[None]:
        """See `engine.RolloutEngine`. Frees GPU memory where the servers run with --enable-memory-saver, and flushes
        elsewhere. After the block the engine waits for `load_weights`. With staleness it does nothing."""
        if self._max_staleness:
            yield
            return
        self._require_idle("be released")
        self._is_ready, self._is_released = False, True
        released: list[int] = []
        try:
            for index, link in enumerate(self._links):
                with self._tolerating_death(index):
                    self._flush(link)
                    if link.features.has_memory_saver:
                        link.call(link.client.release_memory())
                        released.append(index)
            self._start(self._forget_prefixes()).result()
            yield
        finally:
            for index in released:  # and no other: a server that released nothing dies of it
                with self._tolerating_death(index):
                    self._links[index].call(self._links[index].client.resume_memory())
            self._is_released = False

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]], version: int) -> None:
        """See `engine.RolloutEngine`. Blocks until the servers have proven the weights.

        Raises UnprovenWeights, or the errors of `http_json.py`; the engine does not generate then.
        """
        if self._sync is None:
            raise RuntimeError("this engine's servers keep the weights they were started with")
        if self._is_released:
            raise RuntimeError("load_weights inside released(): leave the block first, the memory is the trainer's there")
        if not self._max_staleness:
            self._require_idle("take weights")
        self._is_ready, self._is_updating = False, True
        try:
            with self._no_revival():
                self._update(weights, version)
                self._last_probe = self._probe() if self._probe else None
                for link in self._links:
                    link.call(self._prove_by_probe(link))
            self._start(self._forget_prefixes()).result()
            self._is_ready = True
        finally:
            self._is_updating = False

    def close(self) -> None:
        """Close the connections. The servers run on."""
        for link in self._links:
            link.call(link.client.close())
        if self._sync is not None:
            self._sync.close()
        self._stop_loop()

    # What runs in the engine's own loop.

    async def _generate(self, prompt_ids: list[int], sampling: Sampling, num_samples: int) -> list[Completion]:
        """Ask a server; again when the one that was asked has died and was restarted."""
        asked = [self._ledger.submit(prompt_ids, sampling) for _ in range(num_samples)]
        version = self.version
        url, answers = await self._ask(prompt_ids, sampling, num_samples)
        completions = [self._accept(answer, version, url) for answer in answers]
        for one, completion in zip(asked, completions, strict=True):
            self._ledger.finish(one, completion)
        return completions

    async def _ask(self, prompt_ids: list[int], sampling: Sampling, num_samples: int) -> tuple[str, list[Answer]]:
        """The answers, and the URL of the server that gave them."""
        request_id = uuid.uuid4().hex[:16]
        index = self._router.choose(prompt_ids, [link.client.num_in_flight for link in self._links])
        link, is_repeated = self._links[index], False
        while True:
            generation = link.generation
            try:
                return link.client.url, await link.client.generate(
                    prompt_ids,
                    sampling,
                    request_id=request_id,
                    features=link.features,
                    salt=self._salt,
                    masked_ids=self._masked,
                    num_samples=num_samples,
                )
            except (ServerUnreachable, StreamBroken) as error:
                if is_repeated or not await self._revive(index, generation):
                    raise
                logger.warning("%s; asked again", error)
                is_repeated = True
                self.counters.repeated += 1

    def _salt(self) -> str:
        return f"v{self.version}"

    async def _await_update(self) -> None:
        """With staleness requests may come during an update, and wait for its end."""
        while self._max_staleness and self._is_updating:
            await asyncio.sleep(UPDATE_POLL_S)
        if not self._is_ready:
            raise RuntimeError(
                "the engine has no proven weights (never loaded, released, or refused); call load_weights first"
            )

    async def _revive(self, index: int, generation: int) -> bool:
        """Whether the server has been restarted since `generation`, by this call or by another request's."""
        server, link = self._servers[index], self._links[index]
        failed_at = self._loop.time()
        async with self._reviving[index]:
            if link.generation != generation:
                return True
            if failed_at < self._lived_at[index]:  # others found out since; each would wait as long as the first
                return False
            if not await self._has_ended(server):
                self._lived_at[index] = self._loop.time()
                return False
            await self._restart(index)
            if self._sync is not None:
                await asyncio.to_thread(self._sync.restore, link, self.version)
                await link.client.flush(self._update_deadline_s)
                await self._prove(link)
                await self._prove_by_probe(link)
            link.generation += 1
            return True

    async def _restart(self, index: int) -> None:
        """A fresh process behind the link, without the trainer's weights. The caller holds the server's lock."""
        server, link = self._servers[index], self._links[index]
        logger.warning("server %s died; restarting it", server.url)
        await link.client.close()
        await asyncio.to_thread(server.restart)
        self.counters.restarts += 1
        link.client = self._client_of(server)
        link.features = await link.client.features()

    async def _pause(self, index: int) -> None:
        """Pause a server, which is restarted for it where it was launched here and has died."""
        link = self._links[index]
        try:
            await link.client.pause()
        except (ServerUnreachable, StreamBroken):
            if not await self._has_ended(self._servers[index]):
                raise
            await self._restart(index)
            link.generation += 1
            await link.client.pause()

    async def _has_ended(self, server: Server) -> bool:
        """Whether a server that was launched here is gone.

        The connection breaks before the process is gone; some versions take 5 s to collect diagnostics.
        """
        if not server.is_ours:
            return False
        for _ in range(150):
            if not server.is_alive:
                return True
            await asyncio.sleep(0.1)
        return False

    def _accept(self, answer: Answer, asked_version: int, url: str) -> Completion:
        """An answer as a Completion; StaleWeights unless all of its tokens are from weights that are young enough.

        Where the server tells no spans, the first tokens may be as old as the version that was asked.
        """
        oldest, largest = self.version, max(answer.token_ids, default=0)
        if largest >= self.vocab_size:  # no prompt could hold it, and a teacher's server would end
            raise GarbledAnswer(f"sampled id {largest}, of which the tokenizer has {self.vocab_size}", server=url)
        if self._sync is not None:
            allowed = range(self.version - self._max_staleness, self.version + 1)
            names = {str(version): version for version in allowed}
            versions = answer.versions if answer.has_spans else (*answer.versions, str(asked_version))
            strange = [name for name in versions if name not in names]
            if strange:
                self.counters.refused_stale += 1
                message = f"tokens of weights {', '.join(versions)}, expected {self.version} (staleness at most"
                raise StaleWeights(f"{message} {self._max_staleness})", server=url)
            oldest = min(names[name] for name in versions)
        counters = self.counters
        counters.requests += 1
        counters.prompt_tokens += answer.prompt_tokens
        counters.cached_tokens += answer.cached_tokens
        counters.computed_tokens += answer.prompt_tokens - answer.cached_tokens
        counters.sampled_tokens += len(answer.token_ids)
        return Completion(
            token_ids=answer.token_ids,
            logprobs=answer.logprobs,
            finish_reason=answer.finish_reason,
            cached_tokens=answer.cached_tokens,
            prompt_tokens=answer.prompt_tokens,
            weight_version=oldest,
            input_logprobs=answer.input_logprobs,
        )

    async def _prove(self, link: Link) -> None:
        """UnprovenWeights unless every tensor that a checksum can tell about is the trainer's."""
        if self._expected is None or not self._expected.can_tell:
            return
        unknown = self._expected.compare(await link.client.checksums())
        if unknown and not self._probe:
            logger.warning("%s: checksums tell nothing about %s; give a probe", link.client.url, unknown[:3])

    async def _prove_by_probe(self, link: Link) -> None:
        """UnprovenWeights unless the server gives the probe's tokens the trainer's log-probabilities. It takes no place of
        those that requests wait for: with staleness an update would last as long as their queue."""
        probe = self._last_probe
        if probe is None:
            if not self._expected.can_tell:
                self.counters.unproven_updates += 1
                logger.warning("%s cannot prove its weights (%s); give a probe", link.client.url, link.features)
            return
        once = Sampling(max_new_tokens=0, logprob_start_len=0)
        body = generate_body(probe.token_ids, once, link.features, salt=self._salt())
        answer = parse_answer(await link.client.post("/generate", body), probe.token_ids, once, server=link.client.url)
        worst = max(abs(ours - theirs) for ours, theirs in zip(probe.logprobs, answer.input_logprobs[1:], strict=True))
        if not worst <= probe.tolerance:
            raise UnprovenWeights(
                f"{link.client.url}: the probe's log-probabilities are {worst:.2e} from the trainer's, allowed are "
                f"{probe.tolerance:.0e}; the update was lost or the server computes something else"
            )

    async def _forget_prefixes(self) -> None:
        self._ledger.flush()
        self._router = PrefixRouter(len(self._links))

    # What runs in the caller's thread.

    def _update(self, weights: Iterable[tuple[str, torch.Tensor]], version: int) -> None:
        """Pause, push, flush, prove, resume. Whatever fails, no server is left paused."""
        paused: list[Link] = []
        try:
            for index, link in enumerate(self._links):
                self._start(self._pause(index)).result()
                paused.append(link)
            self._expected = self._sync.push(self._links, weights, version)
            for link in self._links:
                self._flush(link)
            self._start(self._forget_prefixes()).result()
            for link in self._links:
                link.call(self._prove(link))
            self.version = version  # before requests go on: their next tokens are of this version
        except BaseException:
            for link in paused:
                with suppress(RolloutError):  # the first failure is the one to tell
                    link.call(link.client.resume())
            raise
        for link in paused:
            link.call(link.client.resume())

    def _flush(self, link: Link) -> None:
        is_busy = self._num_in_flight > 0  # allowed with staleness: the pause has put these requests back
        try:
            link.call(link.client.flush(BUSY_FLUSH_S if is_busy else self._update_deadline_s))
        except ServerError as error:
            if not (is_busy and error.status == 400 and link.features.salt_field):
                raise
            message = "%s does not flush under waiting requests (up to 0.5.20); the salt keeps old prefixes apart"
            logger.warning(message, link.client.url)

    @contextmanager
    def _no_revival(self) -> Iterator[None]:
        """Within the block no request restarts a server or gives one the older weights. Waits for those that do so now."""

        async def take() -> None:
            for lock in self._reviving:
                await lock.acquire()

        self._start(take()).result()
        try:
            yield
        finally:
            for lock in self._reviving:
                self._loop.call_soon_threadsafe(lock.release)

    @contextmanager
    def _tolerating_death(self, index: int) -> Iterator[None]:
        """A server that was launched here and has died ends the block and nothing else; `load_weights` restarts it."""
        server = self._servers[index]
        try:
            yield
        except (ServerUnreachable, StreamBroken):
            if not self._start(self._has_ended(server)).result():
                raise
            logger.warning("server %s died; the next weights restart it", server.url)

    def _check(self, prompt_ids: list[int], sampling: Sampling) -> None:
        """ValueError for what SGLang would refuse, cut short, or, for ids beyond its vocabulary, die of."""
        prompt = np.asarray(prompt_ids, dtype=np.int64)
        if prompt.ndim != 1 or not len(prompt):
            raise ValueError("prompt_ids must hold at least one id")
        if prompt.min() < 0 or prompt.max() >= self.vocab_size:
            raise ValueError(f"prompt_ids must lie in [0, {self.vocab_size}), got [{prompt.min()}, {prompt.max()}]")
        total = len(prompt) + sampling.max_new_tokens
        if sampling.max_new_tokens < 0 or total > self.max_context:
            raise ValueError(
                f"prompt of {len(prompt)} + max_new_tokens {sampling.max_new_tokens} must fit max_context "
                f"{self.max_context}; raise max_context or end the episode earlier"
            )
        if not -1 <= sampling.logprob_start_len < len(prompt):
            raise ValueError(f"logprob_start_len {sampling.logprob_start_len} must lie in [-1, {len(prompt)})")
        if sampling.temperature < 0 or not 0 < sampling.top_p <= 1 or sampling.top_k == 0 or sampling.top_k < -1:
            raise ValueError(
                f"need temperature >= 0, 0 < top_p <= 1 and top_k -1 or >= 1, got temperature "
                f"{sampling.temperature}, top_p {sampling.top_p}, top_k {sampling.top_k}"
            )

    def _require_idle(self, what: str) -> None:
        if self._num_in_flight:
            raise RuntimeError(
                f"the engine cannot {what} while {self._num_in_flight} requests are in flight; await them first"
            )

    def _connect(self, server: Server) -> Link:
        client = self._client_of(server)
        try:
            features = self._start(client.features()).result()
            room = features.max_input_tokens
            if room and room < self.max_context:
                raise ValueError(
                    f"{server.url} takes prompts of {room} tokens, rollout_max_context_len is {self.max_context}; lower "
                    "it, or start the server with a context_length and max_total_tokens some tokens above it"
                )
        except BaseException:
            self._start(client.close()).result()
            raise
        return Link(client=client, features=features, start=self._start)

    def _client_of(self, server: Server) -> SGLangClient:
        return self._client_type(server.url, api_key=server.api_key, admin_key=server.admin_key, **self._limits)

    def _log_features(self) -> None:
        for link in self._links:
            if not link.features.has_seeds:
                logger.warning(
                    "%s ignores seeds; start it with enable_deterministic_inference for runs that repeat", link.client.url
                )
            if not link.features.salt_field:
                logger.warning("%s has no cache salt; only the flush after an update keeps old prefixes out", link.client.url)

    def _start(self, coroutine: Coroutine[Any, Any, Any]) -> Future:
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop)

    async def _in_loop(self, coroutine: Coroutine[Any, Any, Any]) -> Any:
        """Await from the caller's loop; a cancelled caller cancels the request and the server drops it."""
        with self._counting:
            self._num_in_flight += 1
        try:
            return await asyncio.wrap_future(self._start(coroutine))
        finally:
            with self._counting:
                self._num_in_flight -= 1

    def _stop_loop(self) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()
