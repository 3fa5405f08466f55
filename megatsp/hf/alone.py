"""Our model in one process, without a process group, a layer at a time: logits of weights from anywhere."""

from dataclasses import dataclass

import torch
from torch import Tensor

from megatsp.axes import Axes
from megatsp.comm import Comm
from megatsp.hf.logits import output_logits
from megatsp.hf.source import TensorSource
from megatsp.hf.streaming import stream
from megatsp.model.gpt import GPT
from megatsp.model.parallelize import attach_streams
from megatsp.schema import Config, KernelsConfig, ModelConfig, ParallelConfig
from megatsp.validate import validate


@dataclass(frozen=True)
class _Alone(Axes):
    """The axes of a single process."""

    @property
    def has_fsdp(self) -> bool:
        """As under FSDP, the next layer's weights are not there yet when this one ends."""
        return True


@torch.no_grad()
def logits_alone(source: TensorSource, model: ModelConfig, ids: Tensor, device: torch.device) -> Tensor:
    """Logits of `ids`, int64 [B, T], T even, computed in fp32: fp32 [B, T, V]. Memory as `Reference`'s."""
    on_cpu = KernelsConfig() if device.type == "cuda" else KernelsConfig(*["torch"] * 5)
    parallel = ParallelConfig(overlap="collective", dp_shard=1)
    config = validate(Config(model=model, parallel=parallel, kernels=on_cpu), 1)
    comm = Comm(None)
    axes = _Alone(None, None, device, comm, comm, comm, comm)  # type: ignore[arg-type]  # no meshes
    with torch.device("meta"):
        gpt = GPT(model)
    gpt.requires_grad_(False)
    attach_streams(gpt, config, axes, fake=False)
    embedding = "model.embed_tokens.weight"
    # The rows that are needed, not the whole embedding.
    rows = torch.nn.functional.embedding(ids, source.read(embedding)).to(device, torch.float32)
    gpt.model.embed_tokens.lookup = lambda ids, weight: rows
    for index in range(model.num_layers):
        stream(gpt.layer(index), f"model.layers.{index}", source, device, torch.float32)
    x = gpt(ids.to(device))
    own = "lm_head.weight"
    gain = source.read("model.norm.weight").to(device, torch.float32, copy=True)
    head = source.read(own if own in source.shapes else embedding)
    return output_logits(x, gain, head, model.norm_epsilon)
