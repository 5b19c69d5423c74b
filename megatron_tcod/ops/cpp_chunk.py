"""The backend `cpp`: one chunk of logits on a CPU, by the kernels of csrc/cpu.

    partial = partial_sums(student, teacher, column, student_scale=1.0, teacher_scale=1.0)                # [13, C]
    logits_gradient(student, teacher, rows_table, row_scale, column, kind="reverse_kl", beta=0.5,
                    student_scale=1.0, teacher_scale=1.0, out=student)

The contract is in `ops/backends.py`. Sums are made in one read of memory and nothing of the chunk's size is allocated.
Rows are shared out over `torch.get_num_threads()` threads, and each row is computed by one, so the results do not
depend on how many there are, nor on how rows are cut into chunks. The instruction set (AVX-512, AVX2 or the one every
machine has) is chosen once a process. A weight below 2^-126 of the largest counts as zero.

Every function checks its arguments and raises ValueError before a kernel starts. Not here: float64, other devices.
"""

from __future__ import annotations

import functools
from typing import Any

import torch

from megatron_tcod.ops import native
from megatron_tcod.ops.shard_sums import MergedSums

name = "cpp"


def unavailable() -> str | None:
    return native.missing("_C")


@functools.cache
def _kernels() -> Any:
    return native.load("_C")


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
    native.check_logits(student, teacher, device="cpu")
    native.check_column(column, student)
    if packed is not None:
        native.check_packed(packed, student, teacher)
    sums = torch.empty(MergedSums.count(teacher is not None), student.shape[0], dtype=torch.float64)
    _kernels().partial_sums(
        native.logits(_kernels(), student, teacher, student_scale, teacher_scale, is_packed=False),
        column=native.address(column),
        packed_student=0 if packed is None else native.address(packed[0]),
        packed_gap=0 if packed is None else native.address(packed[1]),
        packed_row_stride=0 if packed is None else native.row_stride(packed[0]),
        sums=sums.data_ptr(),
        num_threads=torch.get_num_threads(),
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
    native.check_logits(student, teacher, device="cpu", is_packed=is_packed)
    native.check_table(rows_table, student)
    native.check_beta(beta)
    sums = torch.empty(2, student.shape[0], dtype=torch.float64)
    _kernels().mixture_sums(
        native.logits(_kernels(), student, teacher, student_scale, teacher_scale, is_packed=is_packed),
        table=rows_table.data_ptr(),
        table_stride=rows_table.stride(0),
        beta=beta,
        sums=sums.data_ptr(),
        num_threads=torch.get_num_threads(),
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
    native.check_logits(student, teacher, device="cpu", is_packed=is_packed)
    native.check_table(rows_table, student)
    native.check_row_scale(row_scale, student)
    native.check_column(column, student)
    native.check_out(out, student, teacher)
    if kind == "jsd":
        native.check_beta(beta)
    _kernels().logits_gradient(
        native.logits(_kernels(), student, teacher, student_scale, teacher_scale, is_packed=is_packed),
        table=rows_table.data_ptr(),
        table_stride=rows_table.stride(0),
        row_scale=row_scale.data_ptr(),
        column=native.address(column),
        kind=native.KINDS[kind],
        beta=beta,
        out=native.address(out),
        out_row_stride=native.row_stride(out),
        out_dtype=native.DTYPES[out.dtype],
        num_threads=torch.get_num_threads(),
    )
