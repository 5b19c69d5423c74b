"""The backend `cuda`: one chunk of logits on a CUDA device, by the compiled kernels of csrc/cuda.

    partial = partial_sums(student, teacher, column, student_scale=1.0, teacher_scale=1.0)                # [13, C]
    logits_gradient(student, teacher, rows_table, row_scale, column, kind="reverse_kl", beta=0.5,
                    student_scale=1.0, teacher_scale=1.0, out=student)

The contract is in `ops/backends.py`. Calls are asynchronous on torch's current stream of the logits' device and never
wait for it; nothing of the chunk's size is allocated and there are no atomics, so equal input gives equal bits. Rows
whose pointers share a 16-byte boundary are read 128 bits at a time, others column by column. A weight below 2^-126 of
the largest counts as zero. A target at or beyond `columns` cannot be seen from here: its logit becomes NaN.

Every function checks its arguments and raises ValueError before a kernel starts; a launch that fails is a RuntimeError.
Not here: float64, CPU tensors, use inside a captured CUDA graph with changing addresses.
"""

from __future__ import annotations

import functools
from typing import Any

import torch

from megatron_tcod.ops import native
from megatron_tcod.ops.shard_sums import MergedSums

name = "cuda"

MAX_COLUMNS = 2**31 - 2**16
"""Columns are counted in 32 bits inside a row; offsets of rows are 64 bits wide."""


@functools.cache
def unavailable() -> str | None:
    reason = native.missing("_C_cuda")
    if reason is not None:
        return reason
    if not torch.cuda.is_available():
        return "torch sees no CUDA device"
    if _kernels().device_count() == 0:
        return "the CUDA runtime of megatron_tcod._C_cuda sees no device; the driver may be older than its toolkit"
    return None


@functools.cache
def _kernels() -> Any:
    return native.load("_C_cuda")


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
    _check_logits(student, teacher)
    native.check_column(column, student)
    if packed is not None:
        native.check_packed(packed, student, teacher)
    logits = native.logits(_kernels(), student, teacher, student_scale, teacher_scale, is_packed=False)
    sums = student.new_empty(MergedSums.count(teacher is not None), student.shape[0], dtype=torch.float64)
    with torch.cuda.device(student.device):
        _kernels().partial_sums(
            logits,
            column=native.address(column),
            packed_student=0 if packed is None else native.address(packed[0]),
            packed_gap=0 if packed is None else native.address(packed[1]),
            packed_row_stride=0 if packed is None else native.row_stride(packed[0]),
            sums=sums.data_ptr(),
            stream=_stream(student),
        )
    return sums


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
    _check_logits(student, teacher, is_packed=is_packed)
    native.check_table(rows_table, student)
    native.check_beta(beta)
    logits = native.logits(_kernels(), student, teacher, student_scale, teacher_scale, is_packed=is_packed)
    sums = student.new_empty(2, student.shape[0], dtype=torch.float64)
    with torch.cuda.device(student.device):
        _kernels().mixture_sums(
            logits,
            table=rows_table.data_ptr(),
            table_stride=rows_table.stride(0),
            beta=beta,
            sums=sums.data_ptr(),
            stream=_stream(student),
        )
    return sums


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
    native.check_kind(kind, teacher, column)
    _check_logits(student, teacher, is_packed=is_packed)
    native.check_table(rows_table, student)
    native.check_row_scale(row_scale, student)
    native.check_column(column, student)
    native.check_out(out, student, teacher)
    if kind == "jsd":
        native.check_beta(beta)
    logits = native.logits(_kernels(), student, teacher, student_scale, teacher_scale, is_packed=is_packed)
    with torch.cuda.device(student.device):
        _kernels().logits_gradient(
            logits,
            table=rows_table.data_ptr(),
            table_stride=rows_table.stride(0),
            row_scale=row_scale.data_ptr(),
            column=native.address(column),
            kind=native.KINDS[kind],
            beta=beta,
            out=out.data_ptr(),
            out_row_stride=native.row_stride(out),
            out_dtype=native.DTYPES[out.dtype],
            stream=_stream(student),
        )


def _check_logits(student: torch.Tensor, teacher: torch.Tensor | None, *, is_packed: bool = False) -> None:
    native.check_logits(student, teacher, device="cuda", is_packed=is_packed)
    if student.shape[1] > MAX_COLUMNS:
        raise ValueError(f"student must have at most {MAX_COLUMNS} columns, got {student.shape[1]}; use more shards")


def _stream(tensor: torch.Tensor) -> int:
    return torch.cuda.current_stream(tensor.device).cuda_stream
