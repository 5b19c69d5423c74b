"""The rows that decode together, one token each a step, without touching a Python object per request.

    rows = RunningRows(decoder, num_rows=32, max_context=1024, vocab_size=512)
    ...                                           # prompts computed into rows.slots, first logits at hand
    rows.start([3, 5], prompts, samplings, logits)  # samples each row's first token
    for row in rows.finished(): rows.result(row); rows.stop(row)
    rows.step(); rows.finished()                  # ...

All state is tables indexed by row and absolute position: `ids[row, p]` is the token at position p, `uniforms[row, p]`
the number that draws it. `positions[row]` is where the newest token stands; its KV is computed by the next step, so the
KV of a row's newest token never exists. An idle row stands at the scratch position.

It knows nothing of waiting requests, cached prefixes or callers.
"""

from __future__ import annotations

import numpy as np
import torch

from megatron_tcod.rollout.decoder import Decoder
from megatron_tcod.rollout.engine import Sampling
from megatron_tcod.rollout.kv_slots import DecodeAttention, KVSlots
from megatron_tcod.rollout.sampler import DrawRule, draw, uniform

SHARED_WORTH = 2**17
"""Key elements a layer that reading a shared prefix once must save to be worth the extra products. Measured with 4, 8
and 32 rows of three small models: half of it loses 3 to 15 % of a step, it itself breaks even, twice of it gains 6 to
30 %."""


class RunningRows:
    """See the module docstring. All work must happen under `torch.inference_mode`."""

    def __init__(self, decoder: Decoder, *, num_rows: int, max_context: int, vocab_size: int) -> None:
        self.slots = KVSlots(decoder.shape, num_rows=num_rows, num_positions=max_context, dtype=decoder.dtype)
        self._decoder, self._vocab_size = decoder, vocab_size
        self._attention = DecodeAttention(self.slots)
        width = max_context + 1
        self.ids = np.zeros((num_rows, width), np.int64)
        self.logprobs = np.zeros((num_rows, width), np.float32)
        self.is_active = np.zeros(num_rows, bool)
        self._uniforms = np.zeros((num_rows, width))
        self._row_origin = np.arange(num_rows) * width  # where position 0 of a row lies in a flat table
        self._positions = np.full(num_rows, self.slots.scratch, np.int64)
        self._positions_tensor = torch.from_numpy(self._positions)  # shares memory
        self._last_positions = np.zeros(num_rows, np.int64)  # where the last allowed token stands
        self._sizes = np.zeros(num_rows, np.int64)  # prompt lengths
        self._stops = np.full((num_rows, 1), -1, np.int64)  # [rows, most stop ids of any request]
        self._newest = torch.zeros(num_rows, dtype=torch.int64)
        self._is_done = np.zeros(num_rows, bool)
        self._samplings: list[Sampling | None] = [None] * num_rows
        self._rule: DrawRule | None = None

    def start(self, rows: list[int], prompts: list[np.ndarray], samplings: list[Sampling], logits: torch.Tensor) -> None:
        """Sample the first tokens of `rows` from `logits` [R, V] and let them run. Their `prompts` are in the slots."""
        sizes = [len(prompt) for prompt in prompts]
        for row, prompt, sampling in zip(rows, prompts, samplings, strict=True):
            self.ids[row, : len(prompt)] = prompt
            self._set_tables(row, len(prompt), sampling)
        uniforms = torch.from_numpy(self._uniforms[rows, sizes])
        ids, logprobs = draw(logits, DrawRule.of(samplings), uniforms)
        self._positions[rows] = sizes
        self._newest[rows] = ids
        self._take(np.asarray(rows), ids.numpy(), logprobs.numpy())
        self._rule = None

    def step(self) -> None:
        """Compute each running row's newest token and sample the one after it."""
        if self._rule is None:
            self._num_rows = 1 + int(self.is_active.nonzero()[0].max())
            self._rule = DrawRule.of(self._samplings[: self._num_rows])
            self._every_row = np.arange(self._num_rows)
            self._shared = self._find_shared()
        n = self._num_rows
        positions, active = self._positions[:n], self.is_active[:n]
        num_seen = int((positions * active).max()) + 1
        position_tensor = self._positions_tensor[:n]  # [n]
        self._attention.begin(num_rows=n, positions=position_tensor, num_seen=num_seen, shared=self._shared)
        hidden = self._decoder.extend(self._newest[:n], position_tensor, self._attention.attend)  # [n, H]
        positions += active
        uniforms = torch.from_numpy(self._uniforms.reshape(-1)[self._row_origin[:n] + positions])  # [n]
        ids, logprobs = draw(self._decoder.logits(hidden, self._vocab_size), self._rule, uniforms)
        self._newest[:n] = ids
        self._take(self._every_row, ids.numpy(), logprobs.numpy())

    def finished(self) -> list[int]:
        """Rows whose newest token is their last: a stop id, the length limit, or a log-probability that is no number."""
        return self._is_done.nonzero()[0].tolist() if self._is_done.any() else []

    def result(self, row: int) -> tuple[list[int], list[float], str]:
        """Sampled ids, their log-probabilities, and the finish reason."""
        start, stop = self._sizes[row], self._positions[row] + 1
        ids = self.ids[row, start:stop].tolist()
        reason = "stop" if ids[-1] in self._samplings[row].stop_token_ids else "length"
        return ids, self.logprobs[row, start:stop].tolist(), reason

    def stop(self, row: int) -> None:
        """The row is idle from now on. Its KV stays."""
        self.is_active[row] = self._is_done[row] = False
        self._positions[row] = self.slots.scratch
        self._samplings[row] = None
        self._attention.retire(row)
        self._rule = None

    def _find_shared(self) -> tuple[int, int]:
        """A running row and how many first prompt tokens it shares with all others; 0 where too few to matter."""
        rows = self.is_active.nonzero()[0]
        shape = self.slots.shape
        shortest = int(self._sizes[rows].min())
        saved = (len(rows) - 1) * shape.num_kv_heads * shape.head_dim  # elements a shared token
        if saved * shortest < SHARED_WORTH:
            return 0, 0
        differs = (self.ids[rows, :shortest] != self.ids[rows[0], :shortest]).any(0)  # [shortest]
        shared = int(differs.argmax()) if differs.any() else shortest
        return (int(rows[0]), shared) if saved * shared >= SHARED_WORTH else (0, 0)

    def _set_tables(self, row: int, size: int, sampling: Sampling) -> None:
        last = size + sampling.max_new_tokens
        self._attention.admit(row, size)
        self._samplings[row], self._sizes[row], self._last_positions[row] = sampling, size, last - 1
        self._uniforms[row, size:last] = uniform(sampling.seed, np.arange(size, last))
        missing = len(sampling.stop_token_ids) - self._stops.shape[1]
        if missing > 0:
            self._stops = np.pad(self._stops, ((0, 0), (0, missing)), constant_values=-1)
        self._stops[row] = -1
        self._stops[row, : len(sampling.stop_token_ids)] = sampling.stop_token_ids
        self.is_active[row] = True

    def _take(self, rows: np.ndarray, ids: np.ndarray, logprobs: np.ndarray) -> None:
        """Note the newest tokens of `rows` [R] and which of the rows are done."""
        positions = self._positions[rows]
        at = self._row_origin[rows] + positions
        self.ids.reshape(-1)[at] = ids
        self.logprobs.reshape(-1)[at] = logprobs
        done = (positions >= self._last_positions[rows]) | (self._stops[rows] == ids[:, None]).any(1)
        done |= ~np.isfinite(logprobs)
        self._is_done[rows] = done & self.is_active[rows]
