"""What the guard sees of a run: the signals of each step, and the steps that it remembers."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import fmean, median
from typing import Any, NamedTuple


class Signals(NamedTuple):
    """What one optimizer step showed; None where it was not measured or is not finite.

    Attributes:
        step: Optimizer steps taken.
        kl: Mean k3 to the reference, nats a token.
        entropy_policy: Of the policy while sampling, nats a token.
        entropy_reference: Of the reference on the same tokens, nats a token.
        zero_variance: Share of samples in groups whose rewards tie, [0, 1].
        reward_spread: Standard deviation of the total rewards over the batch.
        grad_norm: Gradient norm before clipping.
        unique_images: Different images of a group / G, (0, 1].
        similarity: Mean similarity to images of opposite advantage, [-1, 1].
        heldout_drop: Standard errors by which the held-out score of a test since the step before is below the best.
        heldout_best_step: Step of that best score.
    """

    step: int
    kl: float | None = None
    entropy_policy: float | None = None
    entropy_reference: float | None = None
    zero_variance: float | None = None
    reward_spread: float | None = None
    grad_norm: float | None = None
    unique_images: float | None = None
    similarity: float | None = None
    heldout_drop: float | None = None
    heldout_best_step: float | None = None


METRICS = {
    "kl": "kl",
    "entropy_policy": "entropy/policy",
    "entropy_reference": "entropy/reference",
    "zero_variance": "frac_reward_zero_std",
    "reward_spread": "reward_std",
    "grad_norm": "grad_norm",
    "unique_images": "unique_images",
    "similarity": "similarity/mean",
    "heldout_drop": "heldout/drop",
    "heldout_best_step": "heldout/best_step",
}
"""The logged metric behind each signal."""
HELDOUT = frozenset(metric for name, metric in METRICS.items() if name.startswith("heldout_"))
"""Those that come with a held-out test, between two steps."""


def signals_of(step: int, metrics: Mapping[str, Any]) -> Signals:
    """Pick the signals out of metrics, by name as logged.

    Args:
        step: Optimizer steps taken.
        metrics: Values by name; anything but a finite number counts as not measured.
    """
    values: dict[str, Any] = {name: metrics.get(metric) for name, metric in METRICS.items()}
    return Signals(step, **{name: float(value) for name, value in values.items() if _is_finite(value)})


@dataclass
class History:
    """The steps that rules look at: the first ones of a run, and the last ones.

    Attributes:
        window: Steps of each.
        start: Signals of the first steps, which rules compare with.
        recent: Signals of the last steps, oldest first.
        heldout_drops: Those of the last two held-out tests that have one, the older first.
        heldout_best_step: Step of the best score before the newest test.
    """

    window: int
    start: list[Signals] = field(default_factory=list)
    recent: list[Signals] = field(default_factory=list)
    heldout_drops: list[float] = field(default_factory=list)
    heldout_best_step: int | None = None

    def add(self, signals: Signals) -> None:
        """Take in one step."""
        # With a larger window than before a resume, later steps are no longer the start.
        if len(self.start) < self.window and (not self.start or self.start[-1].step == self.recent[-1].step):
            self.start.append(signals)
        self.recent = [*self.recent, signals][-self.window :]
        self.add_test(signals)

    def add_test(self, signals: Signals) -> bool:
        """Take in a held-out test alone, if there was one that compares with the best; say whether there was."""
        if signals.heldout_drop is None or signals.heldout_best_step is None:
            return False
        self.heldout_drops = [*self.heldout_drops, signals.heldout_drop][-2:]
        self.heldout_best_step = int(signals.heldout_best_step)
        return True

    def take_up_tests(self, tests: Iterable[Signals]) -> None:
        """Forget the held-out tests, and take in those of earlier parts of a run, in order."""
        self.heldout_drops, self.heldout_best_step = [], None
        for test in tests:
            self.add_test(test)

    def values(self, name: str) -> list[float]:
        """What a signal was in the last steps; empty before a whole window has gone by."""
        return _measured(self.recent, name) if len(self.recent) == self.window else []

    def at_start(self, name: str) -> float | None:
        """Median of a signal over the first steps, None if it is not above 0."""
        found = _measured(self.start, name)
        return median(found) if found and median(found) > 0 else None

    def state_dict(self) -> dict[str, Any]:
        """The steps as plain JSON data, exact. Held-out tests are not among them: ``heldout.jsonl`` keeps those."""
        return {name: [list(signals) for signals in getattr(self, name)] for name in ("start", "recent")}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from what :meth:`state_dict` gave; with another window, from the newest steps of it."""
        self.start = [Signals(*row) for row in state["start"]][: self.window]
        self.recent = [Signals(*row) for row in state["recent"]][-self.window :]


def _measured(signals: Sequence[Signals], name: str) -> list[float]:
    values = (getattr(one, name) for one in signals)
    return [value for value in values if value is not None]


def _is_finite(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


class FreshMetrics:
    """What metric lists gained since it was last asked for. TRL empties them, by new lists, when a row is logged.

    Args:
        metrics: Values by name, in the order in which they were measured.
    """

    def __init__(self, metrics: Mapping[str, list[float]]):
        self._metrics = metrics
        self._seen: dict[str, tuple[list[float], int]] = {}

    def mean(self, name: str) -> float | None:
        """Mean of the new values that are finite, None without any."""
        values = self._metrics.get(name)
        if values is None:
            return None
        known, count = self._seen.get(name, (values, 0))
        self._seen[name] = (values, len(values))
        new = [value for value in values[count if known is values else 0 :] if _is_finite(value)]
        return fmean(new) if new else None
