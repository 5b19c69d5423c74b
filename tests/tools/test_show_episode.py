"""The episode printer from the command line: what it colours, what it escapes, and what it says of broken files."""

import io
import json
import os
import re
import subprocess
import sys
import threading
import unicodedata
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import pytest

from megatron_tcod.envs.demonstrations import write_demonstrations
from megatron_tcod.envs.household import Household
from megatron_tcod.journal import Journal
from megatron_tcod.metrics import trajectory_record
from megatron_tcod.trajectory import Demonstration, DemonstrationTurn, Episode, Task, TokenRow, Turn, TurnWindow
from tools.show_episode import main

TOOL = Path(__file__).parents[2] / "tools" / "show_episode.py"
WORDS = {10: "go", 11: " to", 12: " desk", 13: " 1", 14: "<|im_end|>", 15: " take", 16: "look"}
HOSTILE = "a\x1b[2J\x1b]0;title\x07\r\x08\x9b31m\u202eevil\u2066\u200b\u2028\x00\x7f\U000e0041 z"


def run(*arguments):
    """Standard output as a file gets it, and standard error."""
    with redirect_stdout(io.StringIO()) as told, redirect_stderr(io.StringIO()) as complaint:
        assert main([*map(str, arguments)]) == 0
    return told.getvalue(), complaint.getvalue()


def run_on_terminal(*arguments):
    """Standard output as a terminal gets it."""
    ours, theirs = os.openpty()
    told = []

    def read():
        while part := os.read(ours, 65536):
            told.append(part)
            if part.endswith(b"\x04end"):
                return

    reader = threading.Thread(target=read)
    reader.start()
    with os.fdopen(theirs, "w", encoding="utf-8", newline="") as terminal, redirect_stdout(terminal):
        assert main([*map(str, arguments)]) == 0
        terminal.write("\x04end")
        terminal.flush()
        reader.join()
    os.close(ours)
    return b"".join(told).removesuffix(b"\x04end").decode().replace("\r\n", "\n")


def episode_of(turns, *, outcome="ok", observation="You see a desk 1.", task_id="heat/1", step=3):
    """Turns as (actor, ids, is trained)."""
    ids, turn_ids, mask, played = [1, 2], [-1, 0], [0, 0], []
    for index, (actor, answer, is_trained) in enumerate(turns):
        text = "".join(WORDS[token] for token in answer[:-1])
        played.append(Turn(index=index, actor=actor, observation=observation, text=text, action=text, token_ids=answer))
        ids += [1, *answer]
        turn_ids += [index] * (1 + len(answer))
        mask += [0, *[int(is_trained)] * len(answer)]
    row = TokenRow(token_ids=ids, turn_ids=turn_ids, loss_mask=mask, logprobs=[-1.0] * sum(mask))
    task = Task(env="household", task_id=task_id, split="train")
    return Episode(
        task=task, sample=0, step=step, weight_version=3, curriculum_k=2, window=TurnWindow(1, 9), turns=played,
        rows=[row] if outcome == "ok" else [], outcome=outcome, end_reason="done",
    )  # fmt: skip


def write_run(directory, *episodes):
    with Journal(directory / "trajectories.jsonl") as journal:
        for one in episodes:
            journal.append(trajectory_record(one, {}, lambda ids: "".join(WORDS[token] for token in ids)))
    return directory


MIXED = [
    ("teacher", [10, 11, 12, 13, 14], False),
    ("student", [15, 12, 13, 14], True),
    ("student", [16, 14], True),
]


def test_exactly_the_trained_tokens_are_green(tmp_path):
    told = run_on_terminal(write_run(tmp_path, episode_of(MIXED)))
    green = re.findall(r"\x1b\[(?:32|92)m(.*?)\x1b\[0m", told)
    assert green == [" take", " desk", " 1", "<|im_end|>", "look", "<|im_end|>"]
    shades = re.findall(r"\x1b\[(32|92)m", told)
    assert shades == ["32", "92", "32", "92", "32", "92"]
    assert "4 of 4 tokens trained" in told and "0 of 5 tokens trained" in told


def test_what_was_sampled_and_is_not_trained_is_yellow(tmp_path):
    told = run_on_terminal(write_run(tmp_path, episode_of(MIXED, outcome="env_fault")))
    assert not re.findall(r"\x1b\[(?:32|92)m", told)
    assert re.findall(r"\x1b\[33m(.*?)\x1b\[0m", told) == [" take desk 1<|im_end|>", "look<|im_end|>"]


def test_without_a_terminal_or_with_no_color_there_is_no_escape_and_marks_tell_what_is_trained(tmp_path, monkeypatch):
    write_run(tmp_path, episode_of(MIXED))
    to_file = run(tmp_path)[0]
    monkeypatch.setenv("NO_COLOR", "1")
    for told in (to_file, run_on_terminal(tmp_path)):
        assert "\x1b" not in told
        assert re.findall("«(.*?)»", told) == [" take desk 1<|im_end|>", "look<|im_end|>"]
    monkeypatch.setenv("NO_COLOR", "")
    assert "\x1b" in run_on_terminal(tmp_path), "an empty NO_COLOR asks for nothing"


def test_hostile_text_moves_no_cursor_and_turns_no_line(tmp_path):
    """In observations, commands, ids, details and token texts alike; on a terminal only our own colours are left."""
    episode = episode_of(MIXED, observation=HOSTILE, task_id=HOSTILE)
    record = trajectory_record(episode, {}, lambda ids: "")
    record["detail"] = record["outcome"] = HOSTILE
    for turn in record["turns"]:
        turn = turn.__dict__
        turn["text"] = turn["action"] = turn["finish_reason"] = HOSTILE
    record["token_texts"] = [[], [HOSTILE] * 4, [HOSTILE] * 2]
    with Journal(tmp_path / "trajectories.jsonl") as journal:
        journal.append(record)
    for told in (run(tmp_path)[0], run_on_terminal(tmp_path), run(tmp_path, "--list")[0]):
        bare = re.sub(r"\x1b\[(?:0|1|2|31|32|33|92)m", "", told)
        odd = {char for char in bare if char != "\n" and unicodedata.category(char) in ("Cc", "Cf", "Cs", "Zl", "Zp", "Cn")}
        assert not odd and r"\x1b[2J\x1b]0;title\x07\x0d\x08\x9b31m\u202eevil\u2066\u200b\u2028\x00\x7f\U000e0041 z" in bare


def test_demonstrations_of_each_kind_are_shown(tmp_path):
    (task,) = Household.tasks("train", count=1)
    turns = [
        DemonstrationTurn(observation="one", action="look", text="<think>hm</think><action>look</action>", token_ids=[1, 2]),
        DemonstrationTurn(observation="two", action="inventory", text="inventory", is_trained=False),
    ]
    shown = Demonstration(task=task, turns=turns, success=True, source="runs/teacher", final_observation="three")
    write_demonstrations(tmp_path / "own.jsonl", [Household.expert(task, seed=0), shown])
    told = run(tmp_path / "own.jsonl", "--number", "2")[0]
    assert re.findall("«(.*?)»", told) == ["<think>hm</think><action>look</action>"]
    assert "= look" in told and "> inventory" in told and "three" in told and "runs/teacher | solved | 2 turns" in told
    assert task.task_id in run(tmp_path / "own.jsonl", "--number", "1")[0]
    (tmp_path / "published.jsonl").write_text(json.dumps({"game_file": "a/game.tw-pddl", "actions": ["look"]}) + "\n")
    assert "> «look»" in run(tmp_path / "published.jsonl")[0]


def test_episodes_are_found_by_what_they_are(tmp_path):
    episodes = [episode_of(MIXED, task_id=f"{family}/{step}", step=step) for step in (1, 2) for family in ("heat", "cool")]
    write_run(tmp_path, *episodes, episode_of(MIXED, outcome="diverged", step=5))
    for arguments, expected in (
        (["--task", "cool"], "cool/2 "),
        (["--step", "1", "--task", "heat"], "heat/1 "),
        (["--outcome", "diverged"], "step 5 "),
        (["--number", "2"], "cool/1 "),
        (["--number", "-2"], "cool/2 "),
    ):
        assert expected in run(tmp_path, *arguments)[0].splitlines()[0]
    assert len(run(tmp_path, "--list", "--outcome", "ok")[0].splitlines()) == 4


def test_a_long_observation_is_cut_and_says_so(tmp_path):
    told = run(write_run(tmp_path, episode_of(MIXED, observation="x" * 10**6)), "--clip", "100")[0]
    assert len(told) < 5000 and "(999900 more characters)" in told


def test_damaged_lines_are_counted_and_the_rest_is_shown(tmp_path):
    write_run(tmp_path, *(episode_of(MIXED, step=step) for step in range(3)))
    path = tmp_path / "trajectories.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(lines[0].replace(b"desk", b"dusk") + b"\xff\xfe\n" + b"{}\n" + lines[1] + lines[2][:50])
    told, complaint = run(tmp_path)
    assert "4 line(s) could not be read" in complaint and "step 1 " in told


@pytest.mark.parametrize(
    ("name", "content", "arguments", "message"),
    [
        ("demos.jsonl", '{"version": 9, "demonstration": {}}\n', [], "demos.jsonl:1: demonstration version 9"),
        ("demos.jsonl", "{broken", [], "demos.jsonl:1: the line is cut off"),
        ("demos.jsonl", '{"task_id": "a", "split": "b", "actions": ["c"]}\n', ["--number", "2"], "give 1 to 1"),
        ("demos.jsonl", '{"task_id": "a", "split": "b", "actions": ["c"]}\n', ["--number", "0"], "give 1 to 1"),
        ("demos.jsonl", '{"task_id": "a", "split": "b", "actions": ["c"]}\n', ["--task", "x"], "no episode fits"),
        ("other.txt", "", [], "no trajectories"),
    ],
)
def test_a_mistake_is_one_message(tmp_path, name, content, arguments, message):
    (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=message):
        run(tmp_path if name == "other.txt" else tmp_path / name, *arguments)


def test_from_the_command_line_a_mistake_is_exit_2_and_a_reader_that_has_enough_is_no_error(tmp_path):
    done = subprocess.run([sys.executable, str(TOOL), str(tmp_path)], capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
    write_run(tmp_path, *(episode_of(MIXED, observation="y" * 50_000) for _ in range(20)))
    command = f"{sys.executable} {TOOL} {tmp_path} --clip 100000 | head -1"
    done = subprocess.run(["bash", "-o", "pipefail", "-c", command], capture_output=True)
    assert done.returncode == 0 and not done.stderr, done.stderr
