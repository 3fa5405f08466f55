"""Back to an earlier checkpoint, or to the first weights where there is none yet."""

import torch.distributed as dist

from megatsp.axes import Axes
from megatsp.checkpoint.agree import on_first
from megatsp.checkpoint.paths import LATEST, replace_text
from megatsp.checkpoint.state import RunState
from megatsp.hf.load import load_weights
from megatsp.model.gpt import GPT
from megatsp.model.parallelize import initialise
from megatsp.schema import Config
from megatsp.training.bad_steps import Back
from megatsp.training.base import Base
from megatsp.training.folder import run_folder
from megatsp.training.optimizer import AdamW
from megatsp.training.resume import find_candidates, load_newest


def load_before(back: Back, config: Config, gpt: GPT, optimizer: AdamW) -> RunState | None:
    """Loads the newest good checkpoint that `back` allows, on all ranks; None: there is none at all.

    Raises:
        ValueError: there are some, but none of them is good and early enough.
    """
    checkpoints = run_folder(config) / "checkpoints"
    if not on_first(lambda: any(checkpoints.glob("iter_*"))):
        return None
    there = [(int(folder.name.removeprefix("iter_")), folder) for folder in find_candidates(config)]
    candidates = [folder for iteration, folder in there if iteration < back.rather]
    candidates = candidates or [folder for iteration, folder in there if iteration < back.before]
    if not candidates:
        raise ValueError(
            f"{checkpoints} has no good checkpoint from before iteration {back.before} to roll back to: keep "
            "more of them (checkpoint.keep_last), or set trainer.on_bad_steps=stop and on_spike=warn or skip"
        )
    state = load_newest(config, candidates, gpt, optimizer.tensors(), lambda folder: None).state
    optimizer.loaded(state.iteration - state.skipped_steps)
    if dist.get_rank() == 0:
        # Later ones are of the road that is left: a run that is resumed must not take them.
        replace_text(checkpoints / LATEST, f"{state.iteration}\n")
    dist.barrier()
    return state


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
