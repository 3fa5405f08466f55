# ruff: noqa: E501  (the lines of templates are as long as their authors made them)
"""Small tokenizers with the chat templates of well-known models, made here: no network."""

import json
from pathlib import Path

import numpy as np
import tokenizers
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from megatsp.data.tokenizer import load_tokenizer

TEXTS = [
    "You are a helpful assistant. Hello there! What is the capital of France? Paris, of course.",
    "system user assistant INST SYS tool thoughts first second third\n\n a b c d e f 1 2 3 \n",
]

CHATML = """{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}\
{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"""

CHATML_GENERATION = """\
{%- for message in messages %}
    {%- if message.role == 'assistant' %}
        {{- '<|im_start|>assistant\n' }}{% generation %}{{ message.content + '<|im_end|>' }}{% endgeneration %}{{ '\n' }}
    {%- else %}
        {{- '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"""

LLAMA3 = """{% set loop_messages = messages %}{% for message in loop_messages %}\
{% set content = '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n'+ message['content'] | trim + '<|eot_id|>' %}\
{% if loop.index0 == 0 %}{% set content = bos_token + content %}{% endif %}{{ content }}{% endfor %}\
{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"""

MISTRAL = """{{ bos_token }}{% for message in messages %}\
{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}\
{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}\
{% if message['role'] == 'user' %}{{ '[INST] ' + message['content'] + ' [/INST]' }}\
{% elif message['role'] == 'assistant' %}{{ message['content'] + eos_token}}\
{% else %}{{ raise_exception('Only user and assistant roles are supported!') }}{% endif %}{% endfor %}"""

# The system message stands in the last turn of the user, wherever that is.
MISTRAL_SYSTEM_LAST = """\
{%- if messages[0].role == 'system' %}{% set system = messages[0].content %}{% set rest = messages[1:] %}
{%- else %}{% set rest = messages %}{% endif %}
{{- bos_token }}
{%- for message in rest %}
    {%- if message.role == 'user' %}
        {%- if system is defined and loop.index0 >= rest | length - 2 %}
            {{- '[INST] ' + system + '\n\n' + message.content + '[/INST]' }}
        {%- else %}{{- '[INST] ' + message.content + '[/INST]' }}{% endif %}
    {%- else %}{{- ' ' + message.content + eos_token }}{% endif %}
{%- endfor %}"""

LLAMA2 = """{% if messages[0]['role'] == 'system' %}{% set loop_messages = messages[1:] %}\
{% set system_message = messages[0]['content'] %}{% else %}{% set loop_messages = messages %}\
{% set system_message = false %}{% endif %}{% for message in loop_messages %}\
{% if loop.index0 == 0 and system_message %}{% set content = '<<SYS>>\n' + system_message + '\n<</SYS>>\n\n' + message['content'] %}\
{% else %}{% set content = message['content'] %}{% endif %}{% if message['role'] == 'user' %}\
{{ bos_token + '[INST] ' + content | trim + ' [/INST]' }}{% elif message['role'] == 'assistant' %}\
{{ ' '  + content | trim + ' ' + eos_token }}{% endif %}{% endfor %}"""

# Thoughts of the turns before the user's last question are dropped; the last turn has them, if only empty ones.
QWEN3 = """\
{%- set ns = namespace(last=0) %}
{%- for message in messages %}{% if message.role == 'user' %}{% set ns.last = loop.index0 %}{% endif %}{% endfor %}
{%- for message in messages %}
    {%- if message.role != 'assistant' %}
        {{- '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>' + '\n' }}
    {%- else %}
        {%- set content = message.content %}{% set thoughts = '' %}
        {%- if '</think>' in content %}
            {%- set thoughts = content.split('</think>')[0].split('<think>')[-1].strip('\n') %}
            {%- set content = content.split('</think>')[-1].lstrip('\n') %}
        {%- endif %}
        {%- if loop.index0 > ns.last and (loop.last or thoughts) %}
            {{- '<|im_start|>assistant\n<think>\n' + thoughts + '\n</think>\n\n' + content }}
        {%- else %}{{- '<|im_start|>assistant\n' + content }}{% endif %}
        {{- '<|im_end|>\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{% endif %}"""

# The model is prompted to think, and what it thought is not shown.
DEEPSEEK = """{{ bos_token }}{% for message in messages %}{% if message.role == 'user' %}\
{{ '<|User|>' + message.content }}{% elif message.role == 'assistant' %}\
{{ '<|Assistant|>' + message.content.split('</think>')[-1] + eos_token }}{% endif %}{% endfor %}\
{% if add_generation_prompt %}{{ '<|Assistant|><think>\n' }}{% endif %}"""

# The last turn ends with another token than those before it, as of gpt-oss.
HARMONY = """{% for message in messages %}{% if message.role != 'assistant' %}\
{{ '<|start|>' + message.role + '<|message|>' + message.content + '<|end|>' }}{% else %}\
{{ '<|start|>assistant<|channel|>final<|message|>' + message.content }}\
{{ '<|return|>' if loop.last and not add_generation_prompt else '<|end|>' }}{% endif %}{% endfor %}\
{% if add_generation_prompt %}{{ '<|start|>assistant' }}{% endif %}"""

UNPROMPTED = """{% for message in messages %}{{ '### ' + message['role'] + ':\n' + message['content'] + '\n\n' }}{% endfor %}"""

# Templates whose turns cannot be told apart.
ENDS_ONCE = (
    "{% for m in messages %}{{ m.role + ': ' + m.content + (eos_token if loop.last else '') }}{% endfor %}"
)
CONTENT_TWICE = (
    "{{ messages | length }}{% for m in messages %}{{ m.role + m.content + m.content }}{% endfor %}"
)
REVERSED = "{% for m in messages | reverse %}{{ m.role + ': ' + m.content + '\n' }}{% endfor %}"
COUNT_FIRST = "{{ messages | length }}{% for m in messages %}{{ m.content }}{% endfor %}"
# And one whose turns can.
COUNT_EACH = "{% for m in messages %}{{ '<|im_start|>' + m.role + ' ' ~ messages | length + m.content }}<|im_end|>{% endfor %}"
TWO_BLOCKS = CHATML_GENERATION.replace(
    "{% generation %}", "{% generation %}{{ 'a' }}{% endgeneration %}<|im_start|>{% generation %}"
)
TOOLS = "{% if tools %}{{ tools | tojson }}{% endif %}" + CHATML.replace(
    "message['content'] +",
    "message.reasoning_content | default('') + (message.content or message.tool_calls | tojson) +",
)

SPECIALS = {
    CHATML: ["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
    LLAMA3: ["<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"],
    MISTRAL: ["<s>", "</s>", "[INST]", "[/INST]"],
    LLAMA2: ["<s>", "</s>"],
    HARMONY: ["<|endoftext|>", "<|start|>", "<|message|>", "<|channel|>", "<|return|>", "<|end|>"],
    DEEPSEEK: ["<s>", "</s>", "<|User|>", "<|Assistant|>"],
}
for same, other in (
    (CHATML_GENERATION, CHATML),
    (QWEN3, CHATML),
    (UNPROMPTED, CHATML),
    (MISTRAL_SYSTEM_LAST, MISTRAL),
):
    SPECIALS[same] = SPECIALS[other]


def save_tokenizer(folder: Path, template: str, sentencepiece: bool = False) -> Path:
    """A folder as transformers saves it: byte-level BPE, or BPE like Llama-2's, with blanks as ▁."""
    specials = SPECIALS[template]
    if sentencepiece:
        backend = tokenizers.Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
        backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
        backend.decoder = decoders.Sequence(
            [
                decoders.Replace("▁", " "),
                decoders.ByteFallback(),
                decoders.Fuse(),
                decoders.Strip(" ", 1, 0),
            ]
        )
        trainer = trainers.BpeTrainer(
            vocab_size=420,
            special_tokens=["<unk>", *specials, *(f"<0x{byte:02X}>" for byte in range(256))],
            show_progress=False,
        )
    else:
        backend = tokenizers.Tokenizer(models.BPE())
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        backend.decoder = decoders.ByteLevel()
        backend.post_processor = processors.ByteLevel(trim_offsets=False)
        trainer = trainers.BpeTrainer(
            vocab_size=360,
            special_tokens=specials,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        )
    backend.train_from_iterator(TEXTS * 3, trainer)
    if sentencepiece:  # bytes are pieces of the vocabulary, not special tokens
        backend = _without_added_bytes(backend)
    bos = specials[0]
    fast = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token=bos,
        eos_token=specials[1] if specials[1] == "</s>" else specials[-1],
        extra_special_tokens=[AddedToken(s, special=True, normalized=False) for s in specials[1:]],
        clean_up_tokenization_spaces=False,
    )
    fast.chat_template = template
    fast.save_pretrained(folder)
    return folder


def _without_added_bytes(backend: tokenizers.Tokenizer) -> tokenizers.Tokenizer:
    content = json.loads(backend.to_str())
    content["added_tokens"] = [t for t in content["added_tokens"] if not t["content"].startswith("<0x")]
    return tokenizers.Tokenizer.from_str(json.dumps(content))


class ChatTokenizer:
    """One folder's tokenizer, ours and that of transformers."""

    def __init__(self, folder: Path) -> None:
        self.ours = load_tokenizer(str(folder))
        self.fast = AutoTokenizer.from_pretrained(folder)

    def decode(self, ids: list[int] | np.ndarray) -> str:
        """The text, in which special tokens are spelled."""
        return self.fast.decode([int(i) for i in ids], skip_special_tokens=False)
