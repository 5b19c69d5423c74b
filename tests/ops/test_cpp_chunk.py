"""The compiled CPU backend: the contract's cases on every instruction set, and what only compiled code can get wrong."""

import math
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from chunk_cases import CASES, bad_arguments, good_arguments
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_tcod.ops import cpp_chunk, logits_chunk, native, reference
from megatron_tcod.ops.divergence import KINDS, linear_divergence
from megatron_tcod.ops.shard_sums import CENTRE, MergedSums

ROOT = Path(__file__).parents[2]
KERNELS = native.load("_C")
EPS = torch.finfo(torch.float32).eps
SCALES = {"student_scale": 1.0, "teacher_scale": 1.0}


@pytest.fixture(params=KERNELS.isas())
def isa(request) -> str:
    """Each instruction set that this machine runs, one after the other."""
    usual = KERNELS.isa()
    KERNELS.select_isa(request.param)
    yield request.param
    KERNELS.select_isa(usual)


@pytest.fixture
def threads():
    usual = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(usual)


def _pair(rows: int, columns: int, *, dtype=torch.float32, std=4.0, gap=None, seed=0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed + rows * 7919 + columns)
    student = std * torch.randn(rows, columns, generator=generator)
    noise = torch.randn(rows, columns, generator=generator)
    return student.to(dtype), (std * noise if gap is None else student + gap * noise).to(dtype)


def _everything(backend, student, teacher, *, kind, beta=0.5, scales=SCALES, row_scale=None, out_dtype=None):
    """Sums, mixture sums (JSD alone) and gradient of one chunk; float64 logits go to the torch backend."""
    rows = student.shape[0]
    column = torch.arange(rows) * 101 % student.shape[1]
    partial = backend.partial_sums(student, teacher, column, **scales)
    sums = MergedSums.merge(partial[None])
    table, mixture = sums.table(), None
    if kind == "jsd":
        mixture = backend.mixture_sums(student, teacher, table, beta=beta, **scales)
        table[CENTRE] = mixture[0]
    wide = torch.float64 if student.dtype == torch.float64 else torch.float32
    out = torch.empty(student.shape, dtype=out_dtype or wide)
    backend.logits_gradient(
        student,
        None if kind == "nll" else teacher,
        table,
        torch.linspace(0.2, 1, rows, dtype=wide) if row_scale is None else row_scale.to(wide),
        column if kind == "nll" else None,
        kind=kind,
        beta=beta,
        out=out,
        **scales,
    )
    return sums, mixture, out


def _error(value: torch.Tensor, truth: torch.Tensor) -> float:
    return ((value.double() - truth).norm() / truth.norm().clamp(min=1e-300)).item()


def _assert_no_worse(name: str, value: torch.Tensor, usual: torch.Tensor, truth: torch.Tensor, allowance=4 * EPS) -> None:
    bound = max(1.1 * _error(usual, truth), allowance)
    assert _error(value, truth) <= bound, (name, _error(value, truth), bound)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.__name__)
def test_contract_of_a_backend(case, isa: str):
    case(cpp_chunk, "cpu")


def _rounded_centre(kind: str, student: torch.Tensor, scales: dict, sums: MergedSums, mixture, truth: torch.Tensor) -> float:
    """What one fp32 rounding of the centre does to the gradient p_S (log ratio - centre), relative to the gradient.

    Where one token has nearly all the mass, the ratio nearly equals the centre and little but that rounding is left.
    """
    centre = {"reverse_kl": sums.reverse_kl, "jsd": None if mixture is None else mixture[0]}.get(kind)
    if centre is None:
        return 0.0
    p_s = (student.double() * scales["student_scale"]).softmax(-1)
    return (EPS * (centre[:, None] * p_s).norm() / truth.norm()).item()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("gap", [None, 0.3, 0.02], ids=["far", "near", "converged"])
@pytest.mark.parametrize("rows, columns", [(32, 507), (6, 32000)])
def test_error_is_no_larger_than_that_of_the_fp32_torch_backend(kind: str, gap: float | None, rows: int, columns: int, isa):
    for dtype, beta, temperatures in [
        (torch.float32, 0.5, (1.0, 1.0)),
        (torch.float32, 0.1, (0.5, 2.0)),
        (torch.bfloat16, 0.9, (2.0, 1.0)),
        (torch.float16, 0.5, (1.0, 0.5)),
    ]:
        scales = {"student_scale": 1 / temperatures[0], "teacher_scale": 1 / temperatures[1]}
        student, teacher = _pair(rows, columns, dtype=dtype, gap=gap)
        settings = {"kind": kind, "beta": beta, "scales": scales}
        sums, mixture, gradient = _everything(cpp_chunk, student, teacher, **settings)
        usual, usual_mixture, usual_gradient = _everything(logits_chunk, student, teacher, **settings)
        truth, true_mixture, true_gradient = _everything(logits_chunk, student.double(), teacher.double(), **settings)
        for name in ("reverse_kl", "forward_kl", "top1_agreement"):
            _assert_no_worse(name, getattr(sums, name), getattr(usual, name), getattr(truth, name))
        for side in ("student", "teacher"):
            own, others, exact = (getattr(merged, side) for merged in (sums, usual, truth))
            _assert_no_worse(f"{side} entropy", own.entropy, others.entropy, exact.entropy)
            _assert_no_worse(f"{side} logprob", own.logprob, others.logprob, exact.logprob)
            _assert_no_worse(f"{side} total", own.total, others.total, exact.total)
        if mixture is not None:
            _assert_no_worse("mixture", mixture, usual_mixture, true_mixture)
        rounding = _rounded_centre(kind, student, scales, truth, true_mixture, true_gradient)
        _assert_no_worse("gradient", gradient, usual_gradient, true_gradient, allowance=4 * EPS + 2 * rounding)


@pytest.mark.parametrize("kind", ["reverse_kl", "forward_kl", "jsd"])
def test_near_agreement_the_gradient_keeps_digits_that_two_shifted_logits_lose(kind: str, isa: str):
    student, teacher = _pair(3, 2003, gap=1e-3)
    gradient, usual = (_everything(backend, student, teacher, kind=kind)[2] for backend in (cpp_chunk, logits_chunk))
    truth = _everything(logits_chunk, student.double(), teacher.double(), kind=kind)[2]
    assert _error(gradient, truth) < 1e-5 < _error(usual, truth)


@pytest.mark.parametrize("kind", KINDS)
def test_columns_of_a_padded_vocabulary(kind: str):
    """151,669 real tokens in rows of 151,936 bf16; what lies between is NaN, and stays."""
    rows = [torch.full((2, 151_936), math.nan, dtype=torch.bfloat16) for _ in range(2)]
    pair = _pair(2, 151_669, dtype=torch.bfloat16, gap=0.3)
    for padded, logits in zip(rows, pair, strict=True):
        padded[:, :151_669] = logits
    student, teacher = (padded[:, :151_669] for padded in rows)
    truth, _, true_gradient = _everything(logits_chunk, *(logits.double() for logits in pair), kind=kind)
    usual, _, usual_gradient = _everything(logits_chunk, *pair, kind=kind)
    sums, _, gradient = _everything(cpp_chunk, student, teacher, kind=kind)
    _assert_no_worse("reverse_kl", sums.reverse_kl, usual.reverse_kl, truth.reverse_kl)
    _assert_no_worse("gradient", gradient, usual_gradient, true_gradient)
    in_place = {**SCALES, "kind": kind, "beta": 0.5, "out": student}
    table = sums.table()
    if kind == "jsd":
        table[CENTRE] = cpp_chunk.mixture_sums(student, teacher, table, beta=0.5, **SCALES)[0]
    column = torch.arange(2) * 101
    cpp_chunk.logits_gradient(student, teacher, table, torch.linspace(0.2, 1, 2), column, **in_place)
    assert torch.equal(student, gradient.bfloat16()) and rows[0][:, 151_669:].isnan().all()


@pytest.mark.parametrize("std", [4.0, 15.0])
def test_kl_is_never_negative(std: float, isa: str):
    for seed, gap in enumerate([1e-2, 1e-3, 1e-4, 1e-5, 1e-6]):
        for dtype in (torch.float32, torch.bfloat16):
            student, teacher = _pair(24, 3000, dtype=dtype, std=std, gap=gap, seed=seed)
            sums = MergedSums.merge(cpp_chunk.partial_sums(student, teacher, None, **SCALES)[None])
            assert (sums.reverse_kl >= 0).all() and (sums.forward_kl >= 0).all(), gap


def test_rising_logits_move_the_sums_at_every_block(isa: str):
    """Each block brings new maxima, of one side or of both, so the running sums move dozens of times."""
    columns = 50_000
    slope = torch.linspace(0, 60, columns)
    noise = _pair(3, columns, std=1.0, gap=0.1)
    student = torch.stack([slope, slope, -slope]) + noise[0]
    teacher = torch.stack([slope, -slope, -slope]) + noise[1]
    sums, _, _ = _everything(cpp_chunk, student, teacher, kind="nll")
    usual, _, _ = _everything(logits_chunk, student, teacher, kind="nll")
    truth, _, _ = _everything(logits_chunk, student.double(), teacher.double(), kind="nll")
    for row in range(3):
        for name in ("reverse_kl", "forward_kl"):
            _assert_no_worse(name, *(getattr(merged, name)[row] for merged in (sums, usual, truth)))


@pytest.mark.parametrize("kind", KINDS)
def test_huge_logits_over_a_temperature_that_rounds_keep_their_differences(kind: str, isa: str):
    """Scaled logits are rounded once, and so is their maximum; a kernel that shifts exact products would be off by 1e-4."""
    student, teacher = _pair(8, 509, gap=0.3)
    student, teacher = student + 8192, teacher - 8192
    settings = {"kind": kind, "scales": {"student_scale": 0.7, "teacher_scale": 1.3}}
    scaled = [(logits * scale).double() for logits, scale in zip((student, teacher), (0.7, 1.3), strict=True)]
    sums, _, gradient = _everything(cpp_chunk, student, teacher, **settings)
    usual, _, usual_gradient = _everything(logits_chunk, student, teacher, **settings)
    truth, _, true_gradient = _everything(logits_chunk, *scaled, kind=kind)
    _assert_no_worse("reverse_kl", sums.reverse_kl, usual.reverse_kl, truth.reverse_kl)
    _assert_no_worse("gradient", gradient, usual_gradient, true_gradient)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", KINDS)
def test_in_place_is_out_of_place_and_idle_rows_are_zeros(kind: str, dtype: torch.dtype, isa: str):
    for columns in (507, 64, 1):
        student, teacher = _pair(4, columns, dtype=dtype, gap=0.3)
        student[1], teacher[2, 0] = math.nan, math.nan
        row_scale = torch.tensor([1.0, 0.0, 0.0, -0.5])
        _, _, apart = _everything(cpp_chunk, student, teacher, kind=kind, row_scale=row_scale, out_dtype=dtype)
        assert torch.equal(apart[1:3], torch.zeros(2, columns, dtype=dtype)) and apart.isfinite().all()
        column, table = torch.arange(4) * 101 % columns, torch.zeros(5, 4, dtype=torch.float64)
        settings = {**SCALES, "kind": kind, "beta": 0.5}
        cpp_chunk.logits_gradient(student, teacher, table, row_scale, column, out=apart, **settings)
        cpp_chunk.logits_gradient(student, teacher, table, row_scale, column, out=student, **settings)
        assert torch.equal(student, apart)


def test_exponential_is_exact_to_two_units_in_the_last_place(isa: str):
    """The gradient of nll beside the target is e^x for a table of zeros."""
    x = torch.cat([torch.linspace(-87.3, 0, 100_001), -torch.logspace(-8, 1, 10_001)])[None]  # [1, columns]
    out, table, elsewhere = torch.empty_like(x), torch.zeros(5, 1, dtype=torch.float64), torch.tensor([-1])
    settings = {**SCALES, "kind": "nll", "beta": 0.5}
    cpp_chunk.logits_gradient(x, None, table, torch.ones(1), elsewhere, out=out, **settings)
    truth = x.double().exp()
    unit = torch.finfo(torch.float32).eps * 2.0 ** truth.log2().floor()
    worst = ((out.double() - truth).abs() / unit).max().item()
    assert worst < 2, worst


def test_fp16_and_bf16_conversions_are_those_of_torch(isa: str):
    """Every fp16 and bf16 there is, and fp32 next to every rounding boundary, through the gradient of forward KL."""
    halves = torch.arange(-(2**15), 2**15, dtype=torch.int16)
    for dtype in (torch.float16, torch.bfloat16):
        every = halves.view(dtype)
        every = every[every.isfinite()][None]  # [1, columns]
        packed = torch.empty(2, *every.shape, dtype=torch.float16)
        cpp_chunk.partial_sums(every, torch.zeros_like(every), None, **SCALES, packed=packed)
        assert torch.equal(packed[0], every.half())
    for out_dtype in (torch.float16, torch.bfloat16):
        values = torch.randn(1, 4001) * torch.tensor([1e-7, 1e-4, 1.0, 1e4])[:, None]
        values = torch.cat([values, values.to(out_dtype).float() * (1 + 2.0**-9)])
        rows = len(values)
        scale, out = torch.full((rows,), 3.7), torch.empty(values.shape, dtype=out_dtype)
        wide = torch.empty_like(values)
        table = MergedSums.merge(cpp_chunk.partial_sums(values, values.roll(1, -1), None, **SCALES)[None]).table()
        for target in (wide, out):
            cpp_chunk.logits_gradient(
                values, values.roll(1, -1), table, scale, None, kind="forward_kl", beta=0.5, out=target, **SCALES
            )
        assert torch.equal(out, wide.to(out_dtype)) and out.count_nonzero() > 1000


@pytest.mark.parametrize("kind", ["reverse_kl", "jsd"])
def test_bits_do_not_depend_on_threads_rows_of_a_chunk_or_alignment(kind: str, isa: str, threads):
    for dtype in (torch.float32, torch.bfloat16):
        student, teacher = _pair(7, 5003, dtype=dtype, gap=0.3)
        row_scale = torch.linspace(0.1, 1, 7)
        threads(1)
        sums, mixture, gradient = _everything(cpp_chunk, student, teacher, kind=kind, row_scale=row_scale)
        table = sums.table()
        for count in (2, 3):
            threads(count)
            again, again_mixture, again_gradient = _everything(cpp_chunk, student, teacher, kind=kind, row_scale=row_scale)
            assert torch.equal(again.table(), table) and torch.equal(again_gradient, gradient)
            assert mixture is None or torch.equal(again_mixture, mixture)
        threads(1)
        for row in range(7):
            storage = torch.zeros(2 * 5100, dtype=dtype)
            moved = [storage[skip : skip + 5003].copy_(side[row])[None] for skip, side in ((row, student), (5090, teacher))]
            alone, _, alone_gradient = _everything(cpp_chunk, *moved, kind=kind, row_scale=row_scale[row : row + 1])
            assert torch.equal(alone.table(), table[:, row : row + 1]) and torch.equal(alone_gradient[0], gradient[row])


def test_calls_from_several_python_threads_do_not_meet():
    student, teacher = _pair(4, 5003, gap=0.3)
    expected, results = cpp_chunk.partial_sums(student, teacher, None, **SCALES), [None] * 8

    def call(index: int) -> None:
        for _ in range(5):
            results[index] = cpp_chunk.partial_sums(student, teacher, None, **SCALES)

    workers = [threading.Thread(target=call, args=(index,)) for index in range(8)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert all(torch.equal(result, expected) for result in results)


def test_the_callers_handling_of_tiny_numbers_comes_back_and_does_not_matter():
    student, teacher = _pair(2, 3000, std=15.0, gap=0.3)
    expected = cpp_chunk.partial_sums(student, teacher, None, **SCALES)
    tiny = torch.tensor(1e-40)
    assert tiny * 1 != 0, "the kernel left denormal numbers switched off"
    if torch.set_flush_denormal(True):
        try:
            assert torch.equal(cpp_chunk.partial_sums(student, teacher, None, **SCALES), expected)
            assert tiny * 1 == 0, "the kernel left denormal numbers switched on"
        finally:
            torch.set_flush_denormal(False)


class _Births(TorchDispatchMode):
    """Bytes of the largest tensor that an operation made."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor) and not any(result is arg for arg in args):
            self.bytes = max(self.bytes, result.untyped_storage().nbytes())
        return result


def test_nothing_of_the_chunks_size_is_made():
    student, teacher = _pair(16, 32000, dtype=torch.bfloat16, gap=0.3)
    size, scale = student.numel() * student.element_size(), torch.ones(16)
    with _Births() as births:
        table = MergedSums.merge(cpp_chunk.partial_sums(student, teacher, None, **SCALES)[None]).table()
        settings = {**SCALES, "kind": "reverse_kl", "beta": 0.5}
        cpp_chunk.logits_gradient(student, teacher, table, scale, None, out=student, **settings)
    assert 0 < births.bytes < size / 100


@pytest.mark.parametrize("kind", KINDS)
def test_divergence_from_hidden_states_with_this_backend(kind: str):
    generator = torch.Generator().manual_seed(1)
    hidden, head, teacher_hidden, teacher_head = (
        torch.randn(shape, generator=generator, dtype=torch.float64) for shape in ((9, 24), (640, 24), (9, 40), (640, 40))
    )
    target_ids = torch.arange(9) * 50
    student, teacher = ((a @ b.T)[:, :507] for a, b in ((hidden, head), (teacher_hidden, teacher_head)))
    expected = {
        "reverse_kl": reference.reverse_kl(student, teacher),
        "forward_kl": reference.forward_kl(student, teacher),
        "jsd": reference.jsd(student, teacher),
        "nll": -reference.logprob(student, target_ids),
    }[kind]
    out = linear_divergence(
        *(tensor.float() for tensor in (hidden, head, teacher_hidden, teacher_head)),
        kind=kind,
        vocab_size=507,
        target_ids=target_ids,
        backend="cpp",
    )
    assert _error(out.loss, expected) < 1e-5


@pytest.mark.parametrize("change, message", list(bad_arguments("cpu")))
def test_bad_arguments_are_refused_before_a_kernel_starts(change: dict, message: str):
    arguments = good_arguments("cpu")
    before = arguments["student"].clone()
    with pytest.raises(ValueError, match=message):
        cpp_chunk.logits_gradient(**arguments | change)
    assert torch.equal(arguments["student"], before)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"column": torch.tensor([0, 1, 64, 3])}, r"column\[2\] must be -1 or in \[0, 64\), .* got 64; use -1"),
        ({"column": torch.tensor([0, 1, 2, -2])}, r"column\[3\] must be .* got -2"),
        ({"column": torch.arange(8)[::2]}, "column must have stride 1, got 2; call .contiguous"),
        ({"row_scale": torch.ones(4, dtype=torch.float64)}, "row_scale must be float32"),
        ({"student": torch.zeros(4, 64, device="meta")}, "student must be on cpu, got meta"),
        ({"student": torch.zeros(2, 2, 64)}, r"student must be \[C, columns\], got \[2, 2, 64\]"),
        ({"student": torch.zeros(4, 64, dtype=torch.int64)}, "student must be float32, bfloat16 or float16, got int64"),
        ({"teacher": torch.zeros(64).expand(4, 64)}, "teacher must have rows at least 64 elements apart, got stride 0"),
        ({"teacher": torch.zeros(300).as_strided((4, 64), (63, 1))}, "got stride 63, so rows share memory"),
        ({"rows_table": torch.zeros(4, 5, dtype=torch.float64).T}, "rows_table must have last stride 1"),
        ({"out": torch.zeros(4, 64, dtype=torch.float64)}, "out must be float32, bfloat16 or float16"),
        ({"teacher_scale": math.inf}, "teacher_scale must be positive and finite, got inf"),
    ],
)  # fmt: skip
def test_what_only_memory_could_tell_is_refused_too(change: dict, message: str):
    with pytest.raises(ValueError, match=message):
        cpp_chunk.logits_gradient(**good_arguments("cpu") | change)


def test_output_that_overlaps_an_input_is_refused_and_one_between_its_rows_is_not():
    storage = torch.randn(10, 64)
    student, teacher = storage[0:8:2], torch.randn(4, 64)
    good = good_arguments("cpu") | {"student": student, "teacher": teacher}
    expected = torch.empty(4, 64)
    cpp_chunk.logits_gradient(**good | {"out": expected})
    between = storage[1:9:2]
    cpp_chunk.logits_gradient(**good | {"out": between})
    assert torch.equal(between, expected)
    for out in (storage[2:10:2], storage.view(-1)[32:].as_strided((4, 64), (128, 1), 32), storage[0:4]):
        with pytest.raises(ValueError, match="out overlaps student in memory; pass the same tensor"):
            cpp_chunk.logits_gradient(**good | {"out": out})
    packed = torch.empty(2, 4, 64, dtype=torch.float16)
    with pytest.raises(ValueError, match=r"packed must be float16 \[2, 4, 64\]"):
        cpp_chunk.partial_sums(student, teacher, None, **SCALES, packed=packed[:, :3])
    with pytest.raises(ValueError, match="packed needs a teacher"):
        cpp_chunk.partial_sums(student, None, None, **SCALES, packed=packed)
    halves = packed[0].fill_(0)
    with pytest.raises(ValueError, match="packed overlaps student"):
        cpp_chunk.partial_sums(halves, torch.zeros_like(halves), None, **SCALES, packed=packed)


def test_unknown_instruction_set_is_refused():
    with pytest.raises(ValueError, match="instruction set 'mmx' is unknown or not on this machine; it runs .*portable"):
        KERNELS.select_isa("mmx")


@pytest.mark.slow
def test_fuzzing_under_sanitizers_finds_nothing():
    command = [sys.executable, str(ROOT / "tools" / "fuzz_native.py"), "--seconds", "20"]
    run = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0 and "no difference" in run.stdout, run.stdout[-500:] + run.stderr[-3000:]
