"""Injected mistakes: when an expert's demonstration goes wrong on purpose, and for how many turns.

    mistakes = Mistakes(seed=3, rate=0.1)
    if mistakes.strikes():                       # once before every turn
        action = mistakes.choose(commands)       # played, recorded with is_trained=False; then the expert recovers

A teacher that only ever saw undisturbed episodes has nothing to say off their path. Mistakes come in
bursts of one to three turns and at most `MAX_MISTAKES` in an episode, so that every disturbed episode still ends.
Which commands make good mistakes is the environment's business.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import TypeVar

Item = TypeVar("Item")

MAX_MISTAKES = 8
"""Injected turns in one demonstration at most."""

BURST_LENGTHS = (1, 1, 1, 2, 2, 3)
"""Injected turns in a row, drawn evenly from this list."""


class Mistakes:
    """The mistakes of one episode; everything random in it comes from `seed`."""

    def __init__(self, *, seed: int, rate: float) -> None:
        if not 0.0 <= rate < 1.0:
            raise ValueError(f"mistake_rate must lie in [0, 1), got {rate}")
        self.rate = rate
        self.rng = random.Random(f"mistakes/{seed}")
        self._num_left = MAX_MISTAKES if rate else 0
        self._burst = 0

    def strikes(self) -> bool:
        """Whether this turn is a mistake: within a burst, or with probability `rate` the start of one."""
        if not self._burst and self._num_left and self.rng.random() < self.rate:
            self._burst = min(self.choose(BURST_LENGTHS), self._num_left)
        if not self._burst:
            return False
        self._burst -= 1
        self._num_left -= 1
        return True

    def choose(self, items: Sequence[Item]) -> Item:
        """One of the items, through `random()`: the one draw that Python keeps stable over its versions."""
        return items[int(self.rng.random() * len(items))]
