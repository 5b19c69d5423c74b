"""A node is checked before any rank starts, and the launch scripts start, restart and end a job of several nodes."""

import os
import re
import shlex
import shutil
import signal
import socket
import stat
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from megatron_tcod import launch_checks
from megatron_tcod.config import load_config
from megatron_tcod.journal import read_journal
from megatron_tcod.launch_checks import Node, check_node
from megatron_tcod.run_lock import JOB_VARIABLES

LAUNCH = Path(__file__).parents[1] / "examples" / "launch"


def node(**changes):
    settings = {"num_nodes": 1, "node_rank": 0, "ranks_per_node": 2, "master_addr": "127.0.0.1", "master_port": 0}
    return Node(**settings | changes)


def the_fault(run_flags, **changes):
    (fault,) = check_node(load_config(run_flags), node(**changes)).faults
    assert "\n" not in fault
    return fault


def test_a_node_that_can_start_has_no_fault(run_flags, tmp_path):
    report = check_node(load_config([*run_flags, "--tensor-model-parallel-size", "2"]), node(log_dir=str(tmp_path / "logs")))
    assert report.faults == []
    told = "\n".join(report.lines)
    for part in ("2 ranks here, 2 in all", "devices: ", "network: ", "is free", "of checkpoints", "layout: tp 2, pp 1, dp 1"):
        assert part in told
    assert not (tmp_path / "run").exists() and not (tmp_path / "logs").exists(), "a check leaves nothing behind"


def test_every_fault_of_a_node_and_of_the_settings_is_found_at_once(run_flags):
    wrong = ["--tensor-model-parallel-size", "2", "--student", "nowhere", "--teacher", "neither", "--lr-warmup-iters", "9"]
    wrong += ["--env-options", "num_place", "3", "--demonstrations", "missing.jsonl", "--curriculum", "b2f"]
    config = load_config([*run_flags, *wrong, "--save", "/proc/run", "--lr-decay-style", "cosine"])
    faults = check_node(config, node(node_rank=3, ranks_per_node=3, resolve_seconds=0, master_addr="no.such.invalid")).faults
    named = ["NODE_RANK", "MASTER_ADDR", "save", "world", "student", "teacher", "env", "demonstration", "lr_warmup_iters"]
    assert [re.match(r"[\w.]+", fault)[0] for fault in faults] == named


def test_a_layout_that_contradicts_itself_hides_no_other_fault(run_flags):
    wrong = ["--sequence-parallel", "--recompute-method", "block", "--student", "nowhere"]
    faults = check_node(load_config([*run_flags, *wrong]), node(node_rank=3)).faults
    named = ["NODE_RANK", "student", "sequence_parallel", "recompute_method"]
    assert [re.match(r"\w+", fault)[0] for fault in faults] == named


def test_a_taken_port(run_flags):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert f"MASTER_PORT = {port} of 127.0.0.1 is taken" in the_fault(run_flags, master_port=port)


def test_a_master_address_of_another_machine(run_flags):
    fault = the_fault(run_flags, master_addr="192.0.2.1", num_nodes=2)
    assert "MASTER_ADDR = 192.0.2.1" in fault and "NODE_RANK 0" in fault


def test_gpus_that_are_asked_for_and_are_not_there(run_flags, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert the_fault(run_flags, device="cuda").startswith("DEVICE = cuda")
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 4)
    with pytest.raises(ValueError, match="GPUS_PER_NODE = 8, but torch sees 4 GPUs"):
        launch_checks.check_devices(node(ranks_per_node=8))


def test_an_interface_that_is_not_there(run_flags, monkeypatch):
    monkeypatch.setenv("NCCL_SOCKET_IFNAME", "ib7")
    assert "NCCL_SOCKET_IFNAME = ib7 is no interface of this node; it has" in the_fault(run_flags)


def test_a_disk_without_room_for_the_checkpoints(run_flags, monkeypatch):
    usage = shutil.disk_usage("/")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1 << 20))
    assert "1 MiB free, 2 checkpoints and one in the making take" in the_fault(run_flags)


def test_a_checkpoint_is_no_larger_than_the_room_that_is_asked_for(single_process, run_flags, tmp_path):
    from megatron_tcod.preflight import read_model
    from megatron_tcod.train import main

    assert main([*run_flags, "--train-iters", "1", "--no-eval-at-end"]) == 0
    (checkpoint,) = (tmp_path / "run" / "checkpoints").glob("step_*")
    size = sum(file.stat().st_size for file in checkpoint.rglob("*") if file.suffix == ".safetensors" or "__" in file.name)
    _, shape = read_model("student", str(run_flags[1]))
    assert 0.5 < size / launch_checks.checkpoint_bytes(shape) <= 1


def test_a_run_directory_that_cannot_be_written(run_flags, tmp_path):
    (tmp_path / "file").write_text("")
    assert "is there and is no directory" in the_fault([*run_flags, "--save", str(tmp_path / "file" / "run")])


def test_world_and_layout_are_checked_over_all_nodes(run_flags):
    fault = the_fault([*run_flags, "--tensor-model-parallel-size", "2"], num_nodes=3, node_rank=1, ranks_per_node=1)
    assert "world size 3 != tp 2" in fault


def test_a_teacher_that_other_nodes_cannot_reach(run_flags):
    launched = [*run_flags, "--teacher", "sglang", "--teacher-model", run_flags[1]]
    config = load_config(launched)
    found = {number: check_node(config, node(num_nodes=number)).faults for number in (1, 2)}
    (fault,) = set(found[2]) - set(found[1])
    assert fault.startswith("teacher_model launches a server that only its own host reaches, and this run has 4 ranks")


def test_a_dry_run_is_what_the_check_is(run_flags, capsys):
    argv = ["--gpus-per-node", "1", "--master-port", str(free_port()), "--", *run_flags]
    told = []
    for flags in ([], ["--dry-run"]):
        assert launch_checks.main([*argv, *flags]) == 0
        told.append([line for line in capsys.readouterr().out.splitlines() if not line.startswith("disk: ")])
    assert told[0] == told[1] and any(line.startswith("layout: ") for line in told[0])


def test_a_node_without_ranks_is_one_fault(run_flags):
    assert the_fault(run_flags, ranks_per_node=0) == "GPUS_PER_NODE = 0 must be at least 1; give the ranks of each machine"


def environment(**variables):
    """Without this test's own ranks, with its interpreter first on the path."""
    ours = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    return ours | {"PATH": path, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"} | variables


def launch(script, flags, *, prefix=(), output=None, **variables):
    return subprocess.Popen(
        [*prefix, "bash", str(LAUNCH / script), *flags],
        env=environment(**variables),
        stdout=output or subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def end(process):
    """SIGKILL a launcher and everything below it."""
    if process.poll() is None:
        for one in [*psutil.Process(process.pid).children(recursive=True), process]:
            one.kill()
        process.wait()


def test_no_rank_starts_on_a_node_with_a_fault(run_flags, tmp_path):
    flags = [*run_flags, "--student", "nowhere"]
    process = launch("single_node.sh", flags, GPUS_PER_NODE="2", LOG_DIR=str(tmp_path / "logs"), DEVICE="cpu")
    told, _ = process.communicate(timeout=120)
    assert process.returncode == 2
    assert "error: student = nowhere: no such directory" in told
    assert "+ torchrun" not in told and "Traceback" not in told and not (tmp_path / "run").exists()


def test_a_path_that_is_no_utf8_is_told(run_flags, capsys):
    assert launch_checks.main(["--gpus-per-node", "1", "--", *run_flags, "--student", "/tmp/\udcff"]) == 2
    assert "error: student = /tmp/\\udcff: no such directory" in capsys.readouterr().err


@pytest.mark.parametrize("seconds", ["nan", "inf", "-1"])
def test_a_patience_that_is_none_is_named(seconds):
    with pytest.raises(ValueError, match=f"--resolve-seconds {float(seconds)}: expected a number of seconds"):
        launch_checks.main(["--gpus-per-node", "1", f"--resolve-seconds={seconds}", "--"])


@pytest.mark.parametrize("port", ["0", "70000", "-1"])
def test_a_port_that_is_none_is_named(port):
    with pytest.raises(ValueError, match=f"MASTER_PORT = {port}: expected a port from 1 to 65535"):
        launch_checks.main(["--gpus-per-node", "1", f"--master-port={port}", "--"])


def test_kubernetes_manifest_sets_what_the_script_reads():
    yaml = pytest.importorskip("yaml")
    service, job = yaml.safe_load_all((LAUNCH / "kubernetes.yaml").read_text())
    spec = job["spec"]
    (container,) = spec["template"]["spec"]["containers"]
    variables = {one["name"]: one.get("value") for one in container["env"]}
    assert spec["completionMode"] == "Indexed" and spec["parallelism"] == spec["completions"] == int(variables["NUM_NODES"])
    assert variables["MASTER_ADDR"] == f"{job['metadata']['name']}-0.{service['metadata']['name']}"
    assert service["spec"]["selector"] == {"job-name": job["metadata"]["name"]}
    read = set(re.findall(r"\b([A-Z_]+)=\$\{\1:-", (LAUNCH / "multi_node.sh").read_text())) | {"NODE_ADDR"}
    in_command = set(re.findall(r"\b([A-Z_]+)=", container["args"][0]))
    assert (set(variables) - {"POD_IP", "KUBERNETES_JOB_UID"}) | in_command <= read
    assert "KUBERNETES_JOB_UID" in JOB_VARIABLES and variables.get("KUBERNETES_JOB_UID", "") is None  # from the pod's label
    assert float(variables["RESOLVE_SECONDS"]) > Node.resolve_seconds  # pod 0 may be scheduled late; a mistake ends the job
    assert {"NODE_RANK", "NODE_ADDR"} == in_command
    assert spec["template"]["spec"]["terminationGracePeriodSeconds"] > int(variables["GRACE_SECONDS"])


def stand_in(directory, name, text):
    directory.mkdir(exist_ok=True)
    path = directory / name
    path.write_text(f"#!/usr/bin/env bash\n{text}\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)


def test_slurm_script_passes_the_signal_on_and_requeues(tmp_path):
    """With stand-ins for Slurm's programs and for torchrun: what is shown is the way of the signal, not Slurm."""
    tools, log = tmp_path / "tools", tmp_path / "log"
    log.mkdir()
    stand_in(tools, "scontrol", f'if [[ $1 == show ]]; then echo "a b" | tr " " "\\n"; else echo "$@" >> {log}/scontrol; fi')
    stand_in(tools, "srun", 'shift; SLURM_NODEID=0 exec "$@"')
    stand_in(tools, "python", f'echo "$@" > {log}/checked')
    torchrun = f"""[[ $1 == --help ]] && {{ echo --signals-to-handle --shutdown-timeout; exit; }}
echo "$@" > {log}/torchrun
trap 'echo saved > {log}/saved; exit 1' USR1
touch {log}/started
while :; do sleep 0.05; done"""
    stand_in(tools, "torchrun", torchrun)
    variables = {"SLURM_JOB_ID": "17", "SLURM_JOB_NUM_NODES": "2", "SLURM_JOB_NODELIST": "x"}
    variables["SLURM_SUBMIT_DIR"] = str(LAUNCH.parents[1])
    script, flags = LAUNCH / "slurm.sbatch", ["--config", "run.toml"]
    process = subprocess.Popen(
        ["bash", str(script), *flags],
        env=environment(**variables, LOG_DIR=str(log / "logs")) | {"PATH": f"{tools}:{os.environ['PATH']}"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    deadline = time.monotonic() + 30
    while not (log / "started").exists():
        assert process.poll() is None and time.monotonic() < deadline, process.stdout.read()
        time.sleep(0.02)
    process.send_signal(signal.SIGUSR1)
    told, _ = process.communicate(timeout=30)
    assert process.returncode == 75, told
    assert (log / "saved").exists(), "the signal reached the launcher"
    assert (log / "scontrol").read_text() == "requeue 17\n"
    command = (log / "torchrun").read_text()
    assert "--nnodes 2 --nproc-per-node 8" in command and "--rdzv-endpoint a:20017" in command and "SIGUSR1" in command
    assert command.endswith("-m megatron_tcod.train --config run.toml\n")
    assert "launch --num-nodes 2 --node-rank 0" in (log / "checked").read_text()


def metrics_of(save):
    path = Path(save) / "metrics.jsonl"
    return list(read_journal(path).records) if path.exists() else []


def wait_for_steps(save, count, processes, seconds=240):
    deadline = time.monotonic() + seconds
    while len(metrics_of(save)) < count:
        for process in processes:
            assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline, "the job does not move"
        time.sleep(0.1)


TWO_HOSTS = """set -e
ip link set lo up
unshare -n sleep 1000 & other=$!
trap 'kill "$other"' EXIT
sleep 0.5
ip link add tcod0 type veth peer name tcod1 netns "$other"
ip addr add 10.77.0.1/24 dev tcod0; ip link set tcod0 up
nsenter -t "$other" -n sh -c 'ip link set lo up; ip addr add 10.77.0.2/24 dev tcod1; ip link set tcod1 up'
export MASTER_ADDR=10.77.0.1 NUM_NODES=2 GPUS_PER_NODE=1 DEVICE=cpu
NODE_RANK=0 NODE_ADDR=10.77.0.1 GLOO_SOCKET_IFNAME=tcod0 bash {script} {flags} > {log}0 2>&1 & first=$!
NODE_RANK=1 NODE_ADDR=10.77.0.2 GLOO_SOCKET_IFNAME=tcod1 \
  nsenter -t "$other" -n bash {script} {flags} > {log}1 2>&1 & second=$!
wait "$first"; wait "$second"
"""


def can_make_networks():
    if not all(shutil.which(tool) for tool in ("unshare", "nsenter", "ip")):
        return False
    probe = "ip link add probe0 type veth peer name probe1"
    return subprocess.run(["unshare", "-Urn", "sh", "-c", probe], capture_output=True).returncode == 0


@pytest.mark.slow
def test_two_nodes_in_networks_of_their_own_train_one_model(run_flags, tmp_path):
    if not can_make_networks():
        pytest.skip("this kernel lets no user make network namespaces")
    flags = [*run_flags, "--tensor-model-parallel-size", "2", "--train-iters", "3", "--no-eval-at-end"]
    script = TWO_HOSTS.format(script=LAUNCH / "multi_node.sh", flags=shlex.join(flags), log=tmp_path / "node")
    variables = {"LOG_DIR": str(tmp_path / "logs"), "MASTER_PORT": "29511"}
    done = subprocess.run(["unshare", "-Urn", "bash", "-c", script], env=environment(**variables), timeout=400)
    told = "".join((tmp_path / f"node{number}").read_text() for number in (0, 1))
    assert done.returncode == 0, told
    assert [record["step"] for record in metrics_of(tmp_path / "run")] == [1, 2, 3]
    alone = [*flags, "--tensor-model-parallel-size", "1", "--save", str(tmp_path / "alone")]
    subprocess.run([sys.executable, "-m", "megatron_tcod.train", *alone], env=environment(), check=True, capture_output=True)
    for one, other in zip(metrics_of(tmp_path / "run"), metrics_of(tmp_path / "alone"), strict=True):
        assert one["train/loss"] == pytest.approx(other["train/loss"], rel=1e-3)
    logs = sorted(path.name for path in (tmp_path / "logs").glob("node_*/*/attempt_0/0/*"))
    assert logs == 2 * ["stderr.log"] + 2 * ["stdout.log"]


def two_nodes(flags, tmp_path, port, **variables):
    """Two launchers on this machine, two ranks each."""
    common = dict(
        NUM_NODES="2", GPUS_PER_NODE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), NODE_ADDR="127.0.0.1", DEVICE="cpu",
        LOG_DIR=str(tmp_path / "logs"),
    )  # fmt: skip
    files = [open(tmp_path / f"node{number}", "w") for number in (0, 1)]
    return [launch("multi_node.sh", flags, output=files[rank], NODE_RANK=str(rank), **common | variables) for rank in (0, 1)]


def ranks_below(processes):
    found = {}
    for process in processes:
        for child in psutil.Process(process.pid).children(recursive=True):
            if "megatron_tcod.train" in child.cmdline() and "torchrun" not in " ".join(child.cmdline()):
                found[int(child.environ()["RANK"])] = child
    return found


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.mark.slow
def test_a_killed_rank_restarts_both_nodes_and_the_run_resumes_where_it_was(run_flags, tmp_path):
    flags = [*run_flags, "--tensor-model-parallel-size", "2", "--rollout-batch-size", "4", "--train-iters", "30"]
    flags += ["--save-interval", "5", "--no-eval-at-end"]
    undisturbed = [*flags, "--save", str(tmp_path / "undisturbed")]
    for name, chosen in (("undisturbed", undisturbed), ("run", flags)):
        nodes = two_nodes(chosen, tmp_path, free_port(), MAX_RESTARTS="3")
        try:
            if name == "run":
                wait_for_steps(tmp_path / name, 8, nodes)
                victims = ranks_below(nodes)
                assert sorted(victims) == [0, 1, 2, 3]
                victims[3].kill()
            for process in nodes:
                assert process.wait(timeout=400) == 0, (tmp_path / "node0").read_text() + (tmp_path / "node1").read_text()
        finally:
            for process in nodes:
                end(process)
    told = (tmp_path / "node0").read_text() + (tmp_path / "node1").read_text()
    assert "resuming" in told, "the witness: the job was restarted"
    one, other = metrics_of(tmp_path / "run"), metrics_of(tmp_path / "undisturbed")
    assert [record["step"] for record in one] == list(range(1, 31))
    assert [record["train/loss"] for record in one] == [record["train/loss"] for record in other]


@pytest.mark.slow
def test_a_stopped_rank_on_another_node_ends_both_nodes_with_its_name(run_flags, tmp_path):
    flags = [*run_flags, "--tensor-model-parallel-size", "2", "--rollout-batch-size", "4", "--train-iters", "100000"]
    nodes = two_nodes([*flags, "--heartbeat-timeout-seconds", "6"], tmp_path, free_port(), MAX_RESTARTS="0")
    try:
        wait_for_steps(tmp_path / "run", 8, nodes)
        victim = ranks_below(nodes)[3]
        victim.send_signal(signal.SIGSTOP)
        start = time.monotonic()
        codes = [process.wait(timeout=300) for process in nodes]
        seconds = time.monotonic() - start
    finally:
        for process in nodes:
            end(process)
    told = [(tmp_path / f"node{number}").read_text() for number in (0, 1)]
    assert all(codes), told
    for text in told:
        assert re.search(rf"rank 3 \(host .+, pid {victim.pid}\) is dead or stopped", text), text
    assert not victim.is_running()
    assert seconds < 6 + 2 * 30 + 30, f"the job ended after {seconds:.0f} s"  # torchrun's grace, once a node
