"""Back to an earlier checkpoint, or to the first weights where there is none yet."""

from megatsp.axes import Axes
from megatsp.checkpoint.agree import on_first
from megatsp.checkpoint.paths import abandon_after, iterations
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
    """Loads the newest good checkpoint that `back` allows, on all ranks; None: there is none so early.

    Newer ones are abandoned: see `paths.abandon_after`.

    Raises:
        ValueError: there are some that are early enough, but none is good.
        RuntimeError: a newer one cannot be renamed.
    """
    checkpoints = run_folder(config) / "checkpoints"
    there = [(int(folder.name.removeprefix("iter_")), folder) for folder in find_candidates(config)]
    candidates = [folder for iteration, folder in there if iteration < back.rather]
    candidates += [folder for iteration, folder in there if back.rather <= iteration < back.before]
    state = None
    if candidates:
        optimizer.reset()  # for an import has no moments
        state = load_newest(config, candidates, gpt, optimizer.tensors(), lambda folder: None).state
        optimizer.loaded(state.iteration - state.skipped_steps)
    elif on_first(lambda: any(iteration < back.before for iteration in iterations(checkpoints))):
        raise ValueError(
            f"{checkpoints} has no good checkpoint from before iteration {back.before} to roll back to: "
            "restore one, or set trainer.on_bad_steps=stop and on_spike=warn or skip"
        )
    on_first(lambda: abandon_after(checkpoints, state.iteration if state is not None else 0))
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
