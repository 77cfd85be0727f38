"""Bootstrap intervals for benchmark scores: how far a number would move with other prompts and samples.

A benchmark's overall score is the mean of its category means, and images of one prompt are not independent. So
categories are *strata* (each is resampled by itself) and prompts are *clusters* (resampled whole, with all of
their images). Everything is seeded and vectorised over resamples.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float

Labels = Sequence[Hashable] | None
"""Something an image: its category, its prompt."""
NUM_RESAMPLES = 4000
CONFIDENCE = 0.95


@dataclass(frozen=True)
class Estimate:
    """A mean with its percentile bootstrap interval, in the unit of the values."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Difference(Estimate):
    """A paired difference (after minus before) with its interval.

    Attributes:
        p_value: Two-sided bootstrap p-value of "no difference": twice the share of resamples on the far side of
            0, at least 2 / (resamples + 1).
        standard_error: Standard deviation of the resamples: too small by a factor of sqrt(1 - 1 / n) where strata
            have few units, and 0 where each has one.
        num_units: n, the fewest scored units of a stratum that are resampled: clusters, or the images of its only one.
    """

    p_value: float
    standard_error: float
    num_units: int


def stratified_mean(values: Float[np.ndarray, " N"], strata: Sequence[Hashable] | None = None) -> float:
    """Mean of the strata's means.

    Args:
        values: One value an image; NaN (not scored) is left out.
        strata: The category of each image; None puts all into one.

    Returns:
        The mean over strata of the mean within; NaN if some stratum has no scored image.

    Raises:
        ValueError: Nothing to average, or lengths differ.
    """
    _check(values, strata=strata)
    return float(np.mean([_nanmean(values[members]) for members in _members(strata, len(values))]))


def bootstrap_mean(
    values: Float[np.ndarray, " N"],
    strata: Sequence[Hashable] | None = None,
    clusters: Sequence[Hashable] | None = None,
    *,
    confidence: float = CONFIDENCE,
    num_resamples: int = NUM_RESAMPLES,
    seed: int = 0,
) -> Estimate:
    """Mean of the strata's means with its percentile bootstrap interval.

    Args:
        values: One value an image; NaN (not scored) is left out.
        strata: The category of each image; None puts all into one.
        clusters: The prompt of each image; None makes each image its own. A stratum with a single cluster has
            its images resampled instead: its interval speaks of that one prompt only.
        confidence: Coverage of the interval, in (0, 1).
        num_resamples: Bootstrap resamples.
        seed: Seed of the resampling.

    Returns:
        The estimate, in the values' unit.

    Raises:
        ValueError: Nothing to average, lengths differ, or ``confidence`` is out of range.

    Source: Efron and Tibshirani (1993), section 13.3; clusters as Davison and Hinkley (1997), section 3.8.
    """
    _check(values, confidence, strata=strata, clusters=clusters)
    replicates = _replicates(values, strata, clusters, num_resamples, seed)
    low, high = _interval(replicates, confidence)
    return Estimate(stratified_mean(values, strata), low, high)


def paired_difference(
    before: Float[np.ndarray, " N"],
    after: Float[np.ndarray, " N"],
    strata: Sequence[Hashable] | None = None,
    clusters: Sequence[Hashable] | None = None,
    *,
    confidence: float = CONFIDENCE,
    num_resamples: int = NUM_RESAMPLES,
    seed: int = 0,
) -> Difference:
    """Mean of ``after - before`` over paired images, with interval and p-value.

    Pairing (same prompt, same seed) removes what both sides share, so this interval is narrower than the two
    separate ones suggest.

    Args:
        before: One value an image; a pair with a NaN on either side is left out.
        after: The value of the same prompt and seed afterwards.
        strata: The category of each image; None puts all into one.
        clusters: The prompt of each image; None makes each image its own.
        confidence: Coverage of the interval, in (0, 1).
        num_resamples: Bootstrap resamples.
        seed: Seed of the resampling.

    Returns:
        The difference, in the values' unit.

    Raises:
        ValueError: The two sides differ in length, or any error of `bootstrap_mean`.

    Source: Efron and Tibshirani (1993), sections 13.3 and 15.4.
    """
    if len(before) != len(after):
        raise ValueError(f"{len(before)} values before and {len(after)} after; pairs need as many of both.")
    change = after - before
    _check(change, confidence, strata=strata, clusters=clusters)
    replicates = _replicates(change, strata, clusters, num_resamples, seed)
    return _difference(
        stratified_mean(change, strata), replicates, confidence, _fewest_units(clusters, strata, change)
    )


def unpaired_difference(
    before: Float[np.ndarray, " N"],
    after: Float[np.ndarray, " M"],
    strata: tuple[Labels, Labels] = (None, None),
    clusters: tuple[Labels, Labels] = (None, None),
    *,
    confidence: float = CONFIDENCE,
    num_resamples: int = NUM_RESAMPLES,
    seed: int = 0,
) -> Difference:
    """Difference of the two sides' stratified means, each side resampled by itself.

    What the sides share (prompts, random numbers) does not cancel here, so the interval is wider than that of
    `paired_difference`.

    Args:
        before: One value an image; NaN (not scored) is left out.
        after: The same of the other side, of any number.
        strata: The category of each image, before and after; None puts all into one.
        clusters: The prompt of each image, before and after; None makes each image its own.
        confidence: Coverage of the interval, in (0, 1).
        num_resamples: Bootstrap resamples.
        seed: Seed of the resampling; the sides get streams of their own.

    Returns:
        Mean of ``after`` minus mean of ``before``, in the values' unit. All is NaN, the p-value too, if a stratum of
        either side has no scored image.

    Raises:
        ValueError: A side is empty, its lengths differ, or ``confidence`` is out of range.

    Source: Efron and Tibshirani (1993), section 16.2, with the percentile interval of section 13.3.
    """
    means, replicates, units = [], [], []
    # The same stream on both sides would draw the same clusters on both: a pairing by place that means nothing.
    streams = np.random.SeedSequence(seed).generate_state(2)
    for values, groups, prompts, stream in zip((before, after), strata, clusters, streams):
        _check(values, confidence, strata=groups, clusters=prompts)
        means.append(stratified_mean(values, groups))
        replicates.append(_replicates(values, groups, prompts, num_resamples, int(stream)))
        units.append(_fewest_units(prompts, groups, values))
    return _difference(means[1] - means[0], replicates[1] - replicates[0], confidence, min(units))


def _difference(value: float, replicates: Float[np.ndarray, " R"], confidence: float, num_units: int) -> Difference:
    """A difference with what its resamples say; resamples without a scored image say nothing."""
    if np.isnan(value):
        return Difference(value, value, value, value, value, num_units)
    low, high = _interval(replicates, confidence)
    known = replicates[~np.isnan(replicates)]
    tail = min(int((known <= 0).sum()), int((known >= 0).sum()))
    p_value = min(1.0, 2.0 * (tail + 1) / (len(known) + 1))
    return Difference(value, low, high, p_value, float(known.std(ddof=1)), num_units)


def _replicates(
    values: Float[np.ndarray, " N"],
    strata: Sequence[Hashable] | None,
    clusters: Sequence[Hashable] | None,
    num_resamples: int,
    seed: int,
) -> Float[np.ndarray, " R"]:
    """The stratified mean of each resample."""
    rng = np.random.default_rng(seed)
    labels = np.arange(len(values)) if clusters is None else _codes(clusters)
    total = np.zeros(num_resamples)
    groups = _members(strata, len(values))
    for members in groups:  # a handful of categories; resamples and images are vectorised
        total += _cluster_means(values[members], labels[members], num_resamples, rng)
    return total / len(groups)


def _cluster_means(
    values: Float[np.ndarray, " N"], labels: np.ndarray, num_resamples: int, rng: np.random.Generator
) -> Float[np.ndarray, " R"]:
    """Means over resamples of whole clusters; of images where there is only one cluster."""
    _, codes = np.unique(labels, return_inverse=True)
    if codes.max() == 0:
        codes = np.arange(len(values))
    scored = ~np.isnan(values)
    sums = np.bincount(codes, weights=np.where(scored, values, 0.0))
    counts = np.bincount(codes, weights=scored.astype(float))
    num_clusters = len(sums)
    # How often each cluster is drawn: sampling with replacement, without an (R, images) index array.
    times = rng.multinomial(num_clusters, np.full(num_clusters, 1.0 / num_clusters), size=num_resamples)
    drawn = times @ counts
    # A resample may hold unscored clusters only: then there is no mean to speak of.
    return np.divide(times @ sums, drawn, out=np.full(num_resamples, np.nan), where=drawn > 0)


def _fewest_units(clusters: Labels, strata: Labels, values: Float[np.ndarray, " N"]) -> int:
    labels = np.arange(len(values)) if clusters is None else _codes(clusters)
    scored = [members[~np.isnan(values[members])] for members in _members(strata, len(values))]
    counts = [(len(np.unique(labels[members])), len(members)) for members in scored]
    return min(num_images if num_clusters == 1 else num_clusters for num_clusters, num_images in counts)


def _interval(replicates: Float[np.ndarray, " R"], confidence: float) -> tuple[float, float]:
    if np.isnan(replicates).all():
        return float("nan"), float("nan")
    tail = (1.0 - confidence) / 2.0
    low, high = np.nanquantile(replicates, [tail, 1.0 - tail])
    return float(low), float(high)


def _nanmean(values: Float[np.ndarray, " N"]) -> float:
    scored = values[~np.isnan(values)]
    return float(scored.mean()) if scored.size else float("nan")


def _members(strata: Sequence[Hashable] | None, num_values: int) -> list[np.ndarray]:
    """Indices of each stratum, in order of first appearance."""
    if strata is None:
        return [np.arange(num_values)]
    codes = _codes(strata)
    return [np.flatnonzero(codes == code) for code in range(codes.max() + 1)]


def _codes(labels: Sequence[Hashable]) -> np.ndarray:
    """Labels of any kind as 0, 1, 2, ... in order of first appearance."""
    seen: dict[Hashable, int] = {}
    return np.array([seen.setdefault(label, len(seen)) for label in labels])


def _check(values: np.ndarray, confidence: float = CONFIDENCE, **labels: Sequence[Hashable] | None) -> None:
    if len(values) == 0:
        raise ValueError("there are 0 values to average; score at least one image.")
    if not 0.0 < confidence < 1.0:
        raise ValueError(f"confidence is {confidence}; it must lie between 0 and 1, e.g. 0.95.")
    for name, column in labels.items():
        if column is not None and len(column) != len(values):
            raise ValueError(f"{len(column)} {name} for {len(values)} values; give one for each value.")
