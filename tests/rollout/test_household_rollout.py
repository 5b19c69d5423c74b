"""The real parts together: household world, tokenizer, engine, verified replay, both directions of the curriculum."""

import asyncio

import pytest
import torch
from tiny_hf import logprobs_of, tiny_model
from tokenizer_fixtures import small_tokenizer

from megatron_tcod.envs.household import Household
from megatron_tcod.rollout.embedded_engine import EmbeddedEngine
from megatron_tcod.rollout.episodes import Assignment, PlaySettings, collect_episodes
from megatron_tcod.trajectory import Episode, TurnWindow, decode, encode


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return small_tokenizer(tmp_path_factory.mktemp("tokenizer"), system_prompt="You act in a house.")


@pytest.fixture(scope="module")
def model(tokenizer):
    return tiny_model("qwen3", vocab_size=tokenizer.vocab_size + 7, max_position_embeddings=4096)


def engine_of(model, tokenizer, max_running):
    engine = EmbeddedEngine(
        model.config.to_dict(),
        max_running=max_running,
        max_total_tokens=40_000,
        max_context=4000,
        vocab_size=tokenizer.vocab_size,
    )
    engine.load_weights(iter(model.state_dict().items()), version=4)
    return engine


def collect(model, tokenizer, assignments, *, max_running=16, **changes):
    engine = engine_of(model, tokenizer, max_running)
    settings = PlaySettings(**({"max_turns": 12, "max_new_tokens": 6, "max_context": 4000, "seed": 1} | changes))
    return engine, asyncio.run(
        collect_episodes(Household, assignments, engine=engine, tokenizer=tokenizer, settings=settings, step=4)
    )


def backward_assignments(num_tasks=4, num_samples=3, depth=2, mistake_rate=0.3):
    """Windows over the last `depth` turns of demonstrations with injected mistakes, refused commands among them."""
    assignments = []
    for task in Household.tasks("train", count=num_tasks):
        demonstration = Household.expert(task, seed=3, mistake_rate=mistake_rate)
        length = len(demonstration.turns)
        window = TurnWindow(max(0, length - depth), length)
        assignments += [
            Assignment(task=task, window=window, sample=s, demonstration=demonstration, curriculum_k=depth)
            for s in range(num_samples)
        ]
    return assignments


def test_backward_windows_replay_the_expert_and_train_only_the_students_tokens(model, tokenizer):
    assignments = backward_assignments()
    engine, episodes = collect(model, tokenizer, assignments, max_turns=60)
    assert [(e.outcome, e.weight_version) for e in episodes] == [("ok", 4)] * len(assignments)
    for assignment, episode in zip(assignments, episodes, strict=True):
        start = assignment.window.start
        recorded = assignment.demonstration.turns
        assert [t.action for t in episode.turns[:start]] == [t.action for t in recorded[:start]]
        assert [t.observation for t in episode.turns[: start + 1]] == [t.observation for t in recorded[: start + 1]]
        (row,) = episode.rows
        trained = torch.tensor(row.loss_mask, dtype=torch.bool)
        assert torch.tensor(row.token_ids)[trained].tolist() == [i for t in episode.turns[start:] for i in t.token_ids]
        assert {t for t, m in zip(row.turn_ids, row.loss_mask, strict=True) if m} == set(range(start, len(episode.turns)))
        padded = logprobs_of(model, row.token_ids, num_ids=tokenizer.vocab_size)[trained[1:]]
        torch.testing.assert_close(torch.tensor(row.logprobs), padded, rtol=0, atol=1e-4)
        assert decode(encode(episode), Episode) == episode
    first_turns = [episode.turns[e.window.start] for e, episode in zip(assignments, episodes, strict=True)]
    assert all(turn.cached_tokens == turn.prompt_tokens - 1 for turn in first_turns)  # warmed before the fan-out
    assert engine.counters.computed_tokens < engine.counters.prompt_tokens / 3


def test_the_expert_replayed_to_its_end_is_solved_in_replay(model, tokenizer):
    task = Household.tasks("train", count=1)[0]
    demonstration = Household.expert(task, seed=0)
    length = len(demonstration.turns)
    assignment = Assignment(task=task, window=TurnWindow(length, length + 5), demonstration=demonstration)
    _, (episode,) = collect(model, tokenizer, [assignment], max_turns=40)
    assert (episode.outcome, episode.end_reason, episode.success) == ("solved_in_replay", "done", True)


@pytest.mark.parametrize("history_mode", ["full", "compact"])
def test_forward_windows_give_the_same_episodes_however_they_are_scheduled(model, tokenizer, history_mode):
    assignments = [
        Assignment(task=task, window=TurnWindow(0, 4), sample=s) for task in Household.tasks("train", count=4) for s in (0, 1)
    ]
    _, together = collect(model, tokenizer, assignments, history_mode=history_mode)
    _, few_rows = collect(model, tokenizer, assignments, history_mode=history_mode, max_running=2)
    _, alone = collect(model, tokenizer, assignments[5:6], history_mode=history_mode)
    for a, b in ((together, few_rows), (together[5:6], alone)):
        assert [[t.token_ids for t in e.turns] for e in a] == [[t.token_ids for t in e.turns] for e in b]
    assert all(e.outcome == "ok" and len(e.turns) == 4 and e.end_reason == "window" for e in together)
    assert {len(e.rows) for e in together} == ({1} if history_mode == "full" else {4})
    samples = [tuple(e.turns[0].token_ids) for e in together]
    assert len(set(samples)) == len(samples)


def test_greedy_play_does_not_depend_on_the_seed(model, tokenizer):
    assignments = [Assignment(task=task, window=TurnWindow(0, 3)) for task in Household.tasks("held_out", count=2)]
    plays = [collect(model, tokenizer, assignments, temperature=0.0, seed=seed)[1] for seed in (1, 2)]
    assert plays[0] == plays[1]
