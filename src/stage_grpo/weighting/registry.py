"""The table of token weightings by name. A weighting's module is imported when it is first built, not before."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import MISSING, fields
from typing import Any

from stage_grpo.plug_ins import check_option_names, load_target
from stage_grpo.weighting.base import FunctionWeighting, TokenWeighting

WEIGHTINGS: dict[str, str] = {
    "stage": "stage_grpo.weighting.stage:StageWeighting",
    "critical": "stage_grpo.weighting.critical:CriticalTokens",
    "none": "stage_grpo.weighting.base:NoWeighting",
}
"""Name -> where the class is, ``module:Class``."""


def build_weighting(name: str, options: dict[str, Any] | None = None) -> TokenWeighting:
    """Builds a token weighting by its name.

    Args:
        name: A name of ``WEIGHTINGS``, or ``module.path:attribute`` of your own function
            ``weights(codes, advantages, entropies, step)`` or :class:`TokenWeighting` class.
        options: Fields of the class's ``Options``; for a function, its further keyword parameters.

    Raises:
        ValueError: An unknown name, a target that cannot be imported, a function that takes fewer than four things, or
            an unknown or invalid option.
    """
    options = dict(options or {})
    if name not in WEIGHTINGS and ":" not in name:
        raise ValueError(
            f"token_weighting={name!r} is unknown; known are {', '.join(sorted(WEIGHTINGS))}, "
            "or give module.path:function of your own"
        )
    place = WEIGHTINGS.get(name, name)
    target = load_target(place, f"token_weighting={place!r}")
    if isinstance(target, type) and issubclass(target, TokenWeighting):
        known = [option.name for option in fields(target.Options)]
        required = [o.name for o in fields(target.Options) if o.default is MISSING and o.default_factory is MISSING]
        _check_names(name, options, known, required)
        try:
            return target(target.Options(**options))
        except (TypeError, ValueError) as error:
            raise ValueError(f"token weighting {name!r} rejects its options {options}: {error}") from error
    if callable(target) and not isinstance(target, type):
        _check_names(name, options, *_keywords(name, target))
        return FunctionWeighting(target, options)
    raise ValueError(
        f"token_weighting={name!r} is {target!r}; name a function weights(codes, advantages, entropies, step) or a "
        "TokenWeighting class"
    )


def _check_names(name: str, options: dict[str, Any], known: list[str], required: list[str]) -> None:
    check_option_names(f"token weighting {name!r}", options, known)
    if absent := [option for option in required if option not in options]:
        raise ValueError(f"token weighting {name!r} lacks {', '.join(absent)}; give it in token_weighting_options")


def _keywords(name: str, function: Callable[..., Any]) -> tuple[list[str], list[str]]:
    """Names a function takes beyond codes, advantages, entropies and step; and those of them without a default."""
    named = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    signature = inspect.signature(function)
    try:
        taken = signature.bind_partial(*range(4)).arguments
    except TypeError as error:
        raise ValueError(
            f"token weighting {name!r} takes {signature}; write it as weights(codes, advantages, entropies, step)"
        ) from error
    further = [p for p in signature.parameters.values() if p.name not in taken and p.kind in named]
    return [p.name for p in further], [p.name for p in further if p.default is inspect.Parameter.empty]
