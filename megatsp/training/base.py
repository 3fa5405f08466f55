"""The Hugging Face checkpoint that a run tunes: its weights, what was checked of them, what is kept of it."""

from pathlib import Path

import torch.distributed as dist

from megatsp.axes import Axes
from megatsp.checkpoint.paths import replace_text
from megatsp.checkpoint.state import read_state
from megatsp.data.tokenizer import Tokenizer, load_tokenizer
from megatsp.hf.checkpoint import HFCheckpoint, check_fingerprint, open_checkpoint
from megatsp.hf.kept import kept_files
from megatsp.hf.load import load_weights
from megatsp.hf.verify import VERIFICATION, Report, verify_on_mesh
from megatsp.model.gpt import GPT
from megatsp.schema import Config


class Base:
    """What finetune.hf names, on all ranks of a run.

    source: opened. files: of it, that every checkpoint of the run keeps; on rank 0. report: of what was
    verified.

    Raises:
        ValueError: it cannot be used, its embedding is too small for data.tokenizer, or the run that is
            resumed tunes another one.
    """

    def __init__(self, config: Config, resumed_from: Path | None, tokenizer: Tokenizer) -> None:
        self._config = config
        # A resumed run has read these files through once, and now compares their fingerprint.
        self.source: HFCheckpoint = open_checkpoint(config.finetune.hf, hashes=resumed_from is None)
        self.files = kept_files(self.source) if dist.get_rank() == 0 else {}
        self.report: Report | None = None
        if resumed_from is not None:
            check_fingerprint(self.source, config.finetune.hf, read_state(resumed_from).base_fingerprint)
        if tokenizer.vocab_size > config.model.vocab_size:
            raise ValueError(
                f"data.tokenizer={config.data.tokenizer} has {tokenizer.vocab_size} ids, and "
                f"{config.finetune.hf} embeddings for {config.model.vocab_size}: take the checkpoint's own "
                "tokenizer, data.tokenizer='${finetune.hf}', and prepare the data with it"
            )
        self._is_own_tokenizer = (
            not self.source.has_tokenizer
            or load_tokenizer(str(self.source.folder)).fingerprint == tokenizer.fingerprint
        )

    def fill(self, gpt: GPT, axes: Axes, is_new: bool) -> None:
        """Gives the model its weights where no checkpoint of the run has them; a new run's are verified.

        Raises:
            ValueError: a tensor is missing, or logits are not those of transformers.
        """
        finetune = self._config.finetune
        if not is_new and not finetune.lora_rank:
            return
        load_weights(self.source, gpt)
        if is_new and finetune.verify:
            self.report = verify_on_mesh(gpt, axes, self.source, self._config.trainer.dtype)

    def lines(self, gpt: GPT) -> list[str]:
        """What the log says of it."""
        finetune = self._config.finetune
        trained = sum(p.numel() for p in gpt.parameters() if p.requires_grad)
        what = "all weights"
        if finetune.lora_rank:
            targets = ", ".join(finetune.lora_targets)
            what = f"adapters of rank {finetune.lora_rank} on {targets}"
        lines = [f"tunes {finetune.hf}: {what}, {trained:,} parameters"]
        if self.report is not None:
            lines.append(f"verified: {self.report}")
        elif not finetune.verify:
            lines.append("not verified against transformers: finetune.verify=false")
        ours, theirs = self._config.model, self.source.model
        if (ours.rotary_base, ours.rotary_scaling) != (theirs.rotary_base, theirs.rotary_scaling):
            lines.append("its rotary embedding is changed: exported weights say so, an adapter alone cannot")
        if not self._is_own_tokenizer:
            lines.append(
                f"data.tokenizer={self._config.data.tokenizer} is not the tokenizer of {finetune.hf}: "
                "its ids must mean the same"
            )
        return lines

    def write_report(self, folder: Path) -> None:
        """Puts the report of this import into the run's folder; on rank 0."""
        if self.report is not None and dist.get_rank() == 0:
            replace_text(folder / VERIFICATION, self.report.to_json())


def load_base(config: Config, found: Path, gpt: GPT) -> None:
    """Fills all but the adapters of a run's checkpoint `found`; on all ranks.

    Raises:
        ValueError: finetune.hf cannot be read, or is not what the run tunes.
    """
    source = open_checkpoint(config.finetune.hf, hashes=False)
    check_fingerprint(source, config.finetune.hf, read_state(found).base_fingerprint)
    load_weights(source, gpt)
