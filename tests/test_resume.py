"""A run killed with SIGKILL and restarted by the same command ends as if nothing had happened."""

import hashlib
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from checkpoint_content import digest_of

from megatron_tcod.journal import read_journal

NUM_STEPS = 60


def command(flags, save, num_processes):
    run = ["-m", "megatron_tcod.train", *flags, "--save", str(save)]
    if num_processes == 1:
        return [sys.executable, *run]
    return [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(num_processes), *run]


def environment():
    ours = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    return ours | {"OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}


def steps_done(save):
    path = Path(save) / "metrics.jsonl"
    return len(list(read_journal(path).records)) if path.exists() else 0


def kill_at(flags, save, num_processes, step):
    """Start the run, SIGKILL all of its processes once `step` steps are recorded; the number recorded then.

    torchrun puts its workers into sessions of their own, so a signal to its process group would leave them running.
    """
    process = subprocess.Popen(
        command(flags, save, num_processes), env=environment(), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    deadline = time.monotonic() + 300
    while steps_done(save) < step:
        assert process.poll() is None, "the run ended before it was killed"
        assert time.monotonic() < deadline, "the run does not get to the step it should be killed at"
        time.sleep(0.02)
    launcher = psutil.Process(process.pid)
    victims = [launcher, *launcher.children(recursive=True)]
    assert len(victims) >= (1 if num_processes == 1 else 1 + num_processes)
    for victim in victims:
        victim.kill()
    assert process.wait() == -signal.SIGKILL
    assert not psutil.wait_procs(victims, timeout=30)[1], "a process of the run is still alive"
    recorded = steps_done(save)
    time.sleep(1)
    assert steps_done(save) == recorded, "somebody goes on writing"
    return recorded


def run(flags, save, num_processes):
    done = subprocess.run(
        command(flags, save, num_processes), env=environment(), capture_output=True, text=True, timeout=500
    )
    assert done.returncode == 0, done.stderr[-2000:]


def final_state(save):
    checkpoint = Path(save) / "checkpoints" / f"step_{NUM_STEPS:07d}"
    hashes = hashlib.sha256((checkpoint / "model.safetensors").read_bytes()).hexdigest(), digest_of(checkpoint)
    metrics = [
        {key: value for key, value in record.items() if not key.startswith("seconds/") and key != "tokens/per_second"}
        for record in read_journal(Path(save) / "metrics.jsonl").records
    ]
    episodes = list(read_journal(Path(save) / "trajectories.jsonl").records)
    return hashes, metrics, episodes


@pytest.mark.parametrize("num_processes", [1, 2])
def test_a_killed_run_ends_with_the_weights_and_records_of_an_undisturbed_one(run_flags, tmp_path, num_processes):
    flags = [
        *run_flags,
        "--train-iters", str(NUM_STEPS),
        "--save-interval", "7",
        "--curriculum", "f2b",
        "--eta", "9",
        "--lr-decay-style", "cosine",
        "--tensor-model-parallel-size", str(num_processes),
    ]  # fmt: skip
    run(flags, tmp_path / "undisturbed", num_processes)
    kill_step = random.SystemRandom().randrange(8, NUM_STEPS - 5)
    recorded = kill_at(flags, tmp_path / "killed", num_processes, kill_step)
    latest = (tmp_path / "killed" / "checkpoints" / "latest").read_text().strip()
    assert int(latest.removeprefix("step_")) <= recorded < NUM_STEPS, "the run was killed on its way"
    run(flags, tmp_path / "killed", num_processes)
    undisturbed, killed = final_state(tmp_path / "undisturbed"), final_state(tmp_path / "killed")
    assert killed[0] == undisturbed[0], f"killed at step {kill_step}"
    assert killed[1] == undisturbed[1]
    assert killed[2] == undisturbed[2]
    assert [record["step"] for record in killed[1]] == list(range(1, NUM_STEPS + 1))
