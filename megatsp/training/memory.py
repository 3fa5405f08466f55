"""Bytes: what a rank is predicted to hold, and what its process has held at most."""

import resource
import sys
from dataclasses import dataclass

import torch
from torch.distributed.tensor import Shard

from megatsp.model.gpt import GPT, add_adapters
from megatsp.model.parallelize import DTYPES, parts, placement
from megatsp.parallel_rules import has_wide_norm
from megatsp.schema import Config, ParallelConfig
from megatsp.tsp.buckets import width

FP32 = 4


@dataclass(frozen=True)
class RankBytes:
    """Predicted bytes on one rank, for the largest shard where shards are uneven."""

    weights: int
    gradients: int
    optimizer: int
    saved_activations: int
    gathered: int

    @property
    def total(self) -> int:
        return self.weights + self.gradients + self.optimizer + self.saved_activations + self.gathered


def predict(config: Config) -> RankBytes:
    """What one rank of a validated configuration holds at the start of the backward pass.

    weights, gradients, optimizer: fp32 shards; beside adapters the weights are of the compute dtype, without
    the others. saved_activations: what the layers keep for the backward (see tsp/layer.py). gathered:
    weights on their way and in use; the two largest buckets that stream, two layers under FSDP, and what
    ranks share under parallel.overlap=fused, which auto is taken for on a GPU. Not in it: the working
    memory of the layer being computed.
    """
    trained, frozen = _shard_elements(config)
    return RankBytes(
        weights=FP32 * trained + DTYPES[config.trainer.dtype].itemsize * frozen,
        gradients=FP32 * trained,
        optimizer=2 * FP32 * trained,
        saved_activations=_saved_activation_bytes(config),
        gathered=_gathered_bytes(config),
    )


def _shard_elements(config: Config) -> tuple[int, int]:
    """Elements of trained and of frozen parameters, each of the rank that holds most of it."""
    parallel, trained, frozen = config.parallel, 0, 0
    fsdp = _fsdp_ranks(parallel)
    with torch.device("meta"):
        gpt = GPT(config.model)
        add_adapters(gpt, config.finetune)
    for name, parameter in gpt.named_parameters():
        shape, cut = list(parameter.shape), placement(name, parallel)
        if isinstance(cut, Shard):
            shape[cut.dim] = -(-shape[cut.dim] // (parallel.tsp * parallel.tp))  # one of them is 1
        elements = -(-torch.Size(shape).numel() // fsdp)
        trained += elements * parameter.requires_grad
        frozen += elements * (not parameter.requires_grad)
    return trained, frozen


def _saved_activation_bytes(config: Config) -> int:
    model, trainer = config.model, config.trainer
    size = DTYPES[trainer.dtype].itemsize
    p = config.parallel
    # tp holds all tokens of its group inside attention and MLP, and 1/tp of their columns.
    tokens = trainer.micro_batch_size * trainer.seq_length // (p.cp * p.tsp * p.tp)
    query, kv = (n * model.kv_channels for n in (model.num_attention_heads, model.num_query_groups))
    per_token = model.hidden_size * size  # the layer's input
    if model.norm_position == "after":
        per_token += model.hidden_size * size  # the MLP's output; attention's is in the MLP's input's stead
    if trainer.recompute_granularity != "full":
        # the MLP's input, attention's output and log-sum-exp
        per_token += (model.hidden_size + query) * size + model.num_attention_heads * FP32
        if has_wide_norm(model) and p.attention_buckets > 1:
            per_token += 2 * FP32  # 1 / rms of q and of k
    if trainer.recompute_granularity == "none":
        ffn = -(-model.ffn_hidden_size // p.tp) * p.tp  # the largest share's, as if all had it
        per_token += (query + 2 * kv + 2 * ffn) * size
    # Of adapters, every layer keeps the sides that have h whole.
    kept_rows = config.finetune.lora_rank * len(config.finetune.lora_targets)
    return model.num_layers * (tokens * per_token + kept_rows * model.hidden_size * size)


def _gathered_bytes(config: Config) -> int:
    h, p, size = config.model.hidden_size, config.parallel, DTYPES[config.trainer.dtype].itemsize
    attention, mlp, head = ([width(b) for b in part.buckets] for part in parts(config.model, p))
    columns = 2 * max(attention + mlp + head) if p.tsp > 1 else 0
    if _fsdp_ranks(p) > 1:
        columns += 2 * -(-(sum(attention) + sum(mlp)) // p.tsp)
    # Two slots of a slice, and two places for every rank's share of its gradient.
    fused = p.tsp > 1 and (p.overlap == "fused" or (p.overlap == "auto" and _on_gpu(config)))
    shared = fused * max(attention + mlp) * (2 * h // p.tsp * size + 2 * h * FP32)
    return columns * h * size + shared


def _on_gpu(config: Config) -> bool:
    """Whether this machine would run it on a GPU, where automatic transfers are fused if they can be."""
    return config.launch.device == "cuda" or (config.launch.device == "auto" and torch.cuda.is_available())


def _fsdp_ranks(parallel: ParallelConfig) -> int:
    return parallel.dp_shard * (parallel.cp if parallel.fsdp_over_cp else 1)


def peak_memory_gib(device: torch.device) -> float:
    """Most memory held so far: allocated on a GPU; on a CPU the process's resident set."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    unit = 1 if sys.platform == "darwin" else 1024  # getrusage counts kilobytes, on macOS bytes
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30
