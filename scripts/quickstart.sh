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
megatsp train experiment=quickstart "$@" name=quickstart

echo
echo "Validation, bits per byte (lower is better):"
# The same 64 validation samples for both: eval_iters 4 x global_batch_size 16.
python -m megatsp.data.bigram --data "$data" --seq-length 256 --samples 64 | sed 's/^/  byte bigram, same training text: /'
python - "$run/metrics.jsonl" <<'PY'
import json, sys
scores = [entry["val/bits-per-byte"] for line in open(sys.argv[1]) if "val/bits-per-byte" in (entry := json.loads(line))]
print(f"  this GPT:                        {scores[-1]:.4f}")
PY

echo
echo "A sample:"
megatsp generate "$run" --prompt 'def ' --tokens 160 --nproc 2

echo
echo "checkpoint: $run/checkpoints/iter_$(printf '%07d' "$(<"$run/checkpoints/latest_checkpointed_iteration.txt")")"
echo "metrics:    $run/metrics.jsonl"
echo "loss curve: $run/loss.png"
