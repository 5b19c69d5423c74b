"""A rank that dies, stops or hangs ends the job within its timeout, and the message names it and where it was."""

import contextlib
import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil
import pytest
import torch.distributed as dist

from megatron_tcod import watchdog
from megatron_tcod.watchdog import EXIT_HUNG, Watchdog

HEARTBEAT = 0.6


class World:
    """Several watchdogs in this process; `left[rank]` is when and why a rank would have left it."""

    def __init__(self, world_size, *, stall_seconds=60.0):
        self.left, self.verdicts, self._store = {}, {}, dist.HashStore()
        self.ranks = [
            Watchdog(
                self._store,
                rank=rank,
                world_size=world_size,
                heartbeat_seconds=HEARTBEAT,
                stall_seconds=stall_seconds,
                leave=lambda code, rank=rank: self.left.setdefault(rank, code),
            )
            for rank in range(world_size)
        ]

    def wait(self, ranks, seconds=10.0):
        deadline = time.monotonic() + seconds
        while set(self.left) != set(ranks) and time.monotonic() < deadline:
            time.sleep(0.02)
        assert set(self.left) == set(ranks), f"left: {self.left}"
        assert set(self.left.values()) == {EXIT_HUNG}
        return self._store.get("verdict").decode()

    def close(self):
        for rank in self.ranks:
            rank._is_ending.set()


@pytest.fixture
def world():
    made = []

    def make(*args, **kwargs):
        made.append(World(*args, **kwargs))
        return made[-1]

    yield make
    for one in made:
        one.close()


def test_a_silent_rank_is_named_with_where_it_was_and_all_others_leave(world):
    job = world(4)
    for rank in job.ranks:
        rank.enter("train", step=6)
        rank.__enter__()
    time.sleep(2 * HEARTBEAT)
    assert not job.left, "ranks that report are left alone"
    job.ranks[2]._is_ending.set()  # as SIGKILL or SIGSTOP leave it: no more reports, no farewell
    start = time.monotonic()
    verdict = job.wait([0, 1, 3])
    assert time.monotonic() - start < 3 * HEARTBEAT
    named = rf"rank 2 \(host .+, pid {os.getpid()}\) is dead or stopped: silent for \d+ s, last seen in train of step 7"
    assert re.match(named, verdict)


def test_a_rank_that_never_reports_is_named(world):
    job = world(3)
    job.ranks[0].__enter__()
    job.ranks[2].__enter__()
    assert job.wait([0, 2]).startswith("rank 1 has not reported once")


def test_a_rank_that_is_done_is_not_missed(world):
    job = world(3)
    for rank in job.ranks:
        rank.__enter__()
    job.ranks[1].__exit__(None, None, None)
    time.sleep(3 * HEARTBEAT)
    assert not job.left


def test_a_rank_that_fails_with_an_exception_is_found_like_a_dead_one(world):
    job = world(2)
    for rank in job.ranks:
        rank.__enter__()
    job.ranks[1].__exit__(OSError, OSError("disk"), None)
    assert job.wait([0]).startswith("rank 1 ")


def test_a_connection_that_breaks_because_of_a_verdict_is_told_as_the_verdict(world, capsys):
    job = world(2)
    job._store.set("verdict", "rank 7 is dead")
    with pytest.raises(ConnectionError), job.ranks[1]:
        job.ranks[1]._is_ending.set()  # its thread has not looked yet
        raise ConnectionError
    assert job.left == {1: EXIT_HUNG} and "error (rank 1): rank 7 is dead; the job ends" in capsys.readouterr().err


def test_a_job_that_moves_is_not_stalled_and_one_that_stops_is(world):
    job = world(3, stall_seconds=1.0)
    for rank in job.ranks:
        rank.__enter__()
    for step in range(12):
        for rank in job.ranks:
            rank.enter("rollout", step=step)
        time.sleep(0.15)
    assert not job.left
    for rank in job.ranks[:2]:
        rank.enter("train", step=12)
    verdict = job.wait([0, 1, 2])
    assert verdict.startswith("rank 2 (host ") and "hangs: no rank has moved on" in verdict
    assert "0-1 in train of step 13" in verdict and "2 in rollout of step 12" in verdict


def test_time_before_a_move_is_none_that_the_rank_stood_still(world):
    first, second = world(2, stall_seconds=3.0).ranks

    def turn(elapsed):
        second._publish(beat=len(verdicts))  # another report each time, so that it is not silent
        verdicts.append(first._verdict(elapsed))
        return verdicts[-1]

    verdicts = []
    first.enter("rollout", step=0)
    assert turn(2.5) == ""
    first.enter("train", step=0)
    assert turn(2.5) == turn(2.5) == "", "the move may have come at the end of the first of the two"
    assert "no rank has moved on for 5 s" in turn(2.5)


class LosingStore:
    """A store whose host goes away."""

    def __init__(self):
        self.is_gone, self._store = False, dist.HashStore()

    def __getattr__(self, name):
        if self.is_gone:
            raise RuntimeError("connection reset")
        return getattr(self._store, name)


def test_a_store_that_is_gone_ends_the_job_after_the_timeout_and_not_before():
    left, store = [], LosingStore()
    alone = Watchdog(store, rank=0, world_size=1, heartbeat_seconds=HEARTBEAT, stall_seconds=60, leave=left.append)
    with alone:
        time.sleep(2 * HEARTBEAT)
        assert not left
        store.is_gone = True
        time.sleep(HEARTBEAT / 2)
        assert not left, "the last rank of a job that ends may see this"
        time.sleep(2 * HEARTBEAT)
        assert left == [EXIT_HUNG]


def test_of_ranks_in_one_phase_the_one_that_waits_for_nobody_hangs():
    waits = {"host": "a", "pid": 1, "is_done": False, "phase": "rollout", "step": 3, "moves": 9, "where": "x:1 f"}
    reports = [waits | {"is_waiting": True}, waits | {"is_waiting": False, "where": "envs/maze.py:7 step"}, {}]
    verdict = watchdog.stall(reports, 1800.0)
    assert verdict.startswith("rank 1 (host a, pid 1) hangs") and "envs/maze.py:7 step" in verdict
    assert "none stands out" in watchdog.stall([waits | {"is_waiting": True}] * 2, 9.0)


def test_whereabouts_tell_waiting_from_working():
    ready = threading.Event()
    found = {}

    def work():
        found["ident"] = threading.get_ident()
        ready.set()
        watchdog.ranges(Slow())

    class Slow(list):
        def __iter__(self):
            time.sleep(0.5)
            return iter(())

    thread = threading.Thread(target=work)
    thread.start()
    ready.wait()
    time.sleep(0.1)
    where, is_waiting = watchdog.whereabouts(found["ident"])
    thread.join()
    assert where.startswith("watchdog.py:") and where.endswith(" ranges") and not is_waiting


def torchrun(flags, num_processes, program=("-m", "megatron_tcod.train")):
    """A training run under torchrun."""
    ours = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(num_processes)]
    return subprocess.Popen(
        [*launcher, *program, *flags],
        env=ours | {"OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )


def workers_of(process):
    """Rank -> process, while the launcher lives."""
    found = {}
    if process.poll() is not None:
        return found
    for child in psutil.Process(process.pid).children(recursive=True):
        if "--heartbeat-timeout-seconds" in child.cmdline() and "RANK" in (variables := child.environ()):
            found[int(variables["RANK"])] = child
    return found


def wait_for_steps(process, run, count):
    """Until a run has done some steps; its ranks."""
    metrics, deadline = run / "metrics.jsonl", time.monotonic() + 120
    while not (metrics.exists() and metrics.read_bytes().count(b"\n") >= count):
        assert process.poll() is None and time.monotonic() < deadline, "the run does not start"
        time.sleep(0.1)
    ranks = workers_of(process)
    assert sorted(ranks) == [0, 1]
    return ranks


def end_of(process, victims, *, timeout):
    """What a job says from now to its end, and how long that takes; whoever lives on is killed."""
    start = time.monotonic()
    try:
        _, told = process.communicate(timeout=timeout)
        return told, time.monotonic() - start
    finally:
        for one in [*workers_of(process).values(), *victims.values(), process]:
            with contextlib.suppress(psutil.NoSuchProcess, ProcessLookupError):
                one.kill()


def test_a_stopped_rank_ends_a_real_job_with_its_name(run_flags, tmp_path):
    flags = [*run_flags, "--train-iters", "100000", "--heartbeat-timeout-seconds", "4", "--no-eval-at-end"]
    process = torchrun(flags, 2)
    victims = {}
    try:
        victims = wait_for_steps(process, tmp_path / "run", 20)
        victims[1].send_signal(signal.SIGSTOP)
        while victims[1].status() != psutil.STATUS_STOPPED:
            time.sleep(0.01)
    finally:  # torchrun gives a worker that does not end 30 s before it kills it
        told, seconds = end_of(process, victims, timeout=90 if victims else 0)
    assert process.returncode != 0
    print(told)
    assert re.search(rf"error \(rank 0\): rank 1 \(host .+, pid {victims[1].pid}\) is dead or stopped: silent for \d", told)
    assert f"exitcode  : {EXIT_HUNG}" in told
    assert seconds < 4 + 30 + 15, f"the job ended after {seconds:.0f} s"
    assert not any(victim.is_running() for victim in victims.values())


@pytest.mark.slow
def test_a_rank_that_hangs_and_still_reports_ends_a_real_job_with_its_name(run_flags, tmp_path):
    """The shortest patience is a minute; the collective in which the other one waits must not give up before."""
    switch = tmp_path / "hang"
    flags = [*run_flags, "--train-iters", "100000", "--heartbeat-timeout-seconds", "6", "--no-eval-at-end"]
    program = [str(Path(__file__).with_name("hanging_run.py")), "1", str(switch)]
    process = torchrun([*flags, "--distributed-timeout-minutes", "1"], 2, program)
    victims = {}
    try:
        victims = wait_for_steps(process, tmp_path / "run", 5)
        switch.touch()
    finally:
        told, _ = end_of(process, victims, timeout=150 if victims else 0)
    silence = time.time() - (tmp_path / "run" / "metrics.jsonl").stat().st_mtime  # it is written before a step's last report
    print(told)
    named = rf"error \(rank 0\): rank 1 \(host .+, pid {victims[1].pid}\) hangs: no rank has moved on for 6\d s"
    assert re.search(named + r" while the others wait for it: .*1 in rollout of step", told)
    assert f"exitcode  : {EXIT_HUNG}" in told
    assert 60 < silence < 60 + 30 + 15, f"the job ended {silence:.0f} s after its last step"
    assert not any(victim.is_running() for victim in victims.values())
