import itertools
import random

import numpy as np
import pytest
from scipy import stats

from megatron_tcod.significance import (
    clustered_interval,
    discordant,
    mcnemar_exact,
    pass_at,
    sign_flip_exact,
    wilson_interval,
)


@pytest.mark.parametrize("confidence", [0.8, 0.95, 0.99])
@pytest.mark.parametrize("trials", [1, 2, 7, 40, 134, 1000])
def test_wilson_interval_equals_scipy(trials, confidence):
    for successes in sorted({0, 1, trials // 3, trials // 2, trials - 1, trials}):
        expected = stats.binomtest(successes, trials).proportion_ci(confidence, method="wilson")
        low, high = wilson_interval(successes, trials, confidence=confidence)
        assert low == pytest.approx(expected.low, abs=1e-12)
        assert high == pytest.approx(expected.high, abs=1e-12)
        assert 0 <= low <= successes / trials <= high <= 1


def test_wilson_interval_without_trials_says_nothing():
    assert wilson_interval(0, 0) == (0.0, 1.0)


@pytest.mark.parametrize(("successes", "trials"), [(3, 2), (-1, 4), (1, 0)])
def test_wilson_interval_refuses_impossible_counts(successes, trials):
    with pytest.raises(ValueError, match=f"{successes} of {trials}"):
        wilson_interval(successes, trials)


def test_wilson_interval_refuses_a_confidence_in_percent():
    with pytest.raises(ValueError, match="0.95"):
        wilson_interval(1, 2, confidence=95)


def test_mcnemar_equals_scipys_binomial_test():
    for only_a in range(0, 41):
        for only_b in range(0, 41):
            expected = stats.binomtest(only_a, only_a + only_b).pvalue if only_a + only_b else 1.0
            assert mcnemar_exact(only_a, only_b) == pytest.approx(expected, rel=1e-9)


def test_mcnemar_of_the_published_independent_run():
    assert mcnemar_exact(24, 10) == pytest.approx(0.0243, abs=1e-3)


def test_mcnemar_stays_exact_where_floats_would_underflow():
    assert mcnemar_exact(900, 1100) == pytest.approx(stats.binomtest(900, 2000).pvalue, rel=1e-9)


def test_mcnemar_refuses_negative_counts():
    with pytest.raises(ValueError, match="-1"):
        mcnemar_exact(-1, 3)


def test_discordant_counts_only_tasks_that_both_played():
    a = {"t1": True, "t2": True, "t3": False, "t4": False, "only here": True}
    b = {"t1": True, "t2": False, "t3": True, "t4": False, "only there": True}
    assert discordant(a, b) == (1, 1)
    assert discordant(a, {}) == (0, 0)


def test_pass_at_k_is_the_share_of_all_choices_of_k_tries_that_hold_a_success():
    for trials in range(1, 7):
        for successes in range(trials + 1):
            tries = [index < successes for index in range(trials)]
            for k in range(1, trials + 1):
                chosen = [any(choice) for choice in itertools.combinations(tries, k)]
                assert pass_at(k, successes=successes, trials=trials) == pytest.approx(sum(chosen) / len(chosen))


@pytest.mark.parametrize(("k", "successes", "trials"), [(0, 1, 2), (3, 1, 2), (1, 3, 2), (1, -1, 2)])
def test_pass_at_k_refuses_more_tries_than_there_were(k, successes, trials):
    with pytest.raises(ValueError, match="tries|trials"):
        pass_at(k, successes=successes, trials=trials)


def test_the_interval_over_tasks_is_wilsons_where_tries_of_a_task_are_one_or_all_alike():
    outcomes = [1, 0, 0, 1, 1, 0, 0, 0, 1, 0]
    expected = wilson_interval(4, 10)
    assert clustered_interval(outcomes, trials=1) == pytest.approx(expected)
    assert clustered_interval([8 * one for one in outcomes], trials=8) == pytest.approx(expected)
    for all_alike in (0, 8):  # nothing is known about the likeness then: as many tries as tasks
        assert clustered_interval([all_alike] * 10, trials=8) == wilson_interval(all_alike // 8 * 10, 10)


def test_the_interval_over_tasks_covers_the_rate_as_often_as_it_says_and_wilsons_over_episodes_does_not():
    rng = random.Random(0)
    covered = covered_by_episodes = 0
    for _ in range(600):
        chances = [rng.betavariate(0.6, 0.6) for _ in range(40)]
        successes = [sum(rng.random() < chance for _ in range(8)) for chance in chances]
        low, high = clustered_interval(successes, trials=8)
        covered += low <= 0.5 <= high
        low, high = wilson_interval(sum(successes), 320)
        covered_by_episodes += low <= 0.5 <= high
    assert 0.92 <= covered / 600 <= 0.98
    assert covered_by_episodes / 600 < 0.75


def test_sign_flips_over_single_tries_are_mcnemars_test():
    for only_a in range(9):
        for only_b in range(9):
            differences = [1] * only_a + [-1] * only_b + [0] * 5
            assert sign_flip_exact(differences) == pytest.approx(mcnemar_exact(only_a, only_b))


def test_sign_flips_over_several_tries_equal_scipys_permutation_test():
    a, b = np.array([4, 3, 0, 2, 4, 1, 3]), np.array([1, 3, 1, 0, 2, 1, 2])
    expected = stats.permutation_test((a, b), lambda x, y: np.sum(x - y), permutation_type="samples", n_resamples=np.inf)
    assert sign_flip_exact((a - b).tolist()) == pytest.approx(expected.pvalue)
