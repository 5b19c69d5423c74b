"""Sampling against float64 references: exact inverse CDF, truncation, temperature, frequencies, independence."""

import numpy as np
import pytest
import torch
from scipy import stats

from megatron_tcod.rollout.engine import Sampling
from megatron_tcod.rollout.sampler import DrawRule, draw, uniform


def samplings(*options):
    return DrawRule.of([None if o is None else Sampling(max_new_tokens=1, **o) for o in options])


def test_splitmix64_is_the_published_sequence():
    """Seed 1234567 as in the reference implementation: state += golden, then mix."""
    mask, state, expected = 2**64 - 1, 1234567, []
    for _ in range(3):
        state = (state + 0x9E3779B97F4A7C15) & mask
        z = state
        z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & mask
        z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & mask
        expected.append(z ^ (z >> 31))
    assert expected[0] == 6457827717110365317  # published test vector
    from megatron_tcod.rollout.sampler import _GOLDEN, _mix

    counters = np.array([1234567], np.uint64) + np.arange(1, 4, dtype=np.uint64) * _GOLDEN
    assert _mix(counters).tolist() == expected


def test_uniforms_are_uniform_and_independent_across_seeds_and_positions():
    drawn = np.stack([uniform(seed, np.arange(200)) for seed in range(500)])  # [seeds, positions]
    assert 0 <= drawn.min() and drawn.max() < 1
    assert stats.kstest(drawn.ravel(), "uniform").pvalue > 1e-3
    for shifted in (np.roll(drawn, 1, 0), np.roll(drawn, 1, 1), np.roll(drawn, (1, 1), (0, 1))):
        assert abs(np.corrcoef(drawn.ravel(), shifted.ravel())[0, 1]) < 0.015
    assert np.array_equal(uniform(7, np.array([5, 9])), uniform(7, np.arange(10))[[5, 9]])
    assert not np.array_equal(uniform(-1, np.arange(9)), uniform(1, np.arange(9)))


def test_ids_invert_the_cumulative_distribution_exactly():
    torch.manual_seed(0)
    logits, uniforms = 3 * torch.randn(64, 507), torch.rand(64, dtype=torch.float64)
    ids, logprobs = draw(logits, samplings(*[{}] * 64), uniforms)
    mass = torch.softmax(logits.double(), -1)
    upper = mass.cumsum(-1).gather(-1, ids[:, None])[:, 0]
    lower = upper - mass.gather(-1, ids[:, None])[:, 0]
    assert bool(((lower - 1e-6 <= uniforms) & (uniforms <= upper + 1e-6)).all())
    torch.testing.assert_close(logprobs.double(), mass.gather(-1, ids[:, None])[:, 0].log(), rtol=0, atol=1e-5)


def test_frequencies_follow_the_distribution_for_each_rule():
    """Chi-squared over 40,000 draws a row: plain, hot, top-k, top-p, both."""
    logits = torch.tensor([2.0, 1.0, 0.5, 0.0, -1.0, -3.0])
    options = [{}, {"temperature": 2.0}, {"top_k": 3}, {"top_p": 0.8}, {"top_k": 3, "top_p": 0.7}]
    draws = 40_000
    for seed, option in enumerate(options):
        temperature = option.get("temperature", 1.0)
        mass = torch.softmax(logits.double() / temperature, -1).numpy()
        kept = mass.copy()
        kept[option.get("top_k", 6) :] = 0  # ids are in order of their mass
        kept[np.cumsum(mass) - mass >= option.get("top_p", 2.0)] = 0
        uniforms = torch.from_numpy(uniform(seed, np.arange(draws)))
        ids, logprobs = draw(logits.expand(draws, -1), samplings(*[option] * draws), uniforms)
        counts = np.bincount(ids.numpy(), minlength=6)
        assert counts[kept == 0].sum() == 0
        expected = kept[kept > 0] / kept.sum() * draws
        assert stats.chisquare(counts[kept > 0], expected).pvalue > 1e-3
        np.testing.assert_allclose(logprobs.numpy(), np.log(mass)[ids.numpy()], atol=1e-5)  # before truncation


@pytest.mark.parametrize("value", [0.0, 1.0 - 2.0**-52])
def test_extreme_uniforms_never_give_an_id_without_mass(value):
    logits = torch.full((3, 9), -1e4)
    logits[0, 4], logits[1, 2:5], logits[2, 8] = 0.0, 1.0, 0.0
    ids, logprobs = draw(logits, samplings({}, {}, {}), torch.full((3,), value, dtype=torch.float64))
    assert ids.tolist() == ([4, 2, 8] if value == 0 else [4, 4, 8])
    assert bool(torch.isfinite(logprobs).all())


def test_greedy_rows_take_the_likeliest_id_with_its_logprob_at_temperature_one():
    torch.manual_seed(1)
    logits = torch.randn(3, 50)
    ids, logprobs = draw(logits, samplings({"temperature": 0.0}, None, {"temperature": 0.5}), torch.rand(3).double())
    assert ids[0] == logits[0].argmax()
    torch.testing.assert_close(logprobs[0], torch.log_softmax(logits[0], -1).max())
    torch.testing.assert_close(logprobs[2], torch.log_softmax(2 * logits[2], -1)[ids[2]])


def test_rows_do_not_influence_each_other():
    torch.manual_seed(2)
    logits, uniforms = torch.randn(4, 30), torch.rand(4, dtype=torch.float64)
    options = [{"top_k": 2}, {"temperature": 0.0}, {"top_p": 0.3}, {"temperature": 1.7}]
    together = draw(logits, samplings(*options), uniforms)
    for row, option in enumerate(options):
        ids, logprobs = draw(logits[row : row + 1], samplings(option), uniforms[row : row + 1])
        assert ids[0] == together[0][row] and logprobs[0] == together[1][row]
