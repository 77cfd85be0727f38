"""What a run can be told about its guard: the keys ``guard_*`` and ``kl_target`` of the configuration."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, fields
from typing import Any

from stage_grpo.guard_rules import GuardThresholds
from stage_grpo.option_checks import check_count, is_number

MODES = ("off", "warn", "stop", "rollback")
REMEDIES = ("learning_rate", "beta")


def _option(default: Any, help: str) -> Any:
    return field(default=default, metadata={"help": help})


@dataclass
class GuardOptions:
    """The guard's part of :class:`~stage_grpo.config.StageConfig`. Definitions and provenance: docs/guard.md."""

    # The guard
    guard: str = _option("warn", "When a run falls apart: off, warn, stop, or rollback (to a checkpoint before it).")
    guard_window: int = _option(10, "Steps that the rules look at.")
    guard_max_kl: float = _option(GuardThresholds.max_kl, "Limit of the KL / reference entropy at the start.")
    guard_max_kl_slope: float = _option(GuardThresholds.max_kl_slope, "Limit of its growth a step.")
    guard_min_entropy_ratio: float = _option(GuardThresholds.min_entropy_ratio, "Least policy / reference entropy.")
    guard_max_entropy_ratio: float = _option(GuardThresholds.max_entropy_ratio, "Largest policy / reference entropy.")
    guard_max_grad_growth: float = _option(GuardThresholds.max_grad_growth, "Limit of gradient norm / at the start.")
    guard_min_unique_images: float = _option(GuardThresholds.min_unique_images, "Least share of unique images.")
    guard_max_heldout_drop: float = _option(GuardThresholds.max_heldout_drop, "Standard errors to lose on held-out.")
    guard_max_zero_variance: float = _option(GuardThresholds.max_zero_variance, "Largest share of tied groups.")
    guard_min_reward_spread: float = _option(GuardThresholds.min_reward_spread, "Least spread of rewards.")
    guard_max_similarity: float = _option(GuardThresholds.max_similarity, "Largest mean similarity.")
    guard_max_skipped: int = _option(5, "Steps in a row without finite loss and gradient that end the run.")
    guard_remedy: str = _option("learning_rate", "What a rollback changes: learning_rate or beta.")
    guard_lr_factor: float = _option(0.5, "Factor of the learning rate at a rollback.")
    guard_beta_factor: float = _option(2.0, "Factor of beta at a rollback.")
    guard_max_rollbacks: int = _option(3, "Rollbacks of a run; then it stops.")
    kl_target: float | None = _option(None, "KL to keep by adapting beta, nats a token; None: beta is constant.")


def check_values(config: Any) -> None:
    """Check the guard's fields of a :class:`~stage_grpo.config.StageConfig`.

    Raises:
        ValueError: If a value, or a combination of values, cannot work; the message names field, value and remedy.
    """
    if config.guard is False:  # YAML reads a bare `off` as false
        config.guard = "off"
    for name, names in {"guard": MODES, "guard_remedy": REMEDIES}.items():
        if getattr(config, name) not in names:
            raise ValueError(f"{name}={getattr(config, name)!r} is unknown; use one of {', '.join(names)}")
    for name, least in {"guard_window": 2, "guard_max_skipped": 1, "guard_max_rollbacks": 0}.items():
        check_count(name, getattr(config, name), least)
    for option in fields(GuardThresholds):
        name = f"guard_{option.name}"
        value = getattr(config, name)
        if not is_number(value) or math.isnan(value):
            raise ValueError(f"{name}={value!r} must be a number; use inf or -inf to do without the rule")
    if not is_number(config.guard_lr_factor) or not 0 < config.guard_lr_factor < 1:
        raise ValueError(f"guard_lr_factor={config.guard_lr_factor!r} must lie between 0 and 1, e.g. 0.5")
    if not is_number(config.guard_beta_factor) or not 1 < config.guard_beta_factor < math.inf:
        raise ValueError(f"guard_beta_factor={config.guard_beta_factor!r} must be above 1, e.g. 2")
    if config.kl_target is not None:
        if not is_number(config.kl_target) or not 0 < config.kl_target < math.inf:
            raise ValueError(f"kl_target={config.kl_target!r} must be above 0 nats a token, or left out")
        if config.beta == 0:
            raise ValueError(f"kl_target={config.kl_target} adapts beta, but beta=0 has no KL; set beta above 0")
    if config.guard == "rollback":
        _check_rollback(config)


def _check_rollback(config: Any) -> None:
    if config.save_strategy != "steps":
        raise ValueError(
            f"guard=rollback goes back to a checkpoint, but save_strategy={config.save_strategy.value!r} writes none "
            "at fixed steps; set save_strategy=steps and save_steps"
        )
    if config.save_only_model:
        raise ValueError("guard=rollback goes on with the optimizer, which save_only_model=True leaves out; drop it")
    if config.guard_remedy == "beta" and config.beta == 0:
        raise ValueError("guard_remedy='beta' has nothing to raise with beta=0; set guard_remedy=learning_rate")
    limit, steps = config.save_total_limit, config.save_steps
    # With save_steps below 1, a share of all steps, the number of steps is not known here.
    if limit is not None and steps >= 1 and (limit - 1) * steps < config.guard_window:
        raise ValueError(
            f"save_total_limit={limit} with save_steps={steps:g} keeps no checkpoint from before guard_window="
            f"{config.guard_window} steps, and guard=rollback goes back to one; keep more, or save less often"
        )
