"""One W&B run for all starts of a run: its rows have the steps of metrics.jsonl, each once and in order.

W&B takes rows in the order of their steps alone, and keeps the first of each. So a row is given away when the
next one begins; what W&B has already is not given again; and what it lacks of metrics.jsonl, because the
process was killed with it or W&B was not used then, is given at the start.
"""

import html
import logging
import os
import secrets
import sys
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

from megatsp.checkpoint.paths import replace_text
from megatsp.launch_rules import secrets_of
from megatsp.schema import Config
from megatsp.training.wandb_file import last_step
from megatsp.training.wandb_server import api_key, server_url, without_user
from megatsp.training.wandb_service import abandon, finish, patiently

RUN_ID = "wandb_run_id"  # in the run's folder: a run that has no checkpoint yet keeps its id, too
_FINISH_S = 60.0  # for the server to take the last rows
_ALERT_EVERY_S = 300  # of one title
_TITLE_CHARACTERS, _TEXT_CHARACTERS = 63, 500  # W&B takes titles of less than 64
_ARTIFACTS_S = 3600.0  # for the server to take exported models


class WandbRun:
    """last: the largest step that W&B has; -1: none."""

    def __init__(
        self, config: Config, folder: Path, run_id: str, about: Mapping[str, Any], begins: bool = False
    ) -> None:
        """run_id: see `choose_id`. about: joins the configuration. begins: nothing of the run is made yet.

        Raises:
            ValueError: the run begins, and W&B refuses a key or a setting.
            RuntimeError: W&B does not start.
        """
        self._run = start(config, folder, run_id, about, begins)
        self.last = _known_step(self._run, run_id)
        self._row: dict[str, Any] = {}
        self._step = -1  # of the row that is open
        self._alerts = config.logging.alerts
        self._name = config.name
        with suppress(OSError):  # a full disk: the first checkpoint will know it
            replace_text(folder / RUN_ID, f"{run_id}\n")

    def log(self, iteration: int, values: Mapping[str, Any]) -> None:
        """Adds to the row of an iteration; nothing, if W&B has that row."""
        if iteration <= self.last:
            return
        if iteration != self._step:
            self._give()
            self._step = iteration
        self._row |= {name: value for name, value in values.items() if value is not None}

    def log_samples(self, iteration: int, samples: list[dict[str, str]]) -> None:
        """Adds texts that the model continued to the row of an iteration."""
        if iteration > self.last:
            import wandb

            texts = (f"<b>{html.escape(s['prompt'])}</b>{html.escape(s['continuation'])}" for s in samples)
            shown = f'<pre style="white-space: pre-wrap">{"<hr>".join(texts)}</pre>'
            self.log(iteration, {"iteration": iteration, "samples": wandb.Html(shown, inject=False)})

    def alert(self, kind: str, text: str, level: str) -> None:
        """An alert, unless logging.alerts is off. level: INFO, WARN or ERROR."""
        if self._alerts:
            title = f"{kind}: {self._name}"[:_TITLE_CHARACTERS]
            self._run.alert(title, text[:_TEXT_CHARACTERS], level, wait_duration=_ALERT_EVERY_S)

    def go_back(self, iteration: int) -> None:
        """The run goes on from an earlier iteration; of steps made again W&B keeps the first values."""
        if self._step > iteration:
            self._row, self._step = {}, -1

    def close(self, row_is_open: bool = False, exit_code: int = 0) -> None:
        """Ends this start. row_is_open: the next one has more for the last row, and gives it whole.

        Raises:
            TimeoutError: the server did not take all of it.
        """
        if not row_is_open:
            self._give()
        finish(self._run, exit_code)

    @property
    def finish_s(self) -> float:
        """What close() gives the server; 0: any time."""
        return float(self._run.settings.finish_timeout)

    def _give(self) -> None:
        if self._row:
            self._run.log(self._row, step=self._step)
            self.last, self._row = self._step, {}


def start(config: Config, folder: Path, run_id: str, about: Mapping[str, Any], begins: bool = False) -> Any:
    """W&B's run of this id, begun or resumed; kept offline where the server does not answer or refuses.

    Environment variables win over the configuration's project, entity, name and folder; group and tags are
    theirs alone.

    Raises:
        ValueError: the run begins, and W&B refuses a key or a setting.
        RuntimeError: W&B does not start.
    """
    import wandb
    from pydantic import ValidationError

    logging.getLogger("wandb").setLevel(logging.ERROR)
    root = Path(os.environ.get("WANDB_DIR") or folder)
    settings = {**asdict(config), **about}
    for mode in dict.fromkeys((wandb_mode(config.logging.wandb), "offline")):
        try:
            run = _begin(config, root, run_id, settings, mode)
        except Exception as error:
            why = _variable_of(error) if isinstance(error, ValidationError) else " ".join(str(error).split())
            why = without_user(why)
            is_refused = isinstance(
                error, wandb.errors.AuthenticationError | wandb.errors.UsageError | ValidationError
            )
            if is_refused and begins:
                raise ValueError(
                    f"Weights & Biases did not start ({mode}): {why}. Mend that, or use "
                    "logging.wandb=offline or disabled"
                ) from error
            if mode == "offline":
                raise RuntimeError(f"it did not start: {why}") from error
            print(f" Weights & Biases did not start ({why}): this run is kept offline", flush=True)
            abandon()  # its service still holds the run of this id
            continue
        kept = Path(run.settings.wandb_dir)
        if kept.parent.resolve() != root.expanduser().resolve():
            print(
                f" Weights & Biases cannot write to {root}: its files of this start are in {kept}", flush=True
            )
        return run
    raise AssertionError("the last attempt returns or raises")


def _begin(config: Config, root: Path, run_id: str, settings: dict[str, Any], mode: str) -> Any:
    import wandb

    environment = os.environ
    own = {} if environment.get("WANDB_FINISH_TIMEOUT") else {"finish_timeout": _FINISH_S}
    return wandb.init(
        project=environment.get("WANDB_PROJECT") or config.logging.wandb_project,
        entity=environment.get("WANDB_ENTITY") or config.logging.wandb_entity or None,
        name=environment.get("WANDB_NAME") or config.name,
        id=run_id,
        resume="allow",
        mode=mode,  # type: ignore[arg-type]  # wandb_mode gives no other words
        dir=root,
        config=settings,
        settings=wandb.Settings(
            silent=True,
            finish_timeout_raises=True,
            disable_git=True,  # the remote's address may hold a token; code_version has the commit
            x_disable_meta=_has_secret(sys.argv),
            **own,  # type: ignore[arg-type]
        ),
    )


def log_exports(config: Config, folder: Path, folders: list[Path]) -> tuple[str, bool]:
    """Gives W&B exported models, as artifacts of the run: a line that says so, and whether it has them.

    folder: the run's.
    """
    import wandb

    names = ", ".join(f"{config.name}-{exported.name}" for exported in folders)
    run_id = stored_id(folder)
    if not run_id or wandb_mode(config.logging.wandb) == "disabled":
        return "artifacts:  none, W&B is disabled or was when the run was trained", False

    def give(run: Any) -> None:
        given = []
        for exported in folders:
            artifact = wandb.Artifact(f"{config.name}-{exported.name}", type="model")
            artifact.add_dir(str(exported), policy="immutable")
            given.append(run.log_artifact(artifact))
        for artifact in () if run.offline else given:
            artifact.wait(int(_ARTIFACTS_S))
        finish(run, 0)

    try:
        run = start(config, folder, run_id, {})
        patiently(lambda: give(run), 2 * _ARTIFACTS_S)
    except Exception as error:
        abandon()
        return f"artifacts:  W&B did not get {names} ({error}); the same command gives them again", False
    kept = "kept with the offline run, for `wandb sync`" if run.offline else "uploaded"
    return f"artifacts:  {names}, {kept}", True


def stored_id(folder: Path) -> str:
    """The id that a run's folder keeps; empty if there is none."""
    try:
        return (folder / RUN_ID).read_text().strip()
    except OSError:
        return ""


def is_wanted(wanted: str) -> bool:
    """Whether anything is to be given to W&B; found without wandb's import.

    Raises:
        ValueError: WANDB_MODE is no mode.
    """
    return _mode_set(wanted) != "disabled"


def wandb_mode(wanted: str) -> str:
    """online, offline or disabled: what is set, then WANDB_MODE, then whether there is a key."""
    return _mode_set(wanted) or ("online" if api_key(server_url()) else "offline")


def _mode_set(wanted: str) -> str:
    """The mode that the configuration or else WANDB_MODE says; empty: neither does."""
    if wanted != "auto":
        return wanted
    mode = os.environ.get("WANDB_MODE", "")
    if mode not in ("online", "offline", "disabled", ""):
        raise ValueError(f"WANDB_MODE={mode}: use online, offline or disabled, or unset it")
    return mode


def choose_id(folder: Path, of_checkpoint: str) -> tuple[str, str]:
    """A run's id, and what there is to say of it.

    It is the checkpoint's, the folder's, WANDB_RUN_ID's, or a new one.
    """
    wanted = os.environ.get("WANDB_RUN_ID", "")
    own = of_checkpoint or stored_id(folder)
    if own and wanted and wanted != own:
        return own, f"WANDB_RUN_ID={wanted} is not read: this run began as {own} in W&B, and goes on as that"
    return own or wanted or secrets.token_hex(4), ""


def _known_step(run: Any, run_id: str) -> int:
    """The largest step that W&B has of this run, or will have once this machine's files are synced.

    A step that is there twice would be moved behind the last one by `wandb sync`.
    """
    if not run.offline:
        return int(run.starting_step) - 1
    folders = Path(run.settings.wandb_dir).glob(f"*run-*-{run_id}")
    # The newest first: steps only grow over starts.
    for folder in sorted(folders, key=lambda path: path.name.removeprefix("offline-"), reverse=True):
        file = folder / f"run-{run_id}.wandb"
        if file.is_file() and (step := last_step(file)) >= 0:
            if not folder.name.startswith("offline-"):
                print(
                    f" Weights & Biases: steps up to {step} were given to its server before; if it did not "
                    f"get them all, `wandb sync --include-online {folder}` goes before that of this start",
                    flush=True,
                )
            return step
    return -1


def _has_secret(arguments: list[str]) -> bool:
    """Whether the program's arguments, which W&B's metadata lists, hold a secret of the environment."""
    values = secrets_of(os.environ).values()
    return any(value in argument for argument in arguments for value in values)


def _variable_of(error: Any) -> str:
    """What pydantic finds wrong with one of W&B's settings, by the variable that set it."""
    first = error.errors()[0]
    field = str(first["loc"][0]) if first["loc"] else "a setting"
    names = (f"WANDB_{field.upper()}", f"WANDB_{field.removeprefix('run_').upper()}")
    return f"{next((name for name in names if name in os.environ), field)}: {first['msg']}"
