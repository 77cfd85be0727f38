"""What users name in a configuration: functions and classes as ``module.path:name``, and their options."""

from __future__ import annotations

import importlib
import inspect
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any


def load_target(target: str, what: str) -> Any:
    """Import ``module.path:name``, from where Python looks for modules or else from the current folder.

    Args:
        target: What to import.
        what: What error messages call it.

    Raises:
        ValueError: It cannot be imported.
    """
    module_name, _, attribute = target.partition(":")
    try:
        return getattr(_import(module_name), attribute)
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(
            f"{what} cannot be imported ({error}); write module.path:name, and run in the module's folder or put that "
            "on PYTHONPATH"
        ) from error


def _import(name: str) -> ModuleType:
    """A module; the current folder goes on the path if that helps, and last, where it hides nothing installed."""
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError:
        here = str(Path.cwd())
        if here in sys.path or "" in sys.path:
            raise
        sys.path.append(here)
        importlib.invalidate_caches()
        try:
            return importlib.import_module(name)
        except ImportError:
            sys.path.remove(here)
            raise


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


def check_call(function: Callable[..., Any], arguments: Sequence[Any], options: dict[str, Any]) -> None:
    """Refuse a function that does not take these arguments; nothing is called.

    Raises:
        TypeError: What does not fit.
    """
    try:
        signature = inspect.signature(function)
    except ValueError:  # written in C, without a word on its parameters
        return
    signature.bind(*arguments, **options)
