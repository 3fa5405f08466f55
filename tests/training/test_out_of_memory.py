"""A real out-of-memory is recognised and explained by name; what settings save is what predict() says."""

import resource
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from distributed import run_distributed

from megatsp.axes import Axes
from megatsp.model.parallelize import build_model
from megatsp.schema import Config, FinetuneConfig, LoggingConfig, ModelConfig, ParallelConfig, TrainerConfig
from megatsp.training.memory import predict
from megatsp.training.memory_advice import advice, savings
from megatsp.training.optimizer import AdamW
from megatsp.training.out_of_memory import explain, is_out_of_memory, record_history
from megatsp.validate import validate

CONFIG = Config(
    model=ModelConfig(
        num_layers=2, hidden_size=48, ffn_hidden_size=96, num_attention_heads=4, num_query_groups=2,
        kv_channels=8, vocab_size=257,
    ),
    trainer=TrainerConfig(seq_length=64, micro_batch_size=4, global_batch_size=8),
)  # fmt: skip


def run_out_of_memory(folder: Path) -> tuple[str, list[str]]:
    """On a rank that may have 1 GiB more: a step whose activations are beyond that, explained."""
    config = validate(CONFIG, 1)
    gpt = build_model(config, Axes.build(config.parallel, torch.device("cpu")))
    optimizer = AdamW(gpt, config.optimizer)
    gpt(torch.zeros(4, 64, dtype=torch.int64)).sum().backward()
    now = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (now + 2**30, resource.RLIM_INFINITY))
    known = torch.zeros(3, 1 << 20)  # 12 MiB, the largest tensor
    try:
        torch.zeros(1 << 29)
    except RuntimeError as error:
        assert is_out_of_memory(error)
        text = explain(error, config, 1, gpt, optimizer, folder, 0)
    try:
        bytearray(1 << 31)
    except MemoryError as error:
        assert is_out_of_memory(error)
        without_model = explain(error, config, 1, None, None, folder / "config.json", 1)
    assert known.any().item() is False
    return text, without_model.splitlines()


def test_a_real_one_is_explained(tmp_path):
    (tmp_path / "config.json").write_text("a file, where a folder would be made")
    ((text, without_model),) = run_distributed(run_out_of_memory, 1, tmp_path)
    lines = text.splitlines()
    assert lines[0] == "out of memory on rank 0 of 1: 2,048 MiB were asked for"
    names = [line.split("MiB", 1)[1].strip() for line in lines if "MiB  " in line]
    assert names[:4] == ["parameters", "gradients", "moments", "other tensors that Python sees"]
    assert names[5] == "[3, 1048576] float32"  # after what the process held
    assert "model.embed_tokens.weight" in names  # 257 x 48 is the largest of the model's, with its gradient
    assert "gradient of model.embed_tokens.weight" in names
    assert "optimizer.exp_avg.model.embed_tokens.weight" in names
    assert "what would save memory on each rank, as predicted:" in lines
    report = tmp_path / "out_of_memory" / "rank_00000.txt"
    assert lines[-1].endswith(str(report))
    assert report.read_text().startswith(lines[0]) and "torch.zeros(1 << 29)" in report.read_text()
    assert without_model[0] == "out of memory on rank 1 of 1: MemoryError"
    assert "could not be written" in without_model[-1]


def test_a_gpu_that_is_full(tmp_path, monkeypatch):
    """What the allocator says is added, and its recording lies beside the report."""
    numbers = {
        "memory_allocated": 60 << 20, "memory_reserved": 90 << 20, "mem_get_info": (5 << 20, 100 << 20),
        "get_device_name": "MI300X", "current_device": 0,
    }  # fmt: skip
    for name, number in numbers.items():
        monkeypatch.setattr(torch.cuda, name, lambda *args, number=number: number)
    dumped: list[str] = []
    monkeypatch.setattr(torch.cuda.memory, "_dump_snapshot", dumped.append)
    config = replace(validate(CONFIG, 1), logging=LoggingConfig(memory_history=True))
    error = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has ...")
    lines = explain(error, config, 1, None, None, tmp_path, 3).splitlines()
    assert lines[0] == "out of memory on rank 3 of 1: 2.00 GiB were asked for"
    assert [" ".join(line.split()) for line in lines[5:8]] == [
        "60 MiB kept by autograd for the backward",
        "30 MiB in the allocator's cache",
        "5 MiB free of 100 MiB of MI300X",
    ]
    assert dumped == [str(tmp_path / "out_of_memory" / "rank_00003.pickle")]
    assert dumped[0] in lines[-2]


def test_other_errors_are_not_of_memory():
    assert not is_out_of_memory(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))
    assert not is_out_of_memory(ValueError("DefaultCPUAllocator: can't allocate memory"))
    assert is_out_of_memory(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."))


def test_savings_are_the_differences_of_predictions():
    config = validate(replace(CONFIG, parallel=ParallelConfig(dp_replicate=2)), 2)
    found = {text: saved for saved, text in savings(config, 2)}
    assert list(found.values()) == sorted(found.values(), reverse=True) and min(found.values()) > 0

    def expected(ranks: int = 2, parallel: dict | None = None, **trainer) -> int:
        changed = replace(
            config,
            parallel=replace(config.parallel, **(parallel or {})),
            trainer=replace(config.trainer, **trainer),
        )
        return predict(config).total - predict(validate(changed, ranks)).total

    assert found["trainer.recompute_granularity=full"] == expected(recompute_granularity="full")
    assert found["trainer.recompute_granularity=selective"] == expected(recompute_granularity="selective")
    assert found["trainer.micro_batch_size=1"] == expected(micro_batch_size=1)
    assert found["trainer.dtype=bf16"] == expected(dtype="bf16")
    sharded = dict(dp_replicate=1, dp_shard=2)
    assert found["parallel.dp_shard=2 parallel.dp_replicate=1"] == expected(parallel=sharded)
    tsp = next(saved for text, saved in found.items() if text.startswith("parallel.tsp=2 parallel.dp_rep"))
    assert tsp == expected(parallel=dict(dp_replicate=1, tsp=2))
    assert any(text.endswith("(on 4 ranks)") for text in found)
    assert not any("lora" in text for text in found)  # of megatsp train


def test_buckets_save_under_tsp_and_adapters_under_sft():
    config = replace(CONFIG, parallel=ParallelConfig(tsp=2), finetune=FinetuneConfig(hf="there"))
    config = validate(config, 2)
    found = {text: saved for saved, text in savings(config, 2)}
    alone = replace(config, parallel=replace(config.parallel, mlp_buckets=2))
    saved = predict(config).gathered - predict(alone).gathered
    assert saved > 0 and found["parallel.mlp_buckets=2"] == saved
    together = next(text for text in found if text.count("_buckets=2") == 3)
    assert found[together] > saved
    wide = validate(replace(config, model=replace(config.model, hidden_size=256, ffn_hidden_size=768)), 2)
    (saved,) = [saved for saved, text in savings(wide, 2) if text.startswith("finetune.lora_rank=16 (")]
    assert saved > predict(wide).optimizer / 2  # adapters of rank 16 are few of so many weights


def test_what_validation_refuses_is_not_advised():
    owner = ParallelConfig(dp_replicate=2, tsp=1)
    config = validate(replace(CONFIG, model=replace(CONFIG.model, hidden_size=47), parallel=owner), 2)
    assert not any("parallel.tsp=" in text for _, text in savings(config, 2))  # 47 is prime
    lines = list(advice(config, 2, most=1))
    assert len(lines) == 3 and lines[0].startswith("predicted for a rank: ")


def test_history_is_refused_on_a_cpu():
    config = replace(CONFIG, logging=LoggingConfig(memory_history=True))
    with pytest.raises(ValueError, match="memory_history=true: torch records .* computes on a CPU"):
        record_history(config, torch.device("cpu"))
    record_history(CONFIG, torch.device("cpu"))
