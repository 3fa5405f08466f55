"""Which W&B server a run would use, and the key for it: as wandb itself finds them."""

import configparser
import os
from netrc import NetrcParseError, netrc
from pathlib import Path
from urllib.parse import urlsplit

_DEFAULT = "https://api.wandb.ai"


def server_url() -> str:
    """Of WANDB_BASE_URL, then of the settings of this folder, then of the user's."""
    configured = Path(os.environ.get("WANDB_CONFIG_DIR") or "~/.config/wandb").expanduser()
    local = Path(".wandb" if Path(".wandb").exists() else "wandb")
    found = _DEFAULT
    for folder in (configured, local):
        settings = configparser.ConfigParser()
        try:
            settings.read(folder / "settings")
            found = settings.get("default", "base_url", fallback=found)
        except (OSError, ValueError, configparser.Error):
            continue
    return (os.environ.get("WANDB_BASE_URL") or found).rstrip("/")


def api_key(server: str) -> str:
    """Of WANDB_API_KEY, or of the server's own entry in ~/.netrc; empty: there is none."""
    if key := os.environ.get("WANDB_API_KEY"):
        return key
    try:
        entry = netrc(os.environ.get("NETRC")).hosts.get(urlsplit(server).netloc)
    except (OSError, NetrcParseError):
        entry = None
    return entry[2] or "" if entry else ""
