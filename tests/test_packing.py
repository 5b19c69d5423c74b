"""Packing: weights against their definition, nothing lost, nothing trained that was not sampled."""

import random
from dataclasses import replace
from fractions import Fraction

import pytest
import torch

from megatron_tcod.packing import AGGREGATIONS, build_microbatch, pack, weigh
from megatron_tcod.trajectory import Episode, Task, TokenRow, TurnWindow


def random_row(rng, turns):
    token_ids, turn_ids, mask = [rng.randrange(50)], [-1], [0]
    for turn in turns:
        for sampled in (0, 1):
            for _ in range(rng.randint(1, 6)):
                token_ids.append(rng.randrange(50))
                turn_ids.append(turn)
                mask.append(sampled)
    return TokenRow(
        token_ids=token_ids, turn_ids=turn_ids, loss_mask=mask, logprobs=[-rng.random() for _ in range(sum(mask))]
    )


def episode(rows, outcome="ok"):
    task = Task(env="household", task_id="t", split="train")
    return Episode(
        task=task, sample=0, step=0, weight_version=0, curriculum_k=1, window=TurnWindow(0, 9), turns=[], rows=rows,
        outcome=outcome, end_reason="window",
    )  # fmt: skip


def random_episodes(seed, count=9):
    rng = random.Random(seed)
    made = [episode([random_row(rng, range(rng.randint(1, 5)))]) for _ in range(count)]
    compact = episode([random_row(rng, [turn]) for turn in range(3)])
    return [*made, compact, episode([random_row(rng, range(2))], outcome="diverged"), episode([])]


def trained(microbatches):
    """(episode, turn, target, old log-prob) -> weight, over all microbatches."""
    found = []
    for batch in microbatches:
        found += zip(
            batch.episode_ids.tolist(), batch.turn_ids.tolist(), batch.target_ids.tolist(),
            batch.old_logprobs.tolist(), batch.loss_weight.tolist(), strict=True,
        )  # fmt: skip
    return sorted(found)


def expected_weights(episodes, aggregation):
    """The definition, in exact fractions."""
    tokens = [
        (number, turn)
        for number, one in enumerate(episodes)
        if one.outcome == "ok"
        for row in one.rows
        for turn, sampled in zip(row.turn_ids, row.loss_mask, strict=True)
        if sampled
    ]
    turns = {token: tokens.count(token) for token in tokens}
    lengths = {number: sum(other == number for other, _ in tokens) for number, _ in tokens}
    weight = {
        "token_mean": lambda number, turn: Fraction(1, len(tokens)),
        "turn_mean": lambda number, turn: Fraction(1, len(turns) * turns[number, turn]),
        "sequence_mean": lambda number, turn: Fraction(1, len(lengths) * lengths[number]),
        "sequence_sum": lambda number, turn: Fraction(1, len(lengths)),
    }[aggregation]
    return sorted((number, turn, float(weight(number, turn))) for number, turn in tokens)


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
@pytest.mark.parametrize("max_tokens", [1, 40, 10**6])
def test_weights_equal_their_definition_in_every_packing(aggregation, max_tokens):
    episodes = random_episodes(3)
    found = [
        (number, turn, weight)
        for number, turn, _, _, weight in trained(pack(episodes, max_tokens=max_tokens, aggregation=aggregation))
    ]
    for got, expected in zip(sorted(found), expected_weights(episodes, aggregation), strict=True):
        assert got == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("dp_size", [1, 2, 3, 7, 40])
def test_ranks_together_train_exactly_the_sampled_tokens(dp_size):
    episodes = random_episodes(5)
    sampled = sorted(
        (number, turn, token)
        for number, one in enumerate(episodes)
        if one.outcome == "ok"
        for row in one.rows
        for token, turn, mask in zip(row.token_ids, row.turn_ids, row.loss_mask, strict=True)
        if mask
    )
    found = []
    for rank in range(dp_size):
        found += trained(pack(episodes, max_tokens=60, dp_rank=rank, dp_size=dp_size))
    assert sorted(entry[:3] for entry in found) == sampled


def test_positions_predict_their_targets_and_log_probabilities_stay_aligned():
    episodes = random_episodes(7)
    rows = [row for one in episodes if one.outcome == "ok" for row in one.rows if any(row.loss_mask)]
    by_tokens = {tuple(row.token_ids): row for row in rows}
    for batch in pack(episodes, max_tokens=50):
        bounds = batch.cu_seqlens.tolist()
        for start, stop in zip(bounds, bounds[1:], strict=False):
            row = by_tokens.pop(tuple(batch.token_ids[start:stop].tolist()))
            here = (batch.positions >= start) & (batch.positions < stop)
            expected = [at - 1 for at, mask in enumerate(row.loss_mask) if mask]
            assert (batch.positions[here] - start).tolist() == expected
            assert batch.target_ids[here].tolist() == [row.token_ids[at + 1] for at in expected]
            assert torch.equal(batch.old_logprobs[here], torch.tensor(row.logprobs))
    assert not by_tokens


def test_bins_respect_the_budget_unless_one_row_is_longer():
    for batch in pack(random_episodes(11), max_tokens=45):
        assert batch.num_tokens <= 45 or len(batch.cu_seqlens) == 2


def test_ranks_are_balanced_in_tokens():
    episodes = random_episodes(13, count=60)
    loads = [sum(batch.num_tokens for batch in pack(episodes, max_tokens=99, dp_rank=rank, dp_size=4)) for rank in range(4)]
    longest = max(len(row.token_ids) for one in episodes for row in one.rows)
    assert max(loads) - min(loads) <= longest


def test_nothing_to_train_gives_no_microbatch():
    assert pack([episode([], outcome="env_fault")], max_tokens=10) == []


def forest_episodes(seed, count=12):
    """Tasks whose samples replay one prefix and part at random, few ids, so that they may part late."""
    rng = random.Random(seed)
    trunks = {name: [rng.randrange(50) for _ in range(30)] for name in "abc"}
    made = []
    for _ in range(count):
        name = rng.choice("abc")
        row = random_row(rng, range(3))
        prefix = trunks[name][: rng.choice([20, 30, 30])]
        mask = [0] * len(prefix) + [0] + row.loss_mask[1:]
        row = TokenRow(
            token_ids=prefix + [token % 2 for token in row.token_ids], turn_ids=[0] * len(prefix) + row.turn_ids,
            loss_mask=mask, logprobs=row.logprobs,
        )  # fmt: skip
        made.append(replace(episode([row]), task=Task(env="household", task_id=name, split="train")))
    return made


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("least", [1, 2, 16, None])
def test_each_row_of_a_microbatch_is_found_with_its_trained_tokens(seed, least):
    episodes = forest_episodes(seed)
    rows = weigh(episodes, "sequence_mean")
    batch = build_microbatch(rows, least_shared=least)
    assert batch.positions.diff().min() >= 0, "positions ascend"
    places = batch.rows()
    assert sorted(slot for place in places for slot in place.slots.tolist()) == list(range(len(batch.positions)))
    assert batch.num_row_tokens == sum(len(one.row.token_ids) for one in rows)
    for weighted, place in zip(rows, places, strict=True):
        row = weighted.row
        assert batch.token_ids[place.tokens].tolist() == row.token_ids
        sampled = [at for at, mask in enumerate(row.loss_mask) if mask]
        assert batch.positions[place.slots].tolist() == [place.tokens[at - 1].item() for at in sampled]
        assert batch.target_ids[place.slots].tolist() == [row.token_ids[at] for at in sampled]
        assert torch.equal(batch.old_logprobs[place.slots], torch.tensor(row.logprobs))
        assert torch.equal(batch.loss_weight[place.slots], torch.tensor(weighted.weights))
        assert set(batch.episode_ids[place.slots].tolist()) == {weighted.episode_id}
        assert batch.turn_ids[place.slots].tolist() == [row.turn_ids[at] for at in sampled]


@pytest.mark.parametrize("dp_size", [1, 2, 5])
@pytest.mark.parametrize("max_tokens", [1, 90, 400])
def test_a_forest_trains_the_same_tokens_in_every_deal(dp_size, max_tokens):
    episodes = forest_episodes(1, count=30)
    apart, shared = [], []
    for found, prefix_tree in ((apart, False), (shared, True)):
        for rank in range(dp_size):
            batches = pack(
                episodes, max_tokens=max_tokens, prefix_tree=prefix_tree, pair_cost=0.01, dp_rank=rank, dp_size=dp_size
            )
            assert all(batch.num_tokens <= max_tokens or len(batch.rows()) == 1 for batch in batches)
            found += trained(batches)
    assert sorted(shared) == sorted(apart)


def test_a_task_that_holds_back_the_step_is_split_over_ranks_and_others_stay_together():
    rng = random.Random(2)
    trunk = [rng.randrange(1000) for _ in range(40)]
    ids = [trunk + [rng.randrange(1000) for _ in range(60)] for _ in range(8)]
    rows = [
        TokenRow(token_ids=one, turn_ids=[0] * 100, loss_mask=[0] * 40 + [1] * 60, logprobs=[-1.0] * 60) for one in ids
    ]
    one_task = [episode([row]) for row in rows]
    tokens = [sum(batch.num_tokens for batch in share) for share in shares(one_task, 4)]
    assert tokens == [40 + 2 * 60] * 4, "better than 520 tokens on one rank and none on three"
    four_tasks = [
        replace(one, task=Task(env="household", task_id=str(index // 2), split="train"))
        for index, one in enumerate(one_task)
    ]
    assert [len(share) for share in shares(four_tasks, 4)] == [1] * 4
    assert sum(batch.num_tokens for share in shares(four_tasks, 4) for batch in share) == 4 * (40 + 2 * 60)


def shares(episodes, dp_size):
    return [
        pack(episodes, max_tokens=10**6, prefix_tree=True, pair_cost=0.01, dp_rank=rank, dp_size=dp_size)
        for rank in range(dp_size)
    ]


def test_ranks_are_balanced_in_the_cost_of_attention_where_balanced_tokens_are_not():
    rng = random.Random(4)
    lengths = [1000] * 2 + [100] * 20 + [400] * 5
    episodes = [
        episode([TokenRow(token_ids=[rng.randrange(50) for _ in range(n)], turn_ids=[0] * n, loss_mask=[0] * (n - 1) + [1],
                          logprobs=[-1.0])])
        for n in lengths
    ]  # fmt: skip

    def imbalance(pair_cost):
        work = []
        for rank in range(3):
            batches = pack(episodes, max_tokens=1000, pair_cost=pair_cost, dp_rank=rank, dp_size=3)
            work.append(sum(batch.num_tokens + 0.01 * batch.num_pairs for batch in batches))
        return max(work) / (sum(work) / 3) - 1

    assert imbalance(0.01) < 0.15 < imbalance(0.0)


@pytest.mark.parametrize("seed", range(3))
def test_bins_are_few_and_even(seed):
    episodes = random_episodes(seed, count=40)
    batches = pack(episodes, max_tokens=60)
    tokens = [batch.num_tokens for batch in batches]
    assert len(batches) <= -(-sum(tokens) // 60) + 1
    assert max(tokens) - min(tokens) <= 15


def test_unknown_aggregation_is_refused():
    with pytest.raises(ValueError, match="token_mean"):
        pack(random_episodes(1), max_tokens=10, aggregation="mean")


def test_a_row_cannot_train_its_first_token():
    with pytest.raises(ValueError, match="first token"):
        TokenRow(token_ids=[1], turn_ids=[0], loss_mask=[1], logprobs=[0.0])
