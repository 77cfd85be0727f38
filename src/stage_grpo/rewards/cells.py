"""Cells of tables: metadata come out of those of a dataset, details of a score go into those of a log."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from stage_grpo.types import Metadata


def as_metadata(value: Any, name: str) -> Metadata:
    """One row's metadata, which Arrow tables carry as a JSON string.

    Raises:
        ValueError: no JSON object; the message names the reward.
    """
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except json.JSONDecodeError as error:
            raise ValueError(f"reward {name!r} got metadata {value!r}, which is no JSON ({error})") from None
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise ValueError(f"reward {name!r} got metadata {value!r}; give a JSON object or a dict")
    return value


def as_cell(value: Any) -> Any:
    """A table cell: trackers want scalars and strings, so a list of reasons becomes one line, and a mapping JSON."""
    if isinstance(value, Mapping):
        return json.dumps(value, ensure_ascii=False)
    return "; ".join(map(str, value)) if isinstance(value, list | tuple) else value
