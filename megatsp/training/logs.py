"""What a run reports: metrics.jsonl, Weights & Biases, Megatron's iteration line, a progress bar.

metrics.jsonl is the source of truth: one object a line, flushed line by line. W&B gets the same
numbers under the same names, with an explicit step.
"""

import errno
import json
import logging
import os
import secrets
import sys
from collections.abc import Mapping
from dataclasses import asdict
from netrc import NetrcParseError, netrc
from pathlib import Path
from typing import Any

from tqdm import tqdm

from megatsp.checkpoint.paths import replace_text
from megatsp.schema import Config

Metrics = Mapping[str, float | int | str | None]


class Reporter:
    """Reports for rank 0; on the others every method does nothing.

    Entries after `iteration`, of a run that went further than its last checkpoint, are taken
    out of metrics.jsonl: the run will write them again.

    evaluates: the run begins with an evaluation of `iteration`, whose entries are taken out too.
    """

    def __init__(
        self,
        config: Config,
        folder: Path,
        iteration: int,
        wandb_run_id: str,
        active: bool,
        evaluates: bool = False,
    ) -> None:
        self._active, self._total = active, config.trainer.train_iters
        self.wandb_run_id = wandb_run_id
        self._run: Any = None
        self._unwritten, self._is_held_up = b"", False  # of metrics.jsonl, by a full disk
        if not active:
            return
        self._start_wandb(config, folder)
        self._path = folder / "metrics.jsonl"
        # A new run has logged nothing, not even of its first weights.
        _drop_after(self._path, iteration or -1, evaluates)
        self._file = self._path.open("ab", buffering=0)
        on_terminal = sys.stderr.isatty()
        self._bar = tqdm(total=self._total, initial=iteration, unit="it", disable=not on_terminal)

    def _start_wandb(self, config: Config, folder: Path) -> None:
        mode = wandb_mode(config.logging.wandb)
        if mode == "disabled":
            return
        import wandb

        self.wandb_run_id = self.wandb_run_id or secrets.token_hex(4)
        logging.getLogger("wandb").setLevel(logging.ERROR)

        def start(mode: str) -> Any:
            return wandb.init(
                project=config.logging.wandb_project,
                entity=config.logging.wandb_entity or None,
                name=config.name,
                id=self.wandb_run_id,
                resume="allow",
                mode=mode,  # type: ignore[arg-type]  # wandb_mode gives no other words
                dir=folder,
                config=asdict(config),
                settings=wandb.Settings(silent=True),
            )

        try:
            try:
                self._run = start(mode)
            except (wandb.errors.CommError, TimeoutError) as error:
                if isinstance(error, wandb.errors.AuthenticationError):
                    raise
                print(f" Weights & Biases does not answer ({error}): this run is kept offline", flush=True)
                self._run = start("offline")
        except (wandb.Error, TimeoutError) as error:
            raise ValueError(
                f"Weights & Biases did not start ({mode}): {error}. Check WANDB_API_KEY, or use "
                "logging.wandb=offline or disabled"
            ) from error

    def go_back(self, iteration: int) -> None:
        """Takes out the entries after `iteration`: the run goes on from there."""
        if not self._active:
            return
        kept = [
            line for line in self._unwritten.splitlines(True) if json.loads(line)["iteration"] <= iteration
        ]
        self._unwritten = b"".join(kept)
        self._file.close()
        _drop_after(self._path, iteration)
        self._file = self._path.open("ab", buffering=0)
        self._bar.n = iteration
        self._bar.refresh()

    def log(self, iteration: int, metrics: Metrics) -> None:
        """One line of metrics.jsonl, and the same to W&B."""
        if not self._active:
            return
        entry = {"iteration": iteration, **metrics}
        self._unwritten += json.dumps(entry).encode() + b"\n"
        self._write()
        if self._run is not None:
            self._run.log({k: v for k, v in entry.items() if v is not None}, step=iteration)

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
        if self._active:
            self._bar.update()

    def close(self) -> None:
        if not self._active:
            return
        self._bar.close()
        self._write()
        if self._unwritten:
            self.say(f" {self._unwritten.count(b'{')} entries of {self._path} were never written")
        self._file.close()
        if self._run is not None:
            self._run.finish()


def wandb_mode(wanted: str) -> str:
    """online, offline or disabled: what is set, then WANDB_MODE, then whether there is an API key."""
    if wanted != "auto":
        return wanted
    if mode := os.environ.get("WANDB_MODE"):
        if mode not in ("online", "offline", "disabled"):
            raise ValueError(f"WANDB_MODE={mode}: use online, offline or disabled, or unset it")
        return mode
    if os.environ.get("WANDB_API_KEY"):
        return "online"
    try:
        known = netrc(os.environ.get("NETRC")).hosts
    except (OSError, NetrcParseError):
        known = {}
    return "online" if any("wandb" in host for host in known) else "offline"


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
