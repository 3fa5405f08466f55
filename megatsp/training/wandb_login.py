"""Whether a W&B key will do, asked before a job is submitted that would find out hours later."""

import base64
import http.client
import json
import os
import re
import threading
import urllib.error
import urllib.request
from typing import Any

from megatsp.schema import Config
from megatsp.training.wandb_run import wandb_mode
from megatsp.training.wandb_server import api_key, login_page, server_url, without_user

_PATIENCE_S = 10.0
_QUERY = json.dumps({"query": "query { viewer { username } }"}).encode()
_FIX = "get one at {page} and export WANDB_API_KEY, or set logging.wandb=offline or disabled"


def check_login(config: Config) -> str:
    """Asks the W&B server whether it knows the key that a run of `config` would use; for 10 s at most.

    Returns a line to print where that cannot be found out, or where there is no key; else "". The key and the
    password of an address are in no message.

    Raises:
        ValueError: the key cannot be one, or the server refuses it.
    """
    wanted = config.logging.wandb
    mode = wandb_mode(wanted)
    if mode == "offline" and wanted == "auto" and not os.environ.get("WANDB_MODE"):
        return (
            f"Weights & Biases: no key for {without_user(server_url())}, so the run is kept offline; to have "
            "it online, `wandb login` or export WANDB_API_KEY before submitting (logging.wandb=offline: this "
            "is meant)"
        )
    if mode != "online":
        return ""
    address = server_url()
    key, server, fix = api_key(address), without_user(address), _FIX.format(page=login_page(address))
    if not key:
        if wanted == "online":
            raise ValueError(f"logging.wandb=online, but there is no key for {server}: {fix}")
        return f"Weights & Biases: no key for {server} was found to check"
    if not re.fullmatch(r"[\w.-]{40,}", key):
        raise ValueError(
            f"the W&B key for {server} cannot be one: it has {len(key)} characters, and keys have 40 or more "
            f"letters, digits, _ - and .; {fix}"
        )
    found: list[str] = []
    # In a thread: looking a name up knows no time limit.
    asking = threading.Thread(target=lambda: found.append(_ask(server, key)), daemon=True)
    asking.start()
    asking.join(_PATIENCE_S)
    answer = found[0] if found else f"no answer in {_PATIENCE_S:.0f} s"
    if answer == "refused":
        raise ValueError(f"{server} refuses the W&B key: {fix}")
    return f"Weights & Biases: {server} could not be asked about the key: {answer}" if answer else ""


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """A key is not carried to another server."""

    def redirect_request(self, *arguments: Any) -> None:
        return None


def _ask(server: str, key: str) -> str:
    """Empty: the key is known; "refused"; or why it cannot be told."""
    credentials = base64.b64encode(f"api:{key}".encode()).decode()
    headers = {"Content-Type": "application/json", "Authorization": f"Basic {credentials}"}
    try:
        request = urllib.request.Request(f"{server}/graphql", _QUERY, headers)
        with urllib.request.build_opener(_NoRedirect).open(request, timeout=_PATIENCE_S) as answer:
            content = json.loads(answer.read(1 << 16))
        return "" if content["data"]["viewer"] else "refused"
    except urllib.error.HTTPError as error:
        with error:
            return "refused" if error.code in (401, 403) else f"HTTP status {error.code}"
    except urllib.error.URLError as error:
        return str(error.reason)
    except (OSError, http.client.HTTPException, ValueError, LookupError, TypeError) as error:
        return f"{type(error).__name__}, no answer of W&B's"
