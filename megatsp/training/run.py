"""The training run, read top to bottom: set up, step, evaluate, log, save, sum up."""

import math
import signal
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import FrameType

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from megatsp.axes import Axes, choose_device, join
from megatsp.compose import to_yaml
from megatsp.data.dataset import GPTDataset, Sampler, load_batch, rank_slices
from megatsp.data.tokenizer import Tokenizer, load_tokenizer
from megatsp.kernels import resolve
from megatsp.model.gpt import GPT
from megatsp.model.parallelize import build_model, reshard
from megatsp.schema import Config
from megatsp.training import checkpoint
from megatsp.training.checkpoint import RunState
from megatsp.training.folder import find_checkpoint, lock, run_folder
from megatsp.training.interval import Interval, StepResult
from megatsp.training.logs import Reporter, evaluation_line, iteration_line, read_metrics
from megatsp.training.optimizer import AdamW, clip_gradients
from megatsp.training.plot import plot_loss
from megatsp.training.schedule import learning_rate
from megatsp.training.step import accumulate_gradients
from megatsp.validate import validate


def train(config: Config) -> None:
    """Trains on this rank, of the ranks that a launcher started; all call it with the same config.

    A run that has a checkpoint goes on from it. SIGINT ends it after the current step, saved.

    Raises:
        ValueError: the configuration, the data or the run's folder cannot be used, or the loss is
            not finite.
    """
    device = choose_device(config.launch.device)
    join(device, config.launch.timeout_s)
    try:
        config = validate(config, dist.get_world_size())
        with _interrupts() as interrupted:
            Training(config, device).run(interrupted)
    finally:
        dist.destroy_process_group()


class Training:
    """One run on this rank. Everything that can be refused is refused before a file is written."""

    def __init__(self, config: Config, device: torch.device) -> None:
        self.config = config
        self.tokenizer = load_tokenizer(config.data.tokenizer)
        self.train_data, self.valid_data = load_data(config, self.tokenizer)
        token_bytes = self.tokenizer.bytes_per_token()  # None: no bits per byte
        self.bytes_per_token = None if token_bytes is None else torch.from_numpy(token_bytes).to(device)
        self.sampler = Sampler(config.trainer.seed, len(self.train_data))
        self.folder = run_folder(config)
        self.resumed_from = find_checkpoint(config)
        if self.resumed_from is not None:
            checkpoint.check_tokenizer(self.resumed_from, self.tokenizer)
        dist.barrier()  # every rank has looked before one writes
        self.axes = Axes.build(config.parallel, device)
        self.gpt: GPT = build_model(config, self.axes)
        self.optimizer = AdamW(self.gpt, config.optimizer)
        self.state = RunState()
        self.saved_at = 0
        if self.resumed_from is not None:
            self.state = checkpoint.load(self.resumed_from, self.gpt, self.optimizer.tensors())
            self.optimizer.loaded(self.state.iteration)
            self.saved_at = self.state.iteration
        self.is_first = dist.get_rank() == 0

    def run(self, interrupted: list[int]) -> None:
        """Trains to train_iters, or to the step in which some rank was interrupted."""
        settings, start = self.config.trainer, self.state.iteration
        if start >= settings.train_iters:
            if self.is_first:
                print(f"{self.folder} is at iteration {start} already; to go on, raise trainer.train_iters")
            return
        with lock(self.folder) if self.is_first else nullcontext():
            self._open_folder()
            self._loop(start, interrupted)
        self.gpt.engine.close()
        if self.is_first:
            self._sum_up()

    def _loop(self, start: int, interrupted: list[int]) -> None:
        """Steps, evaluations, log lines and checkpoints after iteration `start`."""
        settings = self.config.trainer
        reporter = Reporter(self.config, self.folder, start, self.state.wandb_run_id, self.is_first)
        self.state = replace(self.state, wandb_run_id=_from_first(reporter.wandb_run_id))
        reporter.say(self._greeting(start))
        reporter.say(_transfers(str(self.gpt.engine.overlap)))
        interval = Interval(self.config, self.axes)
        due = partial(_is_due, last=settings.train_iters)
        try:
            for iteration in range(start + 1, settings.train_iters + 1):
                result = self.step(iteration, interrupted)
                interval.add(result)
                reporter.advance()
                if due(self.config.logging.log_interval, iteration) or result.interrupted:
                    metrics = interval.take(self.state)
                    reporter.log(iteration, metrics)
                    reporter.say(
                        iteration_line(iteration, settings.train_iters, settings.global_batch_size, metrics)
                    )
                if due(settings.eval_interval, iteration):
                    evaluation = self.evaluate()
                    reporter.log(iteration, {"consumed-tokens": self.state.consumed_tokens, **evaluation})
                    reporter.say(evaluation_line(iteration, evaluation))
                if due(self.config.checkpoint.save_interval, iteration) or result.interrupted:
                    reporter.say(f" saved {self.save()}")
                interval.restart()
                if result.interrupted:
                    reporter.say(
                        f" interrupted: stopped after iteration {iteration}; the same command resumes"
                    )
                    break
        finally:
            reporter.close()

    def step(self, iteration: int, interrupted: list[int]) -> StepResult:
        """One optimizer step on the next global batch; all ranks agree whether one was interrupted.

        Raises:
            ValueError: loss or gradient norm is not finite; nothing was updated.
        """
        config = self.config
        indices = self.sampler.indices(self.state.consumed_samples, config.trainer.global_batch_size)
        slices = rank_slices(indices, config.trainer.micro_batch_size, self.axes.dp_rank, self.axes.dp_size)
        batches = [self._local_batch(self.train_data, chosen) for chosen in slices]
        # How many tokens carry loss, over all ranks: so each token weighs the same.
        loss_tokens = _sum_over_ranks(torch.stack([mask.sum() for *_, mask in batches]).sum())
        losses = accumulate_gradients(self.gpt, batches, loss_tokens)
        mine = losses.sum() / loss_tokens
        loss, stops = _sum_over_ranks(torch.stack([mine, mine.new_tensor(bool(interrupted))])).tolist()
        norm = clip_gradients(self.gpt, config.optimizer.clip_grad).item()
        self.gpt.engine.check()  # what a rank did not send is NaN: say that first
        if not (math.isfinite(loss) and math.isfinite(norm)):
            raise ValueError(self._blame(iteration, loss, norm, indices, slices, losses))
        lr = learning_rate(iteration, config.optimizer, config.scheduler)
        self.optimizer.step(lr)
        tokens = len(indices) * config.trainer.seq_length
        self.state = replace(
            self.state,
            iteration=iteration,
            consumed_samples=self.state.consumed_samples + len(indices),
            consumed_tokens=self.state.consumed_tokens + tokens,
        )
        return StepResult(loss, norm, lr, tokens, stops > 0)

    @torch.no_grad()
    def evaluate(self) -> dict[str, float]:
        """Validation loss (nats per token) and, where ids have exact bytes, bits per byte.

        Over eval_iters global batches of samples spread evenly over the validation split, or all of it.
        """
        settings = self.config.trainer
        samples = self.valid_data.spread(settings.eval_iters * settings.global_batch_size)
        total = torch.zeros(3, dtype=torch.float64, device=self.axes.device)  # nats, tokens, bytes
        for start in range(0, len(samples), settings.global_batch_size):
            places = np.arange(start, start + settings.global_batch_size)
            slices = rank_slices(places, settings.micro_batch_size, self.axes.dp_rank, self.axes.dp_size)
            for chosen in slices:
                # Past the end a sample is repeated without weight: every rank takes part in every batch.
                indices = samples[np.minimum(chosen, len(samples) - 1)]
                ids, labels, mask = self._local_batch(self.valid_data, indices)
                mask *= torch.from_numpy(chosen < len(samples)).to(mask)[:, None]
                num_bytes = mask if self.bytes_per_token is None else self.bytes_per_token[labels] * mask
                terms = (self.gpt(ids, labels, mask), mask, num_bytes)
                total += torch.stack([term.sum(dtype=torch.float64) for term in terms])
        reshard(self.gpt)
        nats, tokens, all_bytes = _sum_over_ranks(total).tolist()
        self.gpt.engine.check()
        loss = {"val/lm loss": nats / tokens}
        if self.bytes_per_token is None:
            return loss
        return {**loss, "val/bits-per-byte": nats / math.log(2) / all_bytes}

    def save(self) -> Path:
        """Saves weights, moments and the cursor; on all ranks."""
        texts = {"config.yaml": to_yaml(self.config)}
        checkpoints, tensors = self.folder / "checkpoints", self.optimizer.tensors()
        self.saved_at = self.state.iteration
        return checkpoint.save(checkpoints, self.state, self.gpt, tensors, texts, self.tokenizer)

    def _local_batch(self, data: GPTDataset, indices: np.ndarray) -> tuple[Tensor, Tensor, Tensor]:
        """This rank's zigzag share of the samples: ids, labels, mask [B, T/D]."""
        ids, labels, mask = (self.axes.take_local(t).to(self.axes.device) for t in load_batch(data, indices))
        return ids, labels, mask

    def _open_folder(self) -> None:
        if self.is_first:
            if find_checkpoint(self.config) != self.resumed_from:
                raise ValueError(f"another run saved into {self.folder} meanwhile: start again")
            checkpoint.replace_text(self.folder / "config.yaml", to_yaml(self.config))
        dist.barrier()

    def _greeting(self, start: int) -> str:
        shape = dict(zip(self.axes.mesh.mesh_dim_names or (), self.axes.mesh.shape, strict=True))
        parameters = sum(p.numel() for p in self.gpt.parameters())
        mesh = " x ".join(f"{name} {size}" for name, size in shape.items())
        begun = f"resumed after iteration {start}" if start else "new run"
        device = self.axes.device
        kernels = ", ".join(f"{k} {v}" for k, v in resolve(self.config.kernels, device).items())
        return (
            f"{self.folder}: {begun}; {parameters:,} parameters on {mesh} ({device.type})\nkernels: {kernels}"
        )

    def _blame(
        self,
        iteration: int,
        loss: float,
        norm: float,
        indices: np.ndarray,
        slices: list[np.ndarray],
        losses: Tensor,
    ) -> str:
        """What to say of a loss that is not finite: the iteration and the batch's documents."""
        finite = {
            int(sample): bool(sample_loss.isfinite())
            for chosen, sample_losses in zip(slices, losses, strict=True)
            for sample, sample_loss in zip(chosen, sample_losses, strict=True)
        }
        everywhere: list[dict[int, bool]] = [{}] * dist.get_world_size()
        dist.all_gather_object(everywhere, finite)
        bad = [int(s) for s in indices if not all(known.get(int(s), True) for known in everywhere)]
        names = list(dict.fromkeys(n for s in bad or indices for n in self.train_data.documents(int(s))))
        return (
            f"iteration {iteration}: loss {loss}, gradient norm {norm}; nothing was updated.\n"
            f"Documents of {'the samples whose loss is not finite' if bad else 'the batch'}: "
            f"{', '.join(names[:20])}{f' and {len(names) - 20} more' if len(names) > 20 else ''}.\n"
            f"Look at them, lower optimizer.lr or set optimizer.clip_grad; the last checkpoint is of "
            f"iteration {self.saved_at}" + ("" if self.saved_at else ", that is none")
        )

    def _sum_up(self) -> None:
        entries = read_metrics(self.folder / "metrics.jsonl")
        plot_loss(entries, self.folder / "loss.png", f"{self.config.name}, iteration {self.state.iteration}")
        print(f" checkpoint: {checkpoint.folder_of(self.folder / 'checkpoints', self.saved_at)}")
        print(
            f" metrics:    {self.folder / 'metrics.jsonl'}\n plot:       {self.folder / 'loss.png'}",
            flush=True,
        )


def load_data(config: Config, tokenizer: Tokenizer) -> tuple[GPTDataset, GPTDataset]:
    """The training and the validation split, checked against the model's vocabulary."""
    data, trainer = config.data, config.trainer
    train_data, valid_data = (
        GPTDataset(data.path[0], split, trainer.seq_length, tokenizer, data.valid_fraction, trainer.seed)
        for split in ("train", "valid")
    )
    train_data.check_vocabulary(config.model.vocab_size)
    return train_data, valid_data


def _is_due(every: int, iteration: int, last: int) -> bool:
    """Whether something is done after `iteration`: every so many (0: never), and always after the last."""
    return iteration == last or (every > 0 and iteration % every == 0)


@contextmanager
def _interrupts() -> Iterator[list[int]]:
    """A list that SIGINT is put into, instead of stopping this process."""
    seen: list[int] = []

    def note(signum: int, frame: FrameType | None) -> None:
        seen.append(signum)

    before = signal.signal(signal.SIGINT, note)
    try:
        yield seen
    finally:
        signal.signal(signal.SIGINT, before)


def _sum_over_ranks(tensor: Tensor) -> Tensor:
    dist.all_reduce(tensor)
    return tensor


def _from_first(text: str) -> str:
    box = [text]
    dist.broadcast_object_list(box, src=0)
    return box[0]


def _transfers(overlap: str) -> str:
    """How weights travel over tsp, as the log says it: each group has chosen for itself."""
    found = [""] * dist.get_world_size()
    dist.all_gather_object(found, overlap)
    kinds = dict.fromkeys(found)
    if len(kinds) == 1:
        return f"weights over tsp travel {overlap}"
    ranks = {kind: ", ".join(str(rank) for rank, own in enumerate(found) if own == kind) for kind in kinds}
    return "\n".join(f"weights over tsp travel {kind} (ranks {ranks[kind]})" for kind in kinds)
