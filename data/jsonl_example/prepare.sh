#!/usr/bin/env bash
# Tokenises the documents and conversations beside this file, in seconds. See README.md.
set -euo pipefail
here=$(dirname "${BASH_SOURCE[0]}")
output=${1:-outputs/data/jsonl_example}
mkdir -p "$output"

# Two files, the second compressed, as a corpus of several shards would be.
head -n 20 "$here/documents.jsonl" >"$output/first.jsonl"
tail -n +21 "$here/documents.jsonl" | gzip -n >"$output/second.jsonl.gz"
shards=("$output/first.jsonl" "$output/second.jsonl.gz")

python -m megatsp preprocess train-tokenizer --input "${shards[@]}" --json-keys title text --vocab-size 512 \
    --special-tokens '<|im_start|>' '<|im_end|>' --output "$output/tokenizer" --force
# Each key of a record becomes an output of its own: example_title_document, example_text_document.
python -m megatsp preprocess --input "${shards[@]}" --json-keys title text --append-eod \
    --tokenizer "$output/tokenizer" --output-prefix "$output/example" --force
# Conversations become example_chat_document.
python -m megatsp preprocess --input "$here/chats.jsonl" --format chat --chat-template "$here/../chatml.jinja" \
    --tokenizer "$output/tokenizer" --output-prefix "$output/example" --force
