"""How sure a success rate is: an interval for one run, a paired test between two.

    wilson_interval(successes=18, trials=40)         # (0.307, 0.602)
    only_a, only_b = discordant(outcomes_a, outcomes_b)
    mcnemar_exact(only_a, only_b)                    # two-sided p
    pass_at(4, successes=3, trials=10)               # chance that one of four tries succeeds
    clustered_interval([3, 0], trials=10)            # of the success rate over tasks with ten tries each
    sign_flip_exact([2, -1, 0])                      # two-sided p over differences of successes by task

Two runs evaluated on the same tasks are compared task by task: only tasks that exactly one of them solves say anything
about which is better, and with 100-odd tasks there are too few of those for a normal approximation.

Not here: corrections for many comparisons, variation between training seeds. One run a method is one draw.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from math import comb, sqrt
from statistics import NormalDist
from typing import TypeVar

Key = TypeVar("Key")


def wilson_interval(successes: float, trials: float, *, confidence: float = 0.95) -> tuple[float, float]:
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


def pass_at(k: int, *, successes: int, trials: int) -> float:
    """Unbiased estimate that at least one of `k` tries succeeds, from `trials` >= k tries: 1 - C(n - c, k) / C(n, k).

    Chen et al., arXiv 2107.03374. 1 - (1 - c/n)^k instead would be too low.
    """
    if not 0 <= successes <= trials:
        raise ValueError(f"successes must be in [0, trials], got {successes} of {trials}")
    if not 1 <= k <= trials:
        raise ValueError(f"pass@{k} needs 1 to {trials} tries, of which there are {trials}; play more samples of each task")
    return 1 - comb(trials - successes, k) / comb(trials, k)


def clustered_interval(successes: Sequence[int], *, trials: int, confidence: float = 0.95) -> tuple[float, float]:
    """Interval of the success rate where each task was tried `trials` times: tries of one task are alike.

    Wilson's, with the number of independent tries that the spread of the tasks' rates r_i leaves: p(1-p) / (var(r) / tasks),
    at least the number of tasks and at most that of all tries. With one try a task it is Wilson's.
    """
    num_tasks = len(successes)
    if not num_tasks:
        return 0.0, 1.0
    rates = [count / trials for count in successes]
    rate = sum(successes) / (num_tasks * trials)
    spread = sum((one - rate) ** 2 for one in rates) / max(num_tasks - 1, 1) / num_tasks
    if 0 < rate < 1:
        independent = rate * (1 - rate) / spread if spread else num_tasks * trials
    else:
        independent = num_tasks  # all alike: nothing tells how alike the tries of a task are
    independent = min(max(independent, num_tasks), num_tasks * trials) if num_tasks > 1 else num_tasks
    solved = independent if rate == 1 else rate * independent
    return wilson_interval(solved, independent, confidence=confidence)


def sign_flip_exact(differences: Sequence[int]) -> float:
    """Two-sided p that two methods are equally good, given by how many successes they differ on each task: the share of
    all ways to swap the two on some of the tasks whose total is at least as far from 0. Counted exactly.

    With differences of -1, 0 and 1 it is `mcnemar_exact`.
    """
    ways: Counter[int] = Counter({0: 1})
    for difference in filter(None, differences):
        swapped: Counter[int] = Counter()
        for total, count in ways.items():
            swapped[total + difference] += count
            swapped[total - difference] += count
        ways = swapped
    observed = abs(sum(differences))
    return sum(count for total, count in ways.items() if abs(total) >= observed) / sum(ways.values())
