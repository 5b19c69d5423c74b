"""A run killed with SIGKILL and restarted by the same command ends as if nothing had happened."""

import hashlib
import random
import time
from pathlib import Path

import pytest
from checkpoint_content import digest_of
from forked_runs import RunServer

from megatron_tcod.journal import read_journal


def steps_done(save):
    path = Path(save) / "metrics.jsonl"
    return len(read_journal(path).records) if path.exists() else 0


def unfinished(save):
    """Checkpoints that are being written, or were when their run was killed."""
    return {(path.name, path.stat().st_ino) for path in (Path(save) / "checkpoints").glob(".step_*.tmp")}


def kill(server, flags, save, step, draw, *, inside_save, num_ranks):
    """Start the run, SIGKILL all ranks behind `step`, or in the next save after it; whether a save was cut short."""
    earlier = unfinished(save)
    run = server.start([*flags, "--save", str(save)], num_ranks=num_ranks)
    deadline = time.monotonic() + 120
    while not (save / "metrics.jsonl").exists() or "training from" not in run.said() and "resuming" not in run.said():
        assert run.is_running() and time.monotonic() < deadline, run.said()
        time.sleep(0.02)
    while steps_done(save) < step or (inside_save and not unfinished(save) - earlier):
        assert run.is_running() and time.monotonic() < deadline, run.said()
        if not inside_save:
            time.sleep(0.005)
    time.sleep(draw.uniform(0.0, 0.03))
    run.kill()
    recorded = steps_done(save)
    time.sleep(0.1)
    assert steps_done(save) == recorded, "somebody goes on writing"
    return bool(unfinished(save) - earlier)


def final_state(save, num_steps):
    checkpoint = Path(save) / "checkpoints" / f"step_{num_steps:07d}"
    hashes = hashlib.sha256((checkpoint / "model.safetensors").read_bytes()).hexdigest(), digest_of(checkpoint)
    metrics = [
        {key: value for key, value in record.items() if not key.startswith("seconds/") and key != "tokens/per_second"}
        for record in read_journal(Path(save) / "metrics.jsonl").records
    ]
    episodes = list(read_journal(Path(save) / "trajectories.jsonl").records)
    return hashes, metrics, episodes


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    with RunServer(tmp_path_factory.mktemp("logs")) as server:
        yield server


def check_killed_run_equals_undisturbed_one(server, flags, tmp_path, *, num_ranks, num_steps, num_kills, min_cut_saves):
    flags = [
        *flags,
        "--train-iters", str(num_steps),
        "--save-interval", "7",
        "--curriculum", "f2b",
        "--eta", "9",
        "--lr-decay-style", "cosine",
        "--tensor-model-parallel-size", str(num_ranks),
    ]  # fmt: skip
    undisturbed = server.start([*flags, "--save", str(tmp_path / "undisturbed")], num_ranks=num_ranks)
    assert set(undisturbed.wait(500)) == {0}, undisturbed.said()
    seed = random.SystemRandom().randrange(2**32)
    draw, save, cut = random.Random(seed), tmp_path / "killed", 0
    stretch = (num_steps - 8) / num_kills
    for number in range(num_kills):
        step = int(stretch * (number + draw.random()))
        cut += kill(server, flags, save, step, draw, inside_save=number % 2 == 1, num_ranks=num_ranks)
        assert steps_done(save) < num_steps, f"seed {seed}: the run must be killed on its way, not at its end"
    last = server.start([*flags, "--save", str(save)], num_ranks=num_ranks)
    assert set(last.wait(500)) == {0}, last.said()
    assert "resuming" in last.said()
    expected, found = (final_state(tmp_path / name, num_steps) for name in ("undisturbed", "killed"))
    for what, one, other in zip(("weights and optimizer", "metrics", "episodes"), expected, found, strict=True):
        assert one == other, f"seed {seed}: other {what}"
    assert [record["step"] for record in found[1]] == list(range(1, num_steps + 1))
    assert cut >= min_cut_saves, f"seed {seed}: {cut} of {num_kills} kills were inside a save"


def test_a_killed_run_ends_with_the_weights_and_records_of_an_undisturbed_one(server, run_flags, tmp_path):
    check_killed_run_equals_undisturbed_one(
        server, run_flags, tmp_path, num_ranks=1, num_steps=40, num_kills=4, min_cut_saves=1
    )


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("more", [[], ["--async-save"]], ids=["sync", "async"])
@pytest.mark.parametrize("num_ranks", [1, 2])
def test_20_kills_of_a_200_step_run_leave_no_trace(server, run_flags, tmp_path, num_ranks, more):
    check_killed_run_equals_undisturbed_one(
        server, [*run_flags, *more], tmp_path, num_ranks=num_ranks, num_steps=200, num_kills=20, min_cut_saves=5
    )
