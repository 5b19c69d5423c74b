"""Per-token divergence from a teacher that sends k log-probabilities a position, as one behind a server does.

How to call it, on every rank of the tensor-parallel group and with the same rows on each:

    ids = student_topk(student_hidden, student_head, k=32, vocab_size=151_669, tp_group=tp_group)    # or the teacher's own
    out = linear_topk_divergence(student_hidden, student_head, ids, teacher_logprobs, kind="reverse_kl",
                                 vocab_size=151_669, tp_group=tp_group)
    (loss_weight * out.loss).sum().backward()

Buckets. Both distributions are reduced to k + 1 buckets, P and Q: the k listed tokens, and one for all the others.
What comes out is a divergence of two distributions: never negative, zero only where all buckets agree, and never above
the divergence of the whole vocabularies. A sum over the listed tokens alone has none of these properties. The
student's last bucket is a log-sum-exp over the columns that are not listed, exact however small it is. Of the
teacher's, only 1 - sum is known, which for fp32 log-probabilities is rounding below about 1e-6: `tail_floor`.

Gradient. With x the student's logits over the temperature, y_b = x_v for the bucket of a listed v and the log-sum-exp
of the others for the last one, the buckets are P = softmax(y), so with f_b = d loss / d P_b

    d loss / d y_b = P_b (f_b - sum_c P_c f_c) =: g_b        d y_b / d x_v = p_v / P_b for v in b
    reverse_kl  g_b = P_b (log(P_b / Q_b) - KL(P || Q))      jsd  g_b = (1 - beta) P_b (log(P_b / M_b) - KL(P || M))
    forward_kl  g_b = P_b - Q_b                                   M = beta Q + (1 - beta) P

so that every column gets a gradient: g_b of its own where it is listed, elsewhere a share of the last bucket's, by the
softmax over the columns that are not listed.

The loop. A chunk of logits gives its listed columns away and holds -inf there from then on; one read by the backend of
`ops/backends.py` then sums up the others. One all-gather brings 4 + k numbers a row together; what follows is float64 on
[k + 1, S]. With `loss_weight` the chunk becomes its gradient then and there, otherwise the backward pass makes the logits
again. `ops/divergence.py` has the conventions on temperature, padding and idle rows, `ops/reference.py` is the
specification.

Not here: asking the teacher, temperature of the teacher (k log-probabilities cannot be tempered), `torch.compile`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch.autograd.function import once_differentiable

from megatron_tcod.ops.chunk_loop import ChunkLoop, Gather, Plan, column_of, sum_over_shards
from megatron_tcod.ops.divergence import check_weights
from megatron_tcod.ops.library import weighted_total
from megatron_tcod.ops.shard_sums import Softmax, unless_zero
from megatron_tcod.ops.vocab_shard import VocabShard, group_rank, group_size

__all__ = ["KINDS", "TopKDivergence", "linear_topk_divergence", "sound_rows", "student_topk"]

KINDS = ("reverse_kl", "forward_kl", "jsd")
"""What `TopKDivergence.loss` can be."""

MASS_TOLERANCE = 1e-3
"""How far the listed probabilities of a row may sum up above 1 and still count as 1 in somebody's rounding."""


@dataclass(frozen=True, kw_only=True)
class TopKDivergence:
    """One value a row, nats or probability. All but `loss` are detached.

    Example: `linear_topk_divergence(...).loss` has shape [S] and reaches `student_hidden` and `student_head`.
    """

    loss: torch.Tensor  # [S] differentiable without loss_weight
    total: torch.Tensor | None  # [] sum(loss_weight * loss), differentiable; None without loss_weight
    reverse_kl: torch.Tensor  # [S] KL(student || teacher) of the buckets
    forward_kl: torch.Tensor  # [S] KL(teacher || student) of the buckets
    student_entropy: torch.Tensor  # [S] over the whole vocabulary
    student_tail: torch.Tensor  # [S] probability outside the listed tokens
    teacher_tail: torch.Tensor  # [S] likewise, after `tail_floor`
    student_logprob: torch.Tensor | None  # [S] at target_ids; None without target_ids


def linear_topk_divergence(
    student_hidden: torch.Tensor,
    student_head: torch.Tensor,
    support_ids: torch.Tensor,
    teacher_logprobs: torch.Tensor,
    *,
    kind: str,
    vocab_size: int,
    beta: float = 0.5,
    student_temperature: float = 1.0,
    tail_floor: float = 1e-6,
    target_ids: torch.Tensor | None = None,
    loss_weight: torch.Tensor | None = None,
    head_grad: torch.Tensor | None = None,
    tp_group: dist.ProcessGroup | None = None,
    chunk_size: int | None = None,
    backend: str = "auto",
) -> TopKDivergence:
    """Divergence over the k tokens of each row and the rest, with statistics from the same read of the student's logits.

    student_hidden [S, H], the same on each rank of `tp_group`; student_head [V/tp, H], this rank's shard of the padded
    vocabulary. support_ids [S, k] int64 are distinct global ids below `vocab_size`, -1 in unused places;
    teacher_logprobs [S, k] belong to them, -inf for probability zero. Both are whole on each rank. Teachers whose
    vocabulary has more tokens: put -1 at these, their mass then counts as the rest. target_ids [S] int64 likewise.

    `tail_floor` is the least probability that the teacher's rest is given, the listed ones being scaled to what
    remains; with 0 a row whose k probabilities sum up to 1 has an infinite reverse KL. It does not apply to rows that
    list the whole vocabulary, which have no rest. `beta` belongs to `jsd`.

    With `loss_weight` [S], on any device, the gradient is made together with the loss: call backward on `total`. Rows of
    weight zero then contribute exactly zero and have results of zero. `head_grad` [V/tp, H] fp32 or wider (Megatron's
    `main_grad`) takes the head's gradient, added up during the forward pass, so that backward may run once.

    Collectives: forward one all-gather, backward one all-reduce; with `loss_weight` one all-gather a chunk and the
    all-reduce forward. S may be 0 if it is so on all ranks. Raises ValueError
    for settings and shapes that do not fit and, for tensors on the CPU, for rows that `sound_rows` refuses. On a
    device, where looking would make the host wait, such a row's values and gradient are NaN.
    """
    if kind not in KINDS:
        raise ValueError(f"kind {kind!r} is unknown; it must be one of {', '.join(KINDS)}")
    if kind == "jsd" and not 0 < beta < 1:
        raise ValueError(f"beta must lie strictly between 0 and 1, got {beta}; use forward_kl or reverse_kl instead")
    if not 0 <= tail_floor < 0.5:
        raise ValueError(f"tail_floor is a small probability, at least 0 and below 0.5; got {tail_floor}")
    _check_student(student_hidden, student_head, vocab_size, tp_group, chunk_size, student_temperature)
    _check_support(student_hidden, support_ids, teacher_logprobs, target_ids)
    is_sound = sound_rows(support_ids, teacher_logprobs, vocab_size)  # [S]
    if is_sound.device.type == "cpu" and not is_sound.all():
        raise ValueError(_unsoundness(int((~is_sound).nonzero()[0]), support_ids, teacher_logprobs, vocab_size))
    plan = _plan(vocab_size, student_temperature, chunk_size, backend, tp_group, beta)
    log_q = _teacher_buckets(support_ids, teacher_logprobs, vocab_size, tail_floor)  # [k + 1, S]
    log_q = log_q.masked_fill(~is_sound, torch.nan)
    models = (plan, kind, student_hidden, student_head, support_ids, log_q, target_ids)
    total, loss, statistics = _run(models, loss_weight, head_grad)  # [] or None, [S], [6, S]
    reverse, forward, entropy, student_tail, teacher_tail, logprob = statistics
    return TopKDivergence(
        loss=loss,
        total=total,
        reverse_kl=reverse,
        forward_kl=forward,
        student_entropy=entropy,
        student_tail=student_tail,
        teacher_tail=teacher_tail,
        student_logprob=None if target_ids is None else logprob,
    )


@torch.no_grad()
def student_topk(
    student_hidden: torch.Tensor,
    student_head: torch.Tensor,
    *,
    k: int,
    vocab_size: int,
    tp_group: dist.ProcessGroup | None = None,
    chunk_size: int | None = None,
) -> torch.Tensor:
    """The k likeliest tokens of each row under the student, likeliest first: ids [S, k], the same on each rank.

    student_hidden [S, H] and student_head [V/tp, H] as in `linear_topk_divergence`. One all-gather.
    """
    _check_student(student_hidden, student_head, vocab_size, tp_group, chunk_size, 1.0)
    if not 0 < k <= vocab_size:
        raise ValueError(f"k must lie in [1, vocab_size] = [1, {vocab_size}], got {k}")
    loop = ChunkLoop.of(_plan(vocab_size, 1.0, chunk_size, "torch", tp_group), student_hidden, student_head, None, None, None)
    num_rows, shard = student_hidden.shape[0], loop.shard
    best = torch.full((2, k, num_rows), -torch.inf, dtype=torch.float64, device=student_hidden.device)  # values, ids
    num_here = min(k, shard.columns)
    for rows in loop.chunks(num_rows if num_here else 0):
        values, columns = loop.student.logits(rows).topk(num_here)  # [C, num_here] each
        best[0, :num_here, rows] = values.T.double()
        best[1, :num_here, rows] = (columns + shard.first).T.double()  # float64 holds every id
    values, ids = Gather(best.flatten(0, 1), loop.group).wait().unflatten(1, (2, k)).transpose(0, 1)  # [tp, k, S] each
    order = values.flatten(0, 1).topk(k, 0).indices  # [k, S]
    return ids.flatten(0, 1).gather(0, order).long().T.contiguous()


def sound_rows(support_ids: torch.Tensor, teacher_logprobs: torch.Tensor, vocab_size: int) -> torch.Tensor:
    """Which rows are a teacher's word: [S, k] ids and log-probabilities -> [S] bool, without waiting for the device.

    A row is refused for an id that is neither -1 nor in [0, vocab_size), for an id twice, and for a mass of the listed
    tokens above 1 by more than MASS_TOLERANCE, or below 1 by more than that where the whole vocabulary is listed.
    NaN is refused too.
    """
    in_order = support_ids.sort(-1).values  # [S, k]
    is_twice = ((in_order[:, 1:] == in_order[:, :-1]) & (in_order[:, 1:] >= 0)).any(-1)  # [S]
    is_outside = ((support_ids < -1) | (support_ids >= vocab_size)).any(-1)  # [S]
    mass = _listed(support_ids, teacher_logprobs).exp().sum(0)  # [S]
    is_complete = (support_ids >= 0).sum(-1) == vocab_size  # [S]
    has_room = (mass <= 1 + MASS_TOLERANCE) & ~(is_complete & (mass < 1 - MASS_TOLERANCE))  # [S] False for NaN
    return has_room & ~is_twice & ~is_outside


class _TopKRows(torch.autograd.Function):
    """Loss by row. The chunk loops around the buckets; the last bucket is that of all tokens which are not listed."""

    @staticmethod
    def forward(
        ctx: Any,
        plan: Plan,
        kind: str,
        student_hidden: torch.Tensor,
        student_head: torch.Tensor,
        support_ids: torch.Tensor,
        log_q: torch.Tensor,
        target_ids: torch.Tensor | None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        loop = ChunkLoop.of(plan, student_hidden, student_head, None, None, target_ids)
        (num_rows, k), device = support_ids.shape, student_hidden.device
        column = _columns_of(support_ids, loop.shard)  # [S, k]
        partial = torch.empty(4 + k, num_rows, dtype=torch.float64, device=device)  # [4 + k, S] this shard
        for rows in loop.chunks(num_rows):
            partial[:, rows] = _read_chunk(loop, rows, loop.project(rows)[0], column[rows])
        read = _Buckets.read(Gather(partial, loop.group).wait(), log_q, kind, plan.beta)
        ctx.plan = plan
        ctx.save_for_backward(student_hidden, student_head, column, read.rows_table, read.slope.to(loop.dtype))
        statistics = read.statistics.to(loop.dtype)  # [6, S]
        ctx.mark_non_differentiable(statistics)
        return read.loss.to(loop.dtype), statistics

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_loss: torch.Tensor, _grad_statistics: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        student_hidden, student_head, column, rows_table, slope = ctx.saved_tensors
        is_idle = grad_loss == 0  # [S] rows that must leave no trace, whatever they hold
        loop = _gradient_loop(ctx.plan, student_hidden.masked_fill(is_idle[:, None], 0), student_head)
        slope = _scaled(slope, grad_loss, loop)  # [k + 1, S]
        grad_hidden = student_hidden.new_zeros(student_hidden.shape, dtype=loop.dtype)  # [S, H]
        grad_head = student_head.new_zeros(student_head.shape, dtype=loop.dtype) if ctx.needs_input_grad[3] else None
        for rows in loop.chunks(student_hidden.shape[0]):
            logits, _ = loop.project(rows)
            _add_at(logits, column[rows], -torch.inf)
            _add_gradient(loop, rows, logits, column[rows], rows_table[:, rows], slope[:, rows], grad_hidden, grad_head)
            del logits  # freed before the next chunk's are made
        sum_over_shards(grad_hidden, loop.group)
        grads = (
            grad_hidden.to(student_hidden.dtype),
            None if grad_head is None else grad_head.to(student_head.dtype),
        )
        return (None, None, *grads, None, None, None)


class _TopKTotal(torch.autograd.Function):
    """sum(loss_weight * loss), its gradient made chunk by chunk together with the loss."""

    @staticmethod
    def forward(
        ctx: Any,
        plan: Plan,
        kind: str,
        student_hidden: torch.Tensor,
        student_head: torch.Tensor,
        support_ids: torch.Tensor,
        log_q: torch.Tensor,
        target_ids: torch.Tensor | None,
        loss_weight: torch.Tensor,
        head_grad: torch.Tensor | None,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        num_rows, device = student_hidden.shape[0], student_hidden.device
        weight = loss_weight.to(device, non_blocking=True)  # [S]
        is_idle = weight == 0  # [S] rows that must leave no trace, whatever they hold
        loop = _gradient_loop(plan, student_hidden.masked_fill(is_idle[:, None], 0), student_head)
        target, softmax = column_of(target_ids, loop.shard), loop.column  # [S] each
        column = _columns_of(support_ids, loop.shard)  # [S, k]
        loss = torch.empty(num_rows, dtype=loop.dtype, device=device)  # [S]
        statistics = torch.empty(6, num_rows, dtype=loop.dtype, device=device)  # [6, S]
        grad_hidden = student_hidden.new_zeros(student_hidden.shape, dtype=loop.dtype)  # [S, H]
        grad_head = head_grad
        if grad_head is None and ctx.needs_input_grad[3]:
            grad_head = student_head.new_zeros(student_head.shape, dtype=loop.dtype)  # [V/tp, H]

        def begin(rows: slice) -> tuple[slice, torch.Tensor, Gather]:
            logits, _ = loop.project(rows)  # [C, columns]
            loop.column = target
            partial = _read_chunk(loop, rows, logits, column[rows])
            loop.column = softmax
            return rows, logits, Gather(partial, loop.group)

        def finish(begun: tuple[slice, torch.Tensor, Gather]) -> None:
            rows, logits, gather = begun
            read = _Buckets.read(gather.wait(), log_q[:, rows], kind, plan.beta)
            loss[rows], statistics[:, rows] = read.loss.to(loop.dtype), read.statistics.to(loop.dtype)
            slope = _scaled(read.slope.to(loop.dtype), weight[rows], loop)  # [k + 1, C]
            _add_gradient(loop, rows, logits, column[rows], read.rows_table, slope, grad_hidden, grad_head)

        loop.each(num_rows, begin, finish)
        sum_over_shards(grad_hidden, loop.group)
        loss, statistics = loss.masked_fill(is_idle, 0), statistics.masked_fill(is_idle, 0)
        ctx.save_for_backward(grad_hidden, *([grad_head] if head_grad is None and grad_head is not None else []))
        ctx.dtypes = student_hidden.dtype, student_head.dtype
        ctx.mark_non_differentiable(loss, statistics)
        return weighted_total(loss_weight, loss), loss, statistics

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_total: torch.Tensor, *_: Any) -> tuple[torch.Tensor | None, ...]:
        grad_hidden, *grad_head = ctx.saved_tensors
        if not grad_head:  # the caller has it, or nobody wants it
            grad_hidden.mul_(grad_total)  # a second backward finds its tensor changed and fails
            return (None, None, grad_hidden.to(ctx.dtypes[0]), *(None for _ in range(6)))
        grads = (grad_hidden * grad_total).to(ctx.dtypes[0]), (grad_head[0] * grad_total).to(ctx.dtypes[1])
        return (None, None, *grads, *(None for _ in range(5)))


class _Buckets(NamedTuple):
    """What the gathered sums of rows say about their buckets, float64."""

    loss: torch.Tensor  # [S]
    slope: torch.Tensor  # [k + 1, S] derivative of the loss by the student's bucket logits
    statistics: torch.Tensor  # [6, S]
    rows_table: torch.Tensor  # [5, S] that makes p_v of the logits that are not listed

    @classmethod
    def read(cls, parts: torch.Tensor, log_q: torch.Tensor, kind: str, beta: float) -> _Buckets:
        """parts [tp, 4 + k, S] of `_read_chunk`, log_q [k + 1, S]."""
        rest, listed, target = Softmax.merge(parts[:, :4]), parts[:, 4:].amax(0), parts[:, 3].amax(0)
        logits = torch.cat([listed, (rest.max + rest.log_total)[None]])  # [k + 1, S]
        maximum, largest = logits.max(0)  # [S] each
        others = (logits - maximum).exp().scatter(0, largest[None], 0).sum(0)  # [S]
        log_total = others.log1p()  # [S] so that the log-probability of a bucket near 1 keeps its digits
        log_p = logits - maximum - log_total  # [k + 1, S]
        loss, slope = _LOSSES[kind](log_p, log_q, beta)  # [S], [k + 1, S]
        p_rest = log_p[-1].exp()  # [S]
        statistics = [
            _kl(log_p, log_q),
            _kl(log_q, log_p),
            unless_zero(log_p.exp(), -log_p).sum(0) + unless_zero(p_rest, rest.entropy.clone()),
            p_rest,
            log_q[-1].exp(),
            target - maximum - log_total,
        ]
        rows_table = torch.zeros(5, parts.shape[-1], dtype=torch.float64, device=parts.device)  # [5, S]
        is_empty = rest.total == 0  # [S] nothing is left to share
        rows_table[0], rows_table[1] = (x.masked_fill(is_empty, 0) for x in (rest.max, rest.log_total))
        return cls(loss, slope, torch.stack(statistics), rows_table)


def _gradient_loop(plan: Plan, student_hidden: torch.Tensor, student_head: torch.Tensor) -> ChunkLoop:
    """The loop whose `grad_logits` is a row's scale times the softmax: nll without targets."""
    loop = ChunkLoop.of(plan, student_hidden, student_head, None, None, None)
    loop.column = torch.full((student_hidden.shape[0],), -1, dtype=torch.int64, device=student_hidden.device)
    return loop


def _scaled(slope: torch.Tensor, row_weight: torch.Tensor, loop: ChunkLoop) -> torch.Tensor:
    """Slopes [k + 1, C] by the logits before the temperature, times row_weight [C]; zero in rows that have none."""
    return (slope * (row_weight.to(loop.dtype) / loop.plan.student_temperature)).masked_fill(row_weight == 0, 0)


def _add_gradient(
    loop: ChunkLoop,
    rows: slice,
    logits: torch.Tensor,
    column: torch.Tensor,
    rows_table: torch.Tensor,
    slope: torch.Tensor,
    grad_hidden: torch.Tensor,
    grad_head: torch.Tensor | None,
) -> None:
    """Turn logits [C, columns], -inf where listed, into their gradient and that into both products."""
    grad_logits = loop.grad_logits(rows, logits, None, rows_table, slope[-1])
    _add_at(grad_logits, column, slope[:-1].T)
    loop.multiply(rows, grad_logits, grad_hidden, grad_head)


def _run(
    models: tuple[Any, ...], loss_weight: torch.Tensor | None, head_grad: torch.Tensor | None
) -> tuple[torch.Tensor | None, torch.Tensor, torch.Tensor]:
    """total [] or None, loss [S], statistics [6, S]."""
    hidden, head = models[2:4]
    if loss_weight is None:
        if head_grad is not None:
            raise ValueError("head_grad belongs to loss_weight [S], which was not given")
        return None, *_TopKRows.apply(*models)
    check_weights(hidden, head, loss_weight, head_grad)
    if torch.is_grad_enabled() and (hidden.requires_grad or head.requires_grad):
        return _TopKTotal.apply(*models, loss_weight, head_grad)
    loss, statistics = _TopKRows.apply(*models)
    return weighted_total(loss_weight, loss), loss, statistics


def _read_chunk(loop: ChunkLoop, rows: slice, logits: torch.Tensor, column: torch.Tensor) -> torch.Tensor:
    """One chunk's share of a shard, column [C, k] -> [4 + k, C] float64: maximum, total and centred sum of the columns
    that are not listed, the target's logit, and the listed logits, -inf for what other shards hold. Leaves -inf in the
    listed columns of logits [C, columns]."""
    target = None if loop.column is None else loop.column[rows, None]  # [C, 1]
    listed = _logits_at(logits, column, loop)  # [k, C]
    chosen = listed.new_full(listed.shape[1:], -torch.inf) if target is None else _logits_at(logits, target, loop)[0]
    _add_at(logits, column, -torch.inf)
    sums = loop.backend.partial_sums(logits, None, None, student_scale=1 / loop.plan.student_temperature, teacher_scale=1.0)
    return torch.cat([sums[:3], chosen[None], listed])


def _logits_at(logits: torch.Tensor, column: torch.Tensor, loop: ChunkLoop) -> torch.Tensor:
    """Logits [C, columns] over the temperature at column [C, n] -> [n, C] float64; -inf where that is -1."""
    if not logits.shape[1]:
        return column.T.double().fill_(-torch.inf)
    chosen = logits.gather(-1, column.clamp(min=0)).double() / loop.plan.student_temperature  # [C, n]
    return chosen.masked_fill(column < 0, -torch.inf).T


def _add_at(logits: torch.Tensor, column: torch.Tensor, value: torch.Tensor | float) -> None:
    """logits[c, column[c, i]] += value[c, i] except where column is -1; in place, and the host waits for nothing."""
    if logits.shape[1]:
        value = torch.as_tensor(value, dtype=logits.dtype, device=logits.device)
        logits.scatter_add_(-1, column.clamp(min=0), torch.where(column < 0, 0, value).to(logits.dtype))


def _columns_of(ids: torch.Tensor, shard: VocabShard) -> torch.Tensor:
    """Where in this shard each id is, -1 for those that are not in it; same shape."""
    column = ids - shard.first
    return torch.where((ids >= 0) & (column >= 0) & (column < shard.columns), column, -1)


def _listed(support_ids: torch.Tensor, teacher_logprobs: torch.Tensor) -> torch.Tensor:
    """[S, k] each -> [k, S] float64 log-probabilities, -inf in unused places."""
    return teacher_logprobs.detach().double().masked_fill(support_ids < 0, -torch.inf).T


def _teacher_buckets(
    support_ids: torch.Tensor, teacher_logprobs: torch.Tensor, vocab_size: int, tail_floor: float
) -> torch.Tensor:
    """[S, k] each -> log-probabilities [k + 1, S] float64 that sum up to 1; `reference.teacher_buckets`."""
    listed = _listed(support_ids, teacher_logprobs)  # [k, S]
    log_mass = listed.logsumexp(0)  # [S]
    rest = _log1mexp(log_mass)  # [S]
    floor = math.log(tail_floor) if tail_floor else -math.inf
    is_complete = (support_ids >= 0).sum(-1) == vocab_size  # [S]
    log_rest = rest.clamp(min=floor).masked_fill(is_complete, -torch.inf)  # [S]
    is_kept = (log_rest == rest) & (log_mass < 0)  # [S] what was sent is a distribution already
    listed = torch.where(is_kept, listed, listed - log_mass + _log1mexp(log_rest))
    return torch.cat([listed, log_rest[None]])


def _log1mexp(x: torch.Tensor) -> torch.Tensor:
    """log(1 - e^x), and -inf from 0 on; neither end loses digits."""
    return torch.where(x > -math.log(2), x.clamp(max=0).expm1().neg().log(), x.exp().neg().log1p())


def _reverse_kl(log_p: torch.Tensor, log_q: torch.Tensor, beta: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probabilities [k + 1, S] of both -> loss [S] and its derivative g [k + 1, S] by the student's bucket logits."""
    loss = _kl(log_p, log_q)
    return loss, unless_zero(log_p.exp(), log_p - log_q - loss)


def _forward_kl(log_p: torch.Tensor, log_q: torch.Tensor, beta: float) -> tuple[torch.Tensor, torch.Tensor]:
    return _kl(log_q, log_p), log_p.exp() - log_q.exp()


def _jsd(log_p: torch.Tensor, log_q: torch.Tensor, beta: float) -> tuple[torch.Tensor, torch.Tensor]:
    log_m = torch.logaddexp(log_q + math.log(beta), log_p + math.log1p(-beta))  # [k + 1, S]
    from_student = _kl(log_p, log_m)  # [S]
    loss = beta * _kl(log_q, log_m) + (1 - beta) * from_student
    return loss, unless_zero(log_p.exp(), (1 - beta) * (log_p - log_m - from_student))


_LOSSES = {"reverse_kl": _reverse_kl, "forward_kl": _forward_kl, "jsd": _jsd}


def _kl(log_p: torch.Tensor, log_q: torch.Tensor) -> torch.Tensor:
    """KL(p || q) of distributions [k + 1, S] -> [S], as a sum of terms p (q/p - 1 - log(q/p)), none of them negative."""
    p, gap = log_p.exp(), log_p - log_q
    near = p * (torch.expm1(-gap) + gap).clamp(min=0)
    far = log_q.exp() - p + unless_zero(p, gap.clone())
    return torch.where(gap.abs() < 1, near, far).sum(0)


def _plan(
    vocab_size: int,
    temperature: float,
    chunk_size: int | None,
    backend: str,
    tp_group: dist.ProcessGroup | None,
    beta: float = 0.5,
) -> Plan:
    """The loop sees one model and, with `nll`, a kernel that makes p_v of its logits."""
    return Plan(
        kind="nll",
        vocab_size=vocab_size,
        beta=beta,
        student_temperature=temperature,
        teacher_temperature=1.0,
        chunk_size=chunk_size or 0,
        is_packed=False,
        backend=backend,
        group=tp_group.group_name if group_size(tp_group) > 1 else "",
    )


def _check_student(
    hidden: torch.Tensor,
    head: torch.Tensor,
    vocab_size: int,
    tp_group: dist.ProcessGroup | None,
    chunk_size: int | None,
    temperature: float,
) -> None:
    if hidden.dim() != 2 or head.dim() != 2 or hidden.shape[1] != head.shape[1]:
        raise ValueError(
            f"student hidden states must be [S, H] and the head shard [V/tp, H] with one H, "
            f"got {list(hidden.shape)} and {list(head.shape)}"
        )
    num_tokens = head.shape[0] * group_size(tp_group)
    if not 0 < vocab_size <= num_tokens:
        raise ValueError(
            f"vocab_size {vocab_size} is outside [1, {num_tokens}], the rows of the head over all "
            f"{group_size(tp_group)} shards (this is rank {group_rank(tp_group)}); it counts real tokens, no padding"
        )
    if chunk_size is not None and chunk_size < 1:
        raise ValueError(f"chunk_size must be at least 1 row, got {chunk_size}; None chooses it by memory")
    if not temperature > 0:
        raise ValueError(f"student_temperature must be positive, got {temperature}; greedy decoding has no distribution")


def _check_support(
    hidden: torch.Tensor, support_ids: torch.Tensor, teacher_logprobs: torch.Tensor, target_ids: torch.Tensor | None
) -> None:
    num_rows = hidden.shape[0]
    if support_ids.dim() != 2 or support_ids.shape[0] != num_rows or not support_ids.shape[1]:
        raise ValueError(f"support_ids must be [S, k] = [{num_rows}, k] with k at least 1, got {list(support_ids.shape)}")
    if teacher_logprobs.shape != support_ids.shape:
        raise ValueError(
            f"teacher_logprobs must be [S, k] = {list(support_ids.shape)} like support_ids, "
            f"got {list(teacher_logprobs.shape)}"
        )
    if support_ids.dtype is not torch.int64 or not teacher_logprobs.is_floating_point():
        raise ValueError(
            f"support_ids must be int64 and teacher_logprobs floats, got {support_ids.dtype} and {teacher_logprobs.dtype}"
        )
    if target_ids is not None and (target_ids.shape != (num_rows,) or target_ids.dtype is not torch.int64):
        raise ValueError(f"target_ids must be [S] = [{num_rows}] int64, got {list(target_ids.shape)} {target_ids.dtype}")
    for name, tensor in {"support_ids": support_ids, "teacher_logprobs": teacher_logprobs}.items():
        if tensor.device != hidden.device:
            raise ValueError(f"{name} is on {tensor.device}, student_hidden on {hidden.device}; move it there first")


def _unsoundness(row: int, support_ids: torch.Tensor, teacher_logprobs: torch.Tensor, vocab_size: int) -> str:
    """What `sound_rows` found in a row."""
    ids = [i for i in support_ids[row].tolist() if i != -1]
    outside = [i for i in ids if not 0 <= i < vocab_size]
    if outside:
        return (
            f"support_ids row {row} has id {outside[0]}, outside the vocabulary [0, {vocab_size}); put -1 at tokens that "
            f"the student does not have"
        )
    if len(set(ids)) < len(ids):
        twice = next(i for i in ids if ids.count(i) > 1)
        return f"support_ids row {row} lists token {twice} twice; its probability would count twice"
    mass = _listed(support_ids, teacher_logprobs)[:, row].exp().sum().item()
    return (
        f"teacher_logprobs row {row} sums up to probability {mass:.6g} over {len(ids)} of {vocab_size} tokens; expected "
        f"natural logarithms of one distribution at temperature 1"
    )
