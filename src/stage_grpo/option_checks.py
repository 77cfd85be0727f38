"""Numbers that users give: YAML and Python let through what is none."""

from __future__ import annotations

from typing import Any


def check_count(name: str, value: Any, least: int) -> None:
    """Refuse what is no count.

    Args:
        name: The key, for the message.
        value: Its value.
        least: The smallest one that works.

    Raises:
        ValueError: If it is no whole number, or a smaller one.
    """
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ValueError(f"{name}={value!r} must be a whole number of at least {least}")


def is_number(value: Any) -> bool:
    """Whether it is a number, which true and false are not."""
    return isinstance(value, int | float) and not isinstance(value, bool)
