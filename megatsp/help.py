"""The text of `megatsp train --help`, generated from the schema and the files in configs/."""

import textwrap
from collections.abc import Iterator
from dataclasses import MISSING, fields, is_dataclass
from typing import Any, get_type_hints

from megatsp.compose import group_choices
from megatsp.schema import Config
from megatsp.validate import spoken

WIDTH = 100  # columns

USAGE = """\
usage: megatsp train [--help] [--dry-run] [--config-dir DIR] [group=choice | group.key=value ...]

Trains a GPT. Alone it starts launch.nproc ranks on this machine; under torchrun or srun it joins.

  --dry-run          print the resolved configuration, the mesh and the memory, and stop
  --config-dir DIR   a folder with choices of your own, such as DIR/experiment/mine.yaml
"""

EXAMPLES = """\
examples:
  megatsp train experiment=quickstart
  megatsp train experiment=quickstart parallel.tsp=2 trainer.train_iters=50
  megatsp train model=gpt_7b parallel.tsp=8 launch.nproc=8 trainer.seq_length=131072 --dry-run
  torchrun --nproc-per-node 8 -m megatsp train model=gpt_1b parallel.tsp=8 trainer=bf16
"""


def train_help() -> str:
    """Usage, groups with their choices, every key with its type, default, unit and allowed values."""
    groups = "\n".join(
        textwrap.fill(", ".join(choices), WIDTH, initial_indent=f"  {group:<12} ", subsequent_indent=" " * 15)
        for group, choices in group_choices().items()
    )
    keys = "\n".join(_key_lines(Config, ""))
    return f"{USAGE}\ngroups (group=choice):\n{groups}\n\nkeys (group.key=value):\n{keys}\n\n{EXAMPLES}"


def _key_lines(kind: type, path: str) -> Iterator[str]:
    hints = get_type_hints(kind)
    for item in fields(kind):
        hint = hints[item.name]
        if is_dataclass(hint):
            assert isinstance(hint, type)
            yield from _key_lines(hint, f"{path}{item.name}.")
            continue
        default = item.default if item.default_factory is MISSING else item.default_factory()
        type_name = "list" if isinstance(default, list) else hint.__name__
        unit = f" [{item.metadata['unit']}]" if item.metadata["unit"] else ""
        yield f"  {path}{item.name}: {type_name} = {_shown(default)}{unit}"
        allowed = _allowed(item.metadata["choices"], item.metadata["within"])
        text = item.metadata["help"] + allowed
        yield textwrap.fill(text, WIDTH, initial_indent=" " * 6, subsequent_indent=" " * 6)


def _allowed(choices: tuple[str, ...], within: str) -> str:
    return f" ({' | '.join(choices)})" if choices else f" ({spoken(within)})" if within else ""


def _shown(value: Any) -> str:
    """A default as it is written in an override."""
    if isinstance(value, list):
        return f"[{','.join(value)}]"
    return str(value).lower() if isinstance(value, bool) else str(value) or "''"
