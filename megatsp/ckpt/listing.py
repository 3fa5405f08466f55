"""`megatsp ckpt ls` and `inspect`: what is there, and what is in it, found without torch."""

import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import asdict
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from megatsp.checkpoint.find import check_folder
from megatsp.checkpoint.manifest import MANIFEST, OPTIMIZER, read_manifest
from megatsp.checkpoint.paths import BEST, LATEST, folder_of, iterations, read_pointer
from megatsp.checkpoint.state import read_state
from megatsp.schema import AXES, Config


def list_run(checkpoints: Path) -> dict[str, Any]:
    """Every checkpoint under a folder, newest first, and what saves or removals have left there."""
    pointers = {name: _pointed_to(checkpoints / file) for name, file in (("latest", LATEST), ("best", BEST))}
    there = iterations(checkpoints)
    rows = []
    for iteration in there:
        folder = folder_of(checkpoints, iteration)
        row: dict[str, Any] = {"iteration": iteration, "folder": str(folder)}
        row["pointers"] = [name for name, pointed in pointers.items() if pointed == iteration]
        row |= {"date": None, "bytes": _bytes_in(folder), "tokens": None, "damage": ""}
        try:
            check_folder(folder)
            row["date"] = (folder / MANIFEST).stat().st_mtime
            row["tokens"] = read_state(folder).consumed_tokens
        except ValueError as error:
            row["damage"] = str(error)
        rows.append(row)
    lost = [
        f"{name} says {n}, which is not there"
        for name, n in pointers.items()
        if n is not None and n not in there
    ]
    final = {folder_of(checkpoints, iteration).name for iteration in there}
    left = sorted(p for p in checkpoints.iterdir() if p.name.startswith("iter_") and p.name not in final)
    leftovers = [{"folder": str(path), "bytes": _bytes_in(path)} for path in left]
    return {"checkpoints": rows, "lost_pointers": lost, "leftovers": leftovers}


def list_lines(found: dict[str, Any]) -> Iterator[str]:
    """`list_run`'s as a table; whole: by manifest, sizes and the small files' checksums."""
    yield f"{'iteration':>9}  {'date':16}  {'size':>10}  {'tokens':>15}  {'whole':5}  pointers"
    for row in found["checkpoints"]:
        date = time.strftime("%Y-%m-%d %H:%M", time.localtime(row["date"])) if row["date"] else "?"
        tokens = "?" if row["tokens"] is None else f"{row['tokens']:,}"
        whole = "no" if row["damage"] else "yes"
        pointers = ", ".join(row["pointers"])
        size = shown_bytes(row["bytes"])
        yield f"{row['iteration']:>9}  {date:16}  {size:>10}  {tokens:>15}  {whole:5}  {pointers}".rstrip()
    for row in found["checkpoints"]:
        if row["damage"]:
            yield f"damaged: {row['damage']}"
    yield from (f"pointer {line}" for line in found["lost_pointers"])
    for left in found["leftovers"]:
        size = shown_bytes(left["bytes"])
        yield f"left over: {left['folder']}, {size}: cut off, or abandoned for an older one"


def inspect(folder: Path, pattern: str) -> dict[str, Any]:
    """A checkpoint's state, settings, files and tensors; pattern: of tensors' names, as of a shell.

    Raises:
        Damaged: a small file is, or one of the tensors' files is missing or of another size.
        ValueError: of a later version; no tensor is called so.
    """
    from megatsp.compose import to_yaml

    check_folder(folder)
    manifest, config = read_manifest(folder), read_config(folder)
    kinds: dict[str, int] = {}
    tensors = {}
    for name, entry in manifest.tensors.items():
        kind, size = kind_of(name), entry.bytes
        kinds[kind] = kinds.get(kind, 0) + size
        if fnmatchcase(name, pattern):
            tensors[name] = {"kind": kind, "dtype": entry.dtype, "shape": list(entry.shape), "bytes": size}
    if not tensors and manifest.tensors:
        raise ValueError(
            f"--tensors {pattern}: no tensor of {folder} is called so, e.g. {next(iter(manifest.tensors))}"
        )
    files = {name: asdict(entry) for name, entry in manifest.files.items()}
    return {
        "folder": str(folder),
        "state": asdict(read_state(folder)),
        "mesh": {axis: getattr(config.parallel, axis) for axis in AXES}
        | {"tsp_layout": config.parallel.tsp_layout, "fsdp_over_cp": config.parallel.fsdp_over_cp},
        "bytes_by_kind": kinds,
        "bytes": manifest.bytes,
        "files": files,
        "tensors": tensors,
        "settings": to_yaml(config),
    }


def read_config(folder: Path) -> Config:
    """What a checkpoint's run was started with.

    Raises:
        ValueError: config.yaml is missing or is none.
    """
    from megatsp.compose import from_yaml

    try:
        return from_yaml((folder / "config.yaml").read_text())
    except (OSError, ValueError) as error:
        raise ValueError(f"{folder}/config.yaml cannot be read: {error}; restore it") from None


def inspect_lines(found: dict[str, Any]) -> Iterator[str]:
    """`inspect`'s for reading: the settings are in --json, and in the checkpoint's config.yaml."""
    yield found["folder"]
    for name, value in found["state"].items():
        if value or name == "iteration":
            yield f"  {name:24} {value:,}" if type(value) is int else f"  {name:24} {value}"
    mesh = found["mesh"]
    yield (
        f"  {'written on':24} "
        + " x ".join(f"{axis} {mesh[axis]}" for axis in AXES)
        + (f", {mesh['tsp_layout']}" * (mesh["tsp"] > 1) + ", FSDP over cp" * mesh["fsdp_over_cp"])
    )
    for kind, size in found["bytes_by_kind"].items():
        yield f"  {kind:24} {shown_bytes(size)}"
    yield f"files: {len(found['files'])}, {shown_bytes(found['bytes'])}"
    for name, entry in sorted(found["files"].items()):
        yield f"  {entry['bytes']:>16,}  {entry['xxh3_128']}  {name}"
    yield f"tensors: {len(found['tensors'])}"
    for name, tensor in found["tensors"].items():
        yield f"  {tensor['dtype']:4}  {tensor['shape']!s:18}  {name}"


def kind_of(name: str) -> str:
    """weights, or which moment."""
    return name.split(".")[1] if name.startswith(OPTIMIZER) else "weights"


def shown_bytes(size: int) -> str:
    for unit in ("B", "KB", "MB", "GB"):
        if size < 1000 ** (1 + ("B", "KB", "MB", "GB").index(unit)):
            return f"{size / 1000 ** ('B', 'KB', 'MB', 'GB').index(unit):.4g} {unit}"
    return f"{size / 1e12:,.2f} TB"


def _bytes_in(folder: Path) -> int:
    size = 0
    for path in folder.rglob("*") if folder.is_dir() else [folder]:
        with suppress(FileNotFoundError):  # of a run that saves meanwhile
            size += path.stat().st_size if path.is_file() else 0
    return size


def _pointed_to(pointer: Path) -> int | None:
    """The iteration in a pointer; -1 if it says anything else, None if there is no pointer."""
    if not pointer.exists():
        return None
    iteration = read_pointer(pointer)
    return -1 if iteration is None else iteration
