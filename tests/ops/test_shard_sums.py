"""Merging the sums of shards: KL that is never negative and exact near agreement, however the vocabulary is cut."""

import importlib

import pytest
import torch

from megatron_tcod.ops import backends, reference
from megatron_tcod.ops.shard_sums import MergedSums

ON_CPU = [name for name in backends.BACKENDS if "cpu" in backends.DEVICES[name]]
ROWS, VOCAB = 48, 8000


def _pair(std: float, gap: float) -> tuple[torch.Tensor, torch.Tensor]:
    """fp32 logits [ROWS, VOCAB] of a student and of a teacher that differs by `gap`, part of it a constant."""
    generator = torch.Generator().manual_seed(int(std) * 1000)
    student = std * torch.randn(ROWS, VOCAB, generator=generator)
    return student, student + gap * (torch.randn(ROWS, VOCAB, generator=generator) + 1.0)


def _merged(name: str, student: torch.Tensor, teacher: torch.Tensor, num_shards: int) -> MergedSums:
    backend = importlib.import_module(backends.BACKENDS[name])
    shards = zip(student.chunk(num_shards, 1), teacher.chunk(num_shards, 1), strict=True)
    parts = [backend.partial_sums(s, t, None, student_scale=1.0, teacher_scale=1.0) for s, t in shards]
    return MergedSums.merge(torch.stack(parts))


@pytest.mark.parametrize("name", ON_CPU)
@pytest.mark.parametrize("num_shards", [1, 2, 5])
@pytest.mark.parametrize("std", [1.0, 4.0, 15.0])
@pytest.mark.parametrize("gap", [1e-6, 1e-4, 1e-2, 0.3, 2.0])
def test_kl_is_never_negative_and_no_less_exact_than_an_ordinary_computation(name, num_shards, std, gap):
    student, teacher = _pair(std, gap)
    sums = _merged(name, student, teacher, num_shards)
    for direction in ("reverse_kl", "forward_kl"):
        found = getattr(sums, direction)
        exact = getattr(reference, direction)(student.double(), teacher.double())
        ordinary = getattr(reference, direction)(student, teacher)
        assert (found >= 0).all()
        error, usual = (found - exact).abs().max(), (ordinary.double() - exact).abs().max()
        assert error <= usual + 1e-6 * exact.max(), direction


def test_the_ordinary_computation_does_give_negative_kl():
    """What the test above rules out would otherwise happen."""
    student, teacher = _pair(4.0, 1e-4)
    assert (reference.reverse_kl(student, teacher) < 0).any()


@pytest.mark.parametrize("name", ON_CPU)
def test_cut_of_the_vocabulary_does_not_show(name: str):
    student, teacher = _pair(4.0, 0.05)
    student[:, 1000:1600], teacher[:, 1000:1600] = -torch.inf, -torch.inf  # a shard without mass at num_shards = 10
    whole = _merged(name, student, teacher, 1)
    for num_shards in (2, 10):
        cut = _merged(name, student, teacher, num_shards)
        for found, expected in zip(cut.statistics(), whole.statistics(), strict=True):
            torch.testing.assert_close(found, expected, rtol=2e-6, atol=1e-7)
        torch.testing.assert_close(cut.table(), whole.table(), rtol=2e-6, atol=1e-7)


@pytest.mark.parametrize("name", ON_CPU)
def test_mass_that_only_one_side_has_is_not_lost(name: str):
    student, teacher = _pair(2.0, 0.1)
    student[:, : VOCAB // 2] = -torch.inf  # forward KL is infinite, reverse KL is not
    for num_shards in (1, 2, 4):
        sums = _merged(name, student, teacher, num_shards)
        assert (sums.forward_kl == torch.inf).all()
        torch.testing.assert_close(
            sums.reverse_kl, reference.reverse_kl(student.double(), teacher.double()), rtol=2e-6, atol=0
        )
