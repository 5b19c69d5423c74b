"""What a teacher's server is asked about a row, and what its answer says at the trained positions.

    rows = rows_of(0, microbatch)                                       # where each row lies, which tokens are trained
    body = score_body(ids, rows[0], features, top_k=64, is_flat=True)   # POST /generate
    score = read_score(answer, ids, rows[0], top_k=64, vocab_size=151_665, server=url)

A row has N tokens, the first trained one at P: what stands before it was replayed or observed. `logprob_start_len = P - 1`
lets the server take [0, P - 1) from its cache and return log-probabilities of [P, N) behind one empty entry; 0 would
make it compute the whole prompt for every sample. A row of several turns has observations between its trained spans. It
is one request from the first span on nevertheless: each token goes through the model once, and the price is the
output layer on the observations between. A request a span would save that, but each would have to wait until the one
before it is in the cache, and send the row again.

Pure functions: nothing here talks to a server.
"""

from __future__ import annotations

import base64
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from megatron_tcod.rollout.engine import Sampling
from megatron_tcod.rollout.http_json import GarbledAnswer, LogprobMismatch
from megatron_tcod.rollout.sglang_client import ServerFeatures, generate_body, parse_answer
from megatron_tcod.trajectory import Microbatch, ServerTarget

LARGEST_LOGPROB = 1e-3
"""How far above 0 rounding may push a log-probability."""


def unset_target(num_trained: int, top_k: int, device: torch.device | str = "cpu") -> ServerTarget:
    """A target [S], [S, k] of NaN everywhere."""
    logprob = torch.full((num_trained,), torch.nan, device=device)
    if not top_k:
        return ServerTarget(logprob=logprob)
    ids = torch.full((num_trained, top_k), -1, dtype=torch.int64, device=device)
    return ServerTarget(logprob=logprob, topk_ids=ids, topk_logprobs=torch.full_like(ids, torch.nan, dtype=torch.float32))


def map_target(target: ServerTarget, change: Callable[[torch.Tensor], torch.Tensor]) -> ServerTarget:
    """`change` applied to each tensor, in the order of the fields."""
    logprob = change(target.logprob)
    if target.topk_ids is None:
        return ServerTarget(logprob=logprob)
    return ServerTarget(logprob=logprob, topk_ids=change(target.topk_ids), topk_logprobs=change(target.topk_logprobs))


@dataclass(frozen=True)
class ScoredRow:
    """One row of a microbatch that has trained tokens.

    Example: `ScoredRow(microbatch=0, tokens=np.arange(96, 160), slots=np.array([3, 4, 5]), trained=(40, 41, 60))`
    """

    microbatch: int
    """Index of the microbatch."""
    tokens: np.ndarray  # [at least N] where the row's ids lie among the microbatch's tokens
    slots: np.ndarray  # [s] the row's among the microbatch's trained positions
    trained: tuple[int, ...]
    """[s] Trained tokens, counted from the row's first, ascending."""

    @property
    def num_prefix(self) -> int:
        """P: tokens before the first trained one, at least 1."""
        return self.trained[0]

    @property
    def num_tokens(self) -> int:
        """N: up to the last trained token; nothing is asked of what follows."""
        return self.trained[-1] + 1

    @property
    def sampling(self) -> Sampling:
        return Sampling(max_new_tokens=0, logprob_start_len=self.num_prefix - 1)


@dataclass(frozen=True)
class RowScore:
    """At the s trained tokens of one row. Example: `RowScore(logprobs, topk_ids, topk_logprobs, num_cached=511)`"""

    logprobs: np.ndarray  # [s] fp32
    topk_ids: np.ndarray  # [s, k] int64
    topk_logprobs: np.ndarray  # [s, k] fp32
    num_cached: int
    """Prompt tokens that the server did not compute."""


def rows_of(index: int, microbatch: Microbatch) -> list[ScoredRow]:
    """The rows of microbatch number `index` that train something."""
    positions, rows = microbatch.positions.cpu().numpy(), []  # [S]
    for place in microbatch.rows():
        tokens, slots = place.tokens.numpy(), place.slots.numpy()
        if len(slots):  # a row's tokens ascend
            trained = np.searchsorted(tokens, positions[slots]) + 1
            rows.append(ScoredRow(index, tokens, slots, tuple(trained.tolist())))
    return rows


def score_body(ids: list[int], row: ScoredRow, features: ServerFeatures, *, top_k: int, is_flat: bool) -> dict[str, Any]:
    """The request that scores a row's ids [N]; `is_flat` where the server can send its lists as packed numbers."""
    body = generate_body(ids, row.sampling, features, salt="")
    if top_k:
        body["top_logprobs_num"] = top_k
    if top_k and is_flat:
        body |= {"return_flat_raw_top_logprobs": True, "return_flat_raw_top_logprobs_b64": True}
    return body


def read_score(
    answer: Any, ids: list[int], row: ScoredRow, *, top_k: int, vocab_size: int, server: str
) -> RowScore:
    """An answer to `score_body`, checked against the row. Raises the errors of `http_json.py`."""
    parsed = parse_answer(answer, ids, row.sampling, server=server)
    logprobs = np.array(parsed.input_logprobs[1:], np.float32)  # [N - P]
    if not (logprobs <= LARGEST_LOGPROB).all():
        raise LogprobMismatch(f"a log-probability of {logprobs.max():g} is no probability", server=server)
    at = np.array(row.trained) - row.num_prefix  # [s]
    try:
        topk_ids, topk_logprobs = _read_top(answer["meta_info"], (len(logprobs), top_k))
    except (KeyError, TypeError, ValueError, IndexError) as error:
        message = f"no {top_k} likeliest tokens at each of {len(logprobs)} positions ({type(error).__name__}: {error})"
        raise GarbledAnswer(message, server=server) from None
    topk_ids, topk_logprobs = topk_ids[at], topk_logprobs[at]
    if np.isnan(topk_logprobs).any() or (topk_logprobs > LARGEST_LOGPROB).any() or (topk_ids < 0).any():
        raise LogprobMismatch("the likeliest tokens come with numbers that are no log-probabilities", server=server)
    return RowScore(logprobs[at], np.where(topk_ids < vocab_size, topk_ids, -1), topk_logprobs, parsed.cached_tokens)


def _read_top(meta: dict[str, Any], shape: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
    """Ids int64 and log-probabilities fp32, [N - P, k] each; the first entry, which has no list, is left out."""
    if not shape[1]:
        return np.empty(shape, np.int64), np.empty(shape, np.float32)
    if "input_top_logprobs_val_flat_b64" not in meta:
        lists = meta["input_top_logprobs"][1:]
        logprobs = np.array([[entry[0] for entry in one] for one in lists], np.float32)
        ids = np.array([[entry[1] for entry in one] for one in lists], np.int64)
    else:
        if meta["input_top_logprobs_null_prefix"] != 1:
            raise ValueError(f"{meta['input_top_logprobs_null_prefix']} positions without a list, expected 1")
        logprobs = np.frombuffer(base64.b64decode(meta["input_top_logprobs_val_flat_b64"]), "<f4")
        ids = np.frombuffer(base64.b64decode(meta["input_top_logprobs_idx_flat_b64"]), "<i4").astype(np.int64)
    return ids.reshape(shape), logprobs.reshape(shape)
