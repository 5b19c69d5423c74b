"""The partial sums of vocabulary shards, added up to what a whole vocabulary gives.

    sums = MergedSums.merge(parts)                # parts [tp, 11, S] float64, gathered in rank order
    sums.reverse_kl, sums.student.entropy         # [S] float64

Each shard shifts its logits by its own maximum, so joining it moves its sums to the common maximum first. A shard
without mass (only padding, or only -inf) has maximum -inf and joins with factor zero. Additions run in rank order on
equal data, so that ranks agree to the last bit.

Not here: the sums themselves (`ops/logits_chunk.py`) and the collective (`ops/divergence.py`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch

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
        """Partial sums a row and shard: four for each softmax, three that involve both."""
        return 11 if has_teacher else 4

    @classmethod
    def merge(cls, parts: torch.Tensor) -> MergedSums:
        """parts [tp, 4 or 11, S] float64, in the order of `partial_sums`."""
        student = Softmax.merge(parts[:, :4])
        if parts.shape[1] == cls.count(False):
            return cls(student)
        teacher = Softmax.merge(parts[:, 4:8])
        gap_s, gap_t, is_shared = parts[:, 8:].unbind(1)  # [tp, S] each
        shift = student.shift - teacher.shift  # [tp, S]
        gap_s = unless_zero(student.scale, gap_s + parts[:, 1] * shift).sum(0)  # [S]
        gap_t = unless_zero(teacher.scale, gap_t + parts[:, 5] * shift).sum(0)  # [S]
        log_ratio = teacher.log_total - student.log_total  # [S]
        holds_both = (parts[:, 0] == student.max) & (parts[:, 4] == teacher.max)  # [tp, S]
        return cls(
            student,
            teacher,
            reverse_kl=gap_s / student.total + log_ratio,
            forward_kl=-gap_t / teacher.total - log_ratio,
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


def unless_zero(weight: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """weight * value, and zero where weight is zero, whatever the value; overwrites value."""
    return value.mul_(weight).masked_fill_(weight == 0, 0)
