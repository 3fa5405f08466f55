"""Text that tokenizers are tried on, and a little to train them on."""

import inspect
import json

TRICKY = (
    "",
    " ",
    "  two  spaces, \ttab \r\n\n\n newlines \n",
    "def f(x):\n    return x + 1  # Ünïcode: 日本語 🙂\n",
    "Zero\x00 byte, e\u0301 combining, ﬁ ligature, \u00a0nbsp, \u200bzero width, ▁ block, <0x41>",
    "<|endoftext|> spelt out, </s>, a</s>b, <s>, [CLS] [SEP] [UNK], <|im_start|>user",
    "don't we'll 12345 1,000.5 CamelCase snake_case ...!!!",
    "naïve\ufffd \U0001f468\u200d\U0001f469\u200d\U0001f467 \u0627\u0644\u0639\u0631",
)
RENDERED = "<|im_start|>user\nÜber 日本🙂?<|im_end|>\n<|im_start|>assistant\nYes.<|im_end|><|endoftext|>"
CORPUS = [inspect.getsource(json), inspect.getsource(inspect)[:40000], *TRICKY]
