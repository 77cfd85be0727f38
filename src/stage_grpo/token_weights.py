"""One weight a token: a weighting's word on a batch, and the guard against groups whose rewards tie."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from jaxtyping import Float, Int
from torch import Tensor

from stage_grpo import objective
from stage_grpo.weighting.base import TokenBatch, TokenWeighting


def token_weights(
    weighting: TokenWeighting, batch: TokenBatch, min_reward_std: float = 0.0, kl_on_zero_variance: bool = True
) -> tuple[dict[str, Tensor], Mapping[str, Tensor]]:
    """Compute what the loss needs per token, for all samples of all processes.

    Args:
        weighting: Says how much each token counts.
        batch: The images, with advantages as TRL computed them.
        min_reward_std: Groups whose rewards spread no more get advantage 0, whatever the weighting.
        kl_on_zero_variance: Whether those groups still feel the KL.

    Returns:
        What the loss reads: ``advantages``, (N, T) if reweighted and (N,) if not; ``advantage_weights`` (N, T) if
        advantages are reweighted; ``kl_weights`` (N, T) if the KL is reweighted or left out anywhere. And the further
        values the weighting wants logged.
    """
    spread = objective.group_std(batch.rewards, batch.num_generations) > min_reward_std
    advantages = torch.where(spread, batch.advantages, 0.0)
    found = weighting.weigh(replace(batch, advantages=advantages))
    weights = {"advantages": advantages}
    if found.advantage_weights is not None:
        weights["advantage_weights"] = found.advantage_weights
        weights["advantages"] = advantages[:, None] * found.advantage_weights
    kl_weights = found.kl_weights
    if not kl_on_zero_variance:
        kl_weights = (torch.ones_like(batch.entropies) if kl_weights is None else kl_weights) * spread[:, None]
    if kl_weights is not None:
        weights["kl_weights"] = kl_weights
    return weights, found.logged


def unique_share(codes: Int[Tensor, "N T"], num_generations: int) -> Float[Tensor, " groups"]:
    """Share of distinct images in each group, in (0, 1]: RL tends to lower it."""
    grouped = codes.view(-1, num_generations, codes.shape[-1])
    equal = (grouped[:, :, None] == grouped[:, None]).all(dim=-1)
    repeats_an_earlier_one = equal.tril(diagonal=-1).any(dim=-1)
    return 1 - repeats_an_earlier_one.float().mean(dim=1)
