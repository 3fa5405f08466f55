#!/usr/bin/env bash
# Fine-tunes a small Qwen3, made here with random weights, on a few conversations with TSP over two local ranks,
# and lets transformers load what is given back. No download. Arguments go to `megatsp sft`:
#   bash scripts/sft_example.sh                            # all weights
#   bash scripts/sft_example.sh experiment=lora_example    # adapters of rank 16
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
bash scripts/setup.sh
export PATH="$PWD/.venv/bin:$PATH"

data=outputs/data/jsonl_example
log=$(mktemp)
trap 'rm -f "$log"' EXIT
data/jsonl_example/prepare.sh "$data" >"$log" 2>&1 || { cat "$log" >&2; exit 1; }
[[ -e outputs/hf/qwen3_tiny ]] || python scripts/make_hf_checkpoint.py qwen3 outputs/hf/qwen3_tiny \
    --tokenizer "$data/tokenizer" --chat-template data/chatml.jinja
run=outputs/sft_script
megatsp sft experiment=sft_example "$@" name=sft_script

echo
echo "Loaded by transformers:"
python - "$run" <<'PY'
import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from megatsp.training.logs import read_metrics

run = Path(sys.argv[1])
losses = [(e["iteration"], e["val/lm loss"]) for e in read_metrics(run / "metrics.jsonl") if "val/lm loss" in e]
best, loss = min(losses[1:], key=lambda each: each[1])
print(f"  validation loss: {losses[0][1]:.4f} before, {loss:.4f} after iteration {best}")
if (run / "hf").is_dir():
    folder = run / "hf"
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
else:  # adapters alone, on what they tuned
    from peft import PeftModel

    folder = Path("outputs/hf/qwen3_tiny")
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(folder), run / "adapter")
tokenizer = AutoTokenizer.from_pretrained(folder)
question = [{"role": "user", "content": "What is a tokenizer?"}]
inputs = tokenizer.apply_chat_template(question, add_generation_prompt=True, return_tensors="pt", return_dict=True)
answer = model.generate(**inputs, do_sample=False, max_new_tokens=40)[0, inputs["input_ids"].shape[1] :]
print(f"  question: {question[0]['content']}\n  answer:   {tokenizer.decode(answer, skip_special_tokens=True)}")
PY

echo
echo "checkpoints: $run/checkpoints"
echo "given back:  $(find "$run" -maxdepth 1 -name hf -o -maxdepth 1 -name adapter | sort | tr '\n' ' ')"
echo "loss curve:  $run/loss.png"
