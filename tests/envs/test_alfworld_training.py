"""Distillation over real ALFWorld games, from demonstrations in the published format."""

import json

import pytest

from megatron_tcod.envs.alfworld import ALFWorld
from megatron_tcod.journal import read_journal
from megatron_tcod.train import main


@pytest.mark.parametrize("engine", ["embedded", pytest.param("sglang", marks=pytest.mark.sglang)])
def test_b2f_replays_published_demonstrations_in_the_real_engine(single_process, request, alfworld_games, tmp_path, engine):
    run_flags = request.getfixturevalue("sglang_flags" if engine == "sglang" else "run_flags")
    tasks = ALFWorld.tasks("train", count=3, root=str(alfworld_games))
    experts = {task.task_id: ALFWorld.expert(task, seed=0, root=str(alfworld_games)) for task in tasks}
    path = tmp_path / "train_expert.jsonl"
    with open(path, "w") as file:
        for task, expert in zip(tasks, experts.values(), strict=True):
            game = f"/data/elsewhere/{task.payload['game']}"
            file.write(json.dumps({"game_file": game, "actions": [turn.action for turn in expert.turns]}) + "\n")
    flags = [
        *run_flags,
        "--train-tasks", "3",
        "--env", "alfworld",
        "--env-options", "root", str(alfworld_games),
        "--curriculum", "b2f",
        "--k-start", "2",
        "--max-turns", "100",
        "--demonstrations", str(path),
        "--rollout-max-context-len", "2048",
        "--history-mode", "compact",
        "--eval-split", "valid_unseen",
        "--eval-tasks", "1",
        "--train-iters", "1",
        "--b2f-stop", "demonstration",
    ]  # fmt: skip
    assert main(flags) == 0
    episodes = list(read_journal(tmp_path / "run" / "trajectories.jsonl").records)
    assert [episode["outcome"] for episode in episodes] == ["ok"] * 3
    (step,) = read_journal(tmp_path / "run" / "metrics.jsonl").records
    assert step["logprob/rollout_gap"] <= 1e-4
    for episode in episodes:
        recorded = experts[episode["task"]["task_id"]].turns
        replayed = [turn for turn in episode["turns"] if turn["actor"] == "teacher"]
        assert [turn["action"] for turn in replayed] == [turn.action for turn in recorded[:-2]]
        assert [turn["observation"] for turn in replayed] == [turn.observation for turn in recorded[:-2]]
        assert 1 <= sum(turn["actor"] == "student" for turn in episode["turns"]) <= 2
