"""The training step that a benchmark repeats, on tokens that a seed makes."""

from contextlib import nullcontext

import torch
import torch.distributed as dist
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from megatsp.axes import Axes
from megatsp.model.parallelize import build_model
from megatsp.schema import Config
from megatsp.training.optimizer import AdamW, clip_gradients
from megatsp.training.step import Batch, accumulate_gradients


class TrainStep:
    """Forward, backward, clipping and AdamW of one global batch on this rank.

    axes, gpt and optimizer are those of a training run of `config`, and the first weights too.

    fake: a mode that gives tensors neither memory nor values, to run the step under it too.
    """

    def __init__(self, config: Config, device: torch.device, fake: FakeTensorMode | None = None) -> None:
        self.config = config
        self.axes = Axes.build(config.parallel, device)
        self.gpt = build_model(config, self.axes, fake)
        with fake or nullcontext():
            self.optimizer = AdamW(self.gpt, config.optimizer)
            self.batches = self._batches()

    def _batches(self) -> list[Batch]:
        """This rank's share of one global batch of random tokens: the same batch on every mesh."""
        trainer, axes = self.config.trainer, self.axes
        shape = (trainer.global_batch_size, trainer.seq_length + 1)
        generator = torch.Generator().manual_seed(trainer.seed)
        tokens = torch.randint(0, self.config.model.vocab_size, shape, generator=generator)
        mine = tokens.unflatten(0, (-1, axes.dp_size, trainer.micro_batch_size))[:, axes.dp_rank]
        return [
            (
                axes.take_local(samples[:, :-1]).to(axes.device),
                axes.take_local(samples[:, 1:]).to(axes.device),
                torch.ones_like(axes.take_local(samples[:, 1:]), dtype=torch.float32, device=axes.device),
                None,
            )
            for samples in mine
        ]

    def run(self) -> Tensor:
        """One step. Returns the global loss, a scalar that no host has waited for."""
        trainer = self.config.trainer
        loss_tokens = float(trainer.global_batch_size * trainer.seq_length)
        loss = accumulate_gradients(self.gpt, self.batches, loss_tokens).sum() / loss_tokens
        dist.all_reduce(loss)
        clip_gradients(self.gpt, self.config.optimizer.clip_grad)
        self.optimizer.step(self.config.optimizer.lr)
        self.gpt.engine.check()
        return loss
