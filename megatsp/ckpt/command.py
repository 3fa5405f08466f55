"""The command `megatsp ckpt`: its arguments, and what it prints.

What reads tensors imports torch, which takes seconds: a command does so once its arguments were found good.
"""

import json
from argparse import RawDescriptionHelpFormatter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from megatsp.checkpoint.paths import folder_of, iterations
from megatsp.ckpt.listing import inspect, inspect_lines, list_lines, list_run, read_config, shown_bytes
from megatsp.ckpt.prune import prune
from megatsp.ckpt.select import checkpoints_of, find
from megatsp.parser import Parser

DESCRIPTION = """\
Looks at, checks, compares, thins out and reshards checkpoints, in one process and little memory.
RUN is a run's folder, its checkpoints folder, or one checkpoint (checkpoints/iter_N).

  megatsp ckpt ls RUN                               all checkpoints: size, date, tokens, whether whole
  megatsp ckpt inspect RUN                          state, mesh, files and tensors of one
  megatsp ckpt verify RUN [--all] [--finite]        every checksum; exit status 1 names the damage
  megatsp ckpt diff A B                             state, settings, tensors; exit status 1 if they differ
  megatsp ckpt plan RUN parallel.tsp=8              what loading it takes; exit status 1: does not fit
  megatsp ckpt prune RUN --keep-last 3 --dry-run    removes old ones
  megatsp ckpt reshard RUN --output FOLDER parallel.tsp=4 parallel.dp_shard=2

A run resumes from any mesh's checkpoint as it is: resharding offline only makes a later start read less.
"""
_OVERRIDES = "of the mesh, as of megatsp train; parallel keys that are not given: one rank, or their default"


def run(arguments: Sequence[str]) -> int:
    """Runs `megatsp ckpt` with these arguments; returns the exit status.

    Raises:
        ValueError: an argument or a checkpoint that cannot be used.
    """
    parser = Parser("megatsp ckpt", DESCRIPTION, formatter_class=RawDescriptionHelpFormatter)
    commands = {
        "ls": _add_ls, "inspect": _add_inspect, "verify": _add_verify, "diff": _add_diff, "plan": _add_plan,
        "prune": _add_prune, "reshard": _add_reshard,
    }  # fmt: skip
    added = parser.add_subparsers(dest="command", required=True, metavar=" | ".join(commands))
    chosen = {name: added.add_parser(name) for name in commands}
    for name, add in commands.items():
        add(chosen[name])
    if arguments and arguments[0] in chosen:  # options may stand between overrides
        given = chosen[arguments[0]].parse_intermixed_args(arguments[1:])
    else:
        given = parser.parse_args(arguments)
    return int(given.work(given))


def _add_run(parser: Any, one: bool = True) -> None:
    parser.add_argument("run", type=_path, metavar="RUN", help="a run's folder, or a checkpoint of it")
    if one:
        text = "last, best or an iteration (default: last)"
        parser.add_argument("--checkpoint", metavar="WHICH", help=text)


def _add_json(parser: Any) -> None:
    parser.add_argument("--json", action="store_true", help="print an object for programs")


def _add_ls(parser: Any) -> None:
    parser.description = "Lists a run's checkpoints, and what interrupted saves have left."
    _add_run(parser, one=False)
    _add_json(parser)
    parser.set_defaults(work=_ls)


def _add_inspect(parser: Any) -> None:
    parser.description = "Shows the state, mesh, files and tensors of a checkpoint; --json: its settings too."
    _add_run(parser)
    parser.add_argument("--tensors", default="*", metavar="PATTERN", help="as '*.q_proj.*' (default: all)")
    _add_json(parser)
    parser.set_defaults(work=_inspect)


def _add_verify(parser: Any) -> None:
    parser.description = "Reads every file through and holds it against the manifest."
    _add_run(parser)
    parser.add_argument("--all", action="store_true", help="all checkpoints of the run")
    parser.add_argument("--finite", action="store_true", help="no number may be NaN or infinite either")
    parser.set_defaults(work=_verify)


def _add_diff(parser: Any) -> None:
    parser.description = "Compares two checkpoints, one tensor at a time; the meshes need not be the same."
    parser.add_argument("run", type=_path, metavar="A", help="a run's folder, or a checkpoint of it")
    parser.add_argument("other", type=_path, metavar="B", help="likewise")
    parser.add_argument("--checkpoint", metavar="WHICH", help="of A: last, best or an iteration")
    parser.add_argument("--other-checkpoint", metavar="WHICH", help="of B (default: as --checkpoint)")
    parser.add_argument("--ignore-settings", action="store_true", help="config.yaml may differ")
    _add_json(parser)
    parser.set_defaults(work=_diff)


def _add_plan(parser: Any) -> None:
    parser.description = "What loading a checkpoint on a mesh takes, found without starting it."
    _add_run(parser)
    parser.add_argument("overrides", nargs="*", metavar="group.key=value", help=_OVERRIDES)
    _add_json(parser)
    parser.set_defaults(work=_plan)


def _add_prune(parser: Any) -> None:
    parser.description = (
        "Removes checkpoints as checkpoint.keep_last and keep_every do. The newest, the best and the "
        "only whole one always stay. The newest are read through by checksum: a damaged one does not count."
    )
    _add_run(parser, one=False)
    parser.add_argument("--keep-last", type=int, required=True, metavar="N", help="so many newest stay")
    text = "those of every so many iterations stay too (default: 0: none)"
    parser.add_argument("--keep-every", type=int, default=0, metavar="M", help=text)
    text = "this one stays too; it may be given several times"
    parser.add_argument("--keep", type=int, action="append", default=[], metavar="ITERATION", help=text)
    parser.add_argument("--dry-run", action="store_true", help="only say what would be removed")
    parser.set_defaults(work=_prune)


def _add_reshard(parser: Any) -> None:
    parser.description = (
        "Writes a run folder with the checkpoint as another mesh's ranks would have saved it."
    )
    _add_run(parser)
    parser.add_argument("overrides", nargs="+", metavar="group.key=value", help=_OVERRIDES)
    parser.add_argument("--output", type=_path, required=True, metavar="FOLDER", help="to write; must be new")
    parser.set_defaults(work=_reshard)


def _ls(given: Any) -> int:
    found = list_run(checkpoints_of(given.run))
    _print(found, list_lines(found), given.json)
    return 0


def _inspect(given: Any) -> int:
    found = inspect(find(given.run, given.checkpoint), given.tensors)
    _print(found, inspect_lines(found), given.json)
    return 0


def _verify(given: Any) -> int:
    if given.all and given.checkpoint is not None:
        raise ValueError(f"--all: all checkpoints are verified; leave --checkpoint {given.checkpoint} out")
    if given.all:
        checkpoints = checkpoints_of(given.run)
        folders = [folder_of(checkpoints, iteration) for iteration in iterations(checkpoints)]
        if not folders:
            raise ValueError(f"no checkpoints in {checkpoints}")
    else:
        folders = [find(given.run, given.checkpoint)]
    from megatsp.ckpt.verify import verify

    problems = [line for folder in folders for line in verify(folder, given.finite)]
    for line in problems:
        print(f"damaged: {line}", flush=True)
    return 1 if problems else 0


def _diff(given: Any) -> int:
    which = given.other_checkpoint or given.checkpoint
    one, other = find(given.run, given.checkpoint), find(given.other, which)
    if one.samefile(other):
        raise ValueError(f"A and B are both {one}: name another checkpoint, or B's with --other-checkpoint")
    from megatsp.ckpt.diff import diff, diff_lines

    found, is_equal = diff(one, other, not given.ignore_settings)
    _print(found, diff_lines(found), given.json)
    return 0 if is_equal else 1


def _plan(given: Any) -> int:
    checkpoint = find(given.run, given.checkpoint)
    from megatsp.ckpt.plan import plan, plan_lines

    found = plan(checkpoint, given.overrides)
    _print(found, plan_lines(found), given.json)
    return 1 if found["differs"] else 0


def _prune(given: Any) -> int:
    checkpoints = checkpoints_of(given.run)
    removed = prune(checkpoints, given.keep_last, given.keep_every, set(given.keep), given.dry_run)
    word = "would remove" if given.dry_run else "removed"
    for path, size in removed:
        print(f"{word} {path}, {shown_bytes(size)}")
    left = [
        n for n in iterations(checkpoints) if folder_of(checkpoints, n) not in {path for path, _ in removed}
    ]
    total = shown_bytes(sum(size for _, size in removed))
    stay = ", ".join(map(str, left)) or "none"
    print(f"{word} {len(removed)} checkpoints, {total}; these stay: {stay}", flush=True)
    return 0


def _reshard(given: Any) -> int:
    checkpoint = find(given.run, given.checkpoint)
    from megatsp.ckpt.reshard import reshard

    written = reshard(checkpoint, given.output, given.overrides)
    command = "sft" if read_config(written).finetune.hf else "train"
    run = given.output.absolute()
    print(f"wrote {written}: to go on from it: megatsp {command} output_dir={run.parent} name={run.name} ...")
    return 0


def _print(found: dict[str, Any], lines: Iterable[str], as_json: bool) -> None:
    print(json.dumps(found, indent=2) if as_json else "\n".join(lines), flush=True)


def _path(text: str) -> Path:
    return Path(text).expanduser()
