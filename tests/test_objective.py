"""Group advantages, k3 KL and the clipped surrogate: hand-worked numbers, oracles, laws, TRL."""

from __future__ import annotations

import math
import subprocess
import sys

import pytest
import torch

import oracles
from stage_grpo import objective

NAN = float("nan")


def close(actual: torch.Tensor, expected: object) -> None:
    torch.testing.assert_close(actual.double(), torch.as_tensor(expected).double(), atol=1e-6, rtol=0)


def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


# --- group_advantages ------------------------------------------------------------------------------------


def test_advantages_by_hand() -> None:
    # Group 1: (1, 0, 0, 0): mean 1/4, squares 9/16 + 3 * 1/16 = 3/4, unbiased variance 1/4, std 1/2,
    # so A = 0.75 / 0.5001 and -0.25 / 0.5001. Group 2: (2, 4, 4, 2): mean 3, squares 4, std sqrt(4 / 3).
    rewards = torch.tensor([1.0, 0.0, 0.0, 0.0, 2.0, 4.0, 4.0, 2.0])
    std = (4 / 3) ** 0.5 + 1e-4
    expected = [0.75 / 0.5001, *3 * [-0.25 / 0.5001], -1 / std, 1 / std, 1 / std, -1 / std]
    close(objective.group_advantages(rewards, 4), expected)


def test_group_std_by_hand() -> None:
    # (0, 1): mean 0.5, squares 0.5, divided by n - 1 = 1: sqrt(0.5). (3, NaN): one scored sample has no spread.
    close(objective.group_std(torch.tensor([0.0, 1.0, 3.0, NAN]), 2), [0.5**0.5, 0.5**0.5, 0.0, 0.0])


def test_unscored_samples_are_left_out() -> None:
    # Group 1: scored (1, 3): mean 2, std sqrt(2). Group 2: one scored sample. Group 3: none.
    rewards = torch.tensor([1.0, NAN, 3.0, 5.0, NAN, NAN, NAN, NAN, NAN])
    a = 1 / (2**0.5 + 1e-4)
    close(objective.group_advantages(rewards, 3), [-a, 0, a, 0, 0, 0, 0, 0, 0])


@pytest.mark.parametrize("num_generations", [1, 2, 3, 6, 12])
@pytest.mark.parametrize("min_std", [0.0, 0.4])
def test_advantages_match_the_oracle(num_generations: int, min_std: float) -> None:
    rewards = random(12, seed=num_generations)
    rewards[7] = NAN
    rewards[3:6] = 0.1
    expected = oracles.group_advantages(rewards.tolist(), num_generations, min_std)
    close(objective.group_advantages(rewards, num_generations, min_std), expected)


def test_advantages_sum_to_zero_in_every_group() -> None:
    advantages = objective.group_advantages(random(48), 8).reshape(6, 8)
    close(advantages.sum(dim=1), torch.zeros(6))


def test_a_tie_is_exactly_zero() -> None:
    # The float32 mean of eight times 0.1 may be off by a rounding step, which 1e-4 would blow up.
    for value in (0.1, 1 / 3, 0.7, 1e6 / 7):
        assert objective.group_advantages(torch.full((8,), value), 8).eq(0).all()


def test_min_std_silences_near_ties_and_only_them() -> None:
    rewards = torch.tensor([1.0, 1.001, 0.0, 1.0])
    unguarded = objective.group_advantages(rewards, 2)
    # 0.0005 / (0.001 / sqrt(2) + 1e-4) = 0.0005 / 0.000807107: a thousandth becomes most of a unit advantage.
    assert unguarded[1].item() == pytest.approx(0.61949, abs=1e-3)
    guarded = objective.group_advantages(rewards, 2, min_std=1e-2)
    assert guarded[:2].eq(0).all()
    assert torch.equal(guarded[2:], unguarded[2:])


def test_permuting_a_group_and_groups_permutes_the_advantages() -> None:
    rewards = random(12)
    advantages = objective.group_advantages(rewards, 4)
    inner = torch.tensor([2, 0, 3, 1, 5, 4, 7, 6, 8, 9, 10, 11])
    close(objective.group_advantages(rewards[inner], 4), advantages[inner])
    outer = torch.tensor([8, 9, 10, 11, 0, 1, 2, 3, 4, 5, 6, 7])
    assert torch.equal(objective.group_advantages(rewards[outer], 4), advantages[outer])


def test_other_groups_never_matter() -> None:
    rewards = random(12)
    changed = rewards.clone()
    changed[4:] = 100 * random(8, seed=1)
    before, after = (objective.group_advantages(r, 4)[:4] for r in (rewards, changed))
    assert torch.equal(before, after)


def test_shifting_and_scaling_the_reward() -> None:
    rewards = random(8)
    advantages = objective.group_advantages(rewards, 4)
    close(objective.group_advantages(rewards + 3.0, 4), advantages)
    std = objective.group_std(rewards, 4)
    close(objective.group_advantages(5 * rewards, 4), advantages * (std + 1e-4) / (std + 2e-5))


def test_advantages_equal_what_trl_computes() -> None:
    from trl.trainer.utils import nanstd

    rewards = random(32, dtype=torch.float32)
    rewards[5] = NAN
    # trl.GRPOTrainer._generate_and_score_completions with scale_rewards="group".
    mean = torch.nanmean(rewards.view(-1, 8), dim=1).repeat_interleave(8)
    std = nanstd(rewards.view(-1, 8), dim=1).repeat_interleave(8)
    expected = torch.nan_to_num((rewards - mean) / (std + 1e-4), nan=0.0)
    close(objective.group_advantages(rewards, 8), expected)


def test_low_precision_comes_back_as_float32() -> None:
    rewards = torch.tensor([1.0, 0.0, 0.5, 0.25])
    assert torch.equal(objective.group_advantages(rewards.bfloat16(), 4), objective.group_advantages(rewards, 4))


@pytest.mark.parametrize(
    ("rewards", "num_generations", "min_std", "message"),
    [
        (torch.zeros(6), 4, 0.0, "6 samples do not split into groups of num_generations=4"),
        (torch.zeros(6), 0, 0.0, "num_generations is 0; it must be at least 1"),
        (torch.tensor([1.0, float("inf")]), 2, 0.0, r"rewards \[1\] are infinite"),
        (torch.zeros(4), 4, -0.1, "min_std is -0.1; it must be 0 or more"),
        (torch.zeros(4), 4, NAN, "min_std is nan"),
    ],
)
def test_wrong_inputs(rewards: torch.Tensor, num_generations: int, min_std: float, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        objective.group_advantages(rewards, num_generations, min_std)


# --- kl_k3 -----------------------------------------------------------------------------------------------


def test_k3_by_hand() -> None:
    # d = ref - logp = ln 2: 2 - ln 2 - 1; d = -ln 2: 1/2 + ln 2 - 1; d = 0: 0.
    ln2 = torch.tensor(2.0).log().item()
    logps, ref = torch.tensor([[-1.0, -1.0, -1.0]]), torch.tensor([[ln2 - 1, -ln2 - 1, -1.0]])
    close(objective.kl_k3(logps, ref), [[1 - ln2, ln2 - 0.5, 0.0]])


def test_k3_is_never_negative_even_for_the_smallest_differences() -> None:
    difference = torch.logspace(-12, 1, 4000).reshape(1, -1)
    zero = torch.zeros_like(difference)
    for ref in (difference, -difference):
        assert objective.kl_k3(zero, ref).min() >= 0
    # d^2 / 2 to first order: 5e-9 at d = 1e-4, where exp(d) - d - 1 in float32 gives 0 or 1.2e-7.
    assert objective.kl_k3(torch.zeros(1, 1), torch.full((1, 1), 1e-4)).item() == pytest.approx(5e-9, rel=2e-3)


def test_k3_is_unbiased() -> None:
    # Summed over the whole vocabulary with the policy's probabilities it is the exact KL divergence.
    policy, reference = (random(1, 50, seed=s).log_softmax(-1) for s in (0, 1))
    exact = (policy.exp() * (policy - reference)).sum()
    close((policy.exp() * objective.kl_k3(policy, reference)).sum(), exact)


# --- surrogate and loss ----------------------------------------------------------------------------------


def test_surrogate_by_hand() -> None:
    # Ratios 1.5, 1.5, 0.5, 0.5 with clip [0.8, 1.3] and A = 1, -2, 1, -2 -> min(1.5, 1.3); min(-3, -2.6);
    # min(0.5, 0.8); min(-1, -1.6).
    ratio = torch.tensor([[1.5, 1.5, 0.5, 0.5]])
    advantages = torch.tensor([[1.0, -2.0, 1.0, -2.0]])
    actual = objective.clipped_surrogate(ratio.log(), torch.zeros(1, 4), advantages, 0.2, 0.3)
    close(actual, [[1.3, -3.0, 0.5, -1.6]])


def test_loss_matches_the_oracle() -> None:
    logps, old, ref = (random(4, 5, seed=s) for s in (1, 2, 3))
    advantages, weights = random(4, 5, seed=4), random(4, 5, seed=5).abs()
    actual = objective.policy_loss(logps, old, ref, advantages, 0.7, weights, 0.1, 0.3)
    rows = (x.tolist() for x in (logps, old, ref, advantages))
    close(actual, oracles.policy_loss(*rows, 0.7, weights.tolist(), 0.1, 0.3))


def test_one_advantage_a_sample_is_the_same_as_repeating_it_over_tokens() -> None:
    logps, old, ref = (random(3, 4, seed=s) for s in range(3))
    advantages = random(3, 1, seed=9)
    a = objective.policy_loss(logps, old, ref, advantages, 0.1)
    b = objective.policy_loss(logps, old, ref, advantages.expand(3, 4).clone(), 0.1, torch.ones(3, 4).double())
    assert torch.equal(a, b)


def test_on_policy_gradient_is_minus_advantage_and_clipping_stops_it() -> None:
    logps = torch.zeros(1, 3, dtype=torch.float64, requires_grad=True)
    advantages = torch.tensor([[1.0, 1.0, -1.0]]).double()
    # Ratios 1, 1.65, 1.65: the second would gain by rising further and is clipped, the third is not.
    old = torch.tensor([[0.0, -0.5, -0.5]]).double()
    objective.policy_loss(logps, old, logps.detach(), advantages, beta=0.3).backward()
    assert logps.grad is not None
    close(logps.grad, torch.tensor([[-1.0, 0.0, math.exp(0.5)]]) / 3)


def test_gradients_by_finite_differences() -> None:
    logps = random(3, 4, seed=1).requires_grad_()
    old, ref, advantages = (random(3, 4, seed=s) for s in (2, 3, 4))
    weights = random(3, 4, seed=5).abs()
    assert torch.autograd.gradcheck(lambda x: objective.kl_k3(x, ref), logps)
    assert torch.autograd.gradcheck(lambda x: objective.policy_loss(x, old, ref, advantages, 0.4, weights), logps)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"epsilon_low": 1.5}, "epsilon_low is 1.5"),
        ({"epsilon_low": -0.1}, "epsilon_low is -0.1"),
        ({"epsilon_high": -0.2}, "epsilon_high is -0.2"),
        ({"beta": -1.0}, "beta is -1.0"),
    ],
)
def test_wrong_loss_settings(kwargs: dict[str, float], message: str) -> None:
    x = torch.zeros(2, 3)
    with pytest.raises(ValueError, match=message):
        objective.policy_loss(x, x, x, x, **{"beta": 0.1} | kwargs)


def test_the_maths_imports_neither_transformers_nor_trl() -> None:
    code = (
        "import sys, stage_grpo.objective, stage_grpo.similarity, stage_grpo.entropy;"
        "sys.exit(any(m in sys.modules for m in ('transformers', 'trl', 'datasets', 'accelerate')))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_weighted_sum_leaves_out_what_could_not_be_scored():
    nan = float("nan")
    rewards = torch.tensor([[1.0, 2.0], [nan, 2.0], [1.0, nan], [nan, nan]])
    total = objective.weighted_sum(rewards, torch.tensor([2.0, 0.5]))
    # 2 * 1 + 0.5 * 2, then each alone, then nothing to go by.
    torch.testing.assert_close(total[:3], torch.tensor([3.0, 1.0, 2.0]), atol=1e-6, rtol=0)
    assert total[3].isnan()
