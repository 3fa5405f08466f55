"""A chat template: Jinja text that a model's authors wrote, run in transformers' own sandbox."""

import json
import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any

from jinja2.exceptions import TemplateError, TemplateSyntaxError
from transformers.utils.chat_template_utils import render_jinja_template

from megatsp.data.sft.records import Message, Reject
from megatsp.data.tokenizer import Tokenizer

_RENDER: Any = render_jinja_template  # its annotations are not those of what it takes and returns
GENERATION = re.compile(r"\{%[-+]?\s*generation\s*[-+]?%\}")
SPECIAL_TOKENS = ("bos", "eos", "unk", "sep", "pad", "cls", "mask")  # that templates name as bos_token, ...


class Template:
    """Renders messages as transformers' apply_chat_template does, whose function this is.

    Its environment is sandboxed and immutable, with trim_blocks, lstrip_blocks, loop controls, tojson,
    raise_exception and strftime_now.

    Attributes:
        source: the Jinja text.
        marks_assistant: whether {% generation %} blocks say what the assistant speaks.
        special_texts: spellings of the tokenizer's special tokens.

    Args:
        variables: what the template may name besides the messages: bos_token, eos_token, ...

    Raises:
        ValueError: not Jinja.
    """

    def __init__(self, source: str, variables: Mapping[str, str], special_texts: Sequence[str] = ()) -> None:
        self.source, self.special_texts = source, tuple(text for text in special_texts if text)
        self.marks_assistant = GENERATION.search(source) is not None
        self._variables = dict(variables)
        with suppress(Reject):  # of an empty conversation: only the syntax is of interest here
            self.text([], None)

    def text(self, messages: list[Message], tools: list[Message] | None, prompting: bool = False) -> str:
        """The messages' text; prompting adds the header after which the assistant would speak.

        Raises:
            Reject: the template refused the messages, or failed on them.
        """
        return self._render(messages, tools, prompting, False)[0]

    def text_and_blocks(
        self, messages: list[Message], tools: list[Message] | None
    ) -> tuple[str, list[tuple[int, int]]]:
        """The messages' text and what {% generation %} blocks wrote of it, as ranges of characters."""
        return self._render(messages, tools, False, True)

    def _render(
        self, messages: list[Message], tools: list[Message] | None, prompting: bool, blocks: bool
    ) -> tuple[str, list[tuple[int, int]]]:
        try:
            texts, found = _RENDER(
                conversations=[messages],
                tools=tools,
                chat_template=self.source,
                return_assistant_tokens_mask=blocks,
                add_generation_prompt=prompting,
                **self._variables,
            )
        except TemplateSyntaxError as error:
            raise ValueError(f"the chat template is not Jinja: line {error.lineno}: {error}") from None
        except TemplateError as error:
            raise Reject(f"template refused: {_first_line(error)}") from None
        except (TypeError, ValueError, KeyError, IndexError, AttributeError, ArithmeticError) as error:
            raise Reject(f"template failed: {type(error).__name__}", _first_line(error)) from None
        return texts[0], (found[0] if blocks else [])


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:200]


def template_variables(tokenizer: Tokenizer) -> dict[str, str]:
    """bos_token, eos_token, ... as the tokenizer's own files name them: what transformers gives a template.

    A tokenizer without a tokenizer_config.json has but an eos_token, the text of its eod.
    """
    files, found = tokenizer.files(), dict[str, Any]()
    for file in ("special_tokens_map.json", "tokenizer_config.json"):
        found |= json.loads(files.get(file, b"{}"))
    if "tokenizer_config.json" not in files:
        found["eos_token"] = next(
            (t for t, i in tokenizer.special_tokens.items() if i == tokenizer.eod), None
        )
    variables = {}
    for name in SPECIAL_TOKENS:
        token = found.get(f"{name}_token")
        text = token.get("content") if isinstance(token, dict) else token  # {"content": text, "lstrip": ...}
        if isinstance(text, str):
            variables[f"{name}_token"] = text
    return variables
