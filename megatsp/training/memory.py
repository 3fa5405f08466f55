"""Bytes: what a rank is predicted to hold, and what its process has held at most."""

import resource
import sys
from dataclasses import dataclass

import torch

from megatsp.model.gpt import GPT
from megatsp.model.parallelize import DTYPES, LAYER_MATRICES, h_dim, parts
from megatsp.schema import Config
from megatsp.tsp.buckets import width

FP32 = 4


@dataclass(frozen=True)
class RankBytes:
    """Predicted bytes on one rank, for the largest shard where shards are uneven."""

    weights: int
    gradients: int
    optimizer: int
    saved_activations: int
    buckets: int

    @property
    def total(self) -> int:
        return self.weights + self.gradients + self.optimizer + self.saved_activations + self.buckets


def predict(config: Config) -> RankBytes:
    """What one rank of a validated configuration holds at the start of the backward pass.

    weights, gradients, optimizer: fp32 shards. saved_activations: what the layers keep for the
    backward (see tsp/layer.py). buckets: the two largest that stream at a time. Not in it: the
    working memory of the layer being computed.
    """
    shard = sum(_shard_elements(config))
    return RankBytes(
        weights=FP32 * shard,
        gradients=FP32 * shard,
        optimizer=2 * FP32 * shard,
        saved_activations=_saved_activation_bytes(config),
        buckets=2 * max(_bucket_bytes(config)),
    )


def _shard_elements(config: Config) -> list[int]:
    """Elements of each parameter on the rank that holds most."""
    parallel, elements = config.parallel, []
    with torch.device("meta"):
        named = list(GPT(config.model).named_parameters())
    for name, parameter in named:
        dim, shape = h_dim(name), list(parameter.shape)
        if dim is not None:
            if parallel.tsp_layout == "owner" and name.split(".")[-2] in LAYER_MATRICES:
                dim = 1 - dim
            shape[dim] = -(-shape[dim] // parallel.tsp)
        elements.append(-(-torch.Size(shape).numel() // parallel.dp_shard))
    return elements


def _saved_activation_bytes(config: Config) -> int:
    model, trainer = config.model, config.trainer
    size = DTYPES[trainer.dtype].itemsize
    tokens = trainer.micro_batch_size * trainer.seq_length // config.parallel.tsp
    query, kv = (n * model.kv_channels for n in (model.num_attention_heads, model.num_query_groups))
    per_token = model.hidden_size * size  # the layer's input
    if trainer.recompute_granularity != "full":
        # the MLP's input, attention's output and log-sum-exp
        per_token += (model.hidden_size + query) * size + model.num_attention_heads * FP32
    if trainer.recompute_granularity == "none":
        per_token += (query + 2 * kv + 2 * model.ffn_hidden_size) * size
    return model.num_layers * tokens * per_token


def _bucket_bytes(config: Config) -> list[int]:
    size = DTYPES[config.trainer.dtype].itemsize
    widths = [width(b) for part in parts(config.model, config.parallel) for b in part.buckets]
    return [w * config.model.hidden_size * size for w in widths]


def peak_memory_gib(device: torch.device) -> float:
    """Most memory held so far: allocated on a GPU; on a CPU the process's resident set."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    unit = 1 if sys.platform == "darwin" else 1024  # getrusage counts kilobytes, on macOS bytes
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30
