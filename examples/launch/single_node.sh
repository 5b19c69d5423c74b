#!/usr/bin/env bash
# A job on this machine alone:
#
#   GPUS_PER_NODE=8 bash examples/launch/single_node.sh --config run.toml [flags of megatron_tcod.train]
#
# Without GPUs the ranks are processes on the CPU: GPUS_PER_NODE=2 runs two. The port is a free one, so that jobs on one
# machine do not meet. Everything else is as in multi_node.sh.
set -euo pipefail
find_port='import socket; probe = socket.socket(); probe.bind(("127.0.0.1", 0)); print(probe.getsockname()[1])'
export NUM_NODES=1 NODE_RANK=0 MASTER_ADDR=127.0.0.1 MASTER_PORT=${MASTER_PORT:-$(python -c "$find_port")}
exec bash "$(dirname "$0")/multi_node.sh" "$@"
