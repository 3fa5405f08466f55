#!/usr/bin/env bash
# Everything of this checkout that needs a GPU, in under nine minutes: kernel tests, benchmarks, the memory of
# one rank of 7B, the preflight of all GPUs here. Needs torch with its Triton, pytest, and for the preflight
# hydra-core; installs nothing, asks no network. Arguments: `bash scripts/gpu_check.sh --help`. PYTHON names
# another interpreter.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
export PYTHONPATH="$PWD:$PWD/kernels${PYTHONPATH:+:$PYTHONPATH}"
exec "${PYTHON:-python3}" scripts/gpu_check.py "$@"
