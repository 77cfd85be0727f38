"""One weight a token: how much of its advantage and of its KL counts (STAGE, section 3.2)."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from stage_grpo import objective, similarity


def token_weights(
    code_vectors: Float[Tensor, "N T D"],
    advantages: Float[Tensor, " N"],
    rewards: Float[Tensor, " N"],
    num_generations: int,
    options: Any,
) -> dict[str, Tensor]:
    """Compute what the loss needs per token, for all samples of all processes.

    Args:
        code_vectors: Codebook vectors of the sampled codes.
        advantages: Group advantages, groups contiguous.
        rewards: Total rewards, NaN where a sample could not be scored; only their spread matters.
        num_generations: G.
        options: The fields of :class:`~stage_grpo.config.StageConfig` named ``reweight_advantages``, ``reweight_kl``,
            ``advantage_weight_normalization``, ``kl_weight_*``, ``kl_on_zero_variance`` and ``min_reward_std``.

    Returns:
        ``similarity`` (N, T); ``advantages``, (N, T) if reweighted and (N,) if not; ``advantage_weights`` (N, T) if
        advantages are reweighted; ``kl_weights`` (N, T) if the KL is reweighted or left out anywhere.
    """
    spread = objective.group_std(rewards, num_generations) > options.min_reward_std
    advantages = torch.where(spread, advantages, 0.0)
    alike = similarity.opposite_sign_similarity(code_vectors, advantages, num_generations)
    weights = {"similarity": alike, "advantages": advantages}
    if options.reweight_advantages:
        weights["advantage_weights"] = similarity.advantage_weights(
            alike, num_generations, options.advantage_weight_normalization
        )
        weights["advantages"] = advantages[:, None] * weights["advantage_weights"]
    kl_weights = torch.ones_like(alike)
    if options.reweight_kl:
        lower, upper = options.kl_weight_clip
        kl_weights = similarity.kl_weights(
            alike, options.kl_weight_a, options.kl_weight_b, (lower, upper), options.kl_weight_form
        )
    if not options.kl_on_zero_variance:
        kl_weights = kl_weights * spread[:, None]
    if options.reweight_kl or not options.kl_on_zero_variance:
        weights["kl_weights"] = kl_weights
    return weights


def unique_share(codes: Int[Tensor, "N T"], num_generations: int) -> Float[Tensor, " groups"]:
    """Share of distinct images in each group, in (0, 1]: RL tends to lower it."""
    grouped = codes.view(-1, num_generations, codes.shape[-1])
    equal = (grouped[:, :, None] == grouped[:, None]).all(dim=-1)
    repeats_an_earlier_one = equal.tril(diagonal=-1).any(dim=-1)
    return 1 - repeats_an_earlier_one.float().mean(dim=1)
