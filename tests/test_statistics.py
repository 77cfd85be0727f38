"""Bootstrap intervals: hand-worked cases, scipy as an independent check, coverage, laws."""

from __future__ import annotations

import dataclasses

import jaxtyping
import numpy as np
import pytest
from scipy import stats

from stage_grpo.evaluation import statistics


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def test_means_by_hand() -> None:
    # Strata a: (1, 0, 0, 0) -> 0.25; b: (1, 1) -> 1; the overall score is (0.25 + 1) / 2, not 3 / 6.
    values = np.array([1.0, 0, 0, 0, 1, 1])
    assert statistics.stratified_mean(values, list("aaaabb")) == pytest.approx(0.625, abs=1e-12)
    assert statistics.stratified_mean(values) == pytest.approx(0.5, abs=1e-12)
    # An image without a score is left out, not counted as 0.
    assert statistics.stratified_mean(np.array([1.0, np.nan, 0.5])) == pytest.approx(0.75, abs=1e-12)


def test_two_values_have_a_known_bootstrap_distribution() -> None:
    # Resamples of (0, 1) have mean 0, 1/2, 1 with probabilities 1/4, 1/2, 1/4: the 60 % interval is
    # [quantile 0.2, quantile 0.8] = [0, 1], the 40 % one [quantile 0.3, quantile 0.7] = [1/2, 1/2].
    values = np.array([0.0, 1.0])
    wide = statistics.bootstrap_mean(values, confidence=0.6)
    assert (wide.value, wide.low, wide.high) == (0.5, 0.0, 1.0)
    narrow = statistics.bootstrap_mean(values, confidence=0.4)
    assert (narrow.low, narrow.high) == (0.5, 0.5)


def test_interval_agrees_with_scipy() -> None:
    values = rng(1).normal(2.0, 1.5, size=150)
    ours = statistics.bootstrap_mean(values, num_resamples=40_000)
    theirs = stats.bootstrap(
        (values,), np.mean, n_resamples=40_000, method="percentile", random_state=rng(2), batch=2000
    ).confidence_interval
    # Both are Monte Carlo: a 2.5 % quantile of 40,000 draws of spread 0.12 is known to about 0.0016.
    assert abs(ours.low - theirs.low) < 0.008
    assert abs(ours.high - theirs.high) < 0.008


def test_cluster_resampling_agrees_with_scipy_on_cluster_means() -> None:
    # With equally large clusters, resampling clusters is resampling their means.
    values = rng(3).normal(size=(30, 1)) + 0.1 * rng(4).normal(size=(30, 4))
    clusters = np.repeat(np.arange(30), 4).tolist()
    ours = statistics.bootstrap_mean(values.ravel(), clusters=clusters, num_resamples=40_000)
    theirs = stats.bootstrap(
        (values.mean(axis=1),), np.mean, n_resamples=40_000, method="percentile", random_state=rng(5), batch=2000
    ).confidence_interval
    assert abs(ours.low - theirs.low) < 0.01
    assert abs(ours.high - theirs.high) < 0.01
    # Taking the four near-copies for independent would halve the width.
    naive = statistics.bootstrap_mean(values.ravel())
    assert (ours.high - ours.low) > 1.7 * (naive.high - naive.low)


def test_the_interval_covers_the_truth_about_as_often_as_it_says() -> None:
    covered = 0
    for trial in range(400):
        values = (rng(trial).random(60) < 0.4).astype(float)
        estimate = statistics.bootstrap_mean(values, num_resamples=400, seed=trial)
        covered += estimate.low <= 0.4 <= estimate.high
    # 95 % nominal; 400 trials have a standard error of 1.1 %, percentile intervals of 60 coins about 94 %.
    assert 0.91 <= covered / 400 <= 0.98


def test_strata_are_resampled_by_themselves() -> None:
    # Within each stratum all values agree, so nothing can vary although the strata differ.
    values = np.array([0.0, 0, 0, 1, 1, 1])
    estimate = statistics.bootstrap_mean(values, list("aaabbb"))
    assert (estimate.value, estimate.low, estimate.high) == (0.5, 0.5, 0.5)


def test_one_cluster_is_resampled_by_its_images() -> None:
    values = rng(1).random(40)
    one = statistics.bootstrap_mean(values, clusters=["same prompt"] * 40)
    assert one == statistics.bootstrap_mean(values)
    assert one.low < one.value < one.high


def test_paired_difference_by_hand_and_its_sign() -> None:
    before = np.array([0.0, 0, 1, 0, 0, 1, 0, 0])
    after = np.array([1.0, 1, 1, 1, 1, 1, 1, 0])
    up = statistics.paired_difference(before, after)
    assert up.value == pytest.approx(0.625, abs=1e-12)  # five of eight gained
    assert up.low > 0 and up.p_value < 0.01
    down = statistics.paired_difference(after, before)
    assert (down.value, down.low, down.high) == (-up.value, -up.high, -up.low)
    assert down.p_value == up.p_value
    # Five ones of eight, drawn eight times with replacement.
    assert up.standard_error == down.standard_error == pytest.approx(np.sqrt(5 / 8 * 3 / 8 / 8), rel=0.03)


def test_no_difference_is_not_significant() -> None:
    values = rng(1).random(50)
    same = statistics.paired_difference(values, values)
    assert (same.value, same.low, same.high, same.p_value) == (0.0, 0.0, 0.0, 1.0)


def test_pairing_narrows_the_interval() -> None:
    before = rng(1).normal(size=200)
    after = before + 0.1 + 0.05 * rng(2).normal(size=200)
    paired = statistics.paired_difference(before, after)
    separate = statistics.bootstrap_mean(after)
    assert (paired.high - paired.low) < 0.2 * (separate.high - separate.low)


def test_p_values_are_uniform_without_an_effect() -> None:
    p_values = [
        statistics.paired_difference(
            rng(2 * t).normal(size=80), rng(2 * t + 1).normal(size=80), num_resamples=400
        ).p_value
        for t in range(300)
    ]
    # A share of 5 % below 0.05 and half below 0.5, give or take three standard errors (1.3 % and 2.9 %).
    assert 0.01 <= np.mean(np.array(p_values) < 0.05) <= 0.095
    assert 0.41 <= np.mean(np.array(p_values) < 0.5) <= 0.59


def test_unscored_images_widen_nothing_but_their_own_absence() -> None:
    values = rng(1).random(30)
    with_gaps = np.concatenate([values, np.full(10, np.nan)])
    assert statistics.bootstrap_mean(with_gaps).value == pytest.approx(values.mean(), abs=1e-12)
    nothing = statistics.bootstrap_mean(np.full(3, np.nan))
    assert np.isnan([nothing.value, nothing.low, nothing.high]).all()


def test_the_seed_decides_and_nothing_else_does() -> None:
    values = rng(1).random(30)
    assert statistics.bootstrap_mean(values, seed=3) == statistics.bootstrap_mean(values, seed=3)
    assert statistics.bootstrap_mean(values, seed=3) != statistics.bootstrap_mean(values, seed=4)


def test_wrong_inputs() -> None:
    values = np.ones(3)
    with pytest.raises(ValueError, match="there are 0 values"):
        statistics.bootstrap_mean(np.ones(0))
    with pytest.raises(ValueError, match="2 strata for 3 values"):
        statistics.bootstrap_mean(values, ["a", "b"])
    with pytest.raises(ValueError, match="4 clusters for 3 values"):
        statistics.bootstrap_mean(values, clusters=[1, 2, 3, 4])
    with pytest.raises(ValueError, match="confidence is 95"):
        statistics.bootstrap_mean(values, confidence=95.0)
    jaxtyping.config.update("jaxtyping_disable", True)  # or the tests' shape check speaks before ours does
    try:
        with pytest.raises(ValueError, match="3 values before and 2 after"):
            statistics.paired_difference(values, np.ones(2))
    finally:
        jaxtyping.config.update("jaxtyping_disable", False)


def test_a_difference_without_a_scored_pair_has_no_p_value():
    nothing = statistics.paired_difference(np.array([np.nan, np.nan]), np.array([1.0, 0.0]))
    assert np.isnan(dataclasses.astuple(nothing)[:-1]).all() and nothing.num_units == 0


def test_the_units_of_a_difference_are_those_of_its_smallest_stratum():
    def units(change, strata=None, clusters=None):
        return statistics.paired_difference(np.zeros(len(change)), np.array(change), strata, clusters).num_units

    assert units([1.0, 2.0, 3.0, 4.0]) == 4 and units([1.0, 2.0, np.nan, 4.0]) == 3
    assert units([1.0, 2.0, 3.0, 4.0], clusters=[0, 0, 1, 1]) == 2
    assert units([1.0, 2.0, 3.0, 4.0], clusters=[0, 0, 0, 0]) == 4  # the images of one prompt
    assert units([1.0, 2.0, 3.0, 4.0], strata=["a", "a", "a", "b"]) == 1
    assert units([1.0, 2.0, 3.0, 4.0], strata=["a", "a", "b", "b"], clusters=[0, 1, 2, 2]) == 2
    sides = (np.arange(3.0), np.arange(5.0))
    assert statistics.unpaired_difference(*sides).num_units == 3


def test_resamples_without_a_scored_pair_do_not_count_as_evidence():
    """One scored pair of three: a third of all resamples hold it never, and say neither yes nor no."""
    before, after = np.array([0.0, np.nan, np.nan]), np.array([1.0, 1.0, 1.0])
    lone = statistics.paired_difference(before, after, num_resamples=1000)
    drawn = 1000 * (1 - (2 / 3) ** 3)
    assert lone.value == 1.0 and lone.p_value == pytest.approx(2 / (drawn + 1), rel=0.1)
