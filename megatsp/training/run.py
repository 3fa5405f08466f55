"""The training run, read top to bottom: set up, step, evaluate, log, save, sum up."""

import math
import signal
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import FrameType

import torch
import torch.distributed as dist
from torch import Tensor

from megatsp.axes import Axes, choose_device, join
from megatsp.compose import to_yaml
from megatsp.data.blend import Blend, Draw
from megatsp.data.loader import HostBatch, Loader, Share, read_batch
from megatsp.data.splits import load_splits
from megatsp.data.tokenizer import load_tokenizer
from megatsp.kernels import resolve
from megatsp.model.gpt import GPT
from megatsp.model.parallelize import build_model, reshard
from megatsp.schema import Config
from megatsp.training import checkpoint
from megatsp.training.checkpoint import RunState
from megatsp.training.flops import attended_pairs
from megatsp.training.folder import check_data, find_checkpoint, lock, run_folder
from megatsp.training.interval import Interval, StepResult
from megatsp.training.logs import Reporter, evaluation_line, iteration_line, read_metrics
from megatsp.training.optimizer import AdamW, clip_gradients
from megatsp.training.plot import plot_loss
from megatsp.training.schedule import learning_rate
from megatsp.training.step import Batch, accumulate_gradients
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
        self.data = load_splits(config, self.tokenizer)
        self.folder = run_folder(config)
        self.resumed_from = find_checkpoint(config)
        if self.resumed_from is not None:
            checkpoint.check_tokenizer(self.resumed_from, self.tokenizer)
            check_data(config, self.resumed_from, self.data.key)
        dist.barrier()  # every rank has looked before one writes
        self.axes = Axes.build(config.parallel, device)
        trainer = config.trainer
        self.share = Share(
            trainer.global_batch_size, trainer.micro_batch_size, self.axes.dp_rank, self.axes.dp_size,
            self.axes.spans(trainer.seq_length),
        )  # fmt: skip
        self.gpt: GPT = build_model(config, self.axes)
        self.optimizer = AdamW(self.gpt, config.optimizer)
        self.state = RunState(data_key=self.data.key)
        self.saved_at = 0
        if self.resumed_from is not None:
            saved = checkpoint.load(self.resumed_from, self.gpt, self.optimizer.tensors())
            self.state = replace(saved, data_key=self.data.key)  # the same, or not known then
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
        for line in self._sources():
            reporter.say(line)
        interval = Interval(self.config, self.axes)
        due = partial(_is_due, last=settings.train_iters)
        loader = self.loader()
        try:
            for iteration in range(start + 1, settings.train_iters + 1):
                result = self.step(iteration, loader, interrupted)
                interval.add(result)
                reporter.advance()
                if due(self.config.logging.log_interval, iteration) or result.interrupted:
                    metrics = interval.take(self.state)
                    reporter.log(iteration, metrics)
                    reporter.say(
                        iteration_line(iteration, settings.train_iters, settings.global_batch_size, metrics)
                    )
                for split, blend in (("val", self.data.valid), ("test", self.data.test)):
                    every = settings.eval_interval if split == "val" else 0
                    if blend is not None and due(every, iteration):
                        evaluation = self.evaluate(blend, split)
                        reporter.log(iteration, {"consumed-tokens": self.state.consumed_tokens, **evaluation})
                        reporter.say(evaluation_line(iteration, split, evaluation))
                if due(self.config.checkpoint.save_interval, iteration) or result.interrupted:
                    reporter.say(f" saved {self.save()}")
                interval.restart()
                if result.interrupted:
                    reporter.say(
                        f" interrupted: stopped after iteration {iteration}; the same command resumes"
                    )
                    break
        finally:
            loader.close()
            reporter.close()

    def loader(self) -> Loader:
        """The batches that come next, for `step`."""
        pin = self.axes.device.type == "cuda"
        return Loader(self.data.train, self.state.consumed_samples, self.share, self.config.data, pin)

    def step(self, iteration: int, loader: Loader, interrupted: list[int]) -> StepResult:
        """One optimizer step on the next global batch; all ranks agree whether one was interrupted.

        Raises:
            ValueError: data that cannot be read; loss or gradient norm is not finite; nothing was updated.
        """
        config = self.config
        since = time.perf_counter()
        batches = [self._on_device(next(loader)) for _ in range(self.share.num_micro_batches)]
        wait_ms = 1e3 * (time.perf_counter() - since)
        # How many tokens carry loss, over all ranks: so each token weighs the same.
        own = torch.stack([mask.sum(dtype=torch.float64) for _, _, mask, _ in batches]).sum()
        loss_tokens = _sum_over_ranks(own).clamp(min=1).float()
        losses = accumulate_gradients(self.gpt, batches, loss_tokens)
        mine = losses.sum(dtype=torch.float64) / loss_tokens
        found = [mine, mine.new_tensor(bool(interrupted)), mine.new_tensor(self._own_pairs(batches))]
        loss, stops, pairs = _sum_over_ranks(torch.stack(found)).tolist()
        norm = clip_gradients(self.gpt, config.optimizer.clip_grad).item()
        self.gpt.engine.check()  # what a rank did not send is NaN: say that first
        if not (math.isfinite(loss) and math.isfinite(norm)):
            raise ValueError(self._blame(iteration, loss, norm, losses))
        lr = learning_rate(iteration, config.optimizer, config.scheduler)
        self.optimizer.step(lr)
        samples = config.trainer.global_batch_size
        tokens = samples * config.trainer.seq_length
        self.state = replace(
            self.state,
            iteration=iteration,
            consumed_samples=self.state.consumed_samples + samples,
            consumed_tokens=self.state.consumed_tokens + tokens,
        )
        return StepResult(loss, norm, lr, tokens, pairs, wait_ms, stops > 0)

    @torch.no_grad()
    def evaluate(self, blend: Blend, split: str) -> dict[str, float]:
        """Loss (nats per token) and, where the tokenizer's ids have exact bytes, bits per byte; {} if no
        token is trained.

        Over eval_iters global batches of samples spread evenly over the split, or all of it.
        """
        size = self.config.trainer.global_batch_size
        draws = blend.spread(self.config.trainer.eval_iters * size)
        bytes_per_token = self.tokenizer.bytes_per_token()
        widths = None if bytes_per_token is None else torch.from_numpy(bytes_per_token).to(self.axes.device)
        total = torch.zeros(3, dtype=torch.float64, device=self.axes.device)  # nats, tokens, bytes
        for start in range(0, len(draws), size):
            # Past the end the last sample is repeated without weight: every rank takes part in every batch.
            places = range(start, start + size)
            for chosen in self.share.micro_batches(places):
                host = read_batch(blend, [draws[min(p, len(draws) - 1)] for p in chosen], self.share.spans)
                ids, labels, mask, first = self._on_device(host)
                mask *= mask.new_tensor([float(p < len(draws)) for p in chosen])[:, None]
                total[0] += self.gpt(ids, labels, mask, first).sum(dtype=torch.float64)
                total[1] += mask.sum(dtype=torch.float64)
                if widths is not None:
                    total[2] += (widths[labels] * mask).sum(dtype=torch.float64)
        reshard(self.gpt)
        nats, tokens, num_bytes = _sum_over_ranks(total).tolist()
        self.gpt.engine.check()
        if not tokens:  # all are masked: there is no loss
            return {}
        losses = {f"{split}/lm loss": nats / tokens}
        return losses | ({f"{split}/bits-per-byte": nats / math.log(2) / num_bytes} if num_bytes else {})

    def save(self) -> Path:
        """Saves weights, moments and the cursor; on all ranks."""
        extra = {"config.yaml": to_yaml(self.config).encode()}
        checkpoints, tensors = self.folder / "checkpoints", self.optimizer.tensors()
        self.saved_at = self.state.iteration
        return checkpoint.save(checkpoints, self.state, self.gpt, tensors, extra, self.tokenizer)

    def _own_pairs(self, batches: Sequence[Batch]) -> float:
        """This rank's share of the pairs of tokens that attend to each other."""
        length, sharers = self.config.trainer.seq_length, dist.get_world_size() // self.axes.dp_size
        plain = self.share.micro_batch_size * length * length / 2  # as `flops_per_token` counts
        return sum(plain if first is None else attended_pairs(first) for *_, first in batches) / sharers

    def _on_device(self, batch: HostBatch) -> Batch:
        """The batch where the model is; `first` stays on the host, where documents are planned."""
        *tensors, first = batch
        ids, labels, mask = (tensor.to(self.axes.device, non_blocking=True) for tensor in tensors)
        return ids, labels, mask, first

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

    def _sources(self) -> Iterator[str]:
        """What the log says of the data: sources, weights, and how often this run reads them."""
        settings = self.config.trainer
        samples = settings.train_iters * settings.global_batch_size
        for source in self.data.train.sources:
            yield (
                f"data: {source.name}: {source.weight:.1%} of the samples, {len(source.samples):,} an epoch, "
                f"{source.epochs(samples):.3g} epochs in {settings.train_iters} iterations"
            )
            if any(shard.info is None for shard in source.samples.corpus.shards):
                yield f"data: {source.name} does not say which tokenizer made it: that is not checked"
        if self.data.valid is None:
            yield "data: no validation split (data.valid_fraction=0): there is no validation loss"

    def _blame(self, iteration: int, loss: float, norm: float, losses: Tensor) -> str:
        """What to say of a loss that is not finite: the iteration and the batch's documents."""
        draws = self.data.train.draw(self.state.consumed_samples, self.share.global_batch_size)
        finite: dict[Draw, bool] = {}
        for chosen, sample_losses in zip(self.share.micro_batches(draws), losses, strict=True):
            finite |= {draw: bool(own.isfinite()) for draw, own in zip(chosen, sample_losses, strict=True)}
        everywhere: list[dict[Draw, bool]] = [{}] * dist.get_world_size()
        dist.all_gather_object(everywhere, finite)
        bad = [draw for draw in draws if not all(known.get(draw, True) for known in everywhere)]
        names = list(dict.fromkeys(name for draw in bad or draws for name in self.data.train.names(draw)))
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
