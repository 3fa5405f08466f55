#!/usr/bin/env bash
# Everything a change must pass. Arguments go to pytest: bash scripts/test.sh tests/test_dense.py -k llama
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
bash scripts/setup.sh
.venv/bin/ruff check .
.venv/bin/ruff format --check .
.venv/bin/mypy
# Three processes share the tests, a file at a time and in order: those of Slurm, which mostly wait, are amid the
# others. `-n 0` has one do them all.
.venv/bin/pytest -n 3 --dist loadfile --no-loadscope-reorder "$@"
