"""The GRPO objective as pure functions: group advantages, k3 KL, clipped surrogate.

Everything is computed in float32 whatever comes in; float64 stays float64, so that the same code can be
checked by finite differences. A *group* is ``num_generations`` neighbouring completions of one prompt.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

_STD_EPSILON = 1e-4  # TRL's and the released code's: keeps the advantage finite when a group nearly ties.


def full_precision(tensor: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """Cast to float32, but leave float64 alone.

    Log-probabilities in bfloat16 move in steps of 0.03 nats, which is more than the entropy gaps and the
    ratios that this project compares.

    Args:
        tensor: Any floating tensor, any shape.

    Returns:
        The same values in float32 or float64; keeps the gradient.
    """
    return tensor if tensor.dtype == torch.float64 else tensor.float()


def num_groups(num_samples: int, num_generations: int) -> int:
    """Number of whole groups in a batch of ``num_samples`` completions.

    Args:
        num_samples: Completions on all processes (N).
        num_generations: Completions of one prompt (G).

    Returns:
        N / G.

    Raises:
        ValueError: ``num_generations`` is below 1 or does not divide ``num_samples``.
    """
    if num_generations < 1:
        raise ValueError(f"num_generations is {num_generations}; it must be at least 1.")
    if num_samples % num_generations:
        raise ValueError(
            f"{num_samples} samples do not split into groups of num_generations={num_generations}; pass whole"
            " groups (gather over processes first), or change num_generations."
        )
    return num_samples // num_generations


def weighted_sum(rewards: Float[Tensor, "N F"], weights: Float[Tensor, " F"]) -> Float[Tensor, " N"]:
    """Total reward of each sample: ``sum_f w_f r_f`` over the rewards that could score it.

    Args:
        rewards: One column a reward function, NaN where it could not score a sample.
        weights: One weight a reward function.

    Returns:
        Totals in reward units; NaN where no reward function could score the sample. As TRL sums them.
    """
    unscored = rewards.isnan().all(dim=1)
    return (rewards * weights.to(rewards)).nansum(dim=1).masked_fill(unscored, torch.nan)


def group_std(rewards: Float[Tensor, " N"], num_generations: int) -> Float[Tensor, " N"]:
    """Unbiased standard deviation of the rewards in each sample's group.

    Exactly 0 where all scored samples of the group tie (a mean that is off by one rounding step would
    otherwise make a tie look like a spread) and where fewer than two samples were scored. NaN rewards
    (samples that could not be scored) are left out.

    Args:
        rewards: One reward a sample, groups contiguous, in reward units. NaN allowed.
        num_generations: Completions of one prompt (G).

    Returns:
        The group's standard deviation, repeated for each of its samples, in reward units.

    Raises:
        ValueError: N is not divisible by ``num_generations``.

    Source: arXiv:2402.03300 (GRPO), section 4.1; Bessel's correction as in TRL.
    """
    rewards = full_precision(rewards)
    grouped = rewards.reshape(num_groups(rewards.shape[0], num_generations), num_generations)
    scored = ~grouped.isnan()
    count = scored.sum(dim=1, keepdim=True)
    mean = grouped.nansum(dim=1, keepdim=True) / count.clamp(min=1)
    squares = ((grouped - mean) ** 2).nansum(dim=1, keepdim=True)
    std = (squares / (count - 1).clamp(min=1)).sqrt()
    highest = grouped.masked_fill(~scored, -torch.inf).amax(dim=1, keepdim=True)
    lowest = grouped.masked_fill(~scored, torch.inf).amin(dim=1, keepdim=True)
    std = std.masked_fill(highest <= lowest, 0.0)
    return std.expand_as(grouped).reshape(-1)


def group_advantages(rewards: Float[Tensor, " N"], num_generations: int, min_std: float = 0.0) -> Float[Tensor, " N"]:
    """Advantages relative to the group: ``A = (r - mean_G) / (std_G + 1e-4)``.

    Args:
        rewards: One reward a sample, groups contiguous, in reward units. NaN marks a sample that could not
            be scored: mean and standard deviation leave it out and its advantage is 0.
        num_generations: Completions of one prompt (G).
        min_std: Groups whose standard deviation is at most this get A = 0, in reward units. 0 is the
            published behaviour, where differences of 1e-3 between tied samples become full-size advantages.

    Returns:
        Advantages in units of the group's standard deviation; they sum to 0 over each group. No gradient is
        expected to flow through them.

    Raises:
        ValueError: N is not divisible by ``num_generations``, a reward is infinite, or ``min_std`` is not at
            least 0.

    Source: arXiv:2402.03300 (GRPO), section 4.1.
    """
    if not min_std >= 0.0:
        raise ValueError(f"min_std is {min_std}; it must be 0 or more (0 switches the guard off).")
    rewards = full_precision(rewards)
    if rewards.isinf().any():
        where = rewards.isinf().nonzero().flatten().tolist()
        raise ValueError(f"rewards {where[:8]} are infinite; clip the reward, or return NaN for 'not scored'.")
    grouped = rewards.reshape(num_groups(rewards.shape[0], num_generations), num_generations)
    std = group_std(rewards, num_generations)
    mean = grouped.nanmean(dim=1, keepdim=True).expand_as(grouped).reshape(-1)
    advantages = (rewards - mean) / (std + _STD_EPSILON)
    return torch.where((std > min_std) & ~rewards.isnan(), advantages, 0.0)


def kl_k3(logps: Float[Tensor, "B T"], ref_logps: Float[Tensor, "B T"]) -> Float[Tensor, "B T"]:
    """Per-token KL of the policy from the reference by the k3 estimator: ``exp(d) - d - 1``.

    ``d = ref_logps - logps``. Non-negative, and unbiased for samples of the policy. Grows like exp(d), so a
    token that the reference likes far more than the policy can dominate a mean.

    Args:
        logps: Log-probabilities of the sampled tokens under the policy, nats; carries gradient.
        ref_logps: The same under the reference policy, nats; no gradient.

    Returns:
        KL estimates in nats, at least 0.

    Source: arXiv:2402.03300 Eq. 4; J. Schulman, "Approximating KL divergence" (2020).
    """
    difference = full_precision(ref_logps) - full_precision(logps)
    # expm1 keeps small differences, where exp(d) - 1 loses every digit and can come out below d.
    return torch.expm1(difference) - difference


def clipped_surrogate(
    logps: Float[Tensor, "B T"],
    old_logps: Float[Tensor, "B T"],
    advantages: Float[Tensor, " B #T"],
    epsilon_low: float = 0.2,
    epsilon_high: float = 0.2,
) -> Float[Tensor, "B T"]:
    """Clipped policy surrogate per token, to be maximised.

    ``min(ratio * A, clip(ratio, 1 - epsilon_low, 1 + epsilon_high) * A)`` with
    ``ratio = exp(logps - old_logps)``. Token weighting (STAGE Eq. 8) enters as advantages of shape (B, T).

    Args:
        logps: Log-probabilities under the policy being trained, nats; carries gradient.
        old_logps: Log-probabilities under the policy that sampled, nats; no gradient.
        advantages: One a sample (B, 1) or one a token (B, T).
        epsilon_low: How far the ratio may fall below 1, in [0, 1].
        epsilon_high: How far the ratio may rise above 1, at least 0.

    Returns:
        Surrogate per token, in advantage units.

    Raises:
        ValueError: A clip bound is out of range.

    Source: arXiv:2509.25027 Eq. 3, 4; separate bounds as arXiv:2503.14476 (DAPO), clip-higher.
    """
    if not 0.0 <= epsilon_low <= 1.0:
        raise ValueError(f"epsilon_low is {epsilon_low}; the ratio is positive, so it must lie in [0, 1].")
    if not epsilon_high >= 0.0:
        raise ValueError(f"epsilon_high is {epsilon_high}; it must be 0 or more.")
    advantages = full_precision(advantages)
    ratio = torch.exp(full_precision(logps) - full_precision(old_logps))
    clipped = ratio.clamp(1.0 - epsilon_low, 1.0 + epsilon_high)
    return torch.minimum(ratio * advantages, clipped * advantages)


def policy_loss(
    logps: Float[Tensor, "B T"],
    old_logps: Float[Tensor, "B T"],
    ref_logps: Float[Tensor, "B T"],
    advantages: Float[Tensor, " B #T"],
    beta: float,
    kl_weights: Float[Tensor, "B T"] | None = None,
    epsilon_low: float = 0.2,
    epsilon_high: float = 0.2,
) -> Float[Tensor, ""]:
    """The whole loss in one place: ``mean over tokens of (-surrogate + beta * kl_weights * k3)``.

    The trainer reaches the same value through TRL's loss types; this is the reference to read and to test
    against. Every image has the same number of tokens, so the means over tokens and over samples agree.

    Args:
        logps: Log-probabilities under the policy being trained, nats; carries gradient.
        old_logps: Log-probabilities under the policy that sampled, nats.
        ref_logps: Log-probabilities under the reference policy, nats.
        advantages: (B, 1), or (B, T) already multiplied by the advantage weights.
        beta: KL coefficient, at least 0.
        kl_weights: Multiplier of the KL of each token; None is 1 everywhere.
        epsilon_low: Lower clip bound, in [0, 1].
        epsilon_high: Upper clip bound, at least 0.

    Returns:
        The scalar loss.

    Raises:
        ValueError: ``beta`` is negative or a clip bound is out of range.

    Source: arXiv:2509.25027 Eq. 3, 8 and the KL weight of section 3.2.
    """
    if not beta >= 0.0:
        raise ValueError(f"beta is {beta}; a negative KL coefficient rewards drift, use 0 or more.")
    surrogate = clipped_surrogate(logps, old_logps, advantages, epsilon_low, epsilon_high)
    per_token_kl = kl_k3(logps, ref_logps)
    if kl_weights is not None:
        per_token_kl = full_precision(kl_weights) * per_token_kl
    return (beta * per_token_kl - surrogate).mean()
