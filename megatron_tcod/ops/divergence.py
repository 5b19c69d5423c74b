"""Per-token divergence of two language models from hidden states, vocabulary-parallel, without the [S, V] logits.

How to call it, on every rank of the tensor-parallel group and with the same rows on each:

    out = linear_divergence(student_hidden, student_head, teacher_hidden, teacher_head, kind="reverse_kl",
                            vocab_size=151_669, target_ids=target_ids, tp_group=tp_group)
    (loss_weight * out.loss).sum().backward()

The chunk loop. Hidden rows meet the head a bounded number at a time, so one chunk's pair of logits is all that lives.
The forward pass reads each chunk once and leaves a dozen partial sums a row; after the last chunk one all-gather
brings the sums of all vocabulary shards together, and every rank adds them in rank order: same bits everywhere.
The backward pass makes the logits again, chunk by chunk, and turns them into their gradient in place. That needs no
communication, because the sums it uses are already global and the loss is the same on each rank; only the gradient
of `student_hidden`, to which each shard contributes, is all-reduced, and nothing is multiplied by the group's size.

The sums. With a = s - max(s) and b = t - max(t), the logits of student and teacher over their temperatures, shifted,

    Z_s = sum e^a     Z_t = sum e^b     G_s = sum e^a (a - b)     G_t = sum e^b (a - b)     C_s = sum e^a a
    KL(p_S || p_T) =  G_s / Z_s - log Z_s + log Z_t          H(p_S) = log Z_s - C_s / Z_s
    KL(p_T || p_S) = -G_t / Z_t - log Z_t + log Z_s          log p_S(y) = s_y - max(s) - log Z_s

Shifting keeps the terms as small as the answer, where plain log-sum-exps of +-1e4 would leave fp32 no digits. A shard
with its own maximum m joins at the global maximum M by Z += e^(m-M) Z', C += e^(m-M) (C' + (m-M) Z'), and G likewise.
The mixture of JSD is not linear in these, so that kind reads the logits a second time and gathers two more sums:

    delta = log p_T - log p_S          log(m / p_S) = max(delta, 0) + log1p(c * expm1(-|delta|))
    c = 1 - beta where delta > 0 else beta                log(m / p_T) = max(-delta, 0) + the same

The gradient with respect to s, later times the upstream gradient and 1 / student_temperature:

    reverse_kl   p_S (log p_S - log p_T - KL)                          forward_kl   p_S - p_T
    jsd          (1 - beta) p_S (log(p_S / m) - KL(p_S || m))          nll          p_S - onehot(y)

fp32 inputs are computed in fp32, float64 in float64, half-precision inputs give fp32 logits; sums of shards are merged
in float64. Definitions and conventions are in `ops/reference.py`, which this file must match.

Not here: normalisation over tokens (the caller's `loss_weight`), sequence-parallel gathering of hidden states, a
second derivative, and native kernels, which will take the place of the functions in `ops/logits_chunk.py`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch.autograd.function import once_differentiable

from megatron_tcod.ops.logits_chunk import logits_gradient, mixture_sums, partial_sums
from megatron_tcod.ops.shard_sums import CENTRE, MergedSums
from megatron_tcod.ops.vocab_shard import VocabShard, align_head, group_rank, group_size

__all__ = ["KINDS", "TokenDivergence", "TokenLogprob", "align_head", "linear_divergence", "linear_logprob"]

KINDS = ("reverse_kl", "forward_kl", "jsd", "nll")
"""What `TokenDivergence.loss` can be. `nll` is -log p_S(target), with the statistics of both models beside it."""

CHUNK_BYTES = {"cpu": 2 << 20, "cuda": 1 << 30}
"""Bytes of one chunk of fp32 logits: near a core's cache on a CPU, large enough to fill the matrix units on a GPU."""

MIN_CHUNK_ROWS = 256
"""Fewer rows would spend more time on adding up the head gradient, which every chunk touches whole, than on products."""


@dataclass(frozen=True, kw_only=True)
class TokenDivergence:
    """One value a row, nats. All but `loss` are detached statistics of the same read, over the real vocabulary.

    Example: `linear_divergence(...).loss` has shape [S] and reaches `student_hidden` and `student_head`.
    """

    loss: torch.Tensor  # [S] differentiable
    reverse_kl: torch.Tensor  # [S] KL(student || teacher)
    forward_kl: torch.Tensor  # [S] KL(teacher || student)
    student_entropy: torch.Tensor  # [S]
    teacher_entropy: torch.Tensor  # [S]
    top1_agreement: torch.Tensor  # [S] 1 where both put most mass on one token, else 0
    student_logprob: torch.Tensor | None  # [S] at target_ids; None without target_ids
    teacher_logprob: torch.Tensor | None  # [S] at target_ids; None without target_ids


@dataclass(frozen=True, kw_only=True)
class TokenLogprob:
    """One value a row, nats. Example: `(-weight * linear_logprob(...).logprob).sum()` is a weighted NLL."""

    logprob: torch.Tensor  # [S] differentiable
    entropy: torch.Tensor  # [S] detached


def linear_divergence(
    student_hidden: torch.Tensor,
    student_head: torch.Tensor,
    teacher_hidden: torch.Tensor,
    teacher_head: torch.Tensor,
    *,
    kind: str,
    vocab_size: int,
    beta: float = 0.5,
    student_temperature: float = 1.0,
    teacher_temperature: float = 1.0,
    target_ids: torch.Tensor | None = None,
    tp_group: dist.ProcessGroup | None = None,
    chunk_size: int | None = None,
) -> TokenDivergence:
    """Divergence between student and teacher at each row, with statistics from the same read of the logits.

    student_hidden [S, H_s], the same on each rank of `tp_group`; student_head [V/tp, H_s], this rank's shard of the
    padded vocabulary. teacher_hidden [S, H_t] and teacher_head [V/tp, H_t] likewise, without gradient. `vocab_size`
    counts real tokens: columns from there on have no probability and get a gradient of exactly zero, also where that
    is a rank's whole shard. target_ids [S] int64 are global ids; one outside the vocabulary has log-probability -inf.
    `beta` belongs to `jsd`. `chunk_size` is in rows; None takes what `CHUNK_BYTES` allows.

    The gradient of student_hidden is already summed over `tp_group`; that of student_head is this shard's, added up
    in fp32. A row whose upstream gradient is zero contributes exactly zero, even where its values are not finite.

    Collectives: forward one all-gather (two for `jsd`), backward one all-reduce; S may be 0 if it is so on all ranks.
    Raises ValueError for shapes that do not fit, unequal shards (see `align_head`), and settings out of range.
    """
    if kind not in KINDS:
        raise ValueError(f"kind {kind!r} is unknown; it must be one of {', '.join(KINDS)}")
    if kind == "jsd" and not 0 < beta < 1:
        raise ValueError(f"beta must lie strictly between 0 and 1, got {beta}; use forward_kl or reverse_kl instead")
    if kind == "nll" and target_ids is None:
        raise ValueError("kind 'nll' is a log-probability at target_ids [S]; got none")
    _check_rows("student", student_hidden, student_head, target_ids, chunk_size)
    _check_rows("teacher", teacher_hidden, teacher_head, target_ids, chunk_size)
    if teacher_hidden.shape[0] != student_hidden.shape[0]:
        raise ValueError(
            f"teacher_hidden has {teacher_hidden.shape[0]} rows, student_hidden {student_hidden.shape[0]}; "
            f"both must hold the same trained positions"
        )
    tp_size = group_size(tp_group)
    if tp_size > 1 and teacher_head.shape[0] != student_head.shape[0]:
        raise ValueError(
            f"the teacher's head shard has {teacher_head.shape[0]} rows, the student's {student_head.shape[0]}, so "
            f"rank {dist.get_rank(tp_group)} of {tp_size} would compare different tokens; once, before training, use "
            f"align_head(teacher_head, vocab_size, {student_head.shape[0] * tp_size}, tp_group)"
        )
    plan = _Plan(
        kind=kind,
        beta=beta,
        student_scale=_inverse("student_temperature", student_temperature),
        teacher_scale=_inverse("teacher_temperature", teacher_temperature),
        shard=_shard_of(student_head, vocab_size, tp_group, teacher_head),
        chunk_size=chunk_size,
        tp_group=tp_group,
    )
    loss, statistics = _LinearDivergence.apply(
        plan, student_hidden, student_head, teacher_hidden.detach(), teacher_head.detach(), target_ids
    )  # [S], [7, S]
    student_entropy, student_logprob, teacher_entropy, teacher_logprob, reverse, forward, agreement = statistics
    return TokenDivergence(
        loss=loss,
        reverse_kl=reverse,
        forward_kl=forward,
        student_entropy=student_entropy,
        teacher_entropy=teacher_entropy,
        top1_agreement=agreement,
        student_logprob=None if target_ids is None else student_logprob,
        teacher_logprob=None if target_ids is None else teacher_logprob,
    )


def linear_logprob(
    hidden: torch.Tensor,
    head: torch.Tensor,
    target_ids: torch.Tensor,
    *,
    vocab_size: int,
    temperature: float = 1.0,
    tp_group: dist.ProcessGroup | None = None,
    chunk_size: int | None = None,
) -> TokenLogprob:
    """Log-probability of target_ids [S] under one model, and its entropy, both [S] in nats.

    hidden [S, H], head [V/tp, H]: padding, gradients, collectives and errors as in `linear_divergence`.
    """
    _check_rows("student", hidden, head, target_ids, chunk_size)
    plan = _Plan(
        kind="nll",
        student_scale=_inverse("temperature", temperature),
        shard=_shard_of(head, vocab_size, tp_group),
        chunk_size=chunk_size,
        tp_group=tp_group,
    )
    loss, statistics = _LinearDivergence.apply(plan, hidden, head, None, None, target_ids)  # [S], [2, S]
    return TokenLogprob(logprob=-loss, entropy=statistics[0])


@dataclass(frozen=True, kw_only=True)
class _Plan:
    """Everything about one call that is not a tensor."""

    kind: str
    student_scale: float
    shard: VocabShard
    chunk_size: int | None
    tp_group: dist.ProcessGroup | None
    teacher_scale: float = 1.0
    beta: float = 0.5

    def chunks(self, num_rows: int, device: torch.device) -> Iterator[slice]:
        """Row ranges of nearly equal length that cover [0, num_rows)."""
        size = self.chunk_size
        if size is None:
            budget = CHUNK_BYTES.get(device.type, CHUNK_BYTES["cuda"])
            size = max(MIN_CHUNK_ROWS, budget // (4 * max(self.shard.columns, 1)))
        length = math.ceil(num_rows / max(math.ceil(num_rows / size), 1))
        for start in range(0, num_rows, max(length, 1)):
            yield slice(start, min(start + length, num_rows))

    def columns_of(self, target_ids: torch.Tensor | None) -> torch.Tensor | None:
        """Where in this shard a token is; -1 for a token that is elsewhere or nowhere. [S] -> [S]."""
        if target_ids is None:
            return None
        column = target_ids - self.shard.first  # [S]
        return torch.where((column >= 0) & (column < self.shard.columns), column, -1)


class _LinearDivergence(torch.autograd.Function):
    """The chunk loops around the sums, the gather and the gradient. Without a teacher `kind` can only be `nll`."""

    @staticmethod
    def forward(
        ctx: Any,
        plan: _Plan,
        student_hidden: torch.Tensor,
        student_head: torch.Tensor,
        teacher_hidden: torch.Tensor | None,
        teacher_head: torch.Tensor | None,
        target_ids: torch.Tensor | None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        num_rows, device = student_hidden.shape[0], student_hidden.device
        student, teacher = _projections(plan, student_hidden, student_head, teacher_hidden, teacher_head)
        column = plan.columns_of(target_ids)  # [S] or None
        partial = torch.empty(
            MergedSums.count(teacher is not None), num_rows, dtype=torch.float64, device=device
        )  # [K, S] this shard
        for rows in plan.chunks(num_rows, device):
            partial[:, rows] = partial_sums(
                student.logits(rows),
                None if teacher is None else teacher.logits(rows),
                None if column is None else column[rows],
                student_scale=plan.student_scale,
                teacher_scale=plan.teacher_scale,
            )
        sums = MergedSums.merge(_all_gather(partial, plan.tp_group))  # each [S] float64

        dtype = student.dtype
        rows_table = sums.table()  # [5, S] float64
        if plan.kind == "jsd":
            pair = torch.empty(2, num_rows, dtype=torch.float64, device=device)  # [2, S] this shard
            for rows in plan.chunks(num_rows, device):
                pair[:, rows] = mixture_sums(
                    student.logits(rows),
                    teacher.logits(rows),
                    rows_table[:, rows],
                    beta=plan.beta,
                    student_scale=plan.student_scale,
                    teacher_scale=plan.teacher_scale,
                )
            from_student, from_teacher = _all_gather(pair, plan.tp_group).sum(0)  # [S] each
            rows_table[CENTRE] = from_student
            loss = plan.beta * from_teacher + (1 - plan.beta) * from_student  # [S]
        else:
            loss = {
                "reverse_kl": sums.reverse_kl,
                "forward_kl": sums.forward_kl,
                "nll": -sums.student.logprob,
            }[plan.kind]  # [S]
        statistics = torch.stack(sums.statistics()).to(dtype)  # [7, S], or [2, S] without a teacher
        ctx.plan = plan
        ctx.save_for_backward(student_hidden, student_head, teacher_hidden, teacher_head, column, rows_table)
        ctx.mark_non_differentiable(statistics)
        return loss.to(dtype), statistics

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_loss: torch.Tensor, _grad_statistics: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        plan = ctx.plan
        student_hidden, student_head, teacher_hidden, teacher_head, column, rows_table = ctx.saved_tensors
        if plan.kind == "nll":
            teacher_hidden = teacher_head = None
        _, needs_hidden, needs_head, *_ = ctx.needs_input_grad
        is_idle = grad_loss == 0  # [S] rows that must leave no trace, whatever they hold
        rows_table = rows_table.masked_fill(is_idle, 0)  # [5, S]
        student, teacher = _projections(plan, student_hidden, student_head, teacher_hidden, teacher_head)
        dtype, columns = student.dtype, plan.shard.columns
        grad_hidden = student_hidden.new_zeros(student_hidden.shape, dtype=dtype) if needs_hidden else None  # [S, H_s]
        grad_head = student_head.new_zeros(student_head.shape, dtype=dtype) if needs_head else None  # [V/tp, H_s]

        for rows in plan.chunks(student_hidden.shape[0], student_hidden.device):
            grad_logits = student.logits(rows, is_idle)  # [C, columns] of the shard
            logits_gradient(
                grad_logits,
                None if teacher is None else teacher.logits(rows, is_idle),
                rows_table[:, rows],
                grad_loss[rows].to(dtype) * plan.student_scale,
                None if column is None else column[rows],
                kind=plan.kind,
                beta=plan.beta,
                student_scale=plan.student_scale,
                teacher_scale=plan.teacher_scale,
                out=grad_logits,
            )
            grad_logits = student.operand(grad_logits)
            if needs_hidden:
                grad_hidden[rows] = _matmul(grad_logits, student.head, dtype)
            if needs_head:
                _add_matmul(grad_head[:columns], grad_logits.T, student.rows(rows, is_idle))
        if needs_hidden and group_size(plan.tp_group) > 1 and grad_hidden.numel():
            dist.all_reduce(grad_hidden, group=plan.tp_group)
        return (
            None,
            grad_hidden.to(student_hidden.dtype) if needs_hidden else None,
            grad_head.to(student_head.dtype) if needs_head else None,
            None,
            None,
            None,
        )


@dataclass(frozen=True)
class _Projection:
    """One model's hidden states and the real rows of its head shard, ready to make chunks of logits."""

    hidden: torch.Tensor  # [S, H]
    head: torch.Tensor  # [columns, H]
    scale: float
    dtype: torch.dtype
    """Of the logits: float64 or float32."""

    @classmethod
    def of(
        cls, hidden: torch.Tensor, head: torch.Tensor, *, columns: int, scale: float, dtype: torch.dtype
    ) -> _Projection:
        head = head[:columns]
        if not (hidden.dtype == head.dtype and _has_wide_product(head, dtype)):
            head = head.to(dtype)
        return cls(hidden, head, scale, dtype)

    def operand(self, rows: torch.Tensor) -> torch.Tensor:
        """Rows in the type that the head is multiplied in."""
        return rows.to(self.head.dtype)

    def rows(self, rows: slice, is_idle: torch.Tensor | None = None) -> torch.Tensor:
        """[C, H]; idle rows as zeros, so that nothing in them can spread."""
        hidden = self.operand(self.hidden[rows])
        return hidden if is_idle is None else hidden.masked_fill(is_idle[rows, None], 0)

    def logits(self, rows: slice, is_idle: torch.Tensor | None = None) -> torch.Tensor:
        """[C, columns] of this shard."""
        return _matmul(self.rows(rows, is_idle), self.head.T, self.dtype)


def _projections(
    plan: _Plan,
    student_hidden: torch.Tensor,
    student_head: torch.Tensor,
    teacher_hidden: torch.Tensor | None,
    teacher_head: torch.Tensor | None,
) -> tuple[_Projection, _Projection | None]:
    is_double = torch.float64 in (student_hidden.dtype, student_head.dtype)
    settings = {"columns": plan.shard.columns, "dtype": torch.float64 if is_double else torch.float32}
    student = _Projection.of(student_hidden, student_head, scale=plan.student_scale, **settings)
    if teacher_hidden is None:
        return student, None
    return student, _Projection.of(teacher_hidden, teacher_head, scale=plan.teacher_scale, **settings)


def _has_wide_product(operand: torch.Tensor, dtype: torch.dtype) -> bool:
    """Whether the device multiplies this half-precision type into fp32 directly."""
    return operand.is_cuda and operand.dtype in (torch.bfloat16, torch.float16) and dtype == torch.float32


def _matmul(left: torch.Tensor, right: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Product of two operands of one type, as `dtype`."""
    if _has_wide_product(left, dtype):
        return torch.mm(left, right, out_dtype=dtype)
    return torch.mm(left, right)


def _add_matmul(total: torch.Tensor, left: torch.Tensor, right: torch.Tensor) -> None:
    """total += left @ right, in the type of `total`."""
    if _has_wide_product(left, total.dtype):
        total += torch.mm(left, right, out_dtype=total.dtype)
    else:
        total.addmm_(left, right)


def _all_gather(partial: torch.Tensor, tp_group: dist.ProcessGroup | None) -> torch.Tensor:
    """[K, S] of each rank -> [tp, K, S] in rank order."""
    size = group_size(tp_group)
    if size == 1 or not partial.numel():  # S is the same on each rank, so all skip together
        return partial.expand(size, *partial.shape)
    gathered = partial.new_empty(size * partial.shape[0], partial.shape[1])  # gloo wants one dimension to grow
    dist.all_gather_into_tensor(gathered, partial, group=tp_group)
    return gathered.view(size, *partial.shape)


def _shard_of(
    head: torch.Tensor, vocab_size: int, tp_group: dist.ProcessGroup | None, other_head: torch.Tensor | None = None
) -> VocabShard:
    rows = head.shape[0] if other_head is None else min(head.shape[0], other_head.shape[0])
    if not 0 < vocab_size <= rows * group_size(tp_group):
        raise ValueError(
            f"vocab_size {vocab_size} is outside [1, {rows * group_size(tp_group)}], the rows of the head over all "
            f"{group_size(tp_group)} shards; it counts the tokenizer's real tokens, without padding"
        )
    return VocabShard.of(vocab_size, head.shape[0], group_rank(tp_group))


def _check_rows(
    side: str, hidden: torch.Tensor, head: torch.Tensor, target_ids: torch.Tensor | None, chunk_size: int | None
) -> None:
    if chunk_size is not None and chunk_size < 1:
        raise ValueError(f"chunk_size must be at least 1 row, got {chunk_size}; None chooses it from CHUNK_BYTES")
    if hidden.dim() != 2 or head.dim() != 2 or hidden.shape[1] != head.shape[1]:
        raise ValueError(
            f"{side} hidden states must be [S, H] and the head shard [V/tp, H] with one H, "
            f"got {list(hidden.shape)} and {list(head.shape)}"
        )
    if target_ids is not None and target_ids.shape != hidden.shape[:1]:
        raise ValueError(
            f"target_ids must be [S] = [{hidden.shape[0]}] like the {side} rows, got {list(target_ids.shape)}"
        )


def _inverse(name: str, temperature: float) -> float:
    if not temperature > 0:
        raise ValueError(f"{name} must be positive, got {temperature}; greedy decoding has no distribution to match")
    return 1.0 / temperature
