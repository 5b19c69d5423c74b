"""The engine of a rank that plays nothing, because the first rank of its replica talks to the servers for all of it.

    engine = IdleEngine(probe=probe)
    engine.load_weights(student.hf_weights(), version=3)      # takes part in what is collective, keeps nothing
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, NoReturn

import torch

from megatron_tcod.rollout.engine import Sampling
from megatron_tcod.rollout.prefix import PrefixReuse


class IdleEngine:
    """Implements `engine.RolloutEngine` but for generating, which is an error."""

    cache_tokens = None

    def __init__(self, *, probe: Callable[[], Any] | None = None) -> None:
        """`probe` is what the playing rank's engine calls after an update; all ranks of the replica compute it."""
        self.version = -1
        self._probe = probe

    async def generate(self, prompt_ids: list[int], sampling: Sampling) -> NoReturn:
        raise RuntimeError("this rank does not play; the first rank of its replica does")

    async def prewarm(self, prefixes: Iterable[list[int]]) -> None:
        """Nothing to keep."""

    @contextmanager
    def released(self) -> Iterator[None]:
        yield

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]], version: int) -> None:
        for _ in weights:
            pass
        if self._probe is not None:
            self._probe()
        self.version = version

    def take_prefix_reuse(self) -> PrefixReuse:
        return PrefixReuse()

    def close(self) -> None:
        """Nothing is open."""
