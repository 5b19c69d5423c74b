"""A run whose replays do not fit its demonstrations counts that, and stops where the config says so."""

import dataclasses

import pytest

from megatron_tcod.envs.demonstrations import write_demonstrations
from megatron_tcod.envs.household import Household
from megatron_tcod.journal import read_journal
from megatron_tcod.train import main


def test_replays_that_diverge_are_counted_and_stop_the_run_over_the_limit(single_process, run_flags, tmp_path):
    wrong = []
    for task in Household.tasks("train", count=3):
        one = Household.expert(task, seed=0)
        turns = [one.turns[0], dataclasses.replace(one.turns[1], observation="You are somewhere else."), *one.turns[2:]]
        wrong.append(dataclasses.replace(one, turns=turns))
    path = tmp_path / "demonstrations.jsonl"
    write_demonstrations(path, wrong)
    flags = [*run_flags, "--train-tasks", "3", "--max-turns", "20", "--curriculum", "b2f", "--demonstrations", str(path)]
    flags += ["--train-iters", "1", "--rollout-max-context-len", "1024"]
    assert main(flags) == 0
    (record,) = read_journal(tmp_path / "run" / "metrics.jsonl").records
    assert record["rollout/outcome/diverged"] == 3 and record["tokens/trained"] == 0
    with pytest.raises(ValueError, match="3 of 3 replays differ .*max_diverged 0.5.*You are somewhere else"):
        main([*flags, "--max-diverged", "0.5", "--save", str(tmp_path / "stopped")])
