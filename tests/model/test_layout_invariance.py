"""One training step in every parallel layout and packing, against one process.

The parent process computes the reference; two spawns of 2 and 4 gloo ranks run all cases one after another, gather
their gradients and weights as full tensors by name, and leave them in files. The cross product of all features is
`test_layout_matrix.py`, which is slow.
"""

from __future__ import annotations

from itertools import groupby
from pathlib import Path

import pytest
import torch
from gloo_world import run_ranks
from layout_steps import THREE, WHOLE, Case, assert_equal_step, full_tensors, pack, read_case, run_cases, run_step, shapes
from tiny_models import VOCAB, pack_rows, random_rows

from megatron_tcod.model import parallel
from megatron_tcod.model.build import Recompute
from megatron_tcod.model.parallel import ParallelLayout
from megatron_tcod.model.student import OptimizerSettings, Student
from megatron_tcod.model.teacher import Teacher
from megatron_tcod.objective import make_objective

FULL = Recompute(granularity="full", method="uniform", num_layers=1)
BLOCK = Recompute(granularity="full", method="block", num_layers=1)
SELECTIVE = Recompute(granularity="selective")
CASES = [
    Case(world=2),
    Case(world=2, tp=2, is_tied=True),
    Case(world=2, pp=2),
    Case(world=2, pp=2, virtual=2, is_tied=True, recompute=BLOCK),
    Case(world=2, tp=2, sequence_parallel=True),
    Case(world=2, cp=2),
    Case(world=2, recompute=SELECTIVE, distributed_optimizer=True),
    Case(world=2, pp=2, has_experts=True),
    Case(world=2, tp=2, sequence_parallel=True, has_experts=True),  # without, Megatron refuses
    Case(world=2, ep=2, has_experts=True, clip_grad=0.01),
    Case(world=2, cp=2, ep=2, has_experts=True, distributed_optimizer=True),
    Case(world=2, cp=2, branches="forest"),
    Case(world=2, pp=2, branches="forest"),
    Case(world=2, tp=2, teacher=(1, 1)),
    Case(world=2, teacher=(1, 2), offload=True),
    Case(world=2, pp=2, virtual=2, teacher=(2, 1)),
    Case(world=4),  # three microbatches: one replica has none
    Case(world=4, tp=4),  # more ranks than key-value heads
    Case(world=4, tp=4, sequence_parallel=True, is_tied=True),
    Case(world=4, cp=4),  # more ranks than key-value heads
    Case(world=4, tp=2, pp=2, is_tied=True),
    Case(world=4, tp=2, pp=2, virtual=2, sequence_parallel=True, is_tied=True, recompute=FULL),
    Case(world=4, tp=2, cp=2, sequence_parallel=True, recompute=SELECTIVE),
    Case(world=4, pp=2, cp=2, is_tied=True, distributed_optimizer=True),
    Case(world=4, tp=2, is_tied=True, distributed_optimizer=True),
    Case(world=4, tp=2, pp=2, sequence_parallel=True, teacher=(4, 1), offload=True),
    Case(world=4, tp=2, cp=2, teacher=(1, 2)),
    Case(world=4, tp=2, cp=2, sequence_parallel=True, teacher=(2, 2), branches="forest"),
    Case(world=4, ep=4, has_experts=True),  # one expert a rank; one replica has no microbatch, but tokens of the others
    Case(world=4, ep=2, has_experts=True, distributed_optimizer=True, recompute=FULL, clip_grad=0.01),
    Case(world=4, tp=2, ep=2, sequence_parallel=True, has_experts=True, teacher=(1, 2, 2)),
    Case(world=4, pp=2, ep=2, has_experts=True, distributed_optimizer=True),
    Case(world=4, pp=2, virtual=2, ep=2, has_experts=True, teacher=(1, 1, 4), offload=True),
]


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("layouts")
    for world, cases in groupby(CASES, lambda case: case.world):
        run_ranks(world, run_cases, list(cases), str(directory))
    return directory


def content_of(case: Case) -> tuple[bool, bool, bool, float]:
    return case.is_tied, case.has_experts, bool(case.branches), case.clip_grad


@pytest.fixture(scope="module")
def reference():
    """What must not be seen of a layout -> tensors and figures of one process with one microbatch."""
    cases = [Case(), Case(is_tied=True), Case(branches="rows")]
    cases += [Case(has_experts=True), Case(has_experts=True, clip_grad=0.01)]
    found = {content_of(case): run_step(case, WHOLE) for case in cases}
    yield found
    parallel.shutdown()


@pytest.mark.parametrize("case", CASES, ids=str)
def test_weights_gradient_and_figures_of_one_step_are_invariant_to_the_parallel_layout(runs, reference, case):
    expected, figures = reference[content_of(case)]
    actual, gathered = read_case(runs, case)
    assert_equal_step(actual, expected)
    for key, values in figures[0][0].items() if case.branches != "forest" else ():  # which has its positions in another order
        assert gathered[key].tolist() == pytest.approx(values, rel=1e-4, abs=2e-5), key


def test_forests_share_prefixes():
    microbatches = [pack(Case(branches="forest"), indices) for indices in THREE]
    assert [microbatch.num_tokens < microbatch.num_row_tokens for microbatch in microbatches] == [False, False, True]


@pytest.mark.parametrize("recompute", [FULL, BLOCK, SELECTIVE], ids=["uniform", "block", "selective"])
def test_gradient_is_invariant_to_recomputed_activations_bit_for_bit(recompute):
    expected, _ = run_step(Case(), THREE)
    actual, _ = run_step(Case(recompute=recompute), THREE)
    parallel.shutdown()
    assert all(torch.equal(actual[name], tensor) for name, tensor in expected.items())


@pytest.mark.parametrize(
    "split",
    [((0,), (1,), (2,), (3,), (4,), (5,), (6,)), ((6, 2), (5, 0, 3), (1, 4)), ((3, 1, 0, 6, 5, 4, 2),)],
    ids=["one row each", "three", "shuffled"],
)
@pytest.mark.parametrize("objective", ["reverse_kl", "sampled_token"])
def test_gradient_is_invariant_to_packing_and_to_the_order_of_rows(split, objective):
    expected, _ = run_step(Case(), WHOLE, objective)
    actual, _ = run_step(Case(), split, objective)
    parallel.shutdown()
    assert_equal_step(actual, expected)


def test_gradient_of_one_row_per_trajectory_equals_that_of_one_row_per_turn():
    ids, positions, weights = random_rows([60], seed=8)[0]
    turns = [(0, 15), (15, 38), (38, 60)]
    per_turn = []
    for start, stop in turns:
        inside = [place for place, position in enumerate(positions) if start <= position + 1 < stop]
        per_turn.append((ids[:stop], [positions[place] for place in inside], [weights[place] for place in inside]))
    results = []
    for rows in ([(ids, positions, weights)], per_turn):
        parallel.initialize(ParallelLayout())
        student_shape, teacher_shape = shapes(False)
        student = Student(student_shape, ParallelLayout(), OptimizerSettings(lr=1e-3), seed=1)
        teacher = Teacher(teacher_shape, ParallelLayout(), seed=2)
        microbatches = [pack_rows(rows)]
        objective = make_objective("reverse_kl", vocab_size=VOCAB)
        student.compute_gradients(microbatches, teacher.score(microbatches), objective)
        results.append(full_tensors(student.chunks, lambda parameter: parameter.main_grad))
        parallel.shutdown()
    assert_equal_step(results[1], results[0])
