"""Per-token divergence of two language models from hidden states, vocabulary-parallel, without the [S, V] logits.

How to call it, on every rank of the tensor-parallel group and with the same rows on each:

    out = linear_divergence(student_hidden, student_head, teacher_hidden, teacher_head, kind="reverse_kl",
                            vocab_size=151_669, target_ids=target_ids, loss_weight=loss_weight, tp_group=tp_group)
    out.total.backward()                                          # total = sum(loss_weight * out.loss)

The chunk loop. Hidden rows meet the head a bounded number at a time, so one chunk's pair of logits is all that lives.
A chunk is read once and leaves a dozen partial sums a row; one all-gather brings the sums of all vocabulary shards
together, and every rank adds them in rank order: same bits everywhere. A second read turns the logits into their
gradient in place. That needs no communication, because the sums it uses are already global and the loss is the same on
each rank; only the gradient of `student_hidden`, to which each shard contributes, is all-reduced, and nothing is
multiplied by the group's size. With `loss_weight` known both reads happen while the chunk is there. Without it `loss`
itself is differentiable, and the backward pass makes the logits again.

The sums. With a = s - max(s) and b = t - max(t), the logits of student and teacher over their temperatures, shifted,

    Z_s = sum e^a     Z_t = sum e^b     G_s = sum e^a (a - b)     G_t = sum e^b (a - b)     C_s = sum e^a a
    KL(p_S || p_T) =  G_s / Z_s - log Z_s + log Z_t          H(p_S) = log Z_s - C_s / Z_s
    KL(p_T || p_S) = -G_t / Z_t - log Z_t + log Z_s          log p_S(y) = s_y - max(s) - log Z_s

Shifting keeps the terms as small as the answer, where plain log-sum-exps of +-1e4 would leave fp32 no digits. A shard
with its own maximum m joins at the global maximum M by Z += e^(m-M) Z', C += e^(m-M) (C' + (m-M) Z'), and G likewise.
Where the models nearly agree, two further sums of non-negative terms replace the differences of logarithms, so that
rounding leaves no negative KL (`ops/shard_sums.py`).
The mixture of JSD is not linear in these, so that kind reads the logits once more and gathers two more sums:

    delta = log p_T - log p_S          log(m / p_S) = max(delta, 0) + log1p(c * expm1(-|delta|))
    c = 1 - beta where delta > 0 else beta                log(m / p_T) = max(-delta, 0) + the same

The gradient with respect to s, later times the upstream gradient and 1 / student_temperature:

    reverse_kl   p_S (log p_S - log p_T - KL)                          forward_kl   p_S - p_T
    jsd          (1 - beta) p_S (log(p_S / m) - KL(p_S || m))          nll          p_S - onehot(y)

fp32 inputs are computed in fp32, float64 in float64, half-precision inputs give fp32 logits straight out of the product:
bf16 logits would make this gradient wrong by tens of percent near convergence. Sums of shards are merged in float64.
Definitions and conventions are in `ops/reference.py`, which this file must match.

Not here: normalisation over tokens (the caller's `loss_weight`), sequence-parallel gathering of hidden states, a second
derivative, the loops (`ops/chunk_loop.py`), the operators (`ops/library.py`) and the arithmetic (`ops/backends.py`).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.distributed as dist

from megatron_tcod.ops import library
from megatron_tcod.ops.backends import BACKENDS
from megatron_tcod.ops.chunk_loop import Plan
from megatron_tcod.ops.vocab_shard import align_head, group_size

__all__ = [
    "KINDS",
    "TokenDivergence",
    "TokenLogprob",
    "align_head",
    "linear_divergence",
    "linear_logprob",
    "logits_divergence",
]

KINDS = ("reverse_kl", "forward_kl", "jsd", "nll")
"""What `TokenDivergence.loss` can be. `nll` is -log p_S(target), with the statistics of both models beside it."""

@dataclass(frozen=True, kw_only=True)
class TokenDivergence:
    """One value a row, nats. Statistics are detached and of the same read, over the real vocabulary.

    Example: `linear_divergence(..., loss_weight=weight).total.backward()` reaches `student_hidden` and the head.
    """

    loss: torch.Tensor  # [S] differentiable unless `total` is
    total: torch.Tensor | None  # [] sum(loss_weight * loss), differentiable; None without loss_weight
    reverse_kl: torch.Tensor  # [S] KL(student || teacher)
    forward_kl: torch.Tensor  # [S] KL(teacher || student)
    student_entropy: torch.Tensor  # [S]
    teacher_entropy: torch.Tensor  # [S]
    top1_agreement: torch.Tensor  # [S] 1 where both put most mass on one token, else 0
    student_logprob: torch.Tensor | None  # [S] at target_ids; None without target_ids
    teacher_logprob: torch.Tensor | None  # [S] at target_ids; None without target_ids


@dataclass(frozen=True, kw_only=True)
class TokenLogprob:
    """One value a row, nats. Example: `linear_logprob(..., loss_weight=weight).total` is a weighted NLL."""

    logprob: torch.Tensor  # [S] differentiable unless `total` is
    total: torch.Tensor | None  # [] sum(loss_weight * -logprob), differentiable; None without loss_weight
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
    loss_weight: torch.Tensor | None = None,
    head_grad: torch.Tensor | None = None,
    grad_scale: torch.Tensor | None = None,
    tp_group: dist.ProcessGroup | None = None,
    chunk_size: int | None = None,
    is_packed: bool = False,
    backend: str = "auto",
) -> TokenDivergence:
    """Divergence between student and teacher at each row, with statistics from the same read of the logits.

    student_hidden [S, H_s], the same on each rank of `tp_group`; student_head [V/tp, H_s], this rank's shard of the
    padded vocabulary. teacher_hidden [S, H_t] and teacher_head [V/tp, H_t] likewise, without gradient. `vocab_size`
    counts real tokens: columns from there on have no probability and get a gradient of exactly zero, also where that
    is a rank's whole shard. target_ids [S] int64 are global ids; one outside the vocabulary has log-probability -inf.
    `beta` belongs to `jsd`. `chunk_size` is in rows; None takes what `chunk_loop.CHUNK_BYTES` allows.

    With `loss_weight` [S] the gradient is made together with the loss: call backward on `total`. Weights may lie on the
    CPU whatever the device, and then rows of weight zero are not computed, and all their results are zero. `head_grad`
    [V/tp, H_s] fp32 or wider (Megatron's `main_grad`) then takes the head's gradient, added up during the *forward*
    pass times `grad_scale` [], a number on the device that the upstream gradient of `total` will be; the head gets no
    other gradient, and backward may run once. `is_packed` keeps a chunk between its reads as fp16 student logits and
    gaps, half the memory and traffic, with statistics still from fp32. Without gradients enabled only values are made.

    The gradient of student_hidden is already summed over `tp_group`; that of student_head is this shard's, added up
    in fp32. A row whose weight or upstream gradient is zero contributes exactly zero, even where its values are not
    finite. `backend` is `auto` or one of `backends.BACKENDS`.

    Collectives: one all-gather a chunk with `loss_weight`, else one in all (twice that for `jsd`), and one all-reduce
    with the gradient; S may be 0 if it is so on all ranks.
    Raises ValueError for shapes that do not fit, unequal shards (see `align_head`), and settings out of range.
    """
    _check_kind(kind, beta, target_ids)
    _check_rows("student", student_hidden, student_head, target_ids, chunk_size)
    _check_rows("teacher", teacher_hidden, teacher_head, target_ids, chunk_size)
    if teacher_hidden.device != student_hidden.device:
        raise ValueError(
            f"teacher_hidden is on {teacher_hidden.device}, student_hidden on {student_hidden.device}; move one of them"
        )
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
    rows = student_head.shape[0] if tp_size > 1 else min(student_head.shape[0], teacher_head.shape[0])
    plan = _plan(
        rows,
        tp_group,
        backend,
        kind=kind,
        vocab_size=vocab_size,
        beta=beta,
        student_temperature=student_temperature,
        teacher_temperature=teacher_temperature,
        chunk_size=chunk_size or 0,
        is_packed=is_packed,
    )
    models = (student_hidden, student_head, teacher_hidden.detach(), teacher_head.detach(), target_ids)
    total, loss, statistics = _run(plan, models, loss_weight, head_grad, grad_scale)  # [], [S], [7, S]
    return _token_divergence(loss, total, statistics, target_ids)


def _token_divergence(
    loss: torch.Tensor, total: torch.Tensor | None, statistics: torch.Tensor, target_ids: torch.Tensor | None
) -> TokenDivergence:
    student_entropy, student_logprob, teacher_entropy, teacher_logprob, reverse, forward, agreement = statistics
    return TokenDivergence(
        loss=loss,
        total=total,
        reverse_kl=reverse,
        forward_kl=forward,
        student_entropy=student_entropy,
        teacher_entropy=teacher_entropy,
        top1_agreement=agreement,
        student_logprob=None if target_ids is None else student_logprob,
        teacher_logprob=None if target_ids is None else teacher_logprob,
    )


def logits_divergence(
    student_logits: torch.Tensor,
    teacher_logits: torch.Tensor,
    *,
    kind: str,
    vocab_size: int,
    beta: float = 0.5,
    student_temperature: float = 1.0,
    teacher_temperature: float = 1.0,
    target_ids: torch.Tensor | None = None,
    tp_group: dist.ProcessGroup | None = None,
    in_place: bool = False,
    backend: str = "auto",
) -> TokenDivergence:
    """As `linear_divergence` for logits [S, V/tp] that exist already; `loss` [S] is differentiable in the student's.

    Two reads of both logits (three for `jsd`) and, with `in_place`, no memory: the gradient then overwrites
    `student_logits`, in their own type, when the backward pass runs. It can run once, and nothing else may need the
    logits after that; autograd raises where something does. Logits of half precision make the gradient itself wrong by
    tens of percent near convergence: prefer `linear_divergence`.

    Collectives: one all-gather (two for `jsd`), none backward. Raises ValueError for shapes and types that do not fit.
    """
    _check_kind(kind, beta, target_ids)
    if student_logits.shape != teacher_logits.shape or student_logits.dim() != 2:
        raise ValueError(
            f"student_logits and teacher_logits must be one shape [S, V/tp], got {list(student_logits.shape)} and "
            f"{list(teacher_logits.shape)}; pad both vocabularies to one size"
        )
    if student_logits.dtype != teacher_logits.dtype or not student_logits.is_floating_point():
        raise ValueError(
            f"student_logits are {student_logits.dtype}, teacher_logits {teacher_logits.dtype}; both must have one float type"
        )
    if student_logits.device != teacher_logits.device:
        raise ValueError(
            f"student_logits are on {student_logits.device}, teacher_logits on {teacher_logits.device}; move one of them"
        )
    _check_targets(target_ids, student_logits)
    plan = _plan(
        student_logits.shape[1],
        tp_group,
        backend,
        kind=kind,
        vocab_size=vocab_size,
        beta=beta,
        student_temperature=student_temperature,
        teacher_temperature=teacher_temperature,
        chunk_size=0,
        is_packed=False,
    )
    loss, statistics, _ = torch.ops.megatron_tcod.logits_divergence(
        student_logits, teacher_logits.detach(), target_ids, in_place, *plan
    )
    return _token_divergence(loss, None, statistics, target_ids)


def linear_logprob(
    hidden: torch.Tensor,
    head: torch.Tensor,
    target_ids: torch.Tensor,
    *,
    vocab_size: int,
    temperature: float = 1.0,
    loss_weight: torch.Tensor | None = None,
    head_grad: torch.Tensor | None = None,
    grad_scale: torch.Tensor | None = None,
    tp_group: dist.ProcessGroup | None = None,
    chunk_size: int | None = None,
    backend: str = "auto",
) -> TokenLogprob:
    """Log-probability of target_ids [S] under one model, and its entropy, both [S] in nats.

    hidden [S, H], head [V/tp, H]: padding, weights, gradients, collectives and errors as in `linear_divergence`.
    """
    _check_rows("student", hidden, head, target_ids, chunk_size)
    plan = _plan(
        head.shape[0],
        tp_group,
        backend,
        kind="nll",
        vocab_size=vocab_size,
        beta=0.5,
        student_temperature=temperature,
        teacher_temperature=1.0,
        chunk_size=chunk_size or 0,
        is_packed=False,
    )
    total, loss, statistics = _run(plan, (hidden, head, None, None, target_ids), loss_weight, head_grad, grad_scale)
    return TokenLogprob(logprob=-loss, total=total, entropy=statistics[0])


def _run(
    plan: Plan,
    models: tuple[torch.Tensor | None, ...],
    loss_weight: torch.Tensor | None,
    head_grad: torch.Tensor | None,
    grad_scale: torch.Tensor | None,
) -> tuple[torch.Tensor | None, torch.Tensor, torch.Tensor]:
    """total [] or None, loss [S], statistics."""
    hidden, head = models[:2]
    if loss_weight is None:
        if head_grad is not None or grad_scale is not None:
            raise ValueError("head_grad and grad_scale belong to loss_weight [S], which was not given")
        loss, statistics, _ = torch.ops.megatron_tcod.linear_divergence_rows(*models, *plan)
        return None, loss, statistics
    check_weights(hidden, head, loss_weight, head_grad)
    if not (torch.is_grad_enabled() and (hidden.requires_grad or head.requires_grad)):
        loss, statistics, _ = torch.ops.megatron_tcod.linear_divergence_rows(*models, *plan)
        return library.weighted_total(loss_weight, loss), loss, statistics
    if head_grad is None:
        if grad_scale is not None:
            raise ValueError("grad_scale scales what is added to head_grad, which was not given")
        total, loss, statistics, *_ = torch.ops.megatron_tcod.linear_divergence_total(
            *models, loss_weight, head.requires_grad, *plan
        )
        return total, loss, statistics
    if grad_scale is not None and not (isinstance(grad_scale, torch.Tensor) and grad_scale.numel() == 1):
        raise ValueError(f"grad_scale must be a tensor of one number on the device, got {grad_scale!r}")
    return library.accumulated_total(*models, loss_weight, grad_scale, head_grad, *plan)


def check_weights(
    hidden: torch.Tensor, head: torch.Tensor, loss_weight: torch.Tensor, head_grad: torch.Tensor | None
) -> None:
    """ValueError unless loss_weight is [S] and head_grad, if there is one, fits the head shard."""
    if loss_weight.shape != hidden.shape[:1] or not loss_weight.is_floating_point():
        raise ValueError(
            f"loss_weight must be [S] = [{hidden.shape[0]}] of a float type, "
            f"got {list(loss_weight.shape)} {loss_weight.dtype}"
        )
    if head_grad is not None and (head_grad.shape != head.shape or head_grad.dtype not in (torch.float32, torch.float64)):
        raise ValueError(
            f"head_grad must be fp32 {list(head.shape)} like the head shard, got {head_grad.dtype} {list(head_grad.shape)}"
        )


def _plan(
    head_rows: int, tp_group: dist.ProcessGroup | None, backend: str, *, vocab_size: int, **settings: float | str | bool
) -> Plan:
    size = group_size(tp_group)
    if not isinstance(vocab_size, int):
        raise ValueError(f"vocab_size must be an int, the number of real tokens, got {vocab_size!r}")
    if not 0 < vocab_size <= head_rows * size:
        raise ValueError(
            f"vocab_size {vocab_size} is outside [1, {head_rows * size}], the rows of the head over all {size} shards; "
            f"it counts the tokenizer's real tokens, without padding"
        )
    if backend != "auto" and backend not in BACKENDS:
        raise ValueError(f"divergence_backend {backend!r} is unknown; it must be auto or one of {', '.join(BACKENDS)}")
    for name in ("student_temperature", "teacher_temperature"):
        if not 0 < settings[name] < math.inf:
            raise ValueError(
                f"{name} must be positive and finite, got {settings[name]}; greedy decoding has no distribution to match"
            )
    group = tp_group.group_name if size > 1 else ""
    return Plan(vocab_size=vocab_size, backend=backend, group=group, **settings)


def _check_kind(kind: str, beta: float, target_ids: torch.Tensor | None) -> None:
    if kind not in KINDS:
        raise ValueError(f"kind {kind!r} is unknown; it must be one of {', '.join(KINDS)}")
    if kind == "jsd" and not 0 < beta < 1:
        raise ValueError(f"beta must lie strictly between 0 and 1, got {beta}; use forward_kl or reverse_kl instead")
    if kind == "nll" and target_ids is None:
        raise ValueError("kind 'nll' is a log-probability at target_ids [S]; got none")


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
    for name, tensor in ((f"{side}_hidden", hidden), (f"{side}_head", head)):
        if not tensor.is_floating_point() or tensor.device != hidden.device:
            raise ValueError(
                f"{name} must be of a float type on {hidden.device}, got {tensor.dtype} on {tensor.device}; move or cast it"
            )
    _check_targets(target_ids, hidden)


def _check_targets(target_ids: torch.Tensor | None, rows: torch.Tensor) -> None:
    if target_ids is None:
        return
    if target_ids.shape != rows.shape[:1] or target_ids.dtype != torch.int64 or target_ids.device != rows.device:
        raise ValueError(
            f"target_ids must be [S] = [{rows.shape[0]}] int64 on {rows.device}, got {list(target_ids.shape)} "
            f"{target_ids.dtype} on {target_ids.device}"
        )
