"""How sure a difference is when methods were trained with several seeds and played the same tasks.

    values = [[1, 0, 1], [1, 1, 0]]                 # [seeds, tasks]: solved, or the difference of two methods
    crossed_interval(values)                        # BCa bootstrap of the mean, seeds and tasks both drawn anew
    crossed_test(differences).p                     # two-sided: would other seeds and other tasks show it too?
    holm([0.01, 0.04, 0.03])                        # adjusted for how many were asked: [0.03, 0.06, 0.06]

Two things vary: what a training run happens to learn, and which tasks happen to be asked. A test over the pooled
episodes forgets the first and finds differences between runs of one method. Here both factors are random:

    SE^2 = (MS_seeds + MS_tasks) / (S T)            df = (MS_seeds + MS_tasks)^2 / (MS_seeds^2/(S-1) + MS_tasks^2/(T-1))

with the mean squares of a two-way layout without replication: the min F' of Clark (1973), whose error is too large rather
than too small (the residual counts twice). Its p needs at least two seeds. The interval is Efron's (1987) BCa over both
factors as two samples, so that the acceleration comes from the jackknife over either; with few seeds it is a description
rather than a guarantee.

One run a method is `significance.py`'s case.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import exp, inf, lgamma, log, sqrt
from statistics import NormalDist

import numpy as np

NORMAL = NormalDist()
MAX_TERMS = 10_000
"""Of the continued fraction, which converges in about sqrt(degrees of freedom) of them."""


@dataclass(frozen=True)
class CrossedTest:
    """Example: `CrossedTest(mean=0.04, standard_error=0.015, df=7.1, p=0.03)`"""

    mean: float
    standard_error: float
    df: float
    p: float


def _matrix(values: Sequence[Sequence[float]]) -> np.ndarray:
    rows = {len(row) for row in values}
    if len(rows) != 1 or 0 in rows:
        raise ValueError(f"expected seeds x tasks with the same tasks for every seed, got rows of {sorted(rows)} tasks")
    return np.asarray(values, dtype=np.float64)  # [S, T]


def crossed_test(differences: Sequence[Sequence[float]]) -> CrossedTest:
    """Whether the mean of a [seeds, tasks] table differs from 0, both factors random. ValueError below two of either."""
    table = _matrix(differences)
    num_seeds, num_tasks = table.shape
    if min(table.shape) < 2:
        raise ValueError(f"a test over seeds and tasks needs two of each, got {num_seeds} seeds and {num_tasks} tasks")
    mean = float(table.mean())
    of_seeds = num_tasks * float(table.mean(axis=1).var(ddof=1))
    of_tasks = num_seeds * float(table.mean(axis=0).var(ddof=1))
    if of_seeds + of_tasks == 0:
        return CrossedTest(mean, 0.0, inf, 1.0 if mean == 0 else 0.0)
    error = sqrt((of_seeds + of_tasks) / table.size)
    df = (of_seeds + of_tasks) ** 2 / (of_seeds**2 / (num_seeds - 1) + of_tasks**2 / (num_tasks - 1))
    return CrossedTest(mean, error, df, student_t_two_sided(mean / error, df))


def crossed_interval(
    values: Sequence[Sequence[float]], *, confidence: float = 0.95, num_resamples: int = 9999, seed: int = 0
) -> tuple[float, float]:
    """BCa interval for the mean of a [seeds, tasks] table, seeds and tasks drawn anew independently of each other."""
    if not 0 < confidence < 1:
        raise ValueError(f"confidence must be between 0 and 1, got {confidence}; 95 % is 0.95")
    table = _matrix(values)
    mean = float(table.mean())
    draws = resampled_means(table, num_resamples, np.random.default_rng(seed))
    below = (np.sum(draws < mean) + np.sum(draws <= mean)) / (2 * num_resamples)  # ties count half
    if below in (0.0, 1.0):  # nothing varies
        return float(draws.min()), float(draws.max())
    bias, acceleration = NORMAL.inv_cdf(below), acceleration_of(table)
    bounds = []
    for tail in ((1 - confidence) / 2, (1 + confidence) / 2):
        z = bias + NORMAL.inv_cdf(tail)
        bounds.append(NORMAL.cdf(bias + z / (1 - acceleration * z)))
    low, high = np.quantile(draws, bounds)
    return float(low), float(high)


def resampled_means(table: np.ndarray, num_resamples: int, rng: np.random.Generator) -> np.ndarray:
    """[num_resamples] means over drawn seeds and drawn tasks."""
    num_seeds, num_tasks = table.shape
    seeds = rng.multinomial(num_seeds, np.full(num_seeds, 1 / num_seeds), num_resamples) / num_seeds  # [R, S]
    tasks = rng.multinomial(num_tasks, np.full(num_tasks, 1 / num_tasks), num_resamples) / num_tasks  # [R, T]
    return np.sum((seeds @ table) * tasks, axis=1)


def acceleration_of(table: np.ndarray) -> float:
    """Sum of cubed over squared jackknife influences of both samples; 0 where nothing varies."""
    cubes = squares = 0.0
    for axis in (1, 0):
        means = table.mean(axis=axis)  # of each seed, then of each task
        if len(means) < 2:
            continue
        left_out = (means.sum() - means) / (len(means) - 1)
        influence = (len(means) - 1) * (left_out.mean() - left_out)
        cubes += float((influence**3).sum()) / len(means) ** 3
        squares += float((influence**2).sum()) / len(means) ** 2
    return cubes / (6 * squares**1.5) if squares else 0.0


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's (1979) step-down adjustment: the chance of one false finding among all of them stays below the level."""
    if not all(0 <= p <= 1 for p in p_values):
        raise ValueError(f"p-values must lie in [0, 1], got {list(p_values)}")
    order = sorted(range(len(p_values)), key=lambda index: p_values[index])
    adjusted, largest = [0.0] * len(p_values), 0.0
    for rank, index in enumerate(order):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[index]))
        adjusted[index] = largest
    return adjusted


def student_t_two_sided(t: float, df: float) -> float:
    """P(|T| >= |t|) for Student's t with `df` degrees of freedom, not necessarily whole ones."""
    if df <= 0:
        raise ValueError(f"degrees of freedom must be above 0, got {df}")
    return regularized_beta(df / (df + t * t), t * t / (df + t * t), df / 2, 0.5)


def regularized_beta(x: float, rest: float, a: float, b: float) -> float:
    """I_x(a, b) by the continued fraction of the incomplete beta function, evaluated from the side where it converges.
    `rest` is 1 - x, which the caller knows to more digits."""
    if x == 0.0 or rest == 0.0:
        return 0.0 if x == 0.0 else 1.0
    if x > (a + 1) / (a + b + 2):
        return 1.0 - regularized_beta(rest, x, b, a)
    front = exp(lgamma(a + b) - lgamma(a) - lgamma(b) + a * log(x) + b * log(rest)) / a
    tiny, fraction, c, d = 1e-300, 1.0, 1.0, 0.0
    for term in range(MAX_TERMS):
        half = term // 2
        if term == 0:
            numerator = 1.0
        elif term % 2 == 0:
            numerator = half * (b - half) * x / ((a + 2 * half - 1) * (a + 2 * half))
        else:
            numerator = -(a + half) * (a + b + half) * x / ((a + 2 * half) * (a + 2 * half + 1))
        d = 1.0 / ((1.0 + numerator * d) or tiny)
        c = (1.0 + numerator / c) or tiny
        fraction *= c * d
        if term and abs(c * d - 1.0) < 1e-15:
            return front * (fraction - 1.0)
    raise ArithmeticError(f"incomplete beta function of {x}, {a}, {b} did not converge")
