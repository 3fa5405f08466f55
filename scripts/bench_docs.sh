#!/usr/bin/env bash
# Makes the results under docs/benchmarks/ again, one part or all: json and plots there, tables on stdout.
#
#   bash scripts/bench_docs.sh [memory_7b | longest | schemes | growth | overhead | memory]...
#
# Nothing else should run meanwhile; on two cores everything takes about an hour and a half.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
bash scripts/setup.sh
megatsp=(env PATH="$PWD/.venv/bin:$PATH" megatsp)
out=docs/benchmarks/results
mkdir -p "$out"

one_sample=(trainer.micro_batch_size=1 trainer.global_batch_size=1)
# A model in which attention, MLP and traffic all matter at 1K to 16K tokens: h 256, F = 4, g = 1.
small=(model.num_layers=2 model.hidden_size=256 model.ffn_hidden_size=1024 model.num_attention_heads=8
    model.num_query_groups=8 model.kv_channels=32 model.vocab_size=1024 launch.device=cpu "${one_sample[@]}")
seven=(model=gpt_7b trainer=bf16 "${one_sample[@]}" --simulate-memory --world 8)
rivals=(tp cp cp_ring tp_cp:tp=2 tp_cp:tp=4 tp_cp:tp=2,fsdp_over_cp=true tp_cp:tp=4,fsdp_over_cp=true
    fsdp_cp fsdp_cp:kv_exchange=ring)

memory_7b() { # the paper's table: 7B on eight ranks
    for recompute in selective full; do
        "${megatsp[@]}" bench "${seven[@]}" trainer.recompute_granularity=$recompute \
            --schemes tsp owner "${rivals[@]}" --sweep seq_length=16384,32768,65536,131072 \
            --json "$out/memory_7b_$recompute.json" --plot "$out/memory_7b_$recompute"
    done
}

longest() { # what fits 192 GB
    "${megatsp[@]}" bench "${seven[@]}" trainer.recompute_granularity=full trainer.seq_length=131072 \
        --schemes tsp "${rivals[@]}" --fit 192
}

schemes() { # the same recompute setting, and each at its best
    for dtype in fp32 bf16; do
        for world in 2 4; do
            "${megatsp[@]}" bench "${small[@]}" trainer.dtype=$dtype --world $world \
                --schemes tsp fsdp_cp tp cp cp_ring cp_ulysses $([[ $world == 4 ]] && echo tp_cp cp_tsp) \
                --sweep seq_length=1024,4096,16384 \
                --json "$out/schemes_${dtype}_$world.json" --plot "$out/schemes_${dtype}_$world"
        done
    done
}

growth() { # against T, D, NB and depth
    "${megatsp[@]}" bench "${small[@]}" --schemes tsp --world 2 --sweep seq_length=1024,2048,4096,8192,16384 \
        --json "$out/growth_T.json" --plot "$out/growth_T"
    "${megatsp[@]}" bench "${small[@]}" --schemes tsp --world 1,2,4,8 trainer.seq_length=4096 \
        --json "$out/growth_D.json" --plot "$out/growth_D"
    "${megatsp[@]}" bench "${small[@]}" --schemes tsp:attention_buckets=4 --world 2 trainer.seq_length=4096 \
        --sweep mlp_buckets=1,2,4,8,16,32 --json "$out/growth_NB.json" --plot "$out/growth_NB"
    "${megatsp[@]}" bench "${small[@]}" --schemes tsp --world 2 trainer.seq_length=2048 \
        --sweep num_layers=1,2,4,8 --json "$out/growth_depth.json" --plot "$out/growth_depth"
}

overhead() { # one rank, beside plain torch and transformers
    "${megatsp[@]}" bench --schemes tsp plain transformers --world 1 --repeats 7 --steps 4 --no-memory \
        --sweep dtype=fp32,bf16 --sweep seq_length=512,2048 launch.device=cpu "${one_sample[@]}" \
        model.num_layers=4 model.hidden_size=512 model.ffn_hidden_size=2048 model.num_attention_heads=8 \
        model.num_query_groups=8 model.kv_channels=64 model.vocab_size=2048 \
        model.untie_embeddings_and_output_weights=true --json "$out/overhead.json"
}

memory() { # 1/D
    "${megatsp[@]}" bench --schemes tsp:attention_buckets=8,mlp_buckets=8,head_buckets=8 owner tsp --world 1,2,4,8 \
        --repeats 1 launch.device=cpu "${one_sample[@]}" trainer.seq_length=4096 model.num_layers=4 \
        model.hidden_size=256 model.ffn_hidden_size=1024 model.num_attention_heads=8 model.num_query_groups=8 \
        model.kv_channels=32 model.vocab_size=4096 --json "$out/memory.json"
}

for part in "${@:-memory_7b longest schemes growth overhead memory}"; do
    for name in $part; do
        "$name"
    done
done
