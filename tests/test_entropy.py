"""Token entropy, the entropy reward and the entropy loss: hand-worked numbers, oracles, laws."""

from __future__ import annotations

import math

import pytest
import torch

import oracles
from stage_grpo import entropy

NAN = float("nan")


def close(actual: torch.Tensor, expected: object) -> None:
    torch.testing.assert_close(actual.double(), torch.as_tensor(expected).double(), atol=1e-6, rtol=0)


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# --- token_entropy ---------------------------------------------------------------------------------------


def test_entropy_by_hand() -> None:
    # Uniform over 4: ln 4. p = (1/4, 3/4): -(ln 1/4) / 4 - 3 (ln 3/4) / 4 = 0.562335. Certain: 0.
    close(entropy.token_entropy(torch.zeros(4)), math.log(4))
    close(entropy.token_entropy(torch.tensor([[0.0, math.log(3)]])), [0.5623351446])
    close(entropy.token_entropy(torch.tensor([0.0, 1000.0])), 0.0)


def test_entropy_matches_the_oracle_and_torch() -> None:
    logits = 3 * random(4, 5, 17)
    actual = entropy.token_entropy(logits)
    close(actual, [[oracles.token_entropy(row) for row in image] for image in logits.tolist()])
    close(actual, torch.distributions.Categorical(logits=logits).entropy())


def test_impossible_tokens_count_nothing_and_break_no_gradient() -> None:
    logits = torch.tensor([0.0, 0.0, -torch.inf], dtype=torch.float64, requires_grad=True)
    value = entropy.token_entropy(logits)
    close(value, math.log(2))
    value.backward()
    assert logits.grad is not None
    close(logits.grad, torch.zeros(3))


def test_entropy_ignores_a_shift_of_the_logits_and_is_float32_inside() -> None:
    logits = random(3, 50)
    close(entropy.token_entropy(logits + 40.0), entropy.token_entropy(logits))
    coarse = logits.bfloat16()
    close(entropy.token_entropy(coarse), entropy.token_entropy(coarse.double()))


# --- entropy_reward --------------------------------------------------------------------------------------


def test_reward_by_hand() -> None:
    # Gaps 0, 1, 2, 0.5 -> 1, 1/2, 1/5, 1/1.25. Group 1 tops: both; group 2: the last.
    rewards, ref = torch.tensor([1.0, 1.0, 0.0, 0.5]), torch.full((4,), 3.0)
    policy = torch.tensor([3.0, 2.0, 5.0, 3.5])
    close(entropy.entropy_reward(rewards, policy, ref, 2), [1.0, 0.5, 0.0, 0.8])
    close(entropy.entropy_reward(rewards, policy, ref, 2, scope="all"), [1.0, 0.5, 0.2, 0.8])
    # Centred on the tops' mean 0.75: a unique top (group 2) gets 0.
    close(entropy.entropy_reward(rewards, policy, ref, 2, center=True), [0.25, -0.25, 0.0, 0.0])
    close(entropy.entropy_reward(rewards, policy, ref, 2, "all", True), [0.25, -0.25, -0.3, 0.3])


@pytest.mark.parametrize("scope", ["top", "all"])
@pytest.mark.parametrize("center", [False, True])
@pytest.mark.parametrize("num_generations", [1, 3, 4, 12])
def test_reward_matches_the_oracle(scope: entropy.Scope, center: bool, num_generations: int) -> None:
    rewards = random(12).sign()  # many ties
    rewards[[2, 8]] = NAN
    rewards[9:12] = NAN
    policy, ref = 3 + random(12, seed=1), 3 + random(12, seed=2)
    actual = entropy.entropy_reward(rewards, policy, ref, num_generations, scope, center)
    rows = (x.tolist() for x in (rewards, policy, ref))
    close(actual, oracles.entropy_reward(*rows, num_generations, scope, center))


def test_the_best_of_a_poor_group_is_a_top_too() -> None:
    # The released code takes the maximum over the whole batch, so the second group would get nothing.
    rewards, same = torch.tensor([1.0, 0.0, 0.2, 0.1]), torch.ones(4)
    close(entropy.entropy_reward(rewards, same, same, 2), [1.0, 0.0, 1.0, 0.0])


def test_reward_depends_on_the_size_of_the_gap_only_and_falls_with_it() -> None:
    gaps, zeros = torch.linspace(0, 3, 7), torch.zeros(7)
    up = entropy.entropy_reward(zeros, 5 + gaps, zeros + 5, 7)
    assert torch.equal(up, entropy.entropy_reward(zeros, 5 - gaps, zeros + 5, 7))
    assert up[0] == 1 and up.diff().lt(0).all()


def test_permuting_and_group_locality() -> None:
    rewards, policy, ref = random(8).round(), random(8, seed=1), random(8, seed=2)
    base = entropy.entropy_reward(rewards, policy, ref, 4, center=True)
    order = [6, 5, 4, 7, 1, 3, 0, 2]
    close(entropy.entropy_reward(rewards[order], policy[order], ref[order], 4, center=True), base[order])
    rewards[4:] = 100.0
    assert torch.equal(entropy.entropy_reward(rewards, policy, ref, 4, center=True)[:4], base[:4])


# --- entropy_loss ----------------------------------------------------------------------------------------


def test_loss_by_hand() -> None:
    # Gaps 1 and -2: (1 + 4) / 2.
    policy, ref = torch.tensor([2.0, 5.0]), torch.tensor([3.0, 3.0])
    close(entropy.entropy_loss(policy, ref), 2.5)
    assert entropy.entropy_loss(ref, ref) == 0


def test_loss_pulls_towards_the_reference() -> None:
    policy = torch.tensor([1.0, 3.5, 30.0], requires_grad=True)
    entropy.entropy_loss(policy, torch.full((3,), 3.0)).backward()
    assert policy.grad is not None
    close(policy.grad, torch.tensor([-4.0, 1.0, 54.0]) / 3)  # 2 (H_theta - H_ref) / B


def test_gradients_by_finite_differences() -> None:
    logits = random(2, 3, 5).requires_grad_()
    assert torch.autograd.gradcheck(entropy.token_entropy, logits)
    policy, ref = random(4).requires_grad_(), random(4, seed=1)
    assert torch.autograd.gradcheck(lambda h: entropy.entropy_loss(h, ref), policy)


def test_groups_must_be_whole() -> None:
    x = torch.zeros(5)
    with pytest.raises(ValueError, match="5 samples do not split into groups of num_generations=2"):
        entropy.entropy_reward(x, x, x, 2)
