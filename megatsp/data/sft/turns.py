"""Where in a rendered conversation the assistant speaks.

A template with {% generation %} blocks says so itself. For any other, a turn is what stands between two
renderings: that of the messages before it, with the header after which the assistant would speak, and that
of the messages up to it. So a turn is what the model has to produce: its content with all that the template
adds to it, the end of the turn too, and not the header.

Templates exist that render a message otherwise once others follow: Qwen3's drops the thoughts of earlier
turns, Mistral's moves the system message to the last user's turn. There, and only there, turns are found by
marks in place of contents: what surrounds the mark in the whole conversation is compared with what a model
would be prompted with. What cannot be explained this way is refused.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise

from megatsp.data.sft.records import ASSISTANT, Message, Reject
from megatsp.data.sft.template import Template

# Stand in for contents. Letters, so that no template trims or escapes them; unlikely in any text.
MARK, MARK_BEFORE = "Qz7markJx", "Vw3priorKp"
UNSTABLE = "template renders a turn differently when others follow: mark it with {% generation %}"


@dataclass(frozen=True)
class Turn:
    """Characters start to stop of the rendered text; last: of the assistant's last turn."""

    start: int
    stop: int
    last: bool


def render_turns(
    template: Template, messages: list[Message], tools: list[Message] | None
) -> tuple[str, list[Turn]]:
    """The conversation's text and the assistant's turns in it, in order.

    Raises:
        Reject: the template refuses the conversation or its beginning, or its turns cannot be told apart.
    """
    spoken = [i for i, message in enumerate(messages) if message["role"] == ASSISTANT]
    if template.marks_assistant:
        text, blocks = template.text_and_blocks(messages, tools)
        # A turn may have several blocks; those of the turns before the last are the same without it.
        earlier = len(spoken) - 1
        if len(blocks) != len(spoken):
            earlier = len(template.text_and_blocks(messages[: spoken[-1]], tools)[1]) if spoken[-1] else 0
        return text, [Turn(start, stop, i >= earlier) for i, (start, stop) in enumerate(blocks)]
    conversation = _Conversation(template, messages, tools)
    turns = [Turn(*conversation.turn(i), last=i == spoken[-1]) for i in spoken]
    for before, after in pairwise(turns):
        if before.stop > after.start:
            raise Reject(UNSTABLE)
    return conversation.text, turns


class _Conversation:
    """One conversation and the renderings of its parts."""

    def __init__(self, template: Template, messages: list[Message], tools: list[Message] | None) -> None:
        self._template, self._messages, self._tools = template, messages, tools
        self.text = template.text(messages, tools)

    def turn(self, i: int) -> tuple[int, int]:
        """Characters of message i, the assistant's."""
        prompt, until = self._render(i, prompting=True), self._render(i + 1)
        whole = self.text.startswith(until)
        if not self.text.startswith(prompt):
            start = self._marked_start(i)
        elif prompt == self._render(i):
            start = self._unprompted_start(i, prompt)
        else:
            start = len(prompt)
        stop = len(until) if whole and start <= len(until) else self._marked_stop(i)
        if start > stop:
            raise Reject(UNSTABLE)
        return start, start + len(self._without_separator(self.text[start:stop]))

    def _unprompted_start(self, i: int, prompt: str) -> int:
        """The same where the template ignores add_generation_prompt: it may write a header nevertheless."""
        before, _ = _split(self._render(marks={i: MARK}), MARK)
        if not before.startswith(prompt):
            raise Reject(UNSTABLE)
        if not before[len(prompt) :].strip():  # as in "[/INST] answer"
            return len(prompt)
        if not self.text.startswith(before):
            raise Reject(UNSTABLE)
        return len(before)

    def _marked_start(self, i: int) -> int:
        """Where the header of message i ends, from what stands between its content and the one before."""
        if i == 0:
            raise Reject(UNSTABLE)
        before, _ = _split(self._render(marks={i: MARK}), MARK)
        marked = self._render(marks={i - 1: MARK_BEFORE, i: MARK})
        between, _ = _split(_split(marked, MARK_BEFORE)[1], MARK)
        prompt = self._render(i, prompting=True, marks={i - 1: MARK_BEFORE})
        header = _split(prompt, MARK_BEFORE)[1]
        if between.startswith(header):  # the rest, such as empty thoughts, is for the model to write
            rest = between[len(header) :]
            if prompt != self._render(i, marks={i - 1: MARK_BEFORE}) or not rest.strip():
                before = before[: len(before) - len(rest)]
        elif not header.startswith(between):
            raise Reject(UNSTABLE)
        if not self.text.startswith(before):
            raise Reject(UNSTABLE)
        return len(before)

    def _marked_stop(self, i: int) -> int:
        """Where message i ends: after its content comes what would come were it the last."""
        _, after = _split(self._render(marks={i: MARK}), MARK)
        if self.text.endswith(after):
            for ending in map(self._without_separator, self._endings(i)):
                if after.startswith(ending):
                    return len(self.text) - len(after) + len(ending)
        raise Reject(UNSTABLE)

    def _endings(self, i: int) -> Iterator[str]:
        """What the template writes after the content of message i as the last one."""
        yield _split(self._render(i + 1, marks={i: MARK}), MARK)[1]
        # gpt-oss's ends the very last turn by another token than those that are answered.
        before, prompt = self._render(i), self._render(i, prompting=True)
        _, answered = _split(self._render(i + 1, prompting=True, marks={i: MARK}), MARK)
        header = prompt[len(before) :]
        if header and prompt.startswith(before) and answered.endswith(header):
            yield answered[: -len(header)]

    def _without_separator(self, turn: str) -> str:
        """A turn ends with its special token; blanks after that are the template's, never generated."""
        trimmed = turn.rstrip()
        return trimmed if trimmed.endswith(self._template.special_texts) else turn

    def _render(
        self, count: int | None = None, prompting: bool = False, marks: dict[int, str] | None = None
    ) -> str:
        """The first `count` messages, all by default, with marks in place of contents."""
        messages = self._messages[:count]
        if not marks and not prompting and len(messages) == len(self._messages):
            return self.text
        for i, mark in (marks or {}).items():
            messages = [*messages[:i], {**messages[i], "content": mark}, *messages[i + 1 :]]
        return self._template.text(messages, self._tools, prompting)


def _split(text: str, mark: str) -> tuple[str, str]:
    """What stands before and after the mark, which must stand in the text once."""
    before, found, after = text.partition(mark)
    if not found or mark in after:
        raise Reject(UNSTABLE)
    return before, after
