"""What records of fine-tuning data say: each format's keys as a list of messages, or a reason to refuse."""

import json
from typing import Any

Message = dict[str, Any]

FORMATS = ("chat", "prompt", "instruction")
ASSISTANT = "assistant"
ROLES = ("system", "developer", "user", ASSISTANT, "tool")
# "from" of ShareGPT's messages, and what data sets made in its likeness call them.
SHAREGPT_ROLES = {
    "system": "system",
    "human": "user",
    "user": "user",
    "gpt": ASSISTANT,
    "chatgpt": ASSISTANT,
    "model": ASSISTANT,
    ASSISTANT: ASSISTANT,
    "tool": "tool",
    "observation": "tool",
}


class Reject(ValueError):
    """A record that cannot be trained on.

    Attributes:
        reason: the same text for every record with that fault, so that reasons can be counted.
        detail: what this record has, or "".
    """

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(reason)
        self.reason, self.detail = reason, detail

    def __reduce__(self) -> tuple[type["Reject"], tuple[str, str]]:  # both cross between processes
        return Reject, (self.reason, self.detail)


def chat_messages(record: Message) -> list[Message]:
    """Messages {"role", "content", ...} of a chat record; keys that are null are left out.

    Raises:
        Reject: no messages, an unknown role, a content that is no text, an assistant without content.
    """
    if "messages" in record:
        return checked_messages(record["messages"])
    if "conversations" not in record:
        raise Reject("missing key: messages", f"the record has {', '.join(map(str, record)) or 'no keys'}")
    turns = record["conversations"]
    system = record.get("system")
    if isinstance(turns, list) and isinstance(system, str) and system:  # beside the turns in some data sets
        turns = [{"from": "system", "value": system}, *turns]
    return checked_messages(turns)


def checked_messages(messages: Any) -> list[Message]:
    """The same for a list of messages, in OpenAI's or in ShareGPT's keys."""
    if not isinstance(messages, list) or not messages:
        raise Reject("no messages")
    found = [_message(message) for message in messages]
    if not any(message["role"] == ASSISTANT for message in found):
        raise Reject("no assistant turn")
    return found


def prompt_parts(record: Message) -> tuple[str, str] | list[Message]:
    """A prompt record's (prompt, completion), or its messages where both are lists of messages.

    Raises:
        Reject: a missing key, an empty completion, or neither two texts nor two lists.
    """
    prompt, completion = _required(record, "prompt"), _required(record, "completion")
    if isinstance(prompt, list) and isinstance(completion, list):
        if not completion:
            raise Reject("completion is empty")
        return checked_messages(prompt + completion)
    if not isinstance(prompt, str) or not isinstance(completion, str):
        raise Reject("prompt and completion are neither two texts nor two lists of messages")
    if not completion:
        raise Reject("completion is empty")
    return prompt, completion


def instruction_messages(record: Message) -> list[Message]:
    """An instruction record as one turn of the user and one of the assistant.

    Raises:
        Reject: a missing key, a value that is no text, an empty instruction or output.
    """
    instruction, output = _required(record, "instruction"), _required(record, "output")
    extra = record.get("input") or ""
    for name, value in (("instruction", instruction), ("input", extra), ("output", output)):
        if not isinstance(value, str):
            raise Reject(f"{name} is not text", type(value).__name__)
    if not instruction:
        raise Reject("instruction is empty")
    if not output:
        raise Reject("output is empty")
    user = f"{instruction}\n\n{extra}" if extra else instruction
    return [{"role": "user", "content": user}, {"role": ASSISTANT, "content": output}]


def record_tools(record: Message) -> list[Message] | None:
    """The record's "tools", JSON schemas for the chat template; some data sets hold them as text.

    Raises:
        Reject: neither a list of objects nor the text of one.
    """
    tools = record.get("tools")
    if isinstance(tools, str):
        try:
            tools = json.loads(tools) if tools.strip() else None
        except json.JSONDecodeError as error:
            raise Reject("tools is not a list of objects", str(error)) from None
    if tools is not None and not (isinstance(tools, list) and all(isinstance(t, dict) for t in tools)):
        raise Reject("tools is not a list of objects")
    return tools


def _required(record: Message, key: str) -> Any:
    if record.get(key) is None:
        raise Reject(f"missing key: {key}")
    return record[key]


def _message(message: Any) -> Message:
    if not isinstance(message, dict):
        raise Reject("a message is not an object", type(message).__name__)
    # transformers drops nulls too: many templates would write "None".
    kept = {key: value for key, value in message.items() if value is not None}
    if "from" in kept and "role" not in kept:
        role, content = kept.pop("from"), kept.pop("value", None)
        kept = {"role": SHAREGPT_ROLES.get(role, role) if isinstance(role, str) else role, **kept}
        if content is not None:
            kept["content"] = content
    if "role" not in kept:
        raise Reject("a message has no role")
    if kept["role"] not in ROLES:
        raise Reject("unknown role", str(kept["role"])[:80])
    calls = kept["role"] == ASSISTANT and bool(kept.get("tool_calls"))
    if "content" in kept:
        kept["content"] = _text(kept["content"])
    elif not calls:
        raise Reject("a message has no content")
    if kept["role"] == ASSISTANT and not calls and not kept["content"].strip():
        raise Reject("assistant content is empty")
    return kept


def _text(content: Any) -> str:
    """A content's text; a list of {"type": "text", "text": ...} parts is joined."""
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise Reject("content is not text", type(content).__name__)
    texts: list[str] = []
    for part in content:
        text = part.get("text") if isinstance(part, dict) and part.get("type") == "text" else part
        if not isinstance(text, str):
            raise Reject("content is not text", str(part)[:80])
        texts.append(text)
    return "".join(texts)
