"""Broken environments in whole episodes: one named outcome each, nothing of them trained, the batch completes."""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from pathlib import Path

import psutil
import pytest
from fakes import SayingEngine, Script, scripted_family
from faulty import Faulty, task_of
from tokenizer_fixtures import small_tokenizer

from megatron_tcod.envs import load_env
from megatron_tcod.envs.process import WORKERS
from megatron_tcod.rollout.episodes import Assignment, PlaySettings, collect_episodes
from megatron_tcod.rollout.outcomes import check_outcomes
from megatron_tcod.trajectory import ENV_FAULTS, OUTCOMES, Episode, Task, TurnWindow

FAULTS = {
    "crash on reset": "env_crash_reset",
    "crash on step": "env_crash_step",
    "hang": "env_hang",
    "oversized": "env_oversized",
    "invalid UTF-8": "env_invalid_text",
    "empty": "env_empty",
    "same for ever": "env_stuck",
    "none": "ok",
}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return small_tokenizer(tmp_path_factory.mktemp("tokenizer"), system_prompt="You act.")


def collect(family, tasks, tokenizer, *, max_open=None, **changes):
    settings = PlaySettings(**{"max_turns": 12, "max_new_tokens": 16, "max_context": 4000, "stuck_after": 4} | changes)
    engine = SayingEngine(tokenizer, [f"go {word}" for word in ("left", "right", "up", "down", "back", "on")])
    assignments = [Assignment(task=task, window=TurnWindow(0, 12), sample=i) for i, task in enumerate(tasks)]
    playing = collect_episodes(
        family, assignments, engine=engine, tokenizer=tokenizer, settings=settings, step=0, max_open=max_open
    )
    return asyncio.run(playing)


def test_each_way_to_break_is_an_outcome_and_trains_nothing(tokenizer):
    episodes = collect(Faulty, [task_of(fault) for fault in FAULTS], tokenizer)
    assert {e.task.task_id: e.outcome for e in episodes} == FAULTS, [e.detail for e in episodes]
    for episode in episodes:
        if episode.outcome == "ok":
            assert sum(sum(row.loss_mask) for row in episode.rows) > 0 and len(episode.turns) == 12
            continue
        assert episode.end_reason == "not_played" and not episode.success and episode.detail
        assert sum(sum(row.loss_mask) for row in episode.rows) == 0, "loss mask 0 on all turns of it"
        if episode.outcome == "env_stuck":  # the engine deals its commands out over all episodes, in whatever order they ask
            assert len(episode.turns) >= 4 and episode.detail.startswith("4 different commands")
        else:
            assert len(episode.turns) == (0 if episode.outcome == "env_crash_reset" else 3), "the faulted turn is kept"
        assert max((len(turn.observation) for turn in episode.turns), default=0) < 100
    WORKERS.close()


def test_outcomes_of_environments_in_this_process_are_seen_too(tokenizer):
    said = {"oversized": "x" * 300_000, "invalid": "caf\udce9", "empty": " \n", "same": "Room."}
    scripts = {name: Script(observations=["Start.", text]) for name, text in said.items()}
    episodes = collect(scripted_family(scripts), [Task(env="s", task_id=name, split="t") for name in said], tokenizer)
    assert [e.outcome for e in episodes] == ["env_oversized", "env_invalid_text", "env_empty", "env_stuck"]


def test_a_first_observation_is_looked_at_as_well(tokenizer):
    scripts = {"a": Script(observations=["", "Room."])}
    (episode,) = collect(scripted_family(scripts), [Task(env="s", task_id="a", split="t")], tokenizer)
    assert (episode.outcome, episode.turns) == ("env_empty", [])


def test_a_student_that_repeats_itself_or_is_refused_is_no_fault_of_the_environment(tokenizer):
    words = ("left", "right", "up", "down", "back", "on")
    refused = frozenset(f"go {word}" for word in words)
    scripts = {"refused": Script(observations=["Start.", "Nothing happens."], refused=refused)}
    (episode,) = collect(scripted_family(scripts), [Task(env="s", task_id="refused", split="t")], tokenizer)
    assert episode.outcome == "ok" and len(episode.turns) == 12
    scripts = {"same": Script(observations=["Room."])}
    (episode,) = collect(scripted_family(scripts), [Task(env="s", task_id="same", split="t")], tokenizer, stuck_after=7)
    assert episode.outcome == "ok", "six different commands"
    (episode,) = collect(scripted_family(scripts), [Task(env="s", task_id="same", split="t")], tokenizer, stuck_after=0)
    assert episode.outcome == "ok"


def ended(outcome: str, start: int = 2) -> Episode:
    return Episode(
        task=Task(env="s", task_id="boil/3", split="t"), sample=0, step=4, weight_version=4, curriculum_k=1,
        window=TurnWindow(start, 9), turns=[], rows=[], outcome=outcome, end_reason="not_played", detail="recorded A, seen B",
    )  # fmt: skip


def test_limits_on_what_may_go_wrong_stop_the_run_with_the_first_case():
    outcomes = ("ok", "diverged", "rejected_action", "ok", "no_demonstration")
    replays = [*(ended(outcome) for outcome in outcomes), ended("ok", 0)]
    check_outcomes(replays, max_diverged=0.5, max_env_faults=0.1)
    with pytest.raises(ValueError, match=r"step 4: 2 of 4 replays differ .*max_diverged 0.4.*boil/3: recorded A, seen B"):
        check_outcomes(replays, max_diverged=0.4, max_env_faults=1.0)
    broken = [ended(outcome) for outcome in (*ENV_FAULTS, "ok", "ok")]
    with pytest.raises(ValueError, match=r"8 of 10 environments broke .*more than max_env_faults 0.79"):
        check_outcomes(broken, max_diverged=1.0, max_env_faults=0.79)
    check_outcomes(broken, max_diverged=1.0, max_env_faults=0.8)
    check_outcomes([], max_diverged=0.1, max_env_faults=0.1)


def is_alive(process: psutil.Process) -> bool:
    """Not only a number: psutil compares when it started."""
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def kill_at_random(
    stop: threading.Event, rng: random.Random, killed: set[int], seen: set[psutil.Process], every_s: float
) -> None:
    """kill -9 on one environment process at a time, wherever it is; all that ever ran below this process goes to `seen`,
    because what a killed one had started is nobody's descendant any more. What other tests have left running is theirs."""
    others = set(psutil.Process().children(recursive=True))
    while not stop.wait(every_s * (0.5 + rng.random())):
        seen.update(set(psutil.Process().children(recursive=True)) - others)
        living = [process for process in psutil.Process().children() if process not in others and is_alive(process)]
        if living:
            victim = rng.choice(living)
            with contextlib.suppress(psutil.NoSuchProcess):
                seen.update(victim.children(recursive=True))
            killed.add(victim.pid)
            os.kill(victim.pid, signal.SIGKILL)


def play_under_fire(family, tasks, tokenizer, *, every_s: float, max_open: int = 16, **changes):
    """The episodes, how many processes were killed, and those that outlive the collection."""
    WORKERS.close()  # processes that earlier tests left idle would be used, and spared
    stop, killed, seen = threading.Event(), set(), set()
    killer = threading.Thread(target=kill_at_random, args=(stop, random.Random(5), killed, seen, every_s))
    killer.start()
    try:
        episodes = collect(family, tasks, tokenizer, max_open=max_open, **changes)
    finally:
        stop.set()
        killer.join()
    WORKERS.close()
    assert len(seen) >= len(killed) > 0
    deadline = time.monotonic() + 5  # a killed group may take a moment
    while any(map(is_alive, seen)) and time.monotonic() < deadline:  # not waited for: whoever started it does that
        time.sleep(0.05)
    return episodes, len(killed), [process for process in seen if is_alive(process)]


def test_a_batch_completes_while_its_processes_are_killed(tokenizer):
    tasks = [task_of("none")] * 32
    episodes, num_killed, left = play_under_fire(Faulty, tasks, tokenizer, every_s=0.08, max_open=8)
    outcomes = [episode.outcome for episode in episodes]
    assert len(outcomes) == 32 and set(outcomes) <= set(OUTCOMES)
    num_faults = sum(outcome in ("env_crash_reset", "env_crash_step") for outcome in outcomes)
    assert 0 < num_faults <= num_killed and outcomes.count("ok") == 32 - num_faults > 0
    assert [episode.sample for episode in episodes] == list(range(32)) and not left


def real_family(name: str, tmp_path) -> tuple[type, list[Task]]:
    """An environment with real engines and ten of its tasks; skips where it is not installed."""
    if name == "faulty":
        return Faulty, [task_of("none")] * 10
    kind = load_env(name)
    try:
        kind.require()
    except ValueError as missing:
        pytest.skip(str(missing))
    if name == "scienceworld":
        return kind, kind.tasks("train", count=10)
    tool = Path(__file__).parents[2] / "tools" / "make_alfworld_games.py"
    counts = ["--train", "10", "--valid-seen", "0", "--valid-unseen", "0"]
    subprocess.run([sys.executable, str(tool), "--out", str(tmp_path / "games"), *counts], check=True)
    tasks = kind.tasks("train", root=str(tmp_path / "games"))

    class Rooted(kind):
        @classmethod
        def make(cls, task):
            return kind.make(task, root=str(tmp_path / "games"))

    return Rooted, tasks


@pytest.mark.slow
@pytest.mark.timeout(7200)
@pytest.mark.parametrize("name", ["faulty", "alfworld", "scienceworld"])
def test_two_hundred_episodes_in_sixteen_environments_survive_random_kills(name, tokenizer, tmp_path):
    family, tasks = real_family(name, tmp_path)
    process, every_s = psutil.Process(), {"faulty": 0.1}.get(name, 2.0)
    play_under_fire(family, tasks * 3, tokenizer, every_s=every_s, stuck_after=0)  # what is allocated once
    before, num_files = process.memory_info().rss, process.num_fds()
    episodes, num_killed, left = play_under_fire(family, tasks * 20, tokenizer, every_s=every_s, stuck_after=0)
    growth, outcomes = process.memory_info().rss - before, Counter(episode.outcome for episode in episodes)
    print(f"{name}: 200 episodes, {num_killed} processes killed, {dict(outcomes)}, {growth / 2**20:+.1f} MiB")
    assert [episode.sample for episode in episodes] == list(range(200))
    assert set(outcomes) <= {"ok", "env_crash_reset", "env_crash_step"}
    assert 10 <= outcomes.total() - outcomes["ok"] <= num_killed and outcomes["ok"] > 0
    assert not left and process.num_fds() <= num_files and growth < 32 * 2**20
