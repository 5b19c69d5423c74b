import pytest
from scipy import stats

from megatron_tcod.significance import discordant, mcnemar_exact, wilson_interval


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
