"""The rules of launch.*: what a job's script can hold, and what must not get into it."""

import os
import re
import shlex
from collections.abc import Iterator, Mapping

from megatsp.cluster.profiles import SECRET, is_path, load_profile
from megatsp.schema import LaunchConfig, SlurmConfig

# What a secret's own text looks like: keys of Hugging Face and W&B.
_SECRET_VALUE = re.compile(r"\bhf_\w{20,}|wandb login +\"?[^-\s\"$`]|\b[0-9a-f]{40}\b")
_SECRET_CHARACTERS = 8  # what is shorter than that also stands in other text
_ASSIGNED = re.compile(r"(\w+)=\"?(?=[^\s\"$`])")  # what the shell expands is not in the text
# What a job's script says itself: by which key, or "" for what must be so.
_OURS = {
    "--output": "", "--error": "", "--open-mode": "", "--requeue": "", "--no-requeue": "", "--no-kill": "",
    "--chdir": "", "--wrap": "", "--signal": "launch.slurm.signal_s", "--nodes": "launch.nodes",
    "--ntasks-per-node": "launch.nproc", "--ntasks": "launch.nproc", "--ntasks-per-gpu": "launch.nproc",
    "--gpus": "launch.nproc", "--gpus-per-task": "launch.nproc", "--gpus-per-socket": "launch.nproc",
    "--cpus-per-task": "launch.slurm.cpus_per_rank", "--cpus-per-gpu": "launch.slurm.cpus_per_rank",
    "--time": "launch.slurm.time", "--partition": "launch.slurm.partition",
    "--account": "launch.slurm.account", "--qos": "launch.slurm.qos",
    "--constraint": "launch.slurm.constraint", "--reservation": "launch.slurm.reservation",
    "--exclude": "launch.slurm.exclude", "--exclusive": "launch.slurm.exclusive",
    "--oversubscribe": "launch.slurm.exclusive", "--array": "--array", "--dependency": "--after",
    "--job-name": "name",
}  # fmt: skip
# And what else it says, or cannot bear, in some jobs.
_GPUS = ("--gpus-per-node", "--gres")
_MEMORY = ("--mem", "--mem-per-cpu", "--mem-per-gpu")
_EXPORT = ("--export", "--export-file", "--get-user-env")
_SHORT = {
    "-A": "--account", "-C": "--constraint", "-D": "--chdir", "-G": "--gpus", "-J": "--job-name",
    "-N": "--nodes", "-a": "--array", "-c": "--cpus-per-task", "-d": "--dependency", "-e": "--error",
    "-k": "--no-kill", "-n": "--ntasks", "-o": "--output", "-p": "--partition", "-q": "--qos",
    "-s": "--oversubscribe", "-t": "--time", "-x": "--exclude",
}  # fmt: skip
# Minutes, minutes:seconds, hours:minutes:seconds, and days-hours with or without the others.
_SLURM_TIME = re.compile(r"\d+(:\d\d){0,2}|\d+-\d+(:\d\d){0,2}|UNLIMITED|INFINITE", re.IGNORECASE)


def launch_errors(launch: LaunchConfig) -> Iterator[str]:
    """What is wrong with a job's keys, one message a mistake, none of which holds a secret."""
    for message in _launch_errors(launch):
        for name, value in secrets_of(os.environ).items():
            message = message.replace(value, f"${name}")
        yield _SECRET_VALUE.sub("***", message)


def secrets_of(environ: Mapping[str, str]) -> dict[str, str]:
    """The variables whose name says that they hold a secret, if they are long enough to."""
    found = {name: value.strip() for name, value in environ.items() if SECRET.search(name)}
    return {name: value for name, value in found.items() if len(value) >= _SECRET_CHARACTERS}


def _launch_errors(launch: LaunchConfig) -> Iterator[str]:
    if not is_path(launch.profile):  # one of the user's own is read where it is applied, not of an old run
        try:
            load_profile(launch.profile)
        except ValueError as error:
            yield f"launch.profile: {error}"
    yield from _script_errors(launch.slurm)
    for option in launch.slurm.options:
        if not secret_set_in(option):  # a message of _option_errors holds it
            yield from _option_errors(option, launch)
    for text in [*launch.slurm.setup, *launch.slurm.options, launch.slurm.container]:
        if name := secret_set_in(text):
            yield (
                f"launch.slurm.* sets {name}: scripts, configurations and logs are read by others; export it "
                "in your shell instead, jobs get your environment from Slurm"
            )


def secret_set_in(text: str) -> str:
    """The name of the secret that a command or an option gives a value to; "" if it gives none."""
    for match in _ASSIGNED.finditer(text):
        if SECRET.search(match[1]):
            return match[1]
    return "a key" if _SECRET_VALUE.search(text) else ""


def options_set(text: str) -> list[tuple[str, str]]:
    """(name, value or "") of the options of sbatch in a text; long names of the short ones in a rule."""
    words = shlex.split(text)
    found = []
    for word, following in zip(words, [*words[1:], ""], strict=True):
        if word.startswith("--"):
            name, _, value = word.partition("=")
        elif word.startswith("-"):
            name, value = _SHORT.get(word[:2], word[:2]), word[2:]
        else:
            continue
        found.append((name, value or ("" if following.startswith("-") else following)))
    return found


def set_by_script(name: str, value: str, launch: LaunchConfig) -> str | None:
    """How to say in a job what this option of sbatch does; "" if it must be left out, None if it may stay."""
    known = (*_OURS, *_GPUS, *_MEMORY, *_EXPORT)
    if name not in known:  # sbatch takes the beginning of a name too
        name = next((full for full in known if len(name) > 4 and full.startswith(name)), name)
    if name in _OURS:
        return _OURS[name]
    slurm = launch.slurm
    asks = launch.device != "cpu" and slurm.gpu_request != "none"
    if name in _GPUS and asks and (name != "--gres" or "gpu" in value or slurm.gpu_request == "gres"):
        return "launch.nproc, or launch.slurm.gpu_request=none and this"
    if name in _MEMORY and slurm.exclusive:
        return "launch.slurm.exclusive=false and this"
    if name in _EXPORT and value.partition(",")[0] != "ALL":
        return ""  # a job gets the environment, keys included
    return None


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
    for name in ("setup", "container"):
        given = getattr(slurm, name)
        if any("\n" in text for text in (given if isinstance(given, list) else [given])):
            yield f"launch.slurm.{name}: a command is one line"
    try:
        shlex.split(slurm.container)
    except ValueError as error:
        yield f"launch.slurm.container: {str(error).lower()}"


def _option_errors(option: str, launch: LaunchConfig) -> Iterator[str]:
    try:
        given = options_set(option)
    except ValueError:  # a quotation mark without its other
        given = []
    if not given or not re.fullmatch(r"--?[A-Za-z][^\n]*", option):
        yield f"launch.slurm.options: {option!r} is no option of sbatch: write it as --name=value"
        return
    for name, value in given:
        if (instead := set_by_script(name, value, launch)) is not None:
            use = f"use {instead}" if instead else "leave it out"
            yield f"launch.slurm.options: {option} contradicts the job's script; {use}"


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
