"""Where a run stands, beside its tensors: what a checkpoint's state.json says. Needs no torch."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from megatsp.checkpoint.manifest import FIX, Damaged
from megatsp.checkpoint.paths import parse_iteration

_END = 2**62  # of counts: with room to add in 64 bits


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
    rollbacks: to an earlier checkpoint, for such numbers; the last one from the first bad iteration
    rolled_back_from to rolled_back_to. recent_losses: that a new one is held against.
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
    rolled_back_from: int = 0
    rolled_back_to: int = 0
    skipped_samples: tuple[tuple[int, int], ...] = ()
    recent_losses: tuple[float, ...] = ()


def state_to_json(state: RunState) -> bytes:
    """The content of state.json."""
    return (json.dumps(asdict(state), indent=2) + "\n").encode()


def state_from_json(text: str) -> RunState:
    """The state that `state_to_json` wrote; its lists are tuples again.

    Raises:
        ValueError: no JSON, an unknown key, a value of a wrong type or out of its range.
    """
    content = json.loads(text)
    if not isinstance(content, dict):
        raise ValueError("it is no JSON object")
    known = asdict(RunState())
    values = {}
    for name, value in content.items():
        if name not in known:
            raise ValueError(f"unknown key {name:.40}")
        values[name] = _checked(name, value, known[name])
    return RunState(**values)


def read_state(folder: Path) -> RunState:
    """The checkpoint's state; its files may not be whole: see `check_files`.

    Raises:
        Damaged: state.json cannot be read, or is of another iteration than the folder's name.
    """
    try:
        state = state_from_json((folder / "state.json").read_text())
    except (OSError, ValueError, RecursionError) as error:
        raise Damaged(f"{folder} is damaged: cannot read state.json: {error}; {FIX}") from error
    named = parse_iteration(folder.name.removeprefix("iter_")) if folder.name.startswith("iter_") else None
    if named is not None and named != state.iteration:
        raise Damaged(
            f"{folder} is damaged: its state.json is of iteration {state.iteration}, its name of {named}; "
            f"{FIX}"
        )
    return state


def _checked(name: str, value: Any, default: Any) -> Any:
    """A field's value of JSON, its lists as tuples; default: of the field, whose type it has to have."""
    if name == "skipped_samples":
        allowed = "ascending [start, stop) of whole numbers that do not overlap"
        fits = isinstance(value, list) and _are_ranges(value)
        found: Any = tuple(tuple(pair) for pair in value) if fits else ()
    elif name == "recent_losses":
        allowed = "a list of numbers"
        fits = isinstance(value, list) and all(_is_number(loss) for loss in value)
        found = tuple(value) if fits else ()
    elif isinstance(default, str):
        allowed, fits, found = "a text", isinstance(value, str), value
    elif isinstance(default, float):
        allowed, fits, found = "a number", _is_number(value), value
    else:
        allowed, fits, found = "a whole number from 0 to below 2**62", _is_count(value), value
    if not fits:
        raise ValueError(f"{name}: expected {allowed}, found {json.dumps(value):.80}")
    return found


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 <= value < _END


def _is_number(value: Any) -> bool:
    return type(value) is float or (type(value) is int and abs(value) < _END)


def _are_ranges(pairs: list[Any]) -> bool:
    last = 0
    for pair in pairs:
        if not (isinstance(pair, list) and len(pair) == 2 and all(_is_count(place) for place in pair)):
            return False
        start, stop = pair
        if not last <= start < stop:
            return False
        last = stop
    return True
