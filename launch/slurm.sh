#!/usr/bin/env bash
#SBATCH --job-name=autopar
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --output=runs/slurm-%j.txt
# One launcher per host, one rank per GPU:   sbatch launch/slurm.sh --layers 24 --hidden 2048
# Submit from the root of the repository, on a file system that all hosts share; arguments go to launch/train_lm.py.
set -euo pipefail

source "$SLURM_SUBMIT_DIR/launch/environment.sh"
ensure_environment ""
cd "$ROOT"
# The first host's name, and a port that two jobs on one host do not share.
HEAD_HOST="$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)"
PORT=$((20000 + SLURM_JOB_ID % 10000))
export OMP_NUM_THREADS=1 KINETO_LOG_LEVEL=99
srun "$PYTHON" -m torch.distributed.run \
    --nnodes="$SLURM_NNODES" --nproc-per-node="$SLURM_GPUS_ON_NODE" \
    --rdzv-id="$SLURM_JOB_ID" --rdzv-backend=c10d --rdzv-endpoint="$HEAD_HOST:$PORT" \
    launch/train_lm.py --run-dir "runs/slurm-$SLURM_JOB_ID" "$@"
