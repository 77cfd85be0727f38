"""Words of a command line and keys of a YAML file, checked ahead of TRL's parser for the sake of the messages."""

from __future__ import annotations

import difflib
from collections.abc import Collection, Iterable
from pathlib import Path
from typing import Any, NoReturn

import yaml
from trl import TrlParser


class OneLineParser(TrlParser):
    """TRL's parser of YAML files and flags. Errors are ``ValueError``; flags are not to be abbreviated."""

    def __init__(self, config_class: Any, **kwargs: Any):
        super().__init__(config_class, allow_abbrev=False, **kwargs)

    def error(self, message: str) -> NoReturn:
        """Raise the message.

        Raises:
            ValueError: Always.
        """
        raise ValueError(message)


def read_mapping(path: str) -> dict[str, Any]:
    """Read a YAML mapping.

    Raises:
        ValueError: If the file cannot be read or is no YAML mapping.
    """
    try:
        content = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(
            f"configuration {path!r} cannot be read ({error.strerror}); give a YAML file or --key value"
        ) from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"configuration {path!r} is not valid YAML; correct it: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(
            f"configuration {path!r} holds {content!r:.60} instead of a YAML mapping; write one 'key: value' a line"
        )
    return {str(key): value for key, value in content.items()}


def check_names(where: str, names: Iterable[str], known: Collection[str]) -> None:
    """Refuse keys and flags that no field has.

    Args:
        where: What holds the names, for the message.
        names: Keys, or flags without their dashes.
        known: Names of the fields.

    Raises:
        ValueError: If a name is unknown; the message names the nearest one.
    """
    for name in names:
        plain = name.replace("-", "_")
        if plain in (*known, "config", "help") or plain.removeprefix("no_") in known:
            continue
        near = difflib.get_close_matches(plain, known, n=1)
        hint = f"did you mean {near[0]}?" if near else "'stage train --help' lists them all"
        raise ValueError(f"{where} has an unknown key {name!r}; {hint}")
