"""Where a run stands, beside its tensors: what a checkpoint's state.json says."""

import json
from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class RunState:
    """Where a run stands, beside its tensors.

    tokenizer, tokenizer_fingerprint: of the run; empty in checkpoints of versions that did not store them.
    base_fingerprint: of the Hugging Face checkpoint that is tuned; empty: first weights.
    best_loss, best_iteration: the lowest validation loss of tuned weights, and when; iteration 0: none yet.
    evaluations_without_gain: since then.
    evaluated_at: the iteration whose due evaluation was the last to be finished.
    skipped_steps: without an update: their numbers were not finite or their loss leapt.
    loss_spikes: losses that leapt, whatever was done then.
    bad_steps_in_a_row: the last steps, if not finite. bad_samples_from: where the first of them began.
    skipped_samples: [start, stop) of the global order, which are never read (again).
    rollbacks: to an earlier checkpoint, for such numbers. recent_losses: that a new one is held against.
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
    loss_spikes: int = 0
    bad_steps_in_a_row: int = 0
    bad_samples_from: int = 0
    rollbacks: int = 0
    skipped_samples: tuple[tuple[int, int], ...] = ()
    recent_losses: tuple[float, ...] = ()


def state_to_json(state: RunState) -> bytes:
    """The content of state.json."""
    return (json.dumps(asdict(state), indent=2) + "\n").encode()


def state_from_json(text: str) -> RunState:
    """The state that `state_to_json` wrote; its lists are tuples again.

    Raises:
        ValueError: no JSON, an unknown key, a value of a wrong type.
    """
    content = json.loads(text)
    if not isinstance(content, dict):
        raise ValueError("it is no JSON object")
    known = asdict(RunState())
    values = {name: _tuples(value) for name, value in content.items()}
    for name, value in values.items():
        if name not in known:
            raise ValueError(f"unknown key {name}")
        kind = type(known[name])
        if type(value) is not kind and not (kind is float and type(value) is int):
            raise ValueError(f"{name}: expected {kind.__name__}, found {value!r}")
    return RunState(**values)


def _tuples(value: Any) -> Any:
    return tuple(_tuples(item) for item in value) if isinstance(value, list) else value
