"""Traces of chosen iterations by torch's profiler, for chrome://tracing or ui.perfetto.dev."""

from collections.abc import Callable
from pathlib import Path
from types import TracebackType

import torch
import torch.distributed as dist
from torch.profiler import ProfilerActivity, profile

from megatsp.schema import Config

FOLDER = "profile"


class Profiler:
    """Records logging.profile_step_start to profile_step_end on logging.profile_ranks; elsewhere it is free.

    A context manager; call `step` after each iteration. A run that begins, or ends, amid these iterations
    is recorded from, or to, there.

    Args:
        folder: of the run; the trace goes to <folder>/profile/rank_00000_iter_0000010-12.json.gz.
        start: the iteration that the run goes on from.
        say: takes the line that says where the trace is.
    """

    def __init__(
        self,
        config: Config,
        folder: Path,
        device: torch.device,
        start: int = 0,
        say: Callable[[str], object] = print,
    ) -> None:
        logging = config.logging
        self._rank = dist.get_rank()
        is_on = logging.profile_step_start > 0 and self._rank in logging.profile_ranks
        self._wanted = range(logging.profile_step_start, logging.profile_step_end + 1) if is_on else range(0)
        self._folder, self._device, self._start, self._say = folder / FOLDER, device, start, say
        self._profile: profile | None = None
        self._recorded: list[int] = []

    def __enter__(self) -> "Profiler":
        self._begin_before(self._start + 1)
        return self

    def step(self, iteration: int) -> None:
        """After an iteration: records the next one if it is wanted, and writes the trace after the last."""
        if not self._wanted:
            return
        if self._profile is not None:
            self._recorded.append(iteration)
            if iteration + 1 not in self._wanted:
                self._write()
                return
        if not self._recorded:
            self._begin_before(iteration + 1)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._profile is None:
            return
        if self._recorded and kind is None:
            self._write()
        else:  # nothing whole, or something failed, which matters more
            self._profile.stop()
            self._profile = None

    def _begin_before(self, iteration: int) -> None:
        if iteration not in self._wanted:
            return
        activities = [ProfilerActivity.CPU]
        if self._device.type == "cuda":
            activities.append(ProfilerActivity.CUDA)
        # Shapes tell which of a layer's products is slow.
        self._profile = profile(activities=activities, record_shapes=True)
        self._profile.start()

    def _write(self) -> None:
        assert self._profile is not None
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)  # what was launched in the last iteration belongs to it
        self._profile.stop()
        first, last = self._recorded[0], self._recorded[-1]
        path = self._folder / f"rank_{self._rank:05d}_iter_{first:07d}-{last}.json.gz"
        temporary = path.with_name(f".{path.name}")  # the name's end tells torch to compress
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            self._profile.export_chrome_trace(str(temporary))
            temporary.replace(path)
        except (OSError, RuntimeError) as error:  # a diagnosis that fails does not end a training
            self._say(f" the trace of iterations {first} to {last} cannot be written to {path}: {error}")
        else:
            self._say(f" profiled iterations {first} to {last} of rank {self._rank}: {path}")
        self._profile = None
