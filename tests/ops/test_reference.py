"""The specification against scipy, against definitions written out in numpy, and against finite differences."""

import math

import numpy as np
import pytest
import scipy.special
import scipy.stats
import torch

from megatron_tcod.ops import reference

DIVERGENCES = {
    "reverse_kl": reference.reverse_kl,
    "forward_kl": reference.forward_kl,
    "jsd": reference.jsd,
}


def _logits(rows: int = 5, columns: int = 31, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    draw = {"dtype": torch.float64, "generator": generator}
    return 3 * torch.randn(rows, columns, **draw), 3 * torch.randn(rows, columns, **draw)


def test_kl_directions_equal_scipy():
    student, teacher = _logits()
    p_s, p_t = (scipy.special.softmax(x.numpy(), axis=-1) for x in (student, teacher))
    np.testing.assert_allclose(
        reference.reverse_kl(student, teacher), scipy.stats.entropy(p_s, p_t, axis=-1), rtol=1e-12
    )
    np.testing.assert_allclose(
        reference.forward_kl(student, teacher), scipy.stats.entropy(p_t, p_s, axis=-1), rtol=1e-12
    )
    np.testing.assert_allclose(reference.entropy(student), scipy.stats.entropy(p_s, axis=-1), rtol=1e-12)


def test_temperatures_divide_each_side_and_add_no_factor():
    student, teacher = _logits()
    p_s, p_t = (
        scipy.special.softmax(student.numpy() / 0.5, axis=-1),
        scipy.special.softmax(teacher.numpy() / 2, axis=-1),
    )
    result = reference.reverse_kl(student, teacher, student_temperature=0.5, teacher_temperature=2.0)
    np.testing.assert_allclose(result, scipy.stats.entropy(p_s, p_t, axis=-1), rtol=1e-12)


@pytest.mark.parametrize("beta", [0.1, 0.5, 0.9])
def test_jsd_weights_the_teacher_with_beta(beta: float):
    student, teacher = _logits()
    p_s, p_t = (scipy.special.softmax(x.numpy(), axis=-1) for x in (student, teacher))
    mixture = beta * p_t + (1 - beta) * p_s
    expected = beta * scipy.stats.entropy(p_t, mixture, axis=-1) + (1 - beta) * scipy.stats.entropy(
        p_s, mixture, axis=-1
    )
    np.testing.assert_allclose(reference.jsd(student, teacher, beta=beta), expected, rtol=1e-12)


def test_jsd_at_one_half_is_scipys_squared_distance():
    from scipy.spatial.distance import jensenshannon

    student, teacher = _logits()
    p_s, p_t = (scipy.special.softmax(x.numpy(), axis=-1) for x in (student, teacher))
    np.testing.assert_allclose(reference.jsd(student, teacher), jensenshannon(p_s, p_t, axis=-1) ** 2, rtol=1e-11)


def test_logprob_picks_the_target_column():
    logits, _ = _logits(rows=2, columns=3)
    probabilities = scipy.special.softmax(logits.numpy() / 0.7, axis=-1)
    result = reference.logprob(logits, torch.tensor([2, 0]), temperature=0.7)
    np.testing.assert_allclose(result, np.log(probabilities[[0, 1], [2, 0]]), rtol=1e-12)


@pytest.mark.parametrize("name", DIVERGENCES)
def test_padding_columns_change_nothing_and_get_no_gradient(name: str):
    student, teacher = _logits(columns=31)
    padded = torch.cat([student, torch.full((5, 9), 1e6, dtype=torch.float64)], -1).requires_grad_()
    teacher_padded = torch.cat([teacher, torch.full((5, 2), torch.nan, dtype=torch.float64)], -1)
    result = DIVERGENCES[name](padded, teacher_padded, vocab_size=31)
    result.sum().backward()
    assert torch.equal(result, DIVERGENCES[name](student, teacher))
    assert torch.equal(padded.grad[:, 31:], torch.zeros(5, 9, dtype=torch.float64))


@pytest.mark.parametrize("name", DIVERGENCES)
def test_gradient_equals_finite_differences(name: str):
    student, teacher = _logits(rows=2, columns=7)
    assert torch.autograd.gradcheck(
        lambda s: DIVERGENCES[name](s, teacher, student_temperature=0.8), student.requires_grad_()
    )


@pytest.mark.parametrize("name", DIVERGENCES)
def test_terms_without_weight_are_dropped_and_disjoint_support_is_infinite(name: str):
    both_absent = torch.tensor([[0.3, -1.0, -torch.inf]], dtype=torch.float64)
    other = torch.tensor([[1.0, 0.5, -torch.inf]], dtype=torch.float64)
    student = both_absent.clone().requires_grad_()
    result = DIVERGENCES[name](student, other)
    result.sum().backward()
    assert torch.equal(result, DIVERGENCES[name](both_absent[:, :2], other[:, :2]))
    assert student.grad[0, 2] == 0 and torch.isfinite(student.grad).all()

    full = torch.tensor([[1.0, 0.5, 0.0]], dtype=torch.float64)
    expected_infinite = {"reverse_kl": (full, both_absent), "forward_kl": (both_absent, full)}
    if name in expected_infinite:
        assert DIVERGENCES[name](*expected_infinite[name]).item() == math.inf
        assert math.isfinite(DIVERGENCES[name](*reversed(expected_infinite[name])).item())
    else:
        assert 0 < DIVERGENCES[name](full, both_absent).item() < math.log(2)


def test_errors_name_the_setting():
    student, teacher = _logits(columns=31)
    with pytest.raises(ValueError, match="pass vocab_size"):
        reference.reverse_kl(student, teacher[:, :30])
    with pytest.raises(ValueError, match=r"vocab_size 32 is outside \[1, 31\]"):
        reference.entropy(student, vocab_size=32)
    with pytest.raises(ValueError, match="temperature must be positive, got 0"):
        reference.entropy(student, temperature=0)
    with pytest.raises(ValueError, match="beta must lie strictly between 0 and 1, got 1.0"):
        reference.jsd(student, teacher, beta=1.0)


def _bucketed(p: np.ndarray, support_ids: torch.Tensor) -> np.ndarray:
    """Probabilities [S, V] added up by hand: those listed in order, then all others."""
    listed = [[row[i] if i >= 0 else 0.0 for i in ids] for row, ids in zip(p, support_ids.tolist(), strict=True)]
    return np.concatenate([listed, 1 - np.sum(listed, -1, keepdims=True)], -1)


@pytest.mark.parametrize("kind", DIVERGENCES)
def test_topk_divergence_is_that_of_the_bucketed_distributions(kind: str):
    student, teacher = _logits()
    support_ids = torch.tensor([[3, 0, 30], [1, -1, 2], [-1, -1, -1], [7, 8, 9], [30, 29, -1]])
    p_s = scipy.special.softmax(student.numpy() / 0.7, axis=-1)
    p_t = scipy.special.softmax(teacher.numpy(), axis=-1)
    sent = torch.log_softmax(teacher, -1).gather(-1, support_ids.clamp(min=0))
    s, t = _bucketed(p_s, support_ids), _bucketed(p_t, support_ids)
    m = 0.3 * t + 0.7 * s
    expected = {
        "reverse_kl": scipy.stats.entropy(s, t, axis=-1),
        "forward_kl": scipy.stats.entropy(t, s, axis=-1),
        "jsd": 0.3 * scipy.stats.entropy(t, m, axis=-1) + 0.7 * scipy.stats.entropy(s, m, axis=-1),
    }[kind]
    result = reference.topk_divergence(student, support_ids, sent, kind=kind, beta=0.3, student_temperature=0.7)
    np.testing.assert_allclose(result, expected, rtol=1e-11, atol=1e-14)


@pytest.mark.parametrize("kind", DIVERGENCES)
def test_topk_divergence_over_the_whole_vocabulary_is_the_divergence(kind: str):
    student, teacher = _logits(columns=7)
    student.requires_grad_()
    ids = torch.stack([torch.randperm(7, generator=torch.Generator().manual_seed(i)) for i in range(5)])
    sent = torch.log_softmax(teacher, -1).gather(-1, ids)
    for sent_again in (sent, sent + 1e-5, sent - 1e-5):  # rounded by whoever sends
        result = reference.topk_divergence(student, ids, sent_again, kind=kind, tail_floor=1e-6)
        truth = DIVERGENCES[kind](student, teacher)
        torch.testing.assert_close(result, truth, rtol=1e-9, atol=1e-12)
        ours, whole = (torch.autograd.grad(x.sum(), student, retain_graph=True)[0] for x in (result, truth))
        torch.testing.assert_close(ours, whole, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("kind", DIVERGENCES)
def test_gradient_of_topk_divergence_equals_finite_differences(kind: str):
    student, teacher = _logits(rows=3, columns=7)
    support_ids = torch.tensor([[3, 0], [1, -1], [-1, -1]])
    sent = torch.log_softmax(teacher, -1).gather(-1, support_ids.clamp(min=0))
    assert torch.autograd.gradcheck(
        lambda s: reference.topk_divergence(s, support_ids, sent, kind=kind, student_temperature=0.8),
        student.requires_grad_(),
    )


def test_teacher_mass_above_one_is_scaled_and_a_small_rest_is_raised_to_the_floor():
    ids, is_complete = torch.tensor([[4, 2]]), torch.tensor([False])
    mass = {"above": (0.75, 0.2502), "small": (0.75, 0.25 - 1e-9), "ordinary": (0.5, 0.25)}
    for name, floor, expected in [
        ("above", 0.0, (0.75 / 1.0002, 0.2502 / 1.0002, 0)),
        ("above", 1e-6, (0.75 / 1.0002 * (1 - 1e-6), 0.2502 / 1.0002 * (1 - 1e-6), 1e-6)),
        ("small", 0.0, (0.75, 0.25 - 1e-9, 1e-9)),
        ("small", 1e-6, (0.75 * (1 - 1e-6) / (1 - 1e-9), (0.25 - 1e-9) * (1 - 1e-6) / (1 - 1e-9), 1e-6)),
        ("ordinary", 1e-6, (0.5, 0.25, 0.25)),
    ]:
        sent = torch.tensor([mass[name]], dtype=torch.float64).log()
        buckets = reference.teacher_buckets(sent, ids, is_complete, tail_floor=floor).exp()
        np.testing.assert_allclose(buckets[0], expected, rtol=1e-7, atol=1e-15)
        np.testing.assert_allclose(buckets.sum(), 1, rtol=1e-14)
