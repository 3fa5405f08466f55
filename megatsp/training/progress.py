"""What of a run is done, and what is due after an iteration."""

from megatsp.checkpoint.state import RunState
from megatsp.schema import Config
from megatsp.training.best import is_exhausted


def has_ended(config: Config, state: RunState) -> bool:
    """Whether the last step was made."""
    return state.iteration >= config.trainer.train_iters or is_exhausted(config, state)


def is_due(config: Config, state: RunState, every: int) -> bool:
    """Whether something is done after this iteration: every so many (0: never), and always at the end."""
    return has_ended(config, state) or (every > 0 and state.iteration % every == 0)


def owes_evaluation(config: Config, state: RunState) -> bool:
    """Whether one is due here and was not finished: before a tuning's first step, and as configured."""
    if state.iteration == 0:
        return bool(config.finetune.hf)
    return is_due(config, state, config.trainer.eval_interval) and state.evaluated_at < state.iteration


def is_over(config: Config, state: RunState) -> bool:
    """Whether there is nothing left to do."""
    return has_ended(config, state) and not owes_evaluation(config, state)


def why_ended(config: Config, state: RunState) -> str:
    """Of a run that is over, and what to set if it is to go on."""
    if state.iteration >= config.trainer.train_iters:
        return f"is at iteration {state.iteration} already; to go on, raise trainer.train_iters"
    return (
        f"stopped after iteration {state.iteration}: {state.evaluations_without_gain} evaluations had no "
        f"lower loss than {state.best_loss:.4f}, of iteration {state.best_iteration}; to go on, raise "
        "finetune.early_stopping"
    )
