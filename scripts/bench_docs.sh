#!/usr/bin/env bash
# Makes the results in docs/benchmarks/results again: tables as text, JSON, plots.
#
#   bash scripts/bench_docs.sh [seven | longest | schemes | growth | overhead | memory]...    (default: all)
#
# Nothing else should run meanwhile. On two cores everything takes about an hour.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
bash scripts/setup.sh
out=docs/benchmarks/results
mkdir -p "$out"

# bench NAME ARGUMENT...: one result, of one sample a step
bench() {
    name=$1
    shift
    echo "bench_docs: $name" >&2
    PATH="$PWD/.venv/bin:$PATH" megatsp bench "$@" trainer.micro_batch_size=1 trainer.global_batch_size=1 \
        --json "$out/$name.json" --plot "$out/$name" >"$out/$name.txt"
}

ring=kv_exchange=ring
small=(model.num_layers=2 model.hidden_size=256 model.ffn_hidden_size=1024 model.num_attention_heads=8
    model.num_query_groups=8 model.kv_channels=32 model.vocab_size=1024 launch.device=cpu)
large=(model=gpt_7b trainer=bf16 launch.device=cuda --world 8 --simulate-memory --rank 0)

seven() { # the paper's memory table: 7B on eight ranks, simulated
    for recompute in selective full; do
        bench seven_$recompute "${large[@]}" trainer.recompute_granularity=$recompute \
            --schemes tsp tp tp_cp:tp=2 tp_cp:tp=4 fsdp_cp fsdp_cp:$ring cp_ring \
            --sweep seq_length=131072,16384,65536,32768
    done
}

longest() { # what fits 192 GB
    PATH="$PWD/.venv/bin:$PATH" megatsp bench "${large[@]}" trainer.recompute_granularity=full \
        trainer.seq_length=1048576 trainer.micro_batch_size=1 trainer.global_batch_size=1 \
        --schemes tp fsdp_cp:$ring tp_cp:tp=4 tsp --fit 192 >"$out/longest.txt"
}

schemes() { # side by side on this machine, recompute none; then their memory by simulation
    for dtype in fp32 bf16; do
        few=("tsp:$ring" "fsdp_cp:$ring" tp)
        for world in 2 4; do
            [[ $world == 2 ]] || few+=(tp_cp)
            more=()
            [[ $dtype == bf16 ]] || more=(tsp cp_ring cp_ulysses)
            [[ $dtype$world != fp324 ]] || more+=(fsdp_cp cp_tsp)
            bench schemes_${dtype}_$world "${small[@]}" trainer.dtype=$dtype --world $world \
                --schemes "${few[@]}" "${more[@]}" --sweep seq_length=1024,4096
            bench schemes_${dtype}_${world}_16k "${small[@]}" trainer.dtype=$dtype --world $world \
                --schemes "${few[@]}" trainer.seq_length=16384 --warmup 0
            bench simulated_${dtype}_$world "${small[@]}" trainer.dtype=$dtype \
                --world $world --simulate-memory --sweep seq_length=1024,4096,16384 \
                --schemes "${few[@]}" "${more[@]}" tsp:$ring,attention_buckets=4,mlp_buckets=8,head_buckets=4
        done
    done
}

growth() { # against T, D, NB and depth
    bench growth_T "${small[@]}" --schemes tsp --world 2 --sweep seq_length=1024,2048,4096,8192 --no-memory
    bench growth_D "${small[@]}" --schemes tsp --world 1,2,4 trainer.seq_length=4096 --no-memory
    bench growth_NB "${small[@]}" --schemes tsp:attention_buckets=4 --world 2 trainer.seq_length=4096 \
        --sweep mlp_buckets=1,4,16 --repeats 3
    bench growth_depth "${small[@]}" --schemes tsp --world 2 trainer.seq_length=2048 \
        --sweep num_layers=1,2,4,8 --no-memory
}

overhead() { # one rank, beside plain torch and transformers
    bench overhead --schemes tsp plain transformers --world 1 --steps 4 --no-memory launch.device=cpu \
        --sweep dtype=fp32,bf16 --sweep seq_length=512,2048 model.num_layers=4 model.hidden_size=512 \
        model.ffn_hidden_size=2048 model.num_attention_heads=8 model.num_query_groups=8 model.kv_channels=64 \
        model.vocab_size=2048 model.untie_embeddings_and_output_weights=true
}

memory() { # 1/D
    bench memory --schemes tsp:attention_buckets=8,mlp_buckets=8,head_buckets=8 tsp --world 1,2,4,8 --repeats 1 \
        launch.device=cpu trainer.seq_length=4096 model.num_layers=4 model.hidden_size=256 \
        model.ffn_hidden_size=1024 model.num_attention_heads=8 model.num_query_groups=8 model.kv_channels=32 \
        model.vocab_size=4096
}

[[ $# -gt 0 ]] || set -- seven longest schemes growth overhead memory
for part in "$@"; do
    "$part"
done
