"""A whole episode as one row trains exactly what one row per turn trains (the released code's layout)."""

import math
import random

import pytest
import torch
from tiny_models import VOCAB, tiny_shape

from megatron_tcod.model import build, parallel
from megatron_tcod.model.parallel import ParallelLayout
from megatron_tcod.model.student import OptimizerSettings, Student
from megatron_tcod.model.teacher import Teacher
from megatron_tcod.objective import make_objective
from megatron_tcod.packing import AGGREGATIONS, pack
from megatron_tcod.trajectory import Episode, Task, TokenRow, TurnWindow


def whole_episode(rng, num_turns):
    token_ids, turn_ids, mask = [rng.randrange(VOCAB)], [-1], [0]
    for turn in range(num_turns):
        for sampled, length in ((0, rng.randint(2, 7)), (1, rng.randint(1, 5))):
            token_ids += [rng.randrange(VOCAB) for _ in range(length)]
            turn_ids += [turn] * length
            mask += [sampled] * length
    logprobs = [-math.log(VOCAB) + rng.uniform(-1, 1) for _ in range(sum(mask))]
    return TokenRow(token_ids=token_ids, turn_ids=turn_ids, loss_mask=mask, logprobs=logprobs)


def rows_per_turn(row):
    """The cumulative prompt of each turn with the loss on that turn's answer alone."""
    rows, taken = [], 0
    for turn in range(max(row.turn_ids) + 1):
        end = max(at for at, owner in enumerate(row.turn_ids) if owner == turn) + 1
        mask = [int(sampled and owner == turn) for sampled, owner in zip(row.loss_mask, row.turn_ids, strict=True)][:end]
        logprobs = row.logprobs[taken : taken + sum(mask)]
        taken += len(logprobs)
        rows.append(
            TokenRow(token_ids=row.token_ids[:end], turn_ids=row.turn_ids[:end], loss_mask=mask, logprobs=logprobs)
        )
    return rows


def episode(rows):
    task = Task(env="household", task_id="t", split="train")
    return Episode(
        task=task, sample=0, step=0, weight_version=0, curriculum_k=9, window=TurnWindow(0, 9), turns=[], rows=rows,
        outcome="ok", end_reason="window",
    )  # fmt: skip


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
@pytest.mark.parametrize("objective", ["reverse_kl", "sampled_token"])
def test_one_row_per_episode_has_the_gradient_of_one_row_per_turn(single_process, objective, aggregation):
    layout = ParallelLayout()
    parallel.initialize(layout)
    student = Student(tiny_shape(), layout, OptimizerSettings(lr=1e-3), seed=1)
    teacher = Teacher(tiny_shape(num_layers=2, hidden_size=32), layout, seed=2)
    rng = random.Random(0)
    whole = [episode([whole_episode(rng, turns)]) for turns in (3, 1, 4)]
    split = [episode(rows_per_turn(one.rows[0])) for one in whole]
    gradients, num_tokens = [], []
    for episodes in (whole, split):
        microbatches = pack(episodes, max_tokens=80, aggregation=aggregation)
        compare = make_objective(objective, vocab_size=VOCAB)
        student.compute_gradients(microbatches, teacher.score(microbatches), compare)
        gradients.append({name: one.main_grad.clone() for name, one in build.named_parameters(student.chunks)})
        num_tokens.append(sum(batch.num_tokens for batch in microbatches))
    assert num_tokens[1] > 1.5 * num_tokens[0], "rows per turn repeat their prompts"
    for name, gradient in gradients[0].items():
        scale = gradient.abs().max()
        assert scale > 0, name
        torch.testing.assert_close(gradients[1][name], gradient, rtol=0, atol=1e-5 * float(scale), msg=name)
