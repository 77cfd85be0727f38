"""How a checkpoint that is not what it should be is reported."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def need(condition: object, message: str) -> None:
    """Raise unless a condition holds.

    Raises:
        ValueError: The message.
    """
    if not condition:
        raise ValueError(message)


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object.

    Raises:
        ValueError: If the file is missing, is no JSON, or holds something else than an object.
    """
    need(path.is_file(), f"{path} is missing; download the whole checkpoint")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path} is not valid JSON ({error}); download it again") from error
    need(isinstance(content, dict), f"{path} holds a {type(content).__name__}, not an object; download it again")
    return content


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write a JSON object, indented, ending in a newline."""
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def shorten(names: list[str], limit: int = 3) -> str:
    """The first names of a list, and how many more there are."""
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(repr(name) for name in names[:limit]) + more
