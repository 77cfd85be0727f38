"""What tells a run that learns from one that falls apart: signals, rules and thresholds, on numbers alone.

A rule looks at the last few steps, never at one: k3 is an exponential, and a single token that the reference likes far
more lifts the KL of a whole step. Nothing here knows a trainer, so that the rules can be replayed over the metrics of
any run.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, fields
from statistics import fmean, median
from typing import Any

from stage_grpo.guard_signals import HELDOUT, History, signals_of
from stage_grpo.run_record import ABANDONED

K_BETA, MAX_ERROR = 0.1, 0.2
"""Gain and bound of the KL controller. Source: arXiv:1909.08593, section 2.2."""


@dataclass(frozen=True)
class GuardThresholds:
    """Where the rules draw the line. Provenance of every value: docs/guard.md.

    Of 266 runs of the shapes world those of KL and entropy tell of 24 of the 25 that collapsed, and of 2 others. The
    rest has never been tested by a run that needed it.

    Attributes:
        max_kl: KL as a multiple of the reference's entropy at the start of the run.
        max_kl_slope: Growth of the same a step.
        min_entropy_ratio: Policy entropy / reference entropy on the same tokens.
        max_entropy_ratio: The same, from above.
        max_grad_growth: Gradient norm as a multiple of that at the start of the run.
        min_unique_images: Different images of a group / G.
        max_heldout_drop: Standard errors by which the held-out score may be below the best one.
        max_zero_variance: Share of samples whose group ties.
        min_reward_spread: Standard deviation of the rewards.
        max_similarity: Mean similarity to images of opposite advantage.
    """

    max_kl: float = 1.0
    max_kl_slope: float = 0.1
    min_entropy_ratio: float = 0.67
    max_entropy_ratio: float = 1.3
    max_grad_growth: float = 100.0
    min_unique_images: float = 0.5
    max_heldout_drop: float = 3.0
    max_zero_variance: float = 0.95
    min_reward_spread: float = 1e-6
    max_similarity: float = 0.95

    @classmethod
    def of(cls, config: Any) -> GuardThresholds:
        """Take the values of the keys ``guard_<name>``."""
        return cls(**{option.name: getattr(config, f"guard_{option.name}") for option in fields(cls)})


@dataclass(frozen=True)
class Alarm:
    """A rule that was broken.

    Attributes:
        rule: Its name.
        value: What it measured.
        threshold: The line that was crossed.
        acts: Whether the run may be stopped or taken back for it; otherwise it is told alone.
        message: One line for people.
    """

    rule: str
    value: float
    threshold: float
    acts: bool
    message: str


@dataclass(frozen=True)
class Rule:
    """One thing that must not happen.

    Attributes:
        name: Its name.
        threshold: Field of :class:`GuardThresholds`; an upper bound if it begins with ``max_``, else a lower one.
        measure: Value of a history, None where it cannot be said.
        acts: As in :class:`Alarm`.
        message: What it means, without the numbers.
    """

    name: str
    threshold: str
    measure: Callable[[History], float | None]
    acts: bool
    message: str

    def check(self, history: History, thresholds: GuardThresholds) -> Alarm | None:
        """Compare the history with the threshold; exactly on it is within."""
        value, threshold = self.measure(history), getattr(thresholds, self.threshold)
        is_upper = self.threshold.startswith("max_")
        if value is None or (value <= threshold if is_upper else value >= threshold):
            return None
        side = "above" if is_upper else "below"
        return Alarm(
            self.name,
            value,
            threshold,
            self.acts,
            f"{self.name} {value:.4g} is {side} guard_{self.threshold}={threshold:g}: {self.message}",
        )


def kl_ratio(history: History) -> float | None:
    """Median KL of the last steps / reference entropy at the start: how far the policy went, in widths."""
    return _over(_median(history.values("kl")), history.at_start("entropy_reference"))


def kl_slope(history: History) -> float | None:
    """Growth of the KL a step, in reference entropies at the start: median slope over pairs of steps (Theil, Sen)."""
    steps = [(signals.step, signals.kl) for signals in history.recent if signals.kl is not None]
    if len(steps) < max(3, history.window):
        return None
    from scipy.stats import theilslopes

    slope: Any = theilslopes([kl for _, kl in steps], [step for step, _ in steps])[0]
    return _over(float(slope), history.at_start("entropy_reference"))


def entropy_ratio(history: History) -> float | None:
    """Median policy entropy of the last steps / that of the reference on the same tokens."""
    return _over(_median(history.values("entropy_policy")), _median(history.values("entropy_reference")))


def grad_growth(history: History) -> float | None:
    """Median gradient norm of the last steps / that of the first steps."""
    return _over(_median(history.values("grad_norm")), history.at_start("grad_norm"))


def lasting_drop(history: History) -> float | None:
    """The smaller drop of the last two held-out tests: scores dip at the start of a run, and most recover."""
    return min(history.heldout_drops) if len(history.heldout_drops) == 2 else None


def last_drop(history: History) -> float | None:
    """The drop of the newest held-out test."""
    return history.heldout_drops[-1] if history.heldout_drops else None


RULES = (
    Rule("kl", "max_kl", kl_ratio, True, "the policy is further from its reference than that one's choice is wide"),
    Rule("kl_slope", "max_kl_slope", kl_slope, True, "the policy runs away from its reference"),
    Rule("entropy_low", "min_entropy_ratio", entropy_ratio, True, "the policy makes ever fewer different choices"),
    Rule("entropy_high", "max_entropy_ratio", entropy_ratio, True, "the policy dissolves into noise"),
    Rule("grad_norm", "max_grad_growth", grad_growth, True, "the steps no longer fit the loss"),
    Rule("unique_images", "min_unique_images", lambda h: _median(h.values("unique_images")), True,
         "a prompt gives the same image again and again"),
    Rule("heldout", "max_heldout_drop", lasting_drop, True, "what is not trained on gets worse"),
    Rule("zero_variance", "max_zero_variance", lambda h: _mean(h.values("zero_variance")), False,
         "nearly all groups tie, so next to nothing is learned: other prompts or a finer reward"),
    Rule("reward_spread", "min_reward_spread", lambda h: _median(h.values("reward_spread")), False,
         "all images have the same reward, so nothing is learned"),
    Rule("similarity", "max_similarity", lambda h: _median(h.values("similarity")), False,
         "images of opposite advantage look the same, so their gradients cancel"),
)  # fmt: skip
"""The rules of a step. The last three say that little is learned, not that something is lost: they are told alone."""
HELDOUT_END = Rule("heldout_end", "max_heldout_drop", last_drop, True, "the run ends worse than it was")
"""The rule of the end, where no further test will tell a dip from a loss."""
HELDOUT_RULES = frozenset({"heldout", HELDOUT_END.name})
PASSIVE_RULES = frozenset(rule.name for rule in RULES if not rule.acts)


def check(history: History, thresholds: GuardThresholds) -> list[Alarm]:
    """Find the rules that are broken now.

    Args:
        history: The first and the last steps of a run.
        thresholds: Where the rules draw the line.
    """
    alarms = (rule.check(history, thresholds) for rule in RULES)
    return [alarm for alarm in alarms if alarm is not None]


def replay(rows: Iterable[Mapping[str, Any]], thresholds: GuardThresholds, window: int) -> list[tuple[int, Alarm]]:
    """Say what the rules would have told of a run, each once an episode.

    Args:
        rows: Rows of ``metrics.jsonl`` in order; a row without a loss adds to the next one that has one, one that a
            rollback took back counts nothing, and a held-out test that no step follows is the end's.
        thresholds: Where the rules draw the line.
        window: Steps that they look at.

    Returns:
        Steps and alarms.
    """
    history, told, found = History(window), set(), []
    heldout: dict[str, Any] = {}
    step = 0
    for row in rows:
        if ABANDONED in row:
            continue
        step = row["step"]
        heldout |= {name: row[name] for name in HELDOUT & row.keys()}
        if "loss" not in row:
            continue
        history.add(signals_of(row["step"], {**row, **heldout}))
        heldout, alarms = {}, check(history, thresholds)
        found += [(row["step"], alarm) for alarm in alarms if alarm.rule not in told]
        told = {alarm.rule for alarm in alarms}
    is_tested = history.add_test(signals_of(step, heldout))
    ended = HELDOUT_END.check(history, thresholds) if is_tested else None
    return found if ended is None else [*found, (step, ended)]


def adapted_beta(beta: float, kl: float, target: float) -> float:
    """The KL coefficient of the next step: a proportional controller in log space.

    Args:
        beta: That of the step that was taken.
        kl: KL that it showed, nats a token.
        target: KL wanted, above 0.

    Source: arXiv:1909.08593, section 2.2.
    """
    error = min(max(kl / target - 1, -MAX_ERROR), MAX_ERROR)
    return beta * (1 + K_BETA * error)


def _median(values: list[float]) -> float | None:
    return median(values) if values else None


def _mean(values: list[float]) -> float | None:
    return fmean(values) if values else None


def _over(value: float | None, unit: float | None) -> float | None:
    return None if value is None or not unit else value / unit
