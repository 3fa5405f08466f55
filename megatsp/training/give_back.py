"""What a finished fine-tuning gives back to Hugging Face: its best or last checkpoint, by one process.

<run>/hf/          the tuned model, as transformers saves it; of adapters only if finetune.lora_merge
<run>/adapter/     the adapters, as PEFT saves them
<run>/export.json  which checkpoint they are of, and whether W&B has them
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from megatsp.checkpoint import paths
from megatsp.checkpoint.paths import replace_text
from megatsp.schema import Config
from megatsp.training.folder import run_folder
from megatsp.training.wandb_run import log_exports

MODEL, ADAPTER, RECORD = "hf", "adapter", "export.json"


def give_back(config: Config, again: bool) -> None:
    """Exports what finetune.export names, and says where it is.

    again: also what was exported before.

    Raises:
        ValueError: there is something else where it would go, or the exported logits are not ours.
    """
    finetune, run = config.finetune, run_folder(config)
    if finetune.export == "none":
        return
    checkpoints = run / "checkpoints"
    best = paths.best(checkpoints) if finetune.export == "best" else None
    found = best or paths.chosen(checkpoints, "last")
    writers = _writers(config, found)
    record: dict[str, Any] = {
        "checkpoint": found.name, "dtype": finetune.export_dtype, "folders": list(writers),
    }  # fmt: skip
    before = _read_record(run)
    is_there = record.items() <= before.items() and all((run / name).is_dir() for name in writers)
    if is_there and not again:
        print(f" exported:   {', '.join(str(run / name) for name in writers)} already, from {found.name}")
        record = before
    else:
        for name in writers:
            if (run / name).exists() and name not in before.get("folders", ()):
                raise ValueError(
                    f"{run / name} was there before: move it away, and the same command exports {found} to it"
                )
        _write_record(run, {**record, "checkpoint": None})  # not yet
        for name, write in writers.items():
            report = write(run / name)
            print(f" exported:   {run / name}, from {found.name}")
            if report is not None:
                print(f" verified:   {report}", flush=True)
        _write_record(run, record)
    if config.logging.wandb_artifacts and not record.get("wandb"):
        said, is_given = log_exports(config, run, [run / name for name in writers])
        print(f" {said}", flush=True)
        _write_record(run, {**record, "wandb": is_given})


def _write_record(run: Path, record: dict[str, Any]) -> None:
    replace_text(run / RECORD, json.dumps(record, indent=2) + "\n")


def _writers(config: Config, found: Path) -> dict[str, Callable[[Path], Any]]:
    """By folder of the run: what writes it, given where, and returns what was verified."""
    from megatsp.hf.export import export
    from megatsp.hf.output import whole_folder

    finetune = config.finetune
    dtype, verify = finetune.export_dtype, finetune.verify
    if not finetune.lora_rank:
        return {MODEL: lambda output: export(found, output, dtype, verify=verify, force=True)}
    from megatsp.hf.adapter import export_merged, write_adapter

    def adapter(output: Path) -> None:
        with whole_folder(output, force=True, num_bytes=0) as temporary:
            write_adapter(found, temporary, finetune.hf)

    writers: dict[str, Callable[[Path], Any]] = {ADAPTER: adapter}
    if finetune.lora_merge:
        writers[MODEL] = lambda output: export_merged(found, output, dtype, verify=verify, force=True)
    return writers


def _read_record(run: Path) -> dict[str, Any]:
    """What was exported before; checkpoint is null if not to the end. Empty if nothing was."""
    try:
        found = json.loads((run / RECORD).read_text())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}
