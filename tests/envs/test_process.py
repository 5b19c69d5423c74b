"""Environments in processes of their own: what a call may do wrong, and that nothing outlives the trainer."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from faulty import KIND, FaultyEpisode

from megatron_tcod.envs.base import EnvironmentFault
from megatron_tcod.envs.process import WORKERS, Worker, WorkerKind

TESTS = Path(__file__).parents[1]


def play(fault: str, num_steps: int = 4) -> tuple[FaultyEpisode, int]:
    """An episode that is expected to break, and the process that its world started."""
    episode = FaultyEpisode(fault)
    child = int(re.search(r"Process (\d+)", episode.reset()).group(1))
    for turn in range(num_steps):
        episode.step(f"command {turn}")
    return episode, child


def gone(pid: int, seconds: float = 10.0) -> bool:
    """Whether a process ends, or is a corpse that its parent has not buried."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE:
            return True
        time.sleep(0.02)
    return False


@pytest.mark.parametrize(
    ("fault", "outcome", "message"),
    [
        ("crash on step", "env_crash_step", "the process ended; its last words: the last words"),
        ("error on step", "env_crash_step", "it reports RuntimeError: the simulator gave up"),
        ("out of memory", "env_crash_step", "it reports MemoryError"),
        ("hang", "env_hang", "no answer within the deadline"),
        ("hang with the lock held", "env_hang", "no answer within the deadline"),
        ("oversized", "env_oversized", "announces an answer of 100000"),
        ("invalid UTF-8", "env_invalid_text", "no UTF-8"),
        ("empty", "env_empty", "an empty observation"),
    ],
)
def test_a_fault_has_a_name_and_ends_the_process_with_its_children(fault, outcome, message):
    episode = FaultyEpisode(fault)
    child = int(re.search(r"Process (\d+)", episode.reset()).group(1))
    pid = episode._worker.pid
    assert episode.step("a") and episode.step("b")
    with pytest.raises(EnvironmentFault, match=f"faulty process failed in step: .*{message}") as raised:
        episode.step("c")
    assert raised.value.outcome == outcome
    assert gone(pid) and gone(child)
    episode.close()


def test_a_crash_in_reset_and_a_late_reset_are_told_apart():
    for fault, outcome, deadline_s in (("crash on reset", "env_crash_reset", 20.0), ("hang on reset", "env_hang", 1.0)):
        episode = FaultyEpisode(fault)
        episode._reset_deadline_s = deadline_s
        with pytest.raises(EnvironmentFault, match="failed in reset") as raised:
            episode.reset()
        assert raised.value.outcome == outcome
        episode.close()


def test_a_worker_is_used_again_retired_in_time_and_replaced_when_it_died():
    WORKERS.close()
    episode, _ = play("none")
    first = episode._worker
    episode.close()
    episode, child = play("none")
    assert episode._worker is first
    episode.close()
    os.kill(first.pid, signal.SIGKILL)
    os.waitid(os.P_PID, first.pid, os.WEXITED | os.WNOWAIT)  # of a corpse's threads some may still live
    episode, _ = play("none")
    assert episode._worker is not first and gone(child), "what a dead worker started ends too"
    episode._worker.num_episodes = KIND.episodes - 1
    retired = episode._worker.pid
    episode.close()
    assert gone(retired)


def test_an_answer_of_absurd_length_and_bytes_that_are_no_text_are_faults():
    for data, outcome, message in (
        (b"\xff\xff\xff\xff", "env_oversized", "announces an answer of 4294967295 bytes"),
        (b"\x00\x00\x00\x09{\"a\": \"\xe9\"", "env_invalid_text", "can't decode"),
        (b"\x00\x00\x00\x03{\"a", "env_crash_step", "JSON|Unterminated"),
    ):
        worker = Worker(KIND)
        reader, writer = os.pipe()
        os.write(writer, data)
        os.dup2(reader, worker._process.stdout.fileno())
        with pytest.raises(EnvironmentFault, match=message) as raised:
            worker.call({"op": "step", "command": "look"}, deadline_s=10.0)
        assert raised.value.outcome == outcome and not worker.is_alive
        os.close(writer)
        os.close(reader)


PARENT = """
import signal, sys, time
sys.path.insert(0, {tests!r})
from faulty import FaultyEpisode
episode = FaultyEpisode({fault!r})
print(episode.reset(), episode._worker.pid, flush=True)
sys.stdin.readline()
if {is_idle}:
    episode.close()
else:
    episode._step_deadline_s = 600
    episode.step("a"), episode.step("b")
    print("stuck", flush=True)
    episode.step("c")
print("idle", flush=True)
if {ending!r} != "exit":
    time.sleep(600)
"""


@pytest.mark.parametrize(
    ("fault", "ending"),
    [
        ("none", "exit"),
        ("none", "SIGTERM"),
        ("none", "SIGKILL"),
        ("hang", "SIGTERM"),
        ("hang with the lock held", "SIGKILL"),
    ],
)
def test_no_process_outlives_its_trainer(fault, ending):
    program = PARENT.format(tests=str(TESTS), fault=fault, ending=ending, is_idle=fault == "none")
    parent = subprocess.Popen([sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    told = parent.stdout.readline()
    child, worker = (int(number) for number in re.findall(r"\d+", told))
    assert psutil.pid_exists(child) and psutil.pid_exists(worker)
    parent.stdin.write("\n")  # until then it waits: an exit could come before the look
    parent.stdin.flush()
    assert parent.stdout.readline().strip() in ("idle", "stuck")
    if fault == "hang with the lock held":
        time.sleep(0.5)
    if ending != "exit":
        parent.send_signal(getattr(signal, ending))
    parent.wait(timeout=60)
    parent.stdin.close()
    parent.stdout.close()
    assert gone(worker) and gone(child)


def test_missing_packages_name_the_extra():
    kind = WorkerKind(name="alfworld", script=KIND.script, packages=("json", "surely_not_installed"))
    with pytest.raises(ValueError, match=r"surely_not_installed not found: pip install 'megatron_tcod\[alfworld\]'"):
        Worker(kind)
