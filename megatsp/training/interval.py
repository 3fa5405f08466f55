"""The metrics of the iterations between two log lines."""

import time
from collections.abc import Mapping
from dataclasses import dataclass

import torch.distributed as dist

from megatsp.axes import Axes
from megatsp.checkpoint.state import RunState
from megatsp.comm import Traffic
from megatsp.schema import Config
from megatsp.training.bad_steps import Back, Verdict
from megatsp.training.flops import flops, peak_tflops
from megatsp.training.memory import peak_memory_gib


@dataclass
class StepResult:
    """One step, as all ranks know it, but wait_ms: how long this rank waited for its batches.

    pairs: of tokens that attended to each other, in all samples. lines: what the log says of it. asked,
    finished: ranks that were asked to end, and that have news of a save. back: where a rollback goes.
    """

    loss: float
    grad_norm: float
    learning_rate: float
    tokens: int
    pairs: float
    wait_ms: float
    verdict: Verdict
    lines: tuple[str, ...]
    asked: float
    finished: float
    back: Back | None = None


class Interval:
    """The metrics of the training steps since the last log line.

    Evaluation and saving, between a step and `restart()`, are not in its time and traffic.

    waits: of this rank for others, beside those of the axes.
    """

    def __init__(self, config: Config, axes: Axes, waits: Traffic | None = None) -> None:
        self._model, self._finetune = config.model, config.finetune
        self._peak, self._axes, self._waits = peak_tflops(axes.device), axes, waits or Traffic()
        self._notes: dict[str, float | int | None] = {}
        self._clear()
        self.restart()

    def _clear(self) -> None:
        self._results: list[StepResult] = []
        self._seconds, self._exposed_ms, self._bytes = 0.0, 0.0, 0
        self._notes.clear()

    def restart(self) -> None:
        """A step begins now."""
        traffic = self._axes.tsp.traffic
        traffic.take_exposed_ms()
        self._waits.take_exposed_ms()
        self._since, self._moved = time.perf_counter(), sum(traffic.bytes.values())

    def add(self, result: StepResult) -> float:
        """A step has ended. Returns the milliseconds of it in which this rank did not wait for others."""
        traffic = self._axes.tsp.traffic
        self._results.append(result)
        exposed_ms = traffic.take_exposed_ms()  # synchronises a GPU: the time has the whole step
        waited_ms = self._waits.take_exposed_ms()
        seconds = time.perf_counter() - self._since
        self._exposed_ms += exposed_ms
        self._seconds += seconds
        self._bytes += sum(traffic.bytes.values()) - self._moved
        return 1e3 * seconds - exposed_ms - waited_ms

    def note(self, metrics: Mapping[str, float | int | None]) -> None:
        """Further metrics of the next log line."""
        self._notes.update(metrics)

    def take(self, state: RunState) -> dict[str, float | int | None]:
        """Losses, times and traffic are means over the interval, the rest is of its last iteration.

        Of loss and gradient norm those of skipped steps are left out; None if there are no others.
        """
        results = self._results
        updates = [r for r in results if r.verdict is Verdict.UPDATE]
        tokens, gpu_seconds = sum(r.tokens for r in results), self._seconds * dist.get_world_size()
        pairs = sum(r.pairs for r in results)
        tflops = flops(self._model, tokens, pairs, self._finetune) / gpu_seconds / 1e12
        metrics: dict[str, float | int | None] = {
            "consumed-samples": state.consumed_samples,
            "consumed-tokens": state.consumed_tokens,
            "lm loss": sum(r.loss for r in updates) / len(updates) if updates else None,
            "grad-norm": updates[-1].grad_norm if updates else None,
            "learning-rate": results[-1].learning_rate,
            "iteration-time-ms": 1e3 * self._seconds / len(results),
            "tokens/s/gpu": tokens / gpu_seconds,
            "tflops/gpu": tflops,
            "mfu": tflops / self._peak if self._peak else None,
            "memory/peak-gib": peak_memory_gib(self._axes.device),
            "data/wait-ms": sum(r.wait_ms for r in results) / len(results),
            "comm/exposed-ms": self._exposed_ms / len(results),
            "comm/bytes": self._bytes // len(results),
            "skipped-steps": state.skipped_steps,
            "loss-spikes": state.loss_spikes,
            **self._notes,
        }
        self._clear()
        return metrics
