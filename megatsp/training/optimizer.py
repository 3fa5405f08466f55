"""AdamW over DTensors, by torch or by apex, and its state under canonical names.

Moments are fp32 and shaped and sharded like the fp32 master weights; their names in a checkpoint
are those of the parameters, so any mesh can load them.
"""

import importlib
import math
from collections import defaultdict
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from megatsp.schema import OptimizerConfig

MOMENTS = ("exp_avg", "exp_avg_sq")

APEX_ADVICE = (
    "optimizer=apex_fused_adam needs NVIDIA's or ROCm's apex, built with its CUDA or HIP extensions. Install "
    "it from source (https://github.com/NVIDIA/apex or https://github.com/ROCm/apex) or use a container "
    "that holds it; `pip install apex` gives an unrelated project of the same name. Or use optimizer=adamw"
)


class AdamW:
    """Decoupled weight decay on matrices, none on vectors; one `step` counter for all parameters.

    Of a model with adapters it knows these alone: all else is frozen. They are matrices, and decay.

    Raises:
        ValueError: optimizer.name=apex_fused_adam where apex is missing, another project, or
            has no GPU.
    """

    def __init__(self, model: nn.Module, config: OptimizerConfig) -> None:
        self._named = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self._fused_apex = config.name == "apex_fused_adam"
        apex_adam = load_apex_adam() if self._fused_apex else None
        if self._fused_apex and not all(p.is_cuda for p in self._named.values()):
            raise ValueError("optimizer=apex_fused_adam computes on a GPU only: use optimizer=adamw on a CPU")
        # apex knows plain tensors only: it gets this rank's shards, in the same memory.
        self._handles = {
            name: nn.Parameter(_shard(p.detach())) if self._fused_apex else p
            for name, p in self._named.items()
        }
        decayed = [p for p in self._handles.values() if p.dim() > 1]
        others = [p for p in self._handles.values() if p.dim() <= 1]
        groups = [
            dict(params=decayed, weight_decay=config.weight_decay),
            dict(params=others, weight_decay=0.0),
        ]
        betas, lr, eps = (config.adam_beta1, config.adam_beta2), config.lr, config.adam_eps
        self._optimizer: Any
        if apex_adam is not None:
            self._optimizer = apex_adam(groups, lr=lr, betas=betas, eps=eps, adam_w_mode=True)
        else:
            self._optimizer = torch.optim.AdamW(groups, lr=lr, betas=betas, eps=eps, fused=True)
        self.reset()

    def reset(self) -> None:
        """Gives every parameter zero moments, and all the counter 0."""
        for handle in self._handles.values():
            self._optimizer.state[handle] = {m: torch.zeros_like(handle) for m in MOMENTS}
            if not self._fused_apex:
                self._optimizer.state[handle]["step"] = torch.tensor(0.0, device=handle.device)
        if self._fused_apex:
            for group in self._optimizer.param_groups:
                group["step"] = 0

    def step(self, lr: float) -> None:
        """One update at learning rate `lr` from the parameters' gradients, which it then drops."""
        for group in self._optimizer.param_groups:
            group["lr"] = lr
        if self._fused_apex:
            for name, parameter in self._named.items():
                assert parameter.grad is not None
                self._handles[name].grad = _shard(parameter.grad)
        self._optimizer.step()
        for tensor in (*self._named.values(), *self._handles.values()):
            tensor.grad = None

    def tensors(self) -> dict[str, Tensor]:
        """The moments by `optimizer.<moment>.<parameter>`, to be saved, or loaded in place."""
        return {f"optimizer.{moment}.{name}": tensor for name, moment, tensor in self._moments()}

    def _moments(self) -> Iterator[tuple[str, str, Tensor]]:
        for name, handle in self._handles.items():
            for moment in MOMENTS:
                tensor = self._optimizer.state[handle][moment]
                like = self._named[name]
                if self._fused_apex and isinstance(like, DTensor):
                    tensor = DTensor.from_local(
                        tensor, like.device_mesh, like.placements,
                        run_check=False, shape=like.shape, stride=like.stride(),
                    )  # fmt: skip
                yield name, moment, tensor

    def loaded(self, step: int) -> None:
        """Sets the counter after `tensors()` were loaded in place."""
        if self._fused_apex:
            for group in self._optimizer.param_groups:
                group["step"] = step
        else:
            for handle in self._handles.values():
                self._optimizer.state[handle]["step"].fill_(step)


def load_apex_adam() -> Any:
    """apex.optimizers.FusedAdam, if this apex is the one that has it.

    Raises:
        ValueError: apex is missing, is another project, or was built without its extensions.
    """
    try:
        adam = importlib.import_module("apex.optimizers").FusedAdam
        importlib.import_module("amp_C")  # the compiled kernels, without which FusedAdam cannot run
    except (ImportError, AttributeError) as error:
        raise ValueError(f"{APEX_ADVICE}. (Here: {error})") from error
    return adam


def clip_gradients(model: nn.Module, limit: float) -> Tensor:
    """Global gradient norm over all ranks, fp32 scalar; gradients are scaled so that it is at most `limit`.

    limit 0 only measures. A non-finite norm is returned and leaves the gradients as they are.
    """
    norm = gradient_norm(model)
    scale_gradients(model, limit, norm)
    return norm


def gradient_norm(model: nn.Module) -> Tensor:
    """Global gradient norm over all ranks, fp32 scalar, the same to the bit everywhere."""
    by_copies: defaultdict[int, list[Tensor]] = defaultdict(list)
    for parameter in model.parameters():
        if parameter.grad is not None:
            by_copies[_copies(parameter.grad)].append(_shard(parameter.grad))
    squares = [get_total_norm(shards).square() / copies for copies, shards in by_copies.items()]
    square = torch.stack(squares).sum()
    # Every rank's part to every rank, in one sum: the norm is the same to the bit everywhere.
    dist.all_reduce(square)
    return square.sqrt()


def scale_gradients(model: nn.Module, limit: float, norm: Tensor) -> None:
    """Scales gradients of global norm `norm` so that it is at most `limit`; 0 or a non-finite norm: not."""
    if limit > 0:
        parameters = [p for p in model.parameters() if p.grad is not None]
        # A norm of 0 scales nothing. No branch on the norm: a GPU would be waited for here.
        clip_grads_with_norm_(parameters, limit, norm.where(norm.isfinite(), 0.0))


def _copies(tensor: Tensor) -> int:
    """How many ranks hold the same part of a DTensor."""
    assert isinstance(tensor, DTensor)
    sizes = zip(tensor.device_mesh.shape, tensor.placements, strict=True)
    return math.prod(size for size, placement in sizes if placement.is_replicate())


def _shard(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
