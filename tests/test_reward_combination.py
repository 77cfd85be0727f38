"""Several rewards as one number: what is left out, and scales that agree. Against hand-worked numbers and TRL."""

import json
import math

import pytest
import torch

from stage_grpo.rewards.combination import RewardSum, RunningScales, group_normalised_sum, leave_out_failed

NAN = math.nan


def test_a_sample_that_one_reward_failed_on_is_left_out_whole():
    rewards = torch.tensor(
        [
            [1.0, 20.0],
            [2.0, NAN],  # the second reward scored others of this group: it failed here
            [3.0, 22.0],
            [4.0, NAN],  # it scored none of this group: it does not apply
            [5.0, NAN],
            [6.0, NAN],
        ]
    )
    expected = torch.tensor([[1.0, 20.0], [NAN, NAN], [3.0, 22.0], [4.0, NAN], [5.0, NAN], [6.0, NAN]])
    torch.testing.assert_close(leave_out_failed(rewards, 3), expected, rtol=0, atol=0, equal_nan=True)


def test_nothing_changes_without_failures_or_with_one_reward():
    rewards = torch.tensor([[1.0], [NAN], [3.0], [NAN]])
    torch.testing.assert_close(leave_out_failed(rewards, 2), rewards, rtol=0, atol=0, equal_nan=True)
    whole = torch.arange(12.0).reshape(4, 3)
    torch.testing.assert_close(leave_out_failed(whole, 2), whole, rtol=0, atol=0)


def test_a_missing_component_would_have_counted_as_nothing():
    """What is prevented: of equal images, the one whose PickScore failed would be 20 below the others."""
    rewards = torch.tensor([[0.5, 20.0], [0.5, NAN], [0.5, 20.0], [0.5, 20.0]])
    naive = rewards.nansum(dim=1)
    assert (naive - naive.mean()).tolist() == [5.0, -15.0, 5.0, 5.0]
    left = leave_out_failed(rewards, 4).sum(dim=1)
    assert left.isnan().tolist() == [False, True, False, False] and (left - left.nanmean()).nansum() == 0


def test_normalised_sum_by_hand():
    # First column of the first group: mean 2, unbiased std sqrt(2); second column: mean 20, std 10 sqrt(2).
    rewards = torch.tensor([[1.0, 10.0], [3.0, 30.0], [5.0, 0.0], [5.0, 4.0]], dtype=torch.float64)
    root = math.sqrt(2)
    first = 1 / (root + 1e-4) + 2 * 10 / (10 * root + 1e-4)
    second = 2 * 2 / (2 * root + 1e-4)  # the first column ties: 0
    found = group_normalised_sum(rewards, torch.tensor([1.0, 2.0]), 2)
    expected = torch.tensor([-first, first, -second, second], dtype=torch.float64)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)


def test_normalised_sum_leaves_out_what_has_no_score():
    rewards = torch.tensor([[1.0, NAN], [3.0, NAN], [NAN, NAN]], dtype=torch.float64)
    found = group_normalised_sum(rewards, torch.tensor([1.0, 1.0]), 3)
    step = 1 / (math.sqrt(2) + 1e-4)
    expected = torch.tensor([-step, step, NAN], dtype=torch.float64)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6, equal_nan=True)


def test_normalised_sum_is_what_trl_computes():
    from trl.trainer.utils import nanstd

    torch.manual_seed(0)
    rewards = torch.randn(24, 3, dtype=torch.float64) * torch.tensor([0.02, 1.0, 30.0]) + 5
    rewards[3, 1] = rewards[10] = NAN
    weights = torch.tensor([1.0, 0.5, 2.0], dtype=torch.float64)
    grouped = rewards.view(-1, 8, 3)
    normalised = (grouped - torch.nanmean(grouped, dim=1, keepdim=True)) / (
        nanstd(grouped, dim=1, keepdim=True) + 1e-4
    )
    expected = (normalised.view(-1, 3) * weights).nansum(dim=1)
    expected[10] = NAN
    found = group_normalised_sum(rewards, weights, 8)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6, equal_nan=True)


def test_running_scales_by_hand():
    scales = RunningScales(2, decay=0.9)
    base = torch.tensor([1.0, 3.0], dtype=torch.float64)
    assert scales.weights(base).tolist() == [1.0, 3.0]  # nothing is known yet
    # Variances within groups: (0.02^2 / 2 + 0) / 2 = 1e-4 and (8 + 0) / 2 = 4: spreads 0.01 and 2.
    step = torch.tensor([[0.20, 0.0], [0.22, 4.0], [9.0, 7.0], [9.0, 7.0]], dtype=torch.float64)
    scales.update(step, 2)
    torch.testing.assert_close(scales.spreads, torch.tensor([0.01, 2.0], dtype=torch.float64), rtol=0, atol=1e-9)
    found = scales.weights(base)
    expected = torch.tensor([1 / 0.0101, 3 / 2.0001], dtype=torch.float64)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-9)
    # A second step without any spread: variance (0.9 * 0.1 * v + 0.1 * 0) / (0.9 * 0.1 + 0.1) = v * 0.09 / 0.19.
    scales.update(torch.ones(4, 2, dtype=torch.float64), 2)
    expected = torch.tensor([0.01, 2.0], dtype=torch.float64) * math.sqrt(0.09 / 0.19)
    torch.testing.assert_close(scales.spreads, expected, rtol=0, atol=1e-9)


def test_a_reward_that_told_nothing_keeps_its_scale():
    scales = RunningScales(2, decay=0.5)
    scales.update(torch.tensor([[1.0, NAN], [3.0, 5.0]]), 2)
    assert scales.spreads[0].item() == pytest.approx(math.sqrt(2), abs=1e-6) and scales.spreads[1].isnan()
    scales.update(torch.tensor([[NAN, 1.0], [NAN, 3.0]]), 2)
    assert scales.spreads.tolist() == pytest.approx([math.sqrt(2)] * 2, abs=1e-6)


def test_weights_make_spreads_equal_and_levels_of_prompts_do_not_enter():
    torch.manual_seed(0)
    noise = torch.randn(64, 3, dtype=torch.float64) * torch.tensor([0.02, 1.0, 300.0])
    level = 1000 * torch.randn(8, 1, 3, dtype=torch.float64).expand(8, 8, 3).reshape(64, 3)
    scales, moved = RunningScales(3), RunningScales(3)
    scales.update(noise, 8)
    moved.update(noise + level, 8)
    torch.testing.assert_close(scales.spreads, moved.spreads, rtol=0, atol=1e-9)
    scaled = RunningScales(3)
    scaled.update(noise * scales.weights(torch.ones(3, dtype=torch.float64)), 8)
    # spread / (spread + 1e-4): within half a percent of 1 for the smallest.
    assert scaled.spreads.tolist() == pytest.approx([1.0, 1.0, 1.0], abs=6e-3)


def test_the_state_survives_json_exactly():
    torch.manual_seed(0)
    scales, again = RunningScales(2), RunningScales(2)
    scales.update(torch.randn(8, 2), 4)
    again.load_state_dict(json.loads(json.dumps(scales.state_dict())))
    for one in (scales, again):
        one.update(torch.full((8, 2), 0.3), 4)
    assert torch.equal(scales.spreads, again.spreads)
    with pytest.raises(ValueError, match="scales of 2 rewards, this run has 3"):
        RunningScales(3).load_state_dict(scales.state_dict())


def test_wrong_values_are_refused():
    with pytest.raises(ValueError, match="5 samples are no whole number of groups of num_generations=2"):
        leave_out_failed(torch.zeros(5, 1), 2)
    for decay in (1.0, -0.1, NAN):
        with pytest.raises(ValueError, match="must be at least 0 and below 1"):
            RunningScales(1, decay)


REWARDS = torch.tensor([[0.20, 0.0], [0.22, 4.0], [0.5, 7.0], [0.5, NAN]], dtype=torch.float64)
WEIGHTS = torch.tensor([1.0, 3.0], dtype=torch.float64)


def test_three_ways_to_sum_by_hand():
    root = math.sqrt(2)
    # Spreads of the first group: 0.02 / sqrt(2), 4 / sqrt(2). The fourth sample is left out, and the one that is left
    # of its group tells no spread.
    spreads = [0.02 / root, 4 / root]
    plain = [0.2, 0.22 + 12.0, 0.5 + 21.0, NAN]
    step = 0.01 / (spreads[0] + 1e-4) + 3 * 2 / (spreads[1] + 1e-4)
    scaled = [r / (spreads[0] + 1e-4) + 3 * q / (spreads[1] + 1e-4) for r, q in REWARDS.tolist()]
    expected = {
        "weighted_sum": plain,
        "normalize_then_sum": [-step, step, 0.0, NAN],
        "running": [*scaled[:3], NAN],
    }
    for aggregation, totals in expected.items():
        reward_sum = RewardSum(WEIGHTS, aggregation)
        kept, weights = reward_sum.take_in(REWARDS, 2, training=True)
        assert torch.equal(kept[:3], REWARDS[:3]) and kept[3].isnan().all()  # raw, whatever the aggregation
        found = reward_sum.totals(kept, weights, 2)
        wanted = torch.tensor(totals, dtype=torch.float64)
        torch.testing.assert_close(found, wanted, rtol=0, atol=1e-6, equal_nan=True)


def test_evaluations_do_not_move_the_scales_and_a_resumed_sum_continues():
    reward_sum = RewardSum(WEIGHTS, "running")
    assert torch.equal(reward_sum.take_in(REWARDS, 2, training=False)[1], WEIGHTS)
    learned = reward_sum.take_in(REWARDS, 2, training=True)[1]
    assert not torch.equal(learned, WEIGHTS)
    again = RewardSum(WEIGHTS, "running")
    again.load_state_dict(json.loads(json.dumps(reward_sum.state_dict())))
    assert torch.equal(again.take_in(REWARDS * 2, 2, training=False)[1], learned)
    plain = RewardSum(WEIGHTS)
    plain.load_state_dict(reward_sum.state_dict())
    assert plain.state_dict() == {} and torch.equal(plain.take_in(REWARDS, 2, training=True)[1], WEIGHTS)
    again.load_state_dict(plain.state_dict())
    assert again.state_dict() == reward_sum.state_dict()
    with pytest.raises(ValueError, match="aggregation='sum' is unknown; use one of weighted_sum, normalize_then_sum"):
        RewardSum(WEIGHTS, "sum")
