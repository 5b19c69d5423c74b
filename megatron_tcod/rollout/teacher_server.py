"""A frozen teacher behind an SGLang server: log-probabilities of what the student sampled, from a cache that stays warm.

    teacher = ServerTeacher(lambda: SGLangClient(url, api_key=key), vocab_size=tokenizer.vocab_size, top_k=64)
    teacher.check(tokenizer, max_context=16_384)             # ValueError unless ids mean the same on both sides
    targets = teacher.score(microbatches)                    # [ServerTarget], [S] and [S, k] a microbatch
    teacher.warm_ahead(step_prefixes(step + 1, ...))         # returns at once; computed while the student trains
    reuse, counts = teacher.take_prefix_reuse(), teacher.take_counts()

One request a row (`teacher_scores.py` says why). Weights never change, so the cache is never flushed: what several rows
share is computed before they go out, in the groups and waves of `prefix.py`, and the prefixes of the next step are known
and computed while the student trains. A server that runs with --enable-session-radix-cache evicts them last: warm-ups
carry a session. Rows that several data-parallel replicas share are warmed by each of them.

Back-pressure. At most `max_inflight_tokens` tokens are with the server, a longer row alone; rows that wait are not made
into requests yet, and `score` returns when all are answered. At most one warm-up is under way, because whoever comes next
waits for it. A teacher that is slower than the trainer thus makes the trainer wait and nothing grow.

It starts no server, holds no weights and updates none. Log-probabilities are of temperature 1.
"""

from __future__ import annotations

import asyncio
import logging
import threading
import uuid
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass, fields
from typing import Any, TypeVar

import numpy as np
import torch
import torch.distributed as dist

from megatron_tcod.rollout.chat import TurnTokenizer
from megatron_tcod.rollout.engine import Completion, Sampling
from megatron_tcod.rollout.http_json import RolloutError
from megatron_tcod.rollout.prefix import PrefixLedger, PrefixReuse, plan_prefixes, warm_waves
from megatron_tcod.rollout.sglang_client import ServerFeatures, generate_body, parse_answer
from megatron_tcod.rollout.teacher_identity import Server, check_teacher
from megatron_tcod.rollout.teacher_scores import (
    RowScore,
    ScoredRow,
    map_target,
    read_score,
    rows_of,
    score_body,
    unset_target,
)
from megatron_tcod.trajectory import Microbatch, ServerTarget

Result = TypeVar("Result")
logger = logging.getLogger(__name__)

WARM_UP = Sampling(max_new_tokens=0)
WORTH_A_REQUEST = 32
"""A prefix is warmed where that saves at least so many tokens."""


class TeacherFailed(OSError):
    """The rank that asks the teacher's server failed; its own message names the cause."""


@dataclass(frozen=True, kw_only=True)
class ScoreCounts:
    """Tokens of scored rows. Example: `ScoreCounts(rows=8, tokens=4608, computed=520, projected=512, trained=448)`"""

    rows: int = 0
    tokens: int = 0
    computed: int = 0
    """Not served from the server's cache."""
    projected: int = 0
    """Given a log-probability: from a row's first trained token to its last."""
    trained: int = 0

    def __add__(self, other: ScoreCounts) -> ScoreCounts:
        return ScoreCounts(**{f.name: getattr(self, f.name) + getattr(other, f.name) for f in fields(self)})


class ServerTeacher:
    """See the module docstring. It serves one caller; its requests run on a thread with an event loop of their own."""

    def __init__(
        self,
        connect: Callable[[], Server],
        *,
        vocab_size: int,
        top_k: int = 0,
        max_inflight_tokens: int = 131072,
        tp_group: dist.ProcessGroup | None = None,
        is_last_stage: bool = True,
    ) -> None:
        """`vocab_size` are the ids that mean something to the student. `top_k` 0 asks for the sampled token alone.
        `connect` is called by the rank that asks: the first of `tp_group`, on the last pipeline stage."""
        if not 0 <= top_k <= vocab_size or max_inflight_tokens < 1:
            raise ValueError(f"need 0 <= top_k <= {vocab_size}, max_inflight_tokens >= 1: {top_k}, {max_inflight_tokens}")
        self.vocab_size, self.top_k = vocab_size, top_k
        self._tp_group, self._is_last_stage = tp_group, is_last_stage
        self._is_asking = is_last_stage and (tp_group is None or dist.get_rank(tp_group) == 0)
        self._ledger, self._counts = PrefixLedger(), ScoreCounts()
        self._room = _TokenRoom(max_inflight_tokens)
        self._warming: asyncio.Task | None = None
        self._fresh: list[np.ndarray] = []
        """Prefixes that were warmed since the last rows were scored."""
        self._session_id = ""
        if self._is_asking:
            self._server = connect()
            self._loop = asyncio.new_event_loop()
            self._thread = threading.Thread(target=self._loop.run_forever, name="teacher_server", daemon=True)
            self._thread.start()
            try:
                self._call(self._open())
            except BaseException:
                self.close()
                raise

    def check(self, tokenizer: TurnTokenizer, *, max_context: int) -> None:
        """Raises ValueError where the server's ids are not `tokenizer`'s, its model has fewer, or rows of `max_context`
        tokens do not fit. Collective over `tp_group`."""
        self._on_asking_rank(lambda: self._call(check_teacher(self._server, tokenizer, max_context=max_context)))

    @torch.no_grad()
    def score(self, microbatches: list[Microbatch]) -> list[ServerTarget | None]:
        """Targets [S] of each microbatch, on its device; None on every stage but the last. Collective over `tp_group`.

        Raises the errors of `http_json.py`, and TeacherFailed on the ranks that did not ask.
        """
        if not self._is_last_stage:
            return [None] * len(microbatches)
        targets = self._on_asking_rank(lambda: self._score(microbatches))
        if self._tp_group is None:
            return targets
        if targets is None:
            targets = [
                unset_target(one.positions.numel(), self.top_k, one.token_ids.device) for one in microbatches
            ]
        return [map_target(target, self._from_asking_rank) for target in targets]

    def warm_ahead(self, prefixes: Sequence[Sequence[int]]) -> None:
        """Have the server compute prefixes while the caller goes on, as many as its cache holds together.

        The next `score` or `warm_ahead` waits for it. A failure is logged: scoring computes what is missing.
        """
        if self._is_asking and prefixes:
            first = plan_prefixes(prefixes, budget=self._cache_tokens)[0]
            self._call(self._start_warming(warm_waves([prefixes[index] for index in first.members])))

    def take_prefix_reuse(self) -> PrefixReuse:
        """What the server's cache did since the last call (`prefix.py`). The unbounded cache beside it holds the prefixes
        of the run and not what the student sampled, which recurs by chance only."""
        return self._ledger.take()

    def take_counts(self) -> ScoreCounts:
        """Tokens scored since the last call."""
        counts, self._counts = self._counts, ScoreCounts()
        return counts

    def close(self) -> None:
        """End the session, the connection and a warm-up that is under way. The server goes on. Harmless when called again."""
        if not self._is_asking or self._loop.is_closed():
            return
        try:
            self._call(self._close())
        finally:
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join()
            self._loop.close()

    # What runs on the teacher's thread.

    async def _open(self) -> None:
        openapi, info = await self._server.get("/openapi.json"), await self._server.get("/server_info")
        self._features = ServerFeatures.from_answers(openapi, info, server=self._server.url)
        request = openapi.get("components", {}).get("schemas", {}).get("GenerateReqInput", {}).get("properties", {})
        self._is_flat = "return_flat_raw_top_logprobs_b64" in request
        total = int(info.get("max_total_num_tokens") or 0)
        # What the rows in flight leave over, but half of it at least.
        self._cache_tokens = max(total - self._room.limit, total // 2) or None
        if not self._features.has_sessions:
            logger.info("%s runs without --enable-session-radix-cache: rows may evict the prefixes", self._server.url)
            return
        session_id = f"teacher-{uuid.uuid4().hex}"
        await self._server.post("/open_session", {"capacity_of_str_len": 0, "session_id": session_id})
        self._session_id = session_id

    async def _close(self) -> None:
        if self._warming is not None:
            self._warming.cancel()
            await asyncio.gather(self._warming, return_exceptions=True)
        try:
            if self._session_id:
                await self._server.post("/close_session", {"session_id": self._session_id})
        except RolloutError as error:
            logger.warning("the teacher's session was not closed: %s", error)
        finally:
            await self._server.close()

    async def _score_rows(self, rows: list[ScoredRow], tokens: list[np.ndarray]) -> list[RowScore]:
        """Warm what rows share, then send them, both in the order of `prefix.py`."""
        await self._finish_warming()
        if not rows:
            return []
        ids = [tokens[row.microbatch][row.tokens[: row.num_tokens]] for row in rows]  # [N] each
        scores: dict[int, RowScore] = {}

        async def ask(index: int) -> None:
            scores[index] = await self._ask(rows[index], ids[index])

        prefixes = [one[: row.num_prefix] for one, row in zip(ids, rows, strict=True)]
        fresh, self._fresh = self._fresh, []
        for group in plan_prefixes(prefixes, budget=self._cache_tokens, worth=WORTH_A_REQUEST):
            cold = [prefix for prefix in group.prefixes if not any(_begins_with(one, prefix) for one in fresh)]
            await self._warm(warm_waves(cold, least=WORTH_A_REQUEST))
            await self._in_turn([(rows[index].num_tokens, ask(index)) for index in group.members])
        self._fresh = []  # rows may have evicted them
        return [scores[index] for index in range(len(rows))]

    async def _ask(self, row: ScoredRow, ids: np.ndarray) -> RowScore:
        """Score one row, ids [N]."""
        asked, prompt = self._ledger.submit(ids[: row.num_prefix], row.sampling), ids.tolist()
        body = score_body(prompt, row, self._features, top_k=self.top_k, is_flat=self._is_flat)
        answer = await self._server.post("/generate", body)
        score = read_score(
            answer, prompt, row, top_k=self.top_k, vocab_size=self.vocab_size, server=self._server.url
        )
        self._ledger.finish(asked, _answered(row.num_tokens, score.num_cached))
        self._counts += ScoreCounts(
            rows=1,
            tokens=row.num_tokens,
            computed=row.num_tokens - score.num_cached,
            projected=row.num_tokens - row.num_prefix,
            trained=len(row.trained),
        )
        return score

    async def _warm(self, waves: list[list[list[int]]]) -> None:
        for wave in waves:
            await self._in_turn([(len(prefix), self._warm_one(prefix)) for prefix in wave])

    async def _warm_one(self, prefix: list[int]) -> None:
        asked = self._ledger.submit(prefix, WARM_UP)
        body = generate_body(prefix, WARM_UP, self._features, salt="")
        answer = await self._server.post("/generate", body | ({"session_id": self._session_id} if self._session_id else {}))
        parsed = parse_answer(answer, prefix, WARM_UP, server=self._server.url)
        self._fresh.append(np.asarray(prefix, np.int64))
        self._ledger.finish(asked, _answered(len(prefix), parsed.cached_tokens))

    async def _start_warming(self, waves: list[list[list[int]]]) -> None:
        await self._finish_warming()
        self._warming = asyncio.create_task(self._warm(waves), name="teacher_warm_ahead")

    async def _finish_warming(self) -> None:
        task, self._warming = self._warming, None
        try:
            if task is not None:
                await task
        except Exception as error:  # whatever the server did, scoring tells
            logger.warning("warming the teacher's next prefixes failed: %s", _first_of(error))

    async def _in_turn(self, work: Sequence[tuple[int, Coroutine[Any, Any, None]]]) -> None:
        """Run coroutines, each when there is room for its tokens. On a failure the others are cancelled."""
        waiting = list(reversed(work))
        try:
            async with asyncio.TaskGroup() as group:
                while waiting:
                    num_tokens = waiting[-1][0]
                    await self._room.take(num_tokens)
                    task = group.create_task(waiting.pop()[1])
                    task.add_done_callback(lambda _, n=num_tokens: self._room.give_back(n))
        finally:
            for _, coroutine in waiting:
                coroutine.close()

    # What runs on the caller's thread.

    def _score(self, microbatches: list[Microbatch]) -> list[ServerTarget]:
        rows = [row for index, microbatch in enumerate(microbatches) for row in rows_of(index, microbatch)]
        tokens = [microbatch.token_ids.cpu().numpy() for microbatch in microbatches]
        scores = self._call(self._score_rows(rows, tokens))
        targets = [unset_target(microbatch.positions.numel(), self.top_k) for microbatch in microbatches]
        for row, score in zip(rows, scores, strict=True):
            target = targets[row.microbatch]
            target.logprob[row.slots] = torch.from_numpy(score.logprobs)
            if self.top_k:
                target.topk_ids[row.slots] = torch.from_numpy(score.topk_ids)
                target.topk_logprobs[row.slots] = torch.from_numpy(score.topk_logprobs)
        assert not any(target.logprob.isnan().any() for target in targets), "a trained token without a score"
        devices = [microbatch.token_ids.device for microbatch in microbatches]
        return [map_target(target, lambda t, to=device: t.to(to)) for target, device in zip(targets, devices, strict=True)]

    def _on_asking_rank(self, work: Callable[[], Result]) -> Result | None:
        """What `work` returns on the rank that asks, None on the others of `tp_group`; where it fails, all fail."""
        result, error = None, None
        if self._is_asking:
            try:
                result = work()
            except Exception as failure:  # the others wait to hear of it
                error = failure
        if self._tp_group is not None and self._is_last_stage:
            is_nccl = dist.get_backend(self._tp_group) == "nccl"
            failed = torch.tensor([float(error is not None)], device="cuda" if is_nccl else "cpu")
            if self._from_asking_rank(failed).item() and error is None:
                raise TeacherFailed("the first rank of the tensor-parallel group could not ask the teacher's server")
        if error is not None:
            raise error
        return result

    def _from_asking_rank(self, tensor: torch.Tensor) -> torch.Tensor:
        dist.broadcast(tensor, dist.get_global_rank(self._tp_group, 0), group=self._tp_group)
        return tensor

    def _call(self, work: Coroutine[Any, Any, Result]) -> Result:
        """Run a coroutine on the teacher's thread and wait; of several errors the first stands for all."""
        future = asyncio.run_coroutine_threadsafe(work, self._loop)
        try:
            return future.result()
        except BaseException as error:
            future.cancel()
            raise _first_of(error) from None


class _TokenRoom:
    """How many more tokens may be with the server. One event loop's."""

    def __init__(self, limit: int) -> None:
        self.limit = self._free = limit
        self._has_changed = asyncio.Event()

    async def take(self, num_tokens: int) -> None:
        """Wait for room; what exceeds all of it goes alone."""
        while self._free < min(num_tokens, self.limit):
            self._has_changed.clear()
            await self._has_changed.wait()
        self._free -= min(num_tokens, self.limit)

    def give_back(self, num_tokens: int) -> None:
        self._free += min(num_tokens, self.limit)
        self._has_changed.set()


def _begins_with(ids: np.ndarray, prefix: list[int]) -> bool:
    return len(ids) >= len(prefix) and bool((ids[: len(prefix)] == np.asarray(prefix)).all())


def _answered(prompt_tokens: int, cached_tokens: int) -> Completion:
    """What a ledger wants to know of a request that sampled nothing."""
    return Completion(
        token_ids=[], logprobs=[], finish_reason="length", cached_tokens=cached_tokens, prompt_tokens=prompt_tokens,
        weight_version=0,
    )  # fmt: skip


def _first_of(error: BaseException) -> BaseException:
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error
