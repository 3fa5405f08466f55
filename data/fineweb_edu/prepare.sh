#!/usr/bin/env bash
# Tokenises downloaded Parquet files of FineWeb-Edu. See README.md beside this file.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/../arguments.sh"

usage() {
    echo "usage: prepare.sh --source FOLDER_OR_FILE ... [--tokenizer SPEC | --vocab-size N] [--output FOLDER]"
    echo "                  [options of megatsp preprocess, as --workers 16]"
}

read_arguments outputs/data/fineweb_edu "$@"
train_tokenizer "${sources[@]}" --input-type parquet
python -m megatsp preprocess --input "${sources[@]}" --input-type parquet --json-keys text --append-eod \
    --tokenizer "$tokenizer" --output-prefix "$output/tokens" "${preprocess[@]}"
