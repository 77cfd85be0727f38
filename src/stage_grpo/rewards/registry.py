"""The table of rewards by name. A reward's module is imported when the reward is first built, not before."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any

from stage_grpo.rewards.base import FunctionReward, Reward


@dataclass(frozen=True)
class RewardEntry:
    """One line of the table: where the class is (``module:Class``), what it measures, and its range."""

    target: str
    description: str
    range: str


REWARDS: dict[str, RewardEntry] = {
    "shapes": RewardEntry(
        "stage_grpo.rewards.shapes:ShapesReward", "GenEval's rules on the embedded shapes world", "[0, 1]"
    ),
}


def build_reward(name: str, options: dict[str, Any] | None = None) -> Reward:
    """Builds a reward by its name.

    Args:
        name: a name of ``REWARDS``, or ``module.path:attribute`` of your own function
            ``f(images, prompts, metadata)`` or :class:`Reward` class.
        options: fields of the class's ``Options``; for a function, its further keyword parameters.

    Raises:
        ValueError: an unknown name, a target that cannot be imported, or an unknown or invalid option.
    """
    if name not in REWARDS and ":" not in name:
        raise ValueError(
            f"unknown reward {name!r}; known are {', '.join(sorted(REWARDS))}, "
            "or give module.path:function of your own"
        )
    target = _load(REWARDS[name].target if name in REWARDS else name)
    options = dict(options or {})
    if isinstance(target, type) and issubclass(target, Reward):
        _check_names(name, options, [option.name for option in fields(target.Options)])
        return target(_checked_options(name, target.Options, options))
    if callable(target) and not isinstance(target, type):
        _check_names(name, options, _keyword_parameters(target))
        return FunctionReward(target, options)
    raise ValueError(f"{name!r} is {target!r}; name a function f(images, prompts, metadata) or a Reward class")


def _load(target: str) -> Any:
    module_name, _, attribute = target.partition(":")
    try:
        return getattr(importlib.import_module(module_name), attribute)
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(
            f"reward {target!r} cannot be imported ({error}); write module.path:name, and put the module's "
            "folder on PYTHONPATH"
        ) from error


def _check_names(name: str, options: dict[str, Any], known: list[str]) -> None:
    unknown = sorted(set(options) - set(known))
    if unknown:
        raise ValueError(
            f"reward {name!r} has no option {', '.join(map(repr, unknown))}; "
            + (f"known are {', '.join(sorted(known))}" if known else "it takes none")
        )


def _checked_options(name: str, options_class: type[Any], options: dict[str, Any]) -> Any:
    try:
        return options_class(**options)
    except (TypeError, ValueError) as error:
        raise ValueError(f"reward {name!r} rejects its options {options}: {error}") from error


def _keyword_parameters(function: Callable[..., Any]) -> list[str]:
    """Names a function takes beyond images, prompts and metadata."""
    parameters = list(inspect.signature(function).parameters.values())
    named = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    return [parameter.name for parameter in parameters[3:] if parameter.kind in named]
