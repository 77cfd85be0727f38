"""What users name in a configuration: functions and classes as ``module.path:name``, and their options."""

from __future__ import annotations

import importlib
from collections.abc import Iterable
from typing import Any


def load_target(target: str, what: str) -> Any:
    """Import ``module.path:name``.

    Args:
        target: What to import.
        what: What error messages call it.

    Raises:
        ValueError: It cannot be imported.
    """
    module_name, _, attribute = target.partition(":")
    try:
        return getattr(importlib.import_module(module_name), attribute)
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(
            f"{what} cannot be imported ({error}); write module.path:name, and put the module's folder on PYTHONPATH"
        ) from error


def check_option_names(what: str, options: Iterable[str], known: Iterable[str]) -> None:
    """Refuse options that nothing reads.

    Raises:
        ValueError: An unknown name; the message lists the known ones.
    """
    known = sorted(known)
    if unknown := sorted(set(options) - set(known)):
        raise ValueError(
            f"{what} has no option {', '.join(map(repr, unknown))}; "
            + (f"known are {', '.join(known)}" if known else "it takes none")
        )
