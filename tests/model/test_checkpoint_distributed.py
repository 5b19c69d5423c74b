"""Checkpoints of Megatron's distributed optimizer: equal tensors with and without it, and from one to the other."""

import dataclasses

import pytest
import torch
from checkpoint_content import tensors_of
from gloo_world import run_ranks
from test_checkpoint import LAYOUTS, SETTINGS, SHAPE, load_student, save_student, train, weights

from megatron_tcod.model import parallel
from megatron_tcod.model.student import Student

DISTRIBUTED = dataclasses.replace(SETTINGS, use_distributed_optimizer=True)
PATHS = [
    ("dp", True, "dp", True),
    ("pp2_cp2", True, "tp2", False),
    ("pp2", False, "pp2_cp2", True),
    ("dp", True, "tp2_pp2", True),
]


def student_of(layout, is_distributed, *, seed=1, dtype=torch.float32):
    parallel.initialize(LAYOUTS[layout])
    return Student(SHAPE, LAYOUTS[layout], DISTRIBUTED if is_distributed else SETTINGS, seed=seed, dtype=dtype)


def worker(root, dtype):
    paths = PATHS if dtype is torch.float32 else PATHS[:2]
    for number, (layout, is_distributed, next_layout, is_next_distributed) in enumerate(paths):
        where = f"{PATHS[number]} {dtype}"
        student = student_of(layout, is_distributed, dtype=dtype)
        train(student, 0, 3)
        save_student(root / f"{number}", student, 3)
        kept = weights(student)
        train(student, 3, 5)
        uninterrupted = weights(student)
        plain = student_of(layout, False, dtype=dtype)
        train(plain, 0, 3)
        save_student(root / f"{number}_plain", plain, 3)
        if parallel.rank() == 0:
            one, other = (tensors_of(root / name / "step_0000003") for name in (f"{number}", f"{number}_plain"))
            assert one.keys() == other.keys(), where
            assert all(torch.equal(one[name], other[name]) for name in one), where
        student = student_of(next_layout, is_next_distributed, seed=9, dtype=dtype)
        assert load_student(root / f"{number}", student).step == 3
        resumed = weights(student)
        assert all(torch.equal(resumed[name], kept[name]) for name in kept), where
        train(student, 3, 5)
        tolerance = {"rtol": 1e-6, "atol": 1e-7} if dtype is torch.float32 else {"rtol": 0.01, "atol": 0.004}
        for name, tensor in weights(student).items():
            torch.testing.assert_close(tensor, uninterrupted[name], **tolerance, msg=f"{where} {name}")
            if layout == next_layout and is_distributed == is_next_distributed:
                assert torch.equal(tensor, uninterrupted[name]), where
    parallel.shutdown()


@pytest.mark.parametrize("dtype", [torch.float32, pytest.param(torch.bfloat16, marks=pytest.mark.slow)], ids=str)
def test_the_distributed_optimizer_saves_what_the_plain_one_does_and_resumes_as_either(tmp_path, dtype):
    run_ranks(4, worker, tmp_path, dtype)
