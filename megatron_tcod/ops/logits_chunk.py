"""What is done to one chunk of logits: read into a few sums a row, or turned into its gradient.

    partial = partial_sums(student_logits, teacher_logits, column)                     # [11, C]
    gradient = logits_gradient("reverse_kl", student_logits, teacher_logits, rows_table, column=None, beta=0.5)

Chunks are [C, columns]: this shard's real tokens, logits already over the temperature, fp32 or float64. Every function
overwrites the chunks it is given. The formulas are derived in `ops/divergence.py`; the order of `partial_sums` and of
`rows_table` is fixed by `ops/shard_sums.py`.

Not here: making the logits, communication, rows' weights. A native kernel replaces one of these functions at a time.
"""

from __future__ import annotations

import torch

from megatron_tcod.ops.shard_sums import CENTRE, unless_zero


def partial_sums(student: torch.Tensor, teacher: torch.Tensor | None, column: torch.Tensor | None) -> torch.Tensor:
    """Logits [C, columns] of both sides -> [11, C] sums over this shard, or [4, C] without a teacher."""
    if student.shape[1] == 0:
        return _empty_sums(student.shape[0], teacher is not None, student.device)
    student_exp, *student_sums = _softmax_sums(student, column)
    if teacher is None:
        return torch.stack(student_sums)
    teacher_exp, *teacher_sums = _softmax_sums(teacher, column)
    is_shared = torch.add(student, teacher).amax(-1) == 0  # [C] both shifted logits are 0 in one column
    gap = student.sub_(teacher)  # [C, columns] a - b
    cross_sums = [_expectation(student_exp, gap), _expectation(teacher_exp, gap), is_shared.to(gap.dtype)]
    return torch.stack([*student_sums, *teacher_sums, *cross_sums])


def _softmax_sums(logits: torch.Tensor, column: torch.Tensor | None) -> tuple[torch.Tensor, ...]:
    """Shifts logits [C, columns] in place; returns e^a [C, columns], then maximum, total, centred, target, [C] each."""
    maximum = logits.amax(-1)  # [C]
    if column is None:
        target = torch.full_like(maximum, -torch.inf)  # [C]
    else:
        target = logits.gather(-1, column.clamp(min=0)[:, None])[:, 0]  # [C]
        target = target.masked_fill(column < 0, -torch.inf)
    logits.sub_(maximum.masked_fill(maximum == -torch.inf, 0)[:, None])  # a row of -inf stays one
    weight = logits.exp()  # [C, columns]
    return weight, maximum, weight.sum(-1), _expectation(weight, logits), target


def _empty_sums(num_rows: int, has_teacher: bool, device: torch.device) -> torch.Tensor:
    """What a shard of padding adds: no maximum, no mass, no target."""
    softmax = torch.tensor([-torch.inf, 0.0, 0.0, -torch.inf], dtype=torch.float64, device=device)
    column = torch.cat([softmax, softmax, softmax.new_zeros(3)]) if has_teacher else softmax
    return column[:, None].expand(-1, num_rows)


def mixture_sums(
    student: torch.Tensor, teacher: torch.Tensor, rows_table: torch.Tensor, *, beta: float
) -> torch.Tensor:
    """Logits [C, columns] -> [2, C] this shard's part of KL(p_S || m) and KL(p_T || m)."""
    student_p, teacher_p, delta, log_share = _mixture(student, teacher, rows_table, beta=beta)
    from_student = unless_zero(student_p, delta.clamp(min=0).add_(log_share)).sum(-1)  # [C]
    from_teacher = unless_zero(teacher_p, delta.neg_().clamp_(min=0).add_(log_share)).sum(-1)  # [C]
    return -torch.stack([from_student, from_teacher])


def _mixture(
    student: torch.Tensor, teacher: torch.Tensor, rows_table: torch.Tensor, *, beta: float
) -> tuple[torch.Tensor, ...]:
    """p_S, p_T, delta and log1p(c * expm1(-|delta|)), [C, columns] each."""
    log_student = _log_p(student, rows_table[0:2])
    log_teacher = _log_p(teacher, rows_table[2:4])
    delta = log_teacher - log_student
    share = (delta > 0).to(delta.dtype).mul_(1 - 2 * beta).add_(beta)  # 1 - beta or beta
    log_share = delta.abs().neg_().expm1_().mul_(share).log1p_()
    return log_student.exp_(), log_teacher.exp_(), delta, log_share


def logits_gradient(
    kind: str,
    student: torch.Tensor,
    teacher: torch.Tensor | None,
    rows_table: torch.Tensor,
    *,
    column: torch.Tensor | None,
    beta: float,
) -> torch.Tensor:
    """Derivative of each row's loss with respect to its student logits over the temperature, [C, columns]."""
    if kind == "jsd":
        student_p, _, delta, log_share = _mixture(student, teacher, rows_table, beta=beta)
        inner = delta.clamp_(min=0).add_(log_share).add_(rows_table[CENTRE][:, None])  # log(m / p_S) + KL(p_S || m)
        return unless_zero(student_p, inner).mul_(beta - 1)
    log_student = _log_p(student, rows_table[0:2])
    if kind == "reverse_kl":
        inner = (log_student - _log_p(teacher, rows_table[2:4])).sub_(rows_table[CENTRE][:, None])
        return unless_zero(log_student.exp_(), inner)
    gradient = log_student.exp_()
    if kind == "forward_kl":
        return gradient.sub_(_log_p(teacher, rows_table[2:4]).exp_())
    assert kind == "nll", kind
    if gradient.shape[1]:
        is_here = (column >= 0).to(gradient.dtype)  # [C]
        gradient.scatter_add_(-1, column.clamp(min=0)[:, None], -is_here[:, None])
    return gradient


def _log_p(logits: torch.Tensor, maximum_and_log_total: torch.Tensor) -> torch.Tensor:
    """Log-probabilities in place. Two subtractions, because at +-1e4 their sum would not fit into fp32."""
    maximum, log_total = maximum_and_log_total
    return logits.sub_(maximum[:, None]).sub_(log_total[:, None])


def _expectation(weight: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """Sum of weight * value without the terms 0 * inf, [C, columns] -> [C].

    `nansum` drops them in one pass. A NaN logit it would drop too, but that one is in the total, by which every
    result is divided.
    """
    return torch.mul(weight, value).nansum(-1)
