"""A folder that is there whole or not at all, and the files of weights in it."""

import errno
import math
import os
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from megatsp.checkpoint.paths import sync
from megatsp.hf.safetensors_file import DTYPES, Digest, TensorWriter
from megatsp.hf.source import TensorSource

MAX_SHARD_BYTES = 5_000_000_000  # as transformers' save_pretrained
_QUIET_BYTES = 1 << 30  # less takes no time that needs a bar
# One of these is in every folder that `megatsp convert` or `megatsp sft` wrote.
_OURS = ("SHA256SUMS", "adapter_config.json", "checkpoints")


def check_output(output: Path, force: bool, source: Path | None = None) -> None:
    """Refuses a path where something is already, and one that `source`, which is read, is in.

    Raises:
        ValueError: something is, and it may not be replaced.
    """
    if source is not None and output.resolve() in (source.resolve(), *source.resolve().parents):
        raise ValueError(f"{output} holds {source}, which is read: give another folder")
    if output.exists() and not output.is_dir():
        raise ValueError(f"{output} is a file: give a folder to write to")
    if not force and output.is_dir() and any(output.iterdir()):
        raise ValueError(f"{output} is there and not empty: give another folder, or --force to replace it")
    if output.is_dir() and any(output.iterdir()) and not any((output / name).exists() for name in _OURS):
        raise ValueError(f"{output} is nothing that megatsp wrote: remove it, or give another folder")


@contextmanager
def whole_folder(output: Path, force: bool, num_bytes: int) -> Iterator[Path]:
    """A temporary folder beside `output`, which takes its place in the end; after any error it is removed.

    num_bytes: about what will be written.

    Raises:
        ValueError: `output` may not be replaced, cannot be written, or there is too little space.
    """
    check_output(output, force)
    temporary = output.with_name(f".{output.name}.{os.getpid()}.tmp")
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(output.parent).free
        if free < num_bytes:
            raise ValueError(
                f"{output} needs {num_bytes / 1e9:.1f} GB, but {free / 1e9:.1f} GB are free there: make "
                "room, or give a folder on another disk"
            )
        temporary.mkdir()
        yield temporary
        for path in [*temporary.rglob("*"), temporary]:
            sync(path)
        old = output.with_name(f".{output.name}.{os.getpid()}.old")
        if output.exists():
            output.rename(old)
        temporary.rename(output)
        shutil.rmtree(old, ignore_errors=True)
    except OSError as error:
        full = "the disk is full" if error.errno in (errno.ENOSPC, errno.EDQUOT) else error.strerror
        raise ValueError(f"cannot write {output}: {full}; nothing was left there") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def plan_files(
    shapes: Mapping[str, tuple[int, ...]], dtypes: Mapping[str, str], max_bytes: int
) -> list[list[str]]:
    """Which tensors go into which file, in order: no file is larger than `max_bytes`, if no tensor is."""
    files: list[list[str]] = [[]]
    room = max_bytes
    for name in shapes:
        size = tensor_bytes(shapes[name], dtypes[name])
        if files[-1] and size > room:
            files.append([])
            room = max_bytes
        files[-1].append(name)
        room -= size
    return files


def tensor_bytes(shape: tuple[int, ...], dtype: str) -> int:
    return math.prod(shape) * DTYPES[dtype].itemsize


def write_weights(
    folder: Path,
    source: TensorSource,
    dtypes: Mapping[str, str],
    max_bytes: int,
    name_of: Callable[[int, int], str],
    metadata: Mapping[str, str],
    digest: Callable[[], Digest],
) -> tuple[dict[str, str], dict[str, tuple[int, str]]]:
    """Writes all tensors of `source`, one at a time; returns each one's file, and each file's size in bytes
    with its checksum, of the kind that `digest` makes.

    dtypes: to write them in, as in the header. name_of: a file's name, by its number from 1 and their count.

    Raises:
        ValueError: a tensor has values that its new type has not.
    """
    files = plan_files(source.shapes, dtypes, max_bytes)
    total = sum(tensor_bytes(shape, dtypes[name]) for name, shape in source.shapes.items())
    quiet = total < _QUIET_BYTES or not sys.stderr.isatty()
    where: dict[str, str] = {}
    sums: dict[str, tuple[int, str]] = {}
    with tqdm(total=total, unit="B", unit_scale=True, desc="writing weights", disable=quiet) as bar:
        for number, names in enumerate(files, 1):
            path = folder / name_of(number, len(files))
            shapes = {name: source.shapes[name] for name in names}
            found = digest()
            with TensorWriter(path, shapes, dtypes, metadata, found) as file:
                for name in names:
                    file.write(name, cast(source.read(name), dtypes[name], name))
                    bar.update(tensor_bytes(shapes[name], dtypes[name]))
            where |= dict.fromkeys(names, path.name)
            sums[path.name] = file.num_bytes, found.hexdigest()
    return where, sums


def cast(tensor: Tensor, dtype: str, name: str) -> Tensor:
    """`tensor` in another type.

    Raises:
        ValueError: a number becomes infinite in it.
    """
    found = tensor.to(DTYPES[dtype])
    is_safe = dtype != "F16" or tensor.dtype == torch.float16 or bool(found.isfinite().all())
    if not is_safe and bool(tensor.isfinite().all()):
        raise ValueError(f"{name} has values beyond fp16, whose largest is 65504: export bf16 or fp32")
    return found
