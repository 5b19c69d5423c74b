"""What is done to one chunk of logits, in plain torch: read into a few sums a row, or turned into its gradient.

    partial = partial_sums(student, teacher, column, student_scale=1.0, teacher_scale=1.0)                # [13, C]
    logits_gradient(student, teacher, rows_table, row_scale, column, kind="reverse_kl", beta=0.5,
                    student_scale=1.0, teacher_scale=1.0, out=student)

This is the backend `torch` of `ops/backends.py`, where the contract is; the native backends do the same, and are
tested against it. The formulas are derived in `ops/divergence.py`; the order of the sums and of `rows_table` is fixed
by `ops/shard_sums.py`. Arithmetic is fp32, or float64 where the logits are.

Not here: making the logits, communication, rows' weights.
"""

from __future__ import annotations

import torch

from megatron_tcod.ops.shard_sums import CENTRE, NUM_PAIR_SUMS, NUM_SOFTMAX_SUMS, unless_zero

name = "torch"

SMALL_GAP = {torch.float32: 0.35, torch.float64: 0.02}
"""Below this |a - b| the series of `_excess` up to the seventh power has the type's precision."""


def unavailable() -> str | None:
    return None


def partial_sums(
    student: torch.Tensor,
    teacher: torch.Tensor | None,
    column: torch.Tensor | None,
    *,
    student_scale: float,
    teacher_scale: float,
    packed: torch.Tensor | None = None,
) -> torch.Tensor:
    """Logits [C, columns] -> [13, C] float64 sums over this shard, or [4, C] without a teacher."""
    if student.shape[1] == 0:
        return _empty_sums(student.shape[0], teacher is not None, student.device)
    student = _scaled(student, student_scale)
    teacher = None if teacher is None else _scaled(teacher, teacher_scale)
    if packed is not None:
        pack(student, teacher, packed)
    student_exp, *student_sums = _softmax_sums(student, column)
    if teacher is None:
        return torch.stack(student_sums).double()
    teacher_exp, *teacher_sums = _softmax_sums(teacher, column)
    is_shared = torch.add(student, teacher).amax(-1) == 0  # [C] both shifted logits are 0 in one column
    gap = student.sub_(teacher)  # [C, columns] a - b
    cross_sums = [
        _expectation(student_exp, gap),
        _expectation(teacher_exp, gap),
        _excess(student_exp, teacher_exp, gap),
        _excess(teacher_exp, student_exp, gap.neg()),
        is_shared.to(gap.dtype),
    ]
    return torch.stack([*student_sums, *teacher_sums, *cross_sums]).double()


def pack(student: torch.Tensor, teacher: torch.Tensor, packed: torch.Tensor) -> None:
    """Scaled logits [C, columns] -> packed [2, C, columns] fp16: the student's, and the gap to the teacher's."""
    packed[0].copy_(student)
    packed[1].copy_(torch.where(student == teacher, 0.0, student - teacher))  # -inf on both sides is no gap


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


def _excess(weight: torch.Tensor, other: torch.Tensor, gap: torch.Tensor) -> torch.Tensor:
    """Sum of weight * (expm1(-gap) + gap), no term of which is negative; other = weight * e^-gap. [C, columns] -> [C].

    Where the gap is small the bracket is gap^2 / 2 and a difference of exponentials would leave no digit of it.
    """
    series = gap * gap * (0.5 - gap * (1 / 6 - gap * (1 / 24 - gap * (1 / 120 - gap * (1 / 720 - gap / 5040)))))
    term = torch.where(gap.abs() < SMALL_GAP[gap.dtype], weight * series, other - weight + unless_zero(weight, gap.clone()))
    return term.sum(-1)


def _empty_sums(num_rows: int, has_teacher: bool, device: torch.device) -> torch.Tensor:
    """What a shard of padding adds: no maximum, no mass, no target."""
    softmax = torch.tensor([-torch.inf, 0.0, 0.0, -torch.inf], dtype=torch.float64, device=device)
    assert len(softmax) == NUM_SOFTMAX_SUMS
    column = torch.cat([softmax, softmax, softmax.new_zeros(NUM_PAIR_SUMS)]) if has_teacher else softmax
    return column[:, None].expand(-1, num_rows)


def mixture_sums(
    student: torch.Tensor,
    teacher: torch.Tensor,
    rows_table: torch.Tensor,
    *,
    beta: float,
    student_scale: float,
    teacher_scale: float,
    is_packed: bool = False,
) -> torch.Tensor:
    """Logits [C, columns] -> [2, C] float64, this shard's part of KL(p_S || m) and KL(p_T || m)."""
    student, teacher = _pair(student, teacher, student_scale, teacher_scale, is_packed)
    student_p, teacher_p, delta, log_share = _mixture(student, teacher, rows_table.to(student.dtype), beta=beta)
    from_student = unless_zero(student_p, delta.clamp(min=0).add_(log_share)).sum(-1)  # [C]
    from_teacher = unless_zero(teacher_p, delta.neg_().clamp_(min=0).add_(log_share)).sum(-1)  # [C]
    return -torch.stack([from_student, from_teacher]).double()


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
    student: torch.Tensor,
    teacher: torch.Tensor | None,
    rows_table: torch.Tensor,
    row_scale: torch.Tensor,
    column: torch.Tensor | None,
    *,
    kind: str,
    beta: float,
    student_scale: float,
    teacher_scale: float,
    out: torch.Tensor,
    is_packed: bool = False,
) -> None:
    """Write row_scale * (derivative of each row's loss by its student logits over the temperature) into `out`."""
    is_idle = row_scale == 0  # [C] rows that must leave no trace, whatever they hold
    student, teacher = _pair(student, teacher, student_scale, teacher_scale, is_packed)
    gradient = _gradient(kind, student, teacher, rows_table.to(student.dtype), column, beta)
    gradient.mul_(row_scale.to(gradient.dtype)[:, None])
    out.copy_(gradient.masked_fill_(is_idle[:, None], 0))


def _gradient(
    kind: str,
    student: torch.Tensor,
    teacher: torch.Tensor | None,
    rows_table: torch.Tensor,
    column: torch.Tensor | None,
    beta: float,
) -> torch.Tensor:
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


def _scaled(logits: torch.Tensor, scale: float) -> torch.Tensor:
    """A copy over the temperature, in fp32 or wider."""
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32), copy=True)
    return wide if scale == 1.0 else wide.mul_(scale)


def _pair(
    student: torch.Tensor, teacher: torch.Tensor | None, student_scale: float, teacher_scale: float, is_packed: bool
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Copies of both logits over their temperatures; packed ones hold that already, the teacher's as a gap."""
    if is_packed:
        student = student.float()
        return student, student - teacher
    return _scaled(student, student_scale), None if teacher is None else _scaled(teacher, teacher_scale)


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
