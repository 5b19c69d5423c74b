"""What each per-token quantity is: plain torch, one process, whole vocabulary, derivatives by autograd.

This module is the specification. `ops/divergence.py` and every native kernel behind it must give these values and
these gradients; change this file first, in a commit of its own. Feed it float64 logits made from float64 operands
(`hidden.double() @ head.double().T`) to get the truth, or fp32 logits to see what an ordinary computation would give.

Conventions, with `S` the student and `T` the teacher, natural logarithms, results in nats:

    p_S = softmax(student_logits[:, :vocab_size] / student_temperature),  p_T likewise with the teacher's
    reverse KL   KL(p_S || p_T)     mode seeking: the student pays where it puts mass and the teacher does not
    forward KL   KL(p_T || p_S)     mode covering; Eq. 2 of arXiv 2604.24005 is written in this direction
    JSD_beta     beta * KL(p_T || m) + (1 - beta) * KL(p_S || m),   m = beta * p_T + (1 - beta) * p_S

A term whose weight is exactly zero counts as zero, whatever the other distribution says there. A column with weight
against which the other side has probability zero makes the divergence infinite: that is the answer, not an error.
There is no hidden factor tau^2: a temperature divides logits and does nothing else.

Top-k with a tail (`topk_divergence`) is for teachers that send k log-probabilities a position. Both distributions are
reduced to the k listed tokens and one bucket with the rest of the mass, and the same three definitions apply to these.

Not here: chunking, tensor parallelism, reductions over tokens, speed.
"""

from __future__ import annotations

import torch


def log_softmax(logits: torch.Tensor, *, vocab_size: int | None = None, temperature: float = 1.0) -> torch.Tensor:
    """Log-probabilities over the real vocabulary.

    logits [S, V_padded], any float dtype, kept. Returns [S, vocab_size]; columns from `vocab_size` on do not exist.
    Raises ValueError for a vocabulary larger than the logits and for a temperature that is not positive.
    """
    columns = logits.shape[-1] if vocab_size is None else vocab_size
    if not 0 < columns <= logits.shape[-1]:
        raise ValueError(f"vocab_size {columns} is outside [1, {logits.shape[-1]}], the columns of the logits")
    if not temperature > 0:
        raise ValueError(f"temperature must be positive, got {temperature}; greedy decoding has no distribution")
    return torch.log_softmax(logits[..., :columns] / temperature, dim=-1)


def reverse_kl(
    student_logits: torch.Tensor,
    teacher_logits: torch.Tensor,
    *,
    vocab_size: int | None = None,
    student_temperature: float = 1.0,
    teacher_temperature: float = 1.0,
) -> torch.Tensor:
    """KL(student || teacher). Logits [S, V_student], [S, V_teacher] -> [S] nats, at least 0."""
    student, teacher = _both(
        student_logits, teacher_logits, vocab_size, (student_temperature, teacher_temperature)
    )  # [S, V] each
    return _kl(student, teacher)


def forward_kl(
    student_logits: torch.Tensor,
    teacher_logits: torch.Tensor,
    *,
    vocab_size: int | None = None,
    student_temperature: float = 1.0,
    teacher_temperature: float = 1.0,
) -> torch.Tensor:
    """KL(teacher || student). Logits [S, V_student], [S, V_teacher] -> [S] nats, at least 0."""
    student, teacher = _both(
        student_logits, teacher_logits, vocab_size, (student_temperature, teacher_temperature)
    )  # [S, V] each
    return _kl(teacher, student)


def jsd(
    student_logits: torch.Tensor,
    teacher_logits: torch.Tensor,
    *,
    beta: float = 0.5,
    vocab_size: int | None = None,
    student_temperature: float = 1.0,
    teacher_temperature: float = 1.0,
) -> torch.Tensor:
    """JSD_beta. Logits [S, V_student], [S, V_teacher] -> [S] nats, between 0 and the entropy of (beta, 1 - beta).

    Raises ValueError unless 0 < beta < 1: at both ends the sum vanishes identically.
    """
    if not 0 < beta < 1:
        raise ValueError(f"beta must lie strictly between 0 and 1, got {beta}; use forward_kl or reverse_kl instead")
    student, teacher = _both(
        student_logits, teacher_logits, vocab_size, (student_temperature, teacher_temperature)
    )  # [S, V] each
    mixture = beta * teacher.exp() + (1 - beta) * student.exp()  # [S, V]
    log_mixture = torch.where(mixture == 0, torch.ones_like(mixture), mixture).log()  # [S, V]
    return beta * _kl(teacher, log_mixture) + (1 - beta) * _kl(student, log_mixture)


def entropy(logits: torch.Tensor, *, vocab_size: int | None = None, temperature: float = 1.0) -> torch.Tensor:
    """Shannon entropy. Logits [S, V] -> [S] nats, between 0 and log(vocab_size)."""
    log_p = log_softmax(logits, vocab_size=vocab_size, temperature=temperature)  # [S, V]
    return -_expectation(log_p.exp(), log_p)


def logprob(
    logits: torch.Tensor, target_ids: torch.Tensor, *, vocab_size: int | None = None, temperature: float = 1.0
) -> torch.Tensor:
    """Log-probability of one token a row. Logits [S, V], target_ids [S] int64 -> [S] nats, at most 0."""
    log_p = log_softmax(logits, vocab_size=vocab_size, temperature=temperature)  # [S, V]
    return log_p.gather(-1, target_ids[..., None])[..., 0]


def topk_divergence(
    student_logits: torch.Tensor,
    support_ids: torch.Tensor,
    teacher_logprobs: torch.Tensor,
    *,
    kind: str,
    beta: float = 0.5,
    vocab_size: int | None = None,
    student_temperature: float = 1.0,
    tail_floor: float = 0.0,
) -> torch.Tensor:
    """Divergence of both distributions over k + 1 buckets: the k listed tokens, and all others together.

    student_logits [S, V_student], support_ids [S, k] int64 with -1 in unused places, teacher_logprobs [S, k] at these
    ids -> [S] nats; `kind` is reverse_kl, forward_kl or jsd. It is never above the divergence of whole vocabularies,
    because both sides are coarsened in the same way.
    """
    log_p = log_softmax(student_logits, vocab_size=vocab_size, temperature=student_temperature)  # [S, V]
    student = student_buckets(log_p, support_ids)  # [S, k + 1]
    is_complete = (support_ids >= 0).sum(-1) == log_p.shape[-1]  # [S]
    teacher = teacher_buckets(teacher_logprobs.to(log_p), support_ids, is_complete, tail_floor=tail_floor)  # [S, k + 1]
    if kind == "reverse_kl":
        return _kl(student, teacher)
    if kind == "forward_kl":
        return _kl(teacher, student)
    assert kind == "jsd", kind
    mixture = _safe_log(beta * teacher.exp() + (1 - beta) * student.exp())  # [S, k + 1]
    return beta * _kl(teacher, mixture) + (1 - beta) * _kl(student, mixture)


def student_buckets(log_p: torch.Tensor, support_ids: torch.Tensor) -> torch.Tensor:
    """Log-probabilities [S, V] -> [S, k + 1] of the listed ids and, last, of all others together; -inf where empty."""
    is_listed = log_p.new_zeros(log_p.shape[0], log_p.shape[1] + 1, dtype=torch.bool)  # [S, V + 1] last: unused places
    is_listed.scatter_(-1, support_ids.where(support_ids >= 0, log_p.shape[1]), True)
    tail = log_p.exp().masked_fill(is_listed[:, :-1], 0).sum(-1, keepdim=True)  # [S, 1]
    listed = log_p.gather(-1, support_ids.clamp(min=0)).masked_fill(support_ids < 0, -torch.inf)  # [S, k]
    return torch.cat([listed, _safe_log(tail)], -1)


def teacher_buckets(
    logprobs: torch.Tensor, support_ids: torch.Tensor, is_complete: torch.Tensor, *, tail_floor: float = 0.0
) -> torch.Tensor:
    """Log-probabilities [S, k] at the listed ids -> [S, k + 1] with the rest of the mass last.

    Listed mass above 1 is rounding and is scaled down to 1. A rest below `tail_floor` is raised to it and the listed
    mass scaled to what remains, so that both stay a distribution. In rows that list the whole vocabulary (is_complete
    [S]) there is no rest at all.
    """
    mass = logprobs.exp().masked_fill(support_ids < 0, 0)  # [S, k]
    total = mass.sum(-1, keepdim=True)  # [S, 1]
    tail = (1 - total).clamp(min=tail_floor).masked_fill(is_complete[:, None], 0)  # [S, 1]
    listed = torch.where(tail == 1 - total, mass, mass * (1 - tail) / torch.where(total == 0, 1, total))  # [S, k]
    return _safe_log(torch.cat([listed, tail], -1))


def _safe_log(mass: torch.Tensor) -> torch.Tensor:
    """Logarithm whose derivative at zero is zero, so that an empty bucket has none."""
    return torch.where(mass == 0, -torch.inf, torch.where(mass == 0, 1, mass).log())


def _both(
    student_logits: torch.Tensor,
    teacher_logits: torch.Tensor,
    vocab_size: int | None,
    temperatures: tuple[float, float],
) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probabilities of both sides over one vocabulary. [S, V_student], [S, V_teacher] -> [S, V], [S, V]."""
    if vocab_size is None and student_logits.shape[-1] != teacher_logits.shape[-1]:
        raise ValueError(
            f"student logits have {student_logits.shape[-1]} columns, teacher logits {teacher_logits.shape[-1]}; "
            f"pass vocab_size, the number of real tokens that both share"
        )
    student = log_softmax(student_logits, vocab_size=vocab_size, temperature=temperatures[0])
    teacher = log_softmax(teacher_logits, vocab_size=vocab_size, temperature=temperatures[1])
    return student, teacher


def _kl(log_p: torch.Tensor, log_q: torch.Tensor) -> torch.Tensor:
    """KL(p || q) of log-probabilities [S, V] -> [S]."""
    return _expectation(log_p.exp(), log_p - log_q)


def _expectation(weight: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """Sum of weight * value over the vocabulary; a zero weight never meets its value (0 * inf). [S, V] -> [S]."""
    return (weight * torch.where(weight == 0, torch.zeros_like(value), value)).sum(-1)
