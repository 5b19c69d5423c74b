"""Who does the arithmetic on a chunk of logits: the table BACKENDS, the contract they share, and the choice.

    backend = choose("auto", device=hidden.device, dtype=torch.float32)       # chosen once, logged once
    partial = backend.partial_sums(student, teacher, column, student_scale=1.0, teacher_scale=1.0)      # [13, C]

`torch` is always there and takes float64 too; `cpp` is the compiled CPU code; `cuda` and `triton` need a device.
`auto` takes the first that can run in the order of BACKENDS and says so in the log together with those it passed
over; a name is a wish that is granted or refused with a ValueError, never replaced.

Not here: the arithmetic (one module a backend), making logits, communication.
"""

from __future__ import annotations

import functools
import importlib
import logging
from typing import Protocol

import torch

_log = logging.getLogger(__name__)

BACKENDS = {
    "cuda": "megatron_tcod.ops.cuda_chunk",
    "triton": "megatron_tcod.ops.triton_chunk",
    "cpp": "megatron_tcod.ops.cpp_chunk",
    "torch": "megatron_tcod.ops.logits_chunk",
}
"""Name -> module with the functions of `Backend`, fastest first."""


class Backend(Protocol):
    """The functions of a backend's module.

    Common arguments. `student` and `teacher` are logits [C, columns] of this shard's real tokens before the temperature,
    one dtype, last stride 1, rows any stride >= columns apart (int64 offsets); they are left as they are unless one
    is `out`. A scale is 1 / temperature. `column` [C] int64 is the target's column in this shard or -1 (None: no targets
    at all). `rows_table` [5, C] float64 is `MergedSums.table()`: maximum and log-total of the student, of the teacher,
    and the centre. Statistics are fp32 or wider whatever the logits' dtype. A NaN or +inf logit makes its row NaN; a
    term whose weight is exactly zero counts as zero. C may be 0; `columns` may be 0 (a shard of padding).

    Packed chunks. With `packed` [2, C, columns] fp16, `partial_sums` also stores the student's logits and the gap s - t
    (0 where both are equal, -inf included), both over their temperatures. The second read takes them as `student` and
    `teacher` with `is_packed=True`; scales then count as 1.
    """

    name: str

    def unavailable(self) -> str | None:
        """Why this backend cannot run here, in one line; None when it can."""
        ...

    def partial_sums(
        self,
        student: torch.Tensor,
        teacher: torch.Tensor | None,
        column: torch.Tensor | None,
        *,
        student_scale: float,
        teacher_scale: float,
        packed: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """One read of both logits -> [13, C] float64 in the order of `ops/shard_sums.py`; [4, C] without a teacher."""
        ...

    def mixture_sums(
        self,
        student: torch.Tensor,
        teacher: torch.Tensor,
        rows_table: torch.Tensor,
        *,
        beta: float,
        student_scale: float,
        teacher_scale: float,
        is_packed: bool = False,
    ) -> torch.Tensor:
        """JSD's second read -> [2, C] float64: this shard's part of KL(p_S || m) and of KL(p_T || m)."""
        ...

    def logits_gradient(
        self,
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
        """Last read: out [C, columns] = row_scale [C] * d loss / d (student logit over the temperature).

        `out` may be `student` itself and may have another float dtype otherwise. `row_scale` is fp32 (float64 for
        float64 logits); where it is zero the row of `out` is exactly zero and nothing of the logits is looked at.
        `kind` is one of `ops/divergence.KINDS`; `nll` needs `column` and no teacher. Formulas: `ops/divergence.py`.
        """
        ...


@functools.cache
def choose(name: str, *, device: str, dtype: torch.dtype) -> Backend:
    """The backend called `name`, or for `auto` the first that can run on `device` ("cpu", "cuda") with logits of `dtype`.

    Raises ValueError for an unknown name and for one that cannot run here, with the reason.
    """
    if name == "auto":
        passed_over = []
        for candidate in BACKENDS:
            reason = _refusal(candidate, device, dtype)
            if reason is None:
                why = f" ({'; '.join(passed_over)})" if passed_over else ""
                _log.info("divergence backend on %s for %s: %s%s", device, _short(dtype), candidate, why)
                return importlib.import_module(BACKENDS[candidate])
            passed_over.append(f"{candidate}: {reason}")
        raise AssertionError("torch runs everywhere")
    if name not in BACKENDS:
        raise ValueError(f"divergence_backend {name!r} is unknown; it must be auto or one of {', '.join(BACKENDS)}")
    reason = _refusal(name, device, dtype)
    if reason is not None:
        raise ValueError(f"divergence_backend {name!r} cannot be used: {reason}; choose auto or another backend")
    return importlib.import_module(BACKENDS[name])


DEVICES = {"cuda": ("cuda",), "triton": ("cuda",), "cpp": ("cpu",), "torch": ("cpu", "cuda")}


def _refusal(name: str, device: str, dtype: torch.dtype) -> str | None:
    if device not in DEVICES[name]:
        return f"it does not run on {device}"
    if dtype is torch.float64 and name != "torch":
        return "it does not compute in float64"
    return importlib.import_module(BACKENDS[name]).unavailable()


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
