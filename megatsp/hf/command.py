"""The command `megatsp convert`: import, export, and the check alone."""

import re
import time
from argparse import RawDescriptionHelpFormatter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatsp.hf.hub import check_name
from megatsp.parser import Parser
from megatsp.schema import Config

_UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}

DESCRIPTION = """\
Hugging Face checkpoints to runs of megatsp and back, in one process and little memory.

  megatsp convert import HF RUN_FOLDER      a folder or a hub's name becomes a run to train or generate with
  megatsp convert export RUN OUTPUT         a run's last checkpoint becomes a folder that transformers loads
  megatsp convert verify HF [RUN]           logits of a checkpoint, or of a run, against transformers'
"""


def run(arguments: Sequence[str]) -> int:
    """Runs `megatsp convert` with these arguments; returns the exit status.

    Raises:
        ValueError: an argument, a checkpoint or a folder that cannot be used; the check has failed.
    """
    parser = Parser("megatsp convert", DESCRIPTION, formatter_class=RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True, metavar="import | export | verify")
    for name, add in (("import", _add_import), ("export", _add_export), ("verify", _add_verify)):
        add(commands.add_parser(name))
    given = parser.parse_args(arguments)
    started = time.perf_counter()
    given.work(given)
    print(f"done in {time.perf_counter() - started:.1f} s", flush=True)
    return 0


def _add_import(parser: Any) -> None:
    parser.description = "Writes a run folder whose first checkpoint has the weights, as they are stored."
    parser.add_argument("hf", metavar="HF", help="a folder, or a name of the Hugging Face hub")
    parser.add_argument("run", type=_path, metavar="RUN_FOLDER", help="to write; its name becomes the run's")
    parser.add_argument("--tokenizer", default="", help="another one than the checkpoint's own")
    _add_common(parser)
    parser.set_defaults(work=_import)


def _add_export(parser: Any) -> None:
    parser.description = (
        "Writes what transformers' from_pretrained loads. Of a run with adapters: PEFT's files."
    )
    parser.add_argument(
        "run", type=_path, metavar="RUN", help="a run's folder, or one of its checkpoints/iter_N"
    )
    parser.add_argument("output", type=_path, metavar="OUTPUT", help="the folder to write")
    parser.add_argument(
        "--dtype",
        default="auto",
        choices=("auto", "fp32", "bf16", "fp16"),
        help="of the weights; auto: as they were imported, or fp32 (default: auto)",
    )
    parser.add_argument("--max-shard-size", default="5GB", help="of a file of weights (default: 5GB)")
    parser.add_argument("--merge", action="store_true", help="add a run's adapters to the weights they tune")
    parser.add_argument("--base", default="", metavar="HF", help="where those weights are, if they moved")
    _add_common(parser)
    parser.set_defaults(work=_export)


def _add_verify(parser: Any) -> None:
    parser.description = "Compares our logits with transformers', on the checkpoint's weights or a run's."
    parser.add_argument("hf", metavar="HF", help="a folder, or a name of the Hugging Face hub")
    parser.add_argument(
        "run", type=_path, nargs="?", metavar="RUN", help="a run's folder, or a checkpoint of it"
    )
    parser.set_defaults(work=_verify)


def _add_common(parser: Any) -> None:
    parser.add_argument("--no-verify", action="store_true", help="do not compare logits with transformers'")
    parser.add_argument("--force", action="store_true", help="replace what is in the folder to write")


def _import(given: Any) -> None:
    check_name(given.hf)
    from megatsp.hf.imported import import_run

    report = import_run(given.hf, given.run, given.tokenizer, not given.no_verify, given.force)
    print(_result(report, given.run), flush=True)


def _export(given: Any) -> None:
    folder, max_bytes = checkpoint_of(given.run), parse_bytes(given.max_shard_size)
    from megatsp.compose import from_yaml

    config = from_yaml((folder / "config.yaml").read_text())
    if config.finetune.lora_rank:
        _export_adapters(given, folder, config, max_bytes)
        return
    if given.base:
        raise ValueError(f"--base: {folder} has no adapters, its weights are whole; leave the option out")
    if given.merge:
        raise ValueError(f"--merge: {folder} has no adapters, its weights are whole; leave the option out")
    from megatsp.hf.export import export

    report = export(folder, given.output, given.dtype, max_bytes, not given.no_verify, given.force)
    print(_result(report, given.output), flush=True)


def _verify(given: Any) -> None:
    check_name(given.hf)
    import torch

    from megatsp.compose import from_yaml
    from megatsp.hf.checkpoint import open_checkpoint
    from megatsp.hf.families import canonical, differences
    from megatsp.hf.source import CheckpointSource, HFSource, TensorSource
    from megatsp.hf.verify import verify_alone

    checkpoint = open_checkpoint(given.hf)
    ours: TensorSource = HFSource(checkpoint)
    model = checkpoint.model
    if given.run is not None:
        folder = checkpoint_of(given.run)
        config = from_yaml((folder / "config.yaml").read_text())
        if config.finetune.lora_rank:
            raise ValueError(f"{folder} holds adapters alone: megatsp convert export --merge checks them")
        model = config.model
        if differing := differences(canonical(model), canonical(checkpoint.model)):
            raise ValueError(f"{folder} is another model than {given.hf}: {'; '.join(differing)}")
        ours = CheckpointSource(folder, model)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    print(verify_alone(ours, model, HFSource(checkpoint), checkpoint.config, device), flush=True)


def _path(text: str) -> Path:
    return Path(text).expanduser()


def _result(report: Any, output: Path) -> str:
    found = "logits were not compared with transformers' (--no-verify)" if report is None else str(report)
    return f"{found}\nwrote {output}"


def checkpoint_of(path: Path) -> Path:
    """The checkpoint in `path`: that folder itself, or a run's last one.

    Raises:
        ValueError: there is none.
    """
    from megatsp.checkpoint.paths import latest

    if (path / "state.json").is_file():
        return path
    found = latest(path / "checkpoints") if path.is_dir() else None
    if found is None:
        raise ValueError(f"no checkpoint in {path}: give a run's folder, or one of its checkpoints/iter_N")
    return found


def parse_bytes(text: str) -> int:
    """ "5GB" and the like in bytes.

    Raises:
        ValueError: it is no size.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?B)?", text.strip(), re.IGNORECASE)
    size = int(float(match[1]) * _UNITS[(match[2] or "").upper().removeprefix("B")]) if match else 0
    if size < 1:
        raise ValueError(f"--max-shard-size {text}: write e.g. 500MB or 5GB")
    return size


def _export_adapters(given: Any, folder: Path, config: Config, max_bytes: int) -> None:
    base = given.base or config.finetune.hf
    if not given.merge:
        if given.dtype != "auto":
            raise ValueError(f"--dtype {given.dtype}: adapters are written in fp32; use it with --merge")
        from megatsp.hf.adapter import write_adapter
        from megatsp.hf.output import check_output, whole_folder

        check_output(given.output, given.force, folder)
        with whole_folder(given.output, given.force, 0) as temporary:
            write_adapter(folder, temporary, base)
        print(f"wrote {given.output}: adapters of {base}, as PEFT loads them", flush=True)
        return
    from megatsp.hf.adapter import export_merged

    checked = not given.no_verify
    report = export_merged(folder, given.output, given.dtype, max_bytes, checked, given.force, base)
    print(_result(report, given.output), flush=True)
