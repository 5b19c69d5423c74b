#!/usr/bin/env bash
# One node's part of a job on one or more nodes. Run the same command on every node, with its own NODE_RANK:
#
#   MASTER_ADDR=10.0.0.1 MASTER_PORT=29500 NUM_NODES=2 NODE_RANK=0 GPUS_PER_NODE=8 \
#     bash examples/launch/multi_node.sh --config run.toml [flags of megatron_tcod.train]
#
# The node is checked before any rank starts: devices, NCCL, ports, disk, models, vocabularies, data. Each rank writes its
# output to LOG_DIR/node_N/...; the console shows the node's first rank. When a rank fails, all are started again up to
# MAX_RESTARTS times and continue from the newest checkpoint in --save, which all nodes must share.
# SIGTERM and SIGUSR1 are passed on to the ranks, which have GRACE_SECONDS to save; after SIGUSR1 the exit
# code 75 asks for another start.
#
#   MASTER_ADDR, MASTER_PORT   node 0, as the others reach it          JOB_ID        names this job among others
#   NODE_ADDR                  this node's own address, where its hostname is not what the others know it by
#   RESOLVE_SECONDS            how long the name of node 0 may take to appear
#   DEVICE                     cuda, cpu or auto (default): cuda refuses to start without GPUs
#   ENTRY                      module to run instead of megatron_tcod.train
set -euo pipefail
NUM_NODES=${NUM_NODES:-1}
NODE_RANK=${NODE_RANK:-0}
GPUS_PER_NODE=${GPUS_PER_NODE:-8}
MASTER_ADDR=${MASTER_ADDR:-127.0.0.1}
MASTER_PORT=${MASTER_PORT:-29500}
JOB_ID=${JOB_ID:-tcod}
MAX_RESTARTS=${MAX_RESTARTS:-3}
GRACE_SECONDS=${GRACE_SECONDS:-120}
RESOLVE_SECONDS=${RESOLVE_SECONDS:-60}
LOG_DIR=${LOG_DIR:-logs/$JOB_ID}
DEVICE=${DEVICE:-auto}
ENTRY=${ENTRY:-megatron_tcod.train}
# A store for each start: in the launcher's own, kept over restarts, nodes find the addresses of processes that are gone.
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} CUDA_DEVICE_MAX_CONNECTIONS=${CUDA_DEVICE_MAX_CONNECTIONS:-1}

logs=$LOG_DIR/node_$NODE_RANK
mkdir -p "$logs"

python -m megatron_tcod.doctor launch --num-nodes "$NUM_NODES" --node-rank "$NODE_RANK" --gpus-per-node "$GPUS_PER_NODE" \
  --master-addr "$MASTER_ADDR" --master-port "$MASTER_PORT" --resolve-seconds "$RESOLVE_SECONDS" \
  --log-dir "$logs" --device "$DEVICE" -- "$@"

is_host=$([[ $NODE_RANK == 0 ]] && echo true || echo false)
command=(
  torchrun --nnodes "$NUM_NODES" --nproc-per-node "$GPUS_PER_NODE" --max-restarts "$MAX_RESTARTS"
  --rdzv-backend c10d --rdzv-endpoint "$MASTER_ADDR:$MASTER_PORT" --rdzv-id "$JOB_ID" --rdzv-conf "is_host=$is_host"
  --log-dir "$logs" --redirects 3 --tee 0:3
)
[[ -n ${NODE_ADDR:-} ]] && command+=(--local-addr "$NODE_ADDR")
help=$(torchrun --help)
[[ $help == *--signals-to-handle* ]] && command+=(--signals-to-handle SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1)
[[ $help == *--shutdown-timeout* ]] && command+=(--shutdown-timeout "$GRACE_SECONDS")
command+=(-m "$ENTRY" "$@")
echo "+ ${command[*]}"

received=
"${command[@]}" &
launcher=$!
trap 'received=TERM; kill -TERM "$launcher" 2>/dev/null' TERM INT
trap 'received=USR1; kill -USR1 "$launcher" 2>/dev/null' USR1
status=0
wait "$launcher" || status=$?
while kill -0 "$launcher" 2>/dev/null; do # a signal ends `wait` before the launcher
  status=0
  wait "$launcher" || status=$?
done
[[ $received == USR1 && $status != 0 ]] && exit 75
if [[ $status != 0 && -z $received ]]; then
  echo "node $NODE_RANK failed with $status; the last line of each rank's newest stderr under $logs:" >&2
  for ((rank = 0; rank < GPUS_PER_NODE; rank++)); do
    newest=$(find "$logs" -path "*/$rank/stderr.log" -printf '%T@ %p\n' | sort -n | tail -1 | cut -d ' ' -f 2-)
    [[ -n $newest ]] && echo "  local rank $rank: $(tail -n 1 "$newest")  ($newest)" >&2
  done
fi
exit "$status"
