"""What every environment in the table ENVS must do, whatever it is. A new entry is tested unasked."""

from __future__ import annotations

import inspect
import json
import subprocess
import sys

import msgspec
import pytest

from megatron_tcod.config import toml_value
from megatron_tcod.demonstrate import main as demonstrate
from megatron_tcod.envs import ENVS, check_env_options, load_env
from megatron_tcod.envs.base import Step
from megatron_tcod.envs.demonstrations import read_demonstrations, replay_difference
from megatron_tcod.envs.household import Household
from megatron_tcod.trajectory import Demonstration, Task, decode, encode

TRAIN_SPLIT = "train"

WITHOUT_EXPERT = ("remote",)

HOSTILE = ["", "   ", "\n", "{}", "%s{0}", "\x00", "go", "<|im_end|>", "\ud800", "Ω≈ç√ 🍎", "x" * 100_000]


@pytest.fixture(params=sorted(ENVS))
def family(request):
    """The family, its tasks and the options it needs on this machine."""
    options = {}
    if request.param == "alfworld":
        options["root"] = str(request.getfixturevalue("alfworld_games"))
    elif request.param == "webshop":
        options |= request.getfixturevalue("small_shop")
    elif request.param == "remote":
        options |= request.getfixturevalue("remote_household")
    elif request.param == "scienceworld":
        options["task_types"] = "find-non-living-thing"  # short ones; all types are played in rollout/test_science_replay.py
    kind = load_env(request.param)
    if request.param == "scienceworld":
        try:
            kind.require()
        except ValueError as missing:
            pytest.skip(str(missing))
    return request.param, kind, kind.tasks(TRAIN_SPLIT, **options)[:3], options


def solution(family, task: Task) -> list[str]:
    """Actions that solve a task: the expert's, or where there is none those for what the server plays."""
    name, kind, _, options = family
    if name in WITHOUT_EXPERT:
        from household_server import task_of_seed  # it needs aiohttp, which the fixture has looked for

        return [turn.action for turn in Household.expert(task_of_seed(task.payload["reset"]["seed"]), seed=0).turns]
    return [turn.action for turn in kind.expert(task, seed=0, **options).turns]


def skip_without_expert(family) -> None:
    name, kind, tasks, options = family
    if name in WITHOUT_EXPERT:
        with pytest.raises(ValueError, match=f"env {name} has no expert"):
            kind.expert(tasks[0], seed=0, **options)
        pytest.skip(f"{name} has no expert, and says so")


def play(family, task: Task, actions: list[str]) -> list[Step]:
    _, kind, _, options = family
    episode = kind.make(task, **options)
    try:
        return [Step(episode.reset()), *(episode.step(action) for action in actions)]
    finally:
        episode.close()


def test_tasks_are_plain_data_of_this_environment_in_a_fixed_order(family):
    name, kind, tasks, options = family
    assert kind.tasks(TRAIN_SPLIT, **options)[:3] == tasks
    assert len({task.task_id for task in tasks}) == len(tasks) > 0
    for task in tasks:
        assert task.env == name and task.split == TRAIN_SPLIT and task.family
        assert decode(encode(task), Task) == task
        assert msgspec.convert(json.loads(json.dumps(msgspec.to_builtins(task))), Task) == task


def test_expert_solves_and_its_record_replays_exactly(family):
    skip_without_expert(family)
    _, kind, tasks, options = family
    for task in tasks:
        demonstration = kind.expert(task, seed=0, **options)
        assert demonstration.success and demonstration.task == task and demonstration.turns
        steps = play(family, task, [turn.action for turn in demonstration.turns])
        seen = [kind.normalise(step.observation) for step in steps]
        recorded = [turn.observation for turn in demonstration.turns] + [demonstration.final_observation]
        assert seen == [kind.normalise(observation) for observation in recorded]
        assert [step.done for step in steps] == [False] * (len(steps) - 1) + [True]
        assert steps[-1].reward > 0 and steps[-1].info["success"]
        assert all(step.info["accepted"] for step in steps[1:])
        assert decode(encode(demonstration), Demonstration) == demonstration


def test_what_solves_a_task_ends_it_with_a_reward_in_any_order_of_tasks(family):
    _, _, tasks, _ = family
    for task in reversed(tasks):
        steps = play(family, task, solution(family, task))
        assert [step.done for step in steps] == [False] * (len(steps) - 1) + [True]
        assert steps[-1].reward > 0 and steps[-1].info["success"] is True


def test_expert_with_mistakes_marks_them_and_still_succeeds(family):
    skip_without_expert(family)
    _, kind, tasks, options = family
    demonstrations = [kind.expert(task, seed=1, mistake_rate=0.3, **options) for task in tasks]
    assert all(demonstration.success for demonstration in demonstrations)
    marks = [turn.is_trained for demonstration in demonstrations for turn in demonstration.turns]
    assert False in marks and True in marks


def test_two_episodes_of_one_task_do_not_share_anything(family):
    _, kind, tasks, options = family
    actions = solution(family, tasks[0])
    alone = play(family, tasks[0], actions)
    first, second = kind.make(tasks[0], **options), kind.make(tasks[0], **options)
    seen = [first.reset(), second.reset()]
    for action in actions:
        step = first.step(action)
        second.step(actions[0])
        seen.append(step.observation)
    first.close()
    second.close()
    assert seen[1:] == [step.observation for step in alone]


def test_hostile_actions_are_refused_and_the_episode_goes_on(family):
    _, kind, tasks, options = family
    episode = kind.make(tasks[0], **options)
    assert episode.reset()
    for action in HOSTILE:
        step = episode.step(action)
        assert step.info["accepted"] is False and not step.done and step.reward == 0 and step.observation
    episode.close()
    assert play(family, tasks[0], solution(family, tasks[0]))[-1].done


def test_close_may_come_early_and_twice(family):
    _, kind, tasks, options = family
    episode = kind.make(tasks[0], **options)
    episode.close()
    episode = kind.make(tasks[0], **options)
    episode.reset()
    episode.close()
    episode.close()


def test_unknown_split_names_the_known_ones(family):
    name, kind, _, options = family
    with pytest.raises(ValueError, match=f"{name} has no split 'nosuch'.*train"):
        kind.tasks("nosuch", **options)


def test_normalise_is_idempotent_and_keeps_words(family):
    _, kind, tasks, _ = family
    text = " You  see\na desk 1. "
    assert kind.normalise(kind.normalise(text)) == kind.normalise(text) == "You see a desk 1."


def test_options_are_one_set_that_tasks_make_and_expert_all_take(family):
    name, kind, tasks, options = family
    defaults = {
        option: parameter.default
        for option, parameter in inspect.signature(kind.tasks).parameters.items()
        if option not in ("split", "count", "first")
    }
    every = {**defaults, **options}
    check_env_options(name, every)
    assert kind.tasks(TRAIN_SPLIT, **every)[:3] == tasks
    episode = kind.make(tasks[0], **every)
    first = episode.reset()
    episode.close()
    if name not in WITHOUT_EXPERT:
        assert kind.expert(tasks[0], seed=0, **every).turns[0].observation == first


def test_unknown_option_suggests_the_nearest():
    with pytest.raises(ValueError, match="env household has no option 'num_place'; did you mean num_places"):
        check_env_options("household", {"num_place": 9})
    with pytest.raises(ValueError, match=r"no option 'x'; did you mean \['hard_from', 'reset_deadline_s', 'root'"):
        check_env_options("alfworld", {"root": "games", "x": 1})


def test_unknown_name_suggests_the_nearest():
    with pytest.raises(ValueError, match="did you mean household"):
        load_env("houshold")


@pytest.mark.parametrize("name", sorted(ENVS))
def test_importing_an_environment_imports_neither_megatron_nor_a_server(name):
    script = f"import sys; from megatron_tcod.envs import load_env; load_env({name!r}); print(' '.join(sys.modules))"
    ended = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, timeout=120)
    imported = {module.split(".")[0] for module in ended.stdout.split()}
    assert not {"megatron", "sglang", "transformers", "textworld", "py4j"} & imported


def test_the_expert_is_recorded_by_the_program_and_its_file_replays(family, tmp_path, capsys):
    name, kind, tasks, options = family
    output, settings = tmp_path / "expert.jsonl", tmp_path / "run.toml"
    settings.write_text(f"[environment]\nenv = '{name}'\ntrain_tasks = 3\nenv_options = {toml_value(options)}\n")
    argv = ["--config", str(settings), "--expert", "--demonstrations", str(output)]
    if name in WITHOUT_EXPERT:
        with pytest.raises(ValueError, match=f"env {name} has no expert"):
            demonstrate(argv)
        return
    assert demonstrate(argv) == 0
    assert "the expert solved 3 of 3 tasks" in (told := capsys.readouterr().out)
    assert "3 of 3 replayed with equal observations" in told
    found = read_demonstrations(output, name, env_options=options)
    assert [one.task for one in found] == list(tasks)
    assert all(one.success and replay_difference(kind, one, **options) == "" for one in found)
