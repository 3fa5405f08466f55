"""One record of fine-tuning data as the tokens of one document, each with the role of who speaks it."""

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from megatsp.data.sft.records import (
    FORMATS,
    Message,
    Reject,
    chat_messages,
    instruction_messages,
    prompt_parts,
    record_tools,
)
from megatsp.data.sft.template import Template, template_variables
from megatsp.data.sft.turns import Turn, render_turns
from megatsp.data.tokenizer import Tokenizer
from megatsp.nearest import did_you_mean

OTHERS, EARLIER, LAST = range(3)  # a token's role: not the assistant's, an earlier turn's, its last turn's


@dataclass(frozen=True)
class Rendered:
    """A document. It is complete: no eod is to be added.

    ids: its tokens. roles: uint8, one a token: OTHERS, EARLIER or LAST. num_bytes: of its UTF-8 text.
    """

    ids: list[int]
    roles: np.ndarray
    num_bytes: int


class Renderer:
    """Records of one format as documents.

    chat: {"messages": [{"role", "content"}, ...]}, or ShareGPT's {"conversations": [{"from", "value"}, ...]},
      with "tools" if the template shows them. The ids are those of transformers' apply_chat_template.
    prompt: {"prompt", "completion"}: the ids of both and eod, without a template; or two lists of messages.
    instruction: {"instruction", "output"} and perhaps "input": a user's and an assistant's turn of chat.

    Args:
        template: the chat template's Jinja text; None takes the tokenizer's own.

    Raises:
        ValueError: an unknown format, no template where the format needs one, a template that is not Jinja.
    """

    def __init__(self, tokenizer: Tokenizer, format: str, template: str | None = None) -> None:
        if format not in FORMATS:
            near = did_you_mean(format, FORMATS)
            raise ValueError(f"unknown format {format!r}{near} (formats: {', '.join(FORMATS)})")
        self.tokenizer, self.format = tokenizer, format
        source = tokenizer.chat_template if template is None else template
        self._template = None
        if source is not None:
            specials = list(tokenizer.special_tokens)
            self._template = Template(source, template_variables(tokenizer), specials)
        elif format != "prompt":
            raise self._no_template()

    def render(self, record: Message) -> Rendered:
        """The record's document.

        Raises:
            Reject: the record cannot be trained on.
            ValueError: messages in a prompt record, and no template.
        """
        if not isinstance(record, dict):
            raise Reject("record is not an object", type(record).__name__)
        if self.format == "chat":
            return self._chat(chat_messages(record), record_tools(record))
        if self.format == "instruction":
            return self._chat(instruction_messages(record), None)
        parts = prompt_parts(record)
        if isinstance(parts, list):
            return self._chat(parts, record_tools(record))
        prompt, completion = parts
        num_bytes = _num_bytes(prompt) + _num_bytes(completion)
        before, after = self.tokenizer.encode(prompt), self.tokenizer.encode(completion)
        roles = np.repeat(np.array([OTHERS, LAST], np.uint8), [len(before), len(after) + 1])
        return Rendered([*before, *after, self.tokenizer.eod], roles, num_bytes)

    def _chat(self, messages: list[Message], tools: list[Message] | None) -> Rendered:
        if self._template is None:
            raise self._no_template()
        text, turns = render_turns(self._template, messages, tools)
        num_bytes = _num_bytes(text)
        ids, begins = self.tokenizer.encode_rendered(text)
        roles = token_roles(text, begins, turns)
        if LAST not in roles:
            raise Reject("nothing of the assistant's last turn is left")
        return Rendered(ids, roles, num_bytes)

    def _no_template(self) -> ValueError:
        return ValueError(
            f"the tokenizer '{self.tokenizer.name}' has no chat template: give a file with one by "
            "--chat-template, or a tokenizer of a chat model"
        )


def token_roles(text: str, begins: Sequence[int], turns: Sequence[Turn]) -> np.ndarray:
    """Roles of tokens that begin at these characters of the text, uint8 [tokens].

    A token is the turn's if it begins in it. A token across the turn's begin is the turn's if it holds a
    visible character of it: the first word, together with the blank that ends the header, would not be
    trained otherwise. If it holds blanks alone, it is the header's: a model is prompted with the header's
    last newline, never asked for it. A token across the end is the turn's: the model begins it.
    """
    positions = np.asarray(begins, dtype=np.int64)
    roles = np.zeros(len(positions), dtype=np.uint8)
    for turn in turns:
        if turn.start == turn.stop:
            continue
        first, stop = bisect_left(begins, turn.start), bisect_left(begins, turn.stop)
        following = begins[first] if first < len(begins) else len(text)
        if first and not text[turn.start : min(following, turn.stop)].isspace() and following > turn.start:
            first -= 1
        roles[first:stop] = LAST if turn.last else EARLIER
    return roles


def _num_bytes(text: str) -> int:
    try:
        return len(text.encode("utf-8"))
    except UnicodeEncodeError:
        raise Reject("text is not valid Unicode") from None
