"""Keys and values of the running requests: one contiguous row a request, and attention over these rows.

    slots = KVSlots(shape, num_rows=32, num_positions=1024)
    prefill = PrefillAttention(slots, rows=[3, 5], starts=[96, 0], lengths=[20, 40])
    decoder.extend(prefill.pack(ids), prefill.positions, prefill.attend)
    decoding = DecodeAttention(slots)
    decoding.admit(row=3, length=116)
    decoding.begin(num_rows=6, positions=positions)     # [6], the next position of each row
    decoder.extend(last_ids, positions, decoding.attend)

Rows are contiguous because on a CPU a strided batched matrix product over `[rows, positions, d]` reads each key once at
full speed, where paged caches pay a gather as large as the attention itself. Memory is zero pages until touched:
`num_rows * num_positions` is address space, not memory. Where all rows begin with the same long prefix, decoding reads
it from one row only: one product for all queries, then one softmax over both parts.

A row that is idle keeps its content (the next turn of an episode continues in place) and still takes part in the
decoding product, at the scratch position behind the last real one; its result is ignored. Masks are a large negative
number instead of minus infinity so that such a row stays finite.

It knows no tokens and no requests; who owns which row is the engine's business.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch

from megatron_tcod.rollout.decoder import DecoderShape

MASKED = -1e30


@dataclass(frozen=True)
class KVSegment:
    """KV of `n` consecutive tokens, all layers."""

    keys: torch.Tensor  # [layers, kv_heads, n, d]
    values: torch.Tensor  # [layers, kv_heads, n, d]

    def segment(self, start: int, stop: int) -> KVSegment:
        """An independent copy of tokens `[start, stop)`."""
        return KVSegment(self.keys[:, :, start:stop].clone(), self.values[:, :, start:stop].clone())


class KVSlots:
    """`num_rows` rows of `num_positions` positions, plus one scratch position a row."""

    def __init__(self, shape: DecoderShape, *, num_rows: int, num_positions: int, dtype: torch.dtype) -> None:
        self.shape = shape
        self.num_rows = num_rows
        self.scratch = num_positions
        size = (shape.num_layers, num_rows, shape.num_kv_heads, num_positions + 1, shape.head_dim)
        self.keys = _untouched_zeros(size, dtype)  # [layers, rows, kv_heads, P, d]
        self.values = _untouched_zeros(size, dtype)  # [layers, rows, kv_heads, P, d]

    def write(self, row: int, start: int, segment: KVSegment, num_tokens: int) -> None:
        """Copy the first `num_tokens` of `segment` to positions `[start, start + num_tokens)` of `row`."""
        stop = start + num_tokens
        self.keys[:, row, :, start:stop] = segment.keys[:, :, :num_tokens]
        self.values[:, row, :, start:stop] = segment.values[:, :, :num_tokens]

    def segment(self, row: int, start: int, stop: int) -> KVSegment:
        """An independent copy of positions `[start, stop)` of `row`."""
        return KVSegment(
            self.keys[:, row, :, start:stop].clone(memory_format=torch.contiguous_format),
            self.values[:, row, :, start:stop].clone(memory_format=torch.contiguous_format),
        )

    def clear(self, row: int) -> None:
        self.keys[:, row].zero_()
        self.values[:, row].zero_()

    def flat_index(self, rows: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """Where the vectors of token t, one a kv head, lie in one layer, [T * kv_heads]."""
        heads, size = self.shape.num_kv_heads, self.scratch + 1
        return ((rows[:, None] * heads + torch.arange(heads)) * size + positions[:, None]).view(-1)

    def store(self, layer: int, k: torch.Tensor, v: torch.Tensor, index: torch.Tensor) -> None:
        """Put `k` and `v` [T, kv_heads, d] where `flat_index` says."""
        width = self.shape.head_dim
        self.keys[layer].view(-1, width).index_copy_(0, index, k.reshape(-1, width))
        self.values[layer].view(-1, width).index_copy_(0, index, v.reshape(-1, width))


def _untouched_zeros(size: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """Zeros whose pages the system supplies when they are first written; torch.zeros writes them all at once."""
    num_bytes = math.prod(size) * dtype.itemsize
    return torch.from_numpy(np.zeros(num_bytes, np.uint8)).view(dtype).view(size)


class PrefillAttention:
    """Causal attention of new tokens, packed back to back, over their rows' cached and new positions.

    Request r brings `lengths[r]` tokens for positions `[starts[r], starts[r] + lengths[r])` of row `rows[r]`. Matrix
    products outside attention see T packed tokens; attention pads to the longest request.
    """

    def __init__(self, slots: KVSlots, *, rows: list[int], starts: list[int], lengths: list[int]) -> None:
        self.slots = slots
        self.num_requests, self.longest = len(rows), max(lengths)
        self.num_seen = max(s + n for s, n in zip(starts, lengths, strict=True))
        steps = np.concatenate([np.arange(n) for n in lengths])  # [T] index within the request's new tokens
        request = np.repeat(np.arange(len(rows)), lengths)  # [T]
        self.positions = torch.from_numpy(steps + np.repeat(starts, lengths))  # [T]
        row_of_token = torch.from_numpy(np.asarray(rows)[request])  # [T]
        self.index = slots.flat_index(row_of_token, self.positions)  # [T * kv_heads]
        self.padded_index = torch.from_numpy(request * self.longest + steps)  # [T] into [R * longest]
        self.is_packed = len(steps) == self.num_requests * self.longest
        contiguous = rows == list(range(rows[0], rows[0] + len(rows)))
        self.rows = slice(rows[0], rows[0] + len(rows)) if contiguous else torch.tensor(rows)
        seen = torch.arange(self.num_seen)  # [L]
        reach = torch.tensor(starts)[:, None] + torch.arange(self.longest)  # [R, longest] last visible position
        mask = torch.zeros(len(rows), self.longest, self.num_seen, dtype=slots.keys.dtype)
        self.bias = mask.masked_fill_(seen > reach[:, :, None], MASKED)[:, None, None]  # [R, 1, 1, longest, L]

    def attend(self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        """[T, heads * d]; see `decoder.Attend`."""
        slots, shape = self.slots, self.slots.shape
        slots.store(layer, k, v, self.index)
        keys = slots.keys[layer][:, :, : self.num_seen][self.rows]  # [R, kv_heads, L, d]
        values = slots.values[layer][:, :, : self.num_seen][self.rows]  # [R, kv_heads, L, d]
        groups = shape.num_heads // shape.num_kv_heads
        padded = self._pad(q.reshape(len(q), -1)).view(
            self.num_requests, self.longest, shape.num_kv_heads, groups, shape.head_dim
        )
        padded = padded.permute(0, 2, 3, 1, 4).reshape(self.num_requests, shape.num_kv_heads, -1, shape.head_dim)
        scores = torch.matmul(padded * shape.head_dim**-0.5, keys.transpose(-1, -2))  # [R, kv_heads, groups * longest, L]
        scores.view(self.num_requests, shape.num_kv_heads, groups, self.longest, -1).add_(self.bias)
        seen = torch.matmul(torch.softmax(scores, dim=-1), values)  # [R, kv_heads, groups * longest, d]
        seen = seen.view(self.num_requests, shape.num_heads, self.longest, shape.head_dim).transpose(1, 2)
        seen = seen.reshape(self.num_requests * self.longest, -1)  # [R * longest, heads * d]
        return seen if self.is_packed else seen[self.padded_index]

    def _pad(self, packed: torch.Tensor) -> torch.Tensor:
        if self.is_packed:
            return packed
        padded = packed.new_zeros(self.num_requests * self.longest, packed.shape[1])
        padded[self.padded_index] = packed
        return padded


class DecodeAttention:
    """One new token for each of the first `num_rows` rows, over everything their rows hold."""

    def __init__(self, slots: KVSlots) -> None:
        self.slots = slots
        shape, size = slots.shape, slots.scratch + 1
        self._bias = torch.full((slots.num_rows, shape.num_kv_heads, 1, size), MASKED, dtype=slots.keys.dtype)
        every_row, origin = torch.arange(slots.num_rows), torch.zeros(slots.num_rows, dtype=torch.int64)
        self._origin = slots.flat_index(every_row, origin).view(slots.num_rows, -1)  # [rows, kv_heads] position 0

    def admit(self, row: int, length: int) -> None:
        """From now on `row` sees its first `length` positions, and each position that `begin` adds."""
        self._bias[row, ..., :length] = 0
        self._bias[row, ..., length:] = MASKED

    def retire(self, row: int) -> None:
        self._bias[row] = MASKED

    def begin(self, *, num_rows: int, positions: torch.Tensor, num_seen: int, shared: tuple[int, int] = (0, 0)) -> None:
        """The coming `attend` calls are for `positions` [num_rows] of rows `[0, num_rows)`; all below `num_seen`
        except the scratch position, which idle rows give. `shared` is (row, n): the first n positions of all rows that
        are not idle hold what this row holds, and are read there only."""
        self._num_rows, self._num_seen, self._shared = num_rows, num_seen, shared
        self._index = (self._origin[:num_rows] + positions[:, None]).view(-1)  # [n * kv_heads]
        self._bias.view(-1).index_fill_(0, self._index, 0)

    def attend(self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        """[num_rows, heads * d]; see `decoder.Attend`."""
        slots, shape, n = self.slots, self.slots.shape, self._num_rows
        slots.store(layer, k, v, self._index)
        shared_row, first = self._shared
        batch, width, size = n * shape.num_kv_heads, shape.head_dim, slots.scratch + 1
        keys = slots.keys[layer].view(-1, size, width)[:batch, first : self._num_seen]  # [n * kv_heads, L, d]
        values = slots.values[layer].view(-1, size, width)[:batch, first : self._num_seen]  # [n * kv_heads, L, d]
        bias = self._bias.view(-1, 1, size)[:batch, :, first : self._num_seen]  # [n * kv_heads, 1, L]
        grouped = q.reshape(batch, -1, width)  # [n * kv_heads, heads / kv_heads, d]
        scores = torch.baddbmm(bias, grouped, keys.transpose(1, 2), alpha=width**-0.5)  # [n * kv_heads, groups, L]
        if not first:
            return torch.bmm(torch.softmax(scores, dim=-1), values).view(n, -1)
        shared_keys, shared_values = slots.keys[layer][shared_row, :, :first], slots.values[layer][shared_row, :, :first]
        by_head = self._by_head(grouped * width**-0.5)  # [kv_heads, n * groups, d]
        shared_scores = self._by_row(torch.bmm(by_head, shared_keys.transpose(1, 2)))  # [n * kv_heads, groups, first]
        mass = torch.softmax(torch.cat([shared_scores, scores], dim=-1), dim=-1)  # [n * kv_heads, groups, first + L]
        seen = self._by_row(torch.bmm(self._by_head(mass[..., :first]), shared_values))  # [n * kv_heads, groups, d]
        return torch.baddbmm(seen, mass[..., first:], values).view(n, -1)

    def _by_head(self, x: torch.Tensor) -> torch.Tensor:
        """[n * kv_heads, groups, c] as [kv_heads, n * groups, c]: one product a head instead of one a row."""
        return x.unflatten(0, (self._num_rows, -1)).transpose(0, 1).flatten(1, 2)

    def _by_row(self, x: torch.Tensor) -> torch.Tensor:
        """The inverse of `_by_head`."""
        return x.unflatten(1, (self._num_rows, -1)).transpose(0, 1).flatten(0, 1)
