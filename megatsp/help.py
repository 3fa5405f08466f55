"""The text of `megatsp train --help` or `sft --help`, generated from the schema and the files in configs/."""

import textwrap
from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from typing import Any, get_type_hints

from megatsp.compose import group_choices, primary_defaults
from megatsp.tuned_model import OVERRIDABLE
from megatsp.validate import spoken

WIDTH = 100  # columns

OPTIONS = """\
  --dry-run          print the resolved configuration, the mesh and the memory, and stop
  --show-mesh        print where each axis lies on launch.nodes of launch.nproc ranks, and stop;
                     --show-mesh=FILE.png draws it too
  --config-dir DIR   a folder with choices of your own, such as DIR/experiment/mine.yaml
"""

ABOUT = {
    "train": """\
Trains a GPT. Alone it starts launch.nproc ranks on this machine; under torchrun or srun it joins.
""",
    "sft": """\
Tunes the Hugging Face checkpoint finetune.hf, a folder or a name on the hub, and gives it back in its format:
all weights, or low-rank adapters (finetune=lora). The model's keys are the checkpoint's; only
model.rotary_base, model.rotary_scaling.* and model.max_position_embeddings may be set, to extend its context.
data.path is what `megatsp preprocess --format chat` wrote with its tokenizer, or plain documents (continued
pretraining). Alone it starts launch.nproc ranks on this machine; under torchrun or srun it joins.
""",
}

EXAMPLES = {
    "train": """\
examples:
  megatsp train experiment=quickstart
  megatsp train experiment=quickstart parallel.tsp=2 trainer.train_iters=50
  megatsp train model=gpt_7b parallel.tsp=8 launch.nproc=8 trainer.seq_length=131072 --dry-run
  torchrun --nproc-per-node 8 -m megatsp train model=gpt_1b parallel.tsp=8 trainer=bf16
""",
    "sft": """\
examples:
  megatsp preprocess --input chats.jsonl --format chat --tokenizer Qwen/Qwen3-8B --output-prefix data/chats
  megatsp sft finetune.hf=Qwen/Qwen3-8B data.path=data/chats_chat_document launch=gpu8
  megatsp sft finetune=lora finetune.hf=Qwen/Qwen3-8B data.path=data/chats_chat_document launch=gpu8
  megatsp sft experiment=sft_qwen3_8b_128k finetune.hf=path/to/Qwen3-8B data.path=data/long_chat_document
""",
}


def training_help(name: str) -> str:
    """Usage, groups with their choices, every key with its type, default, unit and allowed values.

    name: train or sft.
    """
    usage = (
        f"usage: megatsp {name} [--help] [--dry-run] [--show-mesh[=FILE.png]] [--config-dir DIR]\n"
        f"{' ' * len(f'usage: megatsp {name} ')}[group=choice | key=value ...]"
    )
    groups = "\n".join(
        textwrap.fill(", ".join(choices), WIDTH, initial_indent=f"  {group:<12} ", subsequent_indent=" " * 15)
        for group, choices in group_choices(primary=name).items()
    )
    keys = "\n".join(_key_lines(primary_defaults(name), "", name == "sft"))
    return (
        f"{usage}\n\n{ABOUT[name]}\n{OPTIONS}\ngroups (group=choice):\n{groups}\n\n"
        f"keys (group.key=value):\n{keys}\n\n{EXAMPLES[name]}"
    )


def _key_lines(node: Any, path: str, is_sft: bool) -> Iterator[str]:
    hints = get_type_hints(type(node))
    for item in fields(node):
        default = getattr(node, item.name)
        if is_dataclass(default):
            yield from _key_lines(default, f"{path}{item.name}.", is_sft)
            continue
        if is_sft and path == "model." and item.name not in OVERRIDABLE:
            continue  # what the checkpoint says
        type_name = "list" if isinstance(default, list) else hints[item.name].__name__
        unit = f" [{item.metadata['unit']}]" if item.metadata["unit"] else ""
        shown = "the checkpoint's" if is_sft and path.startswith("model.") else _shown(default)
        yield f"  {path}{item.name}: {type_name} = {shown}{unit}"
        allowed = _allowed(item.metadata["choices"], item.metadata["within"])
        text = item.metadata["help"] + allowed
        yield textwrap.fill(text, WIDTH, initial_indent=" " * 6, subsequent_indent=" " * 6)


def _allowed(choices: tuple[str, ...], within: str) -> str:
    return f" ({' | '.join(choices)})" if choices else f" ({spoken(within)})" if within else ""


def _shown(value: Any) -> str:
    """A default as it is written in an override."""
    if isinstance(value, list):
        return f"[{','.join(map(str, value))}]"
    return str(value).lower() if isinstance(value, bool) else str(value) or "''"
