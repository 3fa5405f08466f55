"""The training run, read top to bottom: set up, step, evaluate, log, save, sum up."""

import os
import sys
from contextlib import ExitStack, nullcontext, suppress
from dataclasses import replace
from functools import partial
from types import TracebackType

import torch.distributed as dist

from megatsp import exit_status, launcher
from megatsp.axes import choose_device, join
from megatsp.checkpoint import paths, store
from megatsp.checkpoint.retention import finish_removals
from megatsp.compose import to_yaml
from megatsp.schema import Config
from megatsp.training.bad_steps import Back, Verdict, rolled_back
from megatsp.training.best import judge, point_to_best
from megatsp.training.events import Event, of_end, of_start, of_step
from megatsp.training.folder import Busy, find_checkpoints, forget_other_run, lock, run_folder, set_aside
from megatsp.training.give_back import give_back
from megatsp.training.interval import Interval
from megatsp.training.last_words import last_words, say_lost, sum_up
from megatsp.training.logs import Reporter, evaluation_line, iteration_line
from megatsp.training.messages import advice, greeting, source_lines, transfers
from megatsp.training.origin import about
from megatsp.training.out_of_memory import explain, is_out_of_memory, record_history
from megatsp.training.profile import Profiler
from megatsp.training.progress import has_ended, is_over, owes_evaluation, why_ended
from megatsp.training.ranks import from_first
from megatsp.training.rollback import first_state, load_before
from megatsp.training.sampling import is_due, make_samples
from megatsp.training.saving import Saves
from megatsp.training.slow_ranks import SlowRanks
from megatsp.training.steps import Steps
from megatsp.training.stopping import CutOff, Stop, Stopper
from megatsp.training.watchdog import Watchdog
from megatsp.validate import validate


def train(config: Config, stopper: Stopper) -> int:
    """Trains on this rank, of the ranks that a launcher started; all call it with the same config.

    A run that has a checkpoint goes on from it. What `stopper` hears ends it in good order, saved. What was
    tuned is exported at the end, by rank 0 alone.

    Returns the exit status: see `megatsp.exit_status`.

    Raises:
        ValueError: the configuration, the data or the run's folder cannot be used, or too many steps in a
            row have numbers that are not finite.
    """
    device = choose_device(config.launch.device)
    stopper.limit_to(config.trainer.exit_duration_in_mins)
    join(device, config.launch.timeout_s)
    training: Training | None = None
    try:
        config = validate(config, dist.get_world_size())
        record_history(config, device)
        with Watchdog(run_folder(config), config.trainer.hang_timeout_s) as watchdog:
            training = Training(config, device, watchdog)
            was_over = training.is_over
            status = training.run(stopper)
            gives_back = training.is_over and status == 0 and training.is_first and config.finetune.hf
        training = None  # and its memory
    except Exception as error:
        if is_out_of_memory(error):
            gpt, optimizer = (training.gpt, training.optimizer) if training is not None else (None, None)
            where = run_folder(config), dist.get_rank()
            print(explain(error, config, dist.get_world_size(), gpt, optimizer, *where), file=sys.stderr)
        if device.type == "cpu":  # NCCL would wait here for ranks that wait for this one
            dist.destroy_process_group()
        raise
    dist.destroy_process_group()
    if not gives_back:
        return status
    try:  # now: no rank waits in a collective, however long it takes
        with stopper.cutting_off():
            give_back(config, again=not was_over)
    except CutOff:
        stop = Stop((tuple(stopper.heard),))
        print(f" the export was cut off; the same command begins it again\n{stop.line(stop.status)}")
        return stop.status
    return 0


class Training(Steps):
    """A run on this rank: the loop around its steps, and what it reports and saves."""

    _owes_save = False  # one was due amid bad steps
    _sampled_at = 0  # the iteration of the last samples
    _status = 0  # with which this start ends, unless by an error

    def run(self, stopper: Stopper | None = None) -> int:
        """Trains to the end, or to where all ranks agree to stop; returns the exit status."""
        if self.is_over:
            if self.is_first:
                with suppress(OSError):  # what is over needs no disk
                    finish_removals(self.folder / "checkpoints")
                print(f"{self.folder} {why_ended(self.config, self.state)}")
            return 0
        stopper = stopper or Stopper()
        with lock(self.folder, self._patience_s(), stopper.asked) if self.is_first else nullcontext():
            self._open_folder()
            status = self._train(stopper)
        self.gpt.engine.close()
        dist.barrier()  # a launcher ends all ranks once one has ended with another status than 0
        return status

    def _train(self, stopper: Stopper) -> int:
        """The loop with what it reports and saves to; the exit status."""
        state, config = self.state, self.config
        start = state.iteration
        is_cut_back = start > 0 and owes_evaluation(config, state)
        origin = about(self.axes)
        reporter = Reporter(
            config, self.folder, start, state.wandb_run_id, self.is_first, is_cut_back, origin
        )
        with ExitStack() as stack:
            stack.push(partial(self._close, reporter))
            if self.watchdog is not None:
                self.watchdog.on_hang = reporter.hang
                stack.callback(setattr, self.watchdog, "on_hang", None)
            self.state = replace(state, wandb_run_id=from_first(reporter.wandb_run_id))
            self._sampled_at = int(from_first(str(reporter.sampled_at)))
            reporter.event(of_start(start, origin))
            self._introduce(start, reporter)
            has_best = self.base is not None
            saves = Saves(self.folder / "checkpoints", config.checkpoint, self.state, has_best, self.beat)
            stack.enter_context(saves)
            where = config, self.folder, self.axes.device
            profiler = stack.enter_context(Profiler(*where, start=start, say=reporter.say))
            is_sound = self._loop(stopper, reporter, saves, profiler)
            if is_sound and not saves.has(self.state):
                self._save(saves, reporter)
            self.beat("waiting for the last save")
            lost = saves.close(self.state, reporter)
            status = exit_status.NOT_SAVED if lost is not None else 0
            if not is_sound:
                status = exit_status.HARDWARE
            elif stopper.stop is not None and not self.is_over and not status:
                status = stopper.stop.status
            self._status = status
            for line in last_words(config, self.state, stopper.stop, status):
                reporter.say(line)
            reporter.event(of_end(config, self.state, stopper.stop, status))
            if lost is not None and self.is_first:
                say_lost(lost, saves.saved_at)
        if self.is_first:
            sum_up(self.folder, config.name, self.state.iteration, saves.saved_at)
        return status

    def _close(
        self,
        reporter: Reporter,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Ends what is reported, with the error that ends this start, if one does."""
        good = (0, exit_status.REQUEUE, exit_status.INTERRUPTED)
        exit_code = 0 if self._status in good else self._status
        if error is not None:
            exit_code = exit_status.FAILURE
            text = f"{type(error).__name__}: {error}"
            reporter.event(Event("failed", self.state.iteration, text, "ERROR"))
        is_open = owes_evaluation(self.config, self.state) or self._owes_samples()
        reporter.close(row_is_open=is_open, exit_code=exit_code)

    def _owes_samples(self) -> bool:
        return is_due(self.config, self.state, self._sampled_at)

    def _loop(self, stopper: Stopper, reporter: Reporter, saves: Saves, profiler: Profiler) -> bool:
        """Steps, and what is due after each, until the run is over or asked to stop.

        Returns False if it ends because a machine is suspected.
        """
        interval = Interval(self.config, self.axes, self.waits)
        if self.resumed is not None:
            interval.note({"checkpoint/load-s": self.resumed.seconds})
        slow = SlowRanks(self.config.logging.slow_rank_factor, self.axes.device)
        goes_on = not stopper.check(self.axes.device) and self._after_step(stopper, reporter, saves)
        loader = self.loader()
        try:
            interval.restart()
            while goes_on and not is_over(self.config, self.state):
                before, iteration = self.state, self.state.iteration + 1
                result = self.step(iteration, loader, stopper, saves)
                for line in result.lines[: -1 if result.verdict is Verdict.STOP else None]:
                    reporter.say(line)
                for event in of_step(before, self.state, result.lines):
                    reporter.event(event)
                if result.verdict is Verdict.SUSPECT:
                    return False
                if result.verdict is Verdict.STOP:
                    saves.wait(self.state, reporter)
                    raise ValueError(f"{result.lines[-1]}.\n{advice(saves.saved_at)}")
                if result.verdict is Verdict.ROLL_BACK:
                    loader.close()
                    assert result.back is not None
                    reporter.event(Event("rollback", iteration, "\n".join(result.lines), "WARN"))
                    self._roll_back(result.back, saves, reporter)
                    loader = self.loader()
                    interval = Interval(self.config, self.axes, self.waits)
                    continue
                slow.add(interval.add(result))
                reporter.advance()
                profiler.step(iteration)
                if result.finished == dist.get_world_size():
                    self.state = saves.report(self.state, reporter)
                stops = stopper.agree(result.asked)
                if logs := self._is_due(self.config.logging.log_interval) or stops:
                    self._log(interval, slow, reporter)
                goes_on = not stops and self._after_step(stopper, reporter, saves)
                if not logs and (self.is_over or not goes_on):  # by what was just found, or heard
                    self._log(interval, slow, reporter)
                reporter.begin_wandb()
                interval.restart()
        finally:
            loader.close()
        return True

    def _after_step(self, stopper: Stopper, reporter: Reporter, saves: Saves) -> bool:
        """The evaluation and the save that are due here; False if the evaluation was cut off."""
        if owes_evaluation(self.config, self.state) and not self._evaluate(stopper, reporter):
            return False
        if self._owes_samples():
            self._sample(reporter)
        state = self.state
        self._owes_save |= self._is_due(self.config.checkpoint.save_interval)
        # Not amid bad steps: the newest checkpoint is one from before them. But a best one has no other time.
        is_best = state.best_iteration == state.iteration
        if is_best or self.is_over or (self._owes_save and not state.bad_steps_in_a_row):
            self._owes_save = False
            if not saves.has(state):
                self._save(saves, reporter)
        return True

    def _evaluate(self, stopper: Stopper, reporter: Reporter) -> bool:
        """Evaluates what is due here; False if that was cut off, and then nothing of it counts."""
        state = self.state
        found = {"val": self.evaluate(self.data.valid, "val", stopper)}
        if self.base is not None and state.iteration and found["val"]:
            state = judge(state, found["val"]["val/lm loss"])
        if found["val"] is not None and has_ended(self.config, state):  # perhaps by what was just found
            found["test"] = self.evaluate(self.data.test, "test", stopper)
        if any(metrics is None for metrics in found.values()):
            return False
        for split, metrics in found.items():
            if {"val": self.data.valid, "test": self.data.test}[split] is not None and metrics is not None:
                reporter.log(state.iteration, {"consumed-tokens": state.consumed_tokens, **metrics})
                reporter.say(evaluation_line(state.iteration, split, metrics))
        self.state = replace(state, evaluated_at=state.iteration)
        return True

    def _sample(self, reporter: Reporter) -> None:
        """Lets the model continue texts, on all ranks."""
        made = make_samples(self.gpt, self.axes, self.tokenizer, self.config, self.beat)
        self._sampled_at = self.state.iteration
        if lacking := len(self.config.logging.sample_prompts) - len(made):
            reporter.say(f" no sample of {lacking} prompts: the model's logits after them are not finite")
        if made:
            reporter.log_samples(self.state.iteration, made)

    def _log(self, interval: Interval, slow: SlowRanks, reporter: Reporter) -> None:
        settings, iteration = self.config.trainer, self.state.iteration
        ranks, line = slow.report(iteration)
        metrics = interval.take(self.state) | ranks
        reporter.log(iteration, metrics)
        reporter.say(iteration_line(iteration, settings.train_iters, settings.global_batch_size, metrics))
        if line:
            reporter.say(line)

    def _save(self, saves: Saves, reporter: Reporter) -> None:
        """Saves what is trained, its moments and the cursor; on all ranks."""
        self.beat("saving")
        extra = {"config.yaml": to_yaml(self.config).encode(), **self.kept}
        tensors = store.named_tensors(self.gpt, self.optimizer.tensors())
        self.state = saves.save(self.state, tensors, extra, self.tokenizer, reporter)
        self.beat("saved")

    def _roll_back(self, back: Back, saves: Saves, reporter: Reporter) -> None:
        """Goes on from the newest good checkpoint from before the bad steps, without their samples."""
        left = saves.wait(self.state, reporter)
        found = load_before(back, self.config, self.gpt, self.optimizer)
        if found is None:
            found = first_state(self.config, self.axes, self.gpt, self.optimizer, self.base, left.data_key)
        self.state = rolled_back(found, left, back)
        reporter.go_back(self.state.iteration)
        self._sampled_at = min(self._sampled_at, self.state.iteration)
        saves.go_back(self.state)
        self._owes_save = False
        reporter.say(
            f" rolled back to iteration {self.state.iteration}; samples {back.start} to {back.stop - 1} of "
            "the order are left out"
        )
        self.beat("rolled back")
        if self.state.iteration:  # so that whatever ends the run, it knows what to leave out
            self._save(saves, reporter)

    def _introduce(self, start: int, reporter: Reporter) -> None:
        reporter.say(greeting(self.config, self.axes, self.gpt, start))
        reporter.say(transfers(str(self.gpt.engine.overlap)))
        for line in self.base.lines(self.gpt) if self.base is not None else ():
            reporter.say(line)
        for line in source_lines(self.config, self.data):
            reporter.say(line)

    def _patience_s(self) -> float:
        """How long to wait for ranks that a job's attempt before left on a lost node; 0: this is no job."""
        return self.config.trainer.hang_timeout_s / 2 if launcher.ATTEMPT_FOLDER in os.environ else 0.0

    def _open_folder(self) -> None:
        if self.is_first:
            if find_checkpoints(self.config, lambda line: None) != self.candidates:
                kind = Busy if self._patience_s() else ValueError
                raise kind(f"another run saved into {self.folder} meanwhile: start again")
            try:
                if not self.candidates and (line := set_aside(self.folder)):
                    print(f" {line}", flush=True)
                if not self.state.iteration:
                    forget_other_run(self.folder, self.config)
                if self.resumed is not None:
                    for left in paths.abandon_after(self.folder / "checkpoints", self.state.iteration):
                        print(f" set aside: {left}", flush=True)
                paths.replace_text(self.folder / "config.yaml", to_yaml(self.config))
                if self.base is not None:
                    self.base.write_report(self.folder)
                    point_to_best(self.folder / "checkpoints", self.state)
            except OSError as error:
                why = f"cannot write to {self.folder}: {error.strerror}"
                raise ValueError(f"{why}; make room there, or choose another output_dir=") from error
        dist.barrier()
