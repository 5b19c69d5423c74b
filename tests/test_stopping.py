"""Signals end a run with a checkpoint and a code; one directory belongs to one run at a time."""

import json
import os
import signal
import socket
import subprocess
import sys
import time

import pytest
from checkpoint_content import digest_of
from forked_runs import RunServer

from megatron_tcod.journal import read_journal
from megatron_tcod.run_lock import LOCK_FILE, STALE_SECONDS, RunLock
from megatron_tcod.stop_signals import IMPATIENT_SECONDS

CODES = {signal.SIGTERM: 143, signal.SIGUSR1: 75, signal.SIGINT: 130}
GRACE_SECONDS = 30
STEPS = 12


def command(flags, save, *more):
    ends = ["--train-iters", str(STEPS), "--save-interval", "100", "--no-eval-at-end"]
    return [*flags, "--save", str(save), *ends, *more]


def steps_done(save):
    path = save / "metrics.jsonl"
    return len(read_journal(path).records) if path.exists() else 0


def wait_for_step(run, save, step):
    wait_until(run, lambda: steps_done(save) >= step)


def wait_until(run, is_so):
    deadline = time.monotonic() + 120
    while not is_so():
        assert run.is_running(), run.said()
        assert time.monotonic() < deadline, run.said()
        time.sleep(0.01)


def latest(save):
    return save / "checkpoints" / (save / "checkpoints" / "latest").read_text().strip()


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    with RunServer(tmp_path_factory.mktemp("logs")) as server:
        yield server


@pytest.fixture(scope="module")
def undisturbed(household_models, server, tmp_path_factory):
    """Flags of a small run, and what it ends with when nobody disturbs it."""
    flags = [
        "--student", str(household_models / "student"), "--teacher", str(household_models / "teacher"), "--lr", "1e-3",
        "--rollout-batch-size", "3", "--rollout-max-response-len", "6", "--rollout-max-context-len", "512",
        "--max-turns", "5", "--train-tasks", "12", "--curriculum", "f2b", "--eta", "3",
    ]  # fmt: skip
    save = tmp_path_factory.mktemp("undisturbed") / "run"
    run = server.start(command(flags, save))
    assert run.wait(120) == [0], run.said()
    return flags, digest_of(latest(save))


@pytest.mark.parametrize("number", CODES)
def test_a_signal_saves_within_the_grace_and_the_same_command_goes_on(server, undisturbed, tmp_path, number):
    flags, expected = undisturbed
    save = tmp_path / "run"
    run = server.start(command(flags, save, "--async-save"))
    wait_for_step(run, save, 3)
    run.signal(number)
    run.signal(number)  # a batch system signals all processes, and the launcher among them passes it on
    assert run.wait(GRACE_SECONDS) == [CODES[number]], run.said()
    done = steps_done(save)
    stopped = json.loads((save / "stopped.json").read_text())
    assert stopped == {"signal": number.name, "step": done, "exit_code": CODES[number]}
    assert 3 <= done < STEPS and latest(save).name == f"step_{done:07d}"
    assert not (save / LOCK_FILE).exists()
    run = server.start(command(flags, save, "--async-save"))
    assert run.wait(120) == [0], run.said()
    assert digest_of(latest(save)) == expected
    assert not (save / "stopped.json").exists() and steps_done(save) == STEPS


def test_ctrl_c_again_does_not_wait():
    script = (
        "import time; from megatron_tcod.stop_signals import StopSignals\n"
        "with StopSignals():\n    print('on', flush=True)\n    while True: time.sleep(0.1)\n"
    )
    process = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "on\n"
    process.send_signal(signal.SIGINT)
    time.sleep(IMPATIENT_SECONDS + 0.5)
    assert process.poll() is None
    process.send_signal(signal.SIGINT)
    assert process.wait(20) == -signal.SIGINT


def test_one_rank_that_is_told_stops_all_of_them(server, undisturbed, tmp_path):
    """A batch system may signal one process only."""
    flags, _ = undisturbed
    save = tmp_path / "run"
    run = server.start(command(flags, save, "--tensor-model-parallel-size", "2"), num_ranks=2)
    wait_for_step(run, save, 3)
    os.kill(run.pids[1], signal.SIGUSR1)
    assert run.wait(GRACE_SECONDS) == [75, 75], run.said()
    assert latest(save).name == f"step_{steps_done(save):07d}"


@pytest.mark.parametrize("phase", ["rollout", "evaluation"])
def test_what_is_being_played_is_given_up_so_that_the_grace_need_not_cover_a_step(server, undisturbed, tmp_path, phase):
    flags, _ = undisturbed
    save = tmp_path / "run"
    long = ["--max-turns", "50", "--rollout-max-response-len", "24", "--rollout-max-context-len", "2048"]
    long += ["--train-tasks", "800"]
    long += {
        "rollout": ["--rollout-batch-size", "800", "--curriculum", "full"],
        "evaluation": ["--eval-interval", "1", "--eval-tasks", "800", "--eval-split", "train"],
    }[phase]
    run = server.start(command(flags, save, *long, "--tensor-model-parallel-size", "2"), num_ranks=2)
    done = {"rollout": 0, "evaluation": 1}[phase]
    wait_until(run, lambda: (save / "config.toml").exists() and steps_done(save) == done)
    time.sleep(2)  # into the episodes
    os.kill(run.pids[1], signal.SIGTERM)
    assert run.wait(GRACE_SECONDS) == [143, 143], run.said()
    assert json.loads((save / "stopped.json").read_text())["step"] == steps_done(save) == done
    assert latest(save).name == f"step_{done:07d}" and not list((save / "evaluation").glob("*"))


@pytest.mark.slow
def test_torchrun_hides_the_code_and_the_file_has_it(undisturbed, tmp_path):
    flags, _ = undisturbed
    save = tmp_path / "run"
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    process = subprocess.Popen(
        [*launcher, "-m", "megatron_tcod.train", *command(flags, save, "--tensor-model-parallel-size", "2")],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    while steps_done(save) < 3:
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)  # torchrun passes it on, and kills what is left after 30 s
    assert process.wait(GRACE_SECONDS) != 0
    stopped = json.loads((save / "stopped.json").read_text())
    assert stopped == {"signal": "SIGTERM", "step": steps_done(save), "exit_code": 143}
    assert latest(save).name == f"step_{stopped['step']:07d}"


def test_a_second_run_in_the_directory_is_refused_and_a_killed_ones_lock_is_not(server, undisturbed, tmp_path):
    flags, _ = undisturbed
    save = tmp_path / "run"
    first = server.start(command(flags, save))
    wait_for_step(first, save, 1)
    first.signal(signal.SIGSTOP)  # alive, however slow the second is to start
    second = server.start(command(flags, save))
    assert second.wait(60) == [2]
    assert f"in use by process {first.pid} on {socket.gethostname()}" in second.said()
    assert "choose another --save" in second.said()
    first.kill()
    assert (save / LOCK_FILE).exists()
    third = server.start(command(flags, save))
    assert third.wait(60) == [0], third.said()
    assert f"taking over the lock of a run that is gone: process {first.pid} has ended" in third.said()


def holder(directory, **changes):
    with RunLock(directory) as lock:
        record = json.loads(lock.path.read_text())
    (directory / LOCK_FILE).write_text(json.dumps(record | changes))
    return directory / LOCK_FILE


def test_a_process_number_in_use_again_does_not_keep_the_lock(tmp_path, caplog):
    holder(tmp_path, process_started=1.0)
    with RunLock(tmp_path):
        assert "is another one by now" in caplog.text


def test_another_hosts_lock_holds_until_it_shows_no_sign_of_life(tmp_path, caplog, monkeypatch):
    path = holder(tmp_path, host="elsewhere", pid=1)
    with pytest.raises(ValueError, match="in use by process 1 on elsewhere"), RunLock(tmp_path):
        pass
    past = time.time() - STALE_SECONDS - 5
    os.utime(path, (past, past))
    with RunLock(tmp_path):
        assert "elsewhere has not touched it" in caplog.text
    monkeypatch.setenv("SLURM_JOB_ID", "17")
    holder(tmp_path, host="elsewhere", pid=1)
    with RunLock(tmp_path):
        assert "SLURM_JOB_ID=17 was requeued from elsewhere" in caplog.text
    assert not list(tmp_path.iterdir())


def test_of_many_that_start_at_once_one_gets_the_lock(tmp_path):
    holder(tmp_path, pid=2**22 + 1)  # stale, so that all of them try to remove it
    script = (
        "import sys, time; from megatron_tcod.run_lock import RunLock\n"
        "sys.stdin.readline()\n"
        "try:\n"
        "    with RunLock(sys.argv[1]): print('mine', flush=True); time.sleep(3)\n"
        "except ValueError: print('refused', flush=True)\n"
    )
    many = [
        subprocess.Popen([sys.executable, "-c", script, str(tmp_path)], stdin=-1, stdout=-1, stderr=-3, text=True)
        for _ in range(6)
    ]
    for one in many:
        one.stdin.write("\n")
        one.stdin.flush()
    said = [one.communicate(timeout=60)[0].strip() for one in many]
    assert sorted(said) == ["mine"] + ["refused"] * 5
