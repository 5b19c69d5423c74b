"""The product of layouts, recomputation and optimizers over 4 ranks, and the widest layouts over 8: minutes, so
`tools/test.sh --all`. The teacher's layout, its offload and tied embeddings take turns: seven to the six of each layout.
Experts are shared out with both optimizers, recomputation taking turns.
"""

from __future__ import annotations

from itertools import cycle, groupby, product
from pathlib import Path

import pytest
from gloo_world import run_ranks
from layout_steps import WHOLE, Case, assert_equal_step, read_case, run_cases, run_step

from megatron_tcod.model import parallel
from megatron_tcod.model.build import Recompute

pytestmark = pytest.mark.slow

LAYOUTS = [  # tp, cp, pp, virtual
    (1, 1, 1, None),
    (2, 1, 1, None),
    (4, 1, 1, None),
    (1, 2, 1, None),
    (1, 4, 1, None),
    (2, 2, 1, None),
    (1, 1, 2, None),
    (1, 1, 2, 2),
    (2, 1, 2, None),
    (2, 1, 2, 2),
    (1, 2, 2, None),
    (1, 2, 2, 2),
    (1, 1, 4, None),
]
RECOMPUTE = [
    Recompute(),
    Recompute(granularity="selective"),
    Recompute(granularity="full", method="uniform", num_layers=2),
]
SHORT = Recompute(granularity="full", method="uniform", num_layers=1)  # where a chunk has one of the four layers
TURNS = cycle([  # (tp, pp) of a teacher with two layers and four key-value heads; tied embeddings
    (None, False),
    ((1, 1), True),
    ((2, 1), False),
    ((1, 2), True),
    ((2, 2), False),
    (None, True),
    ((4, 1), True),
])
CASES = [
    Case(
        world=4,
        tp=tp,
        cp=cp,
        pp=pp,
        virtual=virtual,
        sequence_parallel=is_sequence_parallel,
        recompute=SHORT if recompute.num_layers and pp * (virtual or 1) == 4 else recompute,
        distributed_optimizer=is_distributed,
        is_tied=is_tied,
        teacher=(2, 2) if pp == 4 and teacher is None else teacher,  # two layers do not fill four stages
        offload=is_tied,
    )
    for ((tp, cp, pp, virtual), is_sequence_parallel, recompute, is_distributed), (teacher, is_tied) in zip(
        product(LAYOUTS, (False, True), RECOMPUTE, (False, True)), TURNS, strict=False
    )
    if tp > 1 or not is_sequence_parallel
] + [
    Case(world=8, tp=2, cp=2, pp=2, virtual=virtual, sequence_parallel=True, teacher=teacher, distributed_optimizer=True)
    for virtual, teacher in ((None, None), (2, (4, 1)), (2, (2, 2)))
]
EXPERT_LAYOUTS = [  # world, tp, cp, pp, virtual, ep
    (4, 1, 1, 1, None, 2),
    (4, 1, 1, 1, None, 4),
    (4, 1, 2, 1, None, 2),
    (4, 1, 2, 1, None, 4),
    (4, 2, 1, 1, None, 2),
    (4, 2, 2, 1, None, 2),
    (4, 1, 1, 2, None, 2),
    (4, 1, 1, 2, 2, 2),
    (8, 2, 1, 1, None, 2),
    (8, 2, 1, 1, None, 4),
    (8, 2, 2, 2, None, 2),
    (8, 1, 2, 2, 2, 4),
]
SHARED = [
    Case(
        world=world,
        tp=tp,
        cp=cp,
        pp=pp,
        virtual=virtual,
        ep=ep,
        sequence_parallel=tp > 1,
        recompute=SHORT if recompute.num_layers and pp * (virtual or 1) == 4 else recompute,
        distributed_optimizer=is_distributed,
        has_experts=True,
    )
    for ((world, tp, cp, pp, virtual, ep), is_distributed), recompute in zip(
        product(EXPERT_LAYOUTS, (False, True)), cycle(RECOMPUTE), strict=False
    )
]


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("matrix")
    for world, cases in groupby(sorted(CASES + SHARED, key=lambda case: case.world), lambda case: case.world):
        run_ranks(world, run_cases, list(cases), str(directory))
    return directory


@pytest.fixture(scope="module")
def reference():
    kinds = [(False, False), (True, False), (False, True)]
    found = {kind: run_step(Case(is_tied=kind[0], has_experts=kind[1]), WHOLE)[0] for kind in kinds}
    yield found
    parallel.shutdown()


@pytest.mark.timeout(3600)
@pytest.mark.parametrize("case", CASES + SHARED, ids=str)
def test_every_combination_of_layout_features_makes_the_step_of_one_process(runs, reference, case):
    actual, _ = read_case(runs, case)
    assert_equal_step(actual, reference[case.is_tied, case.has_experts])
