"""Where a Hugging Face checkpoint is: in a folder, or on the hub and then in the local cache."""

import re
from pathlib import Path

from megatsp.hf.hashes import MANIFEST

INDEX = "model.safetensors.index.json"
# All that is ever fetched from the hub: no code, no pickle, no weights of another kind.
FETCHED = ("model*.safetensors", INDEX, "*.json", "tokenizer.model", "*.tiktoken", "*.jinja", MANIFEST)
NOT_FETCHED = ("*/*", "consolidated*")
_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


def check_name(name: str) -> Path | None:
    """The folder that a checkpoint's name says; None: it is one of the hub's. Without torch and network.

    Raises:
        ValueError: it is neither.
    """
    folder = Path(name).expanduser()
    if folder.is_dir():
        return folder
    if folder.exists():
        raise ValueError(f"{name} is a file: give the folder that holds config.json and the weights")
    if not _HUB_NAME.fullmatch(name):
        raise ValueError(
            f"no checkpoint at {name}: give a folder with config.json and model.safetensors, or a name of "
            "the Hugging Face hub such as OWNER/NAME"
        )
    return None


def folder_of(name: str) -> Path:
    """The folder that a checkpoint's name says, or that of the hub's repository in the local cache, filled if
    need be; on all ranks, or in one process.

    Raises:
        ValueError: it is no such name, or the hub does not give it.
    """
    if folder := check_name(name):
        return folder
    from huggingface_hub import snapshot_download

    from megatsp.hf.first_rank import on_first_rank

    def fetch() -> Path:
        try:
            return Path(snapshot_download(name, allow_patterns=[*FETCHED], ignore_patterns=[*NOT_FETCHED]))
        except Exception as error:  # of many kinds: no network, no such repository, not allowed
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise ValueError(
                f"no checkpoint at {name}: no such folder, and the Hugging Face hub did not give it "
                f"({type(error).__name__}: {reason}). Without a network, download it elsewhere (hf download "
                f"{name}) and give its folder"
            ) from None

    on_first_rank(fetch)  # the others then find it in the cache, or fetch it to that of their own host
    return fetch()
