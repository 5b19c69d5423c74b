"""Stateless sampling: which token follows is a pure function of the logits, the request's seed and the position.

    uniforms = uniform(seed, np.arange(start, stop))          # [n] float64 in [0, 1)
    ids, logprobs = draw(logits, rule, uniforms)              # [B], [B]

One counter-based uniform per (seed, position) and the inverse of the cumulative distribution in float64: no generator
state, so a completion does not depend on what else is in the batch, beyond rounding of the logits themselves.
The returned log-probability is that of the temperature-scaled distribution before top-k and top-p; a greedy row reports
that of temperature 1.

It does not stop, count or detokenise.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from megatron_tcod.rollout.engine import Sampling

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_MIX_1 = np.uint64(0xBF58476D1CE4E5B9)
_MIX_2 = np.uint64(0x94D049BB133111EB)


def _mix(z: np.ndarray) -> np.ndarray:
    """The finaliser of splitmix64 (Steele, Lea and Flood, 2014): a bijection of 64 bits that scatters all of them."""
    z = (z ^ (z >> np.uint64(30))) * _MIX_1
    z = (z ^ (z >> np.uint64(27))) * _MIX_2
    return z ^ (z >> np.uint64(31))


def uniform(seed: int, positions: np.ndarray) -> np.ndarray:
    """Multiples of 2^-52 in [0, 1), one for each position [n] of the stream `seed`."""
    stream = _mix(np.array([seed % 2**64], dtype=np.uint64) + _GOLDEN)
    bits = _mix(stream + positions.astype(np.uint64) * _GOLDEN)
    return (bits >> np.uint64(12)) * 2.0**-52


@dataclass(frozen=True)
class DrawRule:
    """How each row of a batch is drawn. None stands for "no row asks for it", which skips the work."""

    temperature: torch.Tensor | None  # [B, 1] fp32, 1 for greedy rows
    is_greedy: torch.Tensor | None  # [B] bool
    top_k: torch.Tensor | None  # [B, 1] int64, V where unlimited
    top_p: torch.Tensor | None  # [B, 1] fp64

    @classmethod
    def of(cls, samplings: list[Sampling | None]) -> DrawRule:
        """The rule of a batch; None is a row whose result is ignored."""
        rows = [s or Sampling(max_new_tokens=0) for s in samplings]
        temperature = [s.temperature or 1.0 for s in rows]
        greedy = [s.temperature == 0 for s in rows]
        top_k = [s.top_k if s.top_k > 0 else 2**62 for s in rows]
        top_p = [s.top_p for s in rows]
        return cls(
            temperature=torch.tensor(temperature)[:, None] if set(temperature) != {1.0} else None,
            is_greedy=torch.tensor(greedy) if any(greedy) else None,
            top_k=torch.tensor(top_k)[:, None] if min(top_k) < 2**62 else None,
            top_p=torch.tensor(top_p, dtype=torch.float64)[:, None] if min(top_p) < 1 else None,
        )


def draw(logits: torch.Tensor, rule: DrawRule, uniforms: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids [B] int64 and their log-probabilities [B] fp32, from `logits` [B, V] fp32 and `uniforms` [B] fp64.

    A row with non-finite logits gives some id and a log-probability that is not finite; the caller must look.
    """
    if rule.temperature is not None:
        logits = logits / rule.temperature
    logprobs = torch.log_softmax(logits, dim=-1)  # [B, V]
    mass = logprobs.exp().double()  # [B, V]
    if rule.top_k is not None or rule.top_p is not None:
        mass = _truncate(mass, rule)
    cumulative = mass.cumsum(-1)  # [B, V]
    # u is at most 1 - 2^-52, so u * total stays below total and the id found always has mass.
    target = uniforms[:, None] * cumulative[:, -1:]
    ids = torch.searchsorted(cumulative, target, right=True).clamp_(max=logits.shape[-1] - 1)  # [B, 1]
    if rule.is_greedy is not None:
        ids = torch.where(rule.is_greedy[:, None], logits.argmax(-1, keepdim=True), ids)
    return ids[:, 0], logprobs.gather(-1, ids)[:, 0]


def _truncate(mass: torch.Tensor, rule: DrawRule) -> torch.Tensor:
    """Zero what top-k and top-p exclude. Of the k likeliest ids those stay whose more likely peers hold less than
    top_p of the whole, untruncated mass; the likeliest always stays. Ties keep the lower id."""
    ordered, order = mass.sort(dim=-1, descending=True, stable=True)  # [B, V]
    kept = torch.ones_like(ordered, dtype=torch.bool)
    if rule.top_k is not None:
        kept &= torch.arange(mass.shape[-1]) < rule.top_k
    if rule.top_p is not None:
        kept &= ordered.cumsum(-1) - ordered < rule.top_p
    kept[:, 0] = True
    return mass * torch.zeros_like(kept).scatter_(-1, order, kept)
