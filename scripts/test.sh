#!/usr/bin/env bash
# Everything a change must pass: ruff, mypy, and the tests that are not marked slow.
#
#   bash scripts/test.sh                              # at most ten minutes on two cores, after set-up
#   bash scripts/test.sh --all                        # with the slow tests, too
#   bash scripts/test.sh tests/test_dense.py -k llama    # other arguments go to pytest
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
bash scripts/setup.sh
if [[ ${1:-} == --all ]]; then
    shift
    set -- -m "slow or not slow" "$@"
fi
.venv/bin/ruff check .
.venv/bin/ruff format --check .
.venv/bin/mypy
# Three processes share the tests, a file at a time and in order: those of Slurm, which mostly wait, are amid the
# others. `-n 0` has one do them all.
.venv/bin/pytest -n 3 --dist loadfile --no-loadscope-reorder "$@"
