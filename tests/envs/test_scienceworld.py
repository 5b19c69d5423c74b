"""Real ScienceWorld: its splits, its prompt, its score as reward, its gold path, and Java that ends with us."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections import Counter

import psutil
import pytest

from megatron_tcod.envs import scienceworld
from megatron_tcod.envs.base import EnvironmentFault, without_commands
from megatron_tcod.envs.process import WORKERS
from megatron_tcod.envs.scienceworld import KIND, RELEASED_TRAIN_TYPES, VARIATIONS, ScienceWorld, task_of, variations
from megatron_tcod.trajectory import Task

SHORT = task_of("find-non-living-thing", 3, "train")


@pytest.fixture(scope="module")
def simulator():
    """Skips where there is no simulator."""
    try:
        ScienceWorld.require()
    except ValueError as missing:
        pytest.skip(str(missing))
    yield
    WORKERS.close()


def test_the_table_of_variations_is_the_simulators(simulator):
    worker = WORKERS.borrow(KIND)
    told = worker.call({"op": "splits"}, deadline_s=120.0)["splits"]
    assert told == {name: {split: list(variations(name, split)) for split in ("train", "dev", "test")} for name in VARIATIONS}
    WORKERS.give_back(worker)


def test_splits_hold_all_types_and_share_no_variation():
    splits = {split: ScienceWorld.tasks(split) for split in scienceworld.SPLITS}
    assert [len(splits[name]) for name in ("train", "dev", "test")] == [3592, 1796, 1819]
    ids = [task.task_id for name in ("train", "dev", "test") for task in splits[name]]
    assert len(set(ids)) == len(ids) == 7207
    assert len({task.family for task in splits["train"][:30]}) == len(VARIATIONS) == 30, "the first 30 are of 30 types"
    types = {name: {task.family for task in splits[name]} for name in ("released_train", "released_test")}
    assert types["released_train"] == set(RELEASED_TRAIN_TYPES) and len(types["released_train"]) == 17
    assert not types["released_train"] & types["released_test"] and len(types["released_test"]) == 13
    assert Counter(task.family for task in splits["released_train"])["boil"] == 15


def test_options_choose_types_and_a_range():
    tasks = ScienceWorld.tasks("dev", task_types="melt, boil", first=1, count=3)
    assert [task.task_id for task in tasks] == ["boil/14", "melt/15", "boil/15"]


def test_first_observation_holds_the_task_and_commands_where_asked_for(simulator):
    episode = ScienceWorld.make(SHORT)
    bare = episode.reset()
    episode.close()
    assert bare.startswith("Your task is to find a(n) non-living thing.") and "You also see:" in bare
    shown = {}
    for way in ("templates", "admissible"):
        episode = ScienceWorld.make(SHORT, show_commands=way)
        shown[way] = episode.reset()
        step = episode.step("look around")
        assert step.info.get("admissible_commands", []) == (episode._shown[0] if way == "admissible" else [])
        assert without_commands(shown[way]) == bare and "\n\nYou can: " in step.observation
        assert ScienceWorld.normalise(shown[way]) == ScienceWorld.normalise(bare)
        episode.close()
    assert "pick up OBJ" in shown["templates"] and "\nOBJ: agent, air" in shown["templates"]
    assert "focus on picture" in shown["admissible"] or "focus on agent" in shown["admissible"]


def test_rewards_add_up_to_the_score_and_the_gold_path_is_played_as_it_was_told(simulator):
    demonstration = ScienceWorld.expert(SHORT, seed=0)
    assert demonstration.success and demonstration.turns[0].observation.startswith("Your task is to find")
    episode = ScienceWorld.make(SHORT)
    assert episode.reset() == demonstration.turns[0].observation
    steps = [episode.step(turn.action) for turn in demonstration.turns]
    episode.close()
    assert sum(step.reward for step in steps) == pytest.approx(1.0) and steps[-1].info["score"] == 1.0
    assert [step.done for step in steps] == [False] * (len(steps) - 1) + [True] and steps[-1].info["success"]
    following = [turn.observation for turn in demonstration.turns[1:]] + [demonstration.final_observation]
    assert [step.observation for step in steps] == following


def test_a_gold_path_is_asked_for_once(simulator):
    first = ScienceWorld.expert(SHORT, seed=0)
    key = (SHORT.family, 3, "easy")
    assert scienceworld.GOLD_PATHS[key][: len(first.turns)] == [turn.action for turn in first.turns]
    scienceworld.GOLD_PATHS[key] = ["inventory", "look around"]
    try:
        again = ScienceWorld.expert(SHORT, seed=0)
    finally:
        del scienceworld.GOLD_PATHS[key]
    assert [turn.action for turn in again.turns] == ["inventory", "look around"] and not again.success


def test_a_lost_task_is_over_without_success_and_its_score_is_nothing(simulator):
    task = task_of("find-living-thing", 3, "train")
    path = [turn.action for turn in ScienceWorld.expert(task, seed=0).turns]
    before = next(index for index, action in enumerate(path) if action.startswith("focus"))
    episode = ScienceWorld.make(task)
    episode.reset()
    steps = [episode.step(action) for action in [*path[:before], "focus on air"]]
    episode.close()
    assert sum(step.reward for step in steps[:-1]) > 0, "it had scored"
    assert steps[-1].done and not steps[-1].info["success"] and steps[-1].info["score"] < 0
    assert sum(step.reward for step in steps) == pytest.approx(0)


def test_java_ends_with_the_process_that_started_it_and_with_us(simulator):
    episode = ScienceWorld.make(SHORT)
    episode.reset()
    (java,) = psutil.Process(episode._worker.pid).children(recursive=True)
    assert java.name() == "java" and "-Xmx512m" in java.cmdline()
    os.kill(episode._worker.pid, signal.SIGKILL)
    with pytest.raises(EnvironmentFault) as raised:
        episode.step("look around")
    assert raised.value.outcome == "env_crash_step" and "scienceworld process failed" in str(raised.value)
    java.wait(timeout=30)
    episode.close()


PARENT = """
import time
from megatron_tcod.envs.scienceworld import ScienceWorld, task_of
episode = ScienceWorld.make(task_of("boil", 0, "train"))
episode.reset()
print(episode._worker.pid, flush=True)
time.sleep(600)
"""


@pytest.mark.parametrize("ending", ["SIGTERM", "SIGKILL"])
def test_no_java_outlives_a_trainer_that_is_killed(simulator, ending):
    parent = subprocess.Popen([sys.executable, "-c", PARENT], stdout=subprocess.PIPE, text=True)
    worker = psutil.Process(int(parent.stdout.readline()))
    (java,) = worker.children(recursive=True)
    parent.send_signal(getattr(signal, ending))
    parent.wait(timeout=60)
    parent.stdout.close()
    psutil.wait_procs([worker, java], timeout=30)
    assert not worker.is_running() and not java.is_running()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: ScienceWorld.tasks("valid"), "no split 'valid'; use one of train, dev, test"),
        (lambda: ScienceWorld.tasks("train", task_types="boil,meld"), "no task type 'meld'; use one of boil"),
        (lambda: ScienceWorld.tasks("train", simplification="simple"), "no simplification 'simple'.*easy"),
        (lambda: ScienceWorld.tasks("train", show_commands="all"), "no show_commands 'all'; use one of none"),
        (lambda: ScienceWorld.tasks("dev", task_types="boil", count=8), "has 7 tasks of the types asked for, 8 were asked"),
        (
            lambda: ScienceWorld.tasks("dev", task_types="power-component", simplification="noElectricalAction"),
            "needs electrical actions; leave out noElectricalAction",
        ),
        (lambda: ScienceWorld.make(Task(env="scienceworld", task_id="x", split="train")), "not a scienceworld task"),
        (lambda: ScienceWorld.make(task_of("boil", 30, "test")), "boil has the variations 0 to 29, got 30"),
    ],
)
def test_wrong_requests_say_what_and_how(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_missing_java_is_named_with_how_to_get_it(monkeypatch, tmp_path):
    monkeypatch.setenv("JAVA_HOME", str(tmp_path))
    with pytest.raises(ValueError, match="needs Java 8 or newer; no java in JAVA_HOME=.*apt-get install openjdk"):
        scienceworld.find_java()
    monkeypatch.delenv("JAVA_HOME")
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ValueError, match="no java on PATH, and JAVA_HOME is not set.*conda install openjdk"):
        scienceworld.find_java()


def test_a_missing_package_is_named_with_its_extra(tmp_path):
    program = "from megatron_tcod.envs.scienceworld import ScienceWorld; ScienceWorld.require()"
    ended = subprocess.run(
        [sys.executable, "-c", "import sys; sys.modules['scienceworld'] = None; import importlib.util as u\n"
         "find = u.find_spec; u.find_spec = lambda name: None if name == 'scienceworld' else find(name)\n" + program],
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert "ValueError" in ended.stderr
    assert "scienceworld not found: pip install 'megatron_tcod[scienceworld]'" in ended.stderr
