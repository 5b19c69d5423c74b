"""Packing: weights against their definition, nothing lost, nothing trained that was not sampled."""

import random
from fractions import Fraction

import pytest
import torch

from megatron_tcod.packing import AGGREGATIONS, pack
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


def test_unknown_aggregation_is_refused():
    with pytest.raises(ValueError, match="token_mean"):
        pack(random_episodes(1), max_tokens=10, aggregation="mean")


def test_a_row_cannot_train_its_first_token():
    with pytest.raises(ValueError, match="first token"):
        TokenRow(token_ids=[1], turn_ids=[0], loss_mask=[1], logprobs=[0.0])
