"""Back to an earlier checkpoint, or to the first weights where there is none yet."""

from pathlib import Path

import torch.distributed as dist

from megatsp.axes import Axes
from megatsp.checkpoint import store
from megatsp.checkpoint.agree import on_each
from megatsp.checkpoint.find import find_good
from megatsp.checkpoint.manifest import Damaged
from megatsp.checkpoint.paths import LATEST, replace_text
from megatsp.checkpoint.state import RunState
from megatsp.hf.load import load_weights
from megatsp.model.gpt import GPT
from megatsp.model.parallelize import initialise
from megatsp.schema import Config
from megatsp.training.base import Base
from megatsp.training.logs import Reporter
from megatsp.training.optimizer import AdamW


def load_before(
    iteration: int, checkpoints: Path, gpt: GPT, optimizer: AdamW, verify: str, reporter: Reporter
) -> RunState | None:
    """Loads the newest good checkpoint from before `iteration`, on all ranks; None: there is none at all.

    Raises:
        ValueError: there are some, but none of them is good and early enough.
    """

    def look() -> list[tuple[int, Path]]:
        if dist.get_rank() or not any(checkpoints.glob("iter_*")):
            return []
        return [(store.read_state(path).iteration, path) for path in find_good(checkpoints, False, reporter.say)]

    found = on_each(look)[0]
    if not found:
        return None
    for saved_at, folder in found:
        if saved_at >= iteration:
            continue
        try:
            state = store.load(folder, gpt, optimizer.tensors(), verify)
        except Damaged as error:
            reporter.say(f" passed over: {error}")
            continue
        optimizer.loaded(state.iteration - state.skipped_steps)
        if dist.get_rank() == 0:
            # Later ones are of the road that is left: a run that is resumed must not take them.
            replace_text(checkpoints / LATEST, f"{state.iteration}\n")
        return state
    raise ValueError(
        f"{checkpoints} has no good checkpoint from before iteration {iteration} to roll back to: save more "
        "often (checkpoint.save_interval) and keep more (checkpoint.keep_last), or set "
        "trainer.on_bad_steps=stop and on_spike=warn or skip"
    )


def first_state(
    config: Config, axes: Axes, gpt: GPT, optimizer: AdamW, base: Base | None, data_key: str
) -> RunState:
    """Gives the model the weights of a new run again, and the optimizer no moments."""
    initialise(gpt, config, axes)
    if base is not None:
        load_weights(base.source, gpt)
    optimizer.reset()
    fingerprint = base.source.fingerprint if base is not None else ""
    return RunState(data_key=data_key, base_fingerprint=fingerprint)
