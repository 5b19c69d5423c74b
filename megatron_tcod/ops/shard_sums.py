"""The partial sums of vocabulary shards, added up to what a whole vocabulary gives.

    sums = MergedSums.merge(parts)                # parts [tp, 13, S] float64, gathered in rank order
    sums.reverse_kl, sums.student.entropy         # [S] float64

Each shard shifts its logits by its own maximum, so joining it moves its sums to the common maximum first. A shard
without mass (only padding, or only -inf) has maximum -inf and joins with factor zero. Additions run in rank order on
equal data, so that ranks agree to the last bit.

The order of the sums, with a and b the shifted logits of student and teacher and g = a - b (`ops/divergence.py`):

    student  0 maximum   1 Z_s = sum e^a   2 C_s = sum e^a a   3 target logit or -inf
    teacher  4 maximum   5 Z_t = sum e^b   6 C_t = sum e^b b   7 target logit or -inf
    both     8 G_s = sum e^a g             9 G_t = sum e^b g
            10 E_s = sum e^a (e^-g - 1 + g)     11 E_t = sum e^b (e^g - 1 - g)     12 both maxima in one column

A divergence is a small difference of large sums when the models nearly agree, and fp32 would then leave noise of either
sign. The terms of E_s and E_t are squares to first order and none is negative, so what is left after rounding is small
against the answer: with r = Z_t / Z_s - 1,  KL(p_S || p_T) = E_s / Z_s - (r - log1p(r)), where the bracket is r^2 / 2
near zero. Far from agreement, |r| > 1/2, G_s / Z_s + log1p(r) is the better form. Forward KL is the same with the sides
exchanged and -G_t. A change of shift by h = shift_S - shift_T turns E_s into E_s + Z_t expm1(-h) + Z_s h.

Not here: the sums themselves (`ops/logits_chunk.py`) and the collective (`ops/divergence.py`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch

NUM_SOFTMAX_SUMS = 4
"""Sums of one model."""

NUM_PAIR_SUMS = 5
"""Sums that involve both models."""

CENTRE = 4
"""Row of `MergedSums.table` that JSD overwrites with KL(p_S || m)."""


class Softmax(NamedTuple):
    """One model's merged sums, each [S] float64."""

    max: torch.Tensor
    total: torch.Tensor  # sum of e^(x - max)
    log_total: torch.Tensor
    entropy: torch.Tensor
    logprob: torch.Tensor  # at the target; -inf where no rank has it
    shift: torch.Tensor  # [tp, S] a shard's maximum minus `max`, 0 for a shard without mass
    scale: torch.Tensor  # [tp, S] e^shift, 0 for a shard without mass

    @classmethod
    def merge(cls, part: torch.Tensor) -> Softmax:
        """part [tp, 4, S]: maximum, total, centred sum and target logit of each shard."""
        shard_max, shard_total, shard_centred, target = part.unbind(1)  # [tp, S] each
        maximum = shard_max.amax(0)  # [S]
        is_massless = shard_max == -torch.inf  # [tp, S]
        shift = (shard_max - maximum).masked_fill(is_massless, 0)  # [tp, S]
        scale = shift.exp().masked_fill(is_massless, 0)  # [tp, S]
        total = (scale * shard_total).sum(0)  # [S]
        centred = unless_zero(scale, shard_centred + shard_total * shift).sum(0)  # [S]
        log_total = total.log()  # [S]
        logprob = target.amax(0) - maximum - log_total  # [S]
        return cls(maximum, total, log_total, log_total - centred / total, logprob, shift, scale)


@dataclass(frozen=True)
class MergedSums:
    """Merged sums of one or both models."""

    student: Softmax
    teacher: Softmax | None = None
    reverse_kl: torch.Tensor | None = None  # [S]
    forward_kl: torch.Tensor | None = None  # [S]
    top1_agreement: torch.Tensor | None = None  # [S]

    @staticmethod
    def count(has_teacher: bool) -> int:
        """Partial sums a row and shard."""
        return 2 * NUM_SOFTMAX_SUMS + NUM_PAIR_SUMS if has_teacher else NUM_SOFTMAX_SUMS

    @classmethod
    def merge(cls, parts: torch.Tensor) -> MergedSums:
        """parts [tp, 4 or 13, S] float64, in the order above."""
        student = Softmax.merge(parts[:, :4])
        if parts.shape[1] == cls.count(False):
            return cls(student)
        teacher = Softmax.merge(parts[:, 4:8])
        gap_s, gap_t, excess_s, excess_t, is_shared = parts[:, 8:].unbind(1)  # [tp, S] each
        shift = student.shift - teacher.shift  # [tp, S]
        total_s, total_t = parts[:, 1], parts[:, 5]  # [tp, S] each
        gap_s = unless_zero(student.scale, gap_s + total_s * shift).sum(0)  # [S]
        gap_t = unless_zero(teacher.scale, gap_t + total_t * shift).sum(0)  # [S]
        excess_s = _moved(excess_s, shift, student.scale, total_s, teacher.scale, total_t)  # [S]
        excess_t = _moved(excess_t, -shift, teacher.scale, total_t, student.scale, total_s)  # [S]
        holds_both = (parts[:, 0] == student.max) & (parts[:, 4] == teacher.max)  # [tp, S]
        return cls(
            student,
            teacher,
            reverse_kl=_kl(gap_s, excess_s, student.total, teacher.total),
            forward_kl=_kl(-gap_t, excess_t, teacher.total, student.total),
            top1_agreement=(is_shared * holds_both).amax(0),
        )

    def table(self) -> torch.Tensor:
        """[5, S] what the second read needs: maximum and log-total of both sides, and the centre of the gradient."""
        zeros = torch.zeros_like(self.student.max)
        if self.teacher is None:
            return torch.stack([self.student.max, self.student.log_total, zeros, zeros, zeros])
        teacher = self.teacher
        return torch.stack([self.student.max, self.student.log_total, teacher.max, teacher.log_total, self.reverse_kl])

    def statistics(self) -> list[torch.Tensor]:
        own = [self.student.entropy, self.student.logprob]
        if self.teacher is None:
            return own
        shared = [self.reverse_kl, self.forward_kl, self.top1_agreement]
        return [*own, self.teacher.entropy, self.teacher.logprob, *shared]


def _moved(
    excess: torch.Tensor,
    shift: torch.Tensor,
    scale: torch.Tensor,
    total: torch.Tensor,
    other_scale: torch.Tensor,
    other_total: torch.Tensor,
) -> torch.Tensor:
    """Shards' excess at the common maxima, [tp, S] each -> [S]. Without own mass it is the other side's mass."""
    is_close = (shift.abs() < 1) & (scale > 0)  # a shard without own mass has no shift to speak of
    gained = torch.where(is_close, scale * torch.expm1(-shift), other_scale - scale)  # [tp, S]
    moved = unless_zero(scale, excess + total * shift) + other_total * gained
    return torch.where((scale == 0) | (shift != 0), moved, scale * excess).sum(0)


def _kl(gap: torch.Tensor, excess: torch.Tensor, total: torch.Tensor, other_total: torch.Tensor) -> torch.Tensor:
    """KL of p (whose sums these are) and the other distribution, [S] each -> [S]; see the module's derivation."""
    ratio = (other_total - total) / total
    log_ratio = torch.log1p(ratio)
    near = (excess / total - (ratio - log_ratio)).clamp(min=0)  # joining shards can leave -1e-16
    return torch.where(ratio.abs() < 0.5, near, gap / total + log_ratio)


def unless_zero(weight: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """weight * value, and zero where weight is zero, whatever the value; overwrites value."""
    return value.mul_(weight).masked_fill_(weight == 0, 0)
