"""The compiled modules `_C` and `_C_cuda`: loading them, and what must hold before an address leaves Python.

    module = load("_C")                       # the module; ImportError where `missing("_C")` gives a reason
    native.check_logits(student, teacher, device="cpu")
    native.row_stride(student)                # elements

A native kernel gets addresses, sizes and strides (csrc/include/divergence_api.h) and believes them. So each backend
checks first: dtype, device, shape, strides and overlap, each a ValueError that says which argument, what was expected,
what came and what to do. A backend must also hold every tensor whose address it passes until the call returns: the
address of a temporary belongs to nobody.

Not here: the kernels' calls (`ops/cpp_chunk.py`, `ops/cuda_chunk.py`) and the build (setup.py).
"""

from __future__ import annotations

import functools
import importlib
import json
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
"""enum TcodDtype of divergence_api.h."""

KINDS = {"reverse_kl": 0, "forward_kl": 1, "jsd": 2, "nll": 3}
"""enum TcodKind of divergence_api.h."""

TABLE_ROWS = 5

BUILD_INFO = Path(__file__).parents[1] / "_build_info.json"
"""Written by setup.py: {module: {"built": bool, "reason": str or null, ...}}."""


@functools.cache
def _import(module: str) -> ModuleType | str:
    """The module, or in one line why it is not there."""
    try:
        return importlib.import_module(f"megatron_tcod.{module}")
    except ImportError as error:
        recorded = build_info().get(module, {}).get("reason")
        return f"megatron_tcod.{module} was not built: {recorded}" if recorded else f"{error}; pip install ."


def load(module: str) -> ModuleType:
    """`_C` or `_C_cuda`. Raises ImportError with the reason where it is missing."""
    found = _import(module)
    if isinstance(found, str):
        raise ImportError(found)
    return found


def missing(module: str) -> str | None:
    """Why a module cannot be loaded, in one line; None when it can."""
    found = _import(module)
    return found if isinstance(found, str) else None


@functools.cache
def build_info() -> dict[str, Any]:
    """What setup.py recorded; empty for a tree that was never built."""
    return json.loads(BUILD_INFO.read_text()) if BUILD_INFO.exists() else {}


def check_logits(
    student: torch.Tensor, teacher: torch.Tensor | None, *, device: str, is_packed: bool = False
) -> None:
    """Both [C, columns], one dtype that kernels read, on `device` ("cpu", "cuda"), rows apart."""
    for argument, logits in (("student", student), ("teacher", teacher)):
        if logits is None:
            continue
        if logits.device.type != device:
            raise ValueError(f"{argument} must be on {device}, got {logits.device}; choose another divergence_backend")
        if logits.dtype not in DTYPES:
            raise ValueError(f"{argument} must be float32, bfloat16 or float16, got {_short(logits)}; convert it first")
        if logits.dim() != 2:
            raise ValueError(f"{argument} must be [C, columns], got {list(logits.shape)}; flatten the rows into one axis")
        _check_strides(argument, logits)
    if is_packed and student.dtype != torch.float16:
        raise ValueError(f"is_packed needs the float16 pair that partial_sums stored, got {_short(student)}; pass packed")
    if teacher is None:
        return
    if teacher.shape != student.shape:
        raise ValueError(
            f"teacher must be {list(student.shape)} like the student, got {list(teacher.shape)}; "
            f"cut both to the real tokens of this shard"
        )
    if teacher.dtype != student.dtype:
        raise ValueError(f"teacher must be {_short(student)} like the student, got {_short(teacher)}; convert one")
    if teacher.device != student.device:
        raise ValueError(f"teacher must be on {student.device} like the student, got {teacher.device}; move one")


def logits(
    kernels: Any,
    student: torch.Tensor,
    teacher: torch.Tensor | None,
    student_scale: float,
    teacher_scale: float,
    *,
    is_packed: bool,
) -> Any:
    """The struct TcodLogits of a native module; it holds addresses only, so the caller's tensors must outlive it."""
    check_scales(student_scale, teacher_scale)
    rows, columns = student.shape
    return kernels.Logits(
        student=student.data_ptr(),
        teacher=address(teacher),
        student_row_stride=row_stride(student),
        teacher_row_stride=0 if teacher is None else row_stride(teacher),
        rows=rows,
        columns=columns,
        dtype=DTYPES[student.dtype],
        is_packed=is_packed,
        student_scale=student_scale,
        teacher_scale=teacher_scale,
    )


def check_scales(student_scale: float, teacher_scale: float) -> None:
    for argument, scale in (("student_scale", student_scale), ("teacher_scale", teacher_scale)):
        if not 0 < scale < float("inf"):
            raise ValueError(f"{argument} must be positive and finite, got {scale}; it is 1 / temperature")


def check_beta(beta: float) -> None:
    if not 0 < beta < 1:
        raise ValueError(f"beta must lie strictly between 0 and 1, got {beta}; use forward_kl or reverse_kl instead")


def check_kind(kind: str, teacher: torch.Tensor | None, column: torch.Tensor | None) -> None:
    if kind not in KINDS:
        raise ValueError(f"kind {kind!r} is unknown; it must be one of {', '.join(KINDS)}")
    if kind == "nll" and column is None:
        raise ValueError("kind 'nll' needs column, the targets' columns; got none")
    if kind != "nll" and teacher is None:
        raise ValueError(f"kind {kind!r} compares two models; got no teacher")


def check_column(column: torch.Tensor | None, student: torch.Tensor) -> None:
    """Its range is left to the kernel's caller: on CUDA a look would wait for the device."""
    if column is not None:
        _check_vector("column", column, torch.int64, student)


def check_row_scale(row_scale: torch.Tensor, student: torch.Tensor) -> None:
    _check_vector("row_scale", row_scale, torch.float32, student)


def check_table(rows_table: torch.Tensor, student: torch.Tensor) -> None:
    expected = (TABLE_ROWS, student.shape[0])
    if rows_table.shape != expected or rows_table.dtype != torch.float64 or rows_table.device != student.device:
        raise ValueError(
            f"rows_table must be float64 {list(expected)} on {student.device}, got {_short(rows_table)} "
            f"{list(rows_table.shape)} on {rows_table.device}; it is MergedSums.table()"
        )
    _check_strides("rows_table", rows_table)


def check_packed(packed: torch.Tensor, student: torch.Tensor, teacher: torch.Tensor | None) -> None:
    expected = (2, *student.shape)
    if teacher is None:
        raise ValueError("packed needs a teacher: it holds the gap to it; pass packed=None")
    if packed.shape != expected or packed.dtype != torch.float16 or packed.device != student.device:
        raise ValueError(
            f"packed must be float16 {list(expected)} on {student.device}, got {_short(packed)} "
            f"{list(packed.shape)} on {packed.device}; allocate it for this chunk"
        )
    for half in packed:
        _check_strides("packed", half)
        check_apart("packed", half, "student", student)
        check_apart("packed", half, "teacher", teacher)
    check_apart("packed[0]", packed[0], "packed[1]", packed[1])


def check_out(out: torch.Tensor, student: torch.Tensor, teacher: torch.Tensor | None) -> None:
    """[C, columns] of a dtype that kernels write, which is one of the inputs or shares no element with them."""
    if out.shape != student.shape or out.dtype not in DTYPES or out.device != student.device:
        raise ValueError(
            f"out must be float32, bfloat16 or float16 {list(student.shape)} on {student.device}, got {_short(out)} "
            f"{list(out.shape)} on {out.device}; allocate it like the student"
        )
    _check_strides("out", out)
    for argument, logits in (("student", student), ("teacher", teacher)):
        if logits is None or _is_same(out, logits):
            continue
        check_apart("out", out, argument, logits)


def address(tensor: torch.Tensor | None) -> int:
    """Null for no tensor, and only for that: torch gives an empty tensor, which is not an absent one, null too."""
    return 0 if tensor is None else tensor.data_ptr() or 1


def row_stride(matrix: torch.Tensor) -> int:
    """Elements between two rows. One row, or none, is given whatever stride by torch."""
    rows, columns = matrix.shape
    return matrix.stride(0) if rows > 1 and columns else max(columns, 1)


def check_apart(argument: str, written: torch.Tensor, other_argument: str, other: torch.Tensor) -> None:
    """Two matrices share no element; rows of one may lie between rows of the other when their strides agree."""
    if not written.numel() or not other.numel():
        return
    first, second = _span(written), _span(other)
    if first[1] <= second[0] or second[1] <= first[0]:
        return
    pitch, other_pitch = (row_stride(matrix) * matrix.element_size() for matrix in (written, other))
    offset = (second[0] - first[0]) % pitch
    widths = [matrix.shape[1] * matrix.element_size() for matrix in (written, other)]
    if pitch != other_pitch or offset < widths[0] or pitch - offset < widths[1]:
        raise ValueError(
            f"{argument} overlaps {other_argument} in memory; "
            f"pass the same tensor, with the same dtype and strides, or one of its own"
        )


def _span(matrix: torch.Tensor) -> tuple[int, int]:
    """Half-open range of addresses."""
    rows, columns = matrix.shape
    start = matrix.data_ptr()
    return start, start + ((rows - 1) * row_stride(matrix) + columns) * matrix.element_size()


def _is_same(out: torch.Tensor, logits: torch.Tensor) -> bool:
    is_same_place = out.data_ptr() == logits.data_ptr() and row_stride(out) == row_stride(logits)
    return is_same_place and out.dtype == logits.dtype


def _check_vector(argument: str, vector: torch.Tensor, dtype: torch.dtype, student: torch.Tensor) -> None:
    expected = (student.shape[0],)
    if vector.shape != expected or vector.dtype != dtype or vector.device != student.device:
        raise ValueError(
            f"{argument} must be {str(dtype).removeprefix('torch.')} {list(expected)} on {student.device}, "
            f"got {_short(vector)} {list(vector.shape)} on {vector.device}; one value a row of the student"
        )
    if vector.numel() > 1 and vector.stride(0) != 1:
        raise ValueError(f"{argument} must have stride 1, got {vector.stride(0)}; call .contiguous()")


def _check_strides(argument: str, matrix: torch.Tensor) -> None:
    rows, columns = matrix.shape
    if columns > 1 and matrix.stride(1) != 1:
        raise ValueError(f"{argument} must have last stride 1, got strides {list(matrix.stride())}; call .contiguous()")
    if rows > 1 and matrix.stride(0) < columns:
        raise ValueError(
            f"{argument} must have rows at least {columns} elements apart, got stride {matrix.stride(0)}, "
            f"so rows share memory; call .contiguous()"
        )


def _short(tensor: torch.Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")
