"""W&B's service is a process beside ours: it may stall, die or lose its server, and training goes on."""

import threading
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any

_END_S = 10.0  # for the service to end before it is killed


def patiently(
    use: Callable[[], object], patience_s: float, progress: Callable[[], object] = lambda: 0
) -> None:
    """Calls `use` in a thread, and returns when it does.

    patience_s: how long `progress` may stay the same.

    Raises:
        TimeoutError: it stayed the same; the thread is left alone.
        Exception: what `use` raised.
    """
    raised: list[Exception] = []

    def call() -> None:
        try:
            use()
        except SystemExit as ended:  # of wandb.teardown, where the service ended badly
            raised.append(RuntimeError(f"its service ended with status {ended.code}"))
        except Exception as error:
            raised.append(error)

    thread = threading.Thread(target=call, daemon=True)
    before, since = progress(), time.monotonic()
    thread.start()
    while thread.is_alive():
        thread.join(min(1.0, patience_s))
        if (now := progress()) != before:
            before, since = now, time.monotonic()
        elif thread.is_alive() and time.monotonic() - since >= patience_s:
            raise TimeoutError(f"no answer of its service in {patience_s:.0f} s")
    if raised:
        raise raised[0]


def finish(run: Any, exit_code: int) -> None:
    """Ends a run and W&B's service, which may write its file only now.

    Raises:
        TimeoutError: the server did not take all of it within WANDB_FINISH_TIMEOUT.
    """
    import wandb

    try:
        run.finish(exit_code=exit_code)
    except TimeoutError as error:
        raise TimeoutError(
            f"the server did not take all in {run.settings.finish_timeout:.0f} s; the next start gives it "
            f"what it lacks, or else `wandb sync --include-online {run.settings.sync_dir}`"
        ) from error
    finally:
        wandb.teardown()


def abandon() -> None:
    """Ends W&B's service in 10 s, whatever it is doing: nothing waits for it when our process ends."""
    import wandb
    from wandb.sdk import wandb_setup

    with suppress(Exception):
        connection = wandb_setup.singleton()._connection
        with suppress(Exception):
            patiently(wandb.teardown, _END_S)
        connection._proc._process.kill()  # type: ignore[union-attr]
