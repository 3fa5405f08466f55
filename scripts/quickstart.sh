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
echo "Validation, bits per byte (lower is better), over the same samples:"
python - "$run" <<'PY'
import sys
from pathlib import Path

from megatsp.compose import from_yaml
from megatsp.data.bigram import bits_per_byte
from megatsp.data.splits import load_splits
from megatsp.data.tokenizer import load_tokenizer
from megatsp.training.logs import read_metrics

run = Path(sys.argv[1])
config = from_yaml((run / "config.yaml").read_text())
tokenizer = load_tokenizer(config.data.tokenizer)
data = load_splits(config, tokenizer)
samples = min(config.trainer.eval_iters * config.trainer.global_batch_size, len(data.valid))
scores = [e["val/bits-per-byte"] for e in read_metrics(run / "metrics.jsonl") if "val/bits-per-byte" in e]
print(f"  byte bigram, fitted on the same training text: {bits_per_byte(data.train, data.valid, tokenizer, samples):.4f}")
print(f"  this GPT:                                      {scores[-1]:.4f}")
PY

echo
echo "A sample:"
megatsp generate "$run" --prompt 'def ' --tokens 160 --nproc 2

echo
echo "checkpoint: $run/checkpoints/iter_$(printf '%07d' "$(<"$run/checkpoints/latest_checkpointed_iteration.txt")")"
echo "metrics:    $run/metrics.jsonl"
echo "loss curve: $run/loss.png"
