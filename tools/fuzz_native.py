"""Random chunks of logits for the compiled CPU kernels under AddressSanitizer and UBSan: `python tools/fuzz_native.py`.

    python tools/fuzz_native.py --seconds 600 --seed 0        # then again with the seed and --case it names on failure

Builds the sources of `megatron_tcod._C` with both sanitizers into a temporary folder (g++ or $CXX), runs itself again
with their runtime loaded, and calls the three kernels on random shapes, strides, dtypes, kinds, thread counts,
instruction sets and values, NaN and infinities included, in storages that end with the last element. Results are
compared with the torch backend: with its float64 values, as far as its fp32 values agree with them.

Exits 1 on a difference; a sanitizer's report ends it too. Not here: the CUDA kernels (compute-sanitizer does that).
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import shlex
import subprocess
import sys
import sysconfig
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
SANITIZE = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-fno-omit-frame-pointer"]
OPTIONS = {"ASAN_OPTIONS": "detect_leaks=0:abort_on_error=0", "UBSAN_OPTIONS": "print_stacktrace=1"}
MODULE = "TCOD_FUZZ_MODULE"
"""Environment variable by which the second run knows the module of the first."""


def build(directory: Path) -> Path:
    """The module with sanitizers, in `directory`."""
    import pybind11

    compiler = shlex.split(os.environ.get("CXX", "g++"))
    include = [ROOT / "csrc", ROOT / "csrc" / "include", pybind11.get_include(), sysconfig.get_path("include")]
    flags = ["-std=c++17", "-O1", "-g1", "-fPIC", "-fopenmp", "-ffp-contract=off", "-Wno-psabi", *SANITIZE]
    sources = [ROOT / "csrc" / "bind_cpu.cpp", *sorted((ROOT / "csrc" / "cpu").glob("*.cpp"))]
    module = directory / f"_C{sysconfig.get_config_var('EXT_SUFFIX')}"
    command = [*compiler, *flags, *(f"-I{path}" for path in include), "-shared", *map(str, sources), "-o", str(module)]
    print("+", shlex.join(command), flush=True)
    subprocess.run(command, check=True)
    return module


def run_with_sanitizers(module: Path, arguments: list[str]) -> int:
    """This script again, with what the sanitizers must load before Python does."""
    compiler = shlex.split(os.environ.get("CXX", "g++"))
    libraries = [
        subprocess.run([*compiler, f"-print-file-name={name}"], check=True, capture_output=True, text=True).stdout.strip()
        for name in ("libasan.so", "libubsan.so", "libstdc++.so.6")
    ]
    environment = os.environ | OPTIONS | {"LD_PRELOAD": " ".join(libraries), MODULE: str(module)}
    return subprocess.run([sys.executable, __file__, *arguments], env=environment).returncode


@dataclass
class Case:
    """One call of each kernel."""

    student: torch.Tensor  # [C, columns]
    teacher: torch.Tensor | None
    column: torch.Tensor | None
    row_scale: torch.Tensor
    kind: str
    beta: float
    scales: dict[str, float]
    out: torch.Tensor
    is_packed: bool
    num_threads: int
    isa: str

    def __str__(self) -> str:
        shape, dtype = list(self.student.shape), self.student.dtype
        teacher = "no teacher" if self.teacher is None else f"teacher strides {self.teacher.stride()}"
        return (
            f"{self.kind} {shape} {dtype} strides {self.student.stride()}, {teacher}, out {self.out.dtype} "
            f"{'in place' if self.out is self.student else self.out.stride()}, beta {self.beta:.3f}, {self.scales}, "
            f"packed {self.is_packed}, {self.num_threads} threads, {self.isa}"
        )


def draw_case(generator: torch.Generator) -> Case:
    def integer(low: int, high: int) -> int:
        return int(torch.randint(low, high, (), generator=generator))

    def choice(*values):
        return values[integer(0, len(values))]

    rows = choice(0, 1, 1, 2, 3, 5)
    columns = choice(0, 1, integer(1, 80), integer(80, 600), integer(2040, 2060), integer(1, 10_000))
    dtype = choice(torch.float32, torch.bfloat16, torch.float16)
    std, gap = choice(0.0, 1.0, 4.0, 15.0), choice(None, None, 1.0, 0.3, 0.02, 1e-4, 0.0)
    student = std * torch.randn(rows, columns, generator=generator)
    noise = torch.randn(rows, columns, generator=generator)
    teacher = 4 * noise if gap is None else student + gap * noise
    if integer(0, 4) == 0:
        slope = torch.linspace(0, choice(-300.0, 50.0, 90.0), columns)
        student, teacher = student + slope, teacher + choice(slope, -slope, 0)
    for logits in (student, teacher):
        _put_special_values(logits, integer, choice)
    kind = choice("reverse_kl", "forward_kl", "jsd", "nll")
    student, teacher = (_place(logits.to(dtype), integer(0, 3), choice(0, 0, 1, 7, 64)) for logits in (student, teacher))
    out_dtype = choice(dtype, dtype, torch.float32, torch.bfloat16, torch.float16)
    row_scale = torch.randn(rows, generator=generator)
    row_scale[torch.rand(rows, generator=generator) < 0.2] = 0
    is_possible = columns > 0
    column = torch.randint(-1, columns, (rows,), generator=generator) if is_possible else torch.full((rows,), -1)
    has_teacher = kind != "nll" or integer(0, 2) == 0
    return Case(
        student=student,
        teacher=teacher if has_teacher else None,
        column=column if kind == "nll" or integer(0, 2) else None,
        row_scale=row_scale,
        kind=kind,
        beta=choice(0.5, 0.1, 0.9, 0.01, 0.999),
        scales={"student_scale": choice(1.0, 1.0, 0.5, 2.0, 0.7), "teacher_scale": choice(1.0, 1.0, 0.5, 2.0, 1.3)},
        out=student if integer(0, 2) else _place(torch.zeros(rows, columns, dtype=out_dtype), integer(0, 3), choice(0, 5)),
        is_packed=has_teacher and integer(0, 4) == 0,
        num_threads=integer(1, 4),
        isa=choice(*native.load("_C").isas()),
    )


def _put_special_values(logits: torch.Tensor, integer, choice) -> None:
    """Now and then something that is no ordinary logit, in a few places or in a whole row."""
    rows, columns = logits.shape
    while rows and columns and integer(0, 2):
        value = choice(-torch.inf, -torch.inf, -1e4, 1e4, 0.0, 1e-40, torch.nan, torch.inf, 3e38, -3e38)
        row, first = integer(0, rows), integer(0, columns)
        is_wide = value <= 0 and integer(0, 2)
        logits[row, first : integer(first, columns) + 1 if is_wide else first + 1] = value


def _place(logits: torch.Tensor, skip: int, pad: int) -> torch.Tensor:
    """A copy in memory that ends with its last element, `pad` elements between rows, `skip` before the first."""
    rows, columns = logits.shape
    size = skip + (rows - 1) * (columns + pad) + columns if rows else skip
    storage = torch.full((size,), torch.nan, dtype=logits.dtype)
    return storage.as_strided((rows, columns), (columns + pad, 1), skip).copy_(logits)


def run_case(case: Case) -> None:
    """Calls every kernel; raises AssertionError on a difference."""
    native.load("_C").select_isa(case.isa)
    torch.set_num_threads(case.num_threads)
    student, teacher, scales = case.student.clone(), None if case.teacher is None else case.teacher.clone(), case.scales
    packed = torch.empty(2, *student.shape, dtype=torch.float16) if case.is_packed else None
    sums = cpp_chunk.partial_sums(case.student, case.teacher, case.column, **scales, packed=packed)
    exact, usual = (
        logits_chunk.partial_sums(student.to(dtype), None if teacher is None else teacher.to(dtype), case.column, **scales)
        for dtype in (torch.float64, torch.float32)
    )
    is_comparable = _comparable_rows(student, teacher, scales)
    _compare_sums(sums, exact, usual, is_comparable)

    table = MergedSums.merge(exact[None]).table()
    pair, wide_pair = (case.student, case.teacher), (student, teacher)
    settings = scales
    if case.is_packed:
        pair, settings = (packed[0], packed[1]), {"student_scale": 1.0, "teacher_scale": 1.0}
        wide_pair = (packed[0].clone(), packed[1].clone())
    if case.kind == "jsd":
        arguments = {"beta": case.beta, "is_packed": case.is_packed, **settings}
        mixture = cpp_chunk.mixture_sums(*pair, table, **arguments)
        truths = [_wide(logits_chunk.mixture_sums, wide_pair, table, dtype, **arguments) for dtype in DTYPES]
        _compare("mixture_sums", mixture.T, truths[0].T, truths[1].T, is_comparable, slack=1e-5)
        table[CENTRE] = truths[0][0]
    out = case.out
    if case.is_packed:
        out = packed[0] if out is case.student else out
    arguments = {"kind": case.kind, "beta": case.beta, "is_packed": case.is_packed, **settings}
    truths = []
    for dtype in DTYPES:
        truths.append(torch.empty(student.shape, dtype=dtype))
        _wide(
            logits_chunk.logits_gradient, wide_pair, table, dtype, case.row_scale.to(dtype), case.column,
            out=truths[-1], **arguments,
        )  # fmt: skip
    cpp_chunk.logits_gradient(*pair, table, case.row_scale, case.column, out=out, **arguments)
    centre = table[CENTRE].abs().nan_to_num(0, 0, 0)
    slack = 2e-6 * (1 + centre) * case.row_scale.abs().double()
    unit = {torch.float32: 1e-5, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-10}[out.dtype]
    truths = [truth.to(out.dtype).to(truth.dtype) if out.dtype == torch.float16 else truth for truth in truths]
    _compare("logits_gradient", out, *truths, is_comparable, slack=slack[:, None] + 1e-7, relative=unit)
    is_idle = case.row_scale == 0
    assert (out[is_idle] == 0).all(), "a row of weight zero is not zero"
    if out is not case.student and not case.is_packed:
        assert torch.equal(case.student.nan_to_num(7), student.nan_to_num(7)), "the student's logits were changed"
    if teacher is not None:
        assert torch.equal(case.teacher.nan_to_num(7), teacher.nan_to_num(7)), "the teacher's logits were changed"


def _wide(function, pair, table, dtype, *arguments, is_packed: bool, **settings):
    """The torch backend in `dtype`; it takes packed logits as fp16 alone, so a wide pair is unpacked for it."""
    student, teacher = (None if logits is None else logits.to(dtype) for logits in pair)
    if is_packed:
        teacher = student - teacher
    return function(student, teacher, table, *arguments, **settings)


def _comparable_rows(student: torch.Tensor, teacher: torch.Tensor | None, scales: dict[str, float]) -> torch.Tensor:
    """[C] rows whose fp32 and float64 values mean the same: no overflow, no weight at the end of the fp32 range."""
    models = [student.float() * scales["student_scale"]]
    if teacher is not None:
        models.append(teacher.float() * scales["teacher_scale"])
    is_comparable = torch.ones(len(student), dtype=torch.bool)
    if not student.shape[1]:
        return is_comparable
    for logits, other in zip(models, reversed(models), strict=True):
        finite = logits.masked_fill(~logits.isfinite(), 0)
        is_comparable &= (finite.abs() < 3e4).all(-1)
        shifted = logits - logits.amax(-1, keepdim=True)
        is_comparable &= ~((shifted < -80) & (shifted > -1000) & (other == -torch.inf)).any(-1)
    return is_comparable


def _compare_sums(sums: torch.Tensor, exact: torch.Tensor, usual: torch.Tensor, is_comparable: torch.Tensor) -> None:
    """What is made of the sums, because a row with a NaN may have any sums that say so."""
    values = [torch.stack([*_merged_values(part)]).T for part in (sums, exact, usual)]  # [C, values]
    magnitude = sum(part[[0, 4] if len(part) > 4 else [0]].abs().nan_to_num(0, 0, 0).sum(0) for part in (exact,))
    _compare("partial_sums", *values, is_comparable, slack=1e-5 + 1e-6 * magnitude[:, None])


def _merged_values(sums: torch.Tensor) -> list[torch.Tensor]:
    merged = MergedSums.merge(sums[None])
    values = [merged.student.entropy, merged.student.logprob, merged.student.log_total]
    if merged.teacher is not None:
        values += [merged.teacher.entropy, merged.teacher.logprob, merged.reverse_kl, merged.forward_kl]
    return values


def _compare(name, value, exact, usual, is_comparable, *, slack, relative: float = 1e-5) -> None:
    """[C, n] each. Where fp32 and float64 disagree on what is finite, anything goes; else within ten times their gap."""
    value, exact, usual = (tensor.double() for tensor in (value, exact, usual))
    is_settled = is_comparable[:, None] & (exact.isfinite() == usual.isfinite()) & (exact.isnan() == usual.isnan())
    is_number = exact.isfinite()
    is_lost = (value == 0) & ~value.isfinite().all(-1, keepdim=True)  # beside others, a weight may count as zero earlier
    is_same_kind = torch.where(is_number, value.isfinite(), (value == exact) | (value.isnan() & exact.isnan()) | is_lost)
    assert (is_same_kind | ~is_settled).all(), _first(name, ~is_same_kind & is_settled, value, exact, usual)
    gap = (usual - exact).abs().masked_fill(~is_number | ~is_settled, 0)
    row_gap = gap.amax(-1, keepdim=True) if gap.shape[-1] else gap
    bound = 10 * row_gap + relative * exact.abs() + slack
    is_close = (value - exact).abs() <= bound
    assert (is_close | ~is_number | ~is_settled).all(), _first(name, ~is_close & is_number & is_settled, value, exact, usual)


def _first(name: str, where: torch.Tensor, *tensors: torch.Tensor) -> str:
    row, place = where.nonzero()[0].tolist()
    got, exact, usual = (tensor[row, place].item() for tensor in tensors)
    return f"{name} row {row} place {place}: got {got}, float64 {exact}, fp32 {usual}; {int(where.sum())} such places"


def fuzz(seconds: float, seed: int, only: int | None) -> int:
    deadline, index = time.monotonic() + seconds, 0 if only is None else only
    started = time.monotonic()
    while time.monotonic() < deadline:
        case = draw_case(torch.Generator().manual_seed(seed * 1_000_003 + index))
        description = str(case)
        try:
            run_case(case)
        except AssertionError as difference:
            print(f"case {index} of seed {seed}: {description}\n{difference}", file=sys.stderr)
            return 1
        index += 1
        if only is not None:
            break
    print(f"{index if only is None else 1} cases of seed {seed} in {time.monotonic() - started:.0f} s, no difference")
    return 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=600.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--case", type=int, help="run this case of the seed alone")
    options = parser.parse_args()
    if MODULE in os.environ:
        return fuzz(options.seconds, options.seed, options.case)
    with tempfile.TemporaryDirectory() as directory:
        return run_with_sanitizers(build(Path(directory)), sys.argv[1:])


if MODULE in os.environ:
    import torch

    specification = importlib.util.spec_from_file_location("megatron_tcod._C", os.environ[MODULE])
    sys.modules[specification.name] = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(sys.modules[specification.name])

    from megatron_tcod.ops import cpp_chunk, logits_chunk, native
    from megatron_tcod.ops.shard_sums import CENTRE, MergedSums

    DTYPES = (torch.float64, torch.float32)


if __name__ == "__main__":
    raise SystemExit(main())
