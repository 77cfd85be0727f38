"""Values of a YAML file against a configuration's annotations: argparse converts text, and takes the rest as is."""

from __future__ import annotations

from collections.abc import Mapping
from enum import Enum
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from stage_grpo.option_checks import is_number

_NAMES = {int: "a whole number", float: "a number", str: "text", bool: "true or false", NoneType: "null"}
_ALSO_BOOL = ("scale_rewards", "guard")
"""Fields annotated as text in which true or false has a meaning, as a bare ``off`` of YAML has."""


def check_types(where: str, values: Mapping[str, Any], config_class: type) -> None:
    """Refuse values that a field cannot have. Text is left to the parser of the command line.

    Args:
        where: What holds the values, for the message.
        values: Values by the name of their field; names of no field are left alone.
        config_class: The dataclass whose fields they are for.

    Raises:
        ValueError: If a value has another type than its field; the message names field, value and type.
    """
    hints = get_type_hints(config_class)
    for name, value in values.items():
        if name not in hints or isinstance(value, str) or (name in _ALSO_BOOL and isinstance(value, bool)):
            continue
        if not _fits(value, hints[name]):
            remedy = "put quotes around on, off, yes and no" if isinstance(value, bool) else "correct the value"
            raise ValueError(f"{where}: {name}={value!r} must be {_named(hints[name])}; {remedy}")


def _fits(value: Any, hint: Any) -> bool:
    origin, inner = get_origin(hint), get_args(hint)
    if origin in (Union, UnionType):
        return any(_fits(value, one) for one in inner)
    if origin is Literal:
        return value in inner
    if hint is list or origin is list:
        return isinstance(value, list) and all(_fits(item, inner[0]) for item in value if inner)
    if hint is dict or origin is dict:
        return isinstance(value, dict)
    if hint is float:
        return is_number(value)
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool)
    if isinstance(hint, type) and issubclass(hint, Enum):
        return isinstance(value, str)
    return isinstance(value, hint) if hint in _NAMES else True


def _named(hint: Any) -> str:
    """What a value must be, in words."""
    origin, inner = get_origin(hint), get_args(hint)
    if origin in (Union, UnionType):
        return " or ".join(dict.fromkeys(map(_named, inner)))
    if hint is dict or origin is dict:
        return "a mapping"
    if hint is list or origin is list:
        kind = {int: " of whole numbers", float: " of numbers", str: " of names"}
        return f"a list{kind.get(inner[0], '') if inner else ''}"
    return _NAMES.get(hint, "text")
