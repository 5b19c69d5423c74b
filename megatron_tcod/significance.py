"""How sure a success rate is: an interval for one run, a paired test between two.

    wilson_interval(successes=18, trials=40)         # (0.307, 0.602)
    only_a, only_b = discordant(outcomes_a, outcomes_b)
    mcnemar_exact(only_a, only_b)                    # two-sided p

Two runs evaluated on the same tasks are compared task by task: only tasks that exactly one of them solves say anything
about which is better, and with 100-odd tasks there are too few of those for a normal approximation.

Not here: corrections for many comparisons, variation between training seeds. One run a method is one draw.
"""

from __future__ import annotations

from collections.abc import Mapping
from math import comb, sqrt
from statistics import NormalDist
from typing import TypeVar

Key = TypeVar("Key")


def wilson_interval(successes: int, trials: int, *, confidence: float = 0.95) -> tuple[float, float]:
    """Score interval for a proportion (Wilson 1927), bounds within [0, 1]; `(0, 1)` when there are no trials.

    With z the normal quantile and p the rate: (p + z^2/2n -+ z sqrt(p(1-p)/n + z^2/4n^2)) / (1 + z^2/n).
    """
    if not 0 <= successes <= trials:
        raise ValueError(f"successes must be in [0, trials], got {successes} of {trials}")
    if not 0 < confidence < 1:
        raise ValueError(f"confidence must be between 0 and 1, got {confidence}; 95 % is 0.95")
    if trials == 0:
        return 0.0, 1.0
    z = NormalDist().inv_cdf(0.5 + confidence / 2)
    rate = successes / trials
    centre = rate + z * z / (2 * trials)
    half_width = z * sqrt(rate * (1 - rate) / trials + z * z / (4 * trials * trials))
    scale = 1 + z * z / trials
    low = 0.0 if successes == 0 else (centre - half_width) / scale  # exact at the ends, where rounding would show
    high = 1.0 if successes == trials else (centre + half_width) / scale
    return low, high


def discordant(a: Mapping[Key, bool], b: Mapping[Key, bool]) -> tuple[int, int]:
    """Of the tasks in both: how many only `a` solves, how many only `b` solves."""
    shared = a.keys() & b.keys()
    return sum(a[key] and not b[key] for key in shared), sum(b[key] and not a[key] for key in shared)


def mcnemar_exact(only_a: int, only_b: int) -> float:
    """Two-sided p that both are equally good, given the tasks that one alone solves: Binomial(n, 1/2), doubled tail.

    1.0 when there are no such tasks.
    """
    if min(only_a, only_b) < 0:
        raise ValueError(f"counts must not be negative, got {only_a} and {only_b}")
    n = only_a + only_b
    tail = sum(comb(n, i) for i in range(min(only_a, only_b) + 1))
    return min(1.0, 2 * tail / 2**n)  # Python integers: exact for any n
