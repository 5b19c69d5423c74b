"""What every backend of a chunk of logits must do, as functions of (backend, device): CASES, to be parametrised over.

    @pytest.mark.parametrize("case", CASES, ids=lambda case: case.__name__)
    def test_backend(case):
        case(triton_chunk, "cuda")

The truth is float64: `ops/reference.py` with derivatives by autograd, from the very logits that the backend gets, and
the torch backend in float64 for values that the reference cannot have. The yardstick is the error that an ordinary fp32
computation makes on the same logits. Rows are few and short so that interpreted kernels take seconds.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from types import ModuleType

import torch

from megatron_tcod.ops import logits_chunk, reference
from megatron_tcod.ops.divergence import KINDS
from megatron_tcod.ops.shard_sums import CENTRE, MergedSums

EPS = torch.finfo(torch.float32).eps

HARDWARE = 2.0**-22
"""What a device's exponential and logarithm may be off (PTX ISA), for a row whose weights add up to one."""


def draw(
    rows: int, columns: int, *, dtype: torch.dtype, device: str, gap: float | None, pad: int = 0, skip: int = 0, std=4.0
) -> tuple[torch.Tensor, torch.Tensor]:
    """Student's and teacher's logits [rows, columns], `pad` elements between rows, the first `skip` elements in."""
    generator = torch.Generator().manual_seed(rows * 7919 + columns)
    student = std * torch.randn(rows, columns, generator=generator, dtype=torch.float64)
    student[torch.arange(rows), torch.arange(rows) * 37 % columns] += 3 * std  # a language model's rows have a peak
    noise = torch.randn(rows, columns, generator=generator, dtype=torch.float64)
    teacher = std * noise if gap is None else student + gap * noise + 0.5
    return tuple(_place(logits.to(dtype), device, pad, skip) for logits in (student, teacher))


def _place(logits: torch.Tensor, device: str, pad: int, skip: int) -> torch.Tensor:
    rows, columns = logits.shape
    storage = torch.full((skip + rows * (columns + pad),), math.nan, dtype=logits.dtype, device=device)
    view = storage.as_strided((rows, columns), (columns + pad, 1), skip)
    return view.copy_(logits)


def targets(rows: int, columns: int, device: str) -> torch.Tensor:
    """A column for each row, the last row's elsewhere."""
    column = torch.arange(rows) * 101 % columns
    column[-1] = -1
    return column.to(device)


def _loss(kind: str, student: torch.Tensor, teacher: torch.Tensor, column: torch.Tensor, beta: float) -> torch.Tensor:
    """[C] of logits that are over their temperatures already."""
    if kind == "jsd":
        return reference.jsd(student, teacher, beta=beta)
    if kind == "nll":
        return -reference.logprob(student, column.clamp(min=0)).masked_fill(column < 0, 0)
    return {"reverse_kl": reference.reverse_kl, "forward_kl": reference.forward_kl}[kind](student, teacher)


def truth(
    student: torch.Tensor, teacher: torch.Tensor, column: torch.Tensor, *, scales: tuple[float, float], dtype: torch.dtype
) -> dict[str, torch.Tensor]:
    """Statistics by `ops/reference.py` in `dtype`, [C] each."""
    s, t = student.cpu().to(dtype) * scales[0], teacher.cpu().to(dtype) * scales[1]
    column, is_here = column.cpu().clamp(min=0), column.cpu() >= 0
    return {
        "reverse_kl": reference.reverse_kl(s, t),
        "forward_kl": reference.forward_kl(s, t),
        "student_entropy": reference.entropy(s),
        "teacher_entropy": reference.entropy(t),
        "student_logprob": reference.logprob(s, column).masked_fill(~is_here, -math.inf),
        "teacher_logprob": reference.logprob(t, column).masked_fill(~is_here, -math.inf),
        "top1_agreement": ((s == s.amax(-1)[:, None]) & (t == t.amax(-1)[:, None])).any(-1).to(dtype),
    }


def statistics(sums: MergedSums) -> dict[str, torch.Tensor]:
    return {
        "reverse_kl": sums.reverse_kl,
        "forward_kl": sums.forward_kl,
        "student_entropy": sums.student.entropy,
        "teacher_entropy": sums.teacher.entropy,
        "student_logprob": sums.student.logprob,
        "teacher_logprob": sums.teacher.logprob,
        "top1_agreement": sums.top1_agreement,
    }


def gradient_truth(kind, student, teacher, column, row_scale, *, scales, beta, dtype) -> torch.Tensor:
    """[C, columns] by autograd in `dtype`."""
    s = (student.cpu().to(dtype) * scales[0]).requires_grad_()
    loss = _loss(kind, s, teacher.cpu().to(dtype) * scales[1], column.cpu(), beta)
    (gradient,) = torch.autograd.grad((loss * row_scale.cpu().to(dtype)).sum(), s)
    if kind == "nll":  # a row without a target in this shard still has the softmax
        elsewhere = column.cpu() < 0
        gradient[elsewhere] = s.detach().softmax(-1)[elsewhere] * row_scale.cpu().to(dtype)[elsewhere, None]
    return gradient


def error(value: torch.Tensor, expected: torch.Tensor) -> float:
    value, expected = value.detach().cpu().double(), expected.double()
    same = (value == expected) | (value.isnan() & expected.isnan())  # infinities of one sign too
    value, expected = value[~same], expected[~same]
    return (value - expected).norm().item()


def yardstick(
    ordinary: torch.Tensor, expected: torch.Tensor, dtype: torch.dtype = torch.float32, roundings: float = 1.01
) -> float:
    """What an ordinary fp32 computation gets wrong, a few last digits of fp32, and rounding the result to `dtype` once."""
    finite = torch.where(expected.isfinite(), expected, 0).double()
    rounded = finite.to(dtype).double() - finite
    return error(ordinary, expected) + roundings * rounded.norm().item() + 8 * EPS * finite.norm().item()


def read(backend: ModuleType, student, teacher, column, *, scales=(1.0, 1.0), packed=None) -> tuple[torch.Tensor, MergedSums]:
    partial = backend.partial_sums(student, teacher, column, student_scale=scales[0], teacher_scale=scales[1], packed=packed)
    assert partial.dtype == torch.float64 and partial.device == student.device
    return partial, MergedSums.merge(partial[None])


def table_of(sums: MergedSums, backend: ModuleType, kind: str, student, teacher, **settings) -> torch.Tensor:
    table = sums.table()
    if kind == "jsd":
        table[CENTRE] = backend.mixture_sums(student, teacher, table, **settings)[0]
    return table


def check_statistics(
    backend: ModuleType, device: str, student, teacher, scales=(1.0, 1.0), column=None, lag: float = 0.0
) -> None:
    """`lag`: nats by which the sums may have been made below the row's maximum, each costing fp32 half a last digit."""
    column = targets(*student.shape, device) if column is None else column
    partial, sums = read(backend, student, teacher, column, scales=scales)
    expected = truth(student, teacher, column, scales=scales, dtype=torch.float64)
    ordinary = truth(student, teacher, column, scales=scales, dtype=torch.float32)
    for name, value in statistics(sums).items():
        bound = yardstick(ordinary[name], expected[name]) + (HARDWARE + lag * EPS / 2) * len(student) ** 0.5
        assert error(value, expected[name]) <= bound, (name, error(value, expected[name]), bound)
    assert (sums.reverse_kl >= 0).all() and (sums.forward_kl >= 0).all()
    alone, _ = read_student(backend, student, column, scales[0])
    torch.testing.assert_close(alone, partial[:4], rtol=2e-6, atol=2e-6)


def read_student(backend: ModuleType, student, column, scale=1.0) -> tuple[torch.Tensor, MergedSums]:
    partial = backend.partial_sums(student, None, column, student_scale=scale, teacher_scale=1.0)
    assert partial.shape == (4, student.shape[0])
    return partial, MergedSums.merge(partial[None])


def check_gradient(
    backend: ModuleType, device: str, kind: str, student, teacher, *, scales=(1.0, 1.0), beta=0.5, out=None
) -> None:
    """Into `out`, or in place where it is None. One row is idle and holds a NaN."""
    rows = student.shape[0]
    column = targets(*student.shape, device)
    row_scale = torch.linspace(0.2, -1.0, rows, device=device)
    _, sums = read(backend, student, teacher, column, scales=scales)
    settings = {"beta": beta, "student_scale": scales[0], "teacher_scale": scales[1]}
    table = table_of(sums, backend, kind, student, teacher, **settings)
    expected, ordinary = (
        gradient_truth(kind, student, teacher, column, row_scale, scales=scales, beta=beta, dtype=dtype)
        for dtype in (torch.float64, torch.float32)
    )
    if kind == "jsd":
        s, t = (logits.cpu() for logits in (student, teacher))
        losses = [reference.jsd(s.to(d) * scales[0], t.to(d) * scales[1], beta=beta) for d in (torch.float64, torch.float32)]
        from_student, from_teacher = backend.mixture_sums(student, teacher, table, **settings)
        loss = beta * from_teacher + (1 - beta) * from_student
        bound = yardstick(losses[1], losses[0]) + HARDWARE * rows**0.5
        assert error(loss, losses[0]) <= bound, (error(loss, losses[0]), bound, losses)
    row_scale[0], expected[0], ordinary[0] = 0, 0, 0
    student[0, 1] = math.nan
    out = student if out is None else out
    has_teacher = kind != "nll"
    backend.logits_gradient(
        student, teacher if has_teacher else None, table, row_scale, column if kind == "nll" else None,
        kind=kind, out=out, **settings,
    )  # fmt: skip
    assert torch.equal(out[0].cpu(), torch.zeros_like(out[0].cpu()))
    is_cut_off = backend.name == "triton" and device == "cpu"  # Triton's interpreter does not round to bf16
    bound = yardstick(ordinary, expected, out.dtype, roundings=2.5 if is_cut_off else 1.01)
    assert error(out, expected) <= bound, (kind, error(out, expected), bound)


def statistics_equal_the_reference(backend, device) -> None:
    for dtype, gap, scales in [
        (torch.float32, None, (1.0, 1.0)),
        (torch.float32, 0.03, (2.0, 2.0)),
        (torch.bfloat16, None, (0.5, 1.0)),
        (torch.float16, 0.3, (1.0, 1.0)),
    ]:
        check_statistics(backend, device, *draw(4, 5000, dtype=dtype, device=device, gap=gap), scales=scales)


def statistics_of_rows_that_share_no_boundary(backend, device) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        check_statistics(backend, device, *draw(3, 507, dtype=dtype, device=device, gap=0.3, pad=2, skip=1))
        student, _ = draw(3, 2100, dtype=dtype, device=device, gap=0.3, skip=1)
        _, teacher = draw(3, 2100, dtype=dtype, device=device, gap=0.3, pad=3)
        check_statistics(backend, device, student, teacher)
    check_statistics(backend, device, *draw(1, 3, dtype=torch.float32, device=device, gap=0.3))


def gradients_equal_autograd(backend, device) -> None:
    for kind in KINDS:
        for dtype, gap, scales, beta in [
            (torch.float32, None, (1.0, 0.5), 0.1),
            (torch.float32, 0.03, (1.0, 1.0), 0.5),
            (torch.bfloat16, None, (2.0, 1.0), 0.9),
        ]:
            student, teacher = draw(3, 2100, dtype=dtype, device=device, gap=gap)
            check_gradient(backend, device, kind, student, teacher, scales=scales, beta=beta)


def gradients_go_where_they_are_told(backend, device) -> None:
    """Another dtype, other strides, no common boundary; what lies between rows is left alone."""
    for dtype, out_dtype in [
        (torch.float32, torch.bfloat16),
        (torch.bfloat16, torch.float32),
        (torch.float16, torch.float16),
        (torch.bfloat16, torch.float16),
    ]:
        student, teacher = draw(2, 2055, dtype=dtype, device=device, gap=0.3, pad=5)
        before = student.clone()
        storage = torch.full((2 * 2100,), 7.0, dtype=out_dtype, device=device)
        out = storage.as_strided((2, 2055), (2100, 1), 3)
        check_gradient(backend, device, "reverse_kl", student, teacher, out=out)
        assert torch.equal(student[1], before[1])
        outside = torch.ones(2 * 2100, dtype=torch.bool, device=device)
        outside.as_strided((2, 2055), (2100, 1), 3).fill_(False)
        assert (storage[outside] == 7).all()


def kl_of_models_that_nearly_agree_is_small_and_never_negative(backend, device) -> None:
    for dtype, gap in [(torch.float32, 1e-3), (torch.float32, 1e-5), (torch.float32, 0.0), (torch.bfloat16, 0.004)]:
        student, teacher = draw(4, 5000, dtype=dtype, device=device, gap=gap)
        student[0] = teacher[0]  # equal to the last bit
        teacher[1] = student[1]
        teacher[1, 37] += 2 * gap  # different in the most likely token alone
        _, sums = read(backend, student, teacher, None)
        expected = truth(student, teacher, torch.zeros(4, dtype=torch.int64), scales=(1.0, 1.0), dtype=torch.float64)
        for name, value in (("reverse_kl", sums.reverse_kl), ("forward_kl", sums.forward_kl)):
            assert (value >= 0).all(), (name, gap, value)
            assert value[0] == 0
            scale = 1 + expected[name].max()  # the pair without the peak on both sides does not agree at all
            noise = 4 * EPS * scale if dtype == torch.bfloat16 else 1e-3 * expected[name].max() + 1e-6 * gap + 1e-14
            assert (value.cpu() - expected[name]).abs().max() <= noise, (name, gap, value, expected[name])


def peaks_that_no_sample_saw_are_summed_exactly(backend, device) -> None:
    """The largest logits far above and far behind the first columns; +-1e4; a row of one value."""
    for dtype in (torch.float32, torch.bfloat16):
        student, teacher = draw(6, 5000, dtype=dtype, device=device, gap=0.3)
        student[0, -1], teacher[0, -1] = 100, 90
        student[1, -1] = 30
        student[2, 4000], student[2, 4001], teacher[2, 4001] = 8192, 8192, 8200
        student[3], teacher[3] = -8192, 8192
        student[4] *= 1024
        teacher[4] *= -1024
        teacher[5, 4500] = 60
        check_statistics(backend, device, student, teacher)
        student, teacher = draw(3, 5000, dtype=dtype, device=device, gap=0.3)
        student[:, 4800], teacher[:, 4800] = 50, 48  # the same token, further above the rest in one than in the other
        check_statistics(backend, device, student, teacher, scales=(1.0, 0.5), lag=40)
        student[:, 4801] = 51  # and one that only the student has
        check_statistics(backend, device, student, teacher, scales=(1.0, 0.25), lag=40)
        column = torch.full((3,), 4800, device=device)
        check_statistics(backend, device, student, teacher, scales=(1.0, 0.5), column=column)


def minus_infinity_is_dropped_without_weight_and_surfaces_with_it(backend, device) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        student, teacher = draw(6, 3000, dtype=dtype, device=device, gap=0.3)
        student[0, 5:2900], teacher[0, 5:2900] = -math.inf, -math.inf
        student[1, :2500], teacher[1, :2500] = -math.inf, -math.inf  # whatever is sampled first
        teacher[2, 7] = -math.inf
        student[3, 8] = -math.inf
        student[4], teacher[4] = -math.inf, -math.inf  # no mass at all
        student[5] = -math.inf
        column = targets(6, 3000, device)
        partial, sums = read(backend, student, teacher, column)
        exact, expected = read(logits_chunk, student.cpu().double(), teacher.cpu().double(), column.cpu())
        torch.testing.assert_close(partial.cpu(), exact, rtol=1e-5, atol=1e-5)
        assert sums.reverse_kl[2].item() == math.inf and sums.forward_kl[3].item() == math.inf
        table, whole = expected.table().to(device), slice(0, 4)
        settings = {"beta": 0.3, "student_scale": 1.0, "teacher_scale": 1.0}
        pair = backend.mixture_sums(student[whole], teacher[whole], table[:, whole], **settings)
        torch.testing.assert_close(
            pair.cpu(),
            logits_chunk.mixture_sums(
                student[whole].cpu().double(), teacher[whole].cpu().double(), expected.table()[:, whole], **settings
            ),
            rtol=1e-5,
            atol=1e-6,
        )
        for kind in ("reverse_kl", "forward_kl", "jsd"):
            out, wide = torch.empty_like(student), torch.empty(student.shape, dtype=torch.float64)
            scale = torch.ones(6)
            backend.logits_gradient(student, teacher, table, scale.to(device), None, kind=kind, out=out, **settings)
            exact_pair = student.cpu().double(), teacher.cpu().double()
            logits_chunk.logits_gradient(*exact_pair, table.cpu(), scale.double(), None, kind=kind, out=wide, **settings)
            tolerance = 1e-5 if dtype == torch.float32 else 0.01
            torch.testing.assert_close(out[whole].cpu().double(), wide[whole], rtol=tolerance, atol=tolerance, equal_nan=True)


def nan_and_infinity_surface_in_their_rows_alone(backend, device) -> None:
    for dtype, value in [(torch.float32, math.nan), (torch.bfloat16, math.nan), (torch.float32, math.inf)]:
        for side in (0, 1):
            pair = draw(3, 2100, dtype=dtype, device=device, gap=0.3)
            pair[side][1, 2050] = value
            _, sums = read(backend, *pair, None)
            for result in (sums.reverse_kl, sums.forward_kl):
                assert result.isnan().tolist() == [False, True, False]
            table = sums.table()
            settings = {"beta": 0.5, "student_scale": 1.0, "teacher_scale": 1.0}
            mixture = backend.mixture_sums(*pair, table, **settings)
            assert mixture.isnan().any(0).tolist() == [False, True, False]
            table[CENTRE] = mixture.sum(0)
            for kind in ("reverse_kl", "forward_kl", "jsd"):
                out = torch.empty_like(pair[0])
                backend.logits_gradient(*pair, table, torch.ones(3, device=device), None, kind=kind, out=out, **settings)
                assert out.isnan().all(-1).tolist() == [False, True, False] and not out[::2].isnan().any()


def one_column_with_both_maxima_is_agreement(backend, device) -> None:
    student = torch.zeros(5, 4100, device=device)
    teacher = torch.zeros(5, 4100, device=device)
    student[0, 4000], teacher[0, 4000] = 1, 2
    student[1, 4000], teacher[1, 4001] = 1, 2
    student[2, [3, 2049]], teacher[2, [2048, 2049]] = 1, 2  # ties
    student[3, [3, 2048]], teacher[3, [2049, 3000]] = 1, 2
    for dtype in (torch.float32, torch.bfloat16):
        _, sums = read(backend, student.to(dtype), teacher.to(dtype), None)
        assert sums.top1_agreement.tolist() == [1, 0, 1, 0, 1]


def shards_add_up_to_the_whole(backend, device) -> None:
    """An uneven cut, a shard of padding, a shard that is all masked."""
    student, teacher = draw(3, 2100, dtype=torch.float32, device=device, gap=0.1)
    column = targets(3, 2100, device)
    student[:, :2], teacher[:, :2] = -math.inf, -math.inf
    parts = []
    for first, last in [(0, 2), (2, 1900), (1900, 2100), (2100, 2100)]:
        own = torch.where((column >= first) & (column < last), column - first, -1)
        parts.append(read(backend, student[:, first:last], teacher[:, first:last], own)[0])
    merged = MergedSums.merge(torch.stack(parts))
    expected = truth(student, teacher, column, scales=(1.0, 1.0), dtype=torch.float64)
    for name, value in statistics(merged).items():
        torch.testing.assert_close(value.cpu(), expected[name], rtol=2e-6, atol=1e-7, msg=name)


def packed_chunks_hold_the_student_and_the_gap(backend, device) -> None:
    for columns in (2100, 507):
        student, teacher = draw(3, columns, dtype=torch.float32, device=device, gap=0.3)
        student[1, 4], teacher[1, 4] = -math.inf, -math.inf
        packed = torch.full((2, 3, columns), math.nan, dtype=torch.float16, device=device)
        scales = (0.5, 2.0)
        partial, sums = read(backend, student, teacher, None, scales=scales, packed=packed)
        unpacked, _ = read(backend, student, teacher, None, scales=scales)
        torch.testing.assert_close(partial, unpacked, rtol=2e-6, atol=2e-6)
        s, t = student * scales[0], teacher * scales[1]
        assert torch.equal(packed[0], s.half()) and torch.equal(packed[1], torch.where(s == t, 0, s - t).half())
        row_scale = torch.tensor([0.3, -0.7, 1.0], device=device)
        wide_pair = packed.cpu().double()
        wide_pair[1] = wide_pair[0] - wide_pair[1].masked_fill(wide_pair[0] == -math.inf, 0)
        settings = {"beta": 0.3, "student_scale": 1.0, "teacher_scale": 1.0}
        for kind in ("reverse_kl", "forward_kl", "jsd"):
            table = table_of(sums, backend, kind, packed[0], packed[1], **settings, is_packed=True)
            wide = torch.empty(3, columns, dtype=torch.float64)
            logits_chunk.logits_gradient(
                *wide_pair, table.cpu(), row_scale.cpu().double(), None, kind=kind, out=wide, **settings
            )
            out = torch.empty_like(student)
            backend.logits_gradient(
                packed[0], packed[1], table, row_scale, None, kind=kind, out=out, is_packed=True, **settings
            )
            torch.testing.assert_close(out.cpu().double(), wide, rtol=2e-5, atol=2e-6)


def empty_chunks_and_empty_shards_are_no_problem(backend, device) -> None:
    for rows, columns in [(0, 507), (3, 0)]:
        student, teacher = (torch.empty(rows, columns, device=device) for _ in range(2))
        column = torch.full((rows,), -1, device=device)
        partial, sums = read(backend, student, teacher, column)
        exact, _ = read(logits_chunk, student.cpu(), teacher.cpu(), column.cpu())
        assert torch.equal(partial.cpu(), exact)
        assert torch.equal(read_student(backend, student, column)[0].cpu(), exact[:4])
        settings = {"beta": 0.5, "student_scale": 1.0, "teacher_scale": 1.0}
        table = torch.zeros(5, rows, dtype=torch.float64, device=device)
        mixture = backend.mixture_sums(student, teacher, table, **settings)
        assert torch.equal(mixture.cpu(), torch.zeros(2, rows, dtype=torch.float64))
        for kind in KINDS:
            backend.logits_gradient(
                student, teacher, table, torch.ones(rows, device=device), column, kind=kind, out=student, **settings
            )


def results_are_the_same_to_the_last_bit_each_time(backend, device) -> None:
    student, teacher = draw(3, 5000, dtype=torch.bfloat16, device=device, gap=0.3)
    first, again = (backend.partial_sums(student, teacher, None, student_scale=1.0, teacher_scale=1.0) for _ in range(2))
    assert torch.equal(first, again)


CASES = [
    statistics_equal_the_reference,
    statistics_of_rows_that_share_no_boundary,
    gradients_equal_autograd,
    gradients_go_where_they_are_told,
    kl_of_models_that_nearly_agree_is_small_and_never_negative,
    peaks_that_no_sample_saw_are_summed_exactly,
    minus_infinity_is_dropped_without_weight_and_surfaces_with_it,
    nan_and_infinity_surface_in_their_rows_alone,
    one_column_with_both_maxima_is_agreement,
    shards_add_up_to_the_whole,
    packed_chunks_hold_the_student_and_the_gap,
    empty_chunks_and_empty_shards_are_no_problem,
    results_are_the_same_to_the_last_bit_each_time,
]


def bad_arguments(device: str) -> Iterator[tuple[dict, str]]:
    """Changes to a good call of `logits_gradient` on a [4, 64] chunk, and what the ValueError must say."""
    yield {"kind": "reverse"}, "kind 'reverse' is unknown"
    yield {"kind": "nll", "column": None}, "needs column"
    yield {"teacher": None}, "compares two models"
    yield {"beta": 1.0, "kind": "jsd"}, "beta must lie strictly between 0 and 1, got 1.0"
    yield {"student_scale": 0.0}, "student_scale must be positive"
    yield {"student": torch.zeros(4, 64, dtype=torch.float64, device=device)}, "student must be float32, bfloat16"
    yield {"student": torch.zeros(64, 4, device=device).T}, "student must have last stride 1"
    yield {"teacher": torch.zeros(4, 63, device=device)}, "teacher must be .4, 64. like the student, got .4, 63."
    yield {"teacher": torch.zeros(4, 64, dtype=torch.float16, device=device)}, "teacher must be float32 like the student"
    yield {"rows_table": torch.zeros(5, 4, device=device)}, "rows_table must be float64"
    yield {"row_scale": torch.zeros(3, device=device)}, "row_scale must be float32 .4."
    yield {"column": torch.zeros(4, dtype=torch.int32, device=device)}, "column must be int64"
    yield {"out": torch.zeros(4, 65, device=device)}, "out must be float32, bfloat16 or float16 .4, 64."
    yield {"is_packed": True}, "is_packed needs the float16 pair"


def good_arguments(device: str) -> dict:
    student, teacher = (torch.randn(4, 64, device=device) for _ in range(2))
    return {
        "student": student,
        "teacher": teacher,
        "rows_table": torch.zeros(5, 4, dtype=torch.float64, device=device),
        "row_scale": torch.ones(4, device=device),
        "column": torch.zeros(4, dtype=torch.int64, device=device),
        "kind": "reverse_kl",
        "beta": 0.5,
        "student_scale": 1.0,
        "teacher_scale": 1.0,
        "out": student,
    }
