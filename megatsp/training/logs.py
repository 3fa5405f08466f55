"""What a run reports: metrics.jsonl, Weights & Biases, Megatron's iteration line, a progress bar.

metrics.jsonl is the source of truth: one object a line, flushed line by line. W&B gets the same
numbers under the same names, with an explicit step: see wandb_run.py.
"""

import errno
import json
import math
import os
import sys
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from tqdm import tqdm

from megatsp.checkpoint.paths import replace_text
from megatsp.exit_status import HANG
from megatsp.schema import Config
from megatsp.training.events import Event, append_event
from megatsp.training.samples import append_samples, by_iteration, drop_after, sample_line
from megatsp.training.wandb_run import WandbRun, choose_id, is_wanted, stored_id
from megatsp.training.wandb_service import abandon, patiently

Metrics = Mapping[str, float | int | str | None]

_PATIENCE_S = 60.0  # with W&B's service, once a start


class Reporter:
    """Reports for rank 0; on the others every method does nothing.

    Entries after `iteration`, of a run that went further than its last checkpoint, are taken
    out of metrics.jsonl: the run will write them again. What W&B lacks of those that stay, it is given.
    W&B, whose import takes seconds, begins after the first step, or with the first alert.

    evaluates: the run begins with an evaluation of `iteration`, whose entries are taken out too.
    about: joins the configuration in W&B: see `megatsp.training.origin`.
    sampled_at: the iteration of the last samples.
    """

    def __init__(
        self,
        config: Config,
        folder: Path,
        iteration: int,
        wandb_run_id: str,
        active: bool,
        evaluates: bool = False,
        about: Mapping[str, Any] | None = None,
    ) -> None:
        self._active, self._total = active, config.trainer.train_iters
        self._folder, self._iteration = folder, iteration
        self.wandb_run_id, self.sampled_at = wandb_run_id, 0
        self._wandb: WandbRun | None = None
        self._begin: Callable[[], WandbRun] | None = None  # W&B's run, which has not begun yet
        self._wandb_lacks = False  # something that was logged
        self._unwritten, self._is_held_up = b"", False  # of metrics.jsonl, by a full disk
        if not active:
            return
        self._path = folder / "metrics.jsonl"
        # A new run has logged nothing, not even of its first weights.
        _drop_after(self._path, iteration or -1, evaluates)
        self.sampled_at = drop_after(folder, iteration)
        if is_wanted(config.logging.wandb):
            self.wandb_run_id, said = choose_id(folder, wandb_run_id)
            if said:
                self.say(f" {said}")
            begins = not (iteration or wandb_run_id or stored_id(folder))
            self._begin = lambda: WandbRun(config, folder, self.wandb_run_id, about or {}, begins)
        self._file = self._path.open("ab", buffering=0)
        on_terminal = sys.stderr.isatty()
        self._bar = tqdm(total=self._total, initial=iteration, unit="it", disable=not on_terminal)

    def begin_wandb(self) -> None:
        """Begins W&B's run, once; a run that goes on does so without it, if need be.

        Raises:
            ValueError: the run is new, and W&B refuses a key or a setting.
        """
        begin, self._begin = self._begin, None
        if begin is None:
            return
        try:
            self._wandb = begin()
        except ValueError:
            raise
        except Exception as error:
            abandon()
            self.say(f" this start goes on without Weights & Biases, metrics.jsonl has it all: {error}")
            return
        self._to_wandb(self._catch_up)

    def _catch_up(self, run: WandbRun) -> None:
        """Gives W&B what it lacks of the entries and samples there are."""
        entries: dict[int, list[dict[str, Any]]] = {}
        written = read_metrics(self._path) if self._path.exists() else []
        for entry in (*written, *map(json.loads, self._unwritten.splitlines())):
            entries.setdefault(entry["iteration"], []).append(entry)
        samples = by_iteration(self._folder)
        for iteration in sorted({*entries, *samples}):
            for entry in entries.get(iteration, ()):
                run.log(iteration, entry)
            if iteration in samples:
                run.log_samples(iteration, samples[iteration])

    def go_back(self, iteration: int) -> None:
        """Takes out the entries after `iteration`: the run goes on from there."""
        self._iteration = iteration
        if not self._active:
            return
        kept = [
            line for line in self._unwritten.splitlines(True) if json.loads(line)["iteration"] <= iteration
        ]
        self._unwritten = b"".join(kept)
        self._file.close()
        _drop_after(self._path, iteration)
        self._file = self._path.open("ab", buffering=0)
        self.sampled_at = drop_after(self._folder, iteration)
        self._to_wandb(lambda run: run.go_back(iteration))
        self._bar.n = iteration
        self._bar.refresh()

    def log(self, iteration: int, metrics: Metrics) -> None:
        """One line of metrics.jsonl, and the same to W&B."""
        if not self._active:
            return
        entry = {"iteration": iteration, **metrics}
        self._unwritten += json.dumps(entry).encode() + b"\n"
        self._write()
        self._wandb_lacks = True
        self._to_wandb(lambda run: run.log(iteration, entry))

    def log_samples(self, iteration: int, samples: list[dict[str, str]]) -> None:
        """Texts that the model continued: to samples.jsonl, W&B and the console."""
        self.sampled_at = iteration
        if not self._active:
            return
        try:
            append_samples(self._folder, iteration, samples)
        except OSError as error:
            self.say(f" samples of iteration {iteration} were not written: {error.strerror}")
        self._wandb_lacks = True
        self._to_wandb(lambda run: run.log_samples(iteration, samples))
        for sample in samples:
            self.say(sample_line(iteration, sample))

    def event(self, event: Event) -> None:
        """Writes what happened to events.jsonl, and to W&B if it is worth an alert."""
        if not self._active:
            return
        try:
            append_event(self._folder, event)
        except OSError as error:
            self.say(f" an event was not written ({event.kind}): {error.strerror}")
        if event.alert:
            try:
                self.begin_wandb()
            except ValueError as refused:  # an alert may tell of another error, which is the one to show
                self.say(f" {refused}")
            self._to_wandb(lambda run: run.alert(event.kind, event.text, event.alert))

    def hang(self, text: str) -> None:
        """For the watchdog's thread, before it ends the process; on whichever rank speaks for the others.

        Raises:
            OSError: the event cannot be written.
        """
        append_event(self._folder, Event("hang", self._iteration, text, "ERROR"))
        with suppress(ValueError):
            self.begin_wandb()
        if self._wandb is not None:
            self._wandb.alert("hang", text, "ERROR")
            self._wandb.close(row_is_open=True, exit_code=HANG)

    def _to_wandb(self, use: Callable[[WandbRun], object], more_s: float = 0) -> None:
        """W&B's service may stall or die; training goes on, and the next start gives W&B what it lacks.

        more_s: joins the time without a row in which it is given up.
        """
        run = self._wandb
        if run is None:
            return
        try:
            patiently(lambda: use(run), _PATIENCE_S + more_s, lambda: run.last)
        except Exception as error:
            self._wandb = None
            abandon()
            self.say(f" W&B failed ({error}): it gets nothing more of this start, metrics.jsonl has it all")

    def _write(self) -> None:
        """Writes what is not written yet; what the disk refuses stays, in whole lines, for the next time."""
        try:
            while self._unwritten:
                line = self._unwritten[: self._unwritten.index(b"\n") + 1]
                start = self._file.seek(0, os.SEEK_END)
                if self._file.write(line) != len(line):
                    self._file.truncate(start)
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
                self._unwritten = self._unwritten[len(line) :]
        except OSError as error:
            if not self._is_held_up:
                self.say(
                    f" {self._path} cannot be written: {error.strerror}; its lines are kept until it can"
                )
            self._is_held_up = True
            return
        self._is_held_up = False

    def say(self, text: str) -> None:
        """A line on the console, above the progress bar if there is one."""
        if self._active:
            tqdm.write(text, file=sys.stdout)
            sys.stdout.flush()

    def advance(self) -> None:
        self._iteration += 1
        if self._active:
            self._bar.update()

    def close(self, row_is_open: bool = False, exit_code: int = 0) -> None:
        """row_is_open: a resumed run has more to log of the last iteration."""
        if not self._active:
            return
        self._bar.close()
        if self._wandb_lacks:
            self.begin_wandb()
        self._write()
        if self._unwritten:
            self.say(f" {self._unwritten.count(b'{')} entries of {self._path} were never written")
        self._file.close()
        if self._wandb is not None:
            self._to_wandb(lambda run: run.close(row_is_open, exit_code), self._wandb.finish_s or math.inf)


def iteration_line(iteration: int, total: int, global_batch_size: int, metrics: Metrics) -> str:
    """Megatron's line of one logged iteration."""
    fields = [
        f" iteration {iteration:8d}/{total:8d}",
        f"consumed samples: {metrics['consumed-samples']:12d}",
        f"elapsed time per iteration (ms): {metrics['iteration-time-ms']:.1f}",
        f"tokens/s/gpu: {metrics['tokens/s/gpu']:.0f}",
        f"throughput per GPU (TFLOP/s/GPU): {metrics['tflops/gpu']:.3f}",
        f"learning rate: {metrics['learning-rate']:.6E}",
        f"global batch size: {global_batch_size:5d}",
    ]
    if metrics["lm loss"] is None:  # no step of the interval made an update
        fields.append(f"skipped steps: {metrics['skipped-steps']}")
    else:
        fields += [f"lm loss: {metrics['lm loss']:.6E}", f"grad norm: {metrics['grad-norm']:.3f}"]
    return " | ".join(fields) + " |"


def evaluation_line(iteration: int, split: str, metrics: Metrics) -> str:
    """The same for an evaluation. split: val or test."""
    name = {"val": "validation", "test": "test"}[split]
    if not metrics:
        return f" {name} at iteration {iteration}: no token of its samples is trained (data.loss_on)"
    line = f" {name} loss at iteration {iteration} | lm loss: {metrics[f'{split}/lm loss']:.6E}"
    bits = metrics.get(f"{split}/bits-per-byte")
    return line if bits is None else f"{line} | bits per byte: {bits:.4f}"


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The entries of a metrics.jsonl; a last line that was cut off is left out.

    Raises:
        ValueError: another line is no entry.
    """
    entries: list[dict[str, Any]] = []
    text = path.read_text(errors="replace")
    lines = text.splitlines()
    for number, line in enumerate(lines, start=1):
        try:
            entry = json.loads(line)
        except json.JSONDecodeError:
            entry = None
        if isinstance(entry, dict) and "iteration" in entry:
            entries.append(entry)
        elif number < len(lines) or text.endswith("\n"):
            raise ValueError(f"{path}, line {number}, is no entry of metrics: mend it, or move the file away")
    return entries


def _drop_after(path: Path, iteration: int, evaluations: bool = False) -> None:
    """Takes out entries after `iteration`, and a last one that was cut off. evaluations: its own, too.

    Entries at the end are cut off where they are: that needs no room on a disk that is full.
    """
    if not path.exists():
        return
    entries = read_metrics(path)
    stays = [
        entry["iteration"] < iteration + (not (evaluations and _is_evaluation(entry))) for entry in entries
    ]
    first = stays.index(False) if False in stays else len(stays)
    if any(stays[first:]):
        kept = [json.dumps(entry) + "\n" for entry, stay in zip(entries, stays, strict=True) if stay]
        replace_text(path, "".join(kept))
        return
    lines = path.read_bytes().splitlines(True)[:first]
    whole = lines if not lines or lines[-1].endswith(b"\n") else lines[:-1]
    os.truncate(path, sum(map(len, whole)))


def _is_evaluation(entry: Metrics) -> bool:
    return any(name.startswith(("val/", "test/")) for name in entry)
