"""The argument parser of all commands."""

from __future__ import annotations

import argparse
from typing import Any, NoReturn


class ArgumentParser(argparse.ArgumentParser):
    """An argument parser whose errors are exceptions, to be shown in one line, and that takes no abbreviated flags."""

    def __init__(self, **kwargs: Any):
        super().__init__(allow_abbrev=False, **kwargs)

    def error(self, message: str) -> NoReturn:
        """Raise the message.

        Raises:
            ValueError: Always.
        """
        raise ValueError(message)
