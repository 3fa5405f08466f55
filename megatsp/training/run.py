"""The training run, read top to bottom: set up, step, evaluate, log, save, sum up."""

import math
import signal
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from types import FrameType

import torch
import torch.distributed as dist

from megatsp.axes import Axes, choose_device, join
from megatsp.checkpoint import paths, store
from megatsp.checkpoint.state import RunState
from megatsp.compose import to_yaml
from megatsp.data.blend import Blend
from megatsp.data.loader import Loader, Share
from megatsp.data.splits import load_splits
from megatsp.data.tokenizer import load_tokenizer
from megatsp.hf.kept import stored_files
from megatsp.model.gpt import GPT
from megatsp.model.parallelize import build_model
from megatsp.schema import Config
from megatsp.training.base import Base
from megatsp.training.best import check_best, is_exhausted, judge, point_to_best
from megatsp.training.evaluate import evaluate
from megatsp.training.flops import attended_pairs
from megatsp.training.folder import check_data, find_checkpoints, lock, run_folder
from megatsp.training.give_back import give_back
from megatsp.training.interval import Interval, StepResult
from megatsp.training.logs import Reporter, evaluation_line, iteration_line, read_metrics
from megatsp.training.messages import blame, greeting, source_lines, transfers
from megatsp.training.optimizer import AdamW, clip_gradients
from megatsp.training.plot import plot_loss
from megatsp.training.ranks import from_first, on_device, sum_over_ranks
from megatsp.training.resume import Resumed, find_candidates, load_newest
from megatsp.training.schedule import learning_rate
from megatsp.training.step import Batch, accumulate_gradients
from megatsp.validate import validate


def train(config: Config) -> None:
    """Trains on this rank, of the ranks that a launcher started; all call it with the same config.

    A run that has a checkpoint goes on from it. SIGINT ends it after the current step, saved. What was
    tuned is exported at the end, by rank 0 alone.

    Raises:
        ValueError: the configuration, the data or the run's folder cannot be used, or the loss is
            not finite.
    """
    device = choose_device(config.launch.device)
    join(device, config.launch.timeout_s)
    try:
        config = validate(config, dist.get_world_size())
        with _interrupts() as interrupted:
            training = Training(config, device)
            was_over = training.ended
            gives_back = training.run(interrupted) and training.is_first and config.finetune.hf
            del training  # and its memory
    finally:
        dist.destroy_process_group()
    if gives_back:  # now: no rank waits in a collective, however long it takes
        give_back(config, again=not was_over)


class Training:
    """One run on this rank. Everything that can be refused is refused before a file is written."""

    def __init__(self, config: Config, device: torch.device) -> None:
        self.config = config
        self.tokenizer = load_tokenizer(config.data.tokenizer)
        self.data = load_splits(config, self.tokenizer)
        self.folder = run_folder(config)
        self.candidates = find_candidates(config)
        self.resumed_from = self.candidates[0] if self.candidates else None
        if self.resumed_from is not None:
            self._check(self.resumed_from)
        self.base = Base(config, self.resumed_from, self.tokenizer) if config.finetune.hf else None
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
        self.resumed: Resumed | None = None  # and what loading it took
        if self.base is not None:
            self.base.fill(self.gpt, self.axes, is_new=self.resumed_from is None)
            self.state = replace(self.state, base_fingerprint=self.base.source.fingerprint)
        if self.resumed_from is not None:
            tensors = self.optimizer.tensors()
            self.resumed = load_newest(config, self.candidates, self.gpt, tensors, self._check)
            self.resumed_from = self.resumed.folder
            self.state = replace(self.resumed.state, data_key=self.data.key)  # the same, or not known then
            self.optimizer.loaded(self.state.iteration)
            self.saved_at = self.state.iteration
            check_best(config, self.folder / "checkpoints", self.state)
        self.is_first = dist.get_rank() == 0

    def _check(self, found: Path) -> None:
        """Refuses a checkpoint of another tokenizer or of other data."""
        store.check_tokenizer(found, self.tokenizer)
        check_data(self.config, found, self.data.key)

    def run(self, interrupted: list[int]) -> bool:
        """Trains to the end, or to the step in which a rank was interrupted; returns whether it is whole."""
        if self.ended:
            if self.is_first:
                print(f"{self.folder} {self._why_ended()}")
            return True
        with lock(self.folder) if self.is_first else nullcontext():
            self._open_folder()
            self._loop(self.state.iteration, interrupted)
        self.gpt.engine.close()
        if self.is_first:
            self._sum_up()
        return not interrupted and self.ended

    @property
    def ended(self) -> bool:
        """Whether there is nothing left to train."""
        last = self.config.trainer.train_iters
        return self.state.iteration >= last or is_exhausted(self.config, self.state)

    def _why_ended(self) -> str:
        state = self.state
        if state.iteration >= self.config.trainer.train_iters:
            return f"is at iteration {state.iteration} already; to go on, raise trainer.train_iters"
        return (
            f"stopped after iteration {state.iteration}: {state.evaluations_without_gain} evaluations had no "
            f"lower loss than {state.best_loss:.4f}, of iteration {state.best_iteration}; to go on, raise "
            "finetune.early_stopping"
        )

    def _loop(self, start: int, interrupted: list[int]) -> None:
        """Steps, evaluations, log lines and checkpoints after iteration `start`."""
        settings = self.config.trainer
        reporter = Reporter(self.config, self.folder, start, self.state.wandb_run_id, self.is_first)
        self.state = replace(self.state, wandb_run_id=from_first(reporter.wandb_run_id))
        self._introduce(start, reporter)
        interval = Interval(self.config, self.axes)
        loader = self.loader()
        try:
            if self.base is not None and start == 0:
                self._evaluate("val", reporter)
            interval.restart()
            for iteration in range(start + 1, settings.train_iters + 1):
                result = self.step(iteration, loader, interrupted)
                interval.add(result)
                reporter.advance()
                logs = self._is_due(self.config.logging.log_interval) or result.interrupted
                if logs:
                    self._log(interval, reporter)
                is_best = self._is_due(settings.eval_interval) and self._evaluate("val", reporter)
                if self.ended:  # perhaps by what was just found
                    if not logs:
                        self._log(interval, reporter)
                    self._evaluate("test", reporter)
                if is_best or self._is_due(self.config.checkpoint.save_interval) or result.interrupted:
                    reporter.say(f" saved {self.save()}")
                interval.restart()
                if result.interrupted:
                    reporter.say(
                        f" interrupted: stopped after iteration {iteration}; the same command resumes"
                    )
                    break
                if self.ended:
                    if iteration < settings.train_iters:
                        reporter.say(f" {self._why_ended()}")
                    break
        finally:
            loader.close()
            reporter.close()

    def _is_due(self, every: int) -> bool:
        """Whether something is done after this iteration: every so many (0: never), and always at the end."""
        return self.ended or (every > 0 and self.state.iteration % every == 0)

    def _introduce(self, start: int, reporter: Reporter) -> None:
        reporter.say(greeting(self.config, self.axes, self.gpt, start))
        reporter.say(transfers(str(self.gpt.engine.overlap)))
        for line in self.base.lines(self.gpt) if self.base is not None else ():
            reporter.say(line)
        for line in source_lines(self.config, self.data):
            reporter.say(line)

    def _log(self, interval: Interval, reporter: Reporter) -> None:
        settings, iteration = self.config.trainer, self.state.iteration
        metrics = interval.take(self.state)
        reporter.log(iteration, metrics)
        reporter.say(iteration_line(iteration, settings.train_iters, settings.global_batch_size, metrics))

    def _evaluate(self, split: str, reporter: Reporter) -> bool:
        """Evaluates a split if there is one; whether its loss is the lowest of weights that were tuned."""
        blend = {"val": self.data.valid, "test": self.data.test}[split]
        if blend is None:
            return False
        found = self.evaluate(blend, split)
        reporter.log(self.state.iteration, {"consumed-tokens": self.state.consumed_tokens, **found})
        reporter.say(evaluation_line(self.state.iteration, split, found))
        if self.base is None or split != "val" or not found or not self.state.iteration:
            return False
        self.state = judge(self.state, found["val/lm loss"])
        return self.state.best_iteration == self.state.iteration

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
        batches = [on_device(next(loader), self.axes.device) for _ in range(self.share.num_micro_batches)]
        wait_ms = 1e3 * (time.perf_counter() - since)
        # How many tokens carry loss, over all ranks: so each token weighs the same.
        own = torch.stack([mask.sum(dtype=torch.float64) for _, _, mask, _ in batches]).sum()
        loss_tokens = sum_over_ranks(own).clamp(min=1).float()
        losses = accumulate_gradients(self.gpt, batches, loss_tokens)
        mine = losses.sum(dtype=torch.float64) / loss_tokens
        found = [mine, mine.new_tensor(bool(interrupted)), mine.new_tensor(self._own_pairs(batches))]
        loss, stops, pairs = sum_over_ranks(torch.stack(found)).tolist()
        norm = clip_gradients(self.gpt, config.optimizer.clip_grad).item()
        self.gpt.engine.check()  # what a rank did not send is NaN: say that first
        if not (math.isfinite(loss) and math.isfinite(norm)):
            raise ValueError(
                blame(self.data.train, self.share, self.state, self.saved_at, loss, norm, losses)
            )
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

    def evaluate(self, blend: Blend, split: str) -> dict[str, float]:
        """Its loss by the metrics' names, over eval_iters global batches: see `megatsp.training.evaluate`."""
        settings = self.config.trainer
        num_samples = settings.eval_iters * settings.global_batch_size
        return evaluate(self.gpt, self.axes.device, blend, split, num_samples, self.share, self.tokenizer)

    def save(self) -> Path:
        """Saves what is trained, its moments and the cursor; on all ranks."""
        extra = {"config.yaml": to_yaml(self.config).encode()}
        if self.base is not None:
            extra |= self.base.files
        elif self.resumed_from is not None:
            extra |= stored_files(self.resumed_from)  # of an imported run
        checkpoints, tensors = self.folder / "checkpoints", self.optimizer.tensors()
        self.saved_at = self.state.iteration
        saved = store.save(checkpoints, self.state, self.gpt, tensors, extra, self.tokenizer)
        if self.base is not None and self.is_first:
            point_to_best(checkpoints, self.state)
        return saved

    def _own_pairs(self, batches: Sequence[Batch]) -> float:
        """This rank's share of the pairs of tokens that attend to each other."""
        length, sharers = self.config.trainer.seq_length, dist.get_world_size() // self.axes.dp_size
        plain = self.share.micro_batch_size * length * length / 2  # as `flops_per_token` counts
        return sum(plain if first is None else attended_pairs(first) for *_, first in batches) / sharers

    def _open_folder(self) -> None:
        if self.is_first:
            if find_checkpoints(self.config, lambda line: None) != self.candidates:
                raise ValueError(f"another run saved into {self.folder} meanwhile: start again")
            paths.replace_text(self.folder / "config.yaml", to_yaml(self.config))
            if self.base is not None:
                self.base.write_report(self.folder)
                point_to_best(self.folder / "checkpoints", self.state)
        dist.barrier()

    def _sum_up(self) -> None:
        entries = read_metrics(self.folder / "metrics.jsonl")
        plot_loss(entries, self.folder / "loss.png", f"{self.config.name}, iteration {self.state.iteration}")
        print(f" checkpoint: {paths.folder_of(self.folder / 'checkpoints', self.saved_at)}")
        print(
            f" metrics:    {self.folder / 'metrics.jsonl'}\n plot:       {self.folder / 'loss.png'}",
            flush=True,
        )


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
