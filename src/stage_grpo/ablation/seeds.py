"""Statistics over training seeds: means and paired differences with Student's t.

Seeds are few, so these intervals are wide, and rightly: the bootstrap over prompts of a single run says how sure its
score is, not how sure it is that another training would score the same.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

CONFIDENCE = 0.95
ROUNDING = 1e-12
"""Values that spread no more than this are equal: differences of equal numbers are only so up to rounding."""


@dataclass(frozen=True)
class SeedMean:
    """A mean over seeds.

    Attributes:
        value: The mean; None without a value.
        low: Lower end of the 95 % t interval; None with fewer than two seeds, and if all values are equal: then there
            is no spread to judge by.
        high: Its upper end; None likewise.
        p_value: Two-sided t test of a mean of 0; None likewise.
        num_seeds: Seeds that had a value.
    """

    value: float | None
    low: float | None
    high: float | None
    p_value: float | None
    num_seeds: int


def mean_over_seeds(values: Sequence[float | None]) -> SeedMean:
    """Mean of one value a seed.

    Args:
        values: One a seed; None and NaN are left out.

    Returns:
        The mean with its t interval.
    """
    from scipy import stats

    kept = np.array([value for value in values if value is not None and math.isfinite(value)], dtype=float)
    if not kept.size:
        return SeedMean(None, None, None, None, 0)
    mean = float(kept.mean())
    if np.ptp(kept) <= ROUNDING:
        return SeedMean(mean, None, None, None, int(kept.size))
    error = float(kept.std(ddof=1)) / math.sqrt(kept.size)
    half = float(stats.t.ppf((1 + CONFIDENCE) / 2, kept.size - 1)) * error
    p_value = 2 * float(stats.t.sf(abs(mean) / error, kept.size - 1))
    return SeedMean(mean, mean - half, mean + half, p_value, int(kept.size))


def paired_over_seeds(values: Mapping[int, float | None], references: Mapping[int, float | None]) -> SeedMean:
    """Mean of ``value - reference`` over the seeds that both have: runs of one seed see the same prompts in order.

    Args:
        values: Seed to value.
        references: Seed to the value compared with.
    """
    return mean_over_seeds(
        [_minus(values[seed], references[seed]) for seed in sorted(values.keys() & references.keys())]
    )


def _minus(value: float | None, reference: float | None) -> float | None:
    return None if value is None or reference is None else value - reference
