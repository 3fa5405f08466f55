"""Compares the streamed GPT on gloo ranks with the dense reference: loss and every gradient."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cache

import torch
from dense import DenseGPT
from distributed import run_distributed
from torch import Tensor
from torch.distributed.tensor import DTensor

from megatsp.axes import Axes
from megatsp.model.gpt import GPT
from megatsp.model.parallelize import DTYPES, build_model
from megatsp.schema import Config, KernelsConfig, ModelConfig, ParallelConfig, RotaryScaling, TrainerConfig

# Odd on purpose: FFN width, vocabulary and batch divide by nothing here.
BATCH, LENGTH = 3, 48
MODEL = ModelConfig(
    num_layers=2,
    hidden_size=40,
    ffn_hidden_size=107,
    num_attention_heads=8,
    num_query_groups=8,
    kv_channels=6,
    vocab_size=131,
)
# Keys of what Hugging Face's families have beside it. Of three pairs YaRN keeps one, blends one, divides one.
OLMO2 = dict(norm_position="after", qk_layernorm=True, qk_layernorm_width="all")
YARN = RotaryScaling("yarn", factor=4.0, original_max_position_embeddings=512)


@dataclass(frozen=True)
class Case:
    """One configuration under test; `micro_batches` > 1 accumulates gradients. length: in tokens."""

    model: ModelConfig = MODEL
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    recompute: str = "none"
    dtype: str = "fp32"
    micro_batches: int = 1
    kernels: KernelsConfig = field(default_factory=KernelsConfig)
    samples: int = BATCH  # of a micro-batch
    length: int = LENGTH
    documents: bool = False  # samples are packed with documents

    @property
    def total_samples(self) -> int:
        return self.samples * self.parallel.dp_shard * self.parallel.dp_replicate * self.micro_batches

    def config(self) -> Config:
        trainer = TrainerConfig(recompute_granularity=self.recompute, dtype=self.dtype)
        return Config(model=self.model, parallel=self.parallel, kernels=self.kernels, trainer=trainer)


def case(
    tsp: int = 1, recompute: str = "none", dtype: str = "fp32", micro_batches: int = 1, **changes
) -> Case:
    """A case from flat keys: those of ModelConfig and of ParallelConfig."""
    model_keys = {k: v for k, v in changes.items() if hasattr(MODEL, k)}
    parallel = dict(attention_buckets=1, mlp_buckets=tsp, head_buckets=2, dp_shard=1)
    parallel |= {k: v for k, v in changes.items() if k not in model_keys}
    return Case(
        replace(MODEL, **model_keys), ParallelConfig(tsp=tsp, **parallel), recompute, dtype, micro_batches
    )


def batch(samples: int, length: int = LENGTH) -> tuple[Tensor, Tensor, Tensor]:
    """ids, labels, mask [samples, T]; about a fifth of the tokens carry no loss."""
    generator = torch.Generator().manual_seed(samples)
    ids, labels = torch.randint(0, MODEL.vocab_size, (2, samples, length), generator=generator)
    return ids, labels, (torch.rand(samples, length, generator=generator) < 0.8).float()


def packed(samples: int, length: int = LENGTH) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """ids, labels, mask and `first` [samples, T]; the documents of each sample are others.

    In turn: short ones, of one token too; one that most chunks have a part of, and a tail of padding; one
    alone; nothing but padding.
    """
    ids, labels, mask = batch(samples, length)
    first = torch.zeros(samples, length, dtype=torch.int64)
    generator = torch.Generator().manual_seed(length)
    for sample in range(samples):
        kind = sample % 4
        if kind < 2:
            lengths = [1, 1] if kind == 0 else [3, length * 2 // 3]
            while sum(lengths) < length:
                lengths.append(int(torch.randint(1, 10, (), generator=generator)))
            begins = torch.tensor([0, *lengths[:-1]]).cumsum(0)
            counts = begins.diff(append=torch.tensor([length]))
            first[sample] = begins.repeat_interleave(counts)
        if kind == 1:
            mask[sample, first[sample, -1] :] = 0
        if kind == 3:
            mask[sample] = 0
    return ids, labels, mask, first


@cache
def weights(model: ModelConfig) -> dict[str, Tensor]:
    """Random fp32 weights in which gains and biases matter."""
    torch.manual_seed(7)
    state = DenseGPT(model).state_dict()
    return {
        k: v + 0.2 * torch.randn_like(v) if v.dim() == 1 else 0.2 * torch.randn_like(v)
        for k, v in state.items()
    }


@cache
def dense_result(
    model: ModelConfig, samples: int, dtype: torch.dtype, length: int = LENGTH, documents: bool = False
) -> tuple[float, dict[str, Tensor]]:
    """Loss and gradients of the dense reference computed in `dtype`."""
    dense = DenseGPT(model)
    dense.load_state_dict(weights(model))
    dense.to(dtype)
    loss = dense.loss(*(packed if documents else batch)(samples, length))
    loss.backward()
    return loss.item(), {k: p.grad.float() for k, p in dense.named_parameters() if p.grad is not None}


@torch.no_grad()
def load(gpt: GPT, state: dict[str, Tensor]) -> None:
    """Gives every rank its shards of a full state dict."""
    parameters = dict(gpt.named_parameters())
    assert parameters.keys() == state.keys()
    for name, parameter in parameters.items():
        assert isinstance(parameter, DTensor)
        parameter.to_local().copy_(shard_of(state[name], parameter))


def shard_of(whole: Tensor, like: DTensor) -> Tensor:
    """The innermost axis cuts first: FSDP cuts what tsp or tp left. (torch's own way wants even shards.)"""
    for axis, placement in reversed(list(enumerate(like.placements))):
        if not placement.is_replicate():
            chunks, rank = (
                whole.chunk(like.device_mesh.size(axis), placement.dim),
                like.device_mesh.get_local_rank(axis),
            )
            whole = chunks[rank] if rank < len(chunks) else whole.narrow(placement.dim, 0, 0)
    return whole


def rank_result(case_: Case, state: dict[str, Tensor]) -> tuple[float, dict[str, Tensor]]:
    """On a rank: the global loss and the gathered gradients."""
    config = case_.config()
    axes = Axes.build(config.parallel, torch.device("cpu"))
    gpt = build_model(config, axes)
    load(gpt, state)
    loss = run_step(case_, gpt, axes)
    return loss, {k: p.grad.full_tensor() for k, p in gpt.named_parameters()}


def run_step(case_: Case, gpt: GPT, axes: Axes) -> float:
    """On a rank: the global loss; gradients are in the parameters."""
    made = packed if case_.documents else batch
    ids, labels, mask, *first = made(case_.total_samples, case_.length)
    count, loss = mask.sum(), torch.zeros(())
    for i in range(case_.micro_batches):
        start = (i * axes.dp_size + axes.dp_rank) * case_.samples
        mine = slice(start, start + case_.samples)
        local = [axes.take_local(t[mine]) for t in (ids, labels, mask)]
        part = gpt(*local, *(t[mine] for t in first)).sum() / count
        part.backward()
        loss += part.detach()
    torch.distributed.all_reduce(loss)
    return loss.item()


def relative_error(actual: Tensor, expected: Tensor) -> float:
    return ((actual - expected).norm() / expected.norm()).item()


def rank_errors(jobs: Sequence[tuple[Case, dict, float, dict]]) -> list[dict[str, float]]:
    """On a rank: each case's relative error of loss and gradients, by parameter name."""
    errors = []
    for case_, state, loss, gradients in jobs:
        actual_loss, actual = rank_result(case_, state)
        assert actual.keys() == gradients.keys()
        found = {name: relative_error(actual[name], gradients[name]) for name in gradients}
        errors.append({"loss": abs(actual_loss - loss) / abs(loss), **found})
    return errors


def job(case_: Case) -> tuple[Case, dict, float, dict]:
    exact = dense_result(case_.model, case_.total_samples, torch.float32, case_.length, case_.documents)
    return case_, weights(case_.model), *exact


def dense_errors(case_: Case) -> dict[str, float]:
    """Relative errors of the dense reference in the case's own dtype, against fp32.

    Of the loss, the largest over the samples: in their mean roundings may cancel, by luck of the processor.
    """
    samples, how = case_.total_samples, (case_.length, case_.documents)
    _, gradients = dense_result(case_.model, samples, DTYPES[case_.dtype], *how)
    _, exact = dense_result(case_.model, samples, torch.float32, *how)
    errors = {k: relative_error(gradients[k], exact[k]) for k in exact}
    rounded, losses = (sample_losses(case_, dtype) for dtype in (DTYPES[case_.dtype], torch.float32))
    return {"loss": ((rounded - losses).abs() / losses).max().item(), **errors}


@torch.no_grad()
def sample_losses(case_: Case, dtype: torch.dtype) -> Tensor:
    """The dense reference's loss of each sample that has one, computed in `dtype`: fp32 [samples]."""
    dense = DenseGPT(case_.model)
    dense.load_state_dict(weights(case_.model))
    dense.to(dtype)
    made = (packed if case_.documents else batch)(case_.total_samples, case_.length)
    samples = [[tensor[i : i + 1] for tensor in made] for i in range(case_.total_samples)]
    return torch.stack([dense.loss(*sample) for sample in samples if sample[2].any()]).float()


def check(found: list[Case], world_size: int, bound: Callable[[Case], dict[str, float]]) -> None:
    """Holds loss and gradients of each case, on every rank, to the errors that `bound` allows."""
    per_rank = run_distributed(rank_errors, world_size, [job(c) for c in found])
    for errors in per_rank:
        for case_, by_name in zip(found, errors, strict=True):
            bounds = bound(case_)
            over = {k: (v, bounds[k]) for k, v in by_name.items() if not v <= bounds[k]}
            assert not over, f"{case_}: {over}"


def fp32_bound(case_: Case) -> dict[str, float]:
    return dict.fromkeys(dense_errors(case_), 1e-5)


def twice_dense_bound(case_: Case) -> dict[str, float]:
    """Twice the error of the dense reference in the case's dtype."""
    return {name: 2 * error + 1e-6 for name, error in dense_errors(case_).items()}
