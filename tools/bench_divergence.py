"""What a divergence costs and how exact its gradient is: this project's backends beside the usual ways, in one run.

    OMP_NUM_THREADS=1 python tools/bench_divergence.py
    python tools/bench_divergence.py --rows logits bf16 --providers eager cpp --json tools/baselines/cpu.json

It measures the roof first, a copy and a product of large matrices, and then prints a line a row and provider:

    logits     loss and gradient from two given logits [T, V], the gradient in place where the provider can; our backends
               as they are, and `op`, the public operator with autograd around the fastest
    hidden     from hidden states and heads, forward and backward, with the peak of memory against what is accounted for:
               the gradients and one chunk pair of logits
    numerics   error of the head's gradient for logits rounded to bf16, as is usual, and for ours, near convergence

`--shapes` takes TxV for logits, TxVxH for numerics, TxVxHsxHt for hidden and then runs these shapes only; `--rows` keeps
rows whose label contains each of the words. On a CPU times are process CPU time and peaks are resident memory; on a
device, events and allocated memory. ms is a median; GB/s counts the traffic that no provider can avoid (each logit read
twice, thrice for JSD, and the gradient written); the gradient's error is relative to float64 from the same operands,
on some rows where the shape is large.

Exits 1 when a backend of ours is further from float64 than 1.1 times the eager fp32 computation, and in numerics when
fp16-packed chunks err by more than 1 %. Peers are in `divergence_peers.py`. Not here: several devices and the collective.
"""

from __future__ import annotations

import argparse
import functools
import json
import math
import os
import platform
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch  # noqa: E402

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tools")]
import divergence_peers as peers  # noqa: E402
from measuring import measure  # noqa: E402

from megatron_tcod.ops import reference  # noqa: E402
from megatron_tcod.ops.backends import BACKENDS, Backend, choose  # noqa: E402
from megatron_tcod.ops.chunk_loop import CHUNK_BYTES, CHUNK_ROWS  # noqa: E402
from megatron_tcod.ops.divergence import linear_divergence, logits_divergence  # noqa: E402
from megatron_tcod.ops.shard_sums import CENTRE, MergedSums  # noqa: E402

KINDS = ("reverse_kl", "jsd")
BETA = 0.5
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
LOGITS_SHAPES = {
    "cpu": [(1024, 32_000), (1024, 151_936)],
    "cuda": [(rows, columns) for columns in (151_936, 75_968, 37_984, 18_992) for rows in (1024, 4096, 8192, 16_384)],
}
HIDDEN_SHAPES = {
    "cpu": [(rows, 32_000, 256, 512) for rows in (1024, 2048, 4096, 8192, 16_384)],
    "cuda": [(rows, 151_936, 2048, 4096) for rows in (1024, 2048, 4096, 8192, 16_384)],
}
NUMERICS_SHAPE = (64, 32_000, 1024)
NUMERICS_KL = (1e-3, 2e-4)
"""Mean divergences that a student has when it has nearly learnt its teacher."""
FEW_ROWS = 16
"""Rows at which gradients of large shapes are compared."""
WHOLE_ELEMENTS = 40_000_000
"""Up to this many logits all rows are compared."""


@dataclass(kw_only=True)
class Row:
    """What one provider did at one shape."""

    label: str
    provider: str
    is_ours: bool
    ms: float
    rate: float  # GB/s, or TFLOP/s in the hidden path
    roof_share: float
    peak_mb: float | None  # None where the system does not tell
    peak_logits: float | None  # in multiples of one logits tensor
    gradient_error: float | None  # None for providers with another loss
    allowed_error: float | None  # by the eager fp32 computation
    accounted_mb: float | None = None  # hidden path: gradients and one chunk pair
    to_eager: float | None = None
    to_compile: float | None = None

    @property
    def is_wrong(self) -> bool:
        return self.is_ours and not self.gradient_error <= self.allowed_error


@dataclass
class Bench:
    """One run: where it measures, what it keeps, what it found."""

    device: str
    words: list[str]
    wanted: list[str] | None
    backends: Mapping[str, Backend]
    copy_gbps: float = math.nan
    gemm_tflops: float = math.nan
    rows: list[Row] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    said: set[str] = field(default_factory=set)

    def keeps(self, label: str) -> bool:
        return all(word in label for word in self.words)

    def wants(self, provider: str) -> bool:
        return self.wanted is None or provider in self.wanted

    def skip(self, section: str, provider: str, reason: str) -> None:
        line = f"{section} {provider}: skipped, {reason}"
        if line not in self.said:
            self.said.add(line)
            print(line, flush=True)

    def add(self, row: Row) -> None:
        times = {other.provider: other.ms for other in self.rows if other.label == row.label}
        row.to_eager, row.to_compile = (times[name] / row.ms if name in times else None for name in ("eager", "compile"))
        self.rows.append(row)
        print(line_of(row), flush=True)
        if row.is_wrong:
            self.problems.append(
                f"{row.label} {row.provider}: gradient error {row.gradient_error:.2e}, allowed {row.allowed_error:.2e}"
            )


def line_of(row: Row) -> str:
    unit = "GB/s" if row.label.startswith("logits") else "TFLOP/s"
    peak = "peak n/a" if row.peak_mb is None else f"peak {row.peak_mb:7.1f} MB {row.peak_logits:6.3f}x"
    if row.accounted_mb is not None:
        peak += f" (accounted for {row.accounted_mb:.1f} MB)"
    error = "another loss" if row.gradient_error is None else f"error {row.gradient_error:.1e}"
    ratios = [f"{x:6.1f}x {name}" for name, x in (("eager", row.to_eager), ("compile", row.to_compile)) if x is not None]
    parts = [f"{row.ms:9.2f} ms", f"{row.rate:8.2f} {unit}", f"{row.roof_share:4.0%} of roof", peak, error, *ratios]
    return f"{row.label:46} {row.provider:12} | " + " | ".join(parts) + (" | WRONG" if row.is_wrong else "")


def measure_roof(bench: Bench) -> None:
    is_cpu = bench.device == "cpu"
    source = torch.ones((128 << 20) if is_cpu else (1 << 30), device=bench.device)
    target = torch.empty_like(source)
    _, ms, _ = measure(bench.device, lambda i: (source,), target.copy_, warm=lambda: target.copy_(source))
    bench.copy_gbps = 2 * source.nbytes / ms / 1e6
    size, dtype = (1536, torch.float32) if is_cpu else (8192, torch.bfloat16)
    factor = torch.ones(size, size, dtype=dtype, device=bench.device)
    rounds = [measure(bench.device, lambda i: (factor,), factor.mm, warm=lambda: factor.mm(factor))[1] for _ in range(4)]
    bench.gemm_tflops = 2 * size**3 / min(rounds) / 1e9  # a neighbour on the core halves it at times
    print(f"roof: copy {bench.copy_gbps:.1f} GB/s, product {bench.gemm_tflops:.3f} TFLOP/s ({dtype})", flush=True)


def our_logits_step(backend: Backend, chunk_rows: int, student: torch.Tensor, teacher: torch.Tensor, kind: str) -> tuple:
    """Statistics, merge and in-place gradient of `chunk_rows` rows at a time; the student's logits become the gradient."""
    loss = torch.empty(len(student), dtype=torch.float64, device=student.device)  # [T]
    scales = {"student_scale": 1.0, "teacher_scale": 1.0}
    for start in range(0, len(student), chunk_rows):
        rows = slice(start, start + chunk_rows)
        pair = student[rows], teacher[rows]
        sums = MergedSums.merge(backend.partial_sums(*pair, None, **scales)[None])
        table = sums.table()  # [5, C]
        if kind == "jsd":
            from_student, from_teacher = backend.mixture_sums(*pair, table, beta=BETA, **scales)  # [C] each
            table[CENTRE] = from_student
            loss[rows] = BETA * from_teacher + (1 - BETA) * from_student
        else:
            loss[rows] = sums.reverse_kl
        ones = torch.ones(len(pair[0]), device=student.device)  # [C]
        backend.logits_gradient(*pair, table, ones, None, kind=kind, beta=BETA, out=pair[0], **scales)
    return loss, student


def our_op_step(student: torch.Tensor, teacher: torch.Tensor, kind: str) -> tuple[torch.Tensor, torch.Tensor]:
    """The public operator by its fastest backend, on logits that come from elsewhere in the graph."""
    logits = _FromHead.apply(torch.zeros((), requires_grad=True), student)  # [T, V]
    loss = logits_divergence(logits, teacher, kind=kind, beta=BETA, vocab_size=logits.shape[1], in_place=True).loss  # [T]
    (gradient,) = torch.autograd.grad(loss.sum(), logits)
    return loss.detach(), gradient


class _FromHead(torch.autograd.Function):
    """Passes logits on as if a product had made them: autograd does not write into leaves."""

    @staticmethod
    def forward(ctx: Any, anchor: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        return logits.view_as(logits)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[None, None]:
        return None, None


def _warm(name: str, step: Callable, arguments: Callable[[int], tuple], num_rows: int) -> None:
    """What is compiled is compiled for its shape; on a device allocations are warmed too; else two rows are enough."""
    is_whole = name == "compile" or torch.cuda.is_available()
    step(*arguments(num_rows if is_whole else min(2, num_rows)))


def run_logits(bench: Bench, shapes: list[tuple[int, int]]) -> None:
    dtypes = ("bf16", "fp32") if bench.device == "cpu" else ("bf16",)
    for num_rows, columns in shapes:
        for dtype in dtypes:
            labels = {kind: f"logits {kind} T={num_rows} V={columns} {dtype}" for kind in KINDS}
            labels = {kind: label for kind, label in labels.items() if bench.keeps(label)}
            if not labels:
                continue
            buffers = _logits_buffers(num_rows, columns, DTYPES[dtype], bench.device)
            for kind, label in labels.items():
                _run_logits_row(bench, label, kind, buffers)


def _logits_buffers(num_rows: int, columns: int, dtype: torch.dtype, device: str) -> list[tuple]:
    """(student, its copy that a step may overwrite, teacher), several where one would fit into a cache."""
    generator = torch.Generator(device).manual_seed(num_rows + columns)
    draw = functools.partial(torch.randn, num_rows, columns, generator=generator, device=device)
    buffers = []
    for _ in range(1 if num_rows * columns > 30_000_000 else 3):
        teacher = draw().mul_(4)
        student = (teacher + draw().mul_(0.5)).to(dtype)
        buffers.append((student, student.clone(), teacher.to(dtype)))
    return buffers


def _run_logits_row(bench: Bench, label: str, kind: str, buffers: list[tuple]) -> None:
    (student, _, teacher), num_buffers = buffers[0], len(buffers)
    num_rows, columns = student.shape
    at = torch.linspace(0, num_rows - 1, min(FEW_ROWS, num_rows), device=student.device).long()  # rows compared
    truth, usual = (_logits_truth(student[at], teacher[at], kind, dtype) for dtype in (torch.float64, torch.float32))
    allowed = _allowance(usual, truth, student.dtype)

    def prepare(i: int) -> tuple:
        pristine, work, teacher = buffers[i % num_buffers]
        work.copy_(pristine)
        return work, teacher, kind

    for name, step, is_ours in _logits_steps(bench, student, kind):
        warm = functools.partial(_warm, name, step, lambda n: (student[:n].clone(), teacher[:n], kind), num_rows)
        kept, ms, peak = measure(bench.device, prepare, step, warm=warm, keep=lambda out: [x[at] for x in out])
        is_single = name == "megatron-ce"
        passes = 3 if is_single else {"reverse_kl": 5, "jsd": 7}[kind]
        gbps = passes * student.nbytes / ms / 1e6
        bench.add(
            Row(
                label=label,
                provider=name,
                is_ours=is_ours,
                ms=ms,
                rate=gbps,
                roof_share=gbps / bench.copy_gbps,
                peak_mb=None if peak is None else peak / 1e6,
                peak_logits=None if peak is None else peak / student.nbytes,
                gradient_error=None if is_single else _worst_error(kept, truth),
                allowed_error=None if is_single else allowed,
            )
        )


def _logits_steps(bench: Bench, student: torch.Tensor, kind: str) -> Iterator[tuple[str, peers.LogitsStep, bool]]:
    makers = peers.logits_peers(bench.device)
    if kind != "reverse_kl":  # these know one loss
        makers = {name: make for name, make in makers.items() if name not in ("megatron-ce", "naive-triton")}
    yield from _peers(bench, "logits", makers)
    chunk_rows = CHUNK_ROWS["cpu"][0] if bench.device == "cpu" else CHUNK_ROWS["cuda"][1]
    for name, backend in _our_backends(bench, student.dtype, "logits"):
        if name == "torch" and bench.wanted is None and bench.device == "cpu" and student.numel() > WHOLE_ELEMENTS:
            bench.skip("logits", name, "it takes minutes at the larger shapes; name it in --providers")
        else:
            yield name, functools.partial(our_logits_step, backend, chunk_rows), True
    if bench.wants("op"):
        yield "op", our_op_step, True


def _peers(bench: Bench, section: str, makers: Mapping[str, Callable[[], Callable | str]]) -> Iterator[tuple]:
    for name, make in makers.items():
        if bench.wants(name):
            step = make()
            if isinstance(step, str):
                bench.skip(section, name, step)
            else:
                yield name, step, False


def _our_backends(bench: Bench, dtype: torch.dtype, section: str) -> Iterator[tuple[str, Backend]]:
    for name in BACKENDS:
        if bench.wants(name):
            try:
                yield name, choose(name, device=bench.device, dtype=dtype)
            except ValueError as error:
                bench.skip(section, name, str(error).split(": ", 1)[-1].split(";")[0])
    yield from ((name, backend) for name, backend in bench.backends.items() if bench.wants(name))


def _logits_truth(student: torch.Tensor, teacher: torch.Tensor, kind: str, dtype: torch.dtype) -> list[torch.Tensor]:
    """Loss [n] and gradient [n, V] by autograd over the reference, the gradient rounded as the provider's has to be."""
    wide = student.to(dtype).requires_grad_()
    loss = getattr(reference, kind)(wide, teacher.to(dtype))
    (gradient,) = torch.autograd.grad(loss.sum(), wide)
    return [loss.detach(), gradient if dtype is torch.float64 else gradient.to(student.dtype)]


def _worst_error(values: list[torch.Tensor], truth: list[torch.Tensor]) -> float:
    """Largest relative error of loss and gradients."""
    errors = [(x.double() - y).norm() / y.norm() for x, y in zip(values, truth, strict=True)]
    return float(torch.stack(errors).max())  # NaN stays NaN


def _allowance(usual: list[torch.Tensor], truth: list[torch.Tensor], dtype: torch.dtype) -> float:
    return max(1.1 * _worst_error(usual, truth), torch.finfo(torch.float32).eps if dtype is torch.float32 else 0)


def run_hidden(bench: Bench, shapes: list[tuple[int, int, int, int]]) -> None:
    dtype = "fp32" if bench.device == "cpu" else "bf16"
    for number, shape in enumerate(shapes):
        for kind in KINDS if number == 0 or bench.device == "cuda" else KINDS[:1]:
            sizes = "T={} V={} H={}/{}".format(*shape)
            if bench.keeps(label := f"hidden {kind} {sizes} {dtype}"):
                _run_hidden_row(bench, label, kind, _hidden_operands(shape, DTYPES[dtype], bench.device), number == 0)


def _hidden_operands(shape: tuple[int, int, int, int], dtype: torch.dtype, device: str) -> tuple[torch.Tensor, ...]:
    """Hidden states and heads of both models. The student's logits have standard deviation 4; the teacher's are these
    and something of its own with standard deviation 1/2, in the dimensions that it has more."""
    num_rows, columns, student_size, teacher_size = shape
    assert teacher_size > student_size, shape
    generator = torch.Generator(device).manual_seed(num_rows + columns)
    draw = functools.partial(torch.randn, generator=generator, device=device)
    hidden, head = draw(num_rows, student_size), draw(columns, student_size) * (4 / student_size**0.5)
    own = teacher_size - student_size
    teacher_hidden = torch.cat([hidden, draw(num_rows, own)], -1)
    teacher_head = torch.cat([head, draw(columns, own) * (0.5 / own**0.5)], -1)
    return tuple(x.to(dtype) for x in (hidden, head, teacher_hidden, teacher_head))


def our_hidden_step(
    backend: str, is_packed: bool, kind: str, hidden: torch.Tensor, head: torch.Tensor, *teacher: torch.Tensor
) -> tuple:
    """The gradient of the mean, the head's into fp32 as Megatron keeps it."""
    hidden = hidden.detach().requires_grad_()
    head, head_grad = head.detach().requires_grad_(), torch.zeros(head.shape, device=head.device)
    out = linear_divergence(
        hidden,
        head,
        *teacher,
        kind=kind,
        beta=BETA,
        vocab_size=len(head),
        loss_weight=torch.full((len(hidden),), 1 / len(hidden)),
        head_grad=head_grad,
        is_packed=is_packed,
        backend=backend,
    )
    out.total.backward()
    return hidden.grad, head_grad


def _run_hidden_row(bench: Bench, label: str, kind: str, operands: tuple[torch.Tensor, ...], is_first: bool) -> None:
    hidden, head, teacher, teacher_head = operands
    num_rows, columns = len(hidden), len(head)
    is_whole = num_rows * columns <= WHOLE_ELEMENTS
    at = torch.arange(num_rows, device=hidden.device)
    at = at if is_whole else at[:: num_rows // FEW_ROWS]
    truth, usual = (_hidden_truth(operands, at, kind, dtype) for dtype in (torch.float64, torch.float32))
    compared = slice(None) if is_whole else slice(1)  # the head's gradient needs all rows
    allowed = _allowance(usual[compared], truth[compared], hidden.dtype)
    flops = 2 * num_rows * columns * (3 * hidden.shape[1] + teacher_head.shape[1])
    for name, step, is_ours in _hidden_steps(bench, kind, is_first):
        warm = functools.partial(
            _warm, name, step, lambda rows: (hidden[:rows], head, teacher[:rows], teacher_head), num_rows
        )
        keep = functools.partial(_compared, at, compared)
        kept, ms, peak = measure(bench.device, lambda i: operands, step, warm=warm, keep=keep)
        is_packed = name.endswith("packed")
        bench.add(
            Row(
                label=label,
                provider=name,
                is_ours=is_ours,
                ms=ms,
                rate=flops / ms / 1e9,
                roof_share=flops / ms / 1e9 / bench.gemm_tflops,
                peak_mb=None if peak is None else peak / 1e6,
                peak_logits=None if peak is None else peak / (num_rows * columns * hidden.element_size()),
                gradient_error=_worst_error(kept, truth[compared]),
                allowed_error=0.01 if is_packed else allowed,
                accounted_mb=_accounted_bytes(operands, is_packed) / 1e6 if is_ours else None,
            )
        )


def _compared(at: torch.Tensor, compared: slice, gradients: tuple[torch.Tensor, ...]) -> list[torch.Tensor]:
    return [gradients[0][at], gradients[1]][compared]


def _accounted_bytes(operands: tuple[torch.Tensor, ...], is_packed: bool) -> float:
    """fp32 gradients of hidden states and head, one chunk pair of fp32 logits, half of it again in fp16 when packed."""
    hidden, head = operands[:2]
    kind = "cpu" if hidden.device.type == "cpu" else "cuda"
    fewest, most = CHUNK_ROWS[kind]
    rows = min(max(fewest, CHUNK_BYTES[kind] // (4 * len(head))), most, len(hidden))
    return 4 * (hidden.numel() + head.numel()) + (12 if is_packed else 8) * rows * len(head)


def _hidden_steps(bench: Bench, kind: str, is_first: bool) -> Iterator[tuple[str, peers.HiddenStep, bool]]:
    """All providers at the first shape; on a CPU the larger ones are there for memory, by the fastest backend."""
    is_all = is_first or bench.device == "cuda"
    if is_all:
        yield from _peers(bench, "hidden", peers.hidden_peers(bench.device, kind))
    ours = [name for name, backend in _our_backends(bench, torch.float32, "hidden") if name in BACKENDS]
    for name in ours if is_all else ours[:1]:
        yield name, functools.partial(our_hidden_step, name, False, kind), True
    if ours and is_all:
        yield f"{ours[0]}-packed", functools.partial(our_hidden_step, ours[0], True, kind), True


def _hidden_truth(operands: tuple[torch.Tensor, ...], at: torch.Tensor, kind: str, dtype: torch.dtype) -> list[torch.Tensor]:
    """Gradient of the mean over all rows: of hidden states at rows `at`, and what those rows give the head."""
    hidden, head, teacher_hidden, teacher_head = (x.to(dtype) for x in operands)
    grad_head, grad_hidden = torch.zeros_like(head), []
    for rows in at.split(256):
        chunk = hidden[rows].requires_grad_()
        student = chunk @ head.T
        loss = getattr(reference, kind)(student, teacher_hidden[rows] @ teacher_head.T).sum() / len(hidden)
        (grad_logits,) = torch.autograd.grad(loss, student)
        if dtype is torch.float32:
            grad_logits = grad_logits.to(operands[0].dtype).float()  # half precision multiplies half precision
        grad_hidden.append(grad_logits @ head)
        grad_head += grad_logits.T @ hidden[rows]
    grad_hidden = torch.cat(grad_hidden)
    return [grad_hidden if dtype is torch.float64 else grad_hidden.to(operands[0].dtype), grad_head]


def run_numerics(bench: Bench, shape: tuple[int, int, int]) -> None:
    """Teachers are the student with its hidden states nudged until the mean reverse KL is about the wished one."""
    num_rows, columns, size = shape
    generator = torch.Generator(bench.device).manual_seed(size)
    draw = functools.partial(torch.randn, generator=generator, device=bench.device)
    hidden, nudge = draw(num_rows, size).bfloat16(), draw(num_rows, size)
    head = (draw(columns, size) * (8 / size**0.5)).bfloat16()
    for wished in NUMERICS_KL:
        label = f"numerics reverse_kl T={num_rows} V={columns} H={size} KL={wished:.0e}"
        if not bench.keeps(label):
            continue
        step = 0.01
        for _ in range(2):  # near agreement the divergence grows with the square of the step
            teacher = hidden.float() + step * nudge
            step *= (wished / _mean_kl(hidden, head, teacher)) ** 0.5
        operands = hidden.float(), head.float(), hidden.float() + step * nudge, head.float()
        every = torch.arange(num_rows, device=bench.device)
        truth, usual = (_hidden_truth(operands, every, "reverse_kl", x)[1] for x in (torch.float64, torch.float32))
        results = {"bf16-logits": _bf16_logits_gradient(operands), "fp32-logits": usual}
        for name, _ in _our_backends(bench, torch.float32, "numerics"):
            if name in BACKENDS:
                results[name] = our_hidden_step(name, False, "reverse_kl", *operands)[1]
                results[f"{name}-packed"] = our_hidden_step(name, True, "reverse_kl", *operands)[1]
        allowed = max(1.1 * _worst_error([usual], [truth]), torch.finfo(torch.float32).eps)
        for name, head_grad in results.items():
            limit = {"bf16-logits": None, "fp32-logits": None}.get(name, 0.01 if name.endswith("packed") else allowed)
            _report_numerics(bench, label, name, _worst_error([head_grad], [truth]), limit)


def _report_numerics(bench: Bench, label: str, name: str, error: float, limit: float | None) -> None:
    is_wrong = limit is not None and not error <= limit
    print(f"{label:50} {name:12} | head gradient error {100 * error:9.4f} %{' | WRONG' if is_wrong else ''}", flush=True)
    nothing = {"ms": math.nan, "rate": math.nan, "roof_share": math.nan, "peak_mb": None, "peak_logits": None}
    is_ours = limit is not None
    bench.rows.append(Row(label=label, provider=name, is_ours=is_ours, gradient_error=error, allowed_error=limit, **nothing))
    if is_wrong:
        bench.problems.append(f"{label} {name}: gradient error {error:.2e}, allowed {limit:.2e}")


def _mean_kl(hidden: torch.Tensor, head: torch.Tensor, teacher_hidden: torch.Tensor) -> float:
    head = head.double()
    return reference.reverse_kl(hidden.double() @ head.T, teacher_hidden.double() @ head.T).mean().item()


def _bf16_logits_gradient(operands: tuple[torch.Tensor, ...]) -> torch.Tensor:
    """The head's gradient [V, H] as it usually comes about: logits stored as bf16, statistics in fp32, gradient bf16."""
    hidden, head, teacher_hidden, teacher_head = operands
    student = (hidden @ head.T).bfloat16().requires_grad_()
    loss = peers.row_loss(student, (teacher_hidden @ teacher_head.T).bfloat16(), "reverse_kl").mean()
    (grad_logits,) = torch.autograd.grad(loss, student)
    return grad_logits.float().T @ hidden


def main(arguments: list[str] | None = None, *, backends: Mapping[str, Backend] | None = None) -> None:
    """`backends` are measured and judged on the logits path like our own, under the names they are given here."""
    options = _options(arguments)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.set_num_threads(options.threads)
    bench = Bench(device, options.rows, options.providers, backends or {})
    header = _header(device)
    print(" | ".join(str(x) for x in header.values()), flush=True)
    measure_roof(bench)
    shapes = options.shapes
    run_logits(bench, LOGITS_SHAPES[device] if shapes is None else [s for s in shapes if len(s) == 2])
    run_hidden(bench, HIDDEN_SHAPES[device] if shapes is None else [s for s in shapes if len(s) == 4])
    for shape in [NUMERICS_SHAPE] if shapes is None else [s for s in shapes if len(s) == 3]:
        run_numerics(bench, shape)
    peers.leave_world()
    if options.json is not None:
        roof = {"copy_gbps": bench.copy_gbps, "gemm_tflops": bench.gemm_tflops}
        rows = [{key: value for key, value in asdict(row).items() if value == value} for row in bench.rows]
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps({**header, "roof": roof, "rows": rows}, indent=1) + "\n")
    for problem in bench.problems:
        print(f"FAILED {problem}")
    if not bench.rows:
        print("FAILED nothing was measured: no row has all words of --rows, or no provider of --providers can run")
    if bench.problems or not bench.rows:
        raise SystemExit(1)


def _header(device: str) -> dict[str, str | int]:
    git = functools.partial(subprocess.run, cwd=ROOT, capture_output=True, text=True)
    commit = git(["git", "rev-parse", "--short", "HEAD"]).stdout.strip() or "unknown"
    is_dirty = bool(git(["git", "status", "--porcelain", "--untracked-files=no"]).stdout.strip())
    return {
        "device": torch.cuda.get_device_name() if device == "cuda" else _processor(),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "commit": commit + ("+changes" if is_dirty else ""),
    }


def _processor() -> str:
    """Model and widest vector unit of the CPU."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    model = next((x.split(": ")[1] for x in lines if x.startswith("model name")), platform.machine())
    flags = next((x for x in lines if x.startswith("flags")), "")
    return f"{model} ({next((x for x in ('avx512f', 'avx2', 'sse2') if x in flags), 'no vector unit known')})"


def _options(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shapes", nargs="+", type=_shape, help="TxV, TxVxH or TxVxHsxHt; instead of the default ones")
    parser.add_argument("--providers", nargs="+", help="names as printed; all by default")
    parser.add_argument("--rows", nargs="+", default=[], metavar="WORD", help="rows whose label contains each WORD")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads (1)")
    parser.add_argument("--json", type=Path, help="file to write the figures to")
    return parser.parse_args(arguments)


def _shape(text: str) -> tuple[int, ...]:
    sizes = text.split("x")
    if not 2 <= len(sizes) <= 4 or not all(x.isdecimal() and int(x) for x in sizes):
        raise argparse.ArgumentTypeError(f"{text!r} is no TxV, TxVxH or TxVxHsxHt of positive numbers")
    if len(sizes) == 4 and int(sizes[3]) <= int(sizes[2]):
        raise argparse.ArgumentTypeError(f"{text!r}: the teacher's hidden size must be above the student's")
    return tuple(int(x) for x in sizes)


if __name__ == "__main__":
    main()
