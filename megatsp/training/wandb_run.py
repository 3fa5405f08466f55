"""One W&B run for all starts of a run: its rows have the steps of metrics.jsonl, each once and in order.

W&B takes rows in the order of their steps alone, and keeps the first of each. So a row is given away when the
next one begins; what W&B has already is not given again; and what it lacks of metrics.jsonl, because the
process was killed with it or W&B was not used then, is given at the start.
"""

import html
import logging
import os
import secrets
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict
from netrc import NetrcParseError, netrc
from pathlib import Path
from typing import Any

from megatsp.checkpoint.paths import replace_text
from megatsp.schema import Config
from megatsp.training.wandb_file import last_step

RUN_ID = "wandb_run_id"  # in the run's folder: a run that has no checkpoint yet keeps its id, too
_ALERT_EVERY_S = 300  # of one title


class WandbRun:
    """id: W&B's name of the run, for checkpoints. last: the largest step that W&B has; -1: none."""

    def __init__(self, config: Config, folder: Path, run_id: str, about: Mapping[str, Any]) -> None:
        """run_id: of the checkpoint; empty: that of the folder, of WANDB_RUN_ID, or a new one.

        about: joins the configuration.

        Raises:
            ValueError: W&B does not start.
        """
        self.id, said = _choose_id(folder, run_id)
        if said:
            print(f" {said}", flush=True)
        self._run = start(config, folder, self.id, about)
        self.last = _known_step(self._run, self.id)
        self._row: dict[str, Any] = {}
        self._step = -1  # of the row that is open
        self._alerts = config.logging.alerts
        self._name = config.name
        with suppress(OSError):  # a full disk: the first checkpoint will know it
            replace_text(folder / RUN_ID, f"{self.id}\n")

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
            self._run.alert(f"{self._name}: {kind}"[:63], text, level, wait_duration=_ALERT_EVERY_S)

    def go_back(self, iteration: int) -> None:
        """The run goes on from an earlier iteration; of steps made again W&B keeps the first values."""
        if self._step > iteration:
            self._row, self._step = {}, -1

    def close(self, row_is_open: bool = False, exit_code: int = 0) -> None:
        """Ends this start. row_is_open: the next one has more for the last row, and gives it whole."""
        if not row_is_open:
            self._give()
        _finish(self._run, exit_code)

    def _give(self) -> None:
        if self._row:
            self._run.log(self._row, step=self._step)
            self.last, self._row = self._step, {}


def start(config: Config, folder: Path, run_id: str, about: Mapping[str, Any]) -> Any:
    """W&B's run of this id, begun or resumed; kept offline where the server does not answer.

    Environment variables win over the configuration's project, entity, name and folder; group and tags are
    theirs alone.

    Raises:
        ValueError: W&B does not start.
    """
    import wandb

    mode, environment = wandb_mode(config.logging.wandb), os.environ
    logging.getLogger("wandb").setLevel(logging.ERROR)

    def begin(mode: str) -> Any:
        return wandb.init(
            project=environment.get("WANDB_PROJECT") or config.logging.wandb_project,
            entity=environment.get("WANDB_ENTITY") or config.logging.wandb_entity or None,
            name=environment.get("WANDB_NAME") or config.name,
            id=run_id,
            resume="allow",
            mode=mode,  # type: ignore[arg-type]  # wandb_mode gives no other words
            dir=environment.get("WANDB_DIR") or folder,
            config={**asdict(config), **about},
            settings=wandb.Settings(silent=True),
        )

    try:
        try:
            return begin(mode)
        except (wandb.errors.CommError, TimeoutError) as error:
            if isinstance(error, wandb.errors.AuthenticationError):
                raise
            print(f" Weights & Biases does not answer ({error}): this run is kept offline", flush=True)
            return begin("offline")
    except (wandb.Error, TimeoutError) as error:
        raise ValueError(
            f"Weights & Biases did not start ({mode}): {error}. Check WANDB_API_KEY, or use "
            "logging.wandb=offline or disabled"
        ) from error


def log_exports(config: Config, folder: Path, folders: list[Path]) -> str:
    """Gives W&B exported models, as artifacts of the run; a line that says so.

    folder: the run's.

    Raises:
        ValueError: W&B does not start.
    """
    import wandb

    run_id = stored_id(folder)
    if not run_id or wandb_mode(config.logging.wandb) == "disabled":
        return "artifacts:  none, W&B is disabled or was when the run was trained"
    run = start(config, folder, run_id, {})
    for exported in folders:
        artifact = wandb.Artifact(f"{config.name}-{exported.name}", type="model")
        artifact.add_dir(str(exported), policy="immutable")
        run.log_artifact(artifact)
    kept = "kept with the offline run, for `wandb sync`" if run.offline else "uploaded"
    _finish(run, 0)
    return f"artifacts:  {', '.join(f'{config.name}-{exported.name}' for exported in folders)}, {kept}"


def _finish(run: Any, exit_code: int) -> None:
    """Ends a run and W&B's service, which may write its file only now."""
    import wandb

    run.finish(exit_code=exit_code)
    wandb.teardown()


def stored_id(folder: Path) -> str:
    """The id that a run's folder keeps; empty if there is none."""
    try:
        return (folder / RUN_ID).read_text().strip()
    except OSError:
        return ""


def wandb_mode(wanted: str) -> str:
    """online, offline or disabled: what is set, then WANDB_MODE, then whether there is an API key."""
    if wanted != "auto":
        return wanted
    if mode := os.environ.get("WANDB_MODE"):
        if mode not in ("online", "offline", "disabled"):
            raise ValueError(f"WANDB_MODE={mode}: use online, offline or disabled, or unset it")
        return mode
    if os.environ.get("WANDB_API_KEY"):
        return "online"
    try:
        known = netrc(os.environ.get("NETRC")).hosts
    except (OSError, NetrcParseError):
        known = {}
    return "online" if any("wandb" in host for host in known) else "offline"


def _choose_id(folder: Path, of_checkpoint: str) -> tuple[str, str]:
    """The id, and what there is to say of it."""
    wanted = os.environ.get("WANDB_RUN_ID", "")
    own = of_checkpoint or stored_id(folder)
    if own and wanted and wanted != own:
        return own, f"WANDB_RUN_ID={wanted} is not read: this run began as {own} in W&B, and goes on as that"
    return own or wanted or secrets.token_hex(4), ""


def _known_step(run: Any, run_id: str) -> int:
    """The largest step that W&B has of this run, or will have once this machine's files are synced."""
    if not run.offline:
        return int(run.starting_step) - 1
    there = [
        path / f"run-{run_id}.wandb"
        for path in Path(run.settings.wandb_dir).iterdir()
        if path.name.endswith(f"-{run_id}")
    ]
    return max((last_step(file) for file in there if file.is_file()), default=-1)
