#!/usr/bin/env bash
# Trains a small GPT with TSP over two local ranks on the Python standard library's sources, compares it
# with a byte-bigram model and lets it write. Arguments go to `megatsp train`: trainer.train_iters=50
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
bash scripts/setup.sh
export PATH="$PWD/.venv/bin:$PATH"

data=outputs/data/python_stdlib/byte
run=outputs/quickstart

python data/python_stdlib/prepare.py --output "$data"
megatsp train experiment=quickstart "$@"
python -m megatsp.data.bigram --data "$data"
megatsp generate "$run" --prompt 'def ' --tokens 200

echo "checkpoint: $run/checkpoints/iter_$(printf '%07d' "$(<"$run/checkpoints/latest_checkpointed_iteration.txt")")"
echo "metrics:    $run/metrics.jsonl"
echo "loss curve: $run/loss.png"
