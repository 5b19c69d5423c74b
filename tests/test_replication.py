"""Statistics over seeds and tasks against scipy and against what they promise under simulation."""

import random
from itertools import pairwise

import numpy as np
import pytest
from scipy import stats

from megatron_tcod.replication import crossed_interval, crossed_test, holm, student_t_two_sided


def made_table(num_seeds, num_tasks, *, mean=0.0, of_seeds=0.1, of_tasks=0.3, noise=0.5, seed=0):
    rng = np.random.default_rng(seed)
    table = mean + of_seeds * rng.standard_normal((num_seeds, 1)) + of_tasks * rng.standard_normal((1, num_tasks))
    return table + noise * rng.standard_normal((num_seeds, num_tasks))


@pytest.mark.parametrize("df", [0.7, 1, 3.3, 30, 4999.5])
@pytest.mark.parametrize("t", [-40.0, -2.1, -1e-6, 0.0, 0.3, 1.0, 2.5, 9.0, 300.0])
def test_student_t_equals_scipy(t, df):
    assert student_t_two_sided(t, df) == pytest.approx(2 * stats.t.sf(abs(t), df), rel=1e-9, abs=1e-300)


@pytest.mark.parametrize("shape", [(5, 100), (2, 7), (10, 3)])
def test_the_interval_is_scipys_bca_over_two_crossed_samples(shape):
    table = made_table(*shape, mean=0.2, seed=shape[0]) ** 3  # skewed: bias and acceleration matter

    def mean_of(seeds, tasks, axis=-1):
        rows, columns = np.broadcast_arrays(seeds[..., :, None], tasks[..., None, :])
        return table[rows.astype(int), columns.astype(int)].mean(axis=(-2, -1))

    indices = [np.arange(size) for size in shape]
    expected = stats.bootstrap(
        indices, mean_of, method="BCa", n_resamples=20000, vectorized=True, batch=200, rng=np.random.default_rng(1)
    )
    interval = expected.confidence_interval
    low, high = crossed_interval(table, num_resamples=20000)
    width = interval.high - interval.low
    assert low == pytest.approx(interval.low, abs=0.03 * width)
    assert high == pytest.approx(interval.high, abs=0.03 * width)


def test_an_interval_of_what_does_not_vary_is_a_point():
    assert crossed_interval([[1, 1, 1], [1, 1, 1]]) == (1.0, 1.0)


def test_the_interval_holds_the_truth_about_as_often_as_it_says_when_there_are_seeds_enough():
    hits = sum(
        low <= 0.0 <= high
        for seed in range(200)
        for low, high in [crossed_interval(made_table(20, 60, seed=seed), num_resamples=400)]
    )
    assert 0.90 * 200 <= hits


def test_without_task_variance_the_test_is_the_paired_t_test_over_seeds():
    rng = np.random.default_rng(3)
    by_seed = 0.3 + rng.standard_normal(6)
    table = np.repeat(by_seed[:, None], 40, axis=1)
    expected = stats.ttest_1samp(by_seed, 0.0)
    found = crossed_test(table)
    assert found.p == pytest.approx(expected.pvalue, rel=1e-9)
    assert found.df == pytest.approx(5)


def test_without_seed_variance_the_test_is_the_paired_t_test_over_tasks():
    by_task = np.random.default_rng(4).standard_normal(50) + 0.2
    assert crossed_test([by_task] * 4).p == pytest.approx(stats.ttest_1samp(by_task, 0.0).pvalue, rel=1e-9)


def test_no_difference_is_found_rarely_where_a_pooled_test_finds_it_often():
    tables = [made_table(5, 100, of_seeds=0.1, of_tasks=0.0, seed=seed) for seed in range(300)]
    own = sum(crossed_test(table).p < 0.05 for table in tables)
    pooled = sum(stats.ttest_1samp(table.ravel(), 0.0).pvalue < 0.05 for table in tables)
    assert own <= 0.08 * 300 < pooled


def test_a_real_difference_is_found():
    assert crossed_test(made_table(5, 100, mean=0.5, seed=1)).p < 0.01


def test_two_equal_methods_differ_by_nothing():
    found = crossed_test(np.zeros((3, 4)))
    assert (found.mean, found.p) == (0.0, 1.0)


@pytest.mark.parametrize("table", [[[1.0, 2.0]], [[1.0], [2.0]], [[1.0, 2.0], [1.0]], []])
def test_tables_without_two_of_each_are_refused(table):
    with pytest.raises(ValueError, match="seeds"):
        crossed_test(table)


def test_holm_is_the_closed_test_of_bonferronis():
    """p is adjusted to the largest Bonferroni p over all sets of hypotheses that hold it."""
    rng = random.Random(5)
    for _ in range(50):
        p_values = [rng.random() ** 2 for _ in range(5)]
        sets = [[i for i in range(5) if mask >> i & 1] for mask in range(1, 32)]
        closed = [
            max(min(1.0, len(one) * min(p_values[j] for j in one)) for one in sets if i in one) for i in range(5)
        ]
        assert holm(p_values) == pytest.approx(closed)


def test_holm_keeps_order_and_refuses_what_is_no_probability():
    adjusted = holm([0.04, 0.01, 0.03])
    assert adjusted == pytest.approx([0.06, 0.03, 0.06])
    assert all(a <= b for a, b in pairwise(sorted(adjusted)))
    assert holm([]) == []
    with pytest.raises(ValueError, match="1.2"):
        holm([1.2])
