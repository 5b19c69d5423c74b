"""A step on rows packed as a prefix forest is the step on the same rows packed one behind the other."""

from __future__ import annotations

import math
import random
from pathlib import Path

import pytest
import safetensors.torch
import torch
from gloo_world import run_ranks
from tiny_models import VOCAB, tiny_shape

from megatron_tcod.model import build, parallel
from megatron_tcod.model.parallel import ParallelLayout
from megatron_tcod.model.student import OptimizerSettings, Student
from megatron_tcod.model.teacher import Teacher
from megatron_tcod.objective import make_objective
from megatron_tcod.packing import pack
from megatron_tcod.trajectory import Episode, Microbatch, Task, TokenRow, TurnWindow

TOLERANCE = 1e-5
TEACHER = dict(num_layers=2, hidden_size=32, num_attention_heads=8, num_query_groups=4, ffn_hidden_size=64)


def sampled_row(rng, prefix, lengths, *, trains_at_once=False):
    """A row behind a replayed prefix: (observation, answer) lengths per turn, the answers sampled."""
    ids, mask = list(prefix), [0] * len(prefix)
    turn_ids = [0] * len(prefix)
    for turn, (observed, answered) in enumerate(lengths, start=1):
        for sampled, count in ((0, 0 if trains_at_once and turn == 1 else observed), (1, answered)):
            ids += [rng.randrange(VOCAB) for _ in range(count)]
            mask += [sampled] * count
            turn_ids += [turn] * count
    logprobs = [-math.log(VOCAB) + rng.uniform(-1, 1) for _ in range(sum(mask))]
    return TokenRow(token_ids=ids, turn_ids=turn_ids, loss_mask=mask, logprobs=logprobs)


def episode(task_id, rows):
    task = Task(env="household", task_id=task_id, split="train")
    return Episode(
        task=task, sample=0, step=0, weight_version=0, curriculum_k=9, window=TurnWindow(0, 9), turns=[], rows=rows,
        outcome="ok", end_reason="window",
    )  # fmt: skip


def samples_behind_a_prefix(seed, *, num_samples=8, prefix=80, branch=20):
    """G samples of one task, `prefix` of `prefix + branch` tokens replayed; the branches start with a sampled token."""
    rng = random.Random(seed)
    replayed = [rng.randrange(VOCAB) for _ in range(prefix)]
    lengths = [(branch // 4, branch // 4), (branch // 4, branch // 4)]
    first = [(0, branch // 4), *lengths[1:], (branch // 4, 0)]
    return [
        episode("t", [sampled_row(rng, replayed, first, trains_at_once=True)]) for _ in range(num_samples)
    ]


def nested_episodes(seed):
    """Two tasks: samples that part at several depths, one that ends where another goes on, two alike, one row a turn."""
    rng = random.Random(seed)
    system = [rng.randrange(VOCAB) for _ in range(20)]
    trunk = system + [rng.randrange(VOCAB) for _ in range(30)]
    parted = sampled_row(rng, trunk, [(0, 18), (4, 3)], trains_at_once=True)
    early = sampled_row(rng, trunk, [(3, 2), (2, 5)])
    # The same first answer as `parted`, then another way: what is shared has sampled tokens in it.
    late = sampled_row(rng, parted.token_ids[:68], [(2, 4)])
    late = TokenRow(
        token_ids=late.token_ids,
        turn_ids=parted.turn_ids[:68] + [2] * 6,
        loss_mask=parted.loss_mask[:68] + late.loss_mask[68:],
        logprobs=parted.logprobs[:18] + late.logprobs,
    )
    per_turn = sampled_row(rng, system + [rng.randrange(VOCAB) for _ in range(5)], [(3, 18), (17, 4), (2, 6)])
    return [
        episode("a", [parted]), episode("a", [early]), episode("a", [late]), episode("a", [parted]),
        episode("b", rows_per_turn(per_turn)),
    ]  # fmt: skip


def rows_per_turn(row):
    """The cumulative prompt of each turn, with the loss on that turn's answer alone: compact rows look like it."""
    rows, taken = [], 0
    for turn in range(1, max(row.turn_ids) + 1):
        stop = max(at for at, owner in enumerate(row.turn_ids) if owner == turn) + 1
        mask = [int(sampled and owner == turn) for sampled, owner in zip(row.loss_mask, row.turn_ids, strict=True)][:stop]
        logprobs = row.logprobs[taken : taken + sum(mask)]
        taken += len(logprobs)
        rows.append(TokenRow(token_ids=row.token_ids[:stop], turn_ids=row.turn_ids[:stop], loss_mask=mask, logprobs=logprobs))
    return rows


def step_gradients(layout, microbatches, *, objective="reverse_kl", is_tied=False):
    """Full gradients by name, the loss, and the per-token losses, of this replica's microbatches. Collective."""
    shape = tiny_shape(qk_layernorm=True, tie_word_embeddings=is_tied)
    student = Student(shape, layout, OptimizerSettings(lr=1e-3, clip_grad=0.0), seed=1)
    teacher = Teacher(tiny_shape(**TEACHER), layout, seed=2)
    compare = make_objective(objective, vocab_size=VOCAB)
    stats = student.train_step(microbatches, teacher.score(microbatches), compare)
    gradients = {name: one.main_grad.clone() for name, one in build.named_parameters(student.chunks)}
    return gradients, stats.loss, [figures["loss"] for figures in stats.per_token]


def assert_same(actual, expected):
    assert set(actual) == set(expected)
    for name, tensor in expected.items():
        difference = (actual[name].double() - tensor.double()).norm() / tensor.double().norm()
        assert tensor.any() and difference <= TOLERANCE, f"{name} differs by {float(difference):.1e}"


def keys(microbatch):
    """What tells the trained tokens of a step apart, but for rows that are alike."""
    columns = (microbatch.episode_ids, microbatch.turn_ids, microbatch.target_ids, microbatch.old_logprobs)
    return list(zip(*(column.tolist() for column in columns), strict=True))


def by_token(microbatches, values):
    """(what `keys` tells, value) of every trained token of a step, in one order for all packings."""
    pairs = zip(microbatches, values, strict=True)
    return sorted(entry for one, of_tokens in pairs for entry in zip(keys(one), of_tokens.tolist(), strict=True))


def num_tokens(microbatches):
    return sum(one.num_tokens for one in microbatches)


@pytest.fixture(scope="module")
def alone():
    parallel.initialize(ParallelLayout())
    yield ParallelLayout()
    parallel.shutdown()


def test_eight_samples_behind_a_prefix_of_80_percent_take_a_third_of_the_token_passes_and_give_the_same_gradient(alone):
    episodes = samples_behind_a_prefix(0)
    flat, tree = (pack(episodes, max_tokens=2000, prefix_tree=flag) for flag in (False, True))
    assert num_tokens(flat) == 8 * 100 and num_tokens(tree) == 80 + 8 * 20
    assert num_tokens(flat) >= 3 * num_tokens(tree)
    positions = tree[0].positions.tolist()
    assert positions.count(79) == 8, "the last token of the prefix predicts the first sampled token of every branch"
    assert len({tree[0].target_ids[slot].item() for slot in range(8)}) > 1
    expected, loss, per_token = step_gradients(alone, flat)
    actual, tree_loss, tree_per_token = step_gradients(alone, tree)
    assert_same(actual, expected)
    assert tree_loss == pytest.approx(loss, rel=1e-6)
    for (key, value), (tree_key, tree_value) in zip(by_token(flat, per_token), by_token(tree, tree_per_token), strict=True):
        assert tree_key == key and tree_value == pytest.approx(value, rel=1e-4, abs=1e-6)


@pytest.mark.parametrize("objective", ["reverse_kl", "sampled_token"])
@pytest.mark.parametrize("max_tokens", [150, 2000])
def test_nested_prefixes_give_the_gradient_of_rows_one_behind_the_other(alone, objective, max_tokens):
    episodes = nested_episodes(1)
    flat, tree = (pack(episodes, max_tokens=max_tokens, prefix_tree=flag) for flag in (False, True))
    assert num_tokens(tree) < 0.6 * num_tokens(flat) and num_rows(tree) == num_rows(flat)
    if max_tokens == 2000:
        assert depth(tree[0]) >= 3, "prefixes of prefixes"
    assert_same(step_gradients(alone, tree, objective=objective)[0], step_gradients(alone, flat, objective=objective)[0])


def test_the_teacher_scores_a_forest_as_it_scores_rows(alone):
    episodes = nested_episodes(2)
    teacher = Teacher(tiny_shape(**TEACHER), alone, seed=2)
    flat, tree = (pack(episodes, max_tokens=2000, prefix_tree=flag) for flag in (False, True))
    hidden = [by_token(packed, [target.hidden for target in teacher.score(packed)]) for packed in (flat, tree)]
    for (key, expected), (tree_key, actual) in zip(*hidden, strict=True):
        assert tree_key == key
        torch.testing.assert_close(torch.tensor(actual), torch.tensor(expected), rtol=1e-4, atol=1e-5)


def num_rows(microbatches):
    return sum(len(one.rows()) for one in microbatches)


def depth(microbatch: Microbatch):
    depths = []
    for parent in microbatch.parents.tolist():
        depths.append(1 + (depths[parent] if parent >= 0 else 0))
    return max(depths)


def test_the_vocabulary_is_seen_at_trained_positions_only(alone):
    """The head gets S rows: none for the prefix, however long, and no logits for tokens that were not sampled."""
    seen = []

    class Watching:
        needs_teacher = False

        def __init__(self):
            self.objective = make_objective("sft", vocab_size=VOCAB)

        def __call__(self, student_hidden, *args, **kwargs):
            seen.append(len(student_hidden))
            return self.objective(student_hidden, *args, **kwargs)

    episodes = samples_behind_a_prefix(3)
    sampled = sum(sum(row.loss_mask) for one in episodes for row in one.rows)
    student = Student(tiny_shape(), alone, OptimizerSettings(lr=1e-3), seed=1)
    for flag in (False, True):
        microbatches = pack(episodes, max_tokens=2000, prefix_tree=flag)
        student.train_step(microbatches, [None], Watching())
        assert sum(one.loss_weight.count_nonzero().item() for one in microbatches) == sampled
    assert seen == [sampled, sampled] and sampled == 8 * 10


LAYOUTS = {
    "tp2": ParallelLayout(tensor_model_parallel_size=2),
    "pp2": ParallelLayout(pipeline_model_parallel_size=2),
    "pp2 virtual": ParallelLayout(pipeline_model_parallel_size=2, virtual_pipeline_model_parallel_size=2),
    "dp2": ParallelLayout(),
}


def _run_layouts(directory: str) -> None:
    for name, layout in LAYOUTS.items():
        parallel.initialize(layout)
        share = dict(dp_rank=parallel.dp_rank(), dp_size=parallel.dp_size())
        for flag in (False, True):
            gradients, loss, _ = step_gradients(layout, pack(nested_episodes(4), max_tokens=150, prefix_tree=flag, **share))
            path = Path(directory) / f"{name}_{flag}_{parallel.rank()}.safetensors"
            safetensors.torch.save_file({**gradients, "loss": torch.tensor(loss)}, path)
    parallel.shutdown()


@pytest.fixture(scope="module")
def layouts(tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("prefix_layouts")
    run_ranks(2, _run_layouts, str(directory))
    return directory


@pytest.mark.parametrize("name", LAYOUTS)
def test_gradient_shards_of_a_forest_equal_those_of_rows_in_every_layout(layouts, alone, name):
    for rank in range(2):
        flat, tree = (safetensors.torch.load_file(layouts / f"{name}_{flag}_{rank}.safetensors") for flag in (False, True))
        assert_same(tree, flat)
    if name == "dp2":  # the sum over replicas is the gradient of one process
        whole, loss, _ = step_gradients(alone, pack(nested_episodes(4), max_tokens=2000))
        assert_same(tree, {**whole, "loss": torch.tensor(loss)})
