"""Samples that a reward could not score: why, and when a run must stop because of them.

A reward that cannot score a sample returns NaN for it and says why in the detail ``reason``. Such a sample teaches
nothing. A reward that scores nothing at all, step after step, would let a run go on that trains on nothing.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Float

logger = logging.getLogger(__name__)

REASON = "reason"
"""Detail that says, for a sample without a score, why it has none; None for the others."""
NOT_APPLICABLE = "not applicable"
"""How the reason begins where nothing failed: the reward has nothing to say about that kind of prompt."""
MAX_FAILED_STEPS = 3
"""Steps in a row in which a reward may fail on every sample before the run stops."""


class RewardFailedError(ValueError):
    """A reward scored nothing for several steps, so that going on would train on nothing."""


def failures(scores: Float[np.ndarray, " B"], details: dict[str, list[Any]]) -> list[str]:
    """Reasons of the samples that a reward failed on, one a sample, without those it does not apply to."""
    reasons = details.get(REASON) or [None] * len(scores)
    given = [str(reason or "no reason given") for score, reason in zip(scores, reasons) if np.isnan(score)]
    return [reason for reason in given if not reason.startswith(NOT_APPLICABLE)]


def most_common(reasons: Sequence[str]) -> str:
    """The most frequent reason, and how many others there are."""
    counted = Counter(reasons).most_common()
    more = f" (and {len(counted) - 1} other reasons)" if len(counted) > 1 else ""
    return counted[0][0] + more


class FailureWatch:
    """Counts the steps in a row in which a reward failed on every sample.

    Args:
        name: Name of the reward.
        patience: The number of such steps that ends the run.
    """

    def __init__(self, name: str, patience: int = MAX_FAILED_STEPS):
        self.name = name
        self.patience = patience
        self.failed_steps = 0

    def see(self, scores: Float[np.ndarray, " B"], details: dict[str, list[Any]]) -> None:
        """Takes note of one step.

        Raises:
            RewardFailedError: the reward failed on every sample of ``patience`` steps in a row.
        """
        reasons = failures(scores, details)
        if not np.isnan(scores).all():
            self.failed_steps = 0
        elif reasons:  # a step of prompts that it does not apply to neither counts nor excuses
            self.failed_steps += 1
        if self.failed_steps >= self.patience:
            raise RewardFailedError(
                f"reward {self.name!r} could not score a single image in {self.failed_steps} steps in a row, so "
                f"training on would teach nothing: {most_common(reasons)}; repair it, then continue with --resume auto"
            )
        if reasons and self.failed_steps:
            logger.warning(
                "reward %r failed on every image, step %d of %d in a row after which the run stops: %s",
                self.name,
                self.failed_steps,
                self.patience,
                most_common(reasons),
            )
