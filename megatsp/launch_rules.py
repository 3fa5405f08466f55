"""The rules of launch.*: what a job's script can hold, and what must not get into it."""

import re
import shlex
from collections.abc import Iterator

from megatsp.cluster.profiles import is_path, load_profile
from megatsp.schema import LaunchConfig, SlurmConfig

# In the name of a variable; and in what a variable may hold: keys of Hugging Face and W&B.
SECRET = re.compile(r"(?:KEY|TOKEN|SECRET|PASSWORD|PASSWD|CREDENTIAL|AUTH)", re.IGNORECASE)
_SECRET_VALUE = re.compile(r"\bhf_\w{20,}|wandb login +[^-\s]|\b[0-9a-f]{40}\b")
# What a job's script says itself: by which key, or that it must be so.
_OURS = {
    "--output": "", "--error": "", "--open-mode": "", "--requeue": "", "--no-requeue": "", "--no-kill": "",
    "--chdir": "", "--signal": "launch.slurm.signal_s", "--nodes": "launch.nodes",
    "--ntasks-per-node": "launch.nproc", "--ntasks": "launch.nproc", "--time": "launch.slurm.time",
    "--partition": "launch.slurm.partition", "--account": "launch.slurm.account", "--array": "--array",
    "--dependency": "--after", "--exclude": "launch.slurm.exclude", "--job-name": "name",
}  # fmt: skip
# Minutes, minutes:seconds, hours:minutes:seconds, and days-hours with or without the others.
_SLURM_TIME = re.compile(r"\d+(:\d\d){0,2}|\d+-\d+(:\d\d){0,2}|UNLIMITED|INFINITE", re.IGNORECASE)


def launch_errors(launch: LaunchConfig) -> Iterator[str]:
    """What is wrong with a job's keys, one message a mistake."""
    if not is_path(launch.profile):  # one of the user's own is read where it is applied, not of an old run
        try:
            load_profile(launch.profile)
        except ValueError as error:
            yield f"launch.profile: {error}"
    yield from _script_errors(launch.slurm)
    for text in [*launch.slurm.setup, *launch.slurm.options, launch.slurm.container]:
        if name := secret_set_in(text):
            yield (
                f"launch.slurm.* sets {name}: scripts, configurations and logs are read by others; export it "
                "in your shell instead, jobs get your environment from Slurm"
            )


def secret_set_in(text: str) -> str:
    """The name of the secret that a command or an option gives a value to; "" if it gives none."""
    match = re.search(rf"(\w*{SECRET.pattern}\w*)=[^$\s]", text, re.IGNORECASE)
    if match:
        return match[1]
    return "a key" if _SECRET_VALUE.search(text) else ""


def _script_errors(slurm: SlurmConfig) -> Iterator[str]:
    """What a job's script cannot hold: a key's text is one word of one line there."""
    for name in ("partition", "account", "qos", "constraint", "reservation", "exclude"):
        if re.search(r"\s", value := getattr(slurm, name)):
            yield f"launch.slurm.{name}={value!r}: one word, as sbatch --{name} takes it"
    if slurm.time and not _SLURM_TIME.fullmatch(slurm.time):
        yield (
            f"launch.slurm.time={slurm.time}: give minutes, hours:minutes:seconds or days-hours, such as "
            "'90', 4:00:00 or 2-12:00:00"
        )
    elif slurm.time and 0 < _seconds(slurm.time) <= slurm.signal_s:
        yield (
            f"launch.slurm.time={slurm.time}: not longer than launch.slurm.signal_s={slurm.signal_s}: "
            "the job would be asked to end at once; give more time, or a smaller signal_s"
        )
    if 0 < slurm.port < 1024:
        yield f"launch.slurm.port={slurm.port}: must be 0, or at least 1024"
    for option in slurm.options:
        if not re.fullmatch(r"--?[A-Za-z][^\n]*", option):
            yield f"launch.slurm.options: {option!r} is no option of sbatch: write it as --name=value"
        elif (name := re.split(r"[= ]", option)[0]) in _OURS:
            instead = f"use {_OURS[name]}" if _OURS[name] else "leave it out"
            yield f"launch.slurm.options: the job's script has {name} already; {instead}"
    for name in ("setup", "container"):
        given = getattr(slurm, name)
        if any("\n" in text for text in (given if isinstance(given, list) else [given])):
            yield f"launch.slurm.{name}: a command is one line"
    try:
        shlex.split(slurm.container)
    except ValueError as error:
        yield f"launch.slurm.container={slurm.container}: {str(error).lower()}"


def _seconds(time: str) -> int:
    """A time limit as Slurm reads it; 0: there is none."""
    if not time[0].isdigit():
        return 0
    days, dash, rest = time.rpartition("-")
    parts = [int(part) for part in rest.split(":")]
    if dash:
        hours, minutes, seconds = (*parts, 0, 0)[:3]
    elif len(parts) == 3:
        hours, minutes, seconds = parts
    else:
        hours, (minutes, seconds) = 0, (*parts, 0)[:2]
    return ((int(days or 0) * 24 + hours) * 60 + minutes) * 60 + seconds
