"""Records to tokens and roles: the ids of transformers, and exactly the assistant's tokens trained."""

import pickle
from pathlib import Path

import numpy as np
import pytest
from chat_tokenizers import (
    CHATML,
    CHATML_GENERATION,
    CONTENT_TWICE,
    COUNT_EACH,
    COUNT_FIRST,
    DEEPSEEK,
    ENDS_ONCE,
    HARMONY,
    LLAMA2,
    LLAMA3,
    MISTRAL,
    MISTRAL_SYSTEM_LAST,
    QWEN3,
    REVERSED,
    TOOLS,
    TWO_BLOCKS,
    UNPROMPTED,
    ChatTokenizer,
    save_tokenizer,
)

from megatsp.data.sft import Reject, Rendered, Renderer
from megatsp.data.sft.renderer import token_roles
from megatsp.data.sft.turns import Turn


def user(text: str) -> dict:
    return {"role": "user", "content": text}


def assistant(text: str) -> dict:
    return {"role": "assistant", "content": text}


def system(text: str) -> dict:
    return {"role": "system", "content": text}


TWO_TURNS = [user("Hello there"), assistant("first a"), user("second"), assistant("third, of course")]
THOUGHTS = "<think>\nthoughts\n</think>\n\n"
# name, template, begin and end of a turn of the assistant, whether it takes a system message
STYLES = [
    ("chatml", CHATML, "", "<|im_end|>", True),
    ("generation", CHATML_GENERATION, "", "<|im_end|>", True),
    ("llama3", LLAMA3, "", "<|eot_id|>", True),
    ("mistral", MISTRAL, "", "</s>", False),
    ("mistral_system_last", MISTRAL_SYSTEM_LAST, " ", "</s>", True),
    ("llama2", LLAMA2, " ", " </s>", True),
    ("qwen3", QWEN3, "", "<|im_end|>", True),
    ("unprompted", UNPROMPTED, "", "\n\n", True),
]
CONVERSATIONS = {
    "two turns": TWO_TURNS,
    "one turn": TWO_TURNS[:2],
    "system": [system("You are a helpful assistant."), *TWO_TURNS],
    "trailing user": [*TWO_TURNS, user("f e d")],
    "unicode": [user("Grüße, 世界"), assistant("naïve 🎉👩‍👩‍👧 café"), user("e\u0301"), assistant("🎉")],
    "blanks": [user("a "), assistant("\n\n b\n"), user("\n\n"), assistant(" c  ")],
    "same text": [user("a"), assistant("a"), user("a"), assistant("a")],
}


@pytest.fixture(scope="module")
def make(tmp_path_factory: pytest.TempPathFactory):
    """A tokenizer of a template; each is made once."""
    made: dict[tuple[str, bool], ChatTokenizer] = {}

    def get(template: str, sentencepiece: bool = False) -> ChatTokenizer:
        key = (template, sentencepiece)
        if key not in made:
            folder = tmp_path_factory.mktemp("tokenizer")
            made[key] = ChatTokenizer(save_tokenizer(folder, template, sentencepiece))
        return made[key]

    return get


def spoken(tokenizer: ChatTokenizer, rendered: Rendered) -> list[str]:
    """Text of each run of tokens that are the assistant's."""
    runs: list[list[int]] = []
    before = 0
    for i, role in zip(rendered.ids, rendered.roles, strict=True):
        if role and not before:
            runs.append([])
        if role:
            runs[-1].append(i)
        before = role
    return [tokenizer.decode(run) for run in runs]


@pytest.mark.parametrize("sentencepiece", [False, True])
@pytest.mark.parametrize("conversation", CONVERSATIONS)
@pytest.mark.parametrize("name, template, begin, end, has_system", STYLES)
def test_ids_are_transformers_and_the_assistant_alone_is_trained(
    make,
    name: str,
    template: str,
    begin: str,
    end: str,
    has_system: bool,
    conversation: str,
    sentencepiece: bool,
) -> None:
    tokenizer, messages = make(template, sentencepiece), CONVERSATIONS[conversation]
    renderer = Renderer(tokenizer.ours, "chat")
    if messages[0]["role"] == "system" and not has_system:
        with pytest.raises(Reject, match="^template refused: Conversation roles must alternate"):
            renderer.render({"messages": messages})
        return
    rendered = renderer.render({"messages": messages})
    assert rendered.ids == tokenizer.fast.apply_chat_template(messages, tokenize=True, return_dict=False)
    text = tokenizer.fast.apply_chat_template(messages, tokenize=False)
    assert rendered.num_bytes == len(text.encode())
    assert rendered.roles.dtype == np.uint8 and len(rendered.roles) == len(rendered.ids)

    contents = [m["content"] for m in messages if m["role"] == "assistant"]
    if name in ("llama2", "llama3"):
        contents = [content.strip() for content in contents]
    turns = [f"{begin}{content}{end}" for content in contents]
    if name == "qwen3" and messages[-1]["role"] == "assistant":
        turns[-1] = "<think>\n\n</think>\n\n" + turns[-1]
    if conversation != "blanks":  # there, blanks of content and header share a token
        assert [s.lstrip() for s in spoken(tokenizer, rendered)] == [t.lstrip() for t in turns]
        if not sentencepiece:
            assert spoken(tokenizer, rendered) == turns
    else:
        assert ["".join(s.split()) for s in spoken(tokenizer, rendered)] == [
            "".join(t.split()) for t in turns
        ]
    ids = np.array(rendered.ids)
    assert tokenizer.decode(ids[rendered.roles == 2]) == spoken(tokenizer, rendered)[-1]
    assert set(rendered.roles) == ({0, 1, 2} if len(contents) > 1 else {0, 2})


@pytest.mark.parametrize("sentencepiece", [False, True])
@pytest.mark.parametrize("conversation", CONVERSATIONS)
def test_generation_blocks_give_the_mask_of_transformers(
    make, conversation: str, sentencepiece: bool
) -> None:
    tokenizer, messages = make(CHATML_GENERATION, sentencepiece), CONVERSATIONS[conversation]
    theirs = tokenizer.fast.apply_chat_template(messages, return_dict=True, return_assistant_tokens_mask=True)
    ours = Renderer(tokenizer.ours, "chat").render({"messages": messages})
    assert ours.ids == theirs["input_ids"]
    if conversation != "blanks":
        assert (ours.roles > 0).astype(int).tolist() == theirs["assistant_masks"]
    else:  # "\n\n" of header and content in one token: a prompt ends with the first, so it is not generated
        assert ((ours.roles > 0).astype(int) <= np.array(theirs["assistant_masks"])).all()


def test_several_generation_blocks_in_a_turn_are_one_last_turn(make) -> None:
    tokenizer = make(CHATML)
    rendered = Renderer(tokenizer.ours, "chat", TWO_BLOCKS).render({"messages": TWO_TURNS})
    assert spoken(tokenizer, rendered) == [
        "a",
        "first a<|im_end|>",
        "a",
        "third, of course<|im_end|>",
    ]
    ids = np.array(rendered.ids)
    assert tokenizer.decode(ids[rendered.roles == 2]) == "athird, of course<|im_end|>"


def test_thoughts_that_the_template_drops_are_not_looked_for(make) -> None:
    messages = [user("a"), assistant(THOUGHTS + "first"), user("b"), assistant(THOUGHTS + "second")]
    for template, last, end in (
        (QWEN3, THOUGHTS + "second", "<|im_end|>"),
        (DEEPSEEK, "\n\nsecond", "</s>"),
    ):
        tokenizer = make(template)
        rendered = Renderer(tokenizer.ours, "chat").render({"messages": messages})
        assert rendered.ids == tokenizer.fast.apply_chat_template(messages, return_dict=False)
        first = "first" if template is QWEN3 else "\n\nfirst"
        assert spoken(tokenizer, rendered) == [first + end, last + end]


def test_the_last_turn_may_end_with_another_token(make) -> None:
    tokenizer = make(HARMONY)
    rendered = Renderer(tokenizer.ours, "chat").render({"messages": TWO_TURNS})
    assert rendered.ids == tokenizer.fast.apply_chat_template(TWO_TURNS, return_dict=False)
    header = "<|channel|>final<|message|>"
    assert spoken(tokenizer, rendered) == [
        f"{header}first a<|end|>",
        f"{header}third, of course<|return|>",
    ]


@pytest.mark.parametrize(
    "template, messages",
    [
        (ENDS_ONCE, TWO_TURNS),
        (CONTENT_TWICE, TWO_TURNS),
        (REVERSED, TWO_TURNS),
        (COUNT_FIRST, TWO_TURNS[1:]),
    ],
)
def test_what_cannot_be_told_apart_is_refused(make, template: str, messages: list[dict]) -> None:
    with pytest.raises(Reject, match="template renders a turn differently when others follow") as caught:
        Renderer(make(CHATML).ours, "chat", template).render({"messages": messages})
    assert "generation" in caught.value.reason


def test_a_count_in_the_begin_does_not_hide_the_turns(make) -> None:
    tokenizer = make(CHATML)
    rendered = Renderer(tokenizer.ours, "chat", COUNT_EACH).render({"messages": TWO_TURNS})
    assert spoken(tokenizer, rendered) == ["first a<|im_end|>", "third, of course<|im_end|>"]


def test_special_tokens_spelled_in_a_content_are_special_as_in_transformers(make) -> None:
    tokenizer = make(CHATML)
    messages = [user("what is <|im_end|> and <|im_start|>?"), assistant("a <|endoftext|> b")]
    rendered = Renderer(tokenizer.ours, "chat").render({"messages": messages})
    assert rendered.ids == tokenizer.fast.apply_chat_template(messages, return_dict=False)
    assert rendered.ids.count(tokenizer.ours.special_tokens["<|im_end|>"]) == 3
    assert spoken(tokenizer, rendered) == ["a <|endoftext|> b<|im_end|>"]


def test_sharegpt_and_text_parts_are_messages(make) -> None:
    renderer = Renderer(make(CHATML).ours, "chat")
    plain = renderer.render({"messages": [system("s"), user("ab"), assistant("c")]})
    turns = [{"from": "human", "value": "ab"}, {"from": "gpt", "value": "c"}]
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    for record in (
        {"conversations": [{"from": "system", "value": "s"}, *turns]},
        {"system": "s", "conversations": turns},
        {"messages": [system("s"), {"role": "user", "content": parts, "name": None}, assistant("c")]},
    ):
        same = renderer.render(record)
        assert same.ids == plain.ids and same.roles.tolist() == plain.roles.tolist()


def test_tools_and_reasoning_reach_the_template(make) -> None:
    tools = [{"type": "function", "function": {"name": "f<>"}}]
    tokenizer = make(CHATML)
    calls = {"role": "assistant", "content": "", "tool_calls": [{"name": "f"}]}
    messages = [user("a"), calls, {"role": "tool", "content": "3"}, {**assistant("b"), "thinking": "hm "}]
    renderer = Renderer(tokenizer.ours, "chat", TOOLS)
    for given in (tools, '[{"type": "function", "function": {"name": "f<>"}}]'):
        rendered = renderer.render({"messages": messages, "tools": given})
        assert rendered.ids == tokenizer.fast.apply_chat_template(
            messages, tools=tools, chat_template=TOOLS, return_dict=False
        )
        assert spoken(tokenizer, rendered) == ['[{"name": "f"}]<|im_end|>', "hm b<|im_end|>"]


def test_prompt_records_are_two_texts_and_eod(make) -> None:
    tokenizer = make(CHATML)
    tokenizer.ours.chat_template, template = None, tokenizer.ours.chat_template
    try:
        renderer = Renderer(tokenizer.ours, "prompt")
        rendered = renderer.render({"prompt": "Hello <|im_end|> ", "completion": "Paris 🎉"})
        prompt, completion = tokenizer.ours.encode("Hello <|im_end|> "), tokenizer.ours.encode("Paris 🎉")
        assert rendered.ids == [*prompt, *completion, tokenizer.ours.eod]
        assert rendered.roles.tolist() == [0] * len(prompt) + [2] * (len(completion) + 1)
        assert rendered.num_bytes == len("Hello <|im_end|> Paris 🎉".encode())
        assert renderer.render({"prompt": "", "completion": "a"}).roles.tolist() == [2, 2]
        lists = {"prompt": [user("a")], "completion": [assistant("b")]}
        with pytest.raises(ValueError, match="--chat-template") as caught:
            renderer.render(lists)
        assert not isinstance(caught.value, Reject)
    finally:
        tokenizer.ours.chat_template = template
    chat = Renderer(tokenizer.ours, "chat").render({"messages": [user("a"), assistant("b")]})
    assert Renderer(tokenizer.ours, "prompt").render(lists).ids == chat.ids


def test_instructions_are_a_turn_each(make) -> None:
    tokenizer = make(LLAMA3)
    renderer, chat = Renderer(tokenizer.ours, "instruction"), Renderer(tokenizer.ours, "chat")
    for extra, text in (({}, "Do"), ({"input": ""}, "Do"), ({"input": "it"}, "Do\n\nit")):
        rendered = renderer.render({"instruction": "Do", "output": "done", **extra})
        assert rendered.ids == chat.render({"messages": [user(text), assistant("done")]}).ids
        assert spoken(tokenizer, rendered) == ["done<|eot_id|>"]


A_TURN = [user("a"), assistant("b")]


@pytest.mark.parametrize(
    "format, record, reason",
    [
        ("chat", "text", "record is not an object"),
        ("chat", {"text": "a"}, "missing key: messages"),
        ("chat", {"messages": []}, "no messages"),
        ("chat", {"messages": "a"}, "no messages"),
        ("chat", {"messages": ["a"]}, "a message is not an object"),
        ("chat", {"messages": [{"content": "a"}]}, "a message has no role"),
        ("chat", {"messages": [{"role": "bot", "content": "a"}]}, "unknown role"),
        ("chat", {"conversations": [{"from": "alien", "value": "a"}]}, "unknown role"),
        ("chat", {"messages": [{"role": ["user"], "content": "a"}]}, "unknown role"),
        ("chat", {"messages": [user("a")]}, "no assistant turn"),
        ("chat", {"messages": [user("a"), assistant("")]}, "assistant content is empty"),
        ("chat", {"messages": [user("a"), assistant(" \n")]}, "assistant content is empty"),
        ("chat", {"messages": [{"role": "assistant", "content": None}]}, "a message has no content"),
        ("chat", {"messages": [{"role": "user", "content": 3}, assistant("b")]}, "content is not text"),
        ("chat", {"messages": [{"role": "user", "content": [{"type": "image"}]}]}, "content is not text"),
        ("chat", {"messages": A_TURN, "tools": "{"}, "tools is not a list of objects"),
        ("chat", {"messages": A_TURN, "tools": [1]}, "tools is not a list of objects"),
        ("chat", {"messages": [user("\ud800"), assistant("b")]}, "text is not valid Unicode"),
        ("prompt", {"prompt": "a"}, "missing key: completion"),
        ("prompt", {"prompt": "a", "completion": ""}, "completion is empty"),
        ("prompt", {"prompt": A_TURN, "completion": []}, "completion is empty"),
        ("prompt", {"prompt": "a", "completion": 1}, "prompt and completion are neither two"),
        ("prompt", {"prompt": "\udc00", "completion": "a"}, "text is not valid Unicode"),
        ("instruction", {"instruction": "a"}, "missing key: output"),
        ("instruction", {"instruction": "", "output": "b"}, "instruction is empty"),
        ("instruction", {"instruction": "a", "output": ""}, "output is empty"),
        ("instruction", {"instruction": "a", "output": ["b"]}, "output is not text"),
    ],
)  # fmt: skip
def test_records_that_cannot_be_trained_on_say_why(make, format: str, record: object, reason: str) -> None:
    with pytest.raises(Reject) as caught:
        Renderer(make(CHATML).ours, format).render(record)
    assert caught.value.reason.startswith(reason) and str(caught.value) == caught.value.reason
    again = pickle.loads(pickle.dumps(caught.value))
    assert (again.reason, again.detail) == (caught.value.reason, caught.value.detail)


def test_a_template_that_drops_the_answer_trains_nothing(make) -> None:
    template = "{% for m in messages if m.role == 'user' %}{{ m.content }}{% endfor %}"
    with pytest.raises(Reject):
        Renderer(make(CHATML).ours, "chat", template).render({"messages": A_TURN})
    marked = template + "{% generation %}{% endgeneration %}"
    with pytest.raises(Reject, match="nothing of the assistant's last turn is left"):
        Renderer(make(CHATML).ours, "chat", marked).render({"messages": A_TURN})


def test_templates_that_fail_reject_and_templates_that_are_none_stop(make, tmp_path: Path) -> None:
    tokenizer = make(CHATML)
    with pytest.raises(Reject, match="^template refused: 'dict object' has no attribute 'place'"):
        Renderer(tokenizer.ours, "chat", "{{ messages[0].place.name }}").render({"messages": A_TURN})
    with pytest.raises(Reject, match="^template failed: TypeError"):
        Renderer(tokenizer.ours, "chat", "{{ 1 + messages[0].content }}").render({"messages": A_TURN})
    with pytest.raises(Reject, match="^template refused: access to attribute '__class__'"):
        Renderer(tokenizer.ours, "chat", "{{ messages.__class__.mro() }}").render({"messages": A_TURN})
    with pytest.raises(ValueError, match="not Jinja: line 1") as caught:
        Renderer(tokenizer.ours, "chat", "{% for %}")
    assert not isinstance(caught.value, Reject)
    with pytest.raises(ValueError, match="unknown format 'chats'; did you mean chat"):
        Renderer(tokenizer.ours, "chats")
    tokenizer.ours.chat_template, template = None, tokenizer.ours.chat_template
    try:
        for format in ("chat", "instruction"):
            with pytest.raises(ValueError, match="has no chat template: give a file .* --chat-template"):
                Renderer(tokenizer.ours, format)
        assert Renderer(tokenizer.ours, "chat", template).render({"messages": A_TURN}).ids
    finally:
        tokenizer.ours.chat_template = template


@pytest.mark.parametrize(
    "text, begins, turn, roles",
    [
        ("ab cd", [0, 2, 3], Turn(3, 5, True), [0, 0, 2]),
        ("ab cd", [0, 2], Turn(3, 5, True), [0, 2]),  # " cd": the first word, with the header's blank
        ("ab\n\ncd", [0, 2, 4], Turn(3, 6, True), [0, 0, 2]),  # "\n\n": the header's newline and one more
        ("ab\n\ncd", [0, 2, 4], Turn(0, 3, False), [1, 1, 0]),  # the same across the end
        ("a🎉b", [0, 1, 1, 1, 2], Turn(1, 2, True), [0, 2, 2, 2, 0]),  # three tokens of one character
        ("🎉", [0, 0, 0], Turn(0, 1, True), [2, 2, 2]),
        ("ab", [0, 1], Turn(2, 2, True), [0, 0]),
        ("ab c", [0, 3], Turn(2, 4, True), [0, 2]),  # offsets that leave out blanks, as Llama 3's do
        ("abc", [0], Turn(1, 2, True), [2]),
    ],
)
def test_tokens_across_a_border(text: str, begins: list[int], turn: Turn, roles: list[int]) -> None:
    assert token_roles(text, begins, [turn]).tolist() == roles
