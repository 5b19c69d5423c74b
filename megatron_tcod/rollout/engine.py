"""The rollout engine contract: token ids in, token ids and exact log-probabilities out."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

import torch

if TYPE_CHECKING:
    from megatron_tcod.rollout.prefix import PrefixReuse


class EngineFault(OSError):
    """An engine could not answer one request. Ends the episode as `engine_fault`, not the run. The message is complete."""



@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How one completion is drawn.

    Example: `Sampling(max_new_tokens=64, temperature=1.0, seed=12345, stop_token_ids=(2,))`
    """

    max_new_tokens: int
    temperature: float = 1.0
    """0 is greedy."""
    top_p: float = 1.0
    top_k: int = -1
    """-1 keeps the whole vocabulary."""
    seed: int = 0
    """With equal prompt, weights and seed the completion is the same, whatever else runs in the batch."""
    stop_token_ids: tuple[int, ...] = ()
    logprob_start_len: int = -1
    """Prompt position from which input log-probabilities are returned, SGLang's meaning: the first returned entry is
    None, so scoring tokens `[P, N)` asks for `P - 1`. -1 asks for none. It also limits prefix reuse to that position."""


@dataclass(frozen=True, kw_only=True)
class Completion:
    """Example: `Completion(token_ids=[17, 4, 2], logprobs=[-0.1, -2.0, -0.3], finish_reason="stop", cached_tokens=96,
    prompt_tokens=120, weight_version=3)`"""

    token_ids: list[int]
    logprobs: list[float]
    """Of the temperature-scaled distribution before top-k and top-p, fp32; one per token of `token_ids`."""
    finish_reason: str
    """`stop` (a stop token was sampled and is the last id) or `length`."""
    cached_tokens: int
    prompt_tokens: int
    weight_version: int
    input_logprobs: list[float | None] = field(default_factory=list)


class RolloutEngine(Protocol):
    version: int
    """Of the weights that answer now: the number of optimizer steps behind them; -1 before there are any."""
    cache_tokens: int | None
    """Tokens that its prefix cache can hold; None where that is not known."""

    async def generate(self, prompt_ids: list[int], sampling: Sampling) -> Completion:
        """Raises ValueError for a request that no weights could serve, EngineFault where this one was not answered."""
        ...

    async def prewarm(self, prefixes: Iterable[list[int]]) -> None:
        """Compute and keep the KV of each prefix once, so that requests that extend it start from there."""
        ...

    def released(self) -> AbstractContextManager[None]:
        """Within the block the engine holds no KV cache and no serving weights; generating is an error."""
        ...

    def load_weights(self, weights: Iterator[tuple[str, torch.Tensor]], version: int) -> None:
        """Take Hugging Face named full tensors, drop every cached KV, and answer as `version` from now on."""
        ...

    def take_prefix_reuse(self) -> PrefixReuse:
        """What the prefix cache did since the last call."""
        ...

    def close(self) -> None:
        """Free what the engine holds outside this process. It does not generate any more."""
        ...
