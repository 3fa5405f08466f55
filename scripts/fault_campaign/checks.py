"""What must hold after a fault: the same numbers, whole checkpoints, nothing left running."""

from pathlib import Path

from fault_campaign.job import ITERATIONS, SAVE_INTERVAL, processes, wait_until
from megatsp.checkpoint.manifest import read_manifest, size_problems, sum_problems
from megatsp.checkpoint.paths import LATEST, folder_of, iterations
from megatsp.training.logs import read_metrics

SAVED = tuple(range(SAVE_INTERVAL, ITERATIONS + 1, SAVE_INTERVAL))
_LEFT_S = 5.0  # until a killed process must be gone


def problems_of(checkpoint: Path) -> list[str]:
    """Why a checkpoint is not whole; [] if it is."""
    try:
        manifest = read_manifest(checkpoint)
        return size_problems(checkpoint, manifest) + sum_problems(checkpoint, manifest)
    except (ValueError, OSError) as error:
        return [str(error)]


def numbers(run: Path) -> dict[str, float]:
    """Every loss that a run's metrics hold, by name and iteration; of two the later one."""
    entries = read_metrics(run / "metrics.jsonl")
    names = ("lm loss", "val/lm loss", "test/lm loss")
    return {f"{name} {e['iteration']}": e[name] for e in entries for name in names if name in e}


def state(run: Path) -> dict[str, str]:
    """Checksums of all weights and moments in the last checkpoint."""
    last = folder_of(run / "checkpoints", ITERATIONS)
    manifest = read_manifest(last)
    return {name: manifest.files[name].xxh3_128 for name in manifest.shards}


def left_running(folder: Path) -> list[str]:
    """Processes of a trial that has ended."""
    wait_until(lambda: not processes(folder), _LEFT_S)
    return [f"process {pid} is left" for pid in processes(folder)]


def lost(checkpoints: Path, good: set[int]) -> list[str]:
    """Checkpoints that were good and are not any more."""
    return [
        f"the good checkpoint {iteration} is lost: {problem}"
        for iteration in sorted(good)
        for problem in problems_of(folder_of(checkpoints, iteration))[:1]
    ]


def good(checkpoints: Path) -> set[int]:
    """The iterations of whole checkpoints."""
    return {i for i in iterations(checkpoints) if not problems_of(folder_of(checkpoints, i))}


def differences(run: Path, reference: Path, may_lack: bool = False, keep_last: int = 0) -> list[str]:
    """What a run that is over has otherwise than the reference: nothing, if all went well.

    may_lack: whether checkpoints but the last one may be missing; none may be damaged. keep_last: the newest
    that it keeps; 0: all.
    """
    checkpoints = run / "checkpoints"
    whole, there = good(checkpoints), set(iterations(checkpoints))
    kept = sorted({*SAVED, *there})[-keep_last:]  # a signal has one more saved
    must = [i for i in kept if i == ITERATIONS or not may_lack or i in there]
    found = [f"no whole checkpoint of iteration {i}" for i in must if i not in whole]
    latest = (checkpoints / LATEST).read_text().strip()
    found += [] if latest == str(ITERATIONS) else [f"{LATEST} says {latest}"]
    ours, theirs = numbers(run), numbers(reference)
    for name in sorted(ours.keys() | theirs.keys()):
        if repr(ours.get(name)) != repr(theirs.get(name)):  # NaN equals NaN
            found.append(f"{name}: {ours.get(name)!r}, without the fault {theirs.get(name)!r}")
    if not found and state(run) != state(reference):
        found.append("the losses are equal, but not the bits of the last checkpoint")
    rest = [path.name for path in checkpoints.iterdir() if path.suffix in (".tmp", ".removed")]
    return found + [f"{name} is left among the checkpoints" for name in rest]
