"""bf16 models with fp32 main gradients: no layout may err more than the unsharded bf16 step does.

The truth is the fp32 step from weights rounded to bf16. Unsharded, the bf16 gradient of this model lies 1.8e-2 from it
(Euclidean norm over all parameters); a layout that adds in another order may lie a quarter further, and no parameter's
gradient may differ from the unsharded bf16 one by more than BF16_TOLERANCE, ten units in the last place of bf16.

Where a layout adds in another order before a router chooses, rounding sends some tokens to other experts, and gradients of
experts then differ by tens of percent. So tensor parallelism is compared on experts that every token goes to.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from gloo_world import run_ranks
from layout_steps import THREE, Case, read_case, run_cases, run_step, shapes
from tiny_models import VOCAB, pack_rows, random_rows

from megatron_tcod.model import build, parallel
from megatron_tcod.model.build import Recompute
from megatron_tcod.model.parallel import ParallelLayout
from megatron_tcod.model.student import OptimizerSettings, Student
from megatron_tcod.model.teacher import Teacher
from megatron_tcod.objective import make_objective

BF16_TOLERANCE = 4e-2
BF16 = torch.bfloat16
CASES = [
    Case(world=2, distributed_optimizer=True, dtype=BF16),
    Case(world=2, tp=2, sequence_parallel=True, recompute=Recompute(granularity="selective"), dtype=BF16),
    Case(world=2, cp=2, distributed_optimizer=True, is_tied=True, dtype=BF16),
    Case(world=2, pp=2, virtual=2, teacher=(2, 1), offload=True, dtype=BF16),
    Case(world=2, ep=2, has_experts=True, distributed_optimizer=True, dtype=BF16),
    Case(world=2, tp=2, has_experts=True, is_router_open=True, sequence_parallel=True, dtype=BF16),
    Case(world=2, tp=2, branches="forest", dtype=BF16),
]


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("bf16")
    run_ranks(2, run_cases, CASES, str(directory))
    return directory


@pytest.fixture(scope="module")
def steps():
    """Kind of a case -> (the fp32 step from rounded weights, the unsharded bf16 step), rows computed one by one."""
    found = {}
    for kind in dict.fromkeys(map(_kind, CASES)):
        truth, _ = run_step(Case(is_rounded=True, **dict(kind)), THREE)
        found[kind] = truth, run_step(Case(dtype=BF16, **dict(kind)), THREE)[0]
    parallel.shutdown()
    return found


def _kind(case: Case) -> tuple[tuple[str, object], ...]:
    """What makes a step another one, whatever the layout."""
    branches = "rows" if case.branches else ""
    experts = ("has_experts", case.has_experts), ("is_router_open", case.is_router_open)
    return (("is_tied", case.is_tied), *experts, ("branches", branches))


def _distance(actual: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> float:
    """Relative difference of the whole gradient."""
    names = [name for name in expected if name.startswith("gradient.")]
    difference = torch.stack([(actual[name].double() - expected[name].double()).norm() for name in names]).norm()
    return float(difference / torch.stack([expected[name].double().norm() for name in names]).norm())


@pytest.mark.parametrize("case", CASES, ids=str)
def test_no_layout_errs_more_than_the_unsharded_bf16_step(runs, steps, case):
    truth, unsharded = steps[_kind(case)]
    actual, _ = read_case(runs, case)
    assert 1e-3 < _distance(unsharded, truth) < 3e-2, "the yardstick is an ordinary bf16 computation"
    assert _distance(actual, truth) <= 1.25 * _distance(unsharded, truth)
    for name, tensor in unsharded.items():
        if name.startswith("initial."):
            assert tensor.dtype is BF16 and torch.equal(actual[name], tensor), name
        else:
            difference = (actual[name].double() - tensor.double()).norm() / tensor.double().norm()
            assert difference <= BF16_TOLERANCE, f"{name} differs by {float(difference):.1e}"


def test_main_gradients_of_a_bf16_model_are_summed_over_microbatches_in_fp32():
    parallel.initialize(ParallelLayout())
    student_shape, teacher_shape = shapes(False)
    student = Student(student_shape, ParallelLayout(), OptimizerSettings(lr=1e-3), seed=1, dtype=BF16)
    teacher = Teacher(teacher_shape, ParallelLayout(), seed=2, dtype=BF16)
    objective = make_objective("reverse_kl", vocab_size=VOCAB)
    microbatches = [pack_rows(random_rows([9 + number, 4], seed=number)) for number in range(6)]

    def gradients(which) -> dict[str, torch.Tensor]:
        student.compute_gradients(which, teacher.score(which), objective)
        named = build.named_parameters(student.chunks)
        return {name: parameter.main_grad.clone() for name, parameter in named if "output_layer" not in name}

    together = gradients(microbatches)
    alone = [gradients([microbatch]) for microbatch in microbatches]
    parallel.shutdown()
    for name, total in together.items():
        assert total.dtype is torch.float32
        assert torch.equal(total, sum(part[name] for part in alone)), f"{name} was rounded on the way"
        assert not torch.equal(total, total.bfloat16().float()), name


def test_targets_of_a_bf16_teacher_are_bf16():
    parallel.initialize(ParallelLayout())
    teacher = Teacher(shapes(False)[1], ParallelLayout(), seed=2, dtype=BF16)
    target = teacher.score([pack_rows(random_rows([9, 4], seed=0))])[0]
    parallel.shutdown()
    assert target.hidden.dtype is BF16 and target.head.dtype is BF16
