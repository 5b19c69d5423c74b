"""The backend `cuda` on a GPU: the cases of every backend, then real sizes, far addresses and odd boundaries.

What can be shown without a GPU is in tests/ops/test_cuda_emulated.py and tests/ops/test_kernels_static.py.
"""

import pytest
import torch
from chunk_cases import CASES, bad_arguments, check_gradient, check_statistics, draw, good_arguments, targets

from megatron_tcod.ops import cuda_chunk
from megatron_tcod.ops.divergence import KINDS

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def test_a_cpu_tensor_is_refused_before_anything_is_loaded():
    with pytest.raises(ValueError, match="student must be on cuda, got cpu; choose another divergence_backend"):
        cuda_chunk.logits_gradient(**good_arguments("cpu"))


def test_where_it_cannot_run_it_says_why_in_one_line():
    reason = cuda_chunk.unavailable()
    assert reason is None if torch.cuda.is_available() and reason is None else reason and "\n" not in reason


@pytest.fixture
def device() -> str:
    reason = cuda_chunk.unavailable()
    assert reason is None, reason
    return "cuda"


@pytest.mark.gpu
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.__name__)
def test_compiled_kernels(case, device):
    case(cuda_chunk, device)


@pytest.mark.gpu
def test_bad_arguments_are_refused_before_a_kernel_starts(device):
    for change, message in bad_arguments(device):
        with pytest.raises(ValueError, match=message):
            cuda_chunk.logits_gradient(**good_arguments(device) | change)


@pytest.mark.gpu
@pytest.mark.parametrize("gap", [None, 0.1])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("columns", [18_992, 151_669, 151_936])
def test_statistics_of_real_vocabularies(dtype, columns: int, gap, device):
    check_statistics(cuda_chunk, device, *draw(64, columns, dtype=dtype, device=device, gap=gap))


@pytest.mark.gpu
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("columns", [18_992, 151_669])
def test_gradients_of_real_vocabularies_in_place(dtype, columns: int, kind: str, device):
    student, teacher = draw(16, columns, dtype=dtype, device=device, gap=0.1)
    check_gradient(cuda_chunk, device, kind, student, teacher, scales=(1.0, 2.0), beta=0.3)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("skip, pad", [(1, 0), (3, 5), (8, 1), (7, 2)])
def test_rows_at_odd_addresses(dtype, skip: int, pad: int, device):
    student, teacher = draw(5, 4099, dtype=dtype, device=device, gap=0.1, skip=skip, pad=pad)
    check_statistics(cuda_chunk, device, student, teacher)
    check_gradient(cuda_chunk, device, "reverse_kl", student, teacher)


@pytest.mark.gpu
def test_rows_more_than_two_to_the_31_elements_apart(device):
    student, teacher = draw(3, 5000, dtype=torch.bfloat16, device=device, gap=0.1, pad=2**31 + 24)
    check_statistics(cuda_chunk, device, student, teacher)
    check_gradient(cuda_chunk, device, "reverse_kl", student, teacher)


@pytest.mark.gpu
def test_calls_follow_the_current_stream(device):
    student, teacher = draw(8, 151_936, dtype=torch.bfloat16, device=device, gap=0.1)
    column = targets(*student.shape, device)
    expected = cuda_chunk.partial_sums(student, teacher, column, student_scale=1.0, teacher_scale=1.0)
    torch.cuda.synchronize()
    late = torch.zeros_like(student)
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)
        late.copy_(student)
        sums = cuda_chunk.partial_sums(late, teacher, column, student_scale=1.0, teacher_scale=1.0)
    stream.synchronize()
    assert torch.equal(sums, expected)
