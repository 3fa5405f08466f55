"""`megatsp convert import`: a Hugging Face checkpoint becomes a run that has not taken a step yet."""

from dataclasses import replace
from pathlib import Path

import torch
import xxhash

from megatsp.checkpoint.manifest import FileEntry, Manifest, TensorEntry, write_manifest
from megatsp.checkpoint.paths import LATEST, TOKENIZER, folder_of
from megatsp.checkpoint.state import RunState, state_to_json
from megatsp.checkpoint.store import write_files
from megatsp.compose import to_yaml
from megatsp.data.tokenizer import Tokenizer, load_tokenizer
from megatsp.hf.checkpoint import HFCheckpoint, open_checkpoint
from megatsp.hf.kept import kept_files
from megatsp.hf.output import check_output, whole_folder, write_weights
from megatsp.hf.source import CheckpointSource, HFSource
from megatsp.hf.verify import VERIFICATION, Report, verify_alone
from megatsp.schema import Config, DataConfig, TrainerConfig

MAX_FILE_BYTES = 2_000_000_000


def import_run(
    name: str, run: Path, tokenizer: str = "", verify: bool = True, force: bool = False
) -> Report | None:
    """Writes the run folder `run` with the weights of a Hugging Face checkpoint, as they are stored there.

    It takes the memory of one tensor. tokenizer: another one than the checkpoint's own.

    Raises:
        ValueError: the checkpoint is not whole or is not one that we compute, has no tokenizer, or our
            logits are not transformers'; `run` cannot be written.
    """
    check_output(run, force)
    checkpoint = open_checkpoint(name)
    check_output(run, force, checkpoint.folder)
    if not (tokenizer or checkpoint.has_tokenizer):
        raise ValueError(
            f"{name} has no tokenizer.json and no tokenizer.model: copy them there, or name another "
            "tokenizer with --tokenizer"
        )
    spec = tokenizer or str(checkpoint.folder.absolute() if Path(name).expanduser().is_dir() else name)
    found = load_tokenizer(tokenizer or str(checkpoint.folder))
    if found.vocab_size > checkpoint.model.vocab_size:
        raise ValueError(
            f"the tokenizer {spec} has {found.vocab_size} ids, but the embedding of {name} "
            f"{checkpoint.model.vocab_size} rows: give the model's own"
        )
    num_bytes = sum(path.stat().st_size for path in checkpoint.files)
    print(_describe(name, checkpoint, num_bytes), flush=True)
    with whole_folder(run, force, num_bytes) as temporary:
        folder = folder_of(temporary / "checkpoints", 0)
        folder.mkdir(parents=True)
        source = HFSource(checkpoint)
        _, sums = write_weights(
            folder,
            source,
            checkpoint.dtypes,
            MAX_FILE_BYTES,
            lambda i, count: f"shard-{i:05d}-of-{count:05d}.safetensors",
            {},
            xxhash.xxh3_128,
        )
        manifest = Manifest(
            {name: FileEntry(*found) for name, found in sums.items()},
            {
                name: TensorEntry(checkpoint.dtypes[name], tuple(shape))
                for name, shape in source.shapes.items()
            },
        )
        write_manifest(folder, manifest)  # of what is there so far
        small = _small_files(_config(checkpoint, run, spec), checkpoint, found)
        report = None
        if verify:
            ours = CheckpointSource(folder, checkpoint.model)
            device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
            report = verify_alone(ours, checkpoint.model, HFSource(checkpoint), checkpoint.config, device)
            small[VERIFICATION] = report.to_json().encode()
        entries = write_files(folder, small)
        write_manifest(folder, replace(manifest, files={**manifest.files, **entries}))
        (temporary / "config.yaml").write_bytes(small["config.yaml"])
        (temporary / "checkpoints" / LATEST).write_text("0\n")
    return report


def _describe(name: str, checkpoint: HFCheckpoint, num_bytes: int) -> str:
    spare = ""
    if checkpoint.has_tokenizer:
        size = load_tokenizer(str(checkpoint.folder)).vocab_size
        if size < checkpoint.model.vocab_size:
            spare = f"; {checkpoint.model.vocab_size - size} rows of its embedding have no token"
    return (
        f"{name}: {checkpoint.config['architectures'][0]}, {checkpoint.dtype}, {num_bytes / 1e9:.2f} GB in "
        f"{len(checkpoint.files)} files{spare}"
    )


def _config(checkpoint: HFCheckpoint, run: Path, tokenizer: str) -> Config:
    absolute = run.absolute()
    return Config(
        name=absolute.name,
        output_dir=str(absolute.parent),
        model=checkpoint.model,
        data=DataConfig(tokenizer=tokenizer),
        # What `megatsp generate` looks back on.
        trainer=TrainerConfig(seq_length=checkpoint.model.max_position_embeddings),
    )


def _small_files(config: Config, checkpoint: HFCheckpoint, tokenizer: Tokenizer) -> dict[str, bytes]:
    """All but the weights and their verification."""
    files = kept_files(checkpoint)
    files |= {f"{TOKENIZER}/{name}": content for name, content in tokenizer.files().items()}
    files["config.yaml"] = to_yaml(config).encode()
    state = RunState(tokenizer=tokenizer.name, tokenizer_fingerprint=tokenizer.fingerprint)
    return {**files, "state.json": state_to_json(state)}
