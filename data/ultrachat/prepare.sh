#!/usr/bin/env bash
# Tokenises downloaded conversations of UltraChat 200k, training and test. See README.md beside this file.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/../arguments.sh"

usage() {
    echo "usage: prepare.sh --source FOLDER ... --tokenizer SPEC [--output FOLDER]"
    echo "                  [options of megatsp preprocess, as --workers 16 --chat-template data/chatml.jinja]"
    echo "FOLDER holds train_sft-*.parquet and test_sft-*.parquet."
}

read_arguments outputs/data/ultrachat "$@"
[[ -n $tokenizer ]] || refuse "--tokenizer is missing: that of the model to be tuned"
for split in train test; do
    python -m megatsp preprocess --input "${sources[@]/%//${split}_sft-*.parquet}" --format chat \
        --tokenizer "$tokenizer" --output-prefix "$output/$split" "${preprocess[@]}"
done
