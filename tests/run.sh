#!/usr/bin/env bash
# Every test but the slow ones (--slow: those too), cheapest first; arguments go to pytest. Tests that start processes run one at a time, the others in two.
set -uo pipefail

source "$(dirname "${BASH_SOURCE[0]}")/../launch/environment.sh"
ensure_environment "[test]" || exit 1
cd "$ROOT"
# Ranks and test workers are processes already: a second thread in each would only contend for the same cores.
export OMP_NUM_THREADS=1

NOTHING_COLLECTED=5
"$PYTHON" -m pytest --quiet --durations=15 --tier=in-process --numprocesses=2 "$@"
in_process=$?
[ $in_process -eq 0 ] || [ $in_process -eq $NOTHING_COLLECTED ] || exit $in_process
"$PYTHON" -m pytest --quiet --durations=15 --tier=processes "$@"
processes=$?
# A selection may lie in one tier only, but not in none.
[ $processes -eq $NOTHING_COLLECTED ] && processes=$in_process
exit $processes
