#!/usr/bin/env bash
# Purpose:  train on several nodes with torchrun; a process that dies is started again from the newest checkpoint.
# Command:  NODES=2 HEAD=node0 bash configs/trainer/torchrun.sh --config mine.yaml --config configs/trainer/fsdp2.yaml
#           the same on each node; HEAD is one of them. Everything after the script's name goes to lit-alignment fit.
# Needs:    a folder for checkpoints that all nodes see. NODES, DEVICES, HEAD, PORT, RUN and RESTARTS may be set.
# Expect:   the loss of one process, step by step; after a failure at most the steps since the last checkpoint are redone.
set -euo pipefail
# A store of its own for each attempt: in a shared one, processes would find the addresses of those that died.
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1
nodes="${NODES:-1}" devices="${DEVICES:-gpu}"
exec torchrun \
  --nnodes "$nodes" \
  --nproc-per-node "$devices" \
  --max-restarts "${RESTARTS:-3}" \
  --rdzv-backend c10d \
  --rdzv-endpoint "${HEAD:-127.0.0.1}:${PORT:-29400}" \
  --rdzv-id "${RUN:-lit_alignment}" \
  -m lit_alignment fit "$@" --trainer.num_nodes "$nodes" --ckpt_path newest
