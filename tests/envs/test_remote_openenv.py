"""`remote` against openenv-core's own server, in a Python of its own: `pip install openenv-core` wants other versions of
packages than this project.

    TCOD_OPENENV_PYTHON=/path/to/its/bin/python pytest tests/envs/test_remote_openenv.py -m slow
"""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from megatron_tcod.envs.base import EnvironmentFault
from megatron_tcod.envs.remote import Remote
from megatron_tcod.trajectory import Task

pytestmark = pytest.mark.slow

FIELDS = {"action_field": "message", "observation_field": "prompt", "accepted_field": "understood"}


@pytest.fixture(scope="module", params=["websocket", "http"])
def options(request) -> Iterator[dict[str, str]]:
    python = os.environ.get("TCOD_OPENENV_PYTHON")
    if not python:
        pytest.skip("TCOD_OPENENV_PYTHON names no Python with openenv-core: python -m venv X; X/bin/pip install openenv-core")
    kind = "sessions" if request.param == "websocket" else "stateless"
    command = [python, str(Path(__file__).with_name("openenv_server.py")), kind]
    server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    url = f"http://127.0.0.1:{int(server.stdout.readline())}"
    yield {"url": url, "transport": request.param, **FIELDS}
    server.kill()
    server.wait()
    server.stdout.close()


def list_tasks(options: dict[str, str], count: int) -> list[Task]:
    for _ in range(100):  # the port is bound before the server answers on it
        try:
            return Remote.tasks("train", count=count, **options)
        except ValueError:
            time.sleep(0.1)
    return Remote.tasks("train", count=count, **options)


def play_sum(task: Task, options: dict[str, str]) -> None:
    """Play a seed by the rules of the game, computed here."""
    target = 5 + task.payload["reset"]["seed"] % 7
    episode = Remote.make(task, **options)
    assert episode.reset() == f"Come to {target}."
    refused = episode.step("please")
    assert refused.info == {"accepted": False, "success": False} and refused.observation == "Sum 0."
    for total in range(1, target + 1):
        step = episode.step("add 1")
        assert (step.observation, step.done) == (f"Sum {total}.", total == target)
        assert step.info == {"accepted": True, "success": total == target}
        assert step.reward == float(total == target)
    episode.close()


def test_episodes_follow_the_game_on_openenvs_own_server_four_at_a_time(options):
    with ThreadPoolExecutor(4) as threads:
        list(threads.map(lambda task: play_sum(task, options), list_tasks(options, 24)))


def test_too_much_is_done_without_success(options):
    episode = Remote.make(list_tasks(options, 1)[0], **options)
    episode.reset()
    step = episode.step("add 99")
    episode.close()
    assert step.done and step.reward == 0 and not step.info["success"]


def test_error_of_the_game_is_a_fault(options):
    episode = Remote.make(list_tasks(options, 1)[0], **options)
    episode.reset()
    with pytest.raises(EnvironmentFault, match="the game is broken|status 500"):
        episode.step("raise")
    episode.close()


def test_unknown_action_field_is_a_fault_that_names_the_right_one(options):
    episode = Remote.make(list_tasks(options, 1)[0], **{**options, "action_field": "command"})
    episode.reset()
    with pytest.raises(EnvironmentFault, match="message"):
        episode.step("add 1")
    episode.close()


def test_session_outlives_the_servers_ping_timeout(options):
    episode = Remote.make(list_tasks(options, 1)[0], **options)
    episode.reset()
    time.sleep(10)
    assert episode.step("add 1").observation == "Sum 1."
    episode.close()


def test_more_sessions_than_the_server_allows_are_faults_that_say_so(options):
    if options["transport"] == "http":
        pytest.skip("HTTP requests hold no session")
    episodes = [Remote.make(task, **options) for task in list_tasks(options, 5)]
    for episode in episodes[:4]:
        episode.reset()
    with pytest.raises(EnvironmentFault, match="CAPACITY_REACHED"):
        episodes[4].reset()
    for episode in episodes:
        episode.close()
