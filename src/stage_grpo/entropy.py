"""Policy entropy, and STAGE's entropy reward anchored at the reference policy.

Rule-based rewards give many ties, so plain GRPO lets the policy's entropy wander off the pretrained one.
Both remedies compare the policy's mean entropy H_theta of an image with the reference policy's, H_ref, on the
same tokens: as a reward (Eq. 10-12, the method) or as a loss (Eq. 13, 14, the paper's ablation).
Entropies are in nats, in float32 (float64 stays float64).
"""

from __future__ import annotations

from typing import Literal, get_args

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from stage_grpo.objective import full_precision, num_groups

Scope = Literal["top", "all"]


def token_entropy(logits: Float[Tensor, "*batch V"]) -> Float[Tensor, "*batch"]:
    """Entropy of the next-token distribution: ``-sum_v p_v log p_v``.

    Args:
        logits: Unnormalised scores over the image codebook; -inf marks an entry that cannot be drawn. Carries
            gradient.

    Returns:
        Entropies in nats, in [0, log V].

    Source: arXiv:2509.25027 Eq. 9.
    """
    logps = torch.log_softmax(full_precision(logits), dim=-1)
    # 0 * -inf is NaN; a finite floor makes the term of an impossible token 0, in the gradient too.
    return -(logps.exp() * logps.clamp(min=torch.finfo(logps.dtype).min)).sum(dim=-1)


def entropy_reward(
    rewards: Float[Tensor, " N"],
    policy_entropy: Float[Tensor, " N"],
    ref_entropy: Float[Tensor, " N"],
    num_generations: int,
    scope: Scope = "top",
    center: bool = False,
) -> Float[Tensor, " N"]:
    """Bonus for images whose entropy stays near the reference's: ``1 / (1 + (H_ref - H_theta)^2)``.

    Args:
        rewards: All other rewards of each sample, summed, groups contiguous. NaN marks a sample that could
            not be scored: it is no top, does not count in any mean, and gets 0.
        policy_entropy: H_theta, mean over the image's tokens, nats.
        ref_entropy: H_ref, the reference's mean over the same tokens, nats.
        num_generations: Completions of one prompt (G).
        scope: "top": only samples whose reward equals their own group's maximum (ties included); "all": every
            sample, the paper's ablation (Fig. 17).
        center: Subtract the mean bonus over the group's selected samples from them. The released code does:
            a unique top then gets exactly 0, and ties are only reordered.

    Returns:
        Bonuses in (0, 1], 0 for samples not selected; centred ones in (-1, 1). The trainer adds lambda times
        this to the reward before the group's normalisation. No gradient is expected.

    Raises:
        ValueError: Unknown ``scope``, or N is not divisible by ``num_generations``.

    Source: arXiv:2509.25027 Eq. 10, 11, 12.
    """
    if scope not in get_args(Scope):
        raise ValueError(f"scope is {scope!r}; choose one of {', '.join(get_args(Scope))}.")
    bonus = _nearness(policy_entropy, ref_entropy)
    grouped_bonus = bonus.reshape(num_groups(bonus.shape[0], num_generations), num_generations)
    selected = _selected(rewards, num_generations, scope).reshape(grouped_bonus.shape)
    if center:
        total = (grouped_bonus * selected).sum(dim=1, keepdim=True)
        grouped_bonus = grouped_bonus - total / selected.sum(dim=1, keepdim=True).clamp(min=1)
    return torch.where(selected, grouped_bonus, 0.0).reshape(-1)


def entropy_loss(policy_entropy: Float[Tensor, " B"], ref_entropy: Float[Tensor, " B"]) -> Float[Tensor, ""]:
    """The entropy term as a loss, ``mean_i (H_ref - H_theta)^2``: the ablation against `entropy_reward`.

    A reward only tells which sampled images to prefer; this pushes the entropy of every image by its own
    gradient, whatever the image's reward. The trainer adds lambda times it to the policy loss.

    Args:
        policy_entropy: H_theta, mean over each image's tokens, nats; carries gradient.
        ref_entropy: H_ref, the reference's mean over the same tokens, nats; no gradient.

    Returns:
        The scalar loss, at least 0, in nats^2; 0 only where every image's entropy equals the reference's.

    Source: our reading of arXiv:2509.25027 Eq. 13, 14 (see docs/paper_map.md).
    """
    return ((full_precision(ref_entropy) - full_precision(policy_entropy)) ** 2).mean()


def _nearness(policy_entropy: Float[Tensor, " N"], ref_entropy: Float[Tensor, " N"]) -> Float[Tensor, " N"]:
    """Eq. 10, 11: 1 where the entropies agree, falling with the squared gap."""
    gap = full_precision(ref_entropy) - full_precision(policy_entropy)
    return 1.0 / (1.0 + gap**2)


def _selected(rewards: Float[Tensor, " N"], num_generations: int, scope: Scope) -> Bool[Tensor, " N"]:
    """Samples that may receive the bonus: scored ones, and under "top" only their group's best."""
    rewards = full_precision(rewards)
    scored = ~rewards.isnan()
    if scope == "all":
        return scored
    grouped = rewards.masked_fill(~scored, -torch.inf).reshape(
        num_groups(rewards.shape[0], num_generations), num_generations
    )
    return (grouped == grouped.amax(dim=1, keepdim=True)).reshape(-1) & scored
