"""A rollout engine inside the trainer's process: continuous batching and prefix reuse over the trainer's own weights.

    engine = EmbeddedEngine(hf_config, max_running=32, max_total_tokens=65536, max_context=1024)
    engine.load_weights(student.hf_weights(), version=0)
    completion = await engine.generate(prompt_ids, Sampling(max_new_tokens=32, seed=7, stop_token_ids=(2,)))

It answers as SGLang answers: `cached_tokens` counts reused prompt tokens, at most all but the last one;
`logprob_start_len` returns the prompt's log-probabilities from that position on (temperature 1, the first entry None)
and limits reuse to it; a request sees the prefixes that EARLIER steps computed; a finished request leaves its prompt
and all sampled tokens but the last in the tree; new weights drop every cached KV.

One task of the running event loop does all the work: it takes waiting requests, computes their prompts together, decodes
all running rows together, and yields after every step, so that an episode continues with its next turn while the others
decode. Nothing runs when nobody waits. The same requests in the same order give the same results, and a request's tokens
do not depend on its neighbours beyond rounding (`sampler.py`).

`max_total_tokens` bounds the tokens the tree holds plus those that running requests may still add; the least recently
used prefixes go first. The rows of running requests (`max_running` x `max_context` positions, touched on demand) come on
top of it.

It refuses at once, with ValueError, what it could never serve. A failure inside the loop reaches every caller that waits.
It serves one event loop at a time, on the CPU, in fp32 unless told otherwise.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from megatron_tcod.rollout.decoder import Decoder, DecoderShape
from megatron_tcod.rollout.engine import Completion, Sampling
from megatron_tcod.rollout.kv_slots import PrefillAttention
from megatron_tcod.rollout.prefix import PrefixLedger, PrefixReuse, Submitted, warm_waves
from megatron_tcod.rollout.radix import Match, Node, RadixTree
from megatron_tcod.rollout.running_rows import RunningRows

SHARED_IN_BATCH = 32
"""A waiting request whose next uncomputed tokens, at least this many, equal those of one just taken waits a step."""
PADDING_LIMIT = 1.5
"""Prompts computed in one pass are padded to at most this multiple of their real length, summed over the pass."""
SCORED_POSITIONS = 512
"""Prompt positions projected to the vocabulary at a time when input log-probabilities are asked for."""


class NonFiniteLogits(FloatingPointError):
    """The model answered NaN or infinity for one request; its neighbours are not affected."""


@dataclass(eq=False)
class _Request:
    """One call of `generate`, from waiting to done."""

    prompt: np.ndarray  # [N] int64
    sampling: Sampling
    future: asyncio.Future
    asked: Submitted
    """Its entry in the ledger."""
    row: int = -1
    num_cached: int = 0
    num_computed: int = 0
    """Prompt tokens whose KV is in the row."""
    node: Node | None = None
    """Where its held prefix ends in the tree; pinned while it runs."""
    num_reserved: int = 0
    """Tokens it may still add to the tree."""
    last_hidden: torch.Tensor | None = None  # [H] at the prompt's last position
    scored: list[torch.Tensor] = field(default_factory=list)  # [n, H] pieces of prompt positions [score_from, N - 1)

    @property
    def num_left(self) -> int:
        return len(self.prompt) - self.num_computed

    @property
    def score_from(self) -> int:
        """First position whose hidden state scores its successor; N - 1, that is none, unless asked for."""
        start = self.sampling.logprob_start_len
        return start if start >= 0 else len(self.prompt) - 1


@dataclass
class EngineCounters:
    """What the engine did since it was built."""

    requests: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    computed_tokens: int = 0
    """Prompt tokens that went through the model."""
    sampled_tokens: int = 0
    prefill_passes: int = 0
    decode_steps: int = 0


class EmbeddedEngine:
    """Implements `engine.RolloutEngine` over `Decoder`; see the module docstring."""

    def __init__(
        self,
        hf_config: dict[str, Any],
        *,
        max_running: int,
        max_total_tokens: int,
        max_context: int,
        vocab_size: int | None = None,
        prefill_tokens: int = 2048,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        """`vocab_size` is the number of real ids: padding rows of the output head beyond it are neither sampled nor
        part of the softmax. Default: the config's. `prefill_tokens` (padding included) go through one forward pass;
        longer prompts take several."""
        self.shape = DecoderShape.from_hf(hf_config)
        self.vocab_size = self.shape.vocab_size if vocab_size is None else vocab_size
        if not 0 < self.vocab_size <= self.shape.vocab_size:
            raise ValueError(f"vocab_size {vocab_size} must lie in [1, {self.shape.vocab_size}], the rows of the head")
        if max_running < 1 or max_context < 2:
            raise ValueError(f"need max_running >= 1 and max_context >= 2, got {max_running} and {max_context}")
        if max_total_tokens < max_context:
            raise ValueError(f"max_total_tokens {max_total_tokens} cannot hold one request of max_context {max_context}")
        self._prefill_tokens = prefill_tokens
        self.max_running, self.max_total_tokens, self.max_context = max_running, max_total_tokens, max_context
        self.version = -1
        self.counters = EngineCounters()
        self._decoder = Decoder(self.shape, max_positions=max_context + 1, dtype=dtype)
        self._waiting: deque[_Request] = deque()
        self._task: asyncio.Task | None = None
        self._is_released = False
        self._ledger = PrefixLedger()
        self._drop_state()

    async def generate(self, prompt_ids: list[int], sampling: Sampling) -> Completion:
        """See `engine.RolloutEngine`. `max_new_tokens=0` computes the prompt and returns no ids.

        Raises ValueError for a request that cannot be served, NonFiniteLogits where the model breaks on it, and
        RuntimeError without weights.
        """
        if not self._decoder.has_weights:
            raise RuntimeError("the engine holds no weights (never loaded, or released); call load_weights first")
        prompt = self._check(prompt_ids, sampling)
        loop = asyncio.get_running_loop()
        request = _Request(prompt, sampling, loop.create_future(), self._ledger.submit(prompt, sampling))
        self._waiting.append(request)
        if self._task is None or self._task.done():
            self._task = loop.create_task(self._run(), name="embedded_engine")
        return await request.future

    async def prewarm(self, prefixes: Iterable[list[int]]) -> None:
        """See `engine.RolloutEngine`. What several prefixes share is computed first, once."""
        once = Sampling(max_new_tokens=0)
        for wave in warm_waves([list(prefix) for prefix in prefixes], least=SHARED_IN_BATCH):
            await asyncio.gather(*(self.generate(ids, once) for ids in wave))

    @property
    def cache_tokens(self) -> int:
        """See `engine.RolloutEngine`."""
        return self.max_total_tokens

    def take_prefix_reuse(self) -> PrefixReuse:
        """What its cache did since the last call; `prefix.py` defines the counts."""
        return self._ledger.take()

    def close(self) -> None:
        """It holds nothing outside this process."""

    @contextmanager
    def released(self) -> Iterator[None]:
        """See `engine.RolloutEngine`. After the block the engine waits for `load_weights`."""
        self._require_idle("be released")
        self._decoder.release_weights()
        self._rows = None
        self._tree.flush()
        self._ledger.flush()
        self._is_released = True
        try:
            yield
        finally:
            self._is_released = False

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]], version: int) -> None:
        """See `engine.RolloutEngine`. Keeps references to the tensors; only q/k/v and gate/up are copied, fused.

        Raises ValueError naming missing, unknown or misshapen tensors, and leaves the old weights then.
        """
        self._require_idle("take weights")
        if self._is_released:
            raise RuntimeError("load_weights inside released(): leave the block first, the memory is the trainer's there")
        with torch.inference_mode():
            self._decoder.load_weights(weights)
        self._drop_state()
        self.version = version

    @property
    def num_held_tokens(self) -> int:
        """Tokens whose KV the tree holds now."""
        return self._tree.num_tokens

    async def _run(self) -> None:
        try:
            while self._waiting or self._num_running:
                self._admit()
                if self._num_running:
                    self._decode()
                await asyncio.sleep(0)
        except BaseException as error:
            self._abandon(error)
            if not isinstance(error, Exception):
                raise

    def _abandon(self, error: BaseException) -> None:
        """Tell everyone who waits why nothing will come, and forget all requests."""
        requests = [*self._waiting, *(r for r in self._running if r is not None)]
        self._waiting.clear()
        self._drop_state()
        for request in requests:
            if request.future.done():
                continue
            if isinstance(error, Exception):
                request.future.set_exception(error)
            else:
                request.future.cancel()

    def _drop_state(self) -> None:
        """No request, no cached KV."""
        self._tree = RadixTree()
        self._ledger.flush()
        self._rows: RunningRows | None = None  # built when first needed, so that released() really frees it
        self._running: list[_Request | None] = [None] * self.max_running
        self._num_running = 0
        self._num_reserved = 0
        self._row_after: dict[Node, int] = {}  # idle row that still holds the KV of the path to a node
        self._node_of_row: list[Node | None] = [None] * self.max_running

    @torch.inference_mode()
    def _admit(self) -> None:
        """Take waiting requests while rows and tokens last, compute their prompts, sample their first tokens."""
        taken: list[_Request] = []
        deferred: list[_Request] = []
        beginnings: set[tuple[int, ...]] = set()
        while self._waiting and self._num_running < self.max_running:
            request = self._waiting.popleft()
            if request.future.done():  # its caller was cancelled
                continue
            hit = self._tree.match(request.prompt)
            cached = min(hit.length, len(request.prompt) - 1, request.score_from)
            beginning = tuple(request.prompt[: cached + SHARED_IN_BATCH].tolist())
            if beginning in beginnings:
                deferred.append(request)
            elif self._reserve(request, hit):
                if len(beginning) == cached + SHARED_IN_BATCH and hit.length == cached:
                    beginnings.add(beginning)
                self._seat(request, hit, cached)
                taken.append(request)
            else:
                deferred.append(request)
                break
        self._waiting.extendleft(reversed(deferred))
        if taken:
            self._prefill(taken)

    def _reserve(self, request: _Request, hit: Match) -> bool:
        """Pin the held prefix and set aside what the request may add; False when what runs now leaves no room."""
        needed = len(request.prompt) - hit.length + request.sampling.max_new_tokens
        self._tree.pin(hit.node)
        excess = self._tree.num_tokens + self._num_reserved + needed - self.max_total_tokens
        if excess > 0:
            # A sixteenth more than needed, so that a full tree is not searched for victims at every request.
            for node in self._tree.evict(excess + self.max_total_tokens // 16):
                self._row_after.pop(node, None)
            excess = self._tree.num_tokens + self._num_reserved + needed - self.max_total_tokens
        if excess > 0:
            assert self._num_running, "an idle engine must have room for any checked request"
            self._tree.unpin(hit.node)
            return False
        request.node, request.num_reserved = hit.node, needed
        self._num_reserved += needed
        return True

    def _seat(self, request: _Request, hit: Match, cached: int) -> None:
        """Give the request a row with its cached prefix: the row that computed it, if that is still free."""
        if self._rows is None:
            self._rows = RunningRows(
                self._decoder, num_rows=self.max_running, max_context=self.max_context, vocab_size=self.vocab_size
            )
        row = self._row_after.pop(hit.node, None)
        if row is None:
            free = [row for row, running in enumerate(self._running) if running is None]
            row = next((row for row in free if self._node_of_row[row] is None), free[0])
            hit.read(lambda start, segment, n: self._rows.slots.write(row, start, segment, n), cached)
        if self._row_after.get(self._node_of_row[row]) == row:
            del self._row_after[self._node_of_row[row]]
        self._node_of_row[row] = None
        self._running[row] = request
        self._num_running += 1
        request.row, request.num_cached, request.num_computed = row, cached, cached

    def _prefill(self, requests: list[_Request]) -> None:
        for batch in _split_by_length(requests, self._prefill_tokens):
            while batch:
                self._prefill_pass(batch)
                batch = [request for request in batch if request.num_left]
        for request in requests:
            self._enter_tree(request, request.prompt)
            self.counters.requests += 1
            self.counters.prompt_tokens += len(request.prompt)
            self.counters.cached_tokens += request.num_cached
        playing = [request for request in requests if request.sampling.max_new_tokens]
        for request in requests:
            if not request.sampling.max_new_tokens:
                self._finish(request, [], [], "length")
        if playing:
            hidden = torch.stack([request.last_hidden for request in playing])  # [R, H]
            logits = self._decoder.logits(hidden, self.vocab_size)  # [R, V]
            rows, prompts = [r.row for r in playing], [r.prompt for r in playing]
            self._rows.start(rows, prompts, [r.sampling for r in playing], logits)
            self._collect_finished()

    def _prefill_pass(self, batch: list[_Request]) -> None:
        """Compute up to `prefill_tokens` of what is left of the prompts in `batch`."""
        longest = max(1, self._prefill_tokens // len(batch))
        starts = [request.num_computed for request in batch]
        lengths = [min(longest, request.num_left) for request in batch]
        attention = PrefillAttention(self._rows.slots, rows=[r.row for r in batch], starts=starts, lengths=lengths)
        pieces = [r.prompt[s : s + n] for r, s, n in zip(batch, starts, lengths, strict=True)]
        ids = torch.from_numpy(np.concatenate(pieces))  # [T]
        hidden = self._decoder.extend(ids, attention.positions, attention.attend)  # [T, H]
        for request, start, states in zip(batch, starts, hidden.split(lengths), strict=True):
            low = max(request.score_from - start, 0)
            high = min(len(request.prompt) - 1 - start, len(states))
            if low < high:
                request.scored.append(states[low:high])
            request.num_computed += len(states)
            request.last_hidden = states[-1]
        self.counters.prefill_passes += 1
        self.counters.computed_tokens += len(ids)

    @torch.inference_mode()
    def _decode(self) -> None:
        self._rows.step()
        self.counters.decode_steps += 1
        self._collect_finished()

    def _collect_finished(self) -> None:
        for row in self._rows.finished():
            ids, logprobs, reason = self._rows.result(row)
            self._rows.stop(row)
            self._finish(self._running[row], ids, logprobs, reason)

    def _finish(self, request: _Request, ids: list[int], logprobs: list[float], reason: str) -> None:
        """Answer the caller and turn the row into an idle one that the next turn may continue."""
        is_sound = bool(np.isfinite(logprobs).all())
        if is_sound:
            self._enter_tree(request, np.concatenate([request.prompt, np.array(ids[:-1], np.int64)]))
            self._row_after[request.node] = request.row
            self._node_of_row[request.row] = request.node
        else:
            self._rows.slots.clear(request.row)
        self._tree.unpin(request.node)
        self._num_reserved -= request.num_reserved
        self._running[request.row] = None
        self._num_running -= 1
        self.counters.sampled_tokens += len(ids)
        if request.future.done():  # its caller was cancelled
            return
        if not is_sound:
            request.future.set_exception(
                NonFiniteLogits(f"logits of weight version {self.version} are not finite after {len(ids) - 1} tokens")
            )
            return
        completion = Completion(
            token_ids=ids,
            logprobs=logprobs,
            finish_reason=reason,
            cached_tokens=request.num_cached,
            prompt_tokens=len(request.prompt),
            weight_version=self.version,
            input_logprobs=self._score(request),
        )
        self._ledger.finish(request.asked, completion)
        request.future.set_result(completion)

    def _enter_tree(self, request: _Request, tokens: np.ndarray) -> None:
        """Hold the computed `tokens` [n] in the tree and move the request's pin to their end."""
        before = self._tree.num_tokens
        node = self._tree.insert(tokens, lambda start, stop: self._rows.slots.segment(request.row, start, stop))
        self._tree.pin(node)
        self._tree.unpin(request.node)
        request.node = node
        added = self._tree.num_tokens - before
        request.num_reserved -= added
        self._num_reserved -= added

    def _score(self, request: _Request) -> list[float | None]:
        """Log-probabilities of prompt tokens `[logprob_start_len, N)`, the first one None."""
        if request.sampling.logprob_start_len < 0:
            return []
        scores: list[float | None] = [None]
        if request.scored:
            hidden = torch.cat(request.scored)  # [N - 1 - start, H]
            targets = torch.from_numpy(request.prompt[request.score_from + 1 :])[:, None]
            for at in range(0, len(hidden), SCORED_POSITIONS):
                logits = self._decoder.logits(hidden[at : at + SCORED_POSITIONS], self.vocab_size)
                logprobs = torch.log_softmax(logits, dim=-1).gather(-1, targets[at : at + SCORED_POSITIONS])
                scores.extend(logprobs[:, 0].tolist())
        return scores

    def _check(self, prompt_ids: list[int], sampling: Sampling) -> np.ndarray:
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
        if sampling.logprob_start_len > len(prompt) - 1:
            raise ValueError(f"logprob_start_len {sampling.logprob_start_len} must lie in [-1, {len(prompt)})")
        if sampling.temperature < 0 or not 0 < sampling.top_p <= 1 or sampling.top_k == 0 or sampling.top_k < -1:
            raise ValueError(
                f"need temperature >= 0, 0 < top_p <= 1 and top_k -1 or >= 1, got temperature "
                f"{sampling.temperature}, top_p {sampling.top_p}, top_k {sampling.top_k}"
            )
        return prompt

    def _require_idle(self, what: str) -> None:
        if self._waiting or self._num_running:
            waiting = len(self._waiting) + self._num_running
            raise RuntimeError(f"the engine cannot {what} while {waiting} requests are in flight; await them first")


def _split_by_length(requests: list[_Request], prefill_tokens: int) -> list[list[_Request]]:
    """Batches whose padding stays below PADDING_LIMIT and which fit one pass where possible, longest first."""
    batches: list[list[_Request]] = []
    real = 0
    for request in sorted(requests, key=lambda r: -r.num_left):
        padded = batches[-1][0].num_left * (len(batches[-1]) + 1) if batches else 0
        if batches and padded <= PADDING_LIMIT * (real + request.num_left) and padded <= prefill_tokens:
            batches[-1].append(request)
            real += request.num_left
        else:
            batches.append([request])
            real = request.num_left
    return batches
