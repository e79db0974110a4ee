#!/usr/bin/env bash
# Train one stage on several nodes of a SLURM cluster:
#   sbatch --nodes 2 --gpus-per-node 8 accelerate_configs/slurm.sh RECIPE STAGE [--set KEY=VALUE ...]
#SBATCH --job-name=rlhf-trl
#SBATCH --ntasks-per-node=1
#SBATCH --output=%x-%j.log
set -euo pipefail
HEAD=$(scontrol show hostnames "$SLURM_JOB_NODELIST")
export HEAD=${HEAD%%$'\n'*}  # the first line; `| head` would end a scontrol that is still writing, and this script
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=600  # seconds for the last step and its checkpoint, after a signal
srun bash -c 'accelerate launch \
    --config_file accelerate_configs/multi_node.yaml \
    --num_machines "$SLURM_NNODES" \
    --num_processes $((SLURM_NNODES * SLURM_GPUS_ON_NODE)) \
    --machine_rank "$SLURM_NODEID" \
    --main_process_ip "$HEAD" \
    -m rlhf_trl train "$@"' -- "$@"
