"""What a run computes: its model, data and state on one rank, a step, an evaluation."""

import time
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist

from megatsp.axes import Axes
from megatsp.checkpoint import store
from megatsp.checkpoint.agree import on_first
from megatsp.checkpoint.state import RunState
from megatsp.comm import Traffic
from megatsp.data.blend import Blend
from megatsp.data.loader import Loader, Share, next_draws
from megatsp.data.splits import load_splits
from megatsp.data.tokenizer import load_tokenizer
from megatsp.hf.kept import stored_files
from megatsp.model.gpt import GPT
from megatsp.model.parallelize import build_model
from megatsp.schema import Config
from megatsp.training.bad_steps import Verdict, after_step, judge_step, way_back
from megatsp.training.base import Base
from megatsp.training.best import check_best
from megatsp.training.evaluate import evaluate
from megatsp.training.flops import own_pairs
from megatsp.training.folder import check_data, run_folder
from megatsp.training.gradients import Computed, compute_gradients, drop_gradients
from megatsp.training.interval import StepResult
from megatsp.training.messages import blame
from megatsp.training.optimizer import AdamW, scale_gradients
from megatsp.training.progress import is_due, is_over
from megatsp.training.ranks import on_device
from megatsp.training.rerun import rerun
from megatsp.training.resume import Resumed, find_candidates, load_newest
from megatsp.training.sampling import check_prompts
from megatsp.training.saving import Saves
from megatsp.training.schedule import learning_rate
from megatsp.training.stopping import Stopper
from megatsp.training.watchdog import Watchdog


class Steps:
    """One run on this rank. Everything that can be refused is refused before a file is written."""

    def __init__(self, config: Config, device: torch.device, watchdog: Watchdog | None = None) -> None:
        self.config = config
        self.beat = watchdog.beat if watchdog is not None else lambda what: None
        self.watchdog = watchdog
        self.tokenizer = load_tokenizer(config.data.tokenizer)
        check_prompts(config, self.tokenizer)
        self.data = load_splits(config, self.tokenizer)
        self.beat("the data were opened")
        self.folder = run_folder(config)
        self.candidates = find_candidates(config)
        self.resumed_from = self.candidates[0] if self.candidates else None
        if self.resumed_from is not None:
            self._check(self.resumed_from)
        self.base = Base(config, self.resumed_from, self.tokenizer) if config.finetune.hf else None
        dist.barrier()  # every rank has looked before one writes
        self.beat("the checkpoints were found")
        self.axes = Axes.build(config.parallel, device)
        if watchdog is not None:
            watchdog.traffic = self.axes.traffic
        self.waits = Traffic()  # of the loop itself, beside those of the axes
        trainer = config.trainer
        self.share = Share(
            trainer.global_batch_size, trainer.micro_batch_size, self.axes.dp_rank, self.axes.dp_size,
            self.axes.spans(trainer.seq_length),
        )  # fmt: skip
        self.gpt: GPT = build_model(config, self.axes)
        self.optimizer = AdamW(self.gpt, config.optimizer)
        self.beat("the model was built")
        self.state = RunState(data_key=self.data.key)
        self.resumed: Resumed | None = None  # and what loading it took
        self.kept: dict[str, bytes] = {}  # for every save, of the Hugging Face checkpoint that it came from
        if self.base is not None:
            self.kept = self.base.files
            self.base.fill(self.gpt, self.axes, is_new=self.resumed_from is None)
            self.state = replace(self.state, base_fingerprint=self.base.source.fingerprint)
        if self.resumed_from is not None:
            tensors = self.optimizer.tensors()
            self.resumed = load_newest(config, self.candidates, self.gpt, tensors, self._check)
            self.resumed_from = self.resumed.folder
            if self.base is None:  # of an imported run; now, for retention may remove that folder
                self.kept = on_first(partial(stored_files, self.resumed_from))
            self.state = replace(self.resumed.state, data_key=self.data.key)  # the same, or not known then
            self.optimizer.loaded(self.state.iteration - self.state.skipped_steps)
            check_best(config, self.folder / "checkpoints", self.state)
        self.beat("the weights were loaded")
        self.is_first = dist.get_rank() == 0

    def _check(self, found: Path) -> None:
        """Refuses a checkpoint of another tokenizer or of other data."""
        store.check_tokenizer(found, self.tokenizer)
        check_data(self.config, found, self.data.key)

    @property
    def is_over(self) -> bool:
        """Whether there is nothing left to do."""
        return is_over(self.config, self.state)

    def _is_due(self, every: int) -> bool:
        return is_due(self.config, self.state, every)

    def loader(self) -> Loader:
        """The batches that come next, for `step`."""
        pin = self.axes.device.type == "cuda"
        where = self.state.consumed_samples, self.share, self.config.data, pin, self.state.skipped_samples
        return Loader(self.data.train, *where)

    def step(
        self, iteration: int, loader: Loader, stopper: Stopper | None = None, saves: Saves | None = None
    ) -> StepResult:
        """One optimizer step on the next global batch; all ranks agree on what becomes of it.

        Raises:
            ValueError: data that cannot be read; too many steps in a row that are not finite.
        """
        config = self.config
        since = time.perf_counter()
        batches = [on_device(next(loader), self.axes.device) for _ in range(self.share.num_micro_batches)]
        wait_ms = 1e3 * (time.perf_counter() - since)

        def compute() -> Computed:
            asked, finished = stopper and stopper.asked(), saves and saves.finished
            pairs = own_pairs(batches, self.share, self.axes, config.trainer.seq_length)
            given = pairs, float(bool(asked)), float(bool(finished))
            return compute_gradients(self.gpt, batches, given, self.waits, self.beat)

        computed = compute()
        lines: list[str] = []
        is_machine = False
        if not computed.is_finite and config.trainer.rerun_bad_steps:
            again = rerun(self.gpt, computed, compute)
            lines.append(again.line)
            computed, is_machine = again.computed, bool(again.suspects) and not again.computed.is_finite
        judgement = judge_step(computed.loss, computed.is_finite, is_machine, self.state, config.trainer)
        if judgement.done:
            text = blame(self.data.train, self.share, self.state, computed, judgement.done)
            lines.append(text if judgement.verdict is Verdict.STOP else f" {text}")
        lr = learning_rate(iteration, config.optimizer, config.scheduler)
        if judgement.verdict is Verdict.UPDATE:
            scale_gradients(self.gpt, config.optimizer.clip_grad, computed.norm)
            self.optimizer.step(lr)
        else:
            drop_gradients(self.gpt)
        pairs, asked, finished = computed.sums
        samples = config.trainer.global_batch_size
        before = self.state
        _, cursor = next_draws(self.data.train, before.consumed_samples, samples, before.skipped_samples)
        back = None
        if judgement.verdict in (Verdict.UPDATE, Verdict.SKIP):
            self.state = after_step(
                before, judgement, computed.is_finite, computed.loss, cursor, config.trainer
            )
        elif judgement.verdict is Verdict.ROLL_BACK:
            back = way_back(before, cursor, computed.is_finite)
        tokens = samples * config.trainer.seq_length
        return StepResult(
            computed.loss, computed.grad_norm, lr, tokens, pairs, wait_ms, judgement.verdict, tuple(lines),
            asked, finished, back,
        )  # fmt: skip

    def evaluate(
        self, blend: Blend | None, split: str, stopper: Stopper | None = None
    ) -> dict[str, float] | None:
        """Its loss by the metrics' names, over eval_iters global batches: see `megatsp.training.evaluate`.

        {} if there is no such split; None if it was cut off.
        """
        if blend is None:
            return {}
        settings = self.config.trainer

        def is_cut_off() -> bool:
            self.beat(f"a batch of {split}")
            return stopper is not None and stopper.check(self.axes.device)

        where = self.gpt, self.axes.device, blend, split, settings.eval_iters * settings.global_batch_size
        return evaluate(*where, self.share, self.tokenizer, is_cut_off)
