"""What can be wrong with a node, checked before any rank starts: `python -m megatron_tcod.doctor launch [options] -- flags`.

    found = check_node(config, Node(num_nodes=2, node_rank=0, ranks_per_node=8, master_addr="10.0.0.1"))
    print("\\n".join(found.lines)); found.faults           # every fault is found, not the first alone

The scripts of examples/launch/ call it on each node: devices, NCCL, the rendezvous port, room for checkpoints, shared
memory, and then everything that `preflight` finds about settings, models, vocabularies and data. It opens no connection
to another node, since that may start later, and leaves nothing behind.
"""

from __future__ import annotations

import argparse
import errno
import math
import os
import shutil
import socket
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from megatron_tcod.config import Config, load_config, take_switch
from megatron_tcod.cost_model import num_parameters
from megatron_tcod.model.shape import ModelShape
from megatron_tcod.preflight import Findings, check_writable, examine_training, read_model
from megatron_tcod.serving import check_teacher_host

CHECKPOINT_BYTES = 16
"""Of one parameter in a checkpoint: fp32 weight, two fp32 moments, and the weight once more under Hugging Face names."""
CHECKPOINT_OVERHEAD_BYTES = 1 << 20
"""Of a checkpoint: what its files say about their tensors."""
SHARED_MEMORY_BYTES = 1 << 30
"""What NCCL may need of /dev/shm on a node; containers often have 64 MiB."""


@dataclass(frozen=True, kw_only=True)
class Node:
    """One machine of a job. Example: `Node(num_nodes=1, node_rank=0, ranks_per_node=2, master_addr="127.0.0.1")`"""

    num_nodes: int
    node_rank: int
    ranks_per_node: int
    master_addr: str
    master_port: int = 29500
    log_dir: str = "logs"
    device: Literal["auto", "cuda", "cpu"] = "auto"
    resolve_seconds: float = 60.0
    """How long the name of node 0 may take to appear; a pod's does so with the pod."""


def check_node(config: Config, node: Node) -> Findings:
    found = Findings()
    for check in (check_size, check_devices, check_network, check_master):
        found.lines += found.add(check, node) or []
    found.lines += found.add(check_room, config, node) or []
    num_ranks = node.num_nodes * node.ranks_per_node
    found.add(check_teacher_host, config, num_ranks=num_ranks, num_here=node.ranks_per_node)
    return examine_training(found, config, world_size=num_ranks if num_ranks > 0 else None)


def check_size(node: Node) -> list[str]:
    if node.num_nodes < 1:
        raise ValueError(f"NUM_NODES = {node.num_nodes} must be at least 1; give the number of machines")
    if not 0 <= node.node_rank < node.num_nodes:
        raise ValueError(
            f"NODE_RANK = {node.node_rank} must lie in [0, {node.num_nodes}), NUM_NODES = {node.num_nodes}; give every node "
            f"its own"
        )
    if node.ranks_per_node < 1:
        raise ValueError(f"GPUS_PER_NODE = {node.ranks_per_node} must be at least 1; give the ranks of each machine")
    total = node.num_nodes * node.ranks_per_node
    return [f"node {node.node_rank} of {node.num_nodes}, {node.ranks_per_node} ranks here, {total} in all"]


def check_devices(node: Node) -> list[str]:
    """As many GPUs as ranks, or none and nobody who asks for them."""
    found = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if node.device != "cpu" and found and found < node.ranks_per_node:
        raise ValueError(
            f"GPUS_PER_NODE = {node.ranks_per_node}, but torch sees {found} GPUs (CUDA_VISIBLE_DEVICES = "
            f"{os.environ.get('CUDA_VISIBLE_DEVICES', 'unset')}); lower it or make more visible"
        )
    has_driver = os.path.exists("/dev/nvidia0")
    if not found and (node.device == "cuda" or (node.device == "auto" and has_driver)):
        why = "this torch is a CPU build" if torch.version.cuda is None else "no device answers; see nvidia-smi"
        raise ValueError(
            f"DEVICE = {node.device}{' and a GPU is here' if has_driver else ''}, but torch sees none ({why}); install a "
            f"CUDA build of torch, or set DEVICE=cpu"
        )
    if found and node.device != "cpu":
        names = {torch.cuda.get_device_name(index) for index in range(found)}
        return [f"devices: {found} x {', '.join(sorted(names))}"]
    if found:
        raise ValueError("DEVICE = cpu, but GPUs are visible and would be used; set CUDA_VISIBLE_DEVICES= (empty)")
    return [f"devices: none, {node.ranks_per_node} ranks share {os.cpu_count()} CPU cores over gloo"]


def check_network(node: Node) -> list[str]:
    """NCCL where GPUs are used, the interfaces that its variables name, and shared memory."""
    lines = []
    interfaces = [name for _, name in socket.if_nameindex()]
    for variable in ("NCCL_SOCKET_IFNAME", "GLOO_SOCKET_IFNAME"):
        wanted = [name for name in os.environ.get(variable, "").split(",") if name and not name.startswith("^")]
        if wanted and not any(have.startswith(name.lstrip("=")) for name in wanted for have in interfaces):
            raise ValueError(f"{variable} = {','.join(wanted)} is no interface of this node; it has {', '.join(interfaces)}")
    if not torch.cuda.is_available():
        return ["network: gloo"]
    if not torch.distributed.is_nccl_available():
        raise ValueError("this torch has GPUs and no NCCL; install a build with NCCL, the ranks cannot talk without")
    lines.append(f"network: NCCL {'.'.join(map(str, torch.cuda.nccl.version()))}")
    if Path("/dev/shm").is_dir() and (room := shutil.disk_usage("/dev/shm").total) < SHARED_MEMORY_BYTES:
        raise ValueError(
            f"/dev/shm has {mebibytes(room)}, NCCL may need {mebibytes(SHARED_MEMORY_BYTES)}; start the container with "
            f"--shm-size, or mount an emptyDir with medium Memory there"
        )
    return lines


def check_master(node: Node) -> list[str]:
    """Node 0 can listen at MASTER_ADDR:MASTER_PORT; the others know the name."""
    address = resolve(node)
    if node.node_rank:
        note = ", which is this machine itself" if address.startswith("127.") else ""
        return [f"rendezvous: {node.master_addr}:{node.master_port} is {address}{note}"]
    if node.num_nodes > 1 and not is_own(address):
        raise ValueError(
            f"MASTER_ADDR = {node.master_addr} is {address}, no address of this machine, which is NODE_RANK 0; give the "
            f"address at which the other nodes reach it"
        )
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    with socket.socket(family) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((address, node.master_port))
        except OSError as error:
            if error.errno == errno.EADDRINUSE:
                raise ValueError(
                    f"MASTER_PORT = {node.master_port} of {address} is taken, maybe by another job; choose another, the same "
                    f"on all nodes"
                ) from None
            raise ValueError(f"MASTER_PORT = {node.master_port} of {address} cannot be used: {error.strerror}") from None
    note = ", which other machines cannot reach" if node.num_nodes > 1 and address.startswith("127.") else ""
    return [f"rendezvous: {node.master_addr}:{node.master_port} is free{note}"]


def resolve(node: Node) -> str:
    deadline = time.monotonic() + (node.resolve_seconds if node.node_rank else 0)
    while True:
        try:
            found = socket.getaddrinfo(node.master_addr, node.master_port, type=socket.SOCK_STREAM)
            return str(found[0][4][0])
        except socket.gaierror as error:
            if time.monotonic() > deadline:
                raise ValueError(
                    f"MASTER_ADDR = {node.master_addr} is unknown here ({error.strerror}); give node 0's address or a name "
                    f"that all nodes know"
                ) from None
        time.sleep(1)


def is_own(address: str) -> bool:
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    with socket.socket(family) as probe:
        try:
            probe.bind((address, 0))
        except OSError:
            return False
    return True


def check_room(config: Config, node: Node) -> list[str]:
    """The run directory and the logs can be written; checkpoints fit, the one being written included."""
    save = check_writable("save", config.training.save)
    check_writable("LOG_DIR", node.log_dir)
    _, shape = read_model("student", config.model.student)
    free, wanted = shutil.disk_usage(save).free, (config.training.keep_checkpoints + 1) * checkpoint_bytes(shape)
    if free < wanted:
        raise ValueError(
            f"save = {config.training.save} has {mebibytes(free)} free, {config.training.keep_checkpoints} checkpoints and "
            f"one in the making take {mebibytes(wanted)}; free some, lower keep_checkpoints, or save elsewhere"
        )
    return [f"disk: {mebibytes(free)} free for {mebibytes(wanted)} of checkpoints"]


def checkpoint_bytes(shape: ModelShape) -> int:
    return CHECKPOINT_BYTES * num_parameters(shape) + CHECKPOINT_OVERHEAD_BYTES


def mebibytes(size: int) -> str:
    return f"{size / 2**30:.1f} GiB" if size >= 2**30 else f"{size / 2**20:.0f} MiB"


def printable(text: str) -> str:
    """A path in it need not be UTF-8."""
    return text.encode(errors="backslashreplace").decode()


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m megatron_tcod.doctor launch",
        description="Check this node before any rank starts.",
        epilog="After -- come the flags of megatron_tcod.train.",
    )
    parser.add_argument("--num-nodes", type=int, default=1)
    parser.add_argument("--node-rank", type=int, default=0)
    parser.add_argument("--gpus-per-node", dest="ranks_per_node", type=int, required=True, metavar="N")
    parser.add_argument("--master-addr", default="127.0.0.1")
    parser.add_argument("--master-port", type=int, default=29500)
    parser.add_argument("--resolve-seconds", type=float, default=Node.resolve_seconds, help="for node 0 to have a name")
    parser.add_argument("--log-dir", default="logs")
    parser.add_argument("--device", choices=("auto", "cuda", "cpu"), default="auto")
    own = list(argv[: argv.index("--")]) if "--" in argv else list(argv)
    options = parser.parse_args(own)
    if not 1 <= options.master_port <= 65535:
        raise ValueError(f"MASTER_PORT = {options.master_port}: expected a port from 1 to 65535, the same on all nodes")
    if not 0 <= options.resolve_seconds < math.inf:
        raise ValueError(f"--resolve-seconds {options.resolve_seconds}: expected a number of seconds, 0 or more")
    _, flags = take_switch(argv[len(own) + 1 :], "--dry-run")  # which this is
    config = load_config(flags, prog="megatron_tcod.train")
    found = check_node(config, Node(**vars(options)))
    for line in found.lines:
        print(printable(line), flush=True)
    for fault in found.faults:
        print(printable(f"error: {fault}"), file=sys.stderr)
    return 2 if found.faults else 0
