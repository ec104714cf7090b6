#!/usr/bin/env bash
# Start or continue one of the C4 examples with torchrun; the same command goes on where a stopped run was.
#   one node:       bash examples/launch.sh pythia_1b_c4 [options of pretrain_bliss.py ...]
#   several nodes:  NNODES=4 NODE_RANK=0 MASTER_ADDR=node0 bash examples/launch.sh pythia_6p9b_c4     (on every node)
# GPUS_PER_NODE: processes per node (default: the GPUs of this one). MASTER_PORT: default 29500.
set -euo pipefail
if [ $# -lt 1 ]; then
  sed -n '2,5s/^# //p' "$0" >&2
  exit 2
fi
example=$1
shift
cd "$(dirname "$0")/.."
. examples/find_python.sh
count='import torch; print(torch.cuda.device_count() or 1)'
processes=${GPUS_PER_NODE:-$("$python" -c "$count")}
if [ "${NNODES:-1}" -gt 1 ]; then
  : "${MASTER_ADDR:?found NNODES=$NNODES without MASTER_ADDR, expected the name of the first node}"
  where=(--nnodes "$NNODES" --node-rank "${NODE_RANK:?found no NODE_RANK, expected 0 to NNODES - 1}"
    --master-addr "$MASTER_ADDR" --master-port "${MASTER_PORT:-29500}")
else
  where=(--standalone)
fi
export CUDA_DEVICE_MAX_CONNECTIONS=${CUDA_DEVICE_MAX_CONNECTIONS:-1} # sequence parallelism overlaps only in launch order
exec "$python" -m torch.distributed.run "${where[@]}" --nproc-per-node "$processes" pretrain_bliss.py \
  --config "examples/$example/config.yaml" "$@"
