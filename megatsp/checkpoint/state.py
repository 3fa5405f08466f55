"""Where a run stands, beside its tensors: what a checkpoint's state.json says."""

from dataclasses import dataclass, field


@dataclass(frozen=True)
class RunState:
    """Where a run stands, beside its tensors.

    tokenizer, tokenizer_fingerprint: of the run; empty in checkpoints of versions that did not store them.
    base_fingerprint: of the Hugging Face checkpoint that is tuned; empty: first weights.
    best_loss, best_iteration: the lowest validation loss of tuned weights, and when; iteration 0: none yet.
    evaluations_without_gain: since then.
    evaluated_at: the iteration whose due evaluation was the last to be finished.
    skipped_steps: without an update: their numbers were not finite or their loss leapt.
    bad_steps_in_a_row: the last of them, if not finite.
    skipped_samples: [start, stop) of the global order, which are never read (again).
    rollbacks: to an earlier checkpoint, for such numbers. recent_losses: that a new one is held against.
    files: of the checkpoint, with their sizes in bytes.
    """

    iteration: int = 0
    consumed_samples: int = 0
    consumed_tokens: int = 0
    wandb_run_id: str = ""
    tokenizer: str = ""
    tokenizer_fingerprint: str = ""
    data_key: str = ""  # of the samples and their order; empty: not known
    base_fingerprint: str = ""
    best_loss: float = 0.0
    best_iteration: int = 0
    evaluations_without_gain: int = 0
    evaluated_at: int = 0
    skipped_steps: int = 0
    bad_steps_in_a_row: int = 0
    rollbacks: int = 0
    skipped_samples: tuple[tuple[int, int], ...] = ()
    recent_losses: tuple[float, ...] = ()
    files: dict[str, int] = field(default_factory=dict, compare=False)
