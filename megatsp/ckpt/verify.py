"""`megatsp ckpt verify`: whether a checkpoint is what was written, to the last byte."""

import sys
from collections.abc import Callable
from pathlib import Path

from tqdm import tqdm

from megatsp.checkpoint.manifest import read_manifest, size_problems, sum_problems
from megatsp.checkpoint.state import read_state
from megatsp.ckpt.listing import read_config
from megatsp.ckpt.tensors import StoredTensors

_AT_ONCE = 8  # files whose checksums are computed between two moves of the bar


def verify(folder: Path, finite: bool, say: Callable[[str], object] = print) -> list[str]:
    """What is wrong with a checkpoint, one line each; says what was found good.

    Looked at: sizes and checksums of all files, headers, that the parts make every tensor of the manifest,
    state.json and config.yaml. finite: that no tensor has a NaN or an infinity, too.
    """
    try:
        manifest = read_manifest(folder)
    except ValueError as error:
        return [str(error)]
    problems = size_problems(folder, manifest)
    damaged = {line.partition(",")[0] for line in problems}
    names = [name for name in manifest.files if name not in damaged]
    total = sum(manifest.files[name].bytes for name in names)
    quiet = total < 1 << 30 or not sys.stderr.isatty()
    with tqdm(total=total, unit="B", unit_scale=True, desc=folder.name, disable=quiet) as bar:
        for begin in range(0, len(names), _AT_ONCE):
            some = names[begin : begin + _AT_ONCE]
            problems += sum_problems(folder, manifest, some)
            bar.update(sum(manifest.files[name].bytes for name in some))
    for read in (read_state, read_config, StoredTensors):
        try:
            read(folder)
        except ValueError as error:
            if not problems:  # else it is said already
                problems.append(str(error))
    if finite and not problems:
        problems += _not_finite(StoredTensors(folder))
    if not problems:
        more = ", all finite" if finite else ""
        say(f"{folder}: {len(names)} files, {total:,} bytes, {len(manifest.tensors)} tensors: whole{more}")
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if path.is_file() and name not in manifest.files and name != "manifest.json":
            say(f"{folder}: {name} is not in the manifest, and is never read")
    return [f"{folder}: {line}" for line in problems]


def _not_finite(stored: StoredTensors) -> list[str]:
    problems = []
    for name in stored.manifest.tensors:
        tensor = stored.read(name)
        if bad := int(tensor.isfinite().logical_not().sum()):
            problems.append(f"{name}: {bad} of {tensor.numel()} numbers are not finite")
        stored.release(name)
    return problems
