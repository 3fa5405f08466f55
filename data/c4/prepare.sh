#!/usr/bin/env bash
# Tokenises downloaded shards of C4, training and validation. See README.md beside this file.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/../arguments.sh"

usage() {
    echo "usage: prepare.sh --source FOLDER ... [--tokenizer SPEC | --vocab-size N] [--output FOLDER]"
    echo "                  [options of megatsp preprocess, as --workers 16]"
    echo "FOLDER holds c4-train.*.json.gz and c4-validation.*.json.gz, any number of each."
}

read_arguments outputs/data/c4 "$@"
train_tokenizer "${sources[@]/%//c4-train.*.json.gz}"
for split in train validation; do
    python -m megatsp preprocess --input "${sources[@]/%//c4-$split.*.json.gz}" --json-keys text --append-eod \
        --tokenizer "$tokenizer" --output-prefix "$output/$split" "${preprocess[@]}"
done
