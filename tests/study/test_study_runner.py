"""Jobs run once, in parallel, in order, and a killed study goes on where it was."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from study.plan import Command, Job
from study.runner import Runner

from megatron_tcod.journal import read_journal

ROOT = Path(__file__).parents[2]

WORK = """
import os, pathlib, sys, time
out, name, seconds, code = pathlib.Path(sys.argv[1]), sys.argv[2], float(sys.argv[3]), int(sys.argv[4])
with open(out / "ran", "a") as file:
    file.write(f"{name} {os.getpid()} {sorted(os.sched_getaffinity(0))} {time.time()}\\n")
time.sleep(seconds)
with open(out / "ended", "a") as file:
    file.write(f"{name} {time.time()}\\n")
sys.exit(code)
"""

DRIVER = """
import json, sys
from pathlib import Path
sys.path[:0] = {paths}
from study.plan import Command, Job
from study.runner import Runner
out, script = Path({out!r}), {script!r}
jobs = [
    Job(name=name, commands=(Command(script=(script, str(out), name, str(seconds), "0")),), needs=tuple(needs))
    for name, seconds, needs in json.loads({jobs!r})
]
Runner(jobs, out=out, launch=(), num_slots=2, say=print).run()
"""


@pytest.fixture
def script(tmp_path):
    path = tmp_path / "work.py"
    path.write_text(WORK)
    return path


def job(script, out, name, *, seconds=0, code=0, needs=()):
    return Job(name=name, commands=(Command(script=(str(script), str(out), name, str(seconds), str(code))),), needs=needs)


def run(jobs, out, slots=2):
    said = []
    return Runner(jobs, out=out, launch=(), num_slots=slots, say=said.append).run(), said


def lines(path):
    return [line.split(" ", 1)[0] for line in path.read_text().splitlines()] if path.exists() else []


def wait_for(condition, seconds=90):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.02)


def is_alive(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def start_driver(script, out, jobs):
    out.mkdir(exist_ok=True)
    paths = [str(ROOT), str(ROOT / "examples")]
    text = DRIVER.format(paths=paths, out=str(out), script=str(script), jobs=json.dumps(jobs))
    return subprocess.Popen([sys.executable, "-c", text])


def test_a_finished_job_is_never_run_again(script, tmp_path):
    jobs = [job(script, tmp_path, "a"), job(script, tmp_path, "b", needs=("a",))]
    assert run(jobs, tmp_path)[0] == []
    assert run(jobs, tmp_path)[0] == []
    assert lines(tmp_path / "ran") == ["a", "b"]


def test_two_run_at_a_time_each_on_its_core(script, tmp_path):
    run([job(script, tmp_path, name, seconds=0.6) for name in "abcd"], tmp_path)
    ran = [line.split(" ", 2) for line in (tmp_path / "ran").read_text().splitlines()]
    begun = sorted(float(rest.rsplit(" ", 1)[1]) for _, _, rest in ran)
    ended = sorted(float(line.split()[1]) for line in (tmp_path / "ended").read_text().splitlines())
    assert begun[1] < ended[0] < begun[2], "two at a time, and never three"
    if len(os.sched_getaffinity(0)) > 1:
        cores = {rest.rsplit(" ", 1)[0] for _, _, rest in ran}
        assert len(cores) == 2 and all("," not in one for one in cores)


def test_a_failure_stops_what_needs_it_and_nothing_else(script, tmp_path):
    jobs = [
        job(script, tmp_path, "bad", code=3),
        job(script, tmp_path, "after", needs=("bad",)),
        job(script, tmp_path, "other", seconds=0.1),
    ]
    failed, said = run(jobs, tmp_path, slots=1)
    assert failed == ["bad", "after"]
    assert lines(tmp_path / "ran") == ["bad", "other"]
    assert any("FAILED bad: exit code 3" in line for line in said)
    fixed = [job(script, tmp_path, "bad"), *jobs[1:]]
    assert run(fixed, tmp_path)[0] == []
    assert lines(tmp_path / "ran") == ["bad", "other", "bad", "after"]


def test_a_job_that_was_another_when_it_finished_is_refused(script, tmp_path):
    run([job(script, tmp_path, "a")], tmp_path)
    with pytest.raises(ValueError, match="a, made with other settings .* --out another directory"):
        run([job(script, tmp_path, "a", seconds=0.1)], tmp_path)


def test_a_command_whose_result_is_there_is_skipped(script, tmp_path):
    made = tmp_path / "made"
    made.touch()
    skipped = Command(script=(str(script), str(tmp_path), "first", "0", "0"), makes=made)
    second = Command(script=(str(script), str(tmp_path), "second", "0", "0"))
    assert run([Job(name="a", commands=(skipped, second))], tmp_path)[0] == []
    assert lines(tmp_path / "ran") == ["second"]


def test_costs_are_in_the_journal(tmp_path):
    busy = tmp_path / "busy.py"
    busy.write_text("import time\nwhile time.process_time() < 0.3: pass\n")
    run([Job(name="a", commands=(Command(script=(str(busy),)),))], tmp_path)
    (end,) = [record for record in read_journal(tmp_path / "jobs.jsonl").records if record["event"] == "end"]
    assert 0.3 <= end["cpu"] <= end["wall"] + 0.1
    assert end["memory_mb"] > 1


def test_a_killed_study_leaves_nothing_running_and_goes_on(script, tmp_path):
    out = tmp_path / "out"
    jobs = [("a", 0, []), ("b", 60, ["a"]), ("c", 60, [])]
    driver = start_driver(script, out, jobs)
    wait_for(lambda: sorted(lines(out / "ran")) == ["a", "b", "c"])
    with pytest.raises(ValueError, match="another process"):
        run([job(script, out, "a")], out)
    driver.send_signal(signal.SIGKILL)
    driver.wait()
    pids = [int(line.split()[1]) for line in (out / "ran").read_text().splitlines()]
    wait_for(lambda: not any(is_alive(pid) for pid in pids))
    jobs = [(name, 0, needs) for name, _, needs in jobs]
    assert start_driver(script, out, jobs).wait(timeout=60) == 0
    assert sorted(lines(out / "ran")) == ["a", "b", "b", "c", "c"], "the finished job was not run again"


def test_a_signal_ends_what_runs(script, tmp_path):
    out = tmp_path / "out"
    driver = start_driver(script, out, [("a", 60, [])])
    wait_for(lambda: lines(out / "ran") == ["a"])
    driver.send_signal(signal.SIGTERM)
    assert driver.wait(timeout=30) != 0
    assert not is_alive(int((out / "ran").read_text().split()[1]))
