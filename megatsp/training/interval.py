"""The metrics of the iterations between two log lines."""

import time
from dataclasses import dataclass

import torch.distributed as dist

from megatsp.axes import Axes
from megatsp.checkpoint.state import RunState
from megatsp.schema import Config
from megatsp.training.flops import flops, peak_tflops
from megatsp.training.memory import peak_memory_gib


@dataclass
class StepResult:
    """One optimizer step, as all ranks know it, but wait_ms: how long this rank waited for its batches.

    pairs: of tokens that attended to each other, in all samples.
    """

    loss: float
    grad_norm: float
    learning_rate: float
    tokens: int
    pairs: float
    wait_ms: float
    interrupted: bool


class Interval:
    """The metrics of the training steps since the last log line.

    Evaluation and saving, between a step and `restart()`, are not in its time and traffic.
    """

    def __init__(self, config: Config, axes: Axes) -> None:
        self._model, self._finetune = config.model, config.finetune
        self._peak, self._axes = peak_tflops(axes.device), axes
        self._clear()
        self.restart()

    def _clear(self) -> None:
        self._results: list[StepResult] = []
        self._seconds, self._exposed_ms, self._bytes = 0.0, 0.0, 0

    def restart(self) -> None:
        """A step begins now."""
        traffic = self._axes.tsp.traffic
        traffic.take_exposed_ms()
        self._since, self._moved = time.perf_counter(), sum(traffic.bytes.values())

    def add(self, result: StepResult) -> None:
        """A step has ended."""
        traffic = self._axes.tsp.traffic
        self._results.append(result)
        self._exposed_ms += traffic.take_exposed_ms()  # synchronises a GPU: the time has the whole step
        self._seconds += time.perf_counter() - self._since
        self._bytes += sum(traffic.bytes.values()) - self._moved

    def take(self, state: RunState) -> dict[str, float | int | None]:
        """Losses, times and traffic are means over the interval, the rest is of its last iteration."""
        results = self._results
        tokens, gpu_seconds = sum(r.tokens for r in results), self._seconds * dist.get_world_size()
        pairs = sum(r.pairs for r in results)
        tflops = flops(self._model, tokens, pairs, self._finetune) / gpu_seconds / 1e12
        metrics: dict[str, float | int | None] = {
            "consumed-samples": state.consumed_samples,
            "consumed-tokens": state.consumed_tokens,
            "lm loss": sum(r.loss for r in results) / len(results),
            "grad-norm": results[-1].grad_norm,
            "learning-rate": results[-1].learning_rate,
            "iteration-time-ms": 1e3 * self._seconds / len(results),
            "tokens/s/gpu": tokens / gpu_seconds,
            "tflops/gpu": tflops,
            "mfu": tflops / self._peak if self._peak else None,
            "memory/peak-gib": peak_memory_gib(self._axes.device),
            "data/wait-ms": sum(r.wait_ms for r in results) / len(results),
            "comm/exposed-ms": self._exposed_ms / len(results),
            "comm/bytes": self._bytes // len(results),
        }
        self._clear()
        return metrics
