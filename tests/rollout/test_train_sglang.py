"""Whole runs over real SGLang servers on a CPU: `pytest -m sglang`, after `bash tools/sglang_cpu_env.sh`."""

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from processes import all_end, descendants, is_running, listening_addresses
from sglang_cpu import ROOT

from megatron_tcod.envs.demonstrations import write_demonstrations
from megatron_tcod.envs.household import Household
from megatron_tcod.journal import read_journal

pytestmark = pytest.mark.sglang


@pytest.fixture
def flags(sglang_flags):
    return [*sglang_flags, "--no-eval-at-end"]


def command(flags, *more, ranks=1):
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"] if ranks > 1 else []
    return [sys.executable, *launcher, "-m", "megatron_tcod.train", *flags, *more]


def run(flags, *more, ranks=1):
    done = subprocess.run(command(flags, *more, ranks=ranks), cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stderr


def records(directory, name="metrics.jsonl"):
    reading = read_journal(directory / name)
    assert reading.num_bad == 0
    return list(reading.records)


def demonstrations_file(directory: Path) -> Path:
    path = directory / "demonstrations.jsonl"
    write_demonstrations(path, [Household.expert(task, seed=0) for task in Household.tasks("train", count=12)])
    return path


@pytest.mark.parametrize("path,ranks", [("tensor", 1), ("disk", 2), ("distributed", 1)])
def test_the_servers_sample_from_the_weights_that_are_trained(flags, tmp_path, path, ranks):
    """Each way of updating; under tensor parallelism the second rank plays nothing."""
    more = ["--tensor-model-parallel-size", str(ranks), "--weight-sync", path, "--train-iters", "3"]
    run(flags, *more, ranks=ranks)
    steps = records(tmp_path / "run")
    assert [one["weights/version"] for one in steps] == [0, 1, 2]
    assert max(one["logprob/rollout_gap"] for one in steps) <= 1e-4
    assert all(one["rollout/outcome/ok"] == one["rollout/episodes"] == 3 for one in steps)
    losses = [one["train/loss"] for one in steps]
    assert len(set(losses)) == 3


def test_b2f_over_servers_reuses_what_was_warmed_and_equals_the_embedded_engine_in_what_it_trains(flags, tmp_path):
    more = ["--curriculum", "b2f", "--k-start", "2", "--max-turns", "24", "--n-samples-per-prompt", "4"]
    more += ["--demonstrations", str(demonstrations_file(tmp_path)), "--rollout-max-context-len", "1024"]
    run(flags, *more)
    for one in records(tmp_path / "run"):
        assert one["prefix/reused"] >= 0.95 * one["prefix/reusable"] > 0
        assert one["prefix/reusable"] == one["prefix/reused"] + one.get("prefix/recomputed", 0)
        assert one["prefix/warmed"] > 0 and one["logprob/rollout_gap"] <= 1e-4


@pytest.mark.parametrize("objective,top_k,ranks", [("reverse_kl", 600, 2), ("sampled_token", 0, 1)])
def test_a_teacher_behind_a_server_scores_like_one_in_the_trainer(flags, household_models, tmp_path, objective, top_k, ranks):
    """With all ids listed the buckets are the vocabulary; the sampled token alone gives the same log-probability."""
    more = ["--objective", objective, "--rollout-engine", "embedded", "--tensor-model-parallel-size", str(ranks)]
    run(flags, *more, "--save", str(tmp_path / "inside"), ranks=ranks)
    served = ["--teacher", "sglang", "--teacher-model", str(household_models / "teacher"), "--teacher-top-k", str(top_k)]
    tokenizer = json.loads((household_models / "student" / "tokenizer.json").read_text())
    known = 1 + max(*tokenizer["model"]["vocab"].values(), *(token["id"] for token in tokenizer["added_tokens"]))
    if top_k:
        served[-1] = str(known)
    run(flags, *more, *served, ranks=ranks)
    for inside, behind in zip(records(tmp_path / "inside"), records(tmp_path / "run"), strict=True):
        assert behind["logprob/teacher"] == pytest.approx(inside["logprob/teacher"], abs=1e-4)
        assert behind["train/loss"] == pytest.approx(inside["train/loss"], rel=1e-4, abs=1e-4)
        assert behind["train/grad_norm"] == pytest.approx(inside["train/grad_norm"], rel=1e-3)
        assert behind["kl/trajectory"] == pytest.approx(
            inside["kl/trajectory"] if top_k else inside["kl/sampled"] * inside["tokens/trained"] / 3, rel=1e-3
        )
        assert behind["teacher_prefix/scored"] > 0


@pytest.mark.parametrize("top_k", [8, 0])
def test_a_served_teacher_demonstrates_and_measures(flags, household_models, tmp_path, top_k):
    """Random weights solve nothing, so what was attempted shows in the message; the expert's solutions are then replayed."""
    served = ["--teacher", "sglang", "--teacher-model", str(household_models / "teacher"), "--teacher-top-k", str(top_k)]
    served += ["--objective", "reverse_kl" if top_k else "sampled_token"]
    output = tmp_path / "evaluation.json"
    evaluating = [*command(flags, *served)[:2], "megatron_tcod.evaluate", *flags[:-1], *served, "--output", str(output)]
    done = subprocess.run(evaluating, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    tasks = json.loads(output.read_text())["tasks"]
    assert len(tasks) == 3 and all(len(task["kl_by_turn"]) == task["turns"] == 5 for task in tasks)
    asking = ["--demonstrations", str(tmp_path / "found.jsonl"), "--demonstration-tasks", "2", "--demonstration-samples", "2"]
    demonstrating = [*evaluating[:2], "megatron_tcod.demonstrate", *flags[:-1], *served, *asking]
    done = subprocess.run(demonstrating, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2 and "the teacher solved none of 4 attempts" in done.stderr, done.stderr[-3000:]


def test_with_staleness_the_servers_play_ahead_and_no_token_is_older_than_allowed(flags, tmp_path):
    run(flags, "--max-staleness", "2", "--train-iters", "6")
    steps = records(tmp_path / "run")
    episodes = records(tmp_path / "run", "trajectories.jsonl")
    lags = [one["step"] - one["weight_version"] for one in episodes]
    assert max(lags) == 2 and min(lags) == 0, f"{lags}"
    assert all(one["rollout/outcome/ok"] == 3 for one in steps)
    assert [one["step"] for one in episodes] == [step for step in range(6) for _ in range(3)]
    # The KL is that of the weights that train: stale tokens have other log-probabilities than at sampling.
    assert steps[0]["logprob/rollout_gap"] <= 1e-4 < steps[3]["logprob/rollout_gap"]


def start(flags, *more):
    return subprocess.Popen(command(flags, *more), cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)


def wait_for_step(directory, number, process):
    path = directory / "metrics.jsonl"
    deadline = time.monotonic() + 240
    while not path.exists() or len(path.read_text().splitlines()) < number:
        assert process.poll() is None, process.stderr.read()[-3000:]
        assert time.monotonic() < deadline
        time.sleep(0.05)


def sglang_main(pid):
    """The server's own process: the first one below the supervisor."""
    words = {one: Path(f"/proc/{one}/cmdline").read_bytes().split(b"\0") for one in descendants(pid)}
    return min(one for one, command_line in words.items() if command_line[1].endswith(b"sglang_loopback.py"))


def test_a_server_that_is_killed_mid_run_costs_no_episode(flags, tmp_path):
    more = ["--train-iters", "8", "--max-turns", "12", "--rollout-max-context-len", "1024"]
    run(flags, *more, "--save", str(tmp_path / "undisturbed"))
    trainer = start(flags, *more)
    wait_for_step(tmp_path / "run", 2, trainer)
    os.kill(sglang_main(trainer.pid), signal.SIGKILL)
    _, told = trainer.communicate(timeout=300)
    assert trainer.returncode == 0, told[-3000:]
    assert "died; restarting it" in told
    keys = ("step", "task", "sample", "outcome")
    disturbed, undisturbed = (
        [[one[key] for key in keys] for one in records(tmp_path / name, "trajectories.jsonl")]
        for name in ("run", "undisturbed")
    )
    assert disturbed == undisturbed and len(disturbed) == 24
    for one, other in zip(records(tmp_path / "run"), records(tmp_path / "undisturbed"), strict=True):
        assert one["logprob/rollout_gap"] <= 1e-4
        assert one["train/loss"] == pytest.approx(other["train/loss"], rel=1e-5)


@pytest.mark.parametrize("end", ["exit", signal.SIGTERM, signal.SIGKILL])
def test_nothing_listens_or_lives_after_the_trainer_however_it_ends(flags, tmp_path, end):
    trainer = start(flags, "--train-iters", "3" if end == "exit" else "500")
    drain = threading.Thread(target=trainer.stderr.read)
    wait_for_step(tmp_path / "run", 1, trainer)
    drain.start()
    processes = [trainer.pid, *descendants(trainer.pid)]
    assert len(processes) >= 5 and all(map(is_running, processes))
    addresses = listening_addresses(processes)
    assert addresses and {address for address, _ in addresses} == {"127.0.0.1"}
    if end != "exit":
        trainer.send_signal(end)
    trainer.wait(timeout=120)
    drain.join()
    assert trainer.returncode == {"exit": 0, signal.SIGTERM: 143, signal.SIGKILL: -signal.SIGKILL}[end]
    assert all_end(processes, within_s=15)
    for _, port in addresses:
        socket.create_server(("127.0.0.1", port)).close()  # OSError while anybody listens there
