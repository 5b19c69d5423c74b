"""The loops over chunks of rows behind `ops/divergence.py`: hidden states meet the heads, logits live and die here.

    loss, statistics, rows_table = read_rows(plan, student_hidden, student_head, teacher_hidden, teacher_head, ids)
    grad_hidden = rows_gradient(plan, ..., rows_table, grad_loss, grad_head)         # makes the logits again
    loss, statistics, grad_hidden = weighted_rows(plan, ..., loss_weight, grad_head) # both in one go

    loss, statistics, rows_table = read_logits(plan, student_logits, teacher_logits, ids)   # logits that exist already
    logits_gradient(plan, student_logits, teacher_logits, ids, rows_table, grad_loss, out)

`weighted_rows` knows what a row's loss will be multiplied with, so a chunk's logits become their gradient and then both
products while they are there: one projection of each model, where the two-step form makes two. Each chunk's sums travel
by one all-gather. Under tensor parallelism the products of the next chunk are launched while they travel, so two chunks
live at that time.

Nothing here waits for the device. Not here: formulas (`ops/divergence.py`), arithmetic on logits (`ops/backends.py`),
autograd and torch.library (`ops/library.py`), argument checks (`ops/divergence.py`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple, TypeVar

import torch
import torch.distributed as dist

from megatron_tcod.ops import backends
from megatron_tcod.ops.backends import Backend
from megatron_tcod.ops.shard_sums import CENTRE, MergedSums
from megatron_tcod.ops.vocab_shard import VocabShard, group_rank, group_size

CHUNK_BYTES = {"cpu": 2 << 20, "cuda": 5 << 28}
"""Bytes of one chunk of fp32 logits: near a core's cache on a CPU, large enough to fill the matrix units on a GPU."""

CHUNK_ROWS = {"cpu": (256, 1 << 30), "cuda": (256, 4096)}
"""Fewest and most rows of a chunk. Fewer would spend more time on adding up the head gradient, which every chunk touches
whole, than on products; more would leave nothing to do while sums travel."""

TERMS = 2048
"""Of a sum in fp32 on a CPU, added up in one go."""

Begun = TypeVar("Begun")


class Plan(NamedTuple):
    """Everything about one call that is not a tensor, in the order of the ops' schemas (`ops/library.py`)."""

    kind: str
    vocab_size: int
    beta: float
    student_temperature: float
    teacher_temperature: float
    chunk_size: int
    """Rows; 0 takes what CHUNK_BYTES allows."""
    is_packed: bool
    """`weighted_rows`: keep a chunk between its two reads as fp16 (s, s - t) instead of fp32 (s, t)."""
    backend: str
    group: str
    """Name of the tensor-parallel process group; empty for one process."""

    @property
    def tp_group(self) -> dist.ProcessGroup | None:
        return dist.distributed_c10d._resolve_process_group(self.group) if self.group else None


def read_rows(
    plan: Plan,
    student_hidden: torch.Tensor,
    student_head: torch.Tensor,
    teacher_hidden: torch.Tensor | None,
    teacher_head: torch.Tensor | None,
    target_ids: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Loss [S], statistics [7, S] ([2, S] without a teacher), and rows_table [5, S] float64 for `rows_gradient`.

    One gather after the last chunk (two for `jsd`, which projects twice).
    """
    return _read(ChunkLoop.of(plan, student_hidden, student_head, teacher_hidden, teacher_head, target_ids))


def read_logits(
    plan: Plan, student_logits: torch.Tensor, teacher_logits: torch.Tensor, target_ids: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """`read_rows` for logits [S, V/tp] that are there already, of any float type."""
    return _read(ChunkLoop.of_logits(plan, student_logits, teacher_logits, target_ids))


def _read(loop: ChunkLoop) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    num_rows, device = loop.student.num_rows, loop.student.device
    partial = torch.empty(MergedSums.count(loop.teacher is not None), num_rows, dtype=torch.float64, device=device)
    for rows in loop.chunks(num_rows):
        partial[:, rows] = loop.partial_sums(rows, *loop.project(rows))
    sums = MergedSums.merge(Gather(partial, loop.group).wait())  # each [S] float64
    rows_table = sums.table()  # [5, S]
    pair = torch.empty(2, num_rows, dtype=torch.float64, device=device)  # [2, S] this shard
    if loop.plan.kind == "jsd":
        for rows in loop.chunks(num_rows):
            pair[:, rows] = loop.mixture_sums(*loop.project(rows), rows_table[:, rows])
    loss = loop.complete(sums, rows_table, pair)
    return loss.to(loop.dtype), torch.stack(sums.statistics()).to(loop.dtype), rows_table


def logits_gradient(
    plan: Plan,
    student_logits: torch.Tensor,
    teacher_logits: torch.Tensor,
    target_ids: torch.Tensor | None,
    rows_table: torch.Tensor,
    grad_loss: torch.Tensor,
    out: torch.Tensor,
) -> None:
    """Gradient of the student's logits [S, V/tp] into `out`, which may be `student_logits`; zero in padding columns."""
    loop = ChunkLoop.of_logits(plan, student_logits, teacher_logits, target_ids)
    row_scale = grad_loss.to(loop.dtype) / plan.student_temperature  # [S]
    for rows in loop.chunks(student_logits.shape[0]):
        loop.logits_gradient(rows, *loop.project(rows), rows_table[:, rows], row_scale[rows], out[rows, : loop.shard.columns])
    out[:, loop.shard.columns :] = 0


def rows_gradient(
    plan: Plan,
    student_hidden: torch.Tensor,
    student_head: torch.Tensor,
    teacher_hidden: torch.Tensor | None,
    teacher_head: torch.Tensor | None,
    target_ids: torch.Tensor | None,
    rows_table: torch.Tensor,
    grad_loss: torch.Tensor,
    grad_head: torch.Tensor | None,
) -> torch.Tensor:
    """Gradient of the hidden states [S, H_s], summed over shards, for an upstream gradient grad_loss [S].

    Adds the head's gradient into `grad_head` [V/tp, H_s], fp32 or wider, unless that is None. One all-reduce.
    """
    if plan.kind == "nll":
        teacher_hidden = teacher_head = None
    is_idle = grad_loss == 0  # [S] rows that must leave no trace, whatever they hold
    student_hidden = student_hidden.masked_fill(is_idle[:, None], 0)
    loop = ChunkLoop.of(plan, student_hidden, student_head, teacher_hidden, teacher_head, target_ids)
    grad_hidden = student_hidden.new_zeros(student_hidden.shape, dtype=loop.dtype)  # [S, H_s]
    row_scale = grad_loss.to(loop.dtype) / plan.student_temperature  # [S]
    for rows in loop.chunks(student_hidden.shape[0]):
        grad_logits = loop.grad_logits(rows, *loop.project(rows), rows_table[:, rows], row_scale[rows])
        loop.multiply(rows, grad_logits, grad_hidden, grad_head)
        del grad_logits  # freed before the next chunk's logits are made
    sum_over_shards(grad_hidden, loop.group)
    return grad_hidden


def weighted_rows(
    plan: Plan,
    student_hidden: torch.Tensor,
    student_head: torch.Tensor,
    teacher_hidden: torch.Tensor | None,
    teacher_head: torch.Tensor | None,
    target_ids: torch.Tensor | None,
    loss_weight: torch.Tensor,
    grad_scale: torch.Tensor | None,
    grad_head: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Loss [S], statistics [7 or 2, S], and the gradient [S, H_s] of sum(loss_weight * loss), summed over shards.

    Adds the head's gradient times `grad_scale`, a number on the device, into `grad_head` unless that is None. Rows of
    weight zero are not projected when `loss_weight` lies on the CPU, where that can be seen without waiting; all their
    results are zero. On the device they are, and only their gradient is zero.
    """
    num_rows, device = student_hidden.shape[0], student_hidden.device
    active = _active_rows(loss_weight)  # [S'] or None for all
    if active is not None:
        index = active.to(device, non_blocking=True)
        student_rows, teacher_rows, ids = (
            None if x is None else x.index_select(0, index) for x in (student_hidden, teacher_hidden, target_ids)
        )
        heads = (student_head, teacher_head)
        loss, statistics, grad_hidden = weighted_rows(
            plan, student_rows, heads[0], teacher_rows, heads[1], ids, loss_weight[active], grad_scale, grad_head
        )
        return (
            loss.new_zeros(num_rows).index_copy_(0, index, loss),
            statistics.new_zeros(len(statistics), num_rows).index_copy_(1, index, statistics),
            grad_hidden.new_zeros(student_hidden.shape).index_copy_(0, index, grad_hidden),
        )
    weight = loss_weight.to(device, non_blocking=True)  # [S]
    if device.type != "cpu":
        student_hidden = student_hidden.masked_fill((weight == 0)[:, None], 0)
    loop = ChunkLoop.of(plan, student_hidden, student_head, teacher_hidden, teacher_head, target_ids)
    loop.head_scale, loop.is_packed = grad_scale, plan.is_packed and plan.kind != "nll"
    loss = torch.empty(num_rows, dtype=loop.dtype, device=device)  # [S]
    num_statistics = 7 if loop.teacher is not None else 2
    statistics = torch.empty(num_statistics, num_rows, dtype=loop.dtype, device=device)  # [7, S]
    grad_hidden = student_hidden.new_zeros(student_hidden.shape, dtype=loop.dtype)  # [S, H_s]
    row_scale = weight.to(loop.dtype) / plan.student_temperature  # [S]

    def finish(chunk: _Chunk) -> None:
        rows = chunk.rows
        sums = MergedSums.merge(chunk.gather.wait())
        rows_table = sums.table()  # [5, C]
        pair = loop.mixture_sums(chunk.student, chunk.teacher, rows_table) if plan.kind == "jsd" else None
        loss[rows] = loop.complete(sums, rows_table, pair).to(loop.dtype)
        statistics[:, rows] = torch.stack(sums.statistics()).to(loop.dtype)
        grad_logits = loop.grad_logits(rows, chunk.student, chunk.teacher, rows_table, row_scale[rows])
        loop.multiply(rows, grad_logits, grad_hidden, grad_head)

    loop.each(num_rows, loop.begin, finish)
    sum_over_shards(grad_hidden, loop.group)
    return loss, statistics, grad_hidden


@dataclass
class ChunkLoop:
    """Where the two models' logits come from in one call, and what is done to a chunk."""

    plan: Plan
    student: _Projection | _Given
    teacher: _Projection | _Given | None
    backend: Backend
    group: dist.ProcessGroup | None
    shard: VocabShard
    column: torch.Tensor | None  # [S] of the target in this shard; -1 where it is not here
    head_scale: torch.Tensor | None = None
    is_packed: bool = False
    """Whether chunks are kept between their reads as fp16 (s, s - t)."""

    @classmethod
    def of(
        cls,
        plan: Plan,
        student_hidden: torch.Tensor,
        student_head: torch.Tensor,
        teacher_hidden: torch.Tensor | None,
        teacher_head: torch.Tensor | None,
        target_ids: torch.Tensor | None,
    ) -> ChunkLoop:
        group = plan.tp_group
        shard = VocabShard.of(plan.vocab_size, student_head.shape[0], group_rank(group))
        dtype = torch.float64 if torch.float64 in (student_hidden.dtype, student_head.dtype) else torch.float32
        return cls(
            plan=plan,
            student=_Projection.of(student_hidden, student_head, shard.columns, dtype),
            teacher=None if teacher_hidden is None else _Projection.of(teacher_hidden, teacher_head, shard.columns, dtype),
            backend=backends.choose(plan.backend, device=student_hidden.device.type, dtype=dtype),
            group=group,
            shard=shard,
            column=column_of(target_ids, shard),
        )

    @classmethod
    def of_logits(
        cls, plan: Plan, student_logits: torch.Tensor, teacher_logits: torch.Tensor, target_ids: torch.Tensor | None
    ) -> ChunkLoop:
        group = plan.tp_group
        shard = VocabShard.of(plan.vocab_size, student_logits.shape[1], group_rank(group))
        return cls(
            plan=plan,
            student=_Given(student_logits[:, : shard.columns]),
            teacher=_Given(teacher_logits[:, : shard.columns]),
            backend=backends.choose(plan.backend, device=student_logits.device.type, dtype=student_logits.dtype),
            group=group,
            shard=shard,
            column=column_of(target_ids, shard),
        )

    @property
    def dtype(self) -> torch.dtype:
        """Of logits and results: float64 or float32."""
        return self.student.dtype

    @property
    def _scales(self) -> dict[str, float]:
        return {"student_scale": 1 / self.plan.student_temperature, "teacher_scale": 1 / self.plan.teacher_temperature}

    def chunks(self, num_rows: int) -> Iterator[slice]:
        """Row ranges of nearly equal length that cover [0, num_rows)."""
        size = self.plan.chunk_size
        if not size:
            kind = "cpu" if self.student.device.type == "cpu" else "cuda"
            fewest, most = CHUNK_ROWS[kind]
            size = min(max(fewest, CHUNK_BYTES[kind] // (4 * max(self.shard.columns, 1))), most)
        length = math.ceil(num_rows / max(math.ceil(num_rows / size), 1))
        for start in range(0, num_rows, max(length, 1)):
            yield slice(start, min(start + length, num_rows))

    def each(self, num_rows: int, begin: Callable[[slice], Begun], finish: Callable[[Begun], None]) -> None:
        """`finish(begin(rows))` for each chunk; with several shards a chunk is finished after the next one has begun, so
        that its sums travel meanwhile."""
        ready: Begun | None = None
        travelling: Begun | None = None
        for rows in self.chunks(num_rows):
            ready, travelling = travelling, begin(rows)
            if group_size(self.group) == 1:
                ready, travelling = travelling, None
            if ready is not None:
                finish(ready)
            ready = None  # its logits are freed before the next chunk's are made
        if travelling is not None:
            finish(travelling)

    def project(self, rows: slice) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Logits [C, columns] of both models."""
        return self.student.logits(rows), None if self.teacher is None else self.teacher.logits(rows)

    def partial_sums(
        self, rows: slice, student: torch.Tensor, teacher: torch.Tensor | None, packed: torch.Tensor | None = None
    ) -> torch.Tensor:
        column = None if self.column is None else self.column[rows]
        return self.backend.partial_sums(student, teacher, column, packed=packed, **self._scales)

    def begin(self, rows: slice) -> _Chunk:
        """Project a chunk, read it, and send its sums on their way."""
        student, teacher = self.project(rows)
        packed = student.new_empty(2, *student.shape, dtype=torch.float16) if self.is_packed else None  # [2, C, columns]
        gather = Gather(self.partial_sums(rows, student, teacher, packed), self.group)
        return _Chunk(rows, student, teacher, gather) if packed is None else _Chunk(rows, packed[0], packed[1], gather)

    def mixture_sums(self, student: torch.Tensor, teacher: torch.Tensor, rows_table: torch.Tensor) -> torch.Tensor:
        return self.backend.mixture_sums(
            student,
            teacher,
            rows_table.contiguous(),
            beta=self.plan.beta,
            is_packed=self.is_packed,
            **self._scales,
        )

    def complete(self, sums: MergedSums, rows_table: torch.Tensor, pair: torch.Tensor | None) -> torch.Tensor:
        """The loss [C] float64. JSD's `pair` [2, C] is gathered here, and its centre put into `rows_table`."""
        kind, beta = self.plan.kind, self.plan.beta
        if kind == "jsd":
            from_student, from_teacher = Gather(pair, self.group).wait().sum(0)  # [C] each
            rows_table[CENTRE] = from_student
            return beta * from_teacher + (1 - beta) * from_student
        return {
            "reverse_kl": sums.reverse_kl,
            "forward_kl": sums.forward_kl,
            "nll": -sums.student.logprob,
        }[kind]  # fmt: skip

    def grad_logits(
        self,
        rows: slice,
        student: torch.Tensor,
        teacher: torch.Tensor | None,
        rows_table: torch.Tensor,
        row_scale: torch.Tensor,
    ) -> torch.Tensor:
        """[C, columns] in the type that the head is multiplied in; in place of the student's logits where it can be."""
        operand = self.student.head.dtype
        out = student if student.dtype is operand else student.new_empty(student.shape, dtype=operand)
        self.logits_gradient(rows, student, teacher, rows_table, row_scale, out)
        return out

    def logits_gradient(
        self,
        rows: slice,
        student: torch.Tensor,
        teacher: torch.Tensor | None,
        rows_table: torch.Tensor,
        row_scale: torch.Tensor,
        out: torch.Tensor,
    ) -> None:
        self.backend.logits_gradient(
            student,
            None if self.plan.kind == "nll" else teacher,
            rows_table.contiguous(),
            row_scale,
            None if self.column is None else self.column[rows],
            kind=self.plan.kind,
            beta=self.plan.beta,
            out=out,
            is_packed=self.is_packed,
            **self._scales,
        )

    def multiply(
        self, rows: slice, grad_logits: torch.Tensor, grad_hidden: torch.Tensor, grad_head: torch.Tensor | None
    ) -> None:
        """Logits' gradient [C, columns] -> rows of the hidden states' gradient, and a share of the head's."""
        _long_matmul(grad_logits, self.student.head, out=grad_hidden[rows])
        if grad_head is not None:
            hidden = self.student.rows(rows)
            if self.head_scale is not None:
                hidden = hidden * self.head_scale.to(hidden.dtype)
            _add_matmul(grad_head[: self.shard.columns], grad_logits.T, hidden)


@dataclass(frozen=True)
class _Projection:
    """One model's hidden states and the real rows of its head shard, ready to make chunks of logits."""

    hidden: torch.Tensor  # [S, H]
    head: torch.Tensor  # [columns, H]
    dtype: torch.dtype
    """Of the logits: float64 or float32."""

    @property
    def num_rows(self) -> int:
        return self.hidden.shape[0]

    @property
    def device(self) -> torch.device:
        return self.hidden.device

    @classmethod
    def of(cls, hidden: torch.Tensor, head: torch.Tensor, columns: int, dtype: torch.dtype) -> _Projection:
        head = head[:columns]
        if not (hidden.dtype == head.dtype and _has_wide_product(head, dtype)):
            head = head.to(dtype)
        return cls(hidden, head, dtype)

    def rows(self, rows: slice) -> torch.Tensor:
        """[C, H] in the type that the head is multiplied in."""
        return self.hidden[rows].to(self.head.dtype)

    def logits(self, rows: slice) -> torch.Tensor:
        """[C, columns] of this shard."""
        return _matmul(self.rows(rows), self.head.T, self.dtype)


@dataclass(frozen=True)
class _Given:
    """Logits of one model that are there already."""

    whole: torch.Tensor  # [S, columns]

    @property
    def num_rows(self) -> int:
        return self.whole.shape[0]

    @property
    def device(self) -> torch.device:
        return self.whole.device

    @property
    def dtype(self) -> torch.dtype:
        """Of results."""
        return torch.promote_types(self.whole.dtype, torch.float32)

    def logits(self, rows: slice) -> torch.Tensor:
        return self.whole[rows]


@dataclass
class _Chunk:
    """A chunk between its two reads."""

    rows: slice
    student: torch.Tensor  # [C, columns] logits, or packed
    teacher: torch.Tensor | None  # [C, columns] logits, or the packed gap
    gather: Gather


class Gather:
    """[K, S] of each rank -> [tp, K, S] in rank order, under way until `wait`."""

    def __init__(self, partial: torch.Tensor, group: dist.ProcessGroup | None):
        size = group_size(group)
        self._shape = (size, *partial.shape)
        self._work: dist.Work | None = None
        if size == 1 or not partial.numel():  # S is the same on each rank, so all skip together
            self._gathered = partial.expand(self._shape)
            return
        self._partial = partial.contiguous()  # must outlive the exchange
        self._gathered = partial.new_empty(size * partial.shape[0], partial.shape[1])  # gloo wants one dimension to grow
        self._work = dist.all_gather_into_tensor(self._gathered, self._partial, group=group, async_op=True)

    def wait(self) -> torch.Tensor:
        """On CUDA the stream waits, not the host."""
        if self._work is not None:
            self._work.wait()
        return self._gathered.view(self._shape)


def column_of(target_ids: torch.Tensor | None, shard: VocabShard) -> torch.Tensor | None:
    """Where in this shard a token is; -1 for a token that is elsewhere or nowhere. [S] -> [S]."""
    if target_ids is None:
        return None
    column = target_ids - shard.first  # [S]
    return torch.where((column >= 0) & (column < shard.columns), column, -1)


def _active_rows(loss_weight: torch.Tensor) -> torch.Tensor | None:
    """Indices [S'] of rows with a weight, None when these are all or when looking would make the host wait."""
    if loss_weight.device.type != "cpu":
        return None
    active = loss_weight.nonzero()[:, 0]
    return None if len(active) == len(loss_weight) else active


def sum_over_shards(grad_hidden: torch.Tensor, group: dist.ProcessGroup | None) -> None:
    if group_size(group) > 1 and grad_hidden.numel():
        dist.all_reduce(grad_hidden, group=group)


def _has_wide_product(operand: torch.Tensor, dtype: torch.dtype) -> bool:
    """Whether the device multiplies this half-precision type into fp32 directly."""
    return operand.is_cuda and operand.dtype in (torch.bfloat16, torch.float16) and dtype == torch.float32


def _matmul(left: torch.Tensor, right: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Product of two operands of one type, as `dtype`."""
    if _has_wide_product(left, dtype):
        return torch.mm(left, right, out_dtype=dtype)
    return torch.mm(left, right)


def _long_matmul(left: torch.Tensor, right: torch.Tensor, *, out: torch.Tensor) -> None:
    """out = left @ right over as many terms as a vocabulary shard has. Some CPU libraries add them up one after the other in
    fp32, whose error grows with their number: blocks of terms keep it small. GPU libraries split such sums themselves."""
    num_terms = left.shape[1] if left.device.type == "cpu" else 0
    if num_terms <= TERMS:
        out.copy_(_matmul(left, right, out.dtype))
        return
    out.zero_()
    for start in range(0, num_terms, TERMS):
        block = slice(start, start + TERMS)
        out += _matmul(left[:, block], right[block], out.dtype)  # not added up inside the product, which is what errs


def _add_matmul(total: torch.Tensor, left: torch.Tensor, right: torch.Tensor) -> None:
    """total += left @ right, in the type of `total`."""
    if _has_wide_product(left, total.dtype):
        torch.addmm(total, left, right, out_dtype=total.dtype, out=total)
    else:
        total.addmm_(left, right)
