#!/usr/bin/env bash
# Trains a small language model on the Python standard library's own source, on 2 ranks, by a plan that autopar chooses.
# Arguments go to launch/train_lm.py.
set -euo pipefail

source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
ensure_environment ""
cd "$ROOT"
export OMP_NUM_THREADS=1
# autopar profiles a step now and then; torch's profiler would announce each start and stop on the terminal.
export KINETO_LOG_LEVEL=99
"$PYTHON" -m torch.distributed.run --standalone --nproc-per-node=2 launch/train_lm.py "$@"
