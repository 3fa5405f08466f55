"""From arguments to a submitted job: composed, checked, written, handed to sbatch."""

import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from megatsp.cluster.mesh import placement_errors
from megatsp.cluster.profiles import load_profile
from megatsp.compose import compose
from megatsp.data.source_list import read_sources
from megatsp.jobs.script import TASK, Job, body, script
from megatsp.launch_rules import options_set, secrets_of, set_by_script
from megatsp.parallel_rules import filled_in
from megatsp.schema import AXES, Config, LaunchConfig
from megatsp.training.wandb_login import check_login
from megatsp.validate import validate

COMMANDS = ("train", "sft", "preflight")
MOST_TASKS = 1000  # of an array
_OF_ONE_HOST = ("tmpfs", "ramfs", "rootfs")  # file systems that no other node can see
_LOCAL = ("ext2", "ext3", "ext4", "xfs", "btrfs", "zfs", "overlay")  # unless this host serves them
# sbatch's variables whose names are not those of their options.
_VARIABLES = {"array_inx": "array", "mem_per_node": "mem", "timelimit": "time"}
# Options that a user's environment may set where the script does not.
_FREE = ("--partition", "--account", "--qos", "--constraint", "--reservation", "--time")
_DEPENDENCY = re.compile(r"(after|afterany|afterok|afternotok|aftercorr|singleton)\b.*")


@dataclass(frozen=True)
class Planned:
    """A job, and the run folders of its tasks by their number in the array ("" without one)."""

    job: Job
    runs: dict[str, Path]
    configs: tuple[Config, ...]


def plan(command: str, arguments: Sequence[str], array: str, after: str) -> Planned:
    """The job that arguments of `megatsp train`, sft or preflight ask for; nothing is written.

    array: as sbatch takes it, or "". after: numbers of jobs, or a dependency as sbatch takes it.

    Raises:
        ValueError: arguments that cannot be used, or a mesh that does not fit the nodes.
    """
    overrides, config_dir = _split(arguments)
    tasks = array_tasks(array) if array else [""]
    held = [text for text in overrides if TASK in text]
    if held and not array:
        raise ValueError(f"{held[0]}: {TASK} is the number of an array's task: give --array, or a value")
    name = _given_name(overrides)
    if array and TASK not in name:
        raise ValueError(
            f"--array {array}: its tasks would share a folder: give name=...{TASK}, which tells them apart"
        )
    runs, configs = {}, []
    for task in tasks:
        given = compose(
            [text.replace(TASK, task) for text in overrides],
            Path(config_dir) if config_dir else None,
            "sft" if command == "sft" else "train",
        )
        config = validate(given, given.launch.nodes * given.launch.nproc)
        if command == "preflight" and config.launch.preflight == "none":
            raise ValueError(
                "launch.preflight=none: a job of preflight examines its nodes; use full or quick"
            )
        runs[task] = Path(config.output_dir).expanduser().absolute() / config.name
        configs.append(config)
    first = configs[0]
    _check_tasks(configs)
    sizes = {axis: getattr(first.parallel, axis) for axis in AXES}
    if errors := placement_errors(sizes, first.launch.nproc):
        origins = filled_in(given.parallel, first.parallel, errors)
        raise ValueError("\n  - ".join(["the mesh does not fit the nodes:", *errors, *origins]))
    run = f"{Path(first.output_dir).expanduser().absolute()}/{name if array else first.name}"
    job = Job(
        first,
        command,
        tuple(arguments),
        run,
        str(Path.cwd()),
        "python3" if first.launch.slurm.container else sys.executable,
        array,
        _dependency(after),
    )
    _check_secrets(job, configs)
    return Planned(job, runs, tuple(configs))


def submit(planned: Planned) -> str:
    """Hands the job to sbatch; returns what the user is to know of it.

    Raises:
        ValueError: there is no sbatch, W&B or Slurm refuses, or the run's folder cannot be used.
    """
    sbatch = shutil.which("sbatch")
    if sbatch is None:
        raise ValueError(
            "sbatch is not on the PATH: submit from a login node of the cluster; --dry-run prints the job "
            "script, and launch local or torchrun needs no Slurm"
        )
    job = planned.job
    launch, warnings = job.config.launch, []
    if job.command != "preflight":
        warnings += [check_login(job.config), *_missing_data(planned.configs)]
    text = script(job)
    draft = next(iter(planned.runs.values())) / "slurm" / f".job.{os.getpid()}.sh"
    with _removed_if_refused(planned.runs.values()):
        for run in planned.runs.values():
            warnings.append(check_folder(run, launch.nodes + launch.spare_nodes))
        number, said, left_out = _hand_over(sbatch, text, draft, launch)
    for task, run in planned.runs.items():
        copy = run / "slurm" / f"job_{number}{'_' * bool(task)}{task}.sh"
        try:
            copy.write_text(text)
        except OSError as error:  # the job is submitted all the same
            warnings.append(f"warning: {copy} cannot be written: {error.strerror}")
    if left_out:
        warnings.append(f"left out, for the job's script says it: {', '.join(left_out)}")
    shown = "\n".join(dict.fromkeys(filter(None, [*warnings, said])))
    return _submitted(planned, number, shown)


def _hand_over(sbatch: str, text: str, draft: Path, launch: LaunchConfig) -> tuple[str, str, list[str]]:
    """The number of a script's job, what sbatch says beside it, and which variables it did not get."""
    environment, left_out = _without_rivals(text, launch)
    try:
        draft.write_text(text)
        result = subprocess.run(
            [sbatch, "--parsable", str(draft)], capture_output=True, text=True, env=environment
        )
    finally:
        with suppress(OSError):
            draft.unlink()
    if result.returncode:
        said = (result.stderr + result.stdout).strip()
        raise ValueError(f"Slurm refused the job:\n{said}")
    return result.stdout.strip().split(";")[0], result.stderr.strip(), left_out


@contextmanager
def _removed_if_refused(runs: Iterable[Path]) -> Iterator[None]:
    """Removes the runs' folders that are made inside it and still empty, if what is inside raises."""
    made = [path for run in runs for path in (run / "slurm", run, *run.parents) if not os.path.exists(path)]
    try:
        yield
    except BaseException:
        for path in sorted(made, key=lambda path: -len(path.parts)):
            with suppress(OSError):
                path.rmdir()
        raise


def _without_rivals(text: str, launch: LaunchConfig) -> tuple[dict[str, str], list[str]]:
    """The environment for sbatch, and which of its variables are left out: they would override the script.

    Those of a job that submits another one are left out silently: the other would take them for its own.
    """
    options = [options_set(line) for line in text.splitlines() if line.startswith("#SBATCH ")]
    given = {name for line in options for name, _ in line}
    rivals = []
    for variable in sorted(name for name in os.environ if name.startswith("SBATCH_")):
        own = variable.removeprefix("SBATCH_").lower()
        option = f"--{_VARIABLES.get(own, own.replace('_', '-'))}"
        contradicts = set_by_script(option, os.environ[variable], launch) is not None
        if option in given or (contradicts and option not in _FREE):
            rivals.append(variable)
    of_another_job = {name for name in os.environ if name.startswith("SLURM_")} - {"SLURM_CONF"}
    left_out = {*rivals} | of_another_job
    return {name: value for name, value in os.environ.items() if name not in left_out}, rivals


def _missing_data(configs: Sequence[Config]) -> list[str]:
    """A warning for each source that is not seen from here; the nodes may see more."""
    sources = {source for config in configs for source in read_sources(config.data.path)[1]}
    missing = sorted(s for s in sources if not Path(f"{s}.idx").exists() and not Path(s).is_dir())
    return [f"warning: data.path: {source} is not there, seen from here" for source in missing]


def check_folder(run: Path, nodes: int) -> str:
    """Makes the run's folder of jobs, and checks that it is written to, and seen by other nodes if need be.

    Returns a warning where only a look at a node tells; or "".

    Raises:
        ValueError: it is not.
    """
    folder = run / "slurm"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / f".probe.{os.getpid()}"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise ValueError(f"cannot write to {folder}: {error.strerror}; choose another output_dir=") from error
    kind = _file_system(folder)
    if nodes > 1 and kind in _OF_ONE_HOST:
        raise ValueError(
            f"{folder} lies on {kind}, which the other nodes do not see: give a shared folder, output_dir=..."
        )
    if nodes > 1 and kind in _LOCAL:
        return (
            f"warning: output_dir: {run} lies on {kind}, a disk of this machine; all nodes must see it at "
            f"this path, as where this machine is their file server: look with `srun ls -d "
            f"{shlex.quote(str(run))}`"
        )
    return ""


def array_tasks(array: str) -> list[str]:
    """The numbers of an array's tasks. array: as sbatch takes it: 0-3, 1,5,9, 0-15:4, with %2 at its end.

    Raises:
        ValueError: it cannot be read, or has more than 1,000 tasks.
    """
    wrong = ValueError(f"--array {array}: give numbers as sbatch takes them, such as 0-3, 1,5,9 or 0-15:4%2")
    if not re.fullmatch(r"\d+(-\d+(:\d+)?)?(,\d+(-\d+(:\d+)?)?)*(%[1-9]\d*)?", array):
        raise wrong
    parts: list[range] = []
    num_tasks = 0
    for part in array.partition("%")[0].split(","):
        first, last, step = re.fullmatch(r"(\d+)(?:-(\d+))?(?::(\d+))?", part).groups()  # type: ignore[union-attr]
        if int(step or 1) == 0 or int(last or first) < int(first):
            raise wrong
        parts.append(range(int(first), int(last or first) + 1, int(step or 1)))
        num_tasks += (parts[-1].stop - 1 - parts[-1].start) // parts[-1].step + 1  # len() is of small ones
    if num_tasks > MOST_TASKS:
        raise ValueError(
            f"--array {array}: {num_tasks:,} tasks, and at most {MOST_TASKS:,} are submitted at once, as by "
            "Slurm's own default (MaxArraySize=1001): give fewer, and the rest as further arrays"
        )
    return list(dict.fromkeys(str(task) for part in parts for task in part))


def _split(arguments: Sequence[str]) -> tuple[list[str], str]:
    """The overrides, and the folder of --config-dir or ""."""
    from megatsp.parser import Parser

    parser = Parser("megatsp launch slurm")
    parser.add_argument("--config-dir", default="")
    parser.add_argument("overrides", nargs="*")
    given = parser.parse_intermixed_args(list(arguments))
    return given.overrides, given.config_dir


def _given_name(overrides: Sequence[str]) -> str:
    """The run's name as it was given, an array's `%a` in it; or ""."""
    return next((text[5:] for text in reversed(overrides) if text.startswith("name=")), "")


def _check_tasks(configs: Sequence[Config]) -> None:
    first = configs[0]
    for config in configs[1:]:
        same_mesh = all(getattr(config.parallel, axis) == getattr(first.parallel, axis) for axis in AXES)
        if config.launch != first.launch or config.output_dir != first.output_dir or not same_mesh:
            raise ValueError(
                f"tasks of an array share their nodes: {TASK} cannot change launch.*, the mesh or output_dir"
            )


def _check_secrets(job: Job, configs: Sequence[Config]) -> None:
    """Refuses what would write a secret of the environment into files that others may read.

    These are the job's script and the runs' configurations. The parts are looked at too, as they are before
    they are quoted for the script; its body is not, which is the same for all.
    """
    profile = [text for v in load_profile(job.config.launch.profile).variables for text in (v.value, v.why)]
    head = script(job).removesuffix(body())
    settings = [text for config in configs for text in _texts(asdict(config))]
    for name, value in secrets_of(os.environ).items():
        if any(value in text for text in (head, *job.overrides, *profile, *settings)):
            raise ValueError(
                f"the value of {name} would be written into the job's script or configuration: leave it out "
                "of arguments, configuration files and the profile; jobs get your environment from Slurm"
            )


def _texts(values: Any) -> Iterator[str]:
    """All texts in nested settings."""
    if isinstance(values, str):
        yield values
    elif isinstance(values, dict):
        for name, value in values.items():
            yield from (str(name), *_texts(value))
    elif isinstance(values, list | tuple):
        for value in values:
            yield from _texts(value)


def _dependency(after: str) -> str:
    if not after or _DEPENDENCY.fullmatch(after):
        return after
    if re.fullmatch(r"\d+(_\d+)?(,\d+(_\d+)?)*", after):
        return f"afterany:{after.replace(',', ':')}"
    raise ValueError(f"--after {after}: give numbers of jobs, or a dependency such as afterok:1234")


def _file_system(folder: Path) -> str:
    """The kind of file system that a folder lies on; "" where /proc does not say."""
    best, kind = "", ""
    try:
        mounts = Path("/proc/self/mounts").read_text().splitlines()
    except OSError:
        return ""
    for mount in mounts:
        _, point, found = mount.split()[:3]
        inside = folder.resolve() == Path(point) or Path(point) in folder.resolve().parents
        if inside and len(point) >= len(best):
            best, kind = point, found
    return kind


def _submitted(planned: Planned, number: str, warnings: str) -> str:
    job, launch = planned.job, planned.job.config.launch
    spare = f" and {launch.spare_nodes} spare" if launch.spare_nodes else ""
    tasks = f", {len(planned.runs)} tasks" if job.array else ""
    rows = [
        f"submitted job {number}: {job.command} on {launch.nodes}{spare} nodes x {launch.nproc} ranks{tasks}"
    ]
    for task, run in planned.runs.items():
        own = f"{number}{'_' * bool(task)}{task}"
        rows += [
            f"  run     {run}",
            f"  script  {run}/slurm/job_{own}.sh",
            f"  log     {run}/slurm/job_{number if not task else '*'}.log",
            f"  ranks   {run}/slurm/job_{number if not task else '*'}/attempt_*/rank_*.log",
        ]
    if warnings:
        rows.append(warnings)
    rows.append(shlex.join(["megatsp", "launch", "status", str(next(iter(planned.runs.values())))]))
    return "\n".join(rows)
