"""The divergence as operators of torch.library, namespace `megatron_tcod`: what autograd and torch.compile see.

    torch.ops.megatron_tcod.linear_divergence_rows(student_hidden, student_head, ..., *plan)   # loss [S] differentiable
    torch.ops.megatron_tcod.linear_divergence_total(student_hidden, student_head, ..., *plan)  # one differentiable sum

Each has a fake implementation (shapes without data) and an autograd formula, and passes `torch.library.opcheck`. `_rows`
makes the logits once more in its backward pass; `_total` makes the gradient while it makes the loss, and its backward
pass multiplies it by a scalar. The forms with a trailing underscore add the head's gradient into a tensor of the caller
and are therefore no operators that autograd knows: `accumulated_total` wraps one in an autograd.Function.

Callers use `ops/divergence.py`, which checks arguments. Not here: arithmetic, loops (`ops/chunk_loop.py`).
"""

from __future__ import annotations

from typing import Any

import torch
from torch.autograd.function import once_differentiable

from megatron_tcod.ops.chunk_loop import Plan, logits_gradient, read_logits, read_rows, rows_gradient, weighted_rows

_MODELS = "Tensor student_hidden, Tensor student_head, Tensor? teacher_hidden, Tensor? teacher_head, Tensor? target_ids"
_PLAN = (
    "str kind, int vocab_size, float beta, float student_temperature, float teacher_temperature, int chunk_size, "
    "bool is_packed, str backend, str group"
)
_NUM_MODEL_ARGS = 5


def _result_dtype(student_hidden: torch.Tensor, student_head: torch.Tensor) -> torch.dtype:
    return torch.float64 if torch.float64 in (student_hidden.dtype, student_head.dtype) else torch.float32


def _fake_rows(student_hidden: torch.Tensor, student_head: torch.Tensor, teacher_hidden: Any) -> tuple[torch.Tensor, ...]:
    num_rows, dtype = student_hidden.shape[0], _result_dtype(student_hidden, student_head)
    loss = student_hidden.new_empty(num_rows, dtype=dtype)  # [S]
    return loss, loss.new_empty(2 if teacher_hidden is None else 7, num_rows)  # [7, S]


def _zero_head(student_hidden: torch.Tensor, student_head: torch.Tensor, needs_head: bool) -> torch.Tensor:
    """Where the head's gradient is added up, [V/tp, H_s] fp32 or wider; empty when nobody wants it."""
    shape = student_head.shape if needs_head else (0,)
    return student_head.new_zeros(shape, dtype=_result_dtype(student_hidden, student_head))


@torch.library.custom_op(
    "megatron_tcod::linear_divergence_rows",
    mutates_args=(),
    schema=f"({_MODELS}, {_PLAN}) -> (Tensor, Tensor, Tensor)",
)
def linear_divergence_rows(*args):
    """Loss [S], statistics [7, S] and the table [5, S] that the backward pass reads."""
    return read_rows(Plan(*args[_NUM_MODEL_ARGS:]), *args[:_NUM_MODEL_ARGS])


@linear_divergence_rows.register_fake
def _(student_hidden, student_head, teacher_hidden, teacher_head, target_ids, *plan):
    loss, statistics = _fake_rows(student_hidden, student_head, teacher_hidden)
    return loss, statistics, loss.new_empty(5, len(loss), dtype=torch.float64)


@torch.library.custom_op(
    "megatron_tcod::linear_divergence_rows_backward",
    mutates_args=(),
    schema=f"({_MODELS}, Tensor rows_table, Tensor grad_loss, bool needs_head, {_PLAN}) -> (Tensor, Tensor)",
)
def linear_divergence_rows_backward(*args):
    """Gradients of hidden states [S, H_s] and head [V/tp, H_s], fp32 or wider."""
    models, (rows_table, grad_loss, needs_head), plan = args[:5], args[5:8], Plan(*args[8:])
    grad_head = _zero_head(args[0], args[1], needs_head)
    grad_hidden = rows_gradient(plan, *models, rows_table, grad_loss, grad_head if needs_head else None)
    return grad_hidden, grad_head


@linear_divergence_rows_backward.register_fake
def _(student_hidden, student_head, teacher_hidden, teacher_head, ids, rows_table, grad_loss, needs_head, *plan):
    grad_hidden = student_hidden.new_empty(student_hidden.shape, dtype=_result_dtype(student_hidden, student_head))
    return grad_hidden, _zero_head(student_hidden, student_head, needs_head)


def _rows_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, ...]) -> None:
    ctx.save_for_backward(*inputs[:_NUM_MODEL_ARGS], output[2])
    ctx.plan = inputs[_NUM_MODEL_ARGS:]
    ctx.mark_non_differentiable(output[1], output[2])


def _rows_backward(ctx: Any, grad_loss: torch.Tensor, *_: Any) -> tuple[Any, ...]:
    *models, rows_table = ctx.saved_tensors
    needs_head = ctx.needs_input_grad[1]
    grad_hidden, grad_head = torch.ops.megatron_tcod.linear_divergence_rows_backward(
        *models, rows_table, grad_loss, needs_head, *ctx.plan
    )
    grads = (grad_hidden.to(models[0].dtype), grad_head.to(models[1].dtype) if needs_head else None)
    return (*grads, *(None for _ in range(3 + len(ctx.plan))))


linear_divergence_rows.register_autograd(_rows_backward, setup_context=_rows_context)


@torch.library.custom_op(
    "megatron_tcod::linear_divergence_total",
    mutates_args=(),
    schema=f"({_MODELS}, Tensor loss_weight, bool needs_head, {_PLAN}) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
)
def linear_divergence_total(*args):
    """sum(loss_weight * loss) [], loss [S], statistics [7, S], and the gradients of hidden states and head."""
    models, (loss_weight, needs_head), plan = args[:5], args[5:7], Plan(*args[7:])
    grad_head = _zero_head(args[0], args[1], needs_head)
    found = weighted_rows(plan, *models, loss_weight, None, grad_head if needs_head else None)
    return _with_total(loss_weight, *found, grad_head)


@linear_divergence_total.register_fake
def _(student_hidden, student_head, teacher_hidden, teacher_head, target_ids, loss_weight, needs_head, *plan):
    loss, statistics = _fake_rows(student_hidden, student_head, teacher_hidden)
    grad_hidden = student_hidden.new_empty(student_hidden.shape, dtype=loss.dtype)
    grad_head = _zero_head(student_hidden, student_head, needs_head)
    return loss.new_empty(()), loss, statistics, grad_hidden, grad_head


def _total_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, ...]) -> None:
    ctx.save_for_backward(*output[3:])
    ctx.dtypes = inputs[0].dtype, inputs[1].dtype
    ctx.num_inputs = len(inputs)
    ctx.mark_non_differentiable(*output[1:])


def _total_backward(ctx: Any, grad_total: torch.Tensor, *_: Any) -> tuple[Any, ...]:
    grad_hidden, grad_head = ctx.saved_tensors
    needs_head = ctx.needs_input_grad[1]
    grads = (
        (grad_hidden * grad_total).to(ctx.dtypes[0]),
        (grad_head * grad_total).to(ctx.dtypes[1]) if needs_head else None,
    )
    return (*grads, *(None for _ in range(ctx.num_inputs - 2)))


linear_divergence_total.register_autograd(_total_backward, setup_context=_total_context)


@torch.library.custom_op(
    "megatron_tcod::linear_divergence_total_",
    mutates_args=("head_grad",),
    schema=(
        f"({_MODELS}, Tensor loss_weight, Tensor? grad_scale, Tensor(a!) head_grad, {_PLAN}) "
        "-> (Tensor, Tensor, Tensor, Tensor)"
    ),
)
def linear_divergence_total_(*args):
    """As `linear_divergence_total`, the head's gradient times grad_scale added into head_grad [V/tp, H_s]."""
    models, (loss_weight, grad_scale, head_grad), plan = args[:5], args[5:8], Plan(*args[8:])
    return _with_total(loss_weight, *weighted_rows(plan, *models, loss_weight, grad_scale, head_grad))


@linear_divergence_total_.register_fake
def _(student_hidden, student_head, teacher_hidden, teacher_head, ids, loss_weight, grad_scale, head_grad, *plan):
    loss, statistics = _fake_rows(student_hidden, student_head, teacher_hidden)
    return loss.new_empty(()), loss, statistics, student_hidden.new_empty(student_hidden.shape, dtype=loss.dtype)


_LOGITS = "Tensor{} student_logits, Tensor teacher_logits, Tensor? target_ids"
_NUM_LOGITS_ARGS = 3


@torch.library.custom_op(
    "megatron_tcod::logits_divergence",
    mutates_args=(),
    schema=f"({_LOGITS.format('')}, bool in_place, {_PLAN}) -> (Tensor, Tensor, Tensor)",
)
def logits_divergence(student_logits, teacher_logits, target_ids, in_place, *plan):
    """Loss [S], statistics [7, S] and the table [5, S] that the backward pass reads."""
    return read_logits(Plan(*plan), student_logits, teacher_logits, target_ids)


@logits_divergence.register_fake
def _(student_logits, teacher_logits, target_ids, in_place, *plan):
    num_rows, dtype = student_logits.shape[0], torch.promote_types(student_logits.dtype, torch.float32)
    loss = student_logits.new_empty(num_rows, dtype=dtype)
    return loss, loss.new_empty(7, num_rows), loss.new_empty(5, num_rows, dtype=torch.float64)


@torch.library.custom_op(
    "megatron_tcod::logits_divergence_backward",
    mutates_args=(),
    schema=f"({_LOGITS.format('')}, Tensor rows_table, Tensor grad_loss, {_PLAN}) -> Tensor",
)
def logits_divergence_backward(student_logits, teacher_logits, target_ids, rows_table, grad_loss, *plan):
    """Gradient of the student's logits [S, V/tp]."""
    out = torch.empty_like(student_logits)
    logits_gradient(Plan(*plan), student_logits, teacher_logits, target_ids, rows_table, grad_loss, out)
    return out


@logits_divergence_backward.register_fake
def _(student_logits, *_):
    return torch.empty_like(student_logits)


@torch.library.custom_op(
    "megatron_tcod::logits_divergence_backward_",
    mutates_args=("student_logits",),
    schema=f"({_LOGITS.format('(a!)')}, Tensor rows_table, Tensor grad_loss, {_PLAN}) -> ()",
)
def logits_divergence_backward_(student_logits, teacher_logits, target_ids, rows_table, grad_loss, *plan):
    """The gradient takes the place of the student's logits."""
    logits_gradient(Plan(*plan), student_logits, teacher_logits, target_ids, rows_table, grad_loss, student_logits)


@logits_divergence_backward_.register_fake
def _(*_):
    return None


def _logits_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, ...]) -> None:
    ctx.save_for_backward(*inputs[:_NUM_LOGITS_ARGS], output[2])
    ctx.in_place, ctx.plan = inputs[_NUM_LOGITS_ARGS], inputs[_NUM_LOGITS_ARGS + 1 :]
    ctx.mark_non_differentiable(output[1], output[2])


def _logits_backward(ctx: Any, grad_loss: torch.Tensor, *_: Any) -> tuple[Any, ...]:
    student_logits, *rest = ctx.saved_tensors  # raises where another consumer, or a first backward, has written there
    if ctx.in_place:
        with torch.no_grad():
            torch.ops.megatron_tcod.logits_divergence_backward_(student_logits.detach(), *rest, grad_loss, *ctx.plan)
        grad = student_logits.detach()
    else:
        grad = torch.ops.megatron_tcod.logits_divergence_backward(student_logits, *rest, grad_loss, *ctx.plan)
    return (grad, *(None for _ in range(_NUM_LOGITS_ARGS + len(ctx.plan))))


logits_divergence.register_autograd(_logits_backward, setup_context=_logits_context)


def _with_total(loss_weight: torch.Tensor, loss: torch.Tensor, *rest: torch.Tensor) -> tuple[torch.Tensor, ...]:
    return (weighted_total(loss_weight, loss), loss, *rest)


def weighted_total(loss_weight: torch.Tensor, loss: torch.Tensor) -> torch.Tensor:
    """sum(loss_weight * loss) [] of two [S]; a row without weight counts as zero, whatever its loss."""
    weight = loss_weight.to(loss.device, loss.dtype, non_blocking=True)  # [S]
    return torch.dot(weight, loss.masked_fill(weight == 0, 0))


def accumulated_total(*args: Any) -> tuple[torch.Tensor, ...]:
    """`linear_divergence_total_` for autograd: (total, loss, statistics); the head itself gets no gradient."""
    return _AccumulatedTotal.apply(*args)


class _AccumulatedTotal(torch.autograd.Function):
    """The head's gradient is complete after the forward pass, so the backward pass may run only once."""

    @staticmethod
    def forward(ctx: Any, *args: Any) -> tuple[torch.Tensor, ...]:
        total, loss, statistics, grad_hidden = torch.ops.megatron_tcod.linear_divergence_total_(*args)
        ctx.save_for_backward(grad_hidden)
        ctx.dtype, ctx.num_inputs = args[0].dtype, len(args)
        ctx.mark_non_differentiable(loss, statistics)
        return total, loss, statistics

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_total: torch.Tensor, *_: Any) -> tuple[Any, ...]:
        (grad_hidden,) = ctx.saved_tensors
        grad = grad_hidden.mul_(grad_total).to(ctx.dtype)  # a second backward finds its tensor changed and fails
        return (grad, *(None for _ in range(ctx.num_inputs - 1)))
