"""Which W&B server a run would use, and the key for it: as wandb itself finds them."""

import configparser
import os
import re
from netrc import NetrcParseError, netrc
from pathlib import Path
from urllib.parse import urlsplit

_USER = re.compile(r"(?<=://)[^/\s]*@")


def server_url() -> str:
    """Of WANDB_BASE_URL, then of the this folder's settings, then of the user's, then wandb's own default."""
    configured = Path(os.environ.get("WANDB_CONFIG_DIR") or "~/.config/wandb").expanduser()
    local = Path(".wandb" if Path(".wandb").exists() else "wandb")
    found = ""
    for folder in (configured, local):
        settings = configparser.ConfigParser()
        try:
            settings.read(folder / "settings")
            found = settings.get("default", "base_url", fallback=found)
        except (OSError, ValueError, configparser.Error):
            continue
    return _as_wandb_has_it(os.environ.get("WANDB_BASE_URL") or found)


def api_key(server: str) -> str:
    """Of WANDB_API_KEY, or of the server's own entry in ~/.netrc; empty: there is none."""
    if key := os.environ.get("WANDB_API_KEY"):
        return key
    try:
        hosts = netrc(_netrc_file()).hosts
    except (OSError, NetrcParseError):
        return ""
    # The first of the two that is there, as wandb has it; where it has no password, wandb looks no further.
    entry = next((hosts[name] for name in _netrc_names(server) if name in hosts), None)
    return entry[2] or "" if entry else ""


def login_page(server: str) -> str:
    """Where the server's users get their keys."""
    import wandb

    try:
        return f"{without_user(wandb.Settings(base_url=server).app_url)}/authorize"
    except ValueError:  # an address that wandb will refuse
        return f"{without_user(server)}/authorize"


def without_user(text: str) -> str:
    """A text without the user and the password of the addresses in it."""
    return _USER.sub("", text)


def _as_wandb_has_it(url: str) -> str:
    """An address as wandb writes it, some of which it changes; its default for an empty one."""
    import wandb

    try:
        settings = wandb.Settings(base_url=url) if url else wandb.Settings()
        return settings.base_url.rstrip("/")
    except ValueError:  # the run's start says what is wrong with it
        return url.rstrip("/")


def _netrc_names(server: str) -> list[str]:
    """The machines of ~/.netrc whose key wandb takes for a server, the first one there is."""
    from wandb.sdk.lib import urls

    # From 0.31 on wandb's default server has a second name: that under which earlier versions kept the key.
    upstream = getattr(urls, "forge_upstream_url", str)(server)
    return list(dict.fromkeys(urlsplit(url).netloc for url in (server, upstream)))


def _netrc_file() -> Path:
    """Named, for Python refuses its own default one if others may read it, and wandb does not."""
    if named := os.environ.get("NETRC"):
        return Path(named).expanduser()
    files = [Path(name).expanduser() for name in ("~/.netrc", "~/_netrc")]
    return next((file for file in files if file.exists()), files[0])
