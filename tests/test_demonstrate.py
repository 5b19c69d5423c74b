"""Recording demonstrations: experts, imports and models at an endpoint, every file replayed before it is written."""

import json

import pytest

from megatron_tcod.demonstrate import main
from megatron_tcod.envs.demonstrations import read_demonstrations, replay_difference, write_demonstrations
from megatron_tcod.envs.household import Household


def flags(path, *more):
    return ["--env", "household", "--train-tasks", "12", "--max-turns", "20", "--demonstrations", str(path), *more]


def test_the_experts_solutions_are_recorded_and_can_be_replayed(tmp_path, capsys):
    assert main(flags(tmp_path / "a.jsonl", "--expert")) == 0
    out = capsys.readouterr().out
    assert "the expert solved 12 of 12 tasks" in out and "12 of 12 replayed with equal observations" in out
    found = read_demonstrations(tmp_path / "a.jsonl", "household")
    assert [one.task for one in found] == Household.tasks("train", count=12)
    assert all(one.success and replay_difference(Household, one) == "" for one in found)


def test_a_file_of_the_first_version_an_oracles_actions_and_our_own_are_imported(tmp_path, capsys):
    solved = [Household.expert(task, seed=0) for task in Household.tasks("train", count=4)]
    write_demonstrations(tmp_path / "own.jsonl", solved)
    lines = [
        {"task_id": one.task.task_id, "split": "train", "actions": [turn.action for turn in one.turns]} for one in solved
    ]
    lines[3]["actions"] = ["look"]
    (tmp_path / "gold.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    main(flags(tmp_path / "a.jsonl", "--import", str(tmp_path / "own.jsonl")))
    main(flags(tmp_path / "b.jsonl", "--import", str(tmp_path / "gold.jsonl")))
    assert "3 of 4 demonstrations solve their task" in capsys.readouterr().out
    assert read_demonstrations(tmp_path / "a.jsonl", "household") == solved
    ours = read_demonstrations(tmp_path / "b.jsonl", "household")
    assert [one.turns for one in ours] == [one.turns for one in solved[:3]]


def test_what_a_fresh_environment_does_not_repeat_is_named_and_not_written(tmp_path, capsys, caplog):
    solved = [Household.expert(task, seed=0) for task in Household.tasks("train", count=3)]
    object.__setattr__(solved[1].turns[2], "observation", "You are elsewhere.")
    write_demonstrations(tmp_path / "own.jsonl", solved)
    main(flags(tmp_path / "a.jsonl", "--import", str(tmp_path / "own.jsonl")))
    assert "2 of 3 replayed" in capsys.readouterr().out
    assert f"{solved[1].task.task_id} is not written: its replay differs at turn 2: recorded 'You are elsew" in caplog.text
    assert read_demonstrations(tmp_path / "a.jsonl", "household") == [solved[0], solved[2]]
    main(flags(tmp_path / "b.jsonl", "--no-verify", "--import", str(tmp_path / "own.jsonl")))
    assert read_demonstrations(tmp_path / "b.jsonl", "household") == solved


def test_a_model_at_an_endpoint_demonstrates_and_its_words_are_kept(single_process, tmp_path, capsys):
    """It solves a task in one attempt of two; every third task it does not solve."""
    pytest.importorskip("aiohttp")
    from chat_endpoint import ChatEndpoint, one_solves_one_looks

    hopeless = {Household.make(task).reset() for task in Household.tasks("train", count=12)[::3]}
    solves = one_solves_one_looks()

    def answer(messages, body):
        action = "look" if messages[0]["content"] in hopeless else solves(messages, body)
        return f"<think>what now?</think><action>{action}</action>"

    # the expert answers conversations of bare commands
    def strip(messages, body):
        bare = [
            message | {"content": message["content"].rpartition("<action>")[2].partition("</action>")[0]}
            if message["role"] == "assistant" else message
            for message in messages
        ]  # fmt: skip
        return answer(bare, body)

    path = tmp_path / "a.jsonl"
    with ChatEndpoint(strip) as endpoint:
        served = ["--endpoint-url", endpoint.url, "--action-format", "tags", "--demonstration-samples", "2"]
        assert main(flags(path, *served)) == 0
    out = capsys.readouterr().out
    assert "teacher pass@1 33.3%, pass@2 66.7% of 12 tasks" in out and "8 of 8 replayed" in out
    found = read_demonstrations(path, "household")
    assert len(found) == 8 and all(one.source.startswith("tiny at ") for one in found)
    for one in found:
        assert all(turn.text == f"<think>what now?</think><action>{turn.action}</action>" for turn in one.turns)
        assert [turn.action for turn in one.turns] == [turn.action for turn in Household.expert(one.task, seed=0).turns]


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--expert", "--import", "x"], "two sources"),
        (["--import", "/nowhere/x.jsonl"], "does not exist"),
        (["--expert", "--env", "alfwordl"], "did you mean alfworld"),
        (["--import", "{tmp}/broken.jsonl"], "broken.jsonl:1: the line is no JSON"),
        (["--import", "{tmp}/unsolved.jsonl"], "no successful one"),
    ],
)
def test_a_mistake_is_one_message_and_no_file(tmp_path, more, message):
    (tmp_path / "broken.jsonl").write_text("{]\n")
    (task,) = Household.tasks("train", count=1)
    (tmp_path / "unsolved.jsonl").write_text(json.dumps({"task_id": task.task_id, "split": "train", "actions": ["look"]}))
    with pytest.raises(ValueError, match=message):
        main(flags(tmp_path / "a.jsonl", *(word.replace("{tmp}", str(tmp_path)) for word in more)))
    assert not (tmp_path / "a.jsonl").exists()


@pytest.mark.parametrize("path", ["/proc/d.jsonl", "/etc/passwd/d.jsonl"])
def test_a_file_that_cannot_be_written_is_named_before_anything_is_played(path):
    with pytest.raises(ValueError, match="demonstrations = .*(keeps no files|is no directory)"):
        main(flags(path, "--expert"))


def test_an_existing_file_is_not_replaced(tmp_path):
    (tmp_path / "a.jsonl").touch()
    with pytest.raises(ValueError, match="exists; remove it"):
        main(flags(tmp_path / "a.jsonl", "--expert"))
