"""The source of the CUDA kernels, compiled for the CPU with tests/ops/cuda_emulator.h in the device's place.

It shows what the kernels compute and where they read and write, with the hardware's exponential at its worst. It says
nothing about the compiled device code: tools/check_kernels.py looks at that, and tests/ops/test_cuda_chunk.py runs it.
"""

import importlib.util
import shutil
import subprocess
import sysconfig
from pathlib import Path

import pytest
import torch
from chunk_cases import CASES

from megatron_tcod.ops import native
from megatron_tcod.ops.shard_sums import MergedSums

ROOT = Path(__file__).parents[2]


class Emulated:
    """`ops/cuda_chunk.py` without a device: the same calls of the same module, on CPU tensors."""

    name = "emulated"

    def __init__(self, module) -> None:
        self.module = module

    def _logits(self, student, teacher, student_scale, teacher_scale, is_packed=False):
        native.check_logits(student, teacher, device="cpu", is_packed=is_packed)
        return self.module.Logits(
            student=student.data_ptr(),
            teacher=native.address(teacher),
            student_row_stride=native.row_stride(student),
            teacher_row_stride=0 if teacher is None else native.row_stride(teacher),
            rows=student.shape[0],
            columns=student.shape[1],
            dtype=native.DTYPES[student.dtype],
            is_packed=is_packed,
            student_scale=student_scale,
            teacher_scale=teacher_scale,
        )

    def partial_sums(self, student, teacher, column, *, student_scale, teacher_scale, packed=None):
        sums = torch.empty(MergedSums.count(teacher is not None), student.shape[0], dtype=torch.float64)
        self.module.partial_sums(
            self._logits(student, teacher, student_scale, teacher_scale),
            column=native.address(column),
            packed_student=0 if packed is None else native.address(packed[0]),
            packed_gap=0 if packed is None else native.address(packed[1]),
            packed_row_stride=0 if packed is None else native.row_stride(packed[0]),
            sums=sums.data_ptr(),
            stream=0,
        )
        return sums

    def mixture_sums(self, student, teacher, rows_table, *, beta, student_scale, teacher_scale, is_packed=False):
        sums = torch.empty(2, student.shape[0], dtype=torch.float64)
        self.module.mixture_sums(
            self._logits(student, teacher, student_scale, teacher_scale, is_packed),
            table=rows_table.data_ptr(),
            table_stride=rows_table.stride(0),
            beta=beta,
            sums=sums.data_ptr(),
            stream=0,
        )
        return sums

    def logits_gradient(
        self, student, teacher, rows_table, row_scale, column, *, kind, beta, student_scale, teacher_scale, out,
        is_packed=False,
    ):  # fmt: skip
        self.module.logits_gradient(
            self._logits(student, teacher, student_scale, teacher_scale, is_packed),
            table=rows_table.data_ptr(),
            table_stride=rows_table.stride(0),
            row_scale=row_scale.data_ptr(),
            column=native.address(column),
            kind=native.KINDS[kind],
            beta=beta,
            out=out.data_ptr(),
            out_row_stride=native.row_stride(out),
            out_dtype=native.DTYPES[out.dtype],
            stream=0,
        )


@pytest.fixture(scope="session")
def emulated(tmp_path_factory) -> Emulated:
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("no g++ to compile the emulated kernels with")
    pybind11 = pytest.importorskip("pybind11", reason="pybind11 is not installed")
    library = tmp_path_factory.mktemp("emulated") / f"_C_cuda{sysconfig.get_config_var('EXT_SUFFIX')}"
    includes = [ROOT / "csrc" / "include", ROOT / "csrc", Path(__file__).parent]
    includes += [Path(pybind11.get_include()), Path(sysconfig.get_path("include"))]
    sources = [*sorted((ROOT / "csrc" / "cuda").glob("*.cu")), ROOT / "csrc" / "bind_cuda.cpp"]
    subprocess.run(
        [
            *(compiler, "-std=c++17", "-O1", "-fPIC", "-shared", "-fvisibility=hidden", "-DTCOD_EMULATE_CUDA"),
            *("-Wall", "-Wno-unknown-pragmas"),
            *(f"-I{path}" for path in includes),
            *("-x", "c++", *map(str, sources), "-o", str(library)),
        ],
        check=True,
    )
    spec = importlib.util.spec_from_file_location("_C_cuda", library)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return Emulated(module)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.__name__)
def test_emulated_kernels(case, emulated: Emulated):
    case(emulated, "cpu")


def test_targets_beyond_the_row_become_nan(emulated: Emulated):
    column = torch.tensor([3, 64, -1])
    sums = emulated.partial_sums(torch.zeros(3, 64), None, column, student_scale=1.0, teacher_scale=1.0)
    torch.testing.assert_close(sums[3], torch.tensor([0, torch.nan, -torch.inf], dtype=torch.float64), equal_nan=True)
