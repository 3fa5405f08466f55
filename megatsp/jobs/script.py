"""The script of a job: text that depends on nothing but the `Job`, whose configuration is validated."""

import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from megatsp.cluster.profiles import export_lines, load_profile
from megatsp.schema import AXES, Config

TASK = "%a"  # in an override: the number of the array's task, as in Slurm's names of files
_TASK_VARIABLE = '"${SLURM_ARRAY_TASK_ID}"'


@dataclass(frozen=True)
class Job:
    """What a script is made of.

    config: resolved; of the first task of an array. command: train, sft or preflight. overrides: its
    arguments, which may hold `%a`; so may run, the run's folder. cwd, run: absolute paths. array: in Slurm's
    notation, or "". after: in Slurm's notation of dependencies, or "". python: the interpreter on the nodes.
    """

    config: Config
    command: str
    overrides: tuple[str, ...]
    run: str
    cwd: str
    python: str
    array: str = ""
    after: str = ""


def script(job: Job) -> str:
    """The text for sbatch: the head that is made here, and the body, launch/job.sh."""
    head = [
        "#!/bin/bash",
        *(f"#SBATCH {option}" for option in _options(job)),
        "",
        "# What it runs; the rest is the same for every job.",
        *(f"{name}={value}" for name, value in _variables(job)),
        *_exports(job.config.launch.profile),
        *(line for command in job.config.launch.slurm.setup for line in _setup(command)),
        "",
    ]
    return "\n".join(head) + "\n" + body()


def body() -> str:
    """launch/job.sh: beside this module in a wheel, and by a link in a checkout."""
    return (Path(__file__).parent / "job.sh").read_text()


def _options(job: Job) -> Iterator[str]:
    launch, slurm = job.config.launch, job.config.launch.slurm
    yield f"--job-name={job.config.name if not job.array else 'megatsp'}"
    for name in ("partition", "account", "qos", "constraint", "reservation", "time", "exclude"):
        if value := getattr(slurm, name):
            yield f"--{name}={shlex.quote(value)}"
    yield f"--nodes={launch.nodes + launch.spare_nodes}"
    yield f"--ntasks-per-node={launch.nproc}"
    if slurm.cpus_per_rank:
        yield f"--cpus-per-task={slurm.cpus_per_rank}"
    if launch.device != "cpu" and slurm.gpu_request != "none":
        count = f"gpu:{launch.nproc}" if slurm.gpu_request == "gres" else launch.nproc
        yield f"--{slurm.gpu_request}={count}"
    if slurm.exclusive:
        yield "--exclusive"
        yield "--mem=0"  # all of it
    yield f"--signal=B:USR1@{slurm.signal_s}"
    yield "--requeue"
    yield "--no-kill"  # a lost node ends an attempt, and not the job
    yield "--open-mode=append"
    yield f"--chdir={shlex.quote(job.cwd)}"
    run = job.run.replace("%", "%%").replace("%%a", "%a")
    yield f"--output={shlex.quote(f'{run}/slurm/job_%j.log')}"
    if job.array:
        yield f"--array={job.array}"
    if job.after:
        yield f"--dependency={job.after}"
    yield from slurm.options


def _variables(job: Job) -> Iterator[tuple[str, str]]:
    config, launch, slurm = job.config, job.config.launch, job.config.launch.slurm
    yield "name", quoted(config.name if not job.array else Path(job.run).name)
    yield "run", quoted(job.run)
    yield "folder", quoted(f"{job.run}/slurm")
    yield "nodes", str(launch.nodes)
    yield "nproc", str(launch.nproc)
    yield "tasks", slurm.tasks
    yield "mesh", ",".join(f"{axis}={getattr(config.parallel, axis)}" for axis in AXES)
    yield "preflight", launch.preflight
    yield "device", launch.device
    yield "port", str(slurm.port)
    yield "restarts", str(launch.max_restarts)
    yield "backoff_s", f"{launch.restart_backoff_s:g}"
    yield "requeues", str(slurm.max_requeues)
    yield "own_limit", "yes" if config.trainer.exit_duration_in_mins else "''"
    yield "python", quoted(job.python)
    yield "container", f"({' '.join(map(quoted, shlex.split(slurm.container)))})"
    yield "command", f"({' '.join(map(quoted, (job.command, *job.overrides)))})"


def _exports(profile: str) -> Iterator[str]:
    found = load_profile(profile)
    if found.variables:
        yield f"\n# The profile {found.name}; a value of your own wins."
        yield from export_lines(found)


def _setup(command: str) -> tuple[str, ...]:
    """A command of the user's, which ends the job if it fails, whatever stands at its line's end."""
    said = shlex.quote(f"megatsp: launch.slurm.setup failed: {command}")
    return "{", f"    {command}", f"}} || {{ echo {said}; exit 1; }}"


def quoted(text: str) -> str:
    """A word for bash, with the array's task in place of each `%a`."""
    return _TASK_VARIABLE.join(shlex.quote(part) if part else "" for part in text.split(TASK)) or "''"
