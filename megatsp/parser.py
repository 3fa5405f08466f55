"""The argparse of every command."""

import argparse
from typing import Any, NoReturn


class Parser(argparse.ArgumentParser):
    """argparse whose errors are ours, and which takes no abbreviated options."""

    def __init__(self, prog: str, description: str | None = None, **settings: Any) -> None:
        super().__init__(prog=prog, description=description, allow_abbrev=False, **settings)

    def error(self, message: str) -> NoReturn:
        raise ValueError(f"{message} ({self.prog} --help lists what it takes)")
