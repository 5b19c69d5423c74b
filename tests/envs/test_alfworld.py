"""Real ALFWorld: games made by our tool, solved, replayed in other processes, and an engine that may die."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import psutil
import pytest

from megatron_tcod.envs.alfworld import FAMILIES, MAX_ACTION_CHARS, ALFWorld, game_path, resolve_root, task_of
from megatron_tcod.envs.alfworld_expert import Aim, Explorer
from megatron_tcod.envs.base import COMMANDS_LABEL, EnvironmentFault
from megatron_tcod.envs.process import WORKERS
from megatron_tcod.trajectory import Demonstration, Task

TOOL = Path(__file__).parents[2] / "tools" / "make_alfworld_games.py"


@pytest.fixture(scope="module")
def demonstrations(alfworld_games):
    tasks = ALFWorld.tasks("train", root=str(alfworld_games))
    return [ALFWorld.expert(task, seed=0, root=str(alfworld_games)) for task in tasks]


def test_two_games_of_each_family_are_listed_in_a_fixed_order(alfworld_games):
    tasks = ALFWorld.tasks("train", root=str(alfworld_games))
    assert Counter(task.family for task in tasks) == dict.fromkeys(FAMILIES, 2)
    assert tasks == sorted(tasks, key=lambda task: task.payload["game"])
    assert ALFWorld.tasks("train", root=str(alfworld_games), first=3, count=2) == tasks[3:5]
    assert not any(str(alfworld_games) in json.dumps(task.payload) for task in tasks), "no machine path in a task"


def test_expert_wins_every_game(demonstrations):
    lengths = [len(demonstration.turns) for demonstration in demonstrations]
    print(f"expert turns on {len(lengths)} games: mean {sum(lengths) / len(lengths):.1f}, max {max(lengths)}")
    assert all(demonstration.success for demonstration in demonstrations)
    assert all(demonstration.turns[0].observation.startswith("-= Welcome") for demonstration in demonstrations)


def test_game_files_hold_what_alfworld_reads(alfworld_games, demonstrations):
    for demonstration in demonstrations:
        game = game_path(demonstration.task, str(alfworld_games))
        data = json.loads(game.read_text())
        assert data["walkthrough"] == [turn.action for turn in demonstration.turns] and data["solvable"] is True
        assert data["pddl_problem"] == game.with_name("initial_state.pddl").read_text()
        trajectory = json.loads(game.with_name("traj_data.json").read_text())
        goal = trajectory["turk_annotations"]["anns"][0]["task_desc"]
        assert trajectory["task_type"] == demonstration.task.family
        assert f"Your task is to: {goal}." in demonstration.turns[0].observation


REPLAY = """
import json, sys
from megatron_tcod.envs.alfworld import ALFWorld
from megatron_tcod.trajectory import Demonstration, Task
root, tasks = sys.argv[1], json.load(sys.stdin)
for game, actions in tasks:
    episode = ALFWorld.make(Task(env="alfworld", task_id="x", split="train", payload={"game": game}), root=root)
    seen = [episode.reset()]
    seen += [(step := episode.step(action)).observation for action in actions]
    print(json.dumps([seen, step.done]))
    episode.close()
"""


def replay_elsewhere(demonstrations: list[Demonstration], root: str) -> list[tuple[list[str], bool]]:
    """What another process with another hash seed sees when it gives the recorded commands, and whether it won."""
    recorded = [(one.task.payload["game"], [turn.action for turn in one.turns]) for one in demonstrations]
    replay = subprocess.run(
        [sys.executable, "-c", REPLAY, root],
        input=json.dumps(recorded),
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "PYTHONHASHSEED": "77"},
    )
    return [json.loads(line) for line in replay.stdout.splitlines()]


def test_recorded_commands_replay_to_equal_observations_in_another_process(alfworld_games, demonstrations):
    replayed = replay_elsewhere(demonstrations, str(alfworld_games))
    for (seen, done), demonstration in zip(replayed, demonstrations, strict=True):
        assert seen == [turn.observation for turn in demonstration.turns] + [demonstration.final_observation]
        assert done


def test_expert_recovers_from_mistakes(alfworld_games):
    num_injected = 0
    for task in ALFWorld.tasks("train", root=str(alfworld_games))[1::4]:
        demonstration = ALFWorld.expert(task, seed=5, mistake_rate=0.2, root=str(alfworld_games))
        num_injected += sum(not turn.is_trained for turn in demonstration.turns)
        assert demonstration.success, task.task_id
    assert num_injected > 3


def test_alfworlds_own_planner_agrees_that_the_game_can_be_won(alfworld_games, demonstrations):
    task = ALFWorld.tasks("train", root=str(alfworld_games))[0]
    planned = ALFWorld.expert(task, seed=0, mistake_rate=0.3, root=str(alfworld_games), kind="planner")
    assert planned.success


def test_unseen_games_use_other_rooms(alfworld_games):
    def rooms(split):
        tasks = ALFWorld.tasks(split, root=str(alfworld_games))
        return {task.task_id.split("/")[1].rpartition("-")[2] for task in tasks}

    assert rooms("valid_unseen") and not rooms("train") & rooms("valid_unseen")


def test_commands_that_the_game_does_not_know_are_refused(alfworld_games):
    task = ALFWorld.tasks("train", root=str(alfworld_games))[0]
    episode = ALFWorld.make(task, root=str(alfworld_games))
    episode.reset()
    before = episode.admissible_commands
    hostile = ["", "{}", "go to the moon 1", "üñï \ud800 \x00", "look\nlook"]
    for action in [*hostile, "x" * MAX_ACTION_CHARS, "x" * 10_000_000]:
        step = episode.step(action)
        assert step.observation == "Nothing happens." and step.info["accepted"] is False and not step.done
        assert episode.admissible_commands == before
    assert episode.step(before[0]).info["accepted"]
    episode.close()
    episode.close()


def test_engine_is_used_again_after_an_episode_and_gone_after_close(alfworld_games):
    task = ALFWorld.tasks("train", root=str(alfworld_games))[0]
    WORKERS.close()
    pids = []
    for _ in range(2):
        episode = ALFWorld.make(task, root=str(alfworld_games))
        episode.reset()
        pids.append(episode._worker.pid)
        episode.close()
    assert pids[0] == pids[1]
    WORKERS.close()
    assert not psutil.pid_exists(pids[0])


def test_killed_engine_is_a_fault_of_that_episode_only(alfworld_games):
    task = ALFWorld.tasks("train", root=str(alfworld_games))[0]
    episode = ALFWorld.make(task, root=str(alfworld_games))
    first = episode.reset()
    os.kill(episode._worker.pid, signal.SIGKILL)
    with pytest.raises(EnvironmentFault, match="failed in step") as raised:
        episode.step("look")
    assert raised.value.outcome == "env_crash_step"
    episode.close()
    again = ALFWorld.make(task, root=str(alfworld_games))
    assert again.reset() == first
    again.close()


def test_engine_that_does_not_answer_is_killed_at_the_deadline(alfworld_games):
    task = ALFWorld.tasks("train", root=str(alfworld_games))[0]
    episode = ALFWorld.make(task, root=str(alfworld_games), step_deadline_s=1.0)
    episode.reset()
    pid = episode._worker.pid
    os.kill(pid, signal.SIGSTOP)
    start = time.monotonic()
    with pytest.raises(EnvironmentFault, match="no answer within the deadline"):
        episode.step("look")
    assert time.monotonic() - start < 20
    assert not psutil.pid_exists(pid)
    episode.close()


def test_broken_game_is_a_fault_that_says_why(alfworld_games, tmp_path):
    source = next(alfworld_games.glob("train/*/*/game.tw-pddl"))
    game = tmp_path / "train" / source.parent.parent.name / "trial_broken" / source.name
    game.parent.mkdir(parents=True)
    data = json.loads(source.read_text())
    game.write_text(json.dumps({**data, "pddl_problem": data["pddl_problem"][:400]}))
    task = task_of(game.relative_to(tmp_path).as_posix())
    episode = ALFWorld.make(task, root=str(tmp_path))
    with pytest.raises(EnvironmentFault, match="alfworld process failed in reset: it reports "):
        episode.reset()
    episode.close()


@pytest.mark.parametrize(
    ("stated", "aim"),
    [
        ("put a pen in drawer", Aim("pen", "drawer", "", "")),
        ("put some pen on desk", Aim("pen", "desk", "", "")),
        ("put a clean cup in shelf", Aim("cup", "shelf", "", "clean")),
        ("heat some egg and put it in sinkbasin", Aim("egg", "sinkbasin", "", "heat")),
        ("cool some egg and put it in sinkbasin", Aim("egg", "sinkbasin", "", "cool")),
        ("find two pen and put them in desk", Aim("pen", "desk", "", "")),
        ("put two pen in desk", Aim("pen", "desk", "", "")),
        ("examine the cd with the desklamp", Aim("cd", "", "desklamp", "")),
        ("look at cd under the desklamp", Aim("cd", "", "desklamp", "")),
    ],
)
def test_expert_reads_every_template(stated, aim):
    assert Aim.read(f"You see a desk 1.\n\nYour task is to: {stated}.") == aim


def test_task_phrased_by_people_is_an_error_for_the_expert():
    with pytest.raises(ValueError, match="follows none of ALFWorld's templates"):
        Explorer("You see a desk 1.\n\nYour task is to: move the pen over there please.")


def fake_game(root: Path, name: str, **fields: object) -> None:
    folder = root / "train" / name / "trial_T1"
    folder.mkdir(parents=True)
    (folder / "traj_data.json").write_text("{}")
    (folder / "game.tw-pddl").write_text(json.dumps(fields))


def test_listing_leaves_out_what_alfworld_does_not_play(tmp_path):
    fake_game(tmp_path / "json_2.1.1", "pick_and_place_simple-Pen-None-Desk-1", solvable=True, walkthrough=[])
    fake_game(tmp_path / "json_2.1.1", "pick_and_place_simple-Cup-None-Desk-1", solvable=False)
    fake_game(tmp_path / "json_2.1.1", "pick_and_place_simple-Cap-None-Desk-1", solvable=None)
    fake_game(tmp_path / "json_2.1.1", "pick_and_place_with_movable_recep-Pen-Cup-Desk-1", solvable=True)
    fake_game(tmp_path / "json_2.1.1", "pick_and_place_simple-AppleSliced-None-Desk-1", solvable=True)
    tasks = ALFWorld.tasks("train", root=str(tmp_path))
    assert [task.task_id for task in tasks] == ["train/pick_and_place_simple-Pen-None-Desk-1/trial_T1"]
    assert tasks[0].family == "pick_and_place_simple"


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda root: ALFWorld.tasks("test", root=root), "no split 'test'; use one of train"),
        (lambda root: ALFWorld.tasks("train"), "set ALFWORLD_DATA"),
        (lambda root: ALFWorld.tasks("train", root=root), "has none of the folders"),
        (
            lambda root: ALFWorld.make(Task(env="alfworld", task_id="x", split="train"), root=root),
            "not an alfworld task",
        ),
        (
            lambda root: ALFWorld.make(
                Task(env="alfworld", task_id="x", split="train", payload={"game": "../../etc/passwd"}), root=root
            ),
            "not an alfworld task",
        ),
    ],
)
def test_wrong_requests_say_what_and_how(call, message, tmp_path, monkeypatch):
    monkeypatch.delenv("ALFWORLD_DATA", raising=False)
    with pytest.raises(ValueError, match=message):
        call(str(tmp_path))


def test_missing_games_and_missing_files_name_the_fix(tmp_path):
    (tmp_path / "train").mkdir()
    assert resolve_root(str(tmp_path)) == tmp_path
    with pytest.raises(ValueError, match="alfworld-download"):
        ALFWorld.tasks("train", root=str(tmp_path))
    with pytest.raises(ValueError, match="does not exist"):
        ALFWorld.make(task_of("train/pick-x/trial/game.tw-pddl"), root=str(tmp_path))


def test_hard_games_are_training_games_that_a_file_lists_without_commands(alfworld_games, tmp_path):
    root, tasks = str(alfworld_games), ALFWorld.tasks("train", root=str(alfworld_games))
    path = tmp_path / "train_expert.jsonl"
    lines = [{"game_file": f"/nas/games/{task.payload['game']}", "target": "", "actions": ["look"]} for task in tasks]
    for index in (7, 2):
        lines[index]["actions"] = []
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    hard = ALFWorld.tasks("hard", root=root, hard_from=str(path))
    assert [task.task_id for task in hard] == [tasks[2].task_id, tasks[7].task_id]
    assert {task.split for task in hard} == {"hard"} and all(task.task_id.startswith("train/") for task in hard)
    assert ALFWorld.tasks("hard", root=root, hard_from=str(path), count=1) == hard[:1]
    with pytest.raises(ValueError, match="is the training games without a demonstration: name .* hard_from"):
        ALFWorld.tasks("hard", root=root)
    path.write_text("no json\n")
    with pytest.raises(ValueError, match="expected lines with game_file and actions"):
        ALFWorld.tasks("hard", root=root, hard_from=str(path))


def test_shown_commands_are_the_admissible_ones_and_do_not_disturb_replay(alfworld_games, demonstrations):
    recorded = demonstrations[0]
    shown = ALFWorld.expert(recorded.task, seed=0, root=str(alfworld_games), show_commands=True)
    assert [turn.action for turn in shown.turns] == [turn.action for turn in recorded.turns] and shown.success
    for turn, plain in zip(shown.turns, recorded.turns, strict=True):
        assert turn.observation.startswith(plain.observation + COMMANDS_LABEL)
        assert turn.action in turn.observation.partition(COMMANDS_LABEL)[2].split(", ")
        assert ALFWorld.normalise(turn.observation) == ALFWorld.normalise(plain.observation)


@pytest.mark.slow
@pytest.mark.timeout(7200)
def test_a_hundred_games_are_won_also_through_mistakes_and_replay_equally_in_another_process(tmp_path, alfworld_games):
    root = str(tmp_path / "games")
    counts = ["--train", "100", "--valid-seen", "0", "--valid-unseen", "0", "--seed", "1"]
    made = subprocess.run([sys.executable, str(TOOL), "--out", root, *counts], check=True, capture_output=True, text=True)
    num_lost = int(re.search(r"(\d+) were not won by the expert", made.stdout).group(1))
    tasks = ALFWorld.tasks("train", root=root)
    assert len(tasks) == 100 and set(Counter(task.family for task in tasks).values()) <= {16, 17}
    assert 100 / (100 + num_lost) >= 0.95, made.stdout
    disturbed = [ALFWorld.expert(task, seed=5, mistake_rate=0.2, root=root) for task in tasks]
    assert all(one.success for one in disturbed)
    assert sum(not turn.is_trained for one in disturbed for turn in one.turns) > 100
    num_equal = 0
    for (seen, done), one in zip(replay_elsewhere(disturbed, root), disturbed, strict=True):
        assert seen == [turn.observation for turn in one.turns] + [one.final_observation] and done
        num_equal += len(seen)
    print(f"{made.stdout.strip()}; {num_equal} observations of 100 games equal in another process")
