"""Demonstration files: exact round trips, published files replayed, and every broken line named."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import random

import msgspec
import pytest

from megatron_tcod.envs.alfworld import ALFWorld
from megatron_tcod.envs.demonstrations import (
    locate_game,
    read_demonstrations,
    replay_difference,
    seal,
    write_demonstrations,
)
from megatron_tcod.envs.household import Household
from megatron_tcod.trajectory import Demonstration, DemonstrationTurn, Task


@pytest.fixture
def demonstrations() -> list[Demonstration]:
    tasks = Household.tasks("train", count=20)
    return [Household.expert(task, seed=seed, mistake_rate=0.2) for seed, task in enumerate(tasks)]


def test_what_is_written_is_read_back_exactly(tmp_path, demonstrations):
    path = tmp_path / "demos.jsonl"
    hostile = DemonstrationTurn(observation="\u2028 <|im_end|>\n{}\x00", action="é", text="```\n\"'", token_ids=[0, 9])
    talking = Demonstration(
        task=Task(env="household", task_id="x", split="train", payload={"deep": [1, {"a": None}]}),
        turns=[hostile],
        success=False,
        source="checkpoints/teacher",
    )
    assert write_demonstrations(path, [*demonstrations, talking]) == 21
    assert read_demonstrations(path, "household") == [*demonstrations, talking]
    assert read_demonstrations(path, "household", limit=3) == demonstrations[:3]
    assert len(path.read_bytes().splitlines()) >= 21 and not list(tmp_path.glob("*.partial"))


def test_file_is_plain_json_lines_with_a_version(tmp_path, demonstrations):
    path = tmp_path / "demos.jsonl"
    write_demonstrations(path, demonstrations[:1])
    line, end = map(json.loads, path.read_text().splitlines())
    assert line["version"] == end["version"] == 2
    assert line["demonstration"]["turns"][0]["action"] == demonstrations[0].turns[0].action
    assert end["end"] == {
        "demonstrations": 1, "sha256": hashlib.sha256(path.read_bytes().splitlines(keepends=True)[0]).hexdigest()
    }  # fmt: skip


def test_a_lines_hash_is_that_of_the_line_without_it(tmp_path, demonstrations):
    path = tmp_path / "demos.jsonl"
    write_demonstrations(path, demonstrations[:3])
    for text in path.read_text().splitlines()[:-1]:
        line = json.loads(text)
        without = text.replace(f',"sha256":"{line["sha256"]}"', "")
        assert hashlib.sha256(without.encode()).hexdigest() == line["sha256"]


def test_failed_write_leaves_the_old_file(tmp_path, demonstrations):
    path = tmp_path / "demos.jsonl"
    write_demonstrations(path, demonstrations[:2])

    def breaks():
        yield demonstrations[0]
        raise RuntimeError("the collector died")

    with pytest.raises(RuntimeError):
        write_demonstrations(path, breaks())
    assert read_demonstrations(path, "household") == demonstrations[:2]


def test_a_flipped_bit_anywhere_is_found(tmp_path, demonstrations):
    path = tmp_path / "demos.jsonl"
    write_demonstrations(path, demonstrations[:2])
    whole = path.read_bytes()
    rng = random.Random(0)
    for _ in range(300):
        at, bit = rng.randrange(len(whole)), 1 << rng.randrange(8)
        path.write_bytes(whole[:at] + bytes([whole[at] ^ bit]) + whole[at + 1 :])
        with pytest.raises(ValueError, match="demos.jsonl"):
            read_demonstrations(path, "household")


def test_a_file_that_is_cut_off_anywhere_is_found(tmp_path, demonstrations):
    path = tmp_path / "demos.jsonl"
    write_demonstrations(path, demonstrations[:3])
    whole = path.read_bytes()
    ends = [index + 1 for index, byte in enumerate(whole[:-1]) if byte == ord("\n")]
    for at in [*ends, *(end - 1 for end in ends), *range(1, len(whole) - 2, 97)]:
        path.write_bytes(whole[:at])
        with pytest.raises(ValueError, match="cut off|end.demonstrations|is no JSON"):
            read_demonstrations(path, "household")


def test_lines_that_are_lost_added_or_swapped_are_found_and_whole_files_may_be_joined(tmp_path, demonstrations):
    path, other = tmp_path / "demos.jsonl", tmp_path / "other.jsonl"
    write_demonstrations(path, demonstrations[:3])
    write_demonstrations(other, demonstrations[3:5])
    a, b, c, end = path.read_bytes().splitlines(keepends=True)
    for lines, message in (
        ([a, c, end], ":3: end.demonstrations is 3, but there are 2"),
        ([a, b, c, other.read_bytes().splitlines(keepends=True)[0], end], ":5: end.demonstrations is 3, but there are 4"),
        ([b, a, c, end], ":4: end.sha256 is not that of the lines"),
        ([a, b, c, end, a, b, c, end], r":5: task .* is solved already in .*:1; keep one"),
    ):
        path.write_bytes(b"".join(lines))
        with pytest.raises(ValueError, match=message):
            read_demonstrations(path, "household")
    path.write_bytes(b"".join([a, b, c, end]) + other.read_bytes())
    assert read_demonstrations(path, "household") == demonstrations[:5]


def test_the_first_version_is_read_as_it_is(tmp_path, demonstrations):
    path = tmp_path / "old.jsonl"
    path.write_text("".join(line_of(one) + "\n" for one in demonstrations))
    assert read_demonstrations(path, "household") == demonstrations


def test_a_line_without_end_is_refused_before_it_is_read_whole(tmp_path, demonstrations, monkeypatch):
    path = tmp_path / "demos.jsonl"
    write_demonstrations(path, demonstrations[:1])
    with open(path, "ab") as file:
        file.seek((65 << 20) + path.stat().st_size)
        file.write(b"}")
        file.truncate((200 << 20) + file.tell())  # sparse
    with pytest.raises(ValueError, match=":3: the line has more than 67108864 bytes"):
        read_demonstrations(path, "household")


def line_of(demonstration: Demonstration, **changes: object) -> str:
    fields = msgspec.to_builtins(demonstration)
    return json.dumps({"version": 1, "demonstration": {**fields, **changes}})


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        (lambda demo: line_of(demo)[:-40], "the line is cut off"),
        (lambda demo: line_of(demo)[:-40] + "\n", "the line is no JSON"),
        (lambda demo: "\n", "the line is no JSON"),
        (lambda demo: "[1, 2]\n", "the line is a list; expected one JSON object"),
        (lambda demo: '{"version": 1}\n', "missing required field `demonstration`"),
        (lambda demo: '{"version": 3, "demonstration": {}}\n', "version 3; expected at most 2"),
        (lambda demo: '{"version": true, "demonstration": {}}\n', "version True; expected at most 2"),
        (lambda demo: '{"version": "2", "demonstration": {}}\n', "version '2'; expected at most 2"),
        (lambda demo: line_of(demo).replace('"version": 1', '"version": 2'), "sha256 is not the line's last field"),
        (lambda demo: seal(demo).decode().replace('"success":true', '"success":false'), "sha256 does not fit the line"),
        (lambda demo: seal(demo).decode().replace('"version":2', '"version":1'), "sha256 does not fit the line"),
        (lambda demo: "[" * 100_000 + "\n", "recursion"),
        (lambda demo: line_of(demo).replace('"success": true', '"success": NaN'), "is no JSON|is cut off"),
        (lambda demo: line_of(demo).replace('"success": true', '"success": "\\ud800"'), "surrogate|cut off|no JSON|bool"),
        (lambda demo: line_of(demo, turns=[{"observation": "o", "action": "a", "text": "t", "token_ids": ["1"]}]),
         r"turns\[0\].token_ids\[0\]"),
        (lambda demo: '{"version": 2, "end": {"demonstrations": "4", "sha256": ""}}\n', "end.demonstrations"),
        (lambda demo: '{"task_id": "heat/none/1", "split": "train", "actions": []}\n', "is none of the 1000 tasks"),
        (lambda demo: '{"task_id": "x", "split": "train", "actions": [1]}\n', r"actions\[0\]"),
        (lambda demo: '{"task_id": "x", "actions": []}\n', "required field `split`"),
        (lambda demo: '{"demonstration": {}}\n', "required field"),
        (lambda demo: line_of(demo, turns=[{"action": 3}]), r"turns\[0\]"),
        (lambda demo: line_of(demo, success="yes"), "Expected `bool`"),
        (lambda demo: line_of(demo)[:-1] + ', "extra": 1}', "unknown field `extra`"),
        (lambda demo: line_of(demo, task={**msgspec.to_builtins(demo.task), "env": "webshop"}), "expected 'household'"),
        (lambda demo: '{"game_file": "x", "actions": []}\n', "expected lines for env 'household'"),
        (lambda demo: '{"game_file": "x", "actions": "look"}\n', "Expected `array`"),
    ],
)
def test_broken_line_is_named_with_what_was_expected(tmp_path, demonstrations, broken, message):
    path = tmp_path / "demos.jsonl"
    path.write_text("".join(seal(one).decode() for one in demonstrations[:4]) + broken(demonstrations[4]))
    with pytest.raises(ValueError, match=message) as caught:
        read_demonstrations(path, "household")
    assert f"{path}:5: " in str(caught.value)


def test_invalid_utf8_is_named(tmp_path):
    path = tmp_path / "demos.jsonl"
    path.write_bytes(b'{"version": "\xff\xfe"}\n')
    with pytest.raises(ValueError, match=r"demos.jsonl:1: "):
        read_demonstrations(path, "household")


def test_missing_and_empty_files_are_errors(tmp_path):
    with pytest.raises(ValueError, match="does not exist"):
        read_demonstrations(tmp_path / "none.jsonl", "household")
    (tmp_path / "empty.jsonl").touch()
    with pytest.raises(ValueError, match="is empty"):
        read_demonstrations(tmp_path / "empty.jsonl", "household")


def test_an_oracles_actions_become_a_demonstration_of_any_environment(tmp_path, demonstrations):
    path = tmp_path / "gold.jsonl"
    with open(path, "w") as file:
        for one in demonstrations:
            actions = [turn.action for turn in one.turns]
            file.write(json.dumps({"task_id": one.task.task_id, "split": "train", "actions": actions, "note": 1}) + "\n")
    for read, original in zip(read_demonstrations(path, "household"), demonstrations, strict=True):
        assert read.task == original.task and read.success and read.final_observation == original.final_observation
        assert [(turn.observation, turn.action) for turn in read.turns] == [
            (turn.observation, turn.action) for turn in original.turns
        ]


def test_without_an_environment_files_of_ours_are_read_and_bare_actions_are_not(tmp_path, demonstrations):
    path = tmp_path / "demonstrations.jsonl"
    write_demonstrations(path, demonstrations)
    assert read_demonstrations(path, None) == demonstrations
    path.write_text(json.dumps({"task_id": "heat/train/0", "split": "train", "actions": ["look"]}) + "\n")
    with pytest.raises(ValueError, match="demonstrations.jsonl:1: the line holds no observations; import the file"):
        read_demonstrations(path, None)


def test_a_replay_finds_every_recorded_observation_that_is_not_shown(demonstrations):
    one = demonstrations[0]
    assert replay_difference(Household, one) == ""
    for index, turn in enumerate(one.turns):
        changed = dataclasses.replace(turn, observation=turn.observation + " A cat.")
        turns = [*one.turns[:index], changed, *one.turns[index + 1 :]]
        assert f"turn {index}: " in replay_difference(Household, dataclasses.replace(one, turns=turns))
    spaced = dataclasses.replace(one.turns[0], observation=one.turns[0].observation.replace(" ", "  "))
    assert replay_difference(Household, dataclasses.replace(one, turns=[spaced, *one.turns[1:]])) == ""
    for changes in ({"final_observation": "?"}, {"success": False}, {"turns": one.turns[:-1], "final_observation": ""}):
        assert "at the end: " in replay_difference(Household, dataclasses.replace(one, **changes))
    longer = dataclasses.replace(one, turns=[*one.turns, one.turns[0]])
    assert "the episode is over" in replay_difference(Household, longer)


@pytest.mark.parametrize(
    "published",
    [
        "/data/someone/data/json_2.1.1/{game}",
        "{game}",
        "C:\\alfworld\\json_2.1.1\\{game}",
        "/mnt/train/alfworld/train/valid_seen/json_2.1.1/{game}",
    ],
)
def test_published_path_is_found_below_the_root(tmp_path, published):
    game = "train/pick_and_place_simple-Pen-None-Desk-1/trial_T1/game.tw-pddl"
    (tmp_path / game).parent.mkdir(parents=True)
    (tmp_path / game).touch()
    spelled = game.replace("/", "\\") if "\\" in published else game
    assert locate_game(published.format(game=spelled), tmp_path, where="f:1") == game


def test_published_path_that_is_not_there_or_climbs_out_is_an_error(tmp_path):
    for published in ("/data/train/a/b/game.tw-pddl", "train/../train/b/game.tw-pddl", "", "/etc/passwd"):
        with pytest.raises(ValueError, match="f:7: no tail of game_file"):
            locate_game(published, tmp_path, where="f:7")


def test_published_file_is_recorded_by_replaying_it(tmp_path, alfworld_games):
    tasks = ALFWorld.tasks("train", root=str(alfworld_games), count=3)
    expected = [ALFWorld.expert(task, seed=0, root=str(alfworld_games)) for task in tasks]
    path = tmp_path / "train_expert.jsonl"
    with open(path, "w") as file:
        for index, demonstration in enumerate(expected):
            actions = [turn.action for turn in demonstration.turns]
            game = f"/somebody/else/alfworld_data/json_2.1.1/{demonstration.task.payload['game']}"
            file.write(json.dumps({"game_file": game, "actions": actions if index < 2 else [], "target": ""}) + "\n")
    read = read_demonstrations(path, "alfworld", root=str(alfworld_games))
    for demonstration, original in zip(read[:2], expected[:2], strict=True):
        assert demonstration.task == original.task and demonstration.success and demonstration.source == "published"
        assert demonstration.turns == original.turns
        assert demonstration.final_observation == original.final_observation
    assert read[2].turns == [] and not read[2].success
    write_demonstrations(tmp_path / "recorded.jsonl", read)
    assert read_demonstrations(tmp_path / "recorded.jsonl", "alfworld") == read


def test_unsolved_and_overlong_published_commands_are_kept_as_they_are(tmp_path, alfworld_games, caplog):
    task = ALFWorld.tasks("train", root=str(alfworld_games), count=1)[0]
    actions = [turn.action for turn in ALFWorld.expert(task, seed=0, root=str(alfworld_games)).turns]
    path = tmp_path / "train_expert.jsonl"
    lines = [["fly to moon 1", actions[0]], [*actions, "look", "look"]]
    path.write_text("".join(json.dumps({"game_file": task.payload["game"], "actions": line}) + "\n" for line in lines))
    short, long = read_demonstrations(path, "alfworld", root=str(alfworld_games))
    assert not short.success and short.turns[1].observation == "Nothing happens."
    assert long.success and len(long.turns) == len(actions)
    assert f"solved by {len(actions)} of {len(actions) + 2} commands" in caplog.text
