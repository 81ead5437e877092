#!/usr/bin/env bash
# Every test but the slow ones (--slow: those too), cheapest first; arguments go to pytest. Tests run in two workers, but for those that hold processes against a clock, which run one at a time.
set -uo pipefail

source "$(dirname "${BASH_SOURCE[0]}")/../launch/environment.sh"
ensure_environment "[test]" || exit 1
cd "$ROOT"
# Ranks and test workers are processes already: a second thread in each would only contend for the same cores.
export OMP_NUM_THREADS=1
# Without bytecode each of them would compile every module anew.
unset PYTHONDONTWRITEBYTECODE

NOTHING_COLLECTED=5
result=$NOTHING_COLLECTED
# A selection may lie in one tier only, but not in none.
for tier in in-process processes alone; do
    workers=2
    [ $tier = alone ] && workers=0 # no worker but pytest itself
    "$PYTHON" -m pytest --quiet --durations=15 --tier=$tier --numprocesses=$workers "$@"
    status=$?
    [ $status -eq $NOTHING_COLLECTED ] && continue
    result=$status
    [ $status -eq 0 ] || break
done
exit $result
