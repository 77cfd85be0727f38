"""Difference between two sets of images that do not pair: other prompts, or another number of images."""

from __future__ import annotations

from collections.abc import Hashable, Sequence

import numpy as np
from jaxtyping import Float

from stage_grpo import statistics
from stage_grpo.statistics import CONFIDENCE, NUM_RESAMPLES, Difference, stratified_mean

Labels = Sequence[Hashable] | None


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
    `stage_grpo.statistics.paired_difference`.

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
    means, replicates = [], []
    # The same stream on both sides would draw the same clusters on both: a pairing by place that means nothing.
    streams = np.random.SeedSequence(seed).generate_state(2)
    for values, groups, prompts, stream in zip((before, after), strata, clusters, streams):
        statistics._check(values, confidence, strata=groups, clusters=prompts)
        means.append(stratified_mean(values, groups))
        replicates.append(statistics._replicates(values, groups, prompts, num_resamples, int(stream)))
    value = means[1] - means[0]
    if np.isnan(value):
        return Difference(value, value, value, value)
    changes = replicates[1] - replicates[0]
    low, high = statistics._interval(changes, confidence)
    known = changes[~np.isnan(changes)]
    tail = min(int((known <= 0).sum()), int((known >= 0).sum()))
    return Difference(value, low, high, min(1.0, 2.0 * (tail + 1) / (len(known) + 1)))
