"""Server processes: flags, keys, ports, and that nothing outlives the trainer. A small stand-in is served here; the tests
marked sglang repeat the essential ones with SGLang itself."""

import asyncio
import json
import os
import signal
import stat
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from fakes import Script, scripted_family
from processes import all_end, descendants, is_running, listening_addresses
from sglang_process import launch_on_cpu
from tiny_hf import tiny_model
from tokenizer_fixtures import small_tokenizer

pytest.importorskip("aiohttp")

from sglang_faults import expected_ids  # noqa: E402  needs aiohttp

from megatron_tcod.rollout.engine import Sampling  # noqa: E402
from megatron_tcod.rollout.episodes import Assignment, PlaySettings, collect_episodes  # noqa: E402
from megatron_tcod.rollout.sglang_engine import SGLangEngine  # noqa: E402
from megatron_tcod.rollout.sglang_server import (  # noqa: E402
    LaunchSpec,
    ServerStartFailed,
    flag_arguments,
    launch,
    status_of,
)
from megatron_tcod.rollout.weight_sync import FromDisk, FromTensor  # noqa: E402
from megatron_tcod.trajectory import Task, TurnWindow  # noqa: E402

HERE = Path(__file__).parent
STAND_IN = """
import runpy, subprocess, sys
subprocess.Popen(["sleep", "600"], start_new_session=True)  # a daemon of the server, outside its session
sys.path.insert(0, {here!r})
runpy.run_path({here!r} + "/sglang_faults.py", run_name="__main__")
"""


def prepare_stand_in(directory: Path) -> dict:
    """Options of `launch`. An empty torch in the stand-in's way saves two seconds a start."""
    program = directory / "stand_in.py"
    program.write_text(STAND_IN.format(here=str(HERE)))
    (directory / "torch" / "distributed").mkdir(parents=True, exist_ok=True)
    for name in ("__init__.py", "distributed/__init__.py", "distributed/rendezvous.py"):
        (directory / "torch" / name).touch()
    return dict(program=str(program), environment={"PYTHONPATH": str(directory)}, start_timeout_s=60)


def launch_stand_in(directory: Path):
    return launch("some/model", run_directory=directory, **prepare_stand_in(directory))


def processes_of(server) -> list[int]:
    return [server._supervisor.pid, *descendants(server._supervisor.pid)]


def main_process_of(server) -> int:
    return min(descendants(server._supervisor.pid))


def test_flags_reach_the_server_untouched():
    table = {
        "tp_size": 2,
        "mem-fraction-static": 0.6,
        "enable_memory_saver": True,
        "disable_radix_cache": False,
        "lora_paths": ["a", "b"],
        "json_model_override_args": {"x": 1},
        "load_format": None,
    }
    assert flag_arguments(table) == [
        "--tp-size", "2", "--mem-fraction-static", "0.6", "--enable-memory-saver", "--lora-paths", "a", "b",
        "--json-model-override-args", '{"x": 1}',
    ]  # fmt: skip


@pytest.mark.parametrize("flag", ["api_key", "admin-api-key", "host", "port", "model_path"])
def test_a_flag_that_the_trainer_chooses_is_refused(flag):
    with pytest.raises(ValueError, match=f"must not set {flag}"):
        LaunchSpec(model_path="m", run_directory=Path("r"), flags={flag: "x"}, environment={})


def test_a_launched_server_is_private_and_stop_leaves_nothing(tmp_path, monkeypatch):
    monkeypatch.setenv("RANK", "3")
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    with launch_stand_in(tmp_path) as server:
        processes = processes_of(server)
        assert len(processes) == 3  # supervisor, server, its daemon
        assert {address for address, _ in listening_addresses(processes)} == {"127.0.0.1"}
        assert status_of(server.url, "/model_info") == status_of(server.url, "/model_info", "wrong") == 401
        assert status_of(server.url, "/model_info", server.api_key) == 200
        for pid in processes:
            shown = Path(f"/proc/{pid}/cmdline").read_bytes() + Path(f"/proc/{pid}/environ").read_bytes()
            assert server.api_key.encode() not in shown and server.admin_key.encode() not in shown
        environment = Path(f"/proc/{main_process_of(server)}/environ").read_bytes()
        assert b"\0RANK=" not in environment and b"TORCHELASTIC" not in environment
        assert stat.S_IMODE(server.log_path.stat().st_mode) == 0o600
        assert [path for path in tmp_path.iterdir() if path.name.startswith(".")] == []  # the file with the keys is gone
    assert all_end(processes, within_s=0)
    assert status_of(server.url, "/health") == 0


TRAINER = """
import sys, time
from pathlib import Path
from processes import descendants
from megatron_tcod.rollout.sglang_server import launch
directory = Path({directory!r})
options = dict(program=str(directory / "stand_in.py"), environment={{"PYTHONPATH": str(directory)}})
server = launch("m", run_directory=directory, **options)
print(server._supervisor.pid, *descendants(server._supervisor.pid), flush=True)
{then}
"""


@pytest.mark.parametrize("end", ["exit", signal.SIGTERM, signal.SIGKILL])
def test_nothing_is_left_however_the_trainer_ends(tmp_path, end):
    then = "pass" if end == "exit" else "time.sleep(600)"
    prepare_stand_in(tmp_path)
    script = TRAINER.format(directory=str(tmp_path), then=then)
    trainer = subprocess.Popen(
        [sys.executable, "-c", script], stdout=subprocess.PIPE, text=True, env=os.environ | {"PYTHONPATH": str(HERE)}
    )
    processes = [int(pid) for pid in trainer.stdout.readline().split()]
    assert len(processes) == 3
    if isinstance(end, signal.Signals):
        assert all(map(is_running, processes))
        trainer.send_signal(end)
    trainer.wait(timeout=20)
    assert all_end(processes, within_s=10)


def test_a_killed_supervisor_takes_the_server_along(tmp_path):
    server = launch_stand_in(tmp_path)
    main = main_process_of(server)
    daemons = descendants(main)
    os.kill(server._supervisor.pid, signal.SIGKILL)
    assert all_end([main], within_s=5)
    assert not server.is_alive
    for pid in daemons:  # the stand-in's own, which SGLang has none of
        os.kill(pid, signal.SIGKILL)
    server.stop()


def test_a_server_that_cannot_start_says_why(tmp_path):
    options = prepare_stand_in(tmp_path)
    program = Path(options["program"])
    program.write_text("raise SystemExit('no such model')")
    with pytest.raises(ServerStartFailed, match="ended while it started; its log .* ends with: \nno such model"):
        launch("m", run_directory=tmp_path, **options)
    program.write_text("print('usage: ...'); raise SystemExit('sglang: error: unrecognized arguments: --tp-sizes 2')")
    with pytest.raises(ServerStartFailed, match="ends with: sglang: error: unrecognized arguments: --tp-sizes 2$") as told:
        launch("m", run_directory=tmp_path, **options)
    assert "\n" not in str(told.value)
    assert [path for path in tmp_path.iterdir() if path.name.startswith(".")] == []  # the file with the keys is gone
    program.write_text("import time; time.sleep(600)")
    started = time.monotonic()
    with pytest.raises(ServerStartFailed, match="within 2 s"):
        launch("m", run_directory=tmp_path, **options | {"start_timeout_s": 2})
    assert time.monotonic() - started < 15


def some_weights():
    import torch

    yield "model.norm.weight", torch.ones(4)


def test_a_killed_server_is_restarted_with_its_weights_and_every_request_is_answered_once(tmp_path):
    with launch_stand_in(tmp_path) as server:
        engine = SGLangEngine([server], FromDisk(tmp_path / "weights", tmp_path), vocab_size=97, max_context=64)
        engine.load_weights(some_weights(), version=3)
        prompts = [[i, 7] for i in range(12)]

        async def play():
            sampling = [Sampling(max_new_tokens=5, seed=i) for i in range(12)]
            calls = [asyncio.ensure_future(engine.generate(p, s)) for p, s in zip(prompts, sampling, strict=True)]
            await asyncio.sleep(0.15)
            assert not any(call.done() for call in calls)
            os.kill(main_process_of(server), signal.SIGKILL)
            return await asyncio.gather(*calls)

        completions = asyncio.run(play())
        for seed, (prompt, completion) in enumerate(zip(prompts, completions, strict=True)):
            assert completion.token_ids == expected_ids(prompt, seed, "3", 5)
        counters = engine.counters
        assert (counters.restarts, counters.repeated, counters.requests, server.num_starts) == (1, 12, 12, 2)
        engine.close()


def kill(server) -> None:
    main = main_process_of(server)
    os.kill(main, signal.SIGKILL)
    assert all_end([main], within_s=5)


@pytest.mark.parametrize("moment", ["before", "released", "weights"])
def test_a_server_that_dies_between_rollouts_comes_back_with_the_next_weights(tmp_path, moment):
    with launch_stand_in(tmp_path) as server:
        engine = SGLangEngine([server], FromDisk(tmp_path / "weights", tmp_path), vocab_size=97, max_context=64)
        engine.load_weights(some_weights(), version=3)
        if moment == "before":
            kill(server)
        with engine.released():
            if moment == "released":
                kill(server)
        if moment == "weights":
            kill(server)
        engine.load_weights(some_weights(), version=4)
        completion = asyncio.run(engine.generate([1, 7], Sampling(max_new_tokens=5)))
        assert completion.token_ids == expected_ids([1, 7], 0, "4", 5)
        assert (engine.counters.restarts, server.num_starts) == (1, 2)
        engine.close()


def test_with_staleness_an_update_waits_for_a_restart_and_nothing_is_lost(tmp_path):
    """The server dies under requests, and weights are published while it comes back."""
    with launch_stand_in(tmp_path) as server:
        sync = FromDisk(tmp_path / "weights", tmp_path)
        engine = SGLangEngine([server], sync, vocab_size=97, max_context=64, max_concurrent=4, max_staleness=1)
        engine.load_weights(some_weights(), version=3)

        async def play():
            calls = [asyncio.ensure_future(engine.generate([i], Sampling(max_new_tokens=5, seed=i))) for i in range(12)]
            await asyncio.sleep(0.15)
            kill(server)
            while server.is_alive:
                await asyncio.sleep(0.01)
            await asyncio.to_thread(engine.load_weights, some_weights(), 4)
            return await asyncio.gather(*calls)

        for seed, completion in enumerate(asyncio.run(play())):
            assert completion.token_ids in [expected_ids([seed], seed, version, 5) for version in ("3", "4")]
        assert (engine.counters.restarts, engine.counters.requests, server.num_starts) == (1, 12, 2)
        engine.close()


# With SGLang itself.


@pytest.fixture(scope="module")
def household(tmp_path_factory):
    """A tokenizer and a real server of a model with its vocabulary."""
    directory = tmp_path_factory.mktemp("sglang")
    tokenizer = small_tokenizer(directory / "tokenizer", system_prompt="You act.")
    shape = dict(vocab_size=tokenizer.vocab_size, max_position_embeddings=1024, eos_token_id=None, bos_token_id=None)
    model = tiny_model("qwen3", **shape)
    model.save_pretrained(directory / "model")
    with launch_on_cpu(directory, model_path=directory / "model", max_total_tokens=32768) as server:
        yield tokenizer, model, server


@pytest.mark.sglang
def test_sglang_listens_on_the_loopback_interface_only_and_wants_its_keys(household):
    _, _, server = household
    processes = processes_of(server)
    addresses = listening_addresses(processes)
    assert len(addresses) > 1 and {address for address, _ in addresses} == {"127.0.0.1"}
    for key in ("", "wrong", server.admin_key):
        assert status_of(server.url, "/model_info", key) == 401
    assert status_of(server.url, "/model_info", server.api_key) == 200
    for key in ("", "wrong", server.api_key):  # what changes the server needs the second key
        assert status_of(server.url, "/flush_cache", key) == 401
    for pid in processes:
        assert server.api_key.encode() not in Path(f"/proc/{pid}/cmdline").read_bytes()


@pytest.mark.sglang
def test_a_killed_sglang_costs_no_episode(household):
    """Episodes of a collection during which the server is killed equal those of an undisturbed one."""
    tokenizer, model, server = household
    observations = [f"You are in room {i}. Doors lead on." for i in range(6)]
    family = scripted_family({"t": Script(observations=observations)})
    task = Task(env="scripted", task_id="t", split="train")
    assignments = [Assignment(task=task, window=TurnWindow(0, 4), sample=sample) for sample in range(16)]
    settings = PlaySettings(max_turns=4, max_new_tokens=24, max_context=900)
    engine = SGLangEngine([server], FromTensor(), vocab_size=tokenizer.vocab_size, max_context=900)

    def collect():
        return asyncio.run(
            collect_episodes(family, assignments, engine=engine, tokenizer=tokenizer, settings=settings, step=0)
        )

    engine.load_weights(iter(model.state_dict().items()), version=0)
    undisturbed, before = collect(), engine.counters.requests

    def kill_midway():
        while engine.counters.requests < before + 20:
            time.sleep(0.01)
        os.kill(main_process_of(server), signal.SIGKILL)

    killer = threading.Thread(target=kill_midway)
    killer.start()
    disturbed = collect()
    killer.join()
    assert (engine.counters.restarts, server.num_starts) == (1, 2) and engine.counters.repeated > 0
    assert json.dumps([one.sample for one in disturbed]) == json.dumps(list(range(16)))
    for one, other in zip(undisturbed, disturbed, strict=True):
        assert [turn.token_ids for turn in one.turns] == [turn.token_ids for turn in other.turns]
    engine.close()


@pytest.mark.sglang
def test_sglang_leaves_nothing_when_the_trainer_is_killed(tmp_path):
    script = f"""
import sys, time
from pathlib import Path
from sglang_process import launch_on_cpu
from test_sglang_server import processes_of
server = launch_on_cpu(Path({str(tmp_path)!r}))
print(*processes_of(server), flush=True)
time.sleep(600)
"""
    paths = os.pathsep.join([str(HERE), str(HERE.parent)])
    trainer = subprocess.Popen(
        [sys.executable, "-c", script], stdout=subprocess.PIPE, text=True, env=os.environ | {"PYTHONPATH": paths}
    )
    line = trainer.stdout.readline()
    if not line:
        pytest.skip("the server did not start")
    processes = [int(pid) for pid in line.split()]
    assert len(processes) >= 4 and all(map(is_running, processes))  # supervisor, server, scheduler, detokenizer
    trainer.kill()
    trainer.wait()
    assert all_end(processes, within_s=15)
