"""The backend `triton`: one chunk of logits on a CUDA device, by the kernels of `ops/triton_kernels.py`.

    partial = partial_sums(student, teacher, column, student_scale=1.0, teacher_scale=1.0)                # [13, C]
    logits_gradient(student, teacher, rows_table, row_scale, column, kind="reverse_kl", beta=0.5,
                    student_scale=1.0, teacher_scale=1.0, out=student)

The contract is in `ops/backends.py`; what holds for `cuda` holds here too: asynchronous, no atomics, a weight below
2^-126 of the largest counts as zero. It serves where the compiled kernels are missing and `triton` is installed, as it
is beside a CUDA build of torch. Rows are read 128 bits at a time where pointers and strides are multiples of 16.

    TRITON_INTERPRET=1 python ...      # the same kernels on CPU tensors, slowly: for tests

The variable must be set before the first import of triton. Every function checks its arguments and raises ValueError
before a kernel starts. Not here: float64, choosing tile sizes by measuring.
"""

from __future__ import annotations

import functools
import importlib.util
import os
from types import ModuleType

import torch

from megatron_tcod.ops import native
from megatron_tcod.ops.shard_sums import MergedSums

name = "triton"

LANES = 256
"""Rows of a tile, one for each thread of 8 warps."""

WARPS = 8

GRADIENT_BLOCK = 4096
"""Columns that one program turns into their gradient at a time."""


def is_interpreted() -> bool:
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "yes", "on")


@functools.cache
def unavailable() -> str | None:
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed; pip install triton"
    if not is_interpreted() and not torch.cuda.is_available():
        return "torch sees no CUDA device"
    return None


@functools.cache
def _kernels() -> ModuleType:
    return importlib.import_module("megatron_tcod.ops.triton_kernels")


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
    native.check_logits(student, teacher, device=_device())
    native.check_scales(student_scale, teacher_scale)
    native.check_column(column, student)
    if packed is not None:
        native.check_packed(packed, student, teacher)
    sums = student.new_empty(MergedSums.count(teacher is not None), student.shape[0], dtype=torch.float64)
    _launch(
        _kernels().partial_sums_kernel,
        student,
        teacher,
        column,
        None if packed is None else packed[0],
        None if packed is None else packed[1],
        sums,
        native.row_stride(student),
        0 if teacher is None else native.row_stride(teacher),
        0 if packed is None else native.row_stride(packed[0]),
        student.shape[0],
        student.shape[1],
        student_scale,
        teacher_scale,
        HAS_TEACHER=teacher is not None,
        HAS_COLUMN=column is not None,
        IS_PACKING=packed is not None,
        **_tile(student),
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
    native.check_logits(student, teacher, device=_device(), is_packed=is_packed)
    native.check_scales(student_scale, teacher_scale)
    native.check_table(rows_table, student)
    native.check_beta(beta)
    sums = student.new_empty(2, student.shape[0], dtype=torch.float64)
    _launch(
        _kernels().mixture_sums_kernel,
        student,
        teacher,
        rows_table,
        sums,
        native.row_stride(student),
        native.row_stride(teacher),
        rows_table.stride(0),
        student.shape[0],
        student.shape[1],
        student_scale,
        teacher_scale,
        beta,
        IS_PACKED=is_packed,
        HAS_FAST_LOG=not is_interpreted(),
        **_tile(student),
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
    native.check_logits(student, teacher, device=_device(), is_packed=is_packed)
    native.check_scales(student_scale, teacher_scale)
    native.check_table(rows_table, student)
    native.check_row_scale(row_scale, student)
    native.check_column(column, student)
    native.check_out(out, student, teacher)
    if kind == "jsd":
        native.check_beta(beta)
    _launch(
        _kernels().logits_gradient_kernel,
        student,
        teacher,
        rows_table,
        row_scale,
        column,
        out,
        native.row_stride(student),
        0 if teacher is None else native.row_stride(teacher),
        rows_table.stride(0),
        native.row_stride(out),
        student.shape[1],
        student_scale,
        teacher_scale,
        beta,
        KIND=kind,
        IS_PACKED=is_packed,
        HAS_SERIES=student.dtype == torch.float32,
        HAS_FAST_LOG=student.dtype != torch.float32 and not is_interpreted(),
        BLOCK=GRADIENT_BLOCK,
    )


def _device() -> str:
    return "cpu" if is_interpreted() else "cuda"


def _tile(student: torch.Tensor) -> dict[str, int | bool]:
    """A lane's columns are 16 bytes. fp32 logits take the series, for which there is time while they are read."""
    return {"HAS_SERIES": student.dtype == torch.float32, "LANES": LANES, "VECTOR": 16 // student.element_size()}


def _launch(kernel, student: torch.Tensor, *args: torch.Tensor | float | None, **settings: int | bool | str) -> None:
    """One program a row on torch's current stream of the logits' device."""
    num_rows = student.shape[0]
    if num_rows == 0:
        return
    if student.is_cuda:
        with torch.cuda.device(student.device):
            kernel[(num_rows,)](student, *args, **settings, num_warps=WARPS)
    else:
        kernel[(num_rows,)](student, *args, **settings)
