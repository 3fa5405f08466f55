"""Lets the model continue texts while it is trained: when, with what, and that it changes nothing."""

from collections.abc import Callable

from megatsp.axes import Axes
from megatsp.checkpoint.state import RunState
from megatsp.data.tokenizer import Tokenizer
from megatsp.model.gpt import GPT
from megatsp.schema import Config
from megatsp.training.generate import NotFinite, generate

TEMPERATURE, SEED = 0.8, 1234  # those of `megatsp generate`: it gives the same from the checkpoint


def check_prompts(config: Config, tokenizer: Tokenizer) -> None:
    """Checks that each prompt and what follows it fit into a sample.

    Raises:
        ValueError: one does not.
    """
    logging, length = config.logging, config.trainer.seq_length
    if not logging.sample_interval:
        return
    for prompt in logging.sample_prompts:
        count = max(1, len(tokenizer.encode(prompt)))
        if count + logging.sample_tokens > length:
            raise ValueError(
                f"logging.sample_prompts: {prompt[:40]!r} has {count} tokens, which with sample_tokens="
                f"{logging.sample_tokens} is more than trainer.seq_length={length}: shorten it, or lower "
                "sample_tokens"
            )


def is_due(config: Config, state: RunState, last: int) -> bool:
    """Whether samples are to be made after this iteration; none amid bad steps. last: when the last were."""
    every = config.logging.sample_interval
    return (
        every > 0 and state.iteration > last and state.iteration % every == 0 and not state.bad_steps_in_a_row
    )


def make_samples(
    gpt: GPT, axes: Axes, tokenizer: Tokenizer, config: Config, beat: Callable[[str], None]
) -> list[dict[str, str]]:
    """prompt and continuation of each prompt, on all ranks together; weights and random numbers stay.

    A prompt after which the model's logits are not finite has none: what becomes of the run is for its losses
    to say. beat: the watchdog's, before each token.
    """
    made = []
    for prompt in config.logging.sample_prompts:
        settings = config.logging.sample_tokens, TEMPERATURE, SEED, config.trainer.seq_length
        try:
            text = generate(gpt, axes, tokenizer, prompt, *settings, lambda: beat("a sample"))
        except NotFinite:
            continue
        made.append({"prompt": prompt, "continuation": text.removeprefix(prompt)})
    return made
