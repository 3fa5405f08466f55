"""What a finished fine-tuning gives back to Hugging Face: its best or last checkpoint, by one process.

<run>/hf/          the tuned model, as transformers saves it; of adapters only if finetune.lora_merge
<run>/adapter/     the adapters, as PEFT saves them
<run>/export.json  which checkpoint they are of
"""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from megatsp.schema import Config
from megatsp.training import checkpoint
from megatsp.training.checkpoint import replace_text
from megatsp.training.folder import run_folder

MODEL, ADAPTER, RECORD = "hf", "adapter", "export.json"


def give_back(config: Config) -> None:
    """Exports what finetune.export names, unless it was exported already, and says where it is.

    Raises:
        ValueError: there is something else where it would go, or the exported logits are not ours.
    """
    finetune, run = config.finetune, run_folder(config)
    if finetune.export == "none":
        return
    checkpoints = run / "checkpoints"
    best = checkpoint.best(checkpoints) if finetune.export == "best" else None
    found = best or checkpoint.chosen(checkpoints, "last")
    writers = _writers(config, found)
    record = {"checkpoint": found.name, "dtype": finetune.export_dtype, "folders": list(writers)}
    before = _read_record(run)
    if before == record and all((run / name).is_dir() for name in writers):
        print(f" exported:   {', '.join(str(run / name) for name in writers)} already, from {found.name}")
        return
    for name in writers:
        output = run / name
        if output.exists() and name not in before.get("folders", ()):
            raise ValueError(
                f"{output} was there before: move it away, and the same command exports {found} to it"
            )
    (run / RECORD).unlink(missing_ok=True)
    for name, write in writers.items():
        output, temporary = run / name, run / f"{name}.tmp"
        shutil.rmtree(temporary, ignore_errors=True)  # of an export that was cut off
        report = write(temporary)
        shutil.rmtree(output, ignore_errors=True)
        temporary.rename(output)
        print(f" exported:   {output}, from {found.name}" + (f"; verified: {report}" if report else ""))
    replace_text(run / RECORD, json.dumps(record, indent=2) + "\n")


def _writers(config: Config, found: Path) -> dict[str, Callable[[Path], Any]]:
    """By folder of the run: what writes it, given where, and returns what was verified."""
    from megatsp.hf.adapter import write_adapter, write_merged
    from megatsp.hf.export import export

    finetune = config.finetune
    if not finetune.lora_rank:
        return {MODEL: lambda output: export(found, output, finetune.export_dtype, verify=finetune.verify)}
    writers: dict[str, Callable[[Path], Any]] = {
        ADAPTER: lambda output: write_adapter(found, output, finetune.hf)
    }
    if finetune.lora_merge:
        writers[MODEL] = lambda output: write_merged(config, found, output)
    return writers


def _read_record(run: Path) -> dict[str, Any]:
    """What was exported before; empty if nothing was, or not to the end."""
    try:
        found = json.loads((run / RECORD).read_text())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}
