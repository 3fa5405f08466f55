"""`megatsp ckpt plan`: what loading a checkpoint on a mesh takes, before any rank is started."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from megatsp.checkpoint.find import check_folder
from megatsp.checkpoint.state import read_state
from megatsp.ckpt.diff import changed
from megatsp.ckpt.layout import differences, held_by_ranks, onto_mesh
from megatsp.ckpt.listing import read_config, shown_bytes
from megatsp.ckpt.tensors import StoredTensors
from megatsp.hf.safetensors_file import DTYPES
from megatsp.schema import AXES
from megatsp.training.folder import FROZEN
from megatsp.training.memory import predict


def plan(folder: Path, overrides: Sequence[str]) -> dict[str, Any]:
    """What each rank reads, whether the tensors fit, and the memory that is predicted.

    Raises:
        Damaged: the checkpoint is, as far as sizes and headers tell.
        ValueError: an override is not allowed.
    """
    check_folder(folder)
    before = read_config(folder)
    config = onto_mesh(before, overrides)
    world_size = config.launch.nproc
    stored = StoredTensors(folder)
    shapes, ranks = held_by_ranks(config, stored.manifest)
    state = read_state(folder)
    wrong = differences(shapes, stored.manifest)
    if state.iteration:  # what a resumed run refuses; of an import nothing was trained yet
        wrong += [
            line for line in changed(asdict(before), asdict(config)) if line.startswith((*FROZEN, "model."))
        ]
    reads = []
    for rank in ranks:
        size, files = 0, set()
        for name, box in rank.items():
            if name not in stored.manifest.tensors or shapes[name] != stored.manifest.tensors[name].shape:
                continue
            width = DTYPES[stored.manifest.tensors[name].dtype].itemsize
            for file, piece in stored.pieces(name, box):
                size += piece.elements * width
                files.add(file)
        reads.append({"bytes": size, "files": len(files)})
    memory = predict(config)
    return {
        "folder": str(folder),
        "iteration": state.iteration,
        "world_size": world_size,
        "mesh": {axis: getattr(config.parallel, axis) for axis in AXES},
        "differs": list(dict.fromkeys(wrong)),
        "ranks": reads,
        "checksum_bytes": math.ceil(stored.manifest.bytes / world_size),
        "shards": len(stored.manifest.shards),
        "predicted": asdict(memory) | {"total": memory.total},
    }


def plan_lines(found: dict[str, Any]) -> Iterator[str]:
    """`plan`'s for reading."""
    mesh = " x ".join(f"{axis} {size}" for axis, size in found["mesh"].items())
    yield f"{found['folder']}, iteration {found['iteration']}, on {found['world_size']} ranks: {mesh}"
    if found["differs"]:
        yield f"does not fit: {len(found['differs'])} differences"
        yield from (f"  {line}" for line in found["differs"][:20])
    else:
        yield "fits: every tensor has its shape"
    sizes, files = ([rank[key] for rank in found["ranks"]] for key in ("bytes", "files"))
    most = sizes.index(max(sizes))
    yield (
        f"each rank reads {shown_bytes(min(sizes))} to {shown_bytes(max(sizes))} (most: rank {most}) from "
        f"{min(files)} to {max(files)} of {found['shards']} files; {shown_bytes(sum(sizes))} in all"
    )
    checks = shown_bytes(found["checksum_bytes"])
    yield f"to check them, each reads about {checks} more (checkpoint.verify=sizes: none)"
    yield "predicted memory of a rank, beside the working memory of one layer:"
    for name, size in found["predicted"].items():
        yield f"  {name.replace('_', ' '):18} {size / 2**30:>9.3f} GiB"
