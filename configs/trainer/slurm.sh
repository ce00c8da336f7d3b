#!/usr/bin/env bash
# Purpose:  train on several nodes of a SLURM cluster; when the time is over, the job queues itself again and goes on.
# Command:  sbatch configs/trainer/slurm.sh --config mine.yaml --config configs/trainer/fsdp2.yaml
# Needs:    a folder for checkpoints that all nodes see, and an environment in .venv there.
# Expect:   one process a GPU, and the loss of one process, step by step.
#SBATCH --job-name=lit_alignment
#SBATCH --nodes=2
#SBATCH --gpus-per-node=8
#SBATCH --ntasks-per-node=8
#SBATCH --cpus-per-task=8
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --signal=SIGUSR1@120
#SBATCH --output=runs/%x-%j.txt
set -euo pipefail
# Lightning reads ranks and the head's address from SLURM, and on SIGUSR1 saves a checkpoint and requeues the job.
export NCCL_ASYNC_ERROR_HANDLING=1
srun --kill-on-bad-exit=1 .venv/bin/lit-alignment fit "$@" \
  --trainer.num_nodes "$SLURM_NNODES" --trainer.devices "$SLURM_NTASKS_PER_NODE" --ckpt_path newest
