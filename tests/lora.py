"""LoRA against the dense reference with adapters added to it: loss and every adapter's gradient."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache

import torch
import torch.nn.functional as F
from dense import DenseGPT
from distributed import run_distributed
from parity import Case, batch, load, packed, relative_error, run_step
from parity import weights as base_weights
from torch import Tensor, nn

from megatsp.axes import Axes
from megatsp.model.gpt import GPT
from megatsp.model.parallelize import DTYPES, build_model
from megatsp.schema import MATRICES, Config, FinetuneConfig, ModelConfig


@dataclass(frozen=True)
class Low:
    """What is adapted in a case."""

    rank: int = 3
    alpha: float = 5.0
    targets: tuple[str, ...] = MATRICES

    def finetune(self) -> FinetuneConfig:
        return FinetuneConfig(lora_rank=self.rank, lora_alpha=self.alpha, lora_targets=list(self.targets))


Job = tuple[Case, Low]


class Adapted(nn.Linear):
    """W x + b + s B A x."""

    def __init__(self, of: nn.Linear, low: Low) -> None:
        super().__init__(of.in_features, of.out_features, of.bias is not None)
        self.lora_A = nn.Linear(of.in_features, low.rank, bias=False)
        self.lora_B = nn.Linear(low.rank, of.out_features, bias=False)
        self.scale = low.alpha / low.rank

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias) + self.lora_B(self.lora_A(x)) * self.scale


def adapted(model: ModelConfig, low: Low) -> DenseGPT:
    """The dense reference with adapters, which alone are trained."""
    dense = DenseGPT(model)
    dense.requires_grad_(False)
    for layer in dense.model.layers:
        for owner in (layer.self_attn, layer.mlp):
            for name, module in list(owner.named_children()):
                if name in low.targets:
                    setattr(owner, name, Adapted(module, low))
    for name, parameter in dense.named_parameters():
        parameter.requires_grad_(".lora_" in name)
    return dense


@cache
def weights(model: ModelConfig, low: Low) -> dict[str, Tensor]:
    """The reference's, and adapters of which both sides matter."""
    state, generator = dict(base_weights(model)), torch.Generator().manual_seed(11)
    for name, tensor in adapted(model, low).state_dict().items():
        if ".lora_" in name:
            state[name] = 0.2 * torch.randn(tensor.shape, generator=generator)
    return state


@cache
def dense_result(
    model: ModelConfig, low: Low, samples: int, dtype: torch.dtype, length: int, documents: bool
) -> tuple[float, dict[str, Tensor]]:
    """Loss and the adapters' gradients of the dense reference computed in `dtype`."""
    dense = adapted(model, low)
    dense.load_state_dict(weights(model, low))
    dense.to(dtype)
    loss = dense.loss(*(packed if documents else batch)(samples, length))
    loss.backward()
    return loss.item(), {k: p.grad.float() for k, p in dense.named_parameters() if p.grad is not None}


def config(job: Job) -> Config:
    case_, low = job
    return replace(case_.config(), finetune=low.finetune())


def build(job: Job, state: dict[str, Tensor]) -> tuple[GPT, Axes]:
    """On a rank: the model with these weights."""
    axes = Axes.build(job[0].parallel, torch.device("cpu"))
    gpt = build_model(config(job), axes)
    load(gpt, state)
    return gpt, axes


def rank_errors(jobs: Sequence[tuple[Job, dict, float, dict]]) -> list[dict[str, float]]:
    """On a rank: each job's relative error of loss and gradients; frozen parameters have none."""
    errors = []
    for job, state, loss, gradients in jobs:
        gpt, axes = build(job, state)
        actual = run_step(job[0], gpt, axes)
        named = dict(gpt.named_parameters())
        assert {name for name, p in named.items() if p.grad is not None} == gradients.keys()
        found = {name: relative_error(named[name].grad.full_tensor(), gradients[name]) for name in gradients}
        errors.append({"loss": abs(actual - loss) / abs(loss), **found})
        gpt.engine.close()
    return errors


def dense_of(job: Job, dtype: torch.dtype) -> tuple[float, dict[str, Tensor]]:
    case_, low = job
    return dense_result(case_.model, low, case_.total_samples, dtype, case_.length, case_.documents)


def check(jobs: list[Job], world_size: int, bound: Callable[[Job], dict[str, float]]) -> None:
    """Holds loss and gradients of each job, on every rank, to the errors that `bound` allows."""
    given = [(job, weights(job[0].model, job[1]), *dense_of(job, torch.float32)) for job in jobs]
    for errors in run_distributed(rank_errors, world_size, given):
        for job, by_name in zip(jobs, errors, strict=True):
            bounds = bound(job)
            over = {k: (v, bounds[k]) for k, v in by_name.items() if not v <= bounds[k]}
            assert not over, f"{job}: {over}"


def fp32_bound(job: Job) -> dict[str, float]:
    return dict.fromkeys(["loss", *dense_of(job, torch.float32)[1]], 1e-5)


def twice_dense_bound(job: Job) -> dict[str, float]:
    """Twice the error of the dense reference in the case's dtype."""
    loss, gradients = dense_of(job, DTYPES[job[0].dtype])
    exact_loss, exact = dense_of(job, torch.float32)
    errors = {k: relative_error(gradients[k], exact[k]) for k in exact}
    errors["loss"] = abs(loss - exact_loss) / exact_loss
    return {name: 2 * error + 1e-6 for name, error in errors.items()}
